import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import pytest
from conftest import TOPICS

from effir_search.indexing.build import build_index
from effir_search.searching.search_topics import search
from effir_search.searching.searcher import Searcher
from effir_search.settings import EncoderOptions, SearchSettings
from effir_search.text.corpus import Document
from effir_search.text.trec import Query


@pytest.fixture(scope="module")
def topics():
    return [Query(query_id, text) for query_id, text in TOPICS.items()]


def test_a_searcher_finds_what_a_search_finds_however_often_it_is_asked(toy_index, encoder, topics):
    searcher = Searcher(toy_index, encoder, SearchSettings(hits=5))
    expected = list(search(toy_index, encoder, topics, k=5))
    assert list(searcher.search(topics)) == list(searcher.search(topics)) == expected


def test_a_text_is_a_topic_of_its_own(toy_index, encoder):
    searcher = Searcher(toy_index, encoder)
    expected = list(search(toy_index, encoder, [Query("query", "hot soup")], k=12))
    assert searcher.search_text("hot soup") == expected[:10]
    assert searcher.search_text("hot soup", hits=3) == expected[:3]
    assert Searcher(toy_index, encoder, SearchSettings(hits=2)).search_text("hot soup") == expected[:2]


def test_the_encoder_is_that_of_the_index_or_one_of_this_name(toy_index, bert_folder, encoder, topics):
    expected = list(search(toy_index, encoder, topics))
    for name in (None, str(bert_folder)):
        searcher = Searcher(toy_index, name, options=EncoderOptions(device="cpu"))
        assert searcher.encoder.config == encoder.config
        assert [hit[:2] for hit in searcher.search(topics)] == [hit[:2] for hit in expected]


def test_a_folder_is_not_read_again_once_it_is_open(tmp_path, toy_index, topics):
    index_dir = shutil.copytree(toy_index, tmp_path / "index")
    searcher = Searcher(index_dir)
    expected = list(searcher.search(topics))
    shutil.rmtree(index_dir)
    assert list(searcher.search(topics)) == expected


def test_threads_that_ask_at_once_get_what_they_get_one_by_one(toy_index, encoder, topics):
    searcher = Searcher(toy_index, encoder)
    # Texts of many lengths, so that the tokenizer is asked to cut some and not others.
    texts = ["hot soup " * length for length in range(1, 60)]
    expected = [searcher.search_text(text) for text in texts]
    with ThreadPoolExecutor(8) as threads:
        assert list(threads.map(searcher.search_text, texts)) == expected
        runs = list(threads.map(lambda _: list(searcher.search(topics)), range(8)))
    assert runs == [runs[0]] * 8


def test_a_text_keeps_the_document_that_is_called_like_its_topic(tmp_path, encoder):
    build_index([Document("query", "hot soup"), Document("2", "sweet tea")], encoder, tmp_path / "index")
    searcher = Searcher(tmp_path / "index", encoder, SearchSettings(remove_query=True))
    assert {hit.doc_id for hit in searcher.search_text("hot soup")} == {"query", "2"}
    assert [hit.doc_id for hit in searcher.search([Query("query", "hot soup")])] == ["2"]


def test_what_cannot_be_searched_is_an_error(tmp_path, toy_index, encoder):
    with pytest.raises(ValueError, match="at least one index folder"):
        Searcher([], encoder)
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder"):
        Searcher(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="--hits 0: must be at least 1"):
        Searcher(toy_index, encoder, SearchSettings(hits=0)).search([Query("1", "cat")])
    with pytest.raises(ValueError, match="1 topics, none of them with a text"):
        Searcher(toy_index, encoder).search_text(" ")


def test_a_folder_without_a_record_has_no_info_and_needs_an_encoder(pyserini_folder, toy_index, encoder):
    with pytest.raises(ValueError, match="give --encoder"):
        Searcher(pyserini_folder)
    assert Searcher(pyserini_folder, encoder).infos == [None]
    record = json.loads((toy_index / "effir.json").read_text())
    (info,) = Searcher(toy_index, encoder).infos
    assert info.corpus_sha256 == record["corpus_sha256"]
