"""Is an index what it says it is? Counts, hashes, a sample encoded again, and found; recall of approximate kinds."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from effir_search.indexing.nearest import BLOCK, ROUNDING, nearest_rows
from effir_search.indexing.record import (
    INFO_FILE,
    IndexInfo,
    check_encoder,
    check_files,
    read_index,
    read_index_info,
    require_index,
    store_of,
)
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
    check_encoder(info, encoder, index_dir)
    source = corpus or info.corpus
    if source is None:
        raise UserError(
            f"{index_dir}: the documents came from a program; give --corpus to encode a sample of them again"
        )

    chosen = np.random.default_rng(seed).choice(num_documents, min(num_sampled, num_documents), replace=False)
    wanted, documents, rows = set(chosen.tolist()), [], []

    def openings() -> Iterator[str]:
        """Walk through the corpus, and keep the documents of the sample on the way."""
        for position, (document, row) in enumerate(_checked_documents(source, info, doc_ids, copies)):
            if position in wanted:
                documents.append(document)
                rows.append(row)
            if text := document_text(document):
                yield " ".join(text.split()[:QUERY_WORDS])

    try:
        queries = sampled(openings(), num_sampled, seed)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{index_dir}: counts and hashes are right, but no document could be encoded again: {error}; give the "
            "corpus that the index was built from as --corpus"
        ) from error
    encoded = encoder.encode([document_text(d) for d in documents], prompt=encoder.config.document_prompt)
    again = scale(encoded.embeddings, encoder.config)
    lists = faiss.try_extract_index_ivf(index)
    if lists is not None:
        lists.make_direct_map()
        lists.nprobe = lists.nlist
    stored = np.stack([index.reconstruct(row) for row in rows])
    cosines = cosine(again, stored)
    if "PQ" not in info.kind and cosines.min() < 0.999:  # product quantisation keeps no more than a sketch
        row = int(cosines.argmin())
        raise UserError(
            f'{index_dir}: document "{documents[row].doc_id}" encoded again has cosine {cosines[row]:.4f} '
            "to its stored vector, below 0.999"
        )
    # An approximate kind may put near neighbours, whose codes are alike, before the document itself.
    scores, found = index.search(stored, 1 if info.kind == "Flat" else min(100, index.ntotal))
    own = np.einsum("nd,nd->n", stored, stored)
    for row, score, hits, self_score in zip(rows, scores[:, 0], found, own, strict=True):
        # With unnormalised vectors a longer one may rightly score above the document itself.
        if row not in hits and score < self_score * (1 - 1e-5):
            raise UserError(f'{index_dir}: document "{doc_ids[row]}" is not found by its own vector')
    recall = None
    reference = _exact_rows(index_dir, info, index, doc_ids, copies)
    if reference is not None and queries:
        exact_rows, name = reference
        vectors = scale(encoder.encode_queries(queries), encoder.config)
        set_search_parameters(index, hits=max(DEPTHS))
        hits = [
            [doc_id for _, doc_id in best_documents(rows, scores, doc_ids, copies, max(DEPTHS))]
            for rows, scores in nearest_rows(index, vectors, max(DEPTHS))
        ]
        recall = Recall(*recalls(hits, vectors, exact_rows()), len(queries), name)
    return Verification(num_documents, len(documents), float(cosines.min()), recall, info.kind)


def _exact_rows(
    index_dir: Path, info: IndexInfo, index: faiss.Index, doc_ids: Sequence[str], copies: Mapping[int, Sequence[str]]
) -> tuple[Rows, str] | None:
    """Return the vectors that an exact search compares, and what they are: those that were kept, else those stored.

    None for a kind that compares all it stores: there is nothing to measure it against.
    """
    if info.kind != "Flat" and store_of(index_dir).is_kept():
        return rows_of_kept(index_dir, info), "the embeddings that were kept"
    if not ("HNSW" in info.kind or "IVF" in info.kind):
        return None

    def stored() -> Iterator[tuple[np.ndarray, list[str]]]:
        for start in range(0, index.ntotal, BLOCK):
            rows = np.arange(start, min(start + BLOCK, index.ntotal))
            names = [[doc_ids[row], *copies.get(row, ())] for row in rows.tolist()]
            vectors = np.repeat(index.reconstruct_batch(rows), [len(of_row) for of_row in names], axis=0)
            yield vectors, list(itertools.chain.from_iterable(names))

    has_codes = "SQ" in info.kind or "PQ" in info.kind
    return stored, "the codes in it" if has_codes else "the vectors in it"


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
            of_query = best[query, :k]
            lowest = of_query[-1] - ROUNDING * np.abs(of_query).max()
            shares[row, query] = sum(score_of[query][doc_id] >= lowest for doc_id in doc_ids[:k]) / len(of_query)
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


def _checked_documents(
    source: str | Path, info: IndexInfo, doc_ids: Sequence[str], copies: Mapping[int, Sequence[str]]
) -> Iterator[tuple[Document, int]]:
    """Yield each document and the row of its vector; ids and texts must be those the index was built from."""
    row_of_copy = {doc_id: row for row, of_row in copies.items() for doc_id in of_row}
    hasher, num_rows = CorpusHasher(), 0
    skip = (lambda _complaint: None) if info.num_skipped else None
    read = read_corpus(source, fields=info.corpus_fields, id_field=info.corpus_id_field, on_bad_line=skip)
    for position, document in enumerate(read):
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
