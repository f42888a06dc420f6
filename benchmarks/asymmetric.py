"""Queries by a small model on documents of the full one: nDCG@10 and how long a query takes, beside each model alone.

    python benchmarks/asymmetric.py FULL SMALL COLLECTION... [--split test] [--dtype fp32] [--threads 1]

SMALL has learned to give the vectors of FULL (effir compress --texts); a COLLECTION is a folder in BEIR's layout.
Prints a Markdown table, a line as each collection is done. The time is the median over single queries, from the text to
its ten hits in the full model's exact index; both models take turns, query by query.
"""

import itertools
import statistics
import tempfile
import time
from pathlib import Path

import click
import torch

from effir_search.evaluation.benchmark import HITS, collection_files, ndcg_per_query
from effir_search.indexing.build import index_corpus
from effir_search.searching.pyserini_bridge import faiss_searcher
from effir_search.searching.search_topics import load_topics
from effir_search.searching.searcher import Searcher
from effir_search.settings import EncoderOptions, SearchSettings
from effir_search.text.trec import Query, read_qrels, write_run

# Queries whose time is taken, and those before them that warm both models up.
TIMED, WARM_UP = 200, 10


@click.command()
@click.argument("full")
@click.argument("small")
@click.argument("collections", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--split", default="test", help="Qrels of the collections.")
@click.option("--remove-query", is_flag=True, help="Leave out the document whose id is the query's.")
@click.option("--dtype", default="auto")
@click.option("--device", default="auto")
@click.option("--threads", default=1, help="Of torch and FAISS.")
def main(
    full: str,
    small: str,
    collections: tuple[Path, ...],
    split: str,
    remove_query: bool,
    dtype: str,
    device: str,
    threads: int,
) -> None:
    """Print the table."""
    torch.set_num_threads(threads)
    options = EncoderOptions(dtype=dtype, device=device)
    print("| collection | queries | full | small on the full model's documents | small | ms, full | ms, small |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    for collection in collections:
        corpus, topics, qrels = map(str, collection_files(collection, split))
        judged = load_topics(topics, qrels=read_qrels(qrels))
        with tempfile.TemporaryDirectory() as work:
            indexes = {model: Path(work) / f"index-{number}" for number, model in enumerate((full, small))}
            for model, index_dir in indexes.items():
                index_corpus(corpus, model, index_dir, options=options)
            settings = SearchSettings(hits=HITS, threads=threads)
            searchers = [
                Searcher(indexes[d], q, settings, options) for q, d in ((full, full), (small, full), (small, small))
            ]
            runs = [Path(work) / f"{number}.trec" for number in range(len(searchers))]
            for searcher, run in zip(searchers, runs, strict=True):
                write_run(searcher.search(judged), run, tag=run.stem)
            figures = ndcg_per_query(runs, qrels, remove_query=remove_query)
            times = milliseconds(indexes[full], searchers[:2], judged, threads)
        cells = [collection.name, f"{figures.shape[1]:,}", *(f"{figure:.4f}" for figure in figures.mean(axis=1))]
        print(f"| {' | '.join([*cells, *(f'{value:.1f}' for value in times)])} |", flush=True)


def milliseconds(index_dir: Path, searchers: list[Searcher], queries: list[Query], threads: int) -> list[float]:
    """Return how long a query takes with the encoder of each searcher, the median."""
    opened = [faiss_searcher(index_dir, searcher.encoder) for searcher in searchers]
    taken: list[list[float]] = [[] for _ in opened]
    for query in itertools.islice(itertools.cycle(queries), TIMED + WARM_UP):
        for searcher, of_encoder in zip(opened, taken, strict=True):
            start = time.perf_counter()
            searcher.search(query.text, k=10, threads=threads)
            of_encoder.append(1000 * (time.perf_counter() - start))
    return [statistics.median(of_encoder[WARM_UP:]) for of_encoder in taken]


if __name__ == "__main__":
    main()
