"""Texts without ids, of any corpus, topics or text file."""

import gzip
import json

import pytest
from conftest import DOCUMENTS, TOPICS

from effir_search.text.texts import read_query_texts, read_texts
from effir_search.text.trec import read_topics

TREC = "<top>\n<num> Number: 7\n<title> hot soup\n</top>\n<top>\n<num> 8\n<title> sweet tea\n</top>\n"
TOPIC_FILES = {
    "jsonl": '{"_id": "7", "text": "hot soup"}\n{"_id": "8", "text": "sweet tea"}\n',
    "other names": '{"qid": "7", "query": "hot soup"}\n{"qid": "8", "query": "sweet tea"}\n',
    "array": '[{"id": 7, "query": "hot soup"}, {"id": 8, "query": "sweet tea"}]',
    "tsv": "7\thot soup\n8\tsweet tea\n",
    "tsv with a header": "query_id\ttext\n7\thot soup\n8\tsweet tea\n",
    "tsv with another header": "qid\tquery\n7\thot soup\n8\tsweet tea\n",
    "trec": TREC,
    "xml": '<topics><topic number="7">hot soup</topic><topic number="8"><query>sweet tea</query></topic></topics>',
}


@pytest.mark.parametrize("name", ["topics", "topics.jsonl", "topics.txt"])
@pytest.mark.parametrize("content", TOPIC_FILES.values(), ids=TOPIC_FILES)
@pytest.mark.parametrize("read", [read_texts, read_query_texts])
def test_topics_are_the_texts_that_a_search_reads_whatever_the_name(tmp_path, name, content, read):
    (tmp_path / name).write_text(content)
    assert list(read(str(tmp_path / name))) == ["hot soup", "sweet tea"]
    assert [query.text for query in read_topics(tmp_path / name)] == ["hot soup", "sweet tea"]


@pytest.mark.parametrize("read", [read_texts, read_query_texts])
def test_texts_need_no_ids_and_may_repeat_them(tmp_path, read):
    for lines in (['{"text": "a"}', '{"text": "b"}'], ['{"_id": "1", "text": "a"}', '{"_id": "1", "text": "b"}']):
        (tmp_path / "t.jsonl").write_text("\n".join(lines))
        assert list(read(str(tmp_path / "t.jsonl"))) == ["a", "b"]
    (tmp_path / "t.tsv").write_text("text\na\nb\n")
    assert list(read(str(tmp_path / "t.tsv"))) == ["a", "b"]


@pytest.mark.parametrize("read", [read_texts, read_query_texts])
def test_lines_of_text_are_texts_with_brackets_and_tabs_in_them_too(tmp_path, read):
    lines = ["[1] Smith, 1999", "  two words\tand more", '"quoted", she said', "{not first}", "a\tb"]
    (tmp_path / "t.txt.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert list(read(str(tmp_path / "t.txt.gz"))) == lines


def test_a_line_without_a_tab_after_one_with_an_id_is_an_error(tmp_path):
    (tmp_path / "t.txt").write_text("1\thot soup\nsweet tea\n")
    with pytest.raises(ValueError, match=r"t\.txt:2: no tab in it; TSV is id, tab and text"):
        list(read_texts(str(tmp_path / "t.txt")))
    with pytest.raises(ValueError, match=r"t\.txt:2: neither JSON, nor a TREC <top>, nor id and text"):
        list(read_query_texts(str(tmp_path / "t.txt")))


def test_the_queries_of_a_beir_folder_are_its_queries_and_its_texts_the_documents(tmp_path, collection):
    assert list(read_query_texts(str(collection))) == list(TOPICS.values())
    assert list(read_texts(str(collection))) == [f"{title} {text}".strip() for title, text in DOCUMENTS.values()]
    with pytest.raises(FileNotFoundError, match=r"no queries\.jsonl, which a BEIR folder has"):
        list(read_query_texts(str(tmp_path)))


def test_a_table_of_documents_is_title_and_text(tmp_path):
    (tmp_path / "c.tsv").write_text("1\tCat\tIt eats.\n2\tDog\t\n")
    assert list(read_texts(str(tmp_path / "c.tsv"))) == ["Cat It eats.", "Dog"]


def test_training_records_qrels_and_records_without_text_are_no_texts(tmp_path):
    path = tmp_path / "t.jsonl"
    path.write_text('{"query": "q", "positives": ["p"]}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1: is a training record .* it goes with --train"):
        list(read_texts(str(path)))
    path.write_text("query-id\tcorpus-id\tscore\nq\td\t1\n")
    with pytest.raises(ValueError, match=r"t\.jsonl:1: these are qrels"):
        list(read_texts(str(path)))
    path.write_text('{"abstract": "a"}\n')
    with pytest.raises(ValueError, match=r't\.jsonl:1: no "text" or "contents" field \(found: abstract\)'):
        list(read_texts(str(path)))
    path.write_text('{"text": "\\ud800"}\n')
    with pytest.raises(ValueError, match=r"t\.jsonl:1: lone surrogate"):
        list(read_texts(str(path)))
    path.write_text(json.dumps([{"text": "a"}, 5]))
    with pytest.raises(ValueError, match=r"t\.jsonl:1, element 2: not a JSON object but int"):
        list(read_texts(str(path)))
