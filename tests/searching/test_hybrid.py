"""A dense list and BM25's as one: the fusion of both runs, and what does not go together."""

import logging

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import TOPICS, write_jsonl

from effir_search.cli import cli
from effir_search.searching.bm25 import Bm25Searcher, index_bm25
from effir_search.searching.fuse import fuse
from effir_search.searching.hybrid import HybridSearcher, Ranking, open_index
from effir_search.searching.search_topics import search_topics
from effir_search.searching.searcher import Searcher
from effir_search.settings import (
    Bm25Settings,
    FeedbackSettings,
    FuseSettings,
    HybridSettings,
    SearchSettings,
)
from effir_search.text.trec import Query, read_run, write_run

QUERIES = [Query(query_id, text) for query_id, text in TOPICS.items()]


def run_effir(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def hybrid(toy_index, bm25_index, encoder, settings=None, **how):
    ranking = Ranking(bm25_index=bm25_index, hybrid=HybridSettings(**how))
    return open_index(toy_index, encoder, settings or SearchSettings(), ranking=ranking)


@pytest.mark.parametrize(
    ("how", "fused"),
    [
        ({"depth": 5}, {"method": "rrf", "depth": 5}),
        ({"rrf_k": 3}, {"method": "rrf", "rrf_k": 3}),
        ({"fusion": "interpolation"}, {"method": "interpolation", "weights": (0.5, 0.5)}),
        (
            {"fusion": "interpolation", "weight": 0.3, "normalization": "z-score"},
            {"method": "interpolation", "weights": (0.3, 0.7), "normalization": "z-score"},
        ),
    ],
)
def test_it_is_the_fusion_of_both_runs(tmp_path, toy_index, bm25_index, encoder, how, fused):
    write_run(Searcher(toy_index, encoder).search(QUERIES), tmp_path / "dense")
    write_run(Bm25Searcher(bm25_index).search(QUERIES), tmp_path / "bm25")
    fuse([tmp_path / "dense", tmp_path / "bm25"], tmp_path / "fused", FuseSettings(**fused))
    write_run(hybrid(toy_index, bm25_index, encoder, **how).search(QUERIES), tmp_path / "hybrid")
    assert (tmp_path / "hybrid").read_text() == (tmp_path / "fused").read_text()


def test_a_weight_of_1_is_the_dense_order_and_of_0_is_bm25s(toy_index, bm25_index, encoder):
    def order(weight, query):
        hits = hybrid(toy_index, bm25_index, encoder, fusion="interpolation", weight=weight).search([query])
        return [hit.doc_id for hit in hits]

    for query in QUERIES:
        dense = [hit.doc_id for hit in Searcher(toy_index, encoder).search([query])]
        bm25 = [hit.doc_id for hit in Bm25Searcher(bm25_index).search([query])]
        assert order(1.0, query) == dense
        assert order(0.0, query)[: len(bm25) - 1] == bm25[:-1]  # the last one has the score of those that are missing


def test_feedback_and_the_weights_of_words_reach_their_list(toy_index, bm25_index, encoder):
    feedback, bm25 = FeedbackSettings("average"), Bm25Settings(0.1, 1.0)
    both = open_index(toy_index, encoder, ranking=Ranking(feedback, bm25_index, bm25))
    dense = list(Searcher(toy_index, encoder, feedback=feedback).search(QUERIES))
    sparse = list(Bm25Searcher(bm25_index, bm25=bm25).search(QUERIES))
    pairs = list(both.lists(QUERIES))
    assert [hit for pair in pairs for hit in pair[0]] == dense
    assert [hit for pair in pairs for hit in pair[1]] == sparse
    plain = [hit.score for hit in Bm25Searcher(bm25_index).search(QUERIES)]
    assert not np.allclose(plain, [hit.score for hit in sparse])


def test_the_querys_own_document_is_left_out_of_both_lists(toy_index, bm25_index, encoder):
    own = [Query("007", "tea with lemon")]
    hits = list(hybrid(toy_index, bm25_index, encoder, SearchSettings(5, remove_query=True)).search(own))
    assert len(hits) == 5 and "007" not in {hit.doc_id for hit in hits}
    assert next(hybrid(toy_index, bm25_index, encoder).search(own)).doc_id == "007"


def test_one_text_has_the_hits_of_a_topic(toy_index, bm25_index, encoder):
    searcher = hybrid(toy_index, bm25_index, encoder)
    of_topic = list(searcher.search([Query("query", "hot soup")]))
    assert searcher.search_text("hot soup") == of_topic[:10]
    assert searcher.search_text("hot soup", 3) == of_topic[:3]


def test_a_query_that_bm25_has_no_word_of_is_the_dense_one_and_is_said(toy_index, bm25_index, encoder, caplog):
    with caplog.at_level(logging.WARNING):
        hits = list(hybrid(toy_index, bm25_index, encoder).search([QUERIES[1], Query("z", "zebra"), Query("e", "")]))
    dense = [hit.doc_id for hit in Searcher(toy_index, encoder).search([Query("z", "zebra")])]
    assert [hit.doc_id for hit in hits if hit.query_id == "z"] == dense
    assert "the BM25 list has no hits for 1 of 2 queries" in caplog.text
    assert caplog.text.count("1 of 3 topics are empty and get no hits") == 1


def test_indexes_of_different_documents_are_refused(tmp_path, toy_index, encoder):
    write_jsonl(tmp_path / "c.jsonl", [{"_id": "001", "text": "tea"}])
    index_bm25(str(tmp_path / "c.jsonl"), tmp_path / "bm25")
    with pytest.raises(ValueError, match=r"were not built from the same documents \(12 and 1\)"):
        hybrid(toy_index, tmp_path / "bm25", encoder)


def test_the_command_fuses_a_run_and_shows_hits(tmp_path, toy_index, bm25_index, collection, encoder):
    shared = ["--index", toy_index, "--bm25", bm25_index, "--fusion", "interpolation", "--weight", 0.4]
    topics = ["--topics", collection / "queries.jsonl", "--output", tmp_path / "run", "--hits", 4]
    done = run_effir("search", *shared, *topics)
    assert done.output.endswith(f"3 topics, 12 hits -> {tmp_path / 'run'}\n"), done.output
    expected = hybrid(toy_index, bm25_index, encoder, SearchSettings(4), fusion="interpolation", weight=0.4).search(
        QUERIES
    )
    found, expected = read_run(tmp_path / "run"), list(expected)
    assert [hit[:2] for hit in found] == [hit[:2] for hit in expected]
    np.testing.assert_allclose([hit.score for hit in found], [hit.score for hit in expected], atol=1e-5)
    done = run_effir("search", *shared, "--query", "hot soup", "--corpus", collection / "corpus.jsonl", "--hits", 1)
    assert "008  soup" in done.output and "hot tomato soup" in done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--fusion", "rrf"], "--fusion goes with --bm25"),
        (["--weight", "0.4"], "--weight goes with --bm25"),
        (["--tune", "x"], "--tune goes with --bm25"),
        (["--prf", "rocchio", "--rocchio-beta", "nan"], "is not a finite number"),
        (["--prf", "rocchio", "--rocchio-alpha", "0", "--rocchio-beta", "0"], "one of them must be above 0"),
        (["--bm25", "{bm25}", "--tune-topics", "x"], "--tune-topics goes with --tune"),
        (["--bm25", "{bm25}", "--weight", "0.4"], "--weight goes with --fusion interpolation"),
        (["--bm25-k1", "2"], "--bm25-k1 goes with --bm25, or an --index of BM25"),
        (["--prf-depth", "2"], "--prf-depth goes with --prf"),
        (["--prf", "average", "--rocchio-beta", "2"], "--rocchio-beta goes with --prf rocchio"),
        (["--bm25", "{bm25}", "--missing", "zero"], "--missing is for scores, and --fusion rrf adds up ranks"),
        (["--bm25", "{bm25}", "--fusion", "interpolation", "--rrf-k", "9"], "--rrf-k goes with --fusion rrf"),
        (["--bm25", "{toy}"], "no BM25 index in it; effir index --bm25 makes one"),
        (["--bm25", "absent"], "absent: no such folder"),
    ],
)
def test_what_does_not_go_together_is_one_line(toy_index, bm25_index, words, message):
    words = [word.format(bm25=bm25_index, toy=toy_index) for word in words]
    done = run_effir("search", "--index", toy_index, *words, "--query", "soup")
    assert done.exit_code in (1, 2) and message in done.output, done.output


def test_the_searchers_are_told_apart(toy_index, bm25_index, encoder):
    assert type(open_index(toy_index, encoder)) is Searcher
    assert type(open_index(bm25_index)) is Bm25Searcher
    assert type(hybrid(toy_index, bm25_index, encoder)) is HybridSearcher


def test_a_query_that_finds_itself_is_warned_of(tmp_path, toy_index, bm25_index, caplog):
    write_jsonl(tmp_path / "q.jsonl", [{"_id": "008", "text": "soup hot tomato soup with onion , pepper and oil ."}])
    with caplog.at_level(logging.WARNING):
        search_topics(
            str(tmp_path / "q.jsonl"), tmp_path / "run", index_dir=toy_index, ranking=Ranking(bm25_index=bm25_index)
        )
    assert "1 of 1 queries stand in the corpus" in caplog.text
