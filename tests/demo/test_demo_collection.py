import csv
import json
import sys
import sysconfig
from pathlib import Path

import pytest

from effir_search.demo import standard_library
from effir_search.demo.standard_library import standard_library_documents
from effir_search.text.corpus import Document

FOLDER = Path(standard_library.__file__).parent / "collection"


@pytest.fixture(scope="module")
def documents() -> list[Document]:
    return standard_library_documents()


@pytest.fixture(scope="module")
def texts(documents: list[Document]) -> dict[str, str]:
    return {document.doc_id: document.text for document in documents}


@pytest.fixture(scope="module")
def queries() -> dict[str, str]:
    lines = (FOLDER / "queries.jsonl").read_text(encoding="utf-8").splitlines()
    return {query["_id"]: query["text"] for query in map(json.loads, lines)}


@pytest.fixture(scope="module")
def judgments() -> list[dict[str, str]]:
    with open(FOLDER / "qrels" / "test.tsv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def test_the_collection_has_between_4000_and_7000_documents(documents):
    assert 4000 <= len(documents) <= 7000


def test_ids_are_unique_and_sorted(documents):
    doc_ids = [document.doc_id for document in documents]
    assert doc_ids == sorted(set(doc_ids))


def test_ids_hold_no_white_space_and_are_the_titles(documents):
    for document in documents:
        assert document.doc_id.split() == [document.doc_id]
        assert document.title == document.doc_id


def test_every_document_has_a_text_on_one_line_with_single_spaces(documents):
    for document in documents:
        assert document.text
        assert document.text == " ".join(document.text.split())


def test_ids_are_public_names(documents):
    for document in documents:
        assert not any(part.startswith("_") for part in document.doc_id.split("."))


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("asyncio.gather", "Return a future aggregating results from the given coroutines"),
        ("collections.deque", "A list-like sequence optimized for data accesses near its endpoints"),
        ("concurrent.futures.ThreadPoolExecutor", "ThreadPoolExecutor(max_workers=None"),
        ("email.message.Message.get_payload", "Return a reference to the payload"),
        ("io.BytesIO", "Buffered I/O implementation using an in-memory bytes buffer"),
        ("itertools.chain.from_iterable", "taking a single iterable argument that evaluates lazily"),
        ("json.tool", "Command-line tool to validate and pretty-print JSON"),
        ("logging.handlers.RotatingFileHandler", "Handler for logging to a set of files"),
        ("open", "Open file and return a stream"),
        ("os.path.join", "Join two or more pathname components"),
        ("pathlib.Path", "PurePath subclass that can make system calls"),
        ("pathlib.Path.read_text", "Open the file in text mode, read it, and close the file"),
        ("random.randint", "randint(a, b): Return random integer in range [a, b]"),
        ("str.split", "split(sep=None, maxsplit=-1): Return a list of the substrings in the string"),
        ("unittest.mock.patch", "acts as a function decorator, class decorator or a context manager"),
        ("urllib.request.urlopen", "Open the URL url"),
        ("xml.etree.ElementTree.parse", "Parse XML document into element tree"),
    ],
)
def test_a_well_known_name_has_its_docstring(texts, name, phrase):
    assert phrase in texts[name]


def test_a_method_from_a_private_base_is_found_in_the_public_class(texts):
    assert "argparse.ArgumentParser.add_argument" in texts


def test_an_inherited_method_is_found_in_the_class_that_defines_it_only(texts):
    assert "collections.Counter.most_common" in texts
    assert "dict.popitem" in texts
    assert "collections.Counter.popitem" not in texts


def test_an_object_with_several_names_is_one_document(texts):
    assert "os.path.join" in texts
    assert "posixpath.join" not in texts
    assert "io.open" not in texts
    assert "random.Random.randint" not in texts


def test_texts_hold_no_addresses_and_no_paths_of_this_machine(documents):
    library = sysconfig.get_path("stdlib")
    for document in documents:
        assert "0x7f" not in document.text
        assert " at 0x" not in document.text
        assert library not in document.text


def test_two_calls_give_the_same_documents(documents):
    assert standard_library_documents() == documents


def test_a_collector_that_fails_is_an_os_error_with_its_last_line(tmp_path, monkeypatch):
    collector = tmp_path / "collector.py"
    collector.write_text("print('[]')\nraise RuntimeError('out of docstrings')\n")
    monkeypatch.setattr(standard_library, "COLLECTOR", collector)
    with pytest.raises(OSError, match=r"cannot collect docstrings \(exit status 1\): RuntimeError: out of docstrings"):
        standard_library_documents()


def test_a_collector_that_does_not_end_is_an_os_error(tmp_path, monkeypatch):
    collector = tmp_path / "collector.py"
    collector.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(standard_library, "COLLECTOR", collector)
    monkeypatch.setattr(standard_library, "TIMEOUT", 0.1)
    with pytest.raises(OSError, match="no list of docstrings after 0.1 seconds"):
        standard_library_documents()


def test_there_are_at_least_60_queries_with_different_ids_and_texts(queries):
    lines = (FOLDER / "queries.jsonl").read_bytes().splitlines()
    assert len(lines) == len(queries) == len(set(queries.values())) >= 60


def test_flatten_a_list_of_lists_is_among_the_queries(queries):
    assert "flatten a list of lists" in queries.values()


def test_every_judged_name_is_a_document(texts, judgments):
    assert [row["corpus-id"] for row in judgments if row["corpus-id"] not in texts] == []


def test_every_query_is_judged_and_has_a_document_of_grade_2(queries, judgments):
    assert {row["query-id"] for row in judgments} == set(queries)
    assert {row["query-id"] for row in judgments if row["score"] == "2"} == set(queries)


def test_every_grade_is_1_or_2_and_no_document_is_judged_twice_for_a_query(judgments):
    assert {row["score"] for row in judgments} == {"1", "2"}
    pairs = [(row["query-id"], row["corpus-id"]) for row in judgments]
    assert len(pairs) == len(set(pairs))


def test_the_judged_documents_come_from_at_least_30_modules(judgments):
    top_levels = {row["corpus-id"].partition(".")[0] for row in judgments}
    assert len(top_levels & sys.stdlib_module_names) >= 30
