"""The rows of an index with the largest scores: ties at the cut complete, the score of a pair always the same."""

from collections.abc import Iterator

import faiss
import numpy as np

from effir_search.indexing.faiss_kinds import is_graph

# What the order of additions may change in a float32 product, as a share of the product of both lengths. FAISS adds in
# another order in small batches of queries than in large ones.
ROUNDING = 4e-6
# Rows that are asked for beyond the cut: as many as are within rounding of it by chance, in most searches.
MARGIN = 32
# Rows whose vectors are in memory at once.
BLOCK = 8192


def nearest_rows(index: faiss.Index, queries: np.ndarray, k: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield for each query the rows with the ``k`` largest scores and those scores, in any order.

    There are more of them where the score of the last one is that of others too, within rounding: who orders them by
    score and id and then cuts gets the beginning of what a larger ``k`` gives. An HNSW gives no more than ``k``.
    Where vectors are stored as Flat, SQ8 or SQfp16, scores are their exact products with the query, rounded once, so
    equal vectors have equal scores whatever the batch and the kernel. Those of IVF and PQ are FAISS's.

    Args:
        index: For inner products.
        queries: ``(queries, dimension)`` float32.
        k: At least 1; there are fewer rows where the index, or what is searched of it, holds fewer.
    """
    store = _vector_store(index)
    scores, rows = index.search(queries, min(k if is_graph(index) else k + MARGIN, index.ntotal))
    for query, query_scores, query_rows in zip(queries, scores, rows, strict=True):
        query_scores, query_rows = query_scores[query_rows >= 0], query_rows[query_rows >= 0]
        lowest = _lowest(store, query, query_rows, query_scores, k) if len(query_rows) > k else -np.inf
        if np.isfinite(lowest):
            if query_scores[-1] >= lowest:  # a group of ties that may go on
                _, query_scores, query_rows = index.range_search(query[None], float(lowest))
            else:
                query_scores, query_rows = query_scores[query_scores >= lowest], query_rows[query_scores >= lowest]
        yield query_rows, query_scores if store is None else exact_scores(store, query, query_rows)


def exact_scores(store: faiss.Index, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Return the products of a query with the stored vectors of these rows, added in float64, as float32."""
    wide = query.astype(np.float64)
    blocks = [rows[start : start + BLOCK] for start in range(0, len(rows), BLOCK)]
    with np.errstate(over="ignore", invalid="ignore"):  # a search refuses what a damaged index gives
        # Not by BLAS, which may add in another order in the last rows than in the first.
        scores = [np.einsum("nd,d->n", stored_vectors(store, block).astype(np.float64), wide) for block in blocks]
        return np.concatenate([np.zeros(0), *scores]).astype(np.float32)


def stored_vectors(store: faiss.Index, rows: np.ndarray) -> np.ndarray:
    """Return the stored vectors of these rows, ``(rows, dimension)`` float32."""
    if isinstance(store, faiss.IndexFlat):
        return faiss.rev_swig_ptr(store.get_xb(), store.ntotal * store.d).reshape(-1, store.d)[rows]
    return store.reconstruct_batch(rows)


def _vector_store(index: faiss.Index) -> faiss.Index | None:
    """Return where the vector of every row lies, at least a rounded one; None if there are only sketches, or lists."""
    inner = faiss.downcast_index(index)
    if isinstance(inner, faiss.IndexHNSW):
        inner = faiss.downcast_index(inner.storage)
    return inner if isinstance(inner, faiss.IndexFlat | faiss.IndexScalarQuantizer) else None


def _lowest(store: faiss.Index | None, query: np.ndarray, rows: np.ndarray, scores: np.ndarray, k: int) -> float:
    """What no score is below that may be among the ``k`` largest, once rounding is allowed for."""
    with np.errstate(over="ignore", invalid="ignore"):
        largest = np.abs(scores).max()
        if store is not None:
            largest = np.linalg.norm(query) * np.linalg.norm(stored_vectors(store, rows), axis=1).max()
        return float(scores[k - 1] - 2 * ROUNDING * largest)
