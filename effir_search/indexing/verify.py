"""Is an index what it says it is? Counts, hashes, a sample encoded again, and found; recall of approximate kinds."""

import itertools
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import faiss
import numpy as np

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.indexing.copies import best_documents, read_copies
from effir_search.indexing.faiss_kinds import set_search_parameters
from effir_search.indexing.folder import Rows, rows_of_kept
from effir_search.indexing.index_record import (
    INFO_FILE,
    IndexInfo,
    check_encoder,
    check_files,
    read_index,
    read_index_info,
    require_index,
    store_of,
)
from effir_search.indexing.nearest import BLOCK, ROUNDING, nearest_rows
from effir_search.text.corpus import CorpusHasher, Document, document_text, read_corpus
from effir_search.text.texts import sampled

# Ranks that recall is measured at.
DEPTHS = (10, 100)
# Of a document, those that are searched for: about as many as queries have.
QUERY_WORDS = 8


class Recall(NamedTuple):
    """The share of exact search's first 10 and 100 hits that a search finds, and what the exact one compares."""

    at_10: float
    at_100: float
    num_queries: int
    reference: str


class Verification(NamedTuple):
    """What ``verify_index`` measured on its sample; ``recall`` is None where there is nothing to measure it against."""

    num_documents: int
    num_sampled: int
    lowest_cosine: float
    recall: Recall | None
    kind: str


class _OpenIndex(NamedTuple):
    """An index whose files are those of its record."""

    folder: Path
    info: IndexInfo
    index: faiss.Index
    doc_ids: list[str]
    copies: dict[int, list[str]]


class _Sampled(NamedTuple):
    """A document of the sample, and the row of its vector."""

    document: Document
    row: int


def verify_index(
    index_dir: Path, encoder: Encoder, *, corpus: str | Path | None = None, num_sampled: int = 64, seed: int = 0
) -> Verification:
    """Check counts and hashes of a folder, encode a sample of its documents again, and find them by their own vectors.

    An approximate kind is also searched, as a search is by default, for the first words of a sample of documents.

    Args:
        index_dir: A folder that ``build_index`` wrote.
        encoder: The encoder it was built with.
        corpus: Where the documents are; the default is where they were.
        num_sampled: How many documents are encoded again, and how many queries are searched.
        seed: Of the sample.

    Raises:
        ValueError: The first thing that is not as it should be.
        OSError: A file cannot be read.
    """
    opened = _open(index_dir)
    check_encoder(opened.info, encoder, index_dir)
    source = corpus or opened.info.corpus
    if source is None:
        raise UserError(
            f"{index_dir}: the documents came from a program; give --corpus to encode a sample of them again"
        )
    num_documents = opened.info.num_documents
    chosen = np.random.default_rng(seed).choice(num_documents, min(num_sampled, num_documents), replace=False)
    sample: list[_Sampled] = []
    try:
        queries = sampled(_first_words(source, opened, set(chosen.tolist()), sample), num_sampled, seed)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{index_dir}: counts and hashes are right, but no document could be encoded again: {error}; give the "
            "corpus that the index was built from as --corpus"
        ) from error
    lowest_cosine = _check_vectors(opened, encoder, sample)
    recall = _recall(opened, encoder, queries) if queries else None
    return Verification(num_documents, len(sample), lowest_cosine, recall, opened.info.kind)


def _open(index_dir: Path) -> _OpenIndex:
    """Return the index of a folder, whose hashes and counts are checked."""
    require_index(index_dir)
    info = read_index_info(index_dir)
    if info is None:
        raise UserError(f"{index_dir}: no {INFO_FILE} in it, so there is nothing to verify it against")
    check_files(index_dir, info)
    index, doc_ids = read_index(index_dir)
    copies = read_copies(index_dir, len(doc_ids))
    num_documents = len(doc_ids) + sum(map(len, copies.values()))
    if (num_documents, index.d) != (info.num_documents, info.dimension):
        raise UserError(
            f"{index_dir}: {num_documents} documents with vectors of {index.d}, not {info.num_documents} of "
            f"{info.dimension}"
        )
    return _OpenIndex(index_dir, info, index, doc_ids, copies)


def _first_words(
    source: str | Path, opened: _OpenIndex, positions: Collection[int], sample: list[_Sampled]
) -> Iterator[str]:
    """Yield the first words of every document that has any; add those at these positions to the sample on the way."""
    for position, (document, row) in enumerate(_checked_documents(source, opened)):
        if position in positions:
            sample.append(_Sampled(document, row))
        if text := document_text(document):
            yield " ".join(text.split()[:QUERY_WORDS])


def _check_vectors(opened: _OpenIndex, encoder: Encoder, sample: Sequence[_Sampled]) -> float:
    """Compare the sample, encoded again, with what is stored, and search for it; return the lowest cosine."""
    texts = [document_text(document) for document, _ in sample]
    encoded = encoder.encode(texts, prompt=encoder.config.document_prompt)
    index = opened.index
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()
        lists.nprobe = lists.nlist
    stored = np.stack([index.reconstruct(row) for _, row in sample])
    cosines = cosine(scale(encoded.embeddings, encoder.config), stored)
    if "PQ" not in opened.info.kind and cosines.min() < 0.999:  # product quantisation keeps no more than a sketch
        lowest = int(cosines.argmin())
        raise UserError(
            f'{opened.folder}: document "{sample[lowest].document.doc_id}" encoded again has cosine '
            f"{cosines[lowest]:.4f} to its stored vector, below 0.999"
        )
    # An approximate kind may put near neighbours, whose codes are alike, before the document itself.
    scores, rows = index.search(stored, 1 if opened.info.kind == "Flat" else min(100, index.ntotal))
    own_scores = np.einsum("nd,nd->n", stored, stored)
    for (_, row), score, hits, own_score in zip(sample, scores[:, 0], rows, own_scores, strict=True):
        # With unnormalised vectors a longer one may rightly score above the document itself.
        if row not in hits and score < own_score * (1 - 1e-5):
            raise UserError(f'{opened.folder}: document "{opened.doc_ids[row]}" is not found by its own vector')
    return float(cosines.min())


def _recall(opened: _OpenIndex, encoder: Encoder, queries: Sequence[str]) -> Recall | None:
    """Return which share of exact search's hits a search finds; None where there is nothing to measure it against."""
    reference = _exact_rows(opened)
    if reference is None:
        return None
    exact_rows, name = reference
    vectors = scale(encoder.encode_queries(queries), encoder.config)
    set_search_parameters(opened.index, hits=max(DEPTHS))
    hits = [
        [doc_id for _, doc_id in best_documents(rows, scores, opened.doc_ids, opened.copies, max(DEPTHS))]
        for rows, scores in nearest_rows(opened.index, vectors, max(DEPTHS))
    ]
    return Recall(*recalls(hits, vectors, exact_rows()), len(queries), name)


def _exact_rows(opened: _OpenIndex) -> tuple[Rows, str] | None:
    """Return the vectors that an exact search compares, and what they are: those that were kept, else those stored.

    None for a kind that compares all it stores: there is nothing to measure it against.
    """
    kind = opened.info.kind
    if kind != "Flat" and store_of(opened.folder).is_kept():
        return rows_of_kept(opened.folder, opened.info), "the embeddings that were kept"
    if not ("HNSW" in kind or "IVF" in kind):
        return None
    has_codes = "SQ" in kind or "PQ" in kind
    return lambda: _stored_rows(opened), "the codes in it" if has_codes else "the vectors in it"


def _stored_rows(opened: _OpenIndex) -> Iterator[tuple[np.ndarray, list[str]]]:
    """Yield the vectors of an index, decoded, block by block; a vector stands once for each of its documents."""
    for start in range(0, opened.index.ntotal, BLOCK):
        rows = np.arange(start, min(start + BLOCK, opened.index.ntotal))
        names = [[opened.doc_ids[row], *opened.copies.get(row, ())] for row in rows.tolist()]
        vectors = np.repeat(opened.index.reconstruct_batch(rows), [len(row_names) for row_names in names], axis=0)
        yield vectors, list(itertools.chain.from_iterable(names))


def recalls(
    hits: Sequence[Sequence[str]], queries: np.ndarray, rows: Iterable[tuple[np.ndarray, list[str]]]
) -> list[float]:
    """Return recall at each of ``DEPTHS``: the share of the best k documents among the first k hits, the queries' mean.

    A hit is one of the best k if its exact score is not below the k-th largest, so it does not matter which of several
    tied documents is found.

    Args:
        hits: Document ids of each query, best first.
        queries: ``(queries, dimension)`` float32.
        rows: Exact vectors of all documents with their ids, block by block.
    """
    found_by: dict[str, list[int]] = {}
    for query, doc_ids in enumerate(hits):
        for doc_id in doc_ids:
            found_by.setdefault(doc_id, []).append(query)
    score_of: list[dict[str, float]] = [{} for _ in hits]
    best = np.zeros((len(queries), 0), dtype=np.float32)  # (queries, at most the largest depth), descending
    for vectors, ids in rows:
        scores = queries @ vectors.T  # (queries, block)
        best = -np.sort(-np.concatenate([best, scores], axis=1), axis=1)[:, : max(DEPTHS)]
        for column, doc_id in enumerate(ids):
            for query in found_by.get(doc_id, ()):
                score_of[query][doc_id] = scores[query, column]
    shares = np.zeros((len(DEPTHS), len(queries)))
    for row, k in enumerate(DEPTHS):
        for query, doc_ids in enumerate(hits):
            best_scores = best[query, :k]
            lowest = best_scores[-1] - ROUNDING * np.abs(best_scores).max()
            shares[row, query] = sum(score_of[query][doc_id] >= lowest for doc_id in doc_ids[:k]) / len(best_scores)
    return shares.mean(axis=1).tolist()


def describe_verified(checked: Verification, index_dir: Path) -> str:
    """Return one line about an index that is what it should be."""
    line = (
        f"{index_dir}: {checked.num_documents} documents, hashes right; {checked.num_sampled} encoded again, "
        f"lowest cosine {checked.lowest_cosine:.6f}, all found"
    )
    if (recall := checked.recall) is not None:
        return (
            f"{line}; against exact search over {recall.reference}, recall@10 is {recall.at_10:.3f} and recall@100 "
            f"{recall.at_100:.3f} ({recall.num_queries} queries: first words of documents)"
        )
    if checked.kind != "Flat":
        line += (
            f"; recall is not measured: {checked.kind} holds no exact vectors, and none were kept (--keep-embeddings)"
        )
    return line


def cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Return the cosine of each pair of rows of two ``(n, dimension)`` arrays; two zero vectors have cosine 1."""
    lengths = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    same = np.where((a == b).all(axis=1), 1.0, 0.0)
    return np.where(lengths > 0, np.einsum("nd,nd->n", a, b) / np.where(lengths > 0, lengths, 1), same)


def _checked_documents(source: str | Path, opened: _OpenIndex) -> Iterator[tuple[Document, int]]:
    """Yield each document and the row of its vector; ids and texts must be those the index was built from."""
    info, doc_ids = opened.info, opened.doc_ids
    row_of_copy = {doc_id: row for row, copy_ids in opened.copies.items() for doc_id in copy_ids}
    hasher, num_rows = CorpusHasher(), 0
    skip = (lambda _complaint: None) if info.num_skipped else None
    documents = read_corpus(source, fields=info.corpus_fields, id_field=info.corpus_id_field, on_bad_line=skip)
    for position, document in enumerate(documents):
        row = row_of_copy.get(document.doc_id, num_rows)
        if row == num_rows:
            if row >= len(doc_ids) or document.doc_id != doc_ids[row]:
                raise UserError(
                    f'{source}: document {position + 1}, "{document.doc_id}", is not the one the index has in that row'
                )
            num_rows += 1
        hasher.add(document)
        yield document, row
    if hasher.hexdigest() != info.corpus_sha256:
        raise UserError(f"{source}: its documents are not those the index was built from (SHA-256 differs)")
