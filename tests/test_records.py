"""Every layout that docs/formats.md lists, read from a file of its own: tests/records and the table are the same."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from effir_search.text.corpus import document_text, read_corpus
from effir_search.text.texts import read_query_texts, read_texts
from effir_search.text.training_records import read_records
from effir_search.text.trec import read_qrels, read_run, read_topics

RECORDS = Path(__file__).parent / "records"
FORMATS = Path(__file__).parent.parent / "docs" / "formats.md"
ROW = re.compile(r"^\| `([^`]+)` \| [^|]+ \| `([^`]+)` \| `([^`]*)` \|$", re.MULTILINE)
ROWS = ROW.findall(FORMATS.read_text(encoding="utf-8").split("\n## Files of every layout\n")[1].split("\n## ")[0])


def first_document(path: Path, *, fields: str | None = None, id_field: str | None = None) -> str:
    document = next(read_corpus(path, fields=fields and fields.split(","), id_field=id_field))
    return f"{document.doc_id}: {' '.join(document_text(document).split())}"


def first_topic(path: Path, *, topics_field: str = "title") -> str:
    query = read_topics(path, field=topics_field)[0]
    return f"{query.query_id}: {query.text}"


def first_record(path: Path, *, corpus: str | None = None) -> str:
    _, record = next(read_records(path, corpus=corpus and RECORDS / corpus))
    return f"{record.query} -> {record.positives[0]}"


FIRST: dict[str, Callable[..., str]] = {
    "corpus": first_document,
    "topics": first_topic,
    "qrels": lambda path: "{} {} {}".format(*read_qrels(path)[0]),
    "run": lambda path: "{} {} {}".format(*read_run(path)[0]),
    "training": first_record,
    "texts": lambda path: next(read_texts(str(path))),
    "queries": lambda path: next(read_query_texts(str(path))),
}


@pytest.mark.parametrize(("name", "read_as", "first"), ROWS, ids=[name for name, _, _ in ROWS])
def test_a_file_of_each_layout_is_read_as_the_table_says(name, read_as, first):
    kind, *options = read_as.split()
    given = {
        option.removeprefix("--").replace("-", "_"): value
        for option, value in zip(options[::2], options[1::2], strict=True)
    }
    assert FIRST[kind](RECORDS / name, **given) == first


def test_every_file_is_in_the_table_once_and_every_row_has_its_file():
    assert sorted(name for name, _, _ in ROWS) == sorted(path.name for path in RECORDS.iterdir())


def test_all_documents_of_a_layout_are_read():
    for name in (
        "beir.jsonl",
        "beir.jsonl.gz",
        "gzip_without_ending.jsonl",
        "utf_8_mark.jsonl",
        "utf_16.jsonl",
        "array.json",
    ):
        assert [document.doc_id for document in read_corpus(RECORDS / name)] == ["007", "d2"]
    assert [document.doc_id for document in read_corpus(RECORDS / "msmarco_v2_passages.jsonl")] == [
        "msm_p_00_0",
        "msm_p_00_1",
    ]
