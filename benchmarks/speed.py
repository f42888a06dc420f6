"""Documents encoded a second by pruned models beside the full one, and what their arithmetic lets one expect.

    python benchmarks/speed.py CORPUS MODEL PRUNED... [--rounds 3] [--limit 1500] [--threads 2] [--dtype fp32]

All encode the same texts as ``effir index`` does, in one process, in turns after every 1,024 texts, so that a slow
moment of the machine meets all of them. Prints a Markdown table: medians of the rounds, the median of each round's
ratio to the first model, the ratio of the FLOPs of a text of the mean length, and how much of this one the measured
ratio is.
"""

import itertools
import statistics
import time
from pathlib import Path

import click
import torch
from encode import ours

from effir_search.encoding.encoder import Encoder
from effir_search.indexing.encode import in_parts
from effir_search.model.arithmetic import empty_model, flops
from effir_search.model.checkpoint import read_config_file, resolve_model
from effir_search.text.corpus import document_text, read_corpus

# Texts that a model encodes before it is the next one's turn.
TURN = 1024


def mean_length(model: str, texts: list[str]) -> float:
    """Return how many tokens of a text are read, special ones included, on average."""
    encoder = Encoder.from_pretrained(model)
    tokens = encoder.tokenize(texts, prompt=encoder.config.document_prompt)
    return statistics.mean(map(len, tokens.input_ids))


@click.command()
@click.argument("corpus")
@click.argument("models", nargs=-1, required=True)
@click.option("--rounds", default=3, type=click.IntRange(3))
@click.option("--limit", default=1500, help="Documents that are encoded.")
@click.option("--threads", default=2)
@click.option("--dtype", default="fp32")
def main(corpus: str, models: tuple[str, ...], rounds: int, limit: int, threads: int, dtype: str) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    texts = [document_text(document) for document in itertools.islice(read_corpus(corpus), limit)]
    length = mean_length(models[0], texts)
    configs = {name: read_config_file(resolve_model(name) / "config.json") for name in models}
    operations = {name: flops(empty_model(config), round(length)) for name, config in configs.items()}
    encoders = {name: ours(name, dtype) for name in models}
    for encode in encoders.values():
        encode(texts[:64])  # warm up
    speeds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(rounds):
        seconds = dict.fromkeys(models, 0.0)
        for turn in in_parts(texts, TURN):
            for name, encode in encoders.items():
                start = time.perf_counter()
                encode(turn)
                seconds[name] += time.perf_counter() - start
        for name in models:
            speeds[name].append(len(texts) / seconds[name])
    print(f"{len(texts)} documents, {length:.1f} tokens on average, {dtype}, {threads} threads, {rounds} rounds\n")
    print("| model | documents/s | measured ratio | FLOP ratio | measured / FLOP |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, of_rounds in speeds.items():
        measured = statistics.median(a / b for a, b in zip(of_rounds, speeds[models[0]], strict=True))
        expected = operations[models[0]] / operations[name]
        ratios = f"{measured:.3f} | {expected:.3f} | {measured / expected:.3f}"
        print(f"| {Path(name).name} | {statistics.median(of_rounds):.0f} | {ratios} |")


if __name__ == "__main__":
    main()
