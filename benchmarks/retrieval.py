"""Retrieval quality on test collections in the BEIR layout, beside Pyserini's BM25.

    python benchmarks/retrieval.py FOLDER MODEL [--only scifact,cacm]

FOLDER holds one folder a collection, each with corpus.jsonl, queries.jsonl and qrels/test.tsv. Prints a Markdown table
of nDCG@10 and R@100 over the judged queries that have a relevant document, and of documents encoded a second.
"""

import tempfile
import time
from pathlib import Path

import click

from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.indexing.build import index_corpus
from effir_search.searching.pyserini_bridge import build_bm25, search_bm25
from effir_search.searching.search_topics import load_topics, search
from effir_search.searching.searcher import load_encoder
from effir_search.settings import EncoderOptions
from effir_search.text.corpus import read_corpus
from effir_search.text.trec import read_qrels


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--only", help="Names of collections, divided by commas.")
@click.option("--dtype", default="auto")
@click.option("--device", default="auto")
def main(folder: Path, model: str, only: str | None, dtype: str, device: str) -> None:
    """Print the table, a line as each collection is done."""
    names = only.split(",") if only else sorted(path.parent.parent.name for path in folder.glob("*/qrels/test.tsv"))
    measures = parse_measures("nDCG@10 R@100")
    print("| collection | documents | queries | BM25 nDCG@10 | R@100 | encoder nDCG@10 | R@100 | documents/s |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name in names:
            corpus, index_dir = folder / name / "corpus.jsonl", Path(work) / name
            qrels = read_qrels(folder / name / "qrels" / "test.tsv")
            topics = load_topics(str(folder / name / "queries.jsonl"), qrels=qrels)
            start = time.perf_counter()
            info = index_corpus(str(corpus), model, index_dir, options=EncoderOptions(dtype=dtype, device=device))
            seconds = time.perf_counter() - start
            dense = search(index_dir, load_encoder(index_dir, options=EncoderOptions(device=device)), topics, k=100)
            build_bm25(read_corpus(corpus), Path(work) / f"{name}-bm25")
            sparse = search_bm25(Path(work) / f"{name}-bm25", topics, k=100)
            scores = [evaluate_queries(run, qrels, measures, only_with_positives=True) for run in (sparse, dense)]
            cells = [name, f"{info.num_documents:,}", f"{len(scores[0].per_query):,}"]
            cells += [f"{value:.3f}" for evaluation in scores for value in evaluation.mean.values()]
            print(f"| {' | '.join([*cells, f'{info.num_documents / seconds:.0f}'])} |", flush=True)


if __name__ == "__main__":
    main()
