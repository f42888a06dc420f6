"""nDCG@10 of a model without its least important MLPs, attentions or blocks, not fine-tuned, by every criterion.

    python benchmarks/depth.py FOLDER MODEL --texts squad/corpus.jsonl --texts medquad/corpus.jsonl \
        [--only scifact,cisi,cacm,vaswani] [--most 3] [--results runs/depth.json]

FOLDER holds one folder a collection (BEIR layout). The texts that importance is measured on should be none of these
collections'. Every set of layers is evaluated once, whatever criteria choose it; what is done stays in the results
file, from which the same command goes on. Prints a Markdown table.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import click
import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.encoding.batching import Tokens
from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.model.layers import PART_KINDS
from effir_search.model.surgery import prune
from effir_search.pruning.calibration import sample_texts
from effir_search.pruning.dropping_order import CRITERIA
from effir_search.text.corpus import document_text, read_corpus
from effir_search.text.trec import read_qrels, read_topics


class Collection(NamedTuple):
    """What is searched, tokenized once for all models."""

    doc_ids: list[str]
    documents: Tokens
    query_ids: list[str]
    queries: Tokens
    qrels: list[Qrel]


def read_collection(folder: Path, encoder: Encoder) -> Collection:
    """Return a collection's documents and its judged topics."""
    documents, qrels = list(read_corpus(folder / "corpus.jsonl")), read_qrels(folder / "qrels" / "test.tsv")
    judged = {judgment.query_id for judgment in qrels}
    topics = [query for query in read_topics(folder / "queries.jsonl") if query.query_id in judged]
    config = encoder.config
    return Collection(
        [document.doc_id for document in documents],
        encoder.tokenize([document_text(document) for document in documents], prompt=config.document_prompt),
        [query.query_id for query in topics],
        encoder.tokenize([query.text for query in topics], prompt=config.query_prompt),
        qrels,
    )


def hits(encoder: Encoder, collection: Collection, depth: int = 100) -> Iterator[ScoredDoc]:
    """Yield each topic's best documents by the model's similarity, as a search finds them."""
    documents, queries = (
        scale(encoder.encode_tokens(tokens).embeddings, encoder.config)
        for tokens in (collection.documents, collection.queries)
    )
    scores = queries @ documents.T
    for query_id, of_query in zip(collection.query_ids, scores, strict=True):
        for row in np.argsort(-of_query, kind="stable")[:depth]:
            yield ScoredDoc(query_id, collection.doc_ids[row], float(of_query[row]))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--texts", multiple=True, required=True)
@click.option("--only", default="scifact,cisi,cacm,vaswani")
@click.option("--most", default=3, help="Parts that are dropped at most.")
@click.option("--results", type=click.Path(path_type=Path), default=Path("runs/depth.json"))
@click.option("--dtype", default="fp32", help="Arithmetic of the searches; importance is measured in float32.")
def main(folder: Path, model: str, texts: Sequence[str], only: str, most: int, results: Path, dtype: str) -> None:
    """Evaluate and print."""
    names = only.split(",")
    encoder = Encoder.from_pretrained(model, dtype="fp32")
    done = json.loads(results.read_text()) if results.exists() else {"orders": {}, "scores": {}}
    if not done["orders"]:
        tokens = encoder.tokenize(sample_texts(texts).texts, prompt=encoder.config.document_prompt)
        orders = {name: criterion(encoder, tokens, PART_KINDS, most) for name, criterion in CRITERIA.items()}
        done["orders"] = {
            name: {kind: [part.layer_idx for part in parts] for kind, parts in of_kinds.items()}
            for name, of_kinds in orders.items()
        }
    collections = {name: read_collection(folder / name, encoder) for name in names}
    measures = parse_measures("nDCG@10")
    plans = {"full": ("mlp", [])}
    for kind in ("mlp", "attention", "block"):
        for number in range(1, most + 1):
            for name in CRITERIA:
                layers = sorted(done["orders"][name][kind][:number])
                plans[f"{number} {kind} {name}"] = kind, layers
    for kind, layers in plans.values():
        scores = done["scores"].setdefault(f"{kind} {layers}", {})
        if missing := [name for name in names if name not in scores]:
            pruned = Encoder.from_pretrained(model, dtype=dtype)
            pruned.model = prune(pruned.model, **{kind: layers})
            pruned.pack()
            for name in missing:
                run = hits(pruned, collections[name])
                evaluation = evaluate_queries(run, collections[name].qrels, measures, only_with_positives=True)
                scores[name] = next(iter(evaluation.mean.values()))
                results.write_text(json.dumps(done, indent=1))
                click.echo(f"{kind} {layers} {name} {scores[name]:.4f}", err=True)
    print(f"| dropped | criterion | layers | {' | '.join(names)} | mean | kept |")
    print(f"| --- | --- | --- | {'---: | ' * len(names)}---: | ---: |")
    full = np.mean([done["scores"]["mlp []"][name] for name in names])
    for plan, (kind, layers) in plans.items():
        number, _, criterion = (*plan.split(), "", "")[:3]
        scores = [done["scores"][f"{kind} {layers}"][name] for name in names]
        what = f"{number} {kind}" if layers else "nothing"
        cells = [what, criterion, ", ".join(map(str, layers)), *(f"{score:.3f}" for score in scores)]
        print(f"| {' | '.join([*cells, f'{np.mean(scores):.4f}', f'{np.mean(scores) / full:.1%}'])} |")


if __name__ == "__main__":
    main()
