"""How good an encoder is while it is trained: nDCG@10 on a split that is no test, or likeness to the teacher."""

import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.evaluation.measures import evaluate, parse_measures
from effir_search.text.corpus import Document, read_corpus
from effir_search.text.folders import beir_file
from effir_search.text.own_documents import check_own_documents
from effir_search.text.training_records import warn_of_missing
from effir_search.text.trec import Query, read_qrels, read_topics
from effir_search.training.imitation_objective import compares_directions
from effir_search.training.plain_texts import PlainText, encode_texts

logger = logging.getLogger(__name__)

# Name of a figure and the function that measures it; larger is better.
Measure = tuple[str, Callable[[Encoder], float]]


class DevSplit(NamedTuple):
    """Some judged queries and the documents they are searched in."""

    queries: list[Query]
    documents: list[Document]
    qrels: list[Qrel]


def read_dev_split(
    folder: Path, split: str, *, num_queries: int = 200, num_documents: int = 2000, seed: int = 0
) -> DevSplit:
    """Return a sample of a BEIR folder's split: some of its queries, their judged documents and some others.

    Searching a sample is easier than searching all: its figures compare checkpoints, not systems.

    Args:
        folder: With ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/SPLIT.tsv``.
        split: Name of the qrels.
        num_queries: At most so many.
        num_documents: Of the corpus, at most so many; judged ones of these queries are in, whatever their number.
        seed: Of both samples.

    Raises:
        ValueError: A bad line, or a split without a relevant document, without a topic that has a text, or of other
            topics or another corpus.
        OSError: A file cannot be read.
    """
    corpus, topics = str(beir_file(folder, "corpus.jsonl")), beir_file(folder, "queries.jsonl")
    qrels = read_qrels(folder / "qrels" / f"{split}.tsv")
    judged = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    if not judged:
        raise UserError(f"{folder}: no relevant document in its split {split!r}")
    judged_queries = {query.query_id: query for query in read_topics(topics) if query.query_id in judged}
    warn_of_missing(f"qrels/{split}.tsv", topics, "topic", judged, judged_queries)
    generator = random.Random(seed)
    chosen = set(generator.sample(sorted(judged_queries), min(num_queries, len(judged_queries))))
    qrels = [qrel for qrel in qrels if qrel.query_id in chosen]
    doc_ids = {qrel.doc_id for qrel in qrels}
    others = [document.doc_id for document in read_corpus(corpus) if document.doc_id not in doc_ids]
    doc_ids.update(generator.sample(others, min(max(0, num_documents - len(doc_ids)), len(others))))
    documents = [document for document in read_corpus(corpus) if document.doc_id in doc_ids]
    by_id = {document.doc_id: document for document in documents}
    relevant = {qrel.doc_id for qrel in qrels if qrel.relevance > 0}
    warn_of_missing(f"qrels/{split}.tsv", corpus, "document", relevant, by_id)
    queries = [query for query in judged_queries.values() if query.query_id in chosen]
    if empty := {query.query_id for query in queries if not query.text.strip()}:
        logger.warning("%s: %d of %d judged topics are empty and left out", topics, len(empty), len(queries))
        queries = [query for query in queries if query.query_id not in empty]
        qrels = [qrel for qrel in qrels if qrel.query_id not in empty]
    if not queries:
        raise UserError(f"{topics}: no topic with a text is judged in the split {split!r}")
    return DevSplit(queries, documents, [qrel for qrel in qrels if qrel.doc_id in by_id])


def search_exactly(
    encoder: Encoder,
    queries: Sequence[Query],
    documents: Sequence[Document],
    *,
    k: int = 100,
    remove_query: bool = False,
) -> list[ScoredDoc]:
    """Return each query's best documents by the model's similarity to all of them, which are in memory.

    With ``remove_query`` the document whose id is the query's is left out.
    """
    document_vectors = scale(encoder.encode_documents(documents), encoder.config)
    query_vectors = scale(encoder.encode_queries([query.text for query in queries]), encoder.config)
    scores = query_vectors @ document_vectors.T
    if remove_query:
        column = {document.doc_id: number for number, document in enumerate(documents)}
        for row, query in enumerate(queries):
            if query.query_id in column:
                scores[row, column[query.query_id]] = -np.inf
    best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return [
        ScoredDoc(query.query_id, documents[column].doc_id, float(scores[row, column]))
        for row, query in enumerate(queries)
        for column in best[row]
        if scores[row, column] > -np.inf
    ]


def ndcg(split: DevSplit, *, remove_query: bool = False) -> Measure:
    """Return nDCG@10 of an encoder's exact search in a dev split; queries that are among its documents are warned of.

    Args:
        split: Queries, documents and judgments.
        remove_query: Leave out the document whose id is the query's.
    """
    measures = parse_measures("nDCG@10")
    documents = {document.doc_id: document for document in split.documents}
    option = "--dev-remove-query (dev_remove_query in [data] of a recipe)"
    check_own_documents("--dev", split.queries, documents, remove_query=remove_query, option=option)

    def measure(encoder: Encoder) -> float:
        run = search_exactly(encoder, split.queries, split.documents, remove_query=remove_query)
        return float(evaluate(run, split.qrels, measures)[measures[0]])

    return "nDCG@10", measure


def likeness(texts: list[PlainText], teacher: Encoder) -> Measure:
    """Return how well an encoder's similarities between held-out texts agree with the teacher's: Pearson's correlation.

    It lies in [-1, 1], compares teachers and students of any dimension, and is what ranking depends on.
    """
    plain, queries = [text.text for text in texts], [text.query for text in texts]
    upper = np.triu_indices(len(texts), k=1)
    teacher_embeddings = encode_texts(teacher, plain, queries)

    def measure(encoder: Encoder) -> float:
        config = (
            replace(teacher.config, similarity="cosine") if compares_directions(teacher, encoder) else teacher.config
        )
        expected = scale(teacher_embeddings, config)
        embeddings = scale(encode_texts(encoder, plain, queries), encoder.config)
        scores, teacher_scores = embeddings @ embeddings.T, expected @ expected.T
        return float(np.corrcoef(scores[upper], teacher_scores[upper])[0, 1])

    return "likeness", measure
