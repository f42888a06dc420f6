"""Corpora: every format gives the same documents, every bad line one error with file and line."""

import gzip
import json
import re

import ir_datasets
import pytest
from ir_datasets.datasets.base import Dataset
from ir_datasets.formats import BaseDocs, GenericDoc, TitleUrlTextDoc

from effir_search.text.checks import check_id
from effir_search.text.corpus import (
    CorpusFields,
    CorpusHasher,
    Document,
    document_text,
    find_documents,
    read_corpus,
    scan_corpus,
)

DOCUMENTS = [
    Document("007", "The cat eats fish.", "Cat"),
    Document("doc-2", "Ein Café in Köln, 東京", ""),
    Document("3", "", "Only a title"),
    Document("x:4", "", ""),
]


def as_beir(document):
    return json.dumps({"_id": document.doc_id, "title": document.title, "text": document.text}) + "\n"


def as_tsv(document):
    return "\t".join([document.doc_id, document.title, document.text]) + "\n"


def write(path, *lines):
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def beir(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(map(as_beir, DOCUMENTS)), encoding="utf-8")
    return path


# Formats


def test_a_beir_corpus_is_read_in_file_order(beir):
    assert list(read_corpus(beir)) == DOCUMENTS


def test_a_path_may_be_a_string(beir):
    assert list(read_corpus(str(beir))) == DOCUMENTS


def test_title_and_text_are_joined_by_one_space_and_neither_leaves_one_behind():
    assert [document_text(document) for document in DOCUMENTS] == [
        "Cat The cat eats fish.",
        "Ein Café in Köln, 東京",
        "Only a title",
        "",
    ]


@pytest.mark.parametrize("name", ["_id", "id", "docid"])
def test_the_id_may_stand_under_three_names(tmp_path, name):
    path = write(tmp_path / "docs.jsonl", json.dumps({name: "007", "contents": "a text"}))
    assert list(read_corpus(path)) == [Document("007", "a text")]


def test_an_id_of_digits_keeps_its_leading_zeros_in_every_format(tmp_path):
    jsonl = write(tmp_path / "docs.jsonl", '{"id": "007", "contents": "a"}')
    tsv = write(tmp_path / "docs.tsv", "007\ta")
    assert [document.doc_id for path in (jsonl, tsv) for document in read_corpus(path)] == ["007", "007"]


def test_a_whole_number_as_id_is_taken_as_it_is_written(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": 12345678901234567890, "contents": "a"}')
    assert list(read_corpus(path)) == [Document("12345678901234567890", "a")]


def test_contents_is_the_whole_text_because_pyserini_puts_the_title_in_it(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "title": "Cat", "contents": "Cat\\nThe cat eats."}')
    assert [document_text(document) for document in read_corpus(path)] == ["Cat\nThe cat eats."]


def test_contents_is_read_before_text(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "text": "not this", "contents": "this"}')
    assert list(read_corpus(path)) == [Document("1", "this")]


def test_a_missing_or_null_title_is_no_title(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"_id": "1", "text": "a"}', '{"_id": "2", "title": null, "text": "b"}')
    assert list(read_corpus(path)) == [Document("1", "a"), Document("2", "b")]


def test_named_fields_are_joined_in_the_order_they_are_named_in(tmp_path):
    record = {"id": "1", "title": "T", "abstract": "A", "contents": "not asked for"}
    path = write(tmp_path / "docs.jsonl", json.dumps(record))
    (document,) = read_corpus(path, fields=["abstract", "title"])
    assert document_text(document) == "A T"


def test_an_empty_field_leaves_no_space_at_the_ends(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "title": "", "abstract": "A"}')
    (document,) = read_corpus(path, fields=["title", "abstract"])
    assert document_text(document) == "A"


def test_a_named_field_that_is_not_there_is_an_error(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "title": "T"}')
    with pytest.raises(ValueError, match=r'docs\.jsonl:1: no "summary" field \(found: id, title\)'):
        list(read_corpus(path, fields=["summary", "abstract"]))
    with pytest.raises(ValueError, match=r'docs\.jsonl: no document has the field "abstract" of --fields'):
        list(read_corpus(path, fields=["title", "abstract"]))


def test_tsv_of_two_columns_is_id_and_text(tmp_path):
    path = write(tmp_path / "collection.tsv", "1\tThe cat.", "2\t")
    assert list(read_corpus(path)) == [Document("1", "The cat."), Document("2", "")]


def test_tsv_of_three_columns_is_id_title_and_text(tmp_path):
    path = write(tmp_path / "collection.tsv", *(as_tsv(document).rstrip("\n") for document in DOCUMENTS))
    assert list(read_corpus(path)) == DOCUMENTS


def test_a_tsv_header_names_the_columns_in_their_order(tmp_path):
    path = write(tmp_path / "collection.tsv", "id\ttext\ttitle", "1\tThe cat.\tCat")
    assert list(read_corpus(path)) == [Document("1", "The cat.", "Cat")]


def test_a_tsv_header_in_capitals_and_with_windows_line_ends_is_a_header(tmp_path):
    (tmp_path / "collection.tsv").write_bytes(b"PID\tText\r\n1\tThe cat.\r\n")
    assert list(read_corpus(tmp_path / "collection.tsv")) == [Document("1", "The cat.")]


@pytest.mark.parametrize(("row", "count"), [("only-an-id", 1), ("1\ta\tb\tc", 4)])
def test_a_tsv_row_of_another_number_of_columns_is_an_error(tmp_path, row, count):
    path = write(tmp_path / "collection.tsv", "0\tfine", row)
    with pytest.raises(ValueError, match=rf"collection\.tsv:2: {count} columns, expected 2 or 3"):
        list(read_corpus(path))


def test_a_tsv_row_that_does_not_fit_the_header_is_an_error(tmp_path):
    path = write(tmp_path / "collection.tsv", "id\ttext", "1\ta\tb")
    with pytest.raises(ValueError, match=r"collection\.tsv:2: 3 columns, expected 2"):
        list(read_corpus(path))


def test_a_header_may_name_columns_that_are_not_read(tmp_path):
    path = write(tmp_path / "collection.tsv", "id\ttext\turl", "1\tThe cat.\thttp://example.org")
    assert list(read_corpus(path)) == [Document("1", "The cat.")]


def test_a_first_row_that_names_no_columns_is_a_document(tmp_path):
    path = write(tmp_path / "collection.tsv", "id\tA short name", "1\ttext")
    assert list(read_corpus(path)) == [Document("id", "A short name"), Document("1", "text")]


def test_a_name_that_only_holds_tsv_is_no_tsv(tmp_path):
    path = write(tmp_path / "from.tsv.jsonl", '{"id": "1", "contents": "a"}')
    assert list(read_corpus(path)) == [Document("1", "a")]


def test_gzip_changes_nothing(beir, tmp_path):
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(beir.read_bytes()))
    tsv = "".join(map(as_tsv, DOCUMENTS)).encode()
    (tmp_path / "docs.tsv.gz").write_bytes(gzip.compress(tsv))
    assert list(read_corpus(tmp_path / "docs.jsonl.gz")) == DOCUMENTS
    assert list(read_corpus(tmp_path / "docs.tsv.gz")) == DOCUMENTS


def test_a_byte_order_mark_is_no_part_of_the_first_document(tmp_path):
    (tmp_path / "docs.jsonl").write_text('{"id": "1", "contents": "a"}\n', encoding="utf-8-sig")
    assert list(read_corpus(tmp_path / "docs.jsonl")) == [Document("1", "a")]


def test_a_folder_is_read_file_by_file_in_the_order_of_their_paths(tmp_path):
    folder = tmp_path / "docs"
    (folder / "b").mkdir(parents=True)
    write(folder / "b" / "1.jsonl", '{"id": "2", "contents": "second"}')
    (folder / "c.tsv.gz").write_bytes(gzip.compress(b"3\tthird\n"))
    write(folder / "a.json", '{"id": "1", "contents": "first"}')
    write(folder / "README.md", "not a corpus")
    assert list(read_corpus(folder)) == [Document("1", "first"), Document("2", "second"), Document("3", "third")]


@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz"])
def test_of_a_beir_folder_only_the_corpus_is_read(tmp_path, name):
    line = b'{"_id": "1", "text": "a document"}\n'
    (tmp_path / name).write_bytes(gzip.compress(line) if name.endswith(".gz") else line)
    write(tmp_path / "queries.jsonl", '{"_id": "q1", "text": "a query"}')
    assert list(read_corpus(tmp_path)) == [Document("1", "a document")]


def test_a_folder_without_a_corpus_file_is_an_error(tmp_path):
    write(tmp_path / "README.md", "nothing here")
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path}: no .jsonl, .json, .tsv, .csv file in this folder")):
        list(read_corpus(tmp_path))


def test_a_corpus_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"missing\.jsonl: no such corpus file or folder"):
        list(read_corpus(tmp_path / "missing.jsonl"))


# ir_datasets


class Docs(BaseDocs):
    """The documents of an ir_datasets data set, from a list."""

    def __init__(self, docs):
        self._docs = docs

    def docs_iter(self):
        return iter(self._docs)


@pytest.fixture
def register(tmp_path):
    """Register an ir_datasets data set under a name of this test's own."""

    def add(*components):
        name = f"effir-search-test{tmp_path}"
        ir_datasets.registry.register(name, Dataset(*components))
        return f"irds:{name}"

    return add


def test_an_ir_datasets_corpus_is_read_by_its_name(register):
    source = register(Docs([GenericDoc("007", "The cat."), GenericDoc("2", "")]))
    assert list(read_corpus(source)) == [Document("007", "The cat."), Document("2", "")]


def test_the_title_of_an_ir_datasets_document_is_its_title(register):
    source = register(Docs([TitleUrlTextDoc("1", "Cat", "http://example.org", "The cat eats.")]))
    assert [document_text(document) for document in read_corpus(source)] == ["Cat The cat eats."]


def test_a_bad_ir_datasets_document_is_an_error_with_its_number(register):
    source = register(Docs([GenericDoc("1", "a"), GenericDoc("1", "b")]))
    with pytest.raises(ValueError, match=rf'^{re.escape(source)}, document 2: repeated id "1"'):
        list(read_corpus(source))


def test_an_ir_datasets_name_that_nobody_knows_is_an_error():
    with pytest.raises(ValueError, match="irds:no/such/set: ir_datasets knows no data set of this name"):
        list(read_corpus("irds:no/such/set"))


def test_an_ir_datasets_set_without_documents_is_an_error(register):
    with pytest.raises(ValueError, match="no docs in this data set"):
        list(read_corpus(register()))


# Bad lines

BAD_LINES = {
    "no JSON": (b'{"_id": "x", "text": "a"', "not JSON"),
    "a control character": (b'{"_id": "x", "text": "\x01"}', "not JSON"),
    "deeply nested": (b"[" * 100_000, "not JSON"),
    "not an object": (b'["x", "a"]', "not a JSON object but list"),
    "no id": (b'{"title": "t", "text": "a"}', r"no id field .*found: title, text"),
    "nothing at all": (b"{}", r"no id field .*found: nothing"),
    "id null": (b'{"_id": null, "text": "a"}', 'the id in "_id" is not a string but NoneType'),
    "id a fraction": (b'{"id": 1.5, "text": "a"}', 'the id in "id" is not a string but float'),
    "id a truth value": (b'{"docid": true, "text": "a"}', 'the id in "docid" is not a string but bool'),
    "empty id": (b'{"_id": "", "text": "a"}', "empty id"),
    "repeated id": (b'{"_id": "first", "text": "another"}', 'repeated id "first"'),
    "id with a blank": (b'{"_id": "a b", "text": "a"}', "'a b' holds white space"),
    "id that ends in a blank": (b'{"_id": "a ", "text": "a"}', "'a ' holds white space"),
    "id of a blank": (b'{"_id": " ", "text": "a"}', "' ' holds white space"),
    "id with a line break": (b'{"_id": "a\\nb", "text": "a"}', r"holds white space"),
    "id with a carriage return": (b'{"_id": "a\\rb", "text": "a"}', r"holds white space"),
    "id with a no-break space": (b'{"_id": "a\\u00a0b", "text": "a"}', r"holds white space"),
    "no text": (b'{"_id": "x", "abstract": "a"}', r'no "text" or "contents" field \(found: _id, abstract\)'),
    "text a number": (b'{"_id": "x", "text": 7}', '"text" is not a string but int'),
    "contents a list": (b'{"_id": "x", "contents": ["a"]}', '"contents" is not a string but list'),
    "title a number": (b'{"_id": "x", "title": 7, "text": "a"}', '"title" is not a string but int'),
    # The text starts at byte 22: {"_id": "x", "text": " has 22 characters.
    "no UTF-8": (b'{"_id": "x", "text": "\xff"}', "invalid UTF-8 at byte 22 of the line"),
    "lone surrogate in the text": (b'{"_id": "x", "text": "\\ud83d"}', "lone surrogate .*ud83d"),
    "lone surrogate in the title": (b'{"_id": "x", "title": "\\udc00", "text": ""}', "lone surrogate .*udc00"),
    "lone surrogate in the id": (b'{"_id": "\\ud800", "text": "a"}', "lone surrogate .*ud800"),
}
bad_lines = pytest.mark.parametrize(("line", "complaint"), BAD_LINES.values(), ids=BAD_LINES)


@pytest.fixture
def with_bad_line(tmp_path):
    """Write a corpus whose line 3 is bad; line 2 is blank."""

    def write_corpus(line):
        path = tmp_path / "docs.jsonl"
        good = b'{"_id": "first", "text": "a"}\n', b'{"_id": "last", "text": "b"}\n'
        path.write_bytes(good[0] + b"\n" + line + b"\n" + good[1])
        return path

    return write_corpus


@bad_lines
def test_a_bad_line_is_an_error_with_file_and_line(with_bad_line, line, complaint):
    path = with_bad_line(line)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))}:3: .*{complaint}"):
        list(read_corpus(path))


@bad_lines
def test_a_bad_line_is_left_out_and_reported_once_if_that_is_asked_for(with_bad_line, line, complaint):
    path = with_bad_line(line)
    complaints = []
    documents = list(read_corpus(path, on_bad_line=complaints.append))
    assert [document.doc_id for document in documents] == ["first", "last"]
    assert len(complaints) == 1
    assert re.match(rf"{re.escape(str(path))}:3: .*{complaint}", complaints[0])


def test_documents_before_a_bad_line_are_given_before_the_error(with_bad_line):
    documents = read_corpus(with_bad_line(b"{"))
    assert next(documents).doc_id == "first"
    with pytest.raises(ValueError, match=":3: not JSON"):
        next(documents)


def test_an_id_that_is_repeated_in_another_file_is_an_error_there(tmp_path):
    write(tmp_path / "a.jsonl", '{"id": "1", "contents": "a"}')
    write(tmp_path / "b.jsonl", '{"id": "2", "contents": "a"}', '{"id": "1", "contents": "a"}')
    with pytest.raises(ValueError, match=r'b\.jsonl:2: repeated id "1"'):
        list(read_corpus(tmp_path))


def test_the_id_of_a_line_that_was_left_out_is_free(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"_id": "1", "text": 7}', '{"_id": "1", "text": "a"}')
    assert list(read_corpus(path, on_bad_line=lambda _complaint: None)) == [Document("1", "a")]


@pytest.mark.parametrize("row", [b"\ta text", b"a b\ta text", b"1\t\xff"])
def test_a_bad_tsv_row_is_an_error_with_file_and_line(tmp_path, row):
    (tmp_path / "docs.tsv").write_bytes(b"0\tfine\n" + row + b"\n")
    with pytest.raises(ValueError, match=r"docs\.tsv:2: (empty id|.* holds white space|invalid UTF-8 at byte 2)"):
        list(read_corpus(tmp_path / "docs.tsv"))


def test_a_cut_gzip_file_is_an_error_even_where_bad_lines_are_left_out(tmp_path):
    lines = "".join(as_beir(Document(str(number), f"text {number * 7919}")) for number in range(2000))
    compressed = gzip.compress(lines.encode())
    (tmp_path / "docs.jsonl.gz").write_bytes(compressed[: len(compressed) // 2])
    with pytest.raises(ValueError, match=r"docs\.jsonl\.gz: cut or damaged gzip file, after line [1-9]\d*"):
        scan_corpus(tmp_path / "docs.jsonl.gz", skip_bad=True)


def test_an_empty_id_is_refused():
    with pytest.raises(ValueError, match="^here: empty id$"):
        check_id("", "here")


# Summaries and hashes


def test_a_summary_counts_documents_empty_ones_and_bad_lines(beir):
    with open(beir, "a", encoding="utf-8") as file:
        file.write('{"_id": "5"}\n{"_id": "6", "title": " ", "text": ""}\nnot JSON\n')
    summary = scan_corpus(beir, skip_bad=True)
    # Four good ones, of which "x:4" is empty and "3" has a title, and "6", whose blank is stripped.
    assert (summary.num_documents, summary.num_empty) == (5, 2)
    assert [complaint.split(": ")[0] for complaint in summary.bad_lines] == [f"{beir}:5", f"{beir}:7"]


def test_a_good_corpus_has_no_bad_lines(beir):
    assert scan_corpus(beir).bad_lines == scan_corpus(beir, skip_bad=True).bad_lines == []


def test_a_bad_line_stops_a_scan_unless_it_is_to_be_skipped(with_bad_line):
    with pytest.raises(ValueError, match=r"docs\.jsonl:3: not JSON"):
        scan_corpus(with_bad_line(b"{"))


def test_an_empty_document_is_valid(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"_id": "1", "text": ""}')
    summary = scan_corpus(path)
    assert (summary.num_documents, summary.num_empty) == (1, 1)


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_a_corpus_without_documents_is_an_error(tmp_path, content):
    (tmp_path / "docs.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"docs\.jsonl: no documents$"):
        scan_corpus(tmp_path / "docs.jsonl")


def test_a_corpus_of_bad_lines_alone_is_an_error_that_counts_them(tmp_path):
    path = write(tmp_path / "docs.jsonl", "{", "}")
    with pytest.raises(ValueError, match=r"docs\.jsonl: no documents, 2 bad lines$"):
        scan_corpus(path, skip_bad=True)


def test_the_same_corpus_has_the_same_hash_in_every_format(beir, tmp_path):
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(beir.read_bytes()))
    (tmp_path / "docs.tsv").write_text("".join(map(as_tsv, DOCUMENTS)), encoding="utf-8")
    pyserini = [json.dumps({"id": document.doc_id, "contents": document_text(document)}) for document in DOCUMENTS]
    write(tmp_path / "pyserini.jsonl", *pyserini)
    paths = [beir, tmp_path / "docs.jsonl.gz", tmp_path / "docs.tsv", tmp_path / "pyserini.jsonl"]
    assert len({scan_corpus(path).sha256 for path in paths}) == 1


def test_a_scan_and_a_hasher_agree(beir):
    hasher = CorpusHasher()
    for document in DOCUMENTS:
        hasher.add(document)
    assert scan_corpus(beir).sha256 == hasher.hexdigest()
    assert hasher.num_documents == 4


@pytest.mark.parametrize(
    "documents",
    [
        DOCUMENTS[:3],
        [DOCUMENTS[1], DOCUMENTS[0], *DOCUMENTS[2:]],
        [DOCUMENTS[0]._replace(text="The cat eats fish"), *DOCUMENTS[1:]],
        [DOCUMENTS[0]._replace(doc_id="7"), *DOCUMENTS[1:]],
    ],
    ids=["one less", "another order", "another text", "another id"],
)
def test_another_corpus_has_another_hash(beir, tmp_path, documents):
    other = tmp_path / "other.jsonl"
    other.write_text("".join(map(as_beir, documents)), encoding="utf-8")
    assert scan_corpus(other).sha256 != scan_corpus(beir).sha256


@pytest.mark.parametrize("text", ["a2 b", "a2 1\nb", "a\n2 1\nb"])
def test_a_text_that_looks_like_the_next_document_has_a_hash_of_its_own(text):
    one, two = CorpusHasher(), CorpusHasher()
    one.add(Document("1", text))
    two.add(Document("1", "a"))
    two.add(Document("2", "b"))
    assert one.hexdigest() != two.hexdigest()


# Looking documents up


def test_documents_are_found_by_their_ids(beir):
    assert find_documents({beir: CorpusFields()}, ["3", "007"]) == {"3": DOCUMENTS[2], "007": DOCUMENTS[0]}


def test_the_fields_that_were_indexed_can_be_looked_up_again(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "abstract": "A"}')
    assert find_documents({path: CorpusFields(["abstract"])}, ["1"]) == {"1": Document("1", "A")}


def test_a_document_that_is_not_there_is_an_error_that_counts_them(beir):
    with pytest.raises(ValueError, match=r'corpus\.jsonl: no document "8" \(2 of 3 hits are not there\)'):
        find_documents({beir: CorpusFields()}, ["9", "007", "8"])


def test_documents_are_looked_up_in_all_sources_and_each_is_read_by_its_own_fields(tmp_path, beir):
    other = write(tmp_path / "other.jsonl", '{"id": "a", "abstract": "A"}', '{"id": "007", "abstract": "another"}')
    found = find_documents({beir: CorpusFields(), other: CorpusFields(["abstract"])}, ["a", "007"])
    assert found == {"a": Document("a", "A"), "007": DOCUMENTS[0]}
    assert find_documents({other: CorpusFields(["abstract"]), beir: CorpusFields()}, ["007"]) == {
        "007": Document("007", "another")
    }
    with pytest.raises(ValueError, match=f'^{beir}, {other}: no document "8"'):
        find_documents({beir: CorpusFields(), other: CorpusFields(["abstract"])}, ["a", "8"])


def test_looking_up_reads_no_further_than_it_must(tmp_path):
    lines = "".join(map(as_beir, DOCUMENTS)).encode()
    (tmp_path / "docs.jsonl.gz").write_bytes(gzip.compress(lines) + b"no gzip")
    assert find_documents({tmp_path / "docs.jsonl.gz": CorpusFields()}, ["007", "doc-2"]).keys() == {"007", "doc-2"}


def test_fields_are_refused_where_they_would_be_ignored(tmp_path):
    write(tmp_path / "c.tsv", "1\tcat")
    for source in (tmp_path / "c.tsv", "irds:no/such/set"):
        with pytest.raises(ValueError, match="--fields is for JSON"):
            list(read_corpus(source, fields=["text"]))


def test_a_null_title_is_empty_with_and_without_fields(tmp_path):
    write(tmp_path / "c.jsonl", '{"_id": "1", "title": null, "text": "cat"}')
    for fields in (None, ["title", "text"]):
        assert [document_text(document) for document in read_corpus(tmp_path / "c.jsonl", fields=fields)] == ["cat"]


def test_a_tsv_header_after_a_blank_line_is_a_header(tmp_path):
    write(tmp_path / "c.tsv", "", "id\ttext", "1\tcat")
    assert list(read_corpus(tmp_path / "c.tsv")) == [Document("1", "cat")]


# Other layouts


def test_the_passage_of_ms_marco_v2_has_its_own_id_unless_another_field_is_named(tmp_path):
    record = {"pid": "msm_p_00_0", "passage": "The cat.", "spans": "(0,8)", "docid": "msm_d_00_0"}
    path = write(tmp_path / "docs.jsonl", json.dumps(record))
    assert list(read_corpus(path)) == [Document("msm_p_00_0", "The cat.")]
    assert list(read_corpus(path, id_field="docid")) == [Document("msm_d_00_0", "The cat.")]
    with pytest.raises(ValueError, match=r"docs\.jsonl:1: no id field \(key; found: pid, passage, spans, docid\)"):
        list(read_corpus(path, id_field="key"))


def test_an_id_field_is_refused_where_it_would_be_ignored(tmp_path):
    write(tmp_path / "c.tsv", "1\tcat")
    for source in (tmp_path / "c.tsv", "irds:no/such/set"):
        with pytest.raises(ValueError, match="--id-field is for JSON"):
            list(read_corpus(source, id_field="id"))


def test_documents_are_looked_up_by_the_id_that_was_indexed(tmp_path):
    path = write(tmp_path / "docs.jsonl", '{"id": "1", "key": "a", "text": "cat"}')
    assert find_documents({path: CorpusFields(id="key")}, ["a"]) == {"a": Document("a", "cat")}


def test_a_null_text_and_a_missing_field_of_several_are_empty(tmp_path):
    path = write(tmp_path / "c.jsonl", '{"_id": "1", "title": "T", "text": null}', '{"_id": "2", "text": "a"}')
    assert list(read_corpus(path)) == [Document("1", "", "T"), Document("2", "a")]
    documents = list(read_corpus(path, fields=["title", "text"]))
    assert [document_text(document) for document in documents] == ["T", "a"]


def test_a_null_field_does_not_hide_the_text_in_another(tmp_path):
    path = write(tmp_path / "c.jsonl", '{"_id": "1", "title": "T", "contents": null, "text": "a"}')
    assert list(read_corpus(path)) == [Document("1", "a", "T")]


def nested(folder, *names):
    for name in names:
        (folder / name).mkdir(parents=True)
        write(folder / name / "corpus.jsonl", '{"_id": "1", "text": "a"}')
        write(folder / name / "queries.jsonl", '{"_id": "q1", "text": "a query"}')
        (folder / name / "qrels").mkdir()
        write(folder / name / "qrels" / "test.tsv", "query-id\tcorpus-id\tscore", "q1\t1\t1")
    return folder


@pytest.mark.parametrize("names", [("android", "english"), ("deep/er/android", "deep/er/english")])
def test_a_folder_of_beir_folders_is_an_error_that_names_one_of_them(tmp_path, names):
    folder = nested(tmp_path / "cqadupstack", *names)
    advice = f"{folder}: holds 2 BEIR folders, .* as in --corpus {folder / names[0]}$"
    with pytest.raises(ValueError, match=advice):
        list(read_corpus(folder))
    assert list(read_corpus(folder / names[0])) == [Document("1", "a")]


def test_queries_qrels_and_hidden_files_of_a_folder_are_no_documents(tmp_path):
    folder = nested(tmp_path / "set", "one") / "one"
    (folder / "corpus.jsonl").rename(folder / "docs.jsonl")
    write(folder / ".docs.jsonl.tmp", '{"_id": "2", "text": "half a docum')
    (folder / ".cache").mkdir()
    write(folder / ".cache" / "docs.jsonl", '{"_id": "1", "text": "a"}')
    assert list(read_corpus(folder)) == [Document("1", "a")]
    (folder / "docs.jsonl").unlink()
    for place in (folder, folder / "qrels"):
        with pytest.raises(ValueError, match=r"file in this folder, plain or \.gz, but for queries and qrels"):
            list(read_corpus(place))


def test_qrels_are_no_corpus(tmp_path):
    path = write(tmp_path / "test.tsv", "query-id\tcorpus-id\tscore", "q1\td1\t1")
    with pytest.raises(ValueError, match=r"test\.tsv:1: these are qrels, which hold no texts"):
        list(read_corpus(path))


def test_ms_marcos_files_are_known_without_an_ending_before_gz(tmp_path):
    line = b'{"pid": "1", "passage": "a", "docid": "d"}\n'
    (tmp_path / "msmarco_passage_00.gz").write_bytes(gzip.compress(line))
    assert list(read_corpus(tmp_path)) == [Document("1", "a")]


def test_data_of_a_folder_that_cannot_be_read_is_warned_of_once(tmp_path, caplog):
    write(tmp_path / "a.jsonl", '{"_id": "1", "text": "a"}')
    write(tmp_path / "b.jsonl.zst", "")
    write(tmp_path / "README.md", "")
    scan_corpus(tmp_path)
    assert [record.message for record in caplog.records] == [f"{tmp_path}: 1 files are not read, such as b.jsonl.zst"]


ARRAY = [
    {"_id": "1", "text": 'a, [b] \\ "c" \n'},
    {"_id": "2", "title": "T", "text": "東京" * 50},
    {"_id": "3", "text": ""},
]


@pytest.mark.parametrize("piece", [1, 2, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_array_is_read_in_pieces_of_any_size(tmp_path, monkeypatch, piece, indent):
    monkeypatch.setattr("effir_search.text.layouts._JsonText.PIECE", piece)
    (tmp_path / "docs.json").write_text(" \n" + json.dumps(ARRAY, indent=indent, ensure_ascii=False), encoding="utf-8")
    expected = [Document(record["_id"], record["text"], record.get("title", "")) for record in ARRAY]
    assert list(read_corpus(tmp_path / "docs.json")) == expected


def test_an_empty_json_array_has_no_documents(tmp_path):
    with pytest.raises(ValueError, match="no documents"):
        scan_corpus(write(tmp_path / "docs.json", "[ ]"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[{"_id": "1", "text": "a"}', "docs.json:1: the JSON array does not end; the file is cut"),
        ('[{"_id": "1", "text": "a"},', "docs.json:1: not JSON: Expecting value"),
        ('[{"_id": "1", "text": "a"},\n\n{"_id": "2", "te', "docs.json:3: not JSON: Unterminated string"),
        ('[{"_id": "1", "text": "a"}\n{"_id": "2"}]', "docs.json:2: not JSON: '{' between two elements"),
        ('[{"_id": "1", "text": "a"}]\n[]', "docs.json:2: there is more behind the end of the JSON array"),
        ("[" * 100_000, "JSON nested too deeply"),
        ('{\n "_id": "1",\n "text": \n', "docs.json: neither JSONL nor one JSON object"),
    ],
)
def test_a_damaged_json_file_is_an_error_even_where_bad_documents_are_left_out(tmp_path, text, message):
    (tmp_path / "docs.json").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_corpus(tmp_path / "docs.json", on_bad_line=lambda _complaint: None))


def test_a_bad_element_of_a_json_array_is_named_with_its_line_and_number(tmp_path):
    path = write(tmp_path / "docs.json", "[", '{"_id": "1", "text": "a"}, 7,', '{"_id": "1", "text": "b"}]')
    complaints = []
    assert list(read_corpus(path, on_bad_line=complaints.append)) == [Document("1", "a")]
    assert complaints == [
        f"{path}:2, element 2: not a JSON object but int; each document is one object",
        f'{path}:3, element 3: repeated id "1"',
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1,cat\n", "c.csv:1: '1,cat' is no header of CSV, which names an id"),
        ("id;text\n1;cat\n", "c.csv:1: 'id;text' is no header of CSV"),
        ('id,text\n1,"cat"s\n', "c.csv:2: not CSV"),
        ('id,text\n1,"cat\n', "c.csv:2: not CSV: unexpected end of data"),
        ("id,text\n1,cat,dog\n", "c.csv:2: 3 columns, expected 2"),
    ],
)
def test_csv_that_is_no_csv_with_a_header_is_an_error(tmp_path, text, message):
    (tmp_path / "c.csv").write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)):
        list(read_corpus(tmp_path / "c.csv"))


def test_a_field_of_csv_may_be_longer_than_the_limit_of_the_csv_module(tmp_path):
    (tmp_path / "c.csv").write_text("id,text\r\n\r\n1," + "cat " * 50_000 + "\r\n")
    assert [len(document.text) for document in read_corpus(tmp_path / "c.csv")] == [200_000]


@pytest.mark.parametrize(
    ("line", "what"),
    [("<DOC>", "XML or HTML"), ("1\tcat", "TSV; a corpus in TSV has"), ('"id","text"', "CSV; a corpus")],
)
def test_another_format_is_named_where_json_is_needed(tmp_path, line, what):
    with pytest.raises(ValueError, match=rf"c\.txt:1: not JSON, .* \(it looks like {what}"):
        list(read_corpus(write(tmp_path / "c.txt", line)))


def test_four_columns_without_a_url_are_an_error(tmp_path):
    with pytest.raises(ValueError, match=r"c\.tsv:2: 4 columns, expected 2 or 3"):
        list(read_corpus(write(tmp_path / "c.tsv", "D1\thttps://example.org\tCat\tIt eats.", "D2\tno URL\tDog\tIt.")))


@pytest.mark.parametrize(
    "name", ["queries_test.jsonl", "test-queries.jsonl", "Topics.jsonl", "docdev-queries.tsv", "dev.qrels.tsv"]
)
def test_topics_and_qrels_of_a_folder_are_known_by_a_word_of_their_names_and_told(tmp_path, name, caplog):
    (tmp_path / "docs.jsonl").write_text('{"_id": "d", "text": "cat"}\n')
    (tmp_path / name).write_text("1\tcat\n" if name.endswith(".tsv") else '{"_id": "q", "text": "dog"}\n')
    assert [document.doc_id for document in read_corpus(tmp_path)] == ["d"]
    assert scan_corpus(tmp_path).num_documents == 1
    assert f"1 files are topics or qrels by their names, such as {name}" in caplog.text


def test_a_word_that_only_holds_such_a_word_is_no_reason_to_leave_a_file_out(tmp_path):
    (tmp_path / "subtopicsofmath.jsonl").write_text('{"_id": "d", "text": "cat"}\n')
    assert [document.doc_id for document in read_corpus(tmp_path)] == ["d"]


@pytest.mark.parametrize(
    "header", ["corpus-id\ttext", "Doc-ID\tText", "docid\tcontent", '"id"\t"text"', "#id\tcontents"]
)
def test_a_header_of_any_spelling_is_no_document(tmp_path, header):
    (tmp_path / "c.tsv").write_text(f"{header}\nd1\tcat\n")
    assert list(read_corpus(tmp_path / "c.tsv")) == [Document("d1", "cat")]


def test_a_header_that_names_no_text_is_an_error_and_no_document(tmp_path):
    (tmp_path / "c.tsv").write_text("id\ttitle\tdescription\n1\tcat\ta cat\n")
    with pytest.raises(ValueError, match="c.tsv:1: a header that names no text, one of contents, text"):
        list(read_corpus(tmp_path / "c.tsv"))


def test_a_number_of_thousands_of_digits_is_one_line_also_in_an_array(tmp_path):
    (tmp_path / "c.json").write_text('[{"_id": ' + "1" * 5000 + ', "text": "x"}]')
    with pytest.raises(ValueError, match="c.json:1: not JSON: Exceeds the limit"):
        list(read_corpus(tmp_path / "c.json"))


def test_an_id_that_is_null_is_passed_over_for_the_next_field(tmp_path):
    (tmp_path / "c.jsonl").write_text('{"_id": null, "id": "x", "text": "cat"}\n')
    assert list(read_corpus(tmp_path / "c.jsonl")) == [Document("x", "cat")]


def test_a_link_to_a_folder_is_not_followed_and_that_is_told(tmp_path, caplog):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.jsonl").write_text('{"_id": "x", "text": "dog"}\n')
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.jsonl").write_text('{"_id": "a", "text": "cat"}\n')
    (tmp_path / "corpus" / "linked").symlink_to(tmp_path / "elsewhere")
    assert scan_corpus(tmp_path / "corpus").num_documents == 1
    assert "1 links to folders are not followed, such as linked" in caplog.text
