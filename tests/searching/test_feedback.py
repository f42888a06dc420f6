"""Vector feedback: equal to Pyserini's classes for every kind of index, or a reason why not."""

import faiss
import numpy as np
import pytest
from click.testing import CliRunner
from conftest import WORDS

from effir_search.cli import cli
from effir_search.indexing.build import build_index
from effir_search.searching.feedback import fed_back
from effir_search.searching.pyserini_bridge import pyserini_faiss, query_encoder
from effir_search.searching.searcher import Searcher
from effir_search.settings import FeedbackSettings, IndexSettings, SearchSettings
from effir_search.text.corpus import Document
from effir_search.text.trec import Query, read_run

KINDS = ["Flat", "SQ8", "SQfp16", "PQ8x4", "HNSW16", "HNSW16,SQ8", "IVF4,Flat", "IVF4,PQ8x4", "OPQ8,IVF4,PQ8x4"]
QUERIES = [Query(str(number), text) for number, text in enumerate(["hot soup", "sweet tea with lemon", "cat", "fish"])]


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    return [Document(f"d{n}", " ".join(rng.choice(WORDS, rng.integers(4, 14)))) for n in range(400)]


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, documents, encoder):
    """An index of every kind."""
    folder = tmp_path_factory.mktemp("kinds")
    for kind in KINDS:
        build_index(documents, encoder, folder / kind.replace(",", "-"), IndexSettings(kind=kind))
    return folder


def pyserinis(index_dir, encoder, feedback, k):
    """Pyserini's own searcher and classes, as its command puts them together."""
    base = pyserini_faiss()
    searcher = base.FaissSearcher(str(index_dir), query_encoder(encoder))
    ids = [query.query_id for query in QUERIES]
    depth = feedback.prf_depth
    vectors, candidates = searcher.batch_search([query.text for query in QUERIES], ids, depth, return_vector=True)
    if feedback.prf == "average":
        prf = base.DenseVectorAveragePrf()
    else:
        weights = (feedback.rocchio_alpha, feedback.rocchio_beta, feedback.rocchio_gamma)
        prf = base.DenseVectorRocchioPrf(*weights, feedback.rocchio_topk or depth, feedback.rocchio_bottomk)
    return searcher.batch_search(prf.get_batch_prf_q_emb(ids, vectors, candidates), ids, k)


@pytest.mark.parametrize(
    "feedback",
    [
        FeedbackSettings("average"),
        FeedbackSettings("average", 7),
        FeedbackSettings("rocchio", 5),
        FeedbackSettings("rocchio", 6, 0.6, 0.4, 0.2, 3, 2),
        FeedbackSettings("rocchio", 3, 3.0, 2.0),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", KINDS)
def test_hits_and_scores_are_those_of_pyserinis_classes(indexes, encoder, kind, feedback):
    index_dir = indexes / kind.replace(",", "-")
    expected = pyserinis(index_dir, encoder, feedback, 20)
    searcher = Searcher(index_dir, encoder, SearchSettings(hits=20), feedback=feedback)
    found = list(searcher.search(QUERIES))
    for query in QUERIES:
        theirs = {hit.docid: float(hit.score) for hit in expected[query.query_id]}
        ours = {hit.doc_id: hit.score for hit in found if hit.query_id == query.query_id}
        assert len(ours.keys() & theirs.keys()) >= 20 - ("PQ" in kind)  # sketches tie, also where the list ends
        for doc_id in ours.keys() & theirs.keys():
            assert ours[doc_id] == pytest.approx(theirs[doc_id], abs=1e-6 * max(1, abs(theirs[doc_id])))


def test_the_average_and_rocchio_by_hand():
    query, hits = np.array([1.0, 0.0], "f4"), np.array([[0.0, 1.0], [1.0, 1.0], [1.0, 3.0]], "f4")
    np.testing.assert_allclose(fed_back(query, hits, FeedbackSettings("average")), [3 / 4, 5 / 4])
    # 2 (1, 0) + 3 ((0, 1) + (1, 1)) / 2 - 5 (1, 3)
    rocchio = FeedbackSettings("rocchio", 3, 2.0, 3.0, 5.0, 2, 1)
    np.testing.assert_allclose(fed_back(query, hits, rocchio), [2 + 1.5 - 5, 3 - 15])


def test_without_a_hit_the_query_stays_as_it_is():
    query = np.array([0.6, 0.8], "f4")
    for prf in ("average", "rocchio"):
        np.testing.assert_array_equal(fed_back(query, np.zeros((0, 2), "f4"), FeedbackSettings(prf)), query)


def test_several_indexes_are_fed_back_as_one(tmp_path, indexes, documents, encoder):
    for name, half in {"even": documents[::2], "odd": documents[1::2]}.items():
        build_index(half, encoder, tmp_path / name)
    how = {"settings": SearchSettings(hits=20), "feedback": FeedbackSettings("rocchio", 5, rocchio_bottomk=1)}
    together = list(Searcher([tmp_path / "even", tmp_path / "odd"], encoder, **how).search(QUERIES))
    one = list(Searcher(indexes / "Flat", encoder, **how).search(QUERIES))
    assert [hit[:2] for hit in together] == [hit[:2] for hit in one]
    np.testing.assert_allclose([hit.score for hit in together], [hit.score for hit in one], atol=1e-6)


def test_a_document_with_the_vector_of_another_is_fed_back(tmp_path, encoder):
    documents = [Document("a", "hot soup"), Document("b", "hot soup"), Document("c", "sweet tea")]
    for kind in ("Flat", "HNSW16"):  # which has one row for the first two
        build_index(documents, encoder, tmp_path / kind, IndexSettings(kind=kind))
    flat, graph = (
        list(Searcher(tmp_path / kind, encoder, feedback=FeedbackSettings("average", 2)).search(QUERIES[:1]))
        for kind in ("Flat", "HNSW16")
    )
    assert [hit[:2] for hit in flat] == [hit[:2] for hit in graph]
    np.testing.assert_allclose([hit.score for hit in flat], [hit.score for hit in graph], atol=1e-6)


def test_the_querys_own_document_is_no_feedback_where_it_is_left_out(indexes, encoder, documents):
    own = Query("d7", documents[7].text)
    feedback = FeedbackSettings("average", 3)
    without = Searcher(indexes / "Flat", encoder, SearchSettings(5, remove_query=True), feedback=feedback)
    hits = list(without.search([own]))
    plain = list(Searcher(indexes / "Flat", encoder, SearchSettings(4)).search([own]))[1:]
    rows = [documents[int(hit.doc_id[1:])] for hit in plain]
    vector = np.vstack([encoder.encode_queries([own.text]), encoder.encode_documents(rows)]).mean(axis=0)
    products = encoder.encode_documents(documents) @ vector
    order = [f"d{n}" for n in np.argsort(-products) if n != 7][:5]
    assert [hit.doc_id for hit in hits] == order
    assert hits[0].score == pytest.approx(np.sort(np.delete(products, 7))[-1], abs=1e-5)


def test_an_index_that_gives_no_vectors_back_says_so(tmp_path, documents, encoder):
    vectors = encoder.encode_documents(documents)
    index = faiss.index_factory(32, "ITQ16,Flat", faiss.METRIC_INNER_PRODUCT)
    index.train(vectors)
    index.add(vectors)
    faiss.write_index(index, str(tmp_path / "index"))
    (tmp_path / "docid").write_text("".join(f"{document.doc_id}\n" for document in documents))
    assert len(list(Searcher(tmp_path, encoder, SearchSettings(5)).search(QUERIES))) == 20
    with pytest.raises(ValueError, match="--prf needs the vectors of the hits, and IndexPreTransform does not give"):
        Searcher(tmp_path, encoder, feedback=FeedbackSettings("average"))


@pytest.mark.parametrize("name", ["rocchio_topk", "rocchio_bottomk"])
def test_more_hits_than_are_looked_at_are_refused(name):
    with pytest.raises(ValueError, match=f"--{name.replace('_', '-')} 4: more than the 3 of --prf-depth"):
        FeedbackSettings("rocchio", 3, **{name: 4})


def test_the_command_searches_twice(tmp_path, indexes, encoder, collection):
    words = ["search", "--index", str(indexes / "Flat"), "--encoder", encoder.name, "--dtype", "fp32", "--hits", "9"]
    words += ["--topics", str(collection / "queries.jsonl"), "--output", str(tmp_path / "run")]
    words += ["--prf", "rocchio", "--prf-depth", "4", "--rocchio-beta", "0.5"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    topics = [Query("1", "what eats the cat ?"), Query("2", "hot soup"), Query("007", "sweet tea")]
    feedback = FeedbackSettings("rocchio", 4, rocchio_beta=0.5)
    expected = list(Searcher(indexes / "Flat", encoder, SearchSettings(9), feedback=feedback).search(topics))
    assert [hit[:2] for hit in read_run(tmp_path / "run")] == [hit[:2] for hit in expected]
