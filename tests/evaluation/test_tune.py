"""Tuning a hybrid search: the figures of the runs it would write, and never on the queries searched for."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import DOCUMENTS, write_jsonl

from effir_search.cli import cli
from effir_search.evaluation.measures import evaluate, parse_measures
from effir_search.evaluation.tune import WEIGHTS, Candidate, best_candidate, separate, tune
from effir_search.searching.hybrid import Ranking, open_index
from effir_search.settings import HybridSettings
from effir_search.text.trec import Qrel, Query, read_run

(NDCG,) = parse_measures("nDCG@10")


@pytest.fixture(scope="module")
def dev():
    """Queries of two words of a document each, which it is relevant for, and one more at random."""
    rng, queries, qrels = np.random.default_rng(0), [], []
    for number in range(300):
        doc_id = str(rng.choice([doc_id for doc_id in DOCUMENTS if doc_id not in ("010", "006")]))
        words = rng.choice([word for word in DOCUMENTS[doc_id][1].split() if len(word) > 2], 2)
        queries.append(Query(f"dev{number}", f"{words[0]} {words[1]} n{number}"))
        qrels += [Qrel(f"dev{number}", doc_id, 2), Qrel(f"dev{number}", f"{rng.integers(1, 13):03}", 2)]
    return queries, list(dict.fromkeys(qrels))


def test_the_figures_are_those_of_the_runs(toy_index, bm25_index, encoder, dev):
    queries, qrels = dev
    queries = [*queries, Query("zebra", "zebra")]  # of which BM25 finds nothing
    qrels = [*qrels, Qrel("zebra", "003", 1)]
    ranking = Ranking(bm25_index=bm25_index, hybrid=HybridSettings(fusion="interpolation"))
    searcher = open_index(toy_index, encoder, ranking=ranking)
    candidates = {(one.normalization, one.weight): one.ndcg for one in tune(searcher, queries, qrels)}
    assert len(candidates) == 2 * len(WEIGHTS)
    for normalization in ("min-max", "z-score"):
        for weight in (0.0, 0.35, 1.0):
            how = HybridSettings(fusion="interpolation", weight=weight, normalization=normalization)
            run = list(searcher.with_settings(how).search(queries))
            expected = evaluate(run, qrels, [NDCG])[NDCG]
            assert candidates[normalization, weight] == pytest.approx(expected, abs=1e-9)
    assert len(set(candidates.values())) > 5


def test_queries_without_a_relevant_document_do_not_count(toy_index, bm25_index, encoder, dev):
    queries, qrels = dev
    searcher = open_index(toy_index, encoder, ranking=Ranking(bm25_index=bm25_index))
    none = [Qrel("n", "001", 0)]
    assert tune(searcher, [*queries[:9], Query("n", "soup")], qrels + none) == tune(searcher, queries[:9], qrels)
    with pytest.raises(ValueError, match="none of the queries to tune on has a relevant document"):
        tune(searcher, [Query("n", "soup")], none)


def test_of_equal_candidates_the_most_even_is_best():
    candidates = [Candidate("min-max", weight, ndcg) for weight, ndcg in ((0.0, 0.7), (0.4, 0.7), (0.5, 0.6), (1, 0.7))]
    assert best_candidate(candidates) == candidates[1]


def test_a_query_that_is_searched_for_is_refused_and_one_of_its_text_left_out():
    queries = [Query("1", "Hot soup"), Query("2", "tea")]
    assert separate([Query("3", "hot  SOUP"), Query("4", "milk")], queries, "dev") == [Query("4", "milk")]
    with pytest.raises(ValueError, match='dev: 1 of 2 queries, such as "2", are also searched for'):
        separate([Query("2", "other"), Query("4", "milk")], queries, "dev")
    with pytest.raises(ValueError, match="every query has the text of one that is searched for"):
        separate([Query("3", "tea")], queries, "dev")


@pytest.fixture
def words(tmp_path, toy_index, bm25_index, collection, dev):
    queries, qrels = dev
    write_jsonl(tmp_path / "dev.jsonl", [{"_id": query.query_id, "text": query.text} for query in queries])
    (tmp_path / "dev.tsv").write_text("".join(f"{q.query_id}\t{q.doc_id}\t{q.relevance}\n" for q in qrels))
    words = ["search", "--index", toy_index, "--bm25", bm25_index, "--topics", collection / "queries.jsonl"]
    return [*words, "--output", tmp_path / "run.trec", "--tune", tmp_path / "dev.tsv"]


def test_the_command_tunes_and_keeps_what_it_tried(tmp_path, words):
    words = [*words, "--fusion", "interpolation", "--tune-topics", tmp_path / "dev.jsonl"]
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert done.exit_code == 0 and "3 topics, 36 hits" in done.output, done.output
    record = json.loads((tmp_path / "run.trec.tuning.json").read_text())
    assert record["queries"] == 300 and len(record["tried"]) == 42
    assert record["chosen"]["ndcg"] == max(one["ndcg"] for one in record["tried"])
    first = read_run(tmp_path / "run.trec")
    chosen = ["--weight", record["chosen"]["weight"], "--normalization", record["chosen"]["normalization"]]
    again = [*words[: words.index("--tune")], "--fusion", "interpolation", *chosen]
    assert CliRunner().invoke(cli, list(map(str, again))).exit_code == 0
    assert read_run(tmp_path / "run.trec") == first


def test_a_normalisation_that_is_given_is_the_only_one_tried(tmp_path, words):
    words = [*words, "--fusion", "interpolation", "--tune-topics", tmp_path / "dev.jsonl", "--normalization", "z-score"]
    assert CliRunner().invoke(cli, list(map(str, words))).exit_code == 0
    tried = json.loads((tmp_path / "run.trec.tuning.json").read_text())["tried"]
    assert {one["normalization"] for one in tried} == {"z-score"} and len(tried) == len(WEIGHTS)


def test_tuning_on_the_queries_searched_for_is_refused(tmp_path, words, collection):
    words = [*words[:-1], collection / "qrels" / "test.tsv", "--fusion", "interpolation"]
    done = CliRunner().invoke(cli, list(map(str, words)))
    assert done.exit_code == 1 and "3 of 3 queries, such as" in done.output and "are also searched for" in done.output
    assert not (tmp_path / "run.trec").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ([], "--tune goes with --fusion interpolation"),
        (["--fusion", "interpolation", "--weight", "0.5"], "--weight does not go with --tune, which chooses it"),
    ],
)
def test_what_tuning_does_not_go_with_is_refused(words, more, message):
    done = CliRunner().invoke(cli, list(map(str, [*words, *more])))
    assert done.exit_code == 2 and message in done.output, done.output
