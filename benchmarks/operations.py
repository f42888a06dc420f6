"""Where a forward pass spends its time, by operation: a model beside a smaller one, in one process.

    python benchmarks/operations.py CORPUS MODEL SMALLER [--limit 512] [--threads 1] [--dtype bf16] [--rounds 3]

Both encode the same documents, in turns, as ``effir index`` does. Prints milliseconds of each operation of torch by
itself, the median of the rounds, and what the smaller model's is of the other's; and the same of the arithmetic, which
is what the smaller one's time would be if everything shrank alike.
"""

import itertools
import statistics
from collections import Counter

import click
import torch
from torch.profiler import ProfilerActivity, profile

from effir_search.encoding.batching import Tokens
from effir_search.encoding.encoder import Encoder
from effir_search.model.arithmetic import empty_model, flops
from effir_search.text.corpus import document_text, read_corpus

# Operations that take less than this share of the first model's time are one row.
LEAST = 0.01


def times(encoder: Encoder, tokens: Tokens) -> Counter:
    """Return the milliseconds of each operation by itself."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        encoder.encode_tokens(tokens)
    return Counter({event.key: event.self_cpu_time_total / 1000 for event in profiler.key_averages()})


@click.command()
@click.argument("corpus")
@click.argument("model")
@click.argument("smaller")
@click.option("--limit", default=512, help="Documents that are encoded.")
@click.option("--threads", default=1)
@click.option("--dtype", default="bf16")
@click.option("--rounds", default=3)
def main(corpus: str, model: str, smaller: str, limit: int, threads: int, dtype: str, rounds: int) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    texts = [document_text(document) for document in itertools.islice(read_corpus(corpus), limit)]
    encoders = [Encoder.from_pretrained(name, dtype=dtype, device="cpu").pack() for name in (model, smaller)]
    tokens = [encoder.tokenize(texts) for encoder in encoders]
    for pair in zip(encoders, tokens, strict=True):
        times(*pair)  # warm up
    measured: list[list[Counter]] = [[], []]
    for _ in range(rounds):
        for of_model, pair in zip(measured, zip(encoders, tokens, strict=True), strict=True):
            of_model.append(times(*pair))
    names = {name for of_model in measured for counter in of_model for name in counter}
    medians = [{name: statistics.median(c[name] for c in of_model) for name in names} for of_model in measured]
    totals = [sum(of_model.values()) for of_model in medians]
    shown = [name for name in names if medians[0][name] >= LEAST * totals[0]]
    rows = [(name, medians[0][name], medians[1][name]) for name in sorted(shown, key=lambda name: -medians[0][name])]
    rest = [total - sum(of_model[name] for name in shown) for total, of_model in zip(totals, medians, strict=True)]
    empty = [empty_model(encoder.model.config) for encoder in encoders]
    work = [sum(flops(model, len(ids)) for ids in of.input_ids) for model, of in zip(empty, tokens, strict=True)]
    print(f"{len(texts)} documents, {threads} threads, {dtype}, medians of {rounds} rounds\n")
    print("| operation | ms | ms, smaller model | share |\n| --- | ---: | ---: | ---: |")
    for name, first, second in [*rows, ("all others", *rest), ("all", *totals)]:
        print(f"| {name} | {first:.0f} | {second:.0f} | {second / first:.2f} |")
    print(f"\nFloating-point operations: {work[1] / work[0]:.3f}; time {totals[1] / totals[0]:.3f}.")


if __name__ == "__main__":
    main()
