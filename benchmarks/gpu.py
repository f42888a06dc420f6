"""Documents and tokens a second, latency and memory of encoders on one GPU, whole and pruned, beside padded texts.

    python benchmarks/gpu.py [--output runs/gpu.json] [--documents 2048] [--rounds 3] [--device cuda] [--only minilm]

The weights are random, since speed does not depend on them, and so are the texts: lengths are drawn from a log-normal
distribution, 75 tokens in the median for documents and 8 for queries. Mistral-7B's shape is measured whole, without
every second MLP, and like EffiR's model of 3.4 billion parameters, whose other MLPs are 31.6 % narrower, too;
BERT-base's and MiniLM's whole and as ``effir compress`` makes them by default. Each encodes as ``effir index`` does
and, beside it, as transformers does by itself: sdpa, batches of 64 texts sorted by length, padded, each fetched before
the next one. sentence-transformers does just this. It takes some 5 minutes on an H100; ``--device cpu --only minilm``
tries the script.
"""

import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import numpy as np
import torch
from transformers import AutoModel, BertConfig, MistralConfig, PretrainedConfig, PreTrainedModel

from effir_search.benchmarking.machine import machine_facts, matmul_peak, versions
from effir_search.encoding.batching import Tokens
from effir_search.encoding.config import EncoderConfig
from effir_search.encoding.encoder import Encoder, embed
from effir_search.evaluation.turns import clock
from effir_search.files.whole import whole_file
from effir_search.model.arithmetic import flops
from effir_search.model.layers import layers_of, mlp_widths
from effir_search.model.packed import align_units
from effir_search.model.surgery import prune
from effir_search.model.unpadded import can_unpad

PEER_BATCH = 64
CONFIG = EncoderConfig(pooling="mean", normalize=True, max_length=512)


class NoTokenizer:
    """Stands for a tokenizer: texts come as tokens."""

    pad_token_id = 0
    model_input_names = ("input_ids", "attention_mask")


def shapes() -> dict[str, PretrainedConfig]:
    """Return the config of each model, by name."""
    return {
        "minilm": BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
        "bert-base": BertConfig(),
        "mistral-7b": MistralConfig(),
    }


def variants(name: str, device: torch.device) -> Iterator[tuple[str, PreTrainedModel]]:
    """Yield a model of random weights, and it pruned further and further; only one is there at a time."""
    torch.manual_seed(0)
    with device:
        model = AutoModel.from_config(shapes()[name], dtype=torch.bfloat16).eval()
    model = prune(model, record={})
    yield f"{name}, full", model
    number = len(layers_of(model))
    model = prune(model, mlp=range(1, number, 2))
    yield f"{name}, without every second MLP", model
    narrow = 0.316 if name == "mistral-7b" else 0.3
    units = {
        layer: torch.arange(width) < round(width * (1 - narrow))
        for layer, width in enumerate(mlp_widths(model))
        if width
    }
    yield f"{name}, the others {narrow:.1%} narrower, too", prune(model, units=units)


def random_tokens(number: int, median: int, vocabulary: int) -> Tokens:
    """Return texts of random tokens; their lengths are log-normal."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(median), 0.6, number).astype(int), 3, CONFIG.max_length)
    input_ids = [rng.integers(5, vocabulary, length).tolist() for length in lengths]
    return Tokens([""] * number, input_ids, None, 0, 0)


def by_transformers(encoder: Encoder) -> Callable[[Tokens], np.ndarray]:
    """Return a function that encodes padded texts, batch by batch."""

    @torch.inference_mode()
    def encode(tokens: Tokens) -> np.ndarray:
        order = np.argsort([-len(ids) for ids in tokens.input_ids], kind="stable")
        found = np.zeros((len(order), encoder.dimension), dtype=np.float32)
        for start in range(0, len(order), PEER_BATCH):
            rows = order[start : start + PEER_BATCH]
            batch = {name: tensor.to(encoder.device) for name, tensor in tokens.batch(rows, 0).items()}
            found[rows] = embed(encoder.model, batch, CONFIG).cpu().numpy()
        return found

    return encode


def measure(
    encode: Callable[[Tokens], np.ndarray], texts: Tokens, queries: Tokens, rounds: int, device: torch.device
) -> dict[str, float]:
    """Return the medians of some rounds, latency in milliseconds."""
    encode(texts)  # warm up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    seconds = {"documents": [], "queries": []}
    for _ in range(rounds):
        for name, tokens in (("documents", texts), ("queries", queries)):
            begun = clock(device)
            encode(tokens)
            seconds[name].append(clock(device) - begun)
    peak = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    latencies = []
    for row in range(min(200, len(queries.texts))):
        query = queries.of(np.array([row]))
        begun = clock(device)
        encode(query)
        latencies.append(1000 * (clock(device) - begun))
    of_documents = statistics.median(seconds["documents"])
    return {
        "documents/s": len(texts.texts) / of_documents,
        "tokens/s": sum(map(len, texts.input_ids)) / of_documents,
        "queries/s": len(queries.texts) / statistics.median(seconds["queries"]),
        "p50 ms": float(np.percentile(latencies, 50)),
        "p99 ms": float(np.percentile(latencies, 99)),
        "peak GB": peak,
    }


def measure_model(
    name: str, model: PreTrainedModel, number: int, rounds: int, device: torch.device
) -> Iterator[dict[str, object]]:
    """Yield the row of each way to encode with a model."""
    vocabulary = model.config.vocab_size
    texts, queries = random_tokens(number, 75, vocabulary), random_tokens(number, 8, vocabulary)
    work = sum(flops(model, len(ids)) for ids in texts.input_ids)
    align_units(model)  # for both: it is the shape that counts
    encoder = Encoder(model, NoTokenizer(), CONFIG, name=name, files=None)
    padded = by_transformers(encoder)
    unpadding = device.type == "cuda" and can_unpad(model)
    ways = {"padded, transformers": padded}
    ours = Encoder(model, NoTokenizer(), CONFIG, name=name, files=None)
    ours.unpads = unpadding
    ways["effir"] = lambda tokens: ours.encode_tokens(tokens).embeddings
    some = texts.of(np.arange(min(64, number)))
    a, b = padded(some), ways["effir"](some)
    cosine = float((a * b).sum(axis=1).min())
    for way, encode in ways.items():
        figures = measure(encode, texts, queries, rounds, device)
        facts = {"model": name, "way": way, "parameters": model.num_parameters(), "least cosine to padded": cosine}
        yield facts | figures | {"flops/s": work / number * figures["documents/s"]}


def print_table(rows: list[dict[str, object]], peak: float) -> None:
    """Print the rows as Markdown, with ratios to the full model, encoded in the same way."""
    names = ["documents/s", "x full", "queries/s", "x full", "tokens/s", "of the peak", "p50 ms", "p99 ms", "peak GB"]
    print(f"| {' | '.join(['model', 'way', 'parameters', *names])} |")
    print(f"| --- | --- | {' | '.join(['---:'] * (len(names) + 1))} |")
    for row in rows:
        full = next(r for r in rows if r["way"] == row["way"] and r["model"] == f"{row['model'].split(',')[0]}, full")
        ratio = {name: row[name] / full[name] for name in ("documents/s", "queries/s")}
        cells = [
            row["model"],
            row["way"],
            f"{row['parameters'] / 1e6:,.0f} M",
            f"{row['documents/s']:,.0f}",
            f"{ratio['documents/s']:.2f}",
            f"{row['queries/s']:,.0f}",
            f"{ratio['queries/s']:.2f}",
            f"{row['tokens/s']:,.0f}",
            f"{row['flops/s'] / peak:.0%}",
            f"{row['p50 ms']:.2f}",
            f"{row['p99 ms']:.2f}",
            f"{row['peak GB']:.1f}" if row["peak GB"] else "-",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), help="JSON of all figures.")
@click.option("--documents", default=2048, help="Documents, and queries.")
@click.option("--rounds", default=3)
@click.option("--device", default="cuda")
@click.option("--only", type=click.Choice(list(shapes())), multiple=True, help="Models; all without.")
def main(output: Path | None, documents: int, rounds: int, device: str, only: tuple[str, ...]) -> None:
    """Print the table."""
    place = torch.device(device)
    peak = matmul_peak(torch.bfloat16, place)
    print(f"{machine_facts(place)}\nlargest product of matrices in bfloat16: {peak / 1e12:.1f} TFLOP/s\n", flush=True)
    rows = []
    for name in only or shapes():
        for variant, model in variants(name, place):
            for row in measure_model(variant, model, documents, rounds, place):
                print(variant, row["way"], f"{row['documents/s']:.0f} documents/s", flush=True)
                rows.append(row)
            if output:
                with whole_file(output) as file:
                    facts = {"machine": machine_facts(place), "versions": versions(), "peak": peak}
                    json.dump(facts | {"rows": rows}, file, indent=2)
        del model
    print()
    print_table(rows, peak)


if __name__ == "__main__":
    main()
