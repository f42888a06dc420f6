"""nDCG@10 of several models on test collections, what each keeps of the first one, with bootstrap intervals.

Usage: python benchmarks/quality.py FOLDER FULL PRUNED TUNED ... --results FILE
"""

import json
from pathlib import Path

import click
import numpy as np

from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.benchmark import resampled_means
from effir_search.evaluation.bootstrap import RESAMPLES
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.model.arithmetic import count, empty_model
from effir_search.text.corpus import read_corpus
from effir_search.text.trec import read_qrels, read_topics
from effir_search.training.dev import search_exactly


def per_query(encoder: Encoder, folder: Path) -> dict[str, float]:
    """Return nDCG@10 of every judged query with a relevant document, by exact search."""
    measures = parse_measures("nDCG@10")
    qrels = read_qrels(folder / "qrels" / "test.tsv")
    judged = {qrel.query_id for qrel in qrels}
    queries = [query for query in read_topics(folder / "queries.jsonl") if query.query_id in judged]
    documents = list(read_corpus(folder / "corpus.jsonl"))
    run = search_exactly(encoder, queries, documents)
    found = evaluate_queries(run, qrels, measures, only_with_positives=True).per_query
    return {query_id: values[measures[0]] for query_id, values in found.items()}


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, required=True)
@click.option("--only", default="scifact,cisi,cacm,vaswani,medquad")
@click.option("--dtype", default="auto")
@click.option("--results", type=click.Path(path_type=Path), help="JSON file of what was measured, read and continued.")
def main(folder: Path, models: tuple[str, ...], only: str, dtype: str, results: Path | None) -> None:
    """Print the table: the first model is the full one, the second, if there are more, the one before training."""
    known = json.loads(results.read_text()) if results and results.is_file() else {}
    names, sizes, hashes = only.split(","), [], []
    for model in models:
        encoder = Encoder.from_pretrained(model, dtype=dtype)
        sizes.append(count(empty_model(encoder.model.config)).without_embeddings)
        hashes.append(f"{encoder.weights_sha256} {encoder.dtype}")
        of_model = known.setdefault(hashes[-1], {})
        encoder.pack()
        for name in names:
            if name not in of_model:
                of_model[name] = per_query(encoder, folder / name)
                if results:
                    results.write_text(json.dumps(known))
    figures = {
        name: np.array([[known[key][name][query] for query in known[hashes[0]][name]] for key in hashes])
        for name in names
    }
    drawn = resampled_means(figures)
    kept = drawn / drawn[:, :1]
    lost = drawn[:, :1] - drawn[:, 1:2]
    print(f"| model | parameters | {' | '.join(names)} | mean | kept | won back |")
    print(f"| --- | ---: | {' | '.join('---:' for _ in names)} | ---: | ---: | ---: |")
    for column, model in enumerate(models):
        cells = [Path(model).name, f"{sizes[column] / sizes[0]:.1%}"]
        cells += [f"{values[column].mean():.3f}" for values in figures.values()]
        cells += [f"{drawn[0, column]:.4f}", interval(kept[:, column]) if column else "100%"]
        won = (drawn[:, column] - drawn[:, 1]) / lost[:, 0]
        cells.append(interval(won) if column > 1 else "")
        print(f"| {' | '.join(cells)} |")
    print(f"\nIn brackets 95 % of {RESAMPLES:,} bootstrap samples of the queries; {dtype} arithmetic.")


def interval(values: np.ndarray) -> str:
    """Return the figure and its 95 % interval."""
    low, high = np.percentile(values[1:], [2.5, 97.5])
    return f"{values[0]:.1%} [{low:.1%}, {high:.1%}]"


if __name__ == "__main__":
    main()
