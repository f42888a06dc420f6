"""Recall@100 of every kind of index against Flat, over the documents of several collections together.

    python benchmarks/kinds.py FOLDER MODEL [--work DIR] [--kinds "SQ8 HNSW32 ..."] [--queries 1000]

FOLDER holds one folder a collection, each with corpus.jsonl and queries.jsonl (BEIR layout). Ids are prefixed by the
collection's name. The Flat index stays in DIR, so that another run encodes nothing. Prints a Markdown table: the share
of Flat's first 100 hits that a kind finds among its own, its size, the time to build it and that of a query, with the
default search parameters.
"""

import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path

import click
import faiss
import numpy as np

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.indexing.build import build_index, rebuild_index
from effir_search.indexing.copies import best_documents, read_copies
from effir_search.indexing.faiss_kinds import set_search_parameters
from effir_search.indexing.index_record import read_index
from effir_search.indexing.nearest import nearest_rows
from effir_search.settings import IndexSettings
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.trec import read_topics

DEPTH = 100
KINDS = "SQfp16 SQ8 HNSW32 IVF256,Flat IVF256,SQ8 PQ64 OPQ64,PQ64 IVF256,PQ64"


def documents_of(folder: Path) -> Iterator[Document]:
    """Yield the documents of all collections, with ids that tell them apart."""
    for path in sorted(folder.glob("*/corpus.jsonl")):
        for document in read_corpus(path):
            yield document._replace(doc_id=f"{path.parent.name}/{document.doc_id}")


def queries_of(folder: Path, size: int) -> list[str]:
    """Return the texts of so many queries, the same share of every collection's, as far as it has them."""
    texts = [[query.text for query in read_topics(path)] for path in sorted(folder.glob("*/queries.jsonl"))]
    taken = itertools.chain.from_iterable(itertools.zip_longest(*texts))
    return list(itertools.islice((text for text in taken if text and text.strip()), size))


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("model")
@click.option("--work", type=click.Path(path_type=Path), default=Path("indexes/kinds"))
@click.option("--kinds", default=KINDS)
@click.option("--queries", "num_queries", default=1000)
def main(folder: Path, model: str, work: Path, kinds: str, num_queries: int) -> None:
    """Print the table."""
    work.mkdir(parents=True, exist_ok=True)
    encoder = Encoder.from_pretrained(model, dtype="fp32")
    if not (work / "Flat").exists():
        build_index(documents_of(folder), encoder, work / "Flat")
    vectors = scale(encoder.encode_queries(queries_of(folder, num_queries)), encoder.config)
    exact = None
    print("| kind | recall@100 | MB | seconds to build | ms a query |")
    print("| --- | ---: | ---: | ---: | ---: |", flush=True)
    for kind in ["Flat", *kinds.split()]:
        path, start = work / kind.replace(",", "-"), time.perf_counter()
        if not path.exists():
            rebuild_index(work / "Flat", path, IndexSettings(kind=kind))
        built = time.perf_counter() - start
        index, doc_ids = read_index(path)
        copies = read_copies(path, index.ntotal)
        set_search_parameters(index, hits=DEPTH)
        start = time.perf_counter()
        found = [best_documents(*hits, doc_ids, copies, DEPTH) for hits in nearest_rows(index, vectors, DEPTH)]
        searched = (time.perf_counter() - start) / len(vectors)
        found = [{doc_id for _, doc_id in hits} for hits in found]
        exact = found if exact is None else exact
        recall = np.mean([len(a & b) / DEPTH for a, b in zip(found, exact, strict=True)])
        size = (path / "index").stat().st_size / 1e6
        took = f"{built:.1f}" if kind != "Flat" else ""
        print(f"| {kind} | {recall:.4f} | {size:.1f} | {took} | {searched * 1000:.2f} |", flush=True)
    print(
        json.dumps(
            {
                "documents": len(doc_ids) + sum(map(len, copies.values())),
                "queries": len(vectors),
                "threads": faiss.omp_get_max_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
