"""One query at a time, from its text to its hits: ours beside sentence-transformers with faiss, in one process.

    python benchmarks/latency.py MODEL --topics cacm/queries.jsonl [--sizes 10000,1000000] [--queries 100] [--rounds 5]
        [--threads 2] [--openvino EXPORT]

The documents are random vectors of length 1 in a Flat index, which is opened by ``Searcher``, and so by Pyserini, and
by faiss itself; what a search costs depends on their number only. Every way answers a query before the next query
comes. With an export (effir export --to openvino) sentence-transformers runs it, too, by optimum-intel, which must be
installed. Prints the median and the 99th percentile of all rounds, and the median of the rounds' ratios of medians.
"""

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import click
import faiss
import numpy as np
import torch

from effir_search.encoding.encoder import Encoder
from effir_search.searching.searcher import Searcher
from effir_search.settings import EncoderOptions, SearchSettings
from effir_search.text.trec import read_topics

HITS = 10
Way = Callable[[str], list[str]]


def random_index(size: int, dimension: int, folder: Path) -> faiss.IndexFlatIP:
    """Write an index of random vectors in Pyserini's layout, and return it."""
    rng, index = np.random.default_rng(0), faiss.IndexFlatIP(dimension)
    for start in range(0, size, 100_000):
        vectors = rng.standard_normal((min(100_000, size - start), dimension), dtype=np.float32)
        faiss.normalize_L2(vectors)
        index.add(vectors)
    faiss.write_index(index, str(folder / "index"))
    (folder / "docid").write_text("".join(f"{row}\n" for row in range(size)))
    return index


def ours(model: str, index_dir: Path, options: EncoderOptions, threads: int) -> Way:
    """Answer by ``Searcher``."""
    searcher = Searcher(index_dir, model, SearchSettings(hits=HITS, threads=threads), options)
    return lambda query: [hit.doc_id for hit in searcher.search_text(query)]


def by_sentence_transformers(model: str, index: faiss.Index, **settings: object) -> Way:
    """Answer by sentence-transformers and faiss."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu", **settings)

    def answer(query: str) -> list[str]:
        vector = encoder.encode_query([query], normalize_embeddings=True, show_progress_bar=False)
        return [str(row) for row in index.search(vector, HITS)[1][0]]

    return answer


def in_turns(ways: dict[str, Way], queries: list[str], rounds: int) -> np.ndarray:
    """Return the seconds of each answer, ``(rounds, queries, ways)``."""
    for answer in ways.values():
        for query in queries[:10]:  # warm up
            answer(query)
    seconds = np.zeros((rounds, len(queries), len(ways)))
    for of_round in seconds:
        for row, query in enumerate(queries):
            for column, answer in enumerate(ways.values()):
                begun = time.perf_counter()
                answer(query)
                of_round[row, column] = time.perf_counter() - begun
    return seconds


def check(ways: dict[str, Way], queries: list[str]) -> None:
    """Raise ValueError if a way in float32 finds other best documents than the first."""
    for query in queries[:5]:
        first, *others = (answer(query) for name, answer in ways.items() if "bf16" not in name)
        if any(set(first) != set(other) for other in others):
            raise ValueError(f"hits of {query!r} differ: {first} and {others}")


@click.command()
@click.argument("model")
@click.option("--topics", required=True)
@click.option("--sizes", default="10000,1000000", help="Documents of each index.")
@click.option("--queries", default=100)
@click.option("--rounds", default=5)
@click.option("--threads", default=2)
@click.option("--openvino", help="Export of the model in float32.")
def main(model: str, topics: str, sizes: str, queries: int, rounds: int, threads: int, openvino: str | None) -> None:
    """Print a table for each size."""
    torch.set_num_threads(threads)
    faiss.omp_set_num_threads(threads)
    texts = [query.text for query in read_topics(topics)][:queries]
    dimension = Encoder.from_pretrained(model, device="cpu").dimension
    for size in map(int, sizes.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            index = random_index(size, dimension, folder)
            ways = {"sentence-transformers + faiss": by_sentence_transformers(model, index)}
            if openvino:
                settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
                for hint in ("f32", "bf16"):
                    kwargs = {"ov_config": settings | {"INFERENCE_PRECISION_HINT": hint}}
                    ways[f"sentence-transformers OpenVINO {hint} + faiss"] = by_sentence_transformers(
                        openvino, index, backend="openvino", model_kwargs=kwargs
                    )
            for backend, dtype in (("torch", "fp32"), ("torch", "bf16"), ("openvino", "fp32"), ("openvino", "bf16")):
                options = EncoderOptions(backend=backend, dtype=dtype, device="cpu")
                ways[f"effir {backend} {dtype}"] = ours(model, folder, options, threads)
            check(ways, texts)
            print_table(size, list(ways), in_turns(ways, texts, rounds), threads)


def print_table(size: int, names: list[str], seconds: np.ndarray, threads: int) -> None:
    """Print one table."""
    rounds, queries, _ = seconds.shape
    medians = np.median(seconds, axis=1)
    print(f"\n{size:,} documents, {queries} queries, {rounds} rounds, {threads} threads\n")
    print("| way | p50 ms | p99 ms | times as fast as the first |\n| --- | ---: | ---: | ---: |")
    for column, name in enumerate(names):
        p50, p99 = 1000 * np.percentile(seconds[:, :, column], [50, 99])
        print(f"| {name} | {p50:.2f} | {p99:.2f} | {np.median(medians[:, 0] / medians[:, column]):.2f} |", flush=True)


if __name__ == "__main__":
    main()
