"""The parts of a server: batches, texts, indexes."""

import asyncio
import resource
import shutil

import numpy as np
import pytest
from conftest import DOCUMENTS, write_jsonl
from servers import damaged_index, index_of, prompted_model

from effir_search.errors import UserError
from effir_search.searching.searcher import DEFAULT_SETTINGS, Searcher
from effir_search.serving.app import background
from effir_search.serving.batching import Batcher
from effir_search.serving.indexes import Indexes, named_folders
from effir_search.serving.metrics import Metrics
from effir_search.serving.server import api_key
from effir_search.serving.service import Service
from effir_search.serving.texts import Texts
from effir_search.settings import EncoderOptions, ServeSettings
from effir_search.text.corpus import CorpusFields, Document

TEXTS = [f"hot soup {'tea ' * number}" for number in range(40)]


def test_queries_that_wait_share_a_batch_and_have_the_hits_of_each_alone(toy_index, encoder):
    searcher = Searcher(toy_index, encoder)

    async def ask():
        batcher = Batcher()
        running = asyncio.ensure_future(batcher.run())
        found = await asyncio.gather(*(batcher.search(searcher, text, 1 + len(text) % 3) for text in TEXTS))
        running.cancel()
        return batcher, found

    batcher, found = asyncio.run(ask())
    assert (batcher.num_batches, batcher.num_texts) == (1, len(TEXTS))
    for text, hits in zip(TEXTS, found, strict=True):
        expected = searcher.search_text(text, 1 + len(text) % 3)
        assert [hit.doc_id for hit in hits] == [hit.doc_id for hit in expected]
        np.testing.assert_allclose([hit.score for hit in hits], [hit.score for hit in expected], atol=1e-6)


def test_a_long_list_of_texts_lets_queries_in_between(toy_index, encoder):
    searcher = Searcher(toy_index, encoder)

    async def ask():
        batcher, order = Batcher(), []

        async def noted(name, question):
            answer = await question
            order.append(name)
            return answer

        running = asyncio.ensure_future(batcher.run())
        many = noted("texts", batcher.encode(encoder, TEXTS * 10, ""))
        embeddings, *_ = await asyncio.gather(many, *(noted("query", batcher.search(searcher, "tea", 1)) for _ in "ab"))
        running.cancel()
        return embeddings, order

    embeddings, order = asyncio.run(ask())
    assert order == ["query", "query", "texts"]
    np.testing.assert_allclose(embeddings.vectors, encoder.encode(TEXTS * 10).embeddings, atol=1e-5)
    # "hot soup" and so many "tea", between <s> and </s>, cut at the 64 tokens that the tokenizer reads.
    assert embeddings.num_tokens == 10 * sum(min(64, 4 + number) for number in range(40))


def test_who_asks_for_what_fails_is_told_and_the_others_are_answered(tmp_path, toy_index, encoder):
    sound, damaged = Searcher(toy_index, encoder), Searcher(damaged_index(toy_index, tmp_path / "damaged"), encoder)

    async def ask():
        batcher = Batcher()
        running = asyncio.ensure_future(batcher.run())
        asked = (batcher.search(searcher, "tea", 12) for searcher in (sound, damaged, sound))
        found = await asyncio.gather(*asked, return_exceptions=True)
        running.cancel()
        return found

    first, second, third = asyncio.run(ask())
    assert [hit.doc_id for hit in first] == [hit.doc_id for hit in third] and len(first) == 12
    assert isinstance(second, UserError) and "is damaged" in str(second)


def test_an_answer_that_nobody_waits_for_any_more_is_dropped(toy_index, encoder):
    searcher = Searcher(toy_index, encoder)

    async def ask():
        batcher = Batcher()
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(batcher.search(searcher, "tea", 3), 0.01)  # nobody runs it
        running = asyncio.ensure_future(batcher.run())
        found = await batcher.search(searcher, "tea", 3)
        running.cancel()
        return batcher, found

    batcher, found = asyncio.run(ask())
    assert len(found) == 3 and batcher.num_texts == 1


def test_texts_are_found_by_id_and_bad_lines_are_passed_over(tmp_path, collection):
    texts = Texts(collection / "corpus.jsonl", CorpusFields())
    assert texts.find(["001", "none", "010"]) == {
        "001": Document("001", DOCUMENTS["001"][1], "cat"), "010": Document("010", "", ""),
    }  # fmt: skip
    path = write_jsonl(
        tmp_path / "c.jsonl", [{"_id": "a", "abstract": "x"}, {"_id": "b"}, {"_id": "c", "abstract": "y"}]
    )
    texts = Texts(path, CorpusFields(["abstract"]))
    assert texts.find("abc") == {"a": Document("a", "x"), "c": Document("c", "y")}


def open_indexes(folders, **options):
    defaults = {"corpora": (), "encoder": None, "settings": DEFAULT_SETTINGS, "options": EncoderOptions()}
    return Indexes(folders, **{**defaults, **options})


def test_a_model_is_in_memory_once_and_a_corpus_is_read_once(tmp_path, toy_index, collection):
    other = index_of(collection / "corpus.jsonl", prompted_model(tmp_path / "model"), tmp_path / "other")
    copy = shutil.copytree(toy_index, tmp_path / "copy")
    indexes = open_indexes({"a": toy_index, "b": copy, "c": other}).by_name
    assert indexes["a"].searcher.encoder is indexes["b"].searcher.encoder
    assert indexes["a"].searcher.encoder.model is not indexes["c"].searcher.encoder.model
    assert indexes["a"].texts == indexes["b"].texts == indexes["c"].texts


def test_documents_of_one_id_in_two_corpora_are_not_mixed_up(tmp_path, toy_index, bert_folder):
    corpus = write_jsonl(tmp_path / "second.jsonl", [{"_id": "001", "text": "red plum"}])
    second = index_of(corpus, bert_folder, tmp_path / "second")
    first = Texts(tmp_path / "second.jsonl", CorpusFields()).find(["001"])
    for corpora in ((), (str(corpus), open_indexes({"a": toy_index}).by_name["a"].info.corpus)):
        indexes = open_indexes({"a": toy_index, "b": second}, corpora=corpora).by_name
        assert indexes["b"].documents(["001"]) == first
        assert indexes["a"].documents(["001"])["001"].title == "cat"


def test_corpora_that_have_moved_are_told_apart_by_what_they_hold(tmp_path, bert_folder):
    folders, moved = {}, []
    for name in ("red", "green"):
        corpus = write_jsonl(tmp_path / f"{name}.jsonl", [{"_id": "1", "text": f"{name} plum"}])
        folders[name] = index_of(corpus, bert_folder, tmp_path / name)
        moved.append(str(corpus.rename(tmp_path / f"moved-{name}.jsonl")))
    for corpora in (moved, moved[::-1]):
        indexes = open_indexes(folders, corpora=corpora).by_name
        assert {name: index.documents(["1"])["1"].text for name, index in indexes.items()} == {
            "red": "red plum", "green": "green plum",
        }  # fmt: skip


def test_a_corpus_that_is_not_there_or_has_changed_is_said(tmp_path, bert_folder, caplog):
    corpus = write_jsonl(tmp_path / "corpus.jsonl", [{"_id": "1", "text": "red plum"}])
    index = index_of(corpus, bert_folder, tmp_path / "index")
    write_jsonl(corpus, [{"_id": "1", "text": "green plum"}])
    assert open_indexes({"a": index}).by_name["a"].documents(["1"])["1"].text == "green plum"
    assert "has changed since it was indexed" in caplog.text
    corpus.unlink()
    assert open_indexes({"a": index}).by_name["a"].documents(["1"]) == {}
    assert "its hits have no texts; give it as --corpus" in caplog.text
    moved = write_jsonl(tmp_path / "moved.jsonl", [{"_id": "1", "text": "red plum"}])
    assert open_indexes({"a": index}, corpora=[str(moved)]).by_name["a"].documents(["1"])["1"].text == "red plum"


def test_a_damaged_replacement_leaves_an_index_as_it_was(tmp_path, toy_index, caplog):
    folder = shutil.copytree(toy_index, tmp_path / "index")
    indexes = open_indexes({"a": folder})
    before = indexes.by_name["a"]
    assert indexes.reload() == []
    (folder / "index").write_bytes(b"no index")
    assert indexes.reload() == [] and indexes.by_name["a"] is before
    assert "a stays as it was" in caplog.text
    shutil.copy(toy_index / "index", folder / "index")
    assert indexes.reload() == ["a"] and indexes.by_name["a"] is not before
    assert indexes.by_name["a"].searcher.encoder is before.searcher.encoder


def test_an_index_that_is_replaced_while_it_is_opened_stays_as_it_was(tmp_path, toy_index, monkeypatch, caplog):
    folder = shutil.copytree(toy_index, tmp_path / "index")
    indexes = open_indexes({"a": folder})
    before = indexes.by_name["a"]

    def replace_meanwhile(*arguments):
        shutil.copy(toy_index / "docid", folder / "docid")
        return Searcher(*arguments)

    monkeypatch.setattr("effir_search.serving.indexes.Searcher", replace_meanwhile)
    assert indexes.reload(all_of_them=True) == [] and indexes.by_name["a"] is before
    assert "was replaced while it was opened" in caplog.text
    monkeypatch.undo()
    assert indexes.reload() == ["a"]


def test_a_failed_look_at_the_indexes_is_said_and_not_the_last(toy_index, monkeypatch, caplog):
    service = Service(open_indexes({"a": toy_index}), Batcher(), ServeSettings())
    looks = iter([RuntimeError("can't allocate memory"), ["a"]])  # as torch says that there is too little

    def look(**_options):
        found = next(looks, [])
        if isinstance(found, Exception):
            raise found
        return found

    async def work():
        async with background(service):
            while "a was opened again" not in caplog.text:
                await asyncio.sleep(0.01)

    monkeypatch.setattr("effir_search.serving.app.LOOK", 0.01)
    monkeypatch.setattr(service.indexes, "reload", look)
    with caplog.at_level("INFO"):
        asyncio.run(asyncio.wait_for(work(), 20))
    assert "can't allocate memory" in caplog.text


def test_texts_that_there_is_no_room_for_are_an_oserror(tmp_path, monkeypatch):
    monkeypatch.setattr("effir_search.serving.texts.FILLING", 1)
    corpus = write_jsonl(tmp_path / "c.jsonl", [{"_id": str(number), "text": "tea " * 500} for number in range(500)])
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # bytes of a file
    try:
        with pytest.raises(OSError, match="texts cannot be kept in a file where TMPDIR says"):
            Texts(corpus, CorpusFields())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_name_that_two_models_would_have_is_none_of_them(tmp_path, collection, bert_folder):
    folders = {}
    for name, place in {"full": "a/model", "small": "b/model", "z": "c/small"}.items():
        model = shutil.copytree(bert_folder, tmp_path / place)
        folders[name] = index_of(collection / "corpus.jsonl", model, tmp_path / name)
    service = Service(open_indexes(folders), Batcher(), ServeSettings())
    assert set(service.models()) == {"full", "full-query", "full-document"}


def test_an_index_is_called_as_its_folder_or_as_is_said(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with=sign").mkdir()
    folders = named_folders(["some/where", "two=some/where"])
    assert {name: str(folder) for name, folder in folders.items()} == {"where": "some/where", "two": "some/where"}
    for bad in ("a b=x", "a/b/=x", "with=sign", "indexes"):
        with pytest.raises(UserError, match="is no name for a path"):
            named_folders([bad])
    with pytest.raises(UserError, match="another index is called x"):
        named_folders(["a/x", "b/x"])


def test_the_key_is_in_the_environment_or_in_a_file(tmp_path, monkeypatch):
    monkeypatch.delenv("EFFIR_API_KEY", raising=False)
    assert api_key(ServeSettings()) is None
    monkeypatch.setenv("EFFIR_API_KEY", "of-the-environment")
    assert api_key(ServeSettings()) == "of-the-environment"
    (tmp_path / "key").write_text("of-the-file\n")
    assert api_key(ServeSettings(api_key_file=str(tmp_path / "key"))) == "of-the-file"
    (tmp_path / "bytes").write_bytes(bytes(range(128, 256)))
    with pytest.raises(UserError, match="bytes: the key must be of visible ASCII"):
        api_key(ServeSettings(api_key_file=str(tmp_path / "bytes")))
    for bad in ("", " ", "two words", "k\u00e9y"):
        monkeypatch.setenv("EFFIR_API_KEY", bad)
        with pytest.raises(UserError, match="EFFIR_API_KEY: the key must be of visible ASCII"):
            api_key(ServeSettings())


def test_metrics_are_cumulative_as_prometheus_wants_them():
    metrics = Metrics()
    for seconds in (0.001, 0.02, 0.02, 100):
        metrics.add("search", 200, seconds)
    lines = metrics.text(indexes=2).splitlines()
    assert 'effir_requests_total{endpoint="search",status="200"} 4' in lines
    # One is at most 5 ms, two more are at most 25 ms, and one is above all bounds.
    assert 'effir_request_seconds_bucket{le="0.005"} 1' in lines
    assert 'effir_request_seconds_bucket{le="0.025"} 3' in lines
    assert 'effir_request_seconds_bucket{le="30"} 3' in lines
    assert 'effir_request_seconds_bucket{le="+Inf"} 4' in lines and "effir_indexes 2" in lines
