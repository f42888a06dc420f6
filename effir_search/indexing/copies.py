"""Documents with equal vectors: an HNSW has one node for all of them, and the file ``copies`` names the others.

As nodes they would fill each other's links, and what is not equal to them would hardly be reached.
"""

import hashlib
import heapq
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from effir_search.errors import UserError

COPIES_FILE = "copies"
DIGEST = np.dtype("V16")


def digests(items: Iterable[bytes | np.ndarray]) -> np.ndarray:
    """Return a digest of the bytes of each item, ``(items,)``; equal ones have equal digests."""
    return np.frombuffer(b"".join(hashlib.blake2b(item, digest_size=16).digest() for item in items), dtype=DIGEST)


def vector_digests(vectors: np.ndarray) -> np.ndarray:
    """Return a digest of each row of ``(rows, dimension)`` float32, ``(rows,)``; equal rows have equal ones."""
    return digests(np.ascontiguousarray(vectors + np.float32(0)))  # -0.0 equals 0.0 and has other bytes


def first_of_equal(blocks: Iterable[np.ndarray]) -> np.ndarray:
    """Return for each digest of a stream of arrays the position of the first that equals it, ``(digests,)`` int64."""
    _, first, group = np.unique(np.concatenate(list(blocks)), return_index=True, return_inverse=True)
    return first[group]


def read_copies(index_dir: Path, num_rows: int) -> dict[int, list[str]]:
    """Return the ids of the documents that have no row of their own, by the 0-based row that has their vector.

    Raises:
        ValueError: A line that is not a row and an id.
    """
    path, copies = index_dir / COPIES_FILE, {}
    if not path.is_file():
        return copies
    for line_number, line in enumerate(path.read_bytes().splitlines(), start=1):
        row, _, doc_id = line.partition(b" ")
        try:
            if not (row.isdigit() and int(row) < num_rows and doc_id):
                raise UserError("no row and id")
            copies.setdefault(int(row), []).append(doc_id.decode("utf-8"))
        except ValueError as error:
            raise UserError(
                f"{path}:{line_number}: not a row of the {num_rows} and an id; build the index again"
            ) from error
    return copies


def best_documents(
    rows: np.ndarray, scores: np.ndarray, doc_ids: Sequence[str], copies: Mapping[int, Sequence[str]], k: int
) -> list[tuple[float, str]]:
    """Return scores and ids of the ``k`` best documents of some rows and their copies, in the order of trec_eval.

    That is by score, then by id, both descending.
    """
    hits = []
    for row, score in zip(rows.tolist(), scores.tolist(), strict=True):
        hits.append((score, doc_ids[row]))
        hits.extend((score, doc_id) for doc_id in copies.get(row, ()))
    return heapq.nlargest(k, hits)
