import faiss
import numpy as np
import pytest

from effir_search.indexing.copies import best_documents
from effir_search.indexing.faiss_kinds import new_index, train
from effir_search.indexing.nearest import nearest_rows

NUM_ROWS, DIMENSION = 3000, 24


@pytest.fixture(scope="module")
def vectors():
    """Vectors of unequal lengths, of which 1,200 are equal, another 12 too, and 5 are zero."""
    rows = np.random.default_rng(0).normal(size=(NUM_ROWS, DIMENSION)).astype(np.float32)
    rows[500:1700] = rows[500]
    rows[10:22] = rows[10]
    rows[30:35] = 0
    return np.random.default_rng(1).permutation(rows)


def built(kind, rows):
    index = new_index(kind, DIMENSION)
    if not index.is_trained:
        train(index, kind, rows[:300])
    index.add(rows)
    return index


def ranked(index, queries, k):
    names = [f"{row:05}" for row in range(index.ntotal)]
    return [best_documents(rows, scores, names, {}, k) for rows, scores in nearest_rows(index, queries, k)]


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16", "PQ8x4", "OPQ4,PQ4x4", "IVF4,Flat", "IVF4,PQ8x4"])
def test_the_best_k_are_the_first_k_of_any_deeper_search(vectors, kind):
    index = built(kind, vectors)
    equal = vectors[np.unique(vectors, axis=0, return_counts=True)[1].argmax()]
    queries = np.stack([vectors[0], equal, -equal, *np.random.default_rng(2).normal(size=(5, DIMENSION))])
    queries = queries.astype(np.float32)
    deepest = ranked(index, queries, NUM_ROWS)
    for k in (1, 3, 12, 13, 100, 600, 1201, 2999):
        for found, expected in zip(ranked(index, queries, k), deepest, strict=True):
            assert [name for _, name in found] == [name for _, name in expected[:k]]
            if kind in ("Flat", "SQ8", "SQfp16"):
                assert found == expected[:k]


def test_a_flat_search_is_the_order_of_exact_products(vectors):
    queries = np.random.default_rng(3).normal(size=(40, DIMENSION)).astype(np.float32)
    exact = (queries.astype(np.float64) @ vectors.astype(np.float64).T).astype(np.float32)
    for row, found in enumerate(ranked(built("Flat", vectors), queries, 50)):
        order = sorted(range(NUM_ROWS), key=lambda number, row=row: (exact[row, number], number), reverse=True)[:50]
        assert [int(name) for _, name in found] == order
        np.testing.assert_allclose([score for score, _ in found], exact[row, order], rtol=1e-6)


@pytest.mark.parametrize("kind", ["Flat", "SQ8", "SQfp16"])
def test_hits_and_scores_do_not_depend_on_the_batch(vectors, kind):
    index = built(kind, vectors)
    queries = np.random.default_rng(4).normal(size=(64, DIMENSION)).astype(np.float32)
    assert ranked(index, queries, 20) == [of for query in queries for of in ranked(index, query[None], 20)]


def test_equal_vectors_have_equal_scores_whatever_their_places():
    rows = np.random.default_rng(5).normal(size=(1031, 129)).astype(np.float32)
    rows[::3] = rows[0]
    index = faiss.IndexFlatIP(129)
    index.add(rows)
    for found, scores in nearest_rows(index, rows[1:60], 1031):
        assert len(np.unique(scores[np.isin(found, np.arange(0, 1031, 3))])) == 1


def test_more_hits_than_rows_are_all_rows(vectors):
    ((rows, scores),) = nearest_rows(built("Flat", vectors[:7]), vectors[:1], 100)
    assert sorted(rows.tolist()) == list(range(7)) and len(scores) == 7
