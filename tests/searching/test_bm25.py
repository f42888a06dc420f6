"""BM25 indexes: Lucene's formula by hand, Pyserini's own searcher, folders that are whole or absent."""

import json
import logging
import math
import shutil

import numpy as np
import pytest
from click.testing import CliRunner
from conftest import write_jsonl

from effir_search.cli import cli
from effir_search.searching.bm25 import BM25_FILE, Bm25Searcher, index_bm25, is_bm25, read_bm25_info
from effir_search.searching.info import describe
from effir_search.searching.pyserini_bridge import lucene_searcher
from effir_search.searching.search_topics import load_topics, search_topics
from effir_search.settings import Bm25Settings, IndexSettings, SearchSettings
from effir_search.text.trec import Query, read_run


def run_effir(*words):
    return CliRunner().invoke(cli, list(map(str, words)))


def test_hits_are_those_of_pyserinis_own_searcher(bm25_index):
    searcher, reference = Bm25Searcher(bm25_index), lucene_searcher(bm25_index)
    for text in ("hot soup", "cat milk", "bread and jam with butter"):
        expected = reference.search(text, k=5)
        hits = searcher.search_text(text, 5)
        assert [hit.doc_id for hit in hits] == [hit.docid for hit in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=1e-6)


@pytest.mark.parametrize(("k1", "b"), [(0.9, 0.4), (1.2, 0.75), (2.0, 0.0)])
def test_the_score_is_lucenes_formula_by_hand(tmp_path, k1, b):
    texts = {"a": "cat cat dog", "b": "dog fish", "c": "fish milk tea lemon"}
    write_jsonl(tmp_path / "corpus.jsonl", [{"_id": name, "text": text} for name, text in texts.items()])
    index_bm25(str(tmp_path / "corpus.jsonl"), tmp_path / "index")
    (hit,) = Bm25Searcher(tmp_path / "index", bm25=Bm25Settings(k1, b)).search_text("cat")
    # One of three documents has it, twice among its three words; the mean is 9 / 3 words.
    idf = math.log(1 + (3 - 1 + 0.5) / (1 + 0.5))
    assert hit.doc_id == "a"
    assert hit.score == pytest.approx(idf * 2 / (2 + k1 * (1 - b + b * 3 / 3)), abs=1e-4)  # Anserini rounds


def test_only_documents_with_a_word_of_the_query_are_hits(bm25_index):
    assert {hit.doc_id for hit in Bm25Searcher(bm25_index).search_text("fish", 100)} == {"009"}
    assert Bm25Searcher(bm25_index).search_text("zebra") == []


def test_hits_of_equal_documents_begin_those_of_a_deeper_search_and_decrease(tmp_path):
    words = " ".join(f"w{number}" for number in range(40))  # so that scores are above 16, where a float32 is coarse
    records = [{"_id": f"d{number}", "text": words} for number in range(30)]
    records += [{"_id": f"o{number}", "text": f"v{number}"} for number in range(200)]
    write_jsonl(tmp_path / "corpus.jsonl", records)
    index_bm25(str(tmp_path / "corpus.jsonl"), tmp_path / "index")
    searcher = Bm25Searcher(tmp_path / "index")
    deepest = searcher.search_text(words, 100)
    assert len(deepest) == 30 and deepest[0].score > 16
    scores = np.array([hit.score for hit in deepest])
    assert (np.diff(scores) < 0).all() and (scores == scores.astype(np.float32)).all()
    for k in (1, 7, 29):
        assert searcher.search_text(words, k) == deepest[:k]


def test_the_record_says_what_was_indexed(bm25_index, collection):
    info = read_bm25_info(bm25_index)
    assert (info.num_documents, info.num_indexed, info.num_skipped) == (12, 11, 0)  # one has no text
    assert info.corpus == str(collection / "corpus.jsonl")
    facts = json.loads(describe(str(bm25_index), "json"))
    assert facts["bm25_index"] == str(bm25_index) and facts["num_documents"] == 12
    assert "Porter" in describe(str(bm25_index))


def test_the_command_indexes_searches_and_shows(tmp_path, collection):
    words = ["--corpus", collection / "corpus.jsonl", "--bm25", "--output", tmp_path / "index"]
    done = run_effir("index", *words)
    assert done.output.endswith(f"12 documents, 1 without a text left out -> {tmp_path / 'index'}\n"), done.output
    topics = ["--topics", collection / "queries.jsonl", "--output", tmp_path / "run"]
    done = run_effir("search", "--index", tmp_path / "index", *topics, "--hits", 2)
    assert done.exit_code == 0 and "3 topics, 6 hits" in done.output, done.output
    assert len(read_run(tmp_path / "run")) == 6
    shown = ["--query", "tomato soup", "--corpus", collection / "corpus.jsonl", "--hits", 1]
    done = run_effir("search", "--index", tmp_path / "index", *shown)
    assert "008  soup" in done.output and "hot tomato soup" in done.output


def test_the_texts_are_those_that_a_dense_index_has(tmp_path):
    write_jsonl(tmp_path / "c.jsonl", [{"_id": "a", "title": "red", "text": "tea"}, {"_id": "b", "abstract": "milk"}])
    done = run_effir("index", "--corpus", tmp_path / "c.jsonl", "--bm25", "--skip-bad", "--output", tmp_path / "one")
    assert "1 documents, 1 bad lines skipped" in done.output
    assert [hit.doc_id for hit in Bm25Searcher(tmp_path / "one").search_text("red")] == ["a"]
    index_bm25(str(tmp_path / "c.jsonl"), tmp_path / "two", IndexSettings(fields=("abstract", "title")))
    assert [hit.doc_id for hit in Bm25Searcher(tmp_path / "two").search_text("milk")] == ["b"]
    assert Bm25Searcher(tmp_path / "two").search_text("tea") == []


def test_a_bad_corpus_leaves_nothing_behind(tmp_path):
    (tmp_path / "corpus.jsonl").write_text('{"_id": "a", "text": "tea"}\n{"_id": "a", "text": "milk"}\n')
    with pytest.raises(ValueError, match='corpus.jsonl:2: repeated id "a"'):
        index_bm25(str(tmp_path / "corpus.jsonl"), tmp_path / "index")
    assert [path.name for path in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_an_index_is_replaced_when_told_to_and_nothing_else_is(tmp_path, collection, bm25_index):
    corpus = str(collection / "corpus.jsonl")
    shutil.copytree(bm25_index, tmp_path / "index")
    with pytest.raises(FileExistsError, match="an index is there already; choose another --output or --overwrite"):
        index_bm25(corpus, tmp_path / "index")
    index_bm25(corpus, tmp_path / "index", IndexSettings(overwrite=True))
    (tmp_path / "index" / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="'notes.txt' in it"):
        index_bm25(corpus, tmp_path / "index", IndexSettings(overwrite=True))
    assert (tmp_path / "index" / "notes.txt").read_text() == "mine" and is_bm25(tmp_path / "index")


def test_a_folder_without_a_record_is_pyserinis_and_is_searched(tmp_path, bm25_index):
    shutil.copytree(bm25_index, tmp_path / "index")
    (tmp_path / "index" / BM25_FILE).unlink()
    assert Bm25Searcher(tmp_path / "index").search_text("hot soup") == Bm25Searcher(bm25_index).search_text("hot soup")
    assert "another program" in describe(str(tmp_path / "index"))


def test_a_damaged_index_is_one_line(tmp_path, bm25_index):
    shutil.copytree(bm25_index, tmp_path / "index")
    next((tmp_path / "index").glob("segments_*")).write_bytes(b"cut")
    done = run_effir("search", "--index", tmp_path / "index", "--query", "soup")
    assert done.exit_code == 1 and "not a Lucene index, or a damaged one; build it again" in done.output
    assert done.output.count("\n") == 1
    record = json.loads((bm25_index / BM25_FILE).read_text())
    shutil.copytree(bm25_index, tmp_path / "short")
    (tmp_path / "short" / BM25_FILE).write_text(json.dumps(record | {"num_indexed": 99}))
    with pytest.raises(ValueError, match="11 documents, where 99 were indexed"):
        Bm25Searcher(tmp_path / "short")


def test_the_querys_own_document_is_left_out_and_one_more_found(bm25_index):
    query = Query("008", "hot soup in the kitchen")
    every = [hit.doc_id for hit in Bm25Searcher(bm25_index, SearchSettings(hits=3)).search([query])]
    others = [hit.doc_id for hit in Bm25Searcher(bm25_index, SearchSettings(2, remove_query=True)).search([query])]
    assert every[0] == "008" and others == every[1:]


def test_a_query_of_thousands_of_words_is_searched(bm25_index):
    words = " ".join(f"word{number}" for number in range(3000))
    assert [hit.doc_id for hit in Bm25Searcher(bm25_index).search_text(f"{words} fish")] == ["009"]


def test_more_hits_than_java_counts_are_all_there_are(bm25_index):
    assert len(Bm25Searcher(bm25_index).search_text("soup bread", 2**31)) == 3


def test_queries_without_a_text_are_warned_of(bm25_index, caplog):
    with caplog.at_level(logging.WARNING):
        hits = list(Bm25Searcher(bm25_index).search([Query("1", " "), Query("2", "fish")]))
    assert [hit[:2] for hit in hits] == [("2", "009")]
    assert "1 of 2 topics are empty and get no hits" in caplog.text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--encoder", "m"], "is a BM25 index, which has no encoder; leave --encoder out"),
        (["--prf", "average"], "is a BM25 index; --prf needs vectors"),
        (["--pooling", "cls"], "--pooling is for a dense index; this one is BM25's"),
        (["--nprobe", "3"], "--nprobe is for FAISS indexes"),
        (["--index", "{toy}"], "is a BM25 index, whose scores no others compare with"),
        (["--bm25", "{index}"], "is a BM25 index itself; --index takes the dense one"),
    ],
)
def test_what_a_bm25_index_cannot_do_is_one_line(bm25_index, toy_index, words, message):
    words = [word.format(toy=toy_index, index=bm25_index) for word in words]
    done = run_effir("search", "--index", bm25_index, *words, "--query", "soup")
    assert done.exit_code in (1, 2) and message in done.output, done.output


def test_a_bm25_index_cannot_be_verified(bm25_index):
    done = run_effir("verify", bm25_index)
    assert done.exit_code == 1 and "is a BM25 index, which has no vectors" in done.output, done.output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpus", "c", "--encoder", "m"], "--encoder does not go with --bm25"),
        (["--corpus", "c", "--kind", "SQ8"], "--kind does not go with --bm25"),
        ([], "--bm25 goes with --corpus"),
    ],
)
def test_options_of_a_dense_index_are_refused(tmp_path, words, message):
    done = run_effir("index", "--bm25", *words, "--output", tmp_path / "index")
    assert done.exit_code == 2 and message in done.output, done.output


def test_a_query_that_finds_itself_is_warned_of(tmp_path, bm25_index, caplog):
    write_jsonl(
        tmp_path / "queries.jsonl", [{"_id": "008", "text": "Soup hot tomato soup with onion , pepper and oil ."}]
    )
    with caplog.at_level(logging.WARNING):
        search_topics(str(tmp_path / "queries.jsonl"), tmp_path / "run", index_dir=bm25_index)
    assert "1 of 1 queries stand in the corpus with their id and text" in caplog.text
    assert load_topics(str(tmp_path / "queries.jsonl"))[0].query_id == "008"
