"""Corpora as streams of documents: BEIR, Pyserini and MS MARCO files, tables, folders of them, ir_datasets ids."""

import csv
import hashlib
import io
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import IO, NamedTuple

from effir_search.errors import UserError
from effir_search.files.reading import decode, lines_of, open_text, parse_json_object

logger = logging.getLogger(__name__)

# In the order in which they are looked for: a passage has its own id before that of the document it is from.
ID_FIELDS = ("_id", "id", "pid", "passage_id", "docid", "doc_id", "docno")

QUERY_ID_FIELDS = ("_id", "id", "qid", "query_id", "query-id", "topic_id", *ID_FIELDS[2:])

TEXT_FIELDS = ("contents", "text", "passage", "segment", "body")

TOPIC_TEXT_FIELDS = ("text", "query", "query_text", "question")

TABLE_ID_FIELDS = (*ID_FIELDS, *QUERY_ID_FIELDS[2:6])

# Columns of a table without a header, by their number; four are MS MARCO's documents.
COLUMNS = {2: ("id", "text"), 3: ("id", "title", "text"), 4: ("id", "url", "title", "text")}

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv")

# Endings of data that is not read: a folder may hold a part of its corpus in them.
UNREAD = (".parquet", ".arrow", ".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst", ".lz4")

CORPUS_FILES = ("corpus.jsonl", "corpus.jsonl.gz")

IR_DATASETS = "irds:"

# Names in a header of qrels, without what is no letter.
QREL_NAMES = {
    "query_id": {"qid", "queryid", "query", "topic", "topicid", "topicno", "topicnum"},
    "doc_id": {"docid", "docno", "doc", "did", "document", "documentid", "corpusid", "pid", "passageid"},
    "relevance": {"rel", "relevance", "relevancy", "score", "grade", "label", "judgment", "judgement", "rating"},
}


class Document(NamedTuple):
    """One document of a corpus. ``doc_id`` holds no white space; ``text`` and ``title`` may be empty."""

    doc_id: str
    text: str
    title: str = ""


class CorpusFields(NamedTuple):
    """JSON fields that are read, each None = the default: those of the text, and that of the id."""

    texts: Sequence[str] | None = None
    id: str | None = None


DEFAULT_FIELDS = CorpusFields()


class CorpusSummary(NamedTuple):
    """What one pass over a corpus finds; ``bad_lines`` says what is wrong with each line that was left out."""

    num_documents: int
    num_empty: int
    sha256: str
    bad_lines: list[str]


BadLine = Callable[[str], None]


def document_text(document: Document) -> str:
    """Return what is encoded: title and text joined by one space, stripped."""
    return f"{document.title} {document.text}".strip()


def read_corpus(
    source: str | Path,
    *,
    fields: Sequence[str] | None = None,
    id_field: str | None = None,
    on_bad_line: BadLine | None = None,
) -> Iterator[Document]:
    """Yield the documents of a corpus, in file order; formats are in docs/formats.md.

    Args:
        source: A ``.jsonl``, ``.json``, ``.tsv`` or ``.csv`` file, gzipped or not; a folder of them, read in the order
            of their paths (a folder with a ``corpus.jsonl`` is a BEIR data set, of which only that file is read); or
            ``irds:NAME`` for an ir_datasets corpus, which downloads what is not there yet.
        fields: JSON fields whose texts, joined by one space, are the document's text. The default is ``contents``, or
            ``title`` and ``text`` under one of its names.
        id_field: JSON field that is the id. The default is the first of ``ID_FIELDS`` that a record has.
        on_bad_line: Called with the complaint about each bad line, which is then left out.

    Raises:
        ValueError: A bad line and no ``on_bad_line``; the message names file and line. One of ``fields`` that no
            document has. A file that is damaged, or no text.
        OSError: A file cannot be read.
    """
    seen: set[str] = set()
    unseen = set(fields or ())
    for where, parse in _rows(source, CorpusFields(fields, id_field), unseen):
        try:
            document = parse()
            _check(document, where)
            if document.doc_id in seen:
                raise UserError(f'{where}: repeated id "{document.doc_id}"')
        except ValueError as error:
            if on_bad_line is None:
                raise
            on_bad_line(str(error))
            continue
        seen.add(document.doc_id)
        yield document
    if seen and unseen:
        raise UserError(f'{source}: no document has the field "{min(unseen)}" of --fields; leave it out')


def scan_corpus(
    source: str | Path, *, fields: Sequence[str] | None = None, id_field: str | None = None, skip_bad: bool = False
) -> CorpusSummary:
    """Read a corpus once, to count, check and hash it before a long job begins.

    Files of a folder that may be data and cannot be read are warned of.

    Raises:
        ValueError: A bad line and no ``skip_bad``, or no document at all.
        OSError: A file cannot be read.
    """
    _warn_of_unread(source)
    bad_lines: list[str] = []
    on_bad_line = bad_lines.append if skip_bad else None
    hasher = CorpusHasher()
    num_empty = 0
    for document in read_corpus(source, fields=fields, id_field=id_field, on_bad_line=on_bad_line):
        hasher.add(document)
        num_empty += not document_text(document)
    if hasher.num_documents == 0:
        raise UserError(f"{source}: no documents" + (f", {len(bad_lines)} bad lines" if bad_lines else ""))
    return CorpusSummary(hasher.num_documents, num_empty, hasher.hexdigest(), bad_lines)


class CorpusHasher:
    """SHA-256 over ids and texts in order: the same corpus has the same hash in any file format."""

    def __init__(self) -> None:
        self.num_documents = 0
        self._sha256 = hashlib.sha256()

    def add(self, document: Document) -> None:
        """Take in the next document."""
        text = document_text(document).encode("utf-8")
        # An id holds no white space, so this line can be read in one way only.
        self._sha256.update(b"%s %d\n%s" % (document.doc_id.encode("utf-8"), len(text), text))
        self.num_documents += 1

    def hexdigest(self) -> str:
        """Return the hash of all documents taken in so far."""
        return self._sha256.hexdigest()


def find_documents(sources: Mapping[str | Path, CorpusFields], doc_ids: Iterable[str]) -> dict[str, Document]:
    """Return the documents of these ids, reading no further than the last of them.

    Args:
        sources: Each as ``read_corpus`` takes it, with the fields to read. Where two have an id, the first one counts.
        doc_ids: What is looked up.

    Raises:
        ValueError: An id that no source holds.
    """
    wanted = set(doc_ids)
    found: dict[str, Document] = {}
    for source, fields in sources.items():
        found |= documents_there(source, wanted - found.keys(), fields=fields)
    if missing := sorted(wanted - found.keys()):
        names = ", ".join(map(str, sources))
        raise UserError(f'{names}: no document "{missing[0]}" ({len(missing)} of {len(wanted)} hits are not there)')
    return found


def documents_there(
    source: str | Path, doc_ids: Collection[str], *, fields: CorpusFields = DEFAULT_FIELDS
) -> dict[str, Document]:
    """Return the documents of these ids, as far as the corpus has them, reading no further than the last.

    A bad line is passed over: one that was left out of an index must not stop what is made of its hits.

    Args:
        source: As ``read_corpus`` takes it.
        doc_ids: What is looked up.
        fields: JSON fields that are read.

    Raises:
        OSError: A file cannot be read.
    """
    wanted = set(doc_ids)
    found: dict[str, Document] = {}
    if not wanted:
        return found
    read = read_corpus(source, fields=fields.texts, id_field=fields.id, on_bad_line=lambda _complaint: None)
    for document in read:
        if document.doc_id in wanted:
            found[document.doc_id] = document
            if len(found) == len(wanted):
                break
    return found


def _rows(source: str | Path, fields: CorpusFields, unseen: set[str]) -> Iterator[tuple[str, Callable[[], Document]]]:
    """Yield ``(where, parse)`` for each row, so that the caller decides what a bad row means.

    Fields that a row has are taken out of ``unseen``.
    """
    if str(source).startswith(IR_DATASETS):
        _refuse(fields, f"{source}: {{}} is for JSON files, ir_datasets has fields of its own")
        for number, doc in enumerate(read_ir_datasets(str(source), "docs"), start=1):
            yield f"{source}, document {number}", partial(_from_ir_datasets, doc)
        return
    for path in corpus_files(Path(source)):
        with open_text(path) as file:
            if is_table(path):
                _refuse(fields, f"{path}: {{}} is for JSON; the columns of a table are named in its first row")
                for where, row, header in table_rows(file, path, TEXT_FIELDS):
                    yield where, partial(_from_table, row, where, header)
            else:
                for where, row in json_rows(file, path):
                    yield where, partial(_from_json, row, where, fields, unseen)


def _refuse(fields: CorpusFields, message: str) -> None:
    for option, value in (("--fields", fields.texts), ("--id-field", fields.id)):
        if value is not None:
            raise UserError(message.format(option))


def is_table(path: Path) -> bool:
    """Whether a file is TSV or CSV by its name."""
    return _plain_name(path).endswith((".tsv", ".csv"))


def table_rows(
    file: IO[bytes], path: Path, text_fields: Sequence[str], *, need_id: bool = True
) -> Iterator[tuple[str, bytes | list[str], list[str] | None]]:
    """Yield ``(where, row, header)`` of a table that ``open_text`` opened; ``columns_of`` takes the row apart.

    The header is the first row's names in lower case, or None if that row is data; in CSV it must be there.

    Raises:
        ValueError: Quotes of a CSV file that do not match, or no header in it; qrels; damage.
    """
    is_csv = _plain_name(path).endswith(".csv")
    rows = _csv_rows(file, path) if is_csv else ((f"{path}:{n}", line) for n, line in lines_of(file, path))
    header: list[str] | None = None
    for number, (where, row) in enumerate(rows):
        if number == 0:
            columns = row if is_csv else row.decode("utf-8", "replace").split("\t")
            names = [name.strip().lower() for name in columns]
            if any(name in text_fields for name in names) and (
                any(name in TABLE_ID_FIELDS for name in names) or not (need_id or set(names) - {*text_fields, "title"})
            ):
                header = names
                continue
            if is_qrels_header(names):
                raise UserError(f"{where}: these are qrels, which hold no texts")
            if is_csv:
                known = f"an id ({', '.join(TABLE_ID_FIELDS)}) and a text ({', '.join(text_fields)})"
                found = ",".join(columns)[:60]
                raise UserError(f"{where}: {found!r} is no header of CSV, which names {known}; TSV needs none")
        yield where, row, header


def _csv_rows(file: IO[bytes], path: Path) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(where, columns)`` of a CSV file as RFC 4180 has it; texts in quotes may go over several lines."""
    csv.field_size_limit(2**31 - 1)  # the default of 128 KB is less than a long document
    reader = csv.reader((decode(line, f"{path}:{n}") for n, line in enumerate(file, start=1)), strict=True)
    line_number = 1
    try:
        for row in reader:
            if row:
                yield f"{path}:{line_number}", row
            line_number = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{line_number}: not CSV: {error}") from error


def columns_of(row: bytes | list[str], where: str) -> list[str]:
    """Return the columns of a row of ``table_rows``."""
    return row if isinstance(row, list) else decode(row, where).split("\t")


def is_qrels_header(columns: Sequence[str]) -> bool:
    """Whether a row names the columns of qrels: three or four, no number last, two of them by a known name."""
    names = [_letters(name) for name in columns]
    known = sum(any(name in spellings for name in names) for spellings in QREL_NAMES.values())
    return len(names) in (3, 4) and known >= 2 and not re.search("[0-9]", columns[-1])


def qrels_places(columns: Sequence[str]) -> list[int]:
    """Return where a header of qrels has query id, document id and grade; a name that nobody knows is where it was."""
    names = [_letters(name) for name in columns]
    usual = (0, len(names) - 2, len(names) - 1)
    return [
        next((place for place, name in enumerate(names) if name in spellings), default)
        for spellings, default in zip(QREL_NAMES.values(), usual, strict=True)
    ]


def _letters(name: str) -> str:
    return re.sub("[^a-z]", "", name.lower())


def json_rows(file: IO[bytes], path: Path) -> Iterator[tuple[str, object]]:
    """Yield ``(where, row)`` of JSONL, of a JSON array or of a file that is one object; see ``json_object``.

    Raises:
        ValueError: An array or an object over several lines that is no JSON; damage.
    """
    head = file.peek(1).lstrip()
    if head.startswith(b"["):
        yield from _json_array(file, path)
    elif re.match(rb'\{\s*\n\s*"', head):
        yield str(path), _whole_json(file, path)
    else:
        for line_number, line in lines_of(file, path):
            yield f"{path}:{line_number}", line


def json_object(row: object, where: str) -> dict:
    """Return the object of a row of ``json_rows``; ``where`` opens the error if it is none."""
    if isinstance(row, bytes):
        return parse_json_object(decode(row, where), where)
    if not isinstance(row, dict):
        raise UserError(f"{where}: not a JSON object but {type(row).__name__}; each document is one object")
    return row


def _whole_json(file: IO[bytes], path: Path) -> object:
    try:
        return json.loads(decode(file.read(), str(path)))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: neither JSONL nor one JSON object ({error})") from error


class _JsonText:
    """A JSON text that is read a piece at a time."""

    PIECE = 1 << 20

    def __init__(self, file: IO[bytes], path: Path) -> None:
        self._decoder, self._path = json.JSONDecoder(), path
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="\n")
        self._piece, self._at, self.line = "", 0, 1

    def next_character(self) -> str:
        """The next character that is no white space, which is not taken; "" at the end."""
        while True:
            end = _BLANKS.match(self._piece, self._at).end()
            self._go_to(end)
            if end < len(self._piece) or not self._read_more():
                return self._piece[end : end + 1]

    def take(self) -> None:
        self._go_to(self._at + 1)

    def value(self) -> object:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._piece, self._at)
                # A number may go on in the next piece.
                if end < len(self._piece) or not self._read_more():
                    self._go_to(end)
                    return value
            except json.JSONDecodeError as error:
                # What is only cut fails at its end, or where a string begins that has none.
                cut = error.pos + 16 > len(self._piece) or error.msg.startswith("Unterminated string")
                if not (cut and self._read_more()):
                    line = self.line + self._piece.count("\n", self._at, error.pos)
                    raise UserError(f"{self._path}:{line}: not JSON: {error.msg}") from error
            except RecursionError as error:
                raise UserError(f"{self._path}:{self.line}: JSON nested too deeply") from error

    def _go_to(self, end: int) -> None:
        self.line += self._piece.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Read as much again as is left, so that a long value is not begun anew too often; False at the end."""
        left = self._piece[self._at :]
        more = self._text.read(max(self.PIECE, len(left)))
        self._piece, self._at = left + more, 0
        return bool(more)


_BLANKS = re.compile(r"[ \t\r\n]*")


def _json_array(file: IO[bytes], path: Path) -> Iterator[tuple[str, object]]:
    """Yield the elements of a JSON array, each with the line where it begins and its number."""
    text = _JsonText(file, path)
    text.next_character()
    text.take()
    number, mark = 0, "" if text.next_character() == "]" else ","
    while mark == ",":
        text.next_character()
        number += 1
        where = f"{path}:{text.line}, element {number}"
        yield where, text.value()
        mark = text.next_character()
        if mark == ",":
            text.take()
    if mark not in ("", "]"):
        raise UserError(f"{path}:{text.line}: not JSON: {mark!r} between two elements of the array")
    if not text.next_character():
        raise UserError(f"{path}:{text.line}: the JSON array does not end; the file is cut")
    text.take()
    if text.next_character():
        raise UserError(f"{path}:{text.line}: there is more behind the end of the JSON array")


def beir_file(folder: Path, name: str) -> Path:
    """Return a BEIR folder's ``corpus.jsonl``, ``queries.jsonl`` or ``qrels/SPLIT.tsv``; the first two may be .gz.

    Raises:
        FileNotFoundError: It has none.
    """
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder}: has no {name}, which a BEIR folder has")


def corpus_files(path: Path) -> list[Path]:
    """Return the files that a corpus' name stands for; of a folder neither hidden ones, nor queries and qrels.

    Raises:
        ValueError: A folder of BEIR folders, or without any such file; neither a file nor a folder.
        FileNotFoundError: There is nothing of this name.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such corpus file or folder")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: is neither a file nor a folder; a corpus is read twice, so a pipe cannot be one")
    for name in CORPUS_FILES:
        if (path / name).is_file():
            return [path / name]
    there = _visible_files(path)
    if nested := [file.parent for file in there if file.name in CORPUS_FILES]:
        raise UserError(
            f"{path}: holds {len(nested)} BEIR folders, each with a corpus of its own; "
            f"give one of them, as in --corpus {nested[0]}"
        )
    named = [file for file in there if _is_corpus_name(file)]
    files = [file for file in named if not _is_topics_or_qrels(file, path)]
    if not files:
        others = ", plain or .gz" + (", but for queries and qrels" if named else "")
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder{others}")
    return files


def _visible_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _plain_name(path: Path) -> str:
    return path.name.lower().removesuffix(".gz")


def _is_corpus_name(file: Path) -> bool:
    """Whether a file is one of a corpus by its name; MS MARCO's are called ``msmarco_passage_00.gz``."""
    name = _plain_name(file)
    return name.endswith(SUFFIXES) or (name != file.name.lower() and "." not in name)


def _is_topics_or_qrels(file: Path, folder: Path) -> bool:
    parts = [folder.resolve().name, *file.relative_to(folder).parts[:-1]]
    return "qrels" in parts or file.name.split(".")[0] in ("queries", "qrels")


def _warn_of_unread(source: str | Path) -> None:
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in CORPUS_FILES):
        unread = [file for file in _visible_files(path) if file.name.lower().endswith(UNREAD)]
        if unread:
            logger.warning("%s: %d files are not read, such as %s", path, len(unread), unread[0].name)


def _from_json(row: object, where: str, fields: CorpusFields, unseen: set[str]) -> Document:
    record = json_object(row, where)
    doc_id = json_id(record, ID_FIELDS if fields.id is None else (fields.id,), where)
    if fields.texts is None:
        return Document(doc_id, *text_and_title(record, where))
    if unseen:
        unseen.difference_update(record)
    if not any(field in record for field in fields.texts):
        raise UserError(f'{where}: no "{fields.texts[0]}" field (found: {", ".join(record)})')
    return Document(doc_id, " ".join(_text(record.get(field), field, where) for field in fields.texts).strip())


def text_and_title(record: Mapping[str, object], where: str) -> tuple[str, str]:
    """Return the text and the title of a JSON document; what is null is empty.

    Raises:
        ValueError: It has no text under a known name, or one that is no string; ``where`` opens the message.
    """
    for field in TEXT_FIELDS:
        if (value := record.get(field)) is not None:
            # Pyserini's "contents" already holds the title.
            title = None if field == "contents" else record.get("title")
            return _text(value, field, where), _text(title, "title", where)
    if not any(field in record for field in TEXT_FIELDS):
        raise UserError(f'{where}: no "text" or "contents" field (found: {", ".join(record)})')
    return "", _text(record.get("title"), "title", where)


def _from_table(row: bytes | list[str], where: str, header: list[str] | None) -> Document:
    record = table_record(columns_of(row, where), header, where)
    doc_id = next((record[name] for name in TABLE_ID_FIELDS if name in record), "")
    return Document(doc_id, *table_text_and_title(record))


def table_record(columns: list[str], header: list[str] | None, where: str) -> dict[str, str]:
    """Return the columns of a row by their names; without a header their number says what they are.

    Raises:
        ValueError: Another number of columns than expected.
    """
    names = header or COLUMNS.get(len(columns))
    if names is None or len(columns) != len(names) or (names is COLUMNS[4] and not columns[1].startswith("http")):
        expected = len(header) if header else "2 or 3"
        raise UserError(f"{where}: {len(columns)} columns, expected {expected}")
    return dict(zip(names, columns, strict=True))


def table_text_and_title(record: Mapping[str, str]) -> tuple[str, str]:
    """Return the text and the title of a row, whose header has a text or a query."""
    return next(record[name] for name in (*TEXT_FIELDS, *TOPIC_TEXT_FIELDS) if name in record), record.get("title", "")


def read_ir_datasets(source: str, kind: str) -> Iterator[tuple]:
    """Yield the "docs", "queries" or "qrels" of ``irds:NAME``, downloaded if they are not there.

    Raises:
        ValueError: ir_datasets knows no such data set, or none of this kind in it.
        OSError: It cannot be downloaded.
    """
    import ir_datasets

    try:
        dataset = ir_datasets.load(source.removeprefix(IR_DATASETS))
    except KeyError as error:
        raise UserError(f"{source}: ir_datasets knows no data set of this name") from error
    if not getattr(dataset, f"has_{kind}")():
        raise UserError(f"{source}: no {kind} in this data set; names like irds:beir/scifact/test have all kinds")
    try:
        yield from getattr(dataset, f"{kind}_iter")()
    except OSError as error:
        raise OSError(f"{source}: cannot be read or downloaded: {error}") from error


def _from_ir_datasets(doc: tuple) -> Document:
    if hasattr(doc, "text") and hasattr(doc, "title"):
        return Document(doc.doc_id, doc.text or "", doc.title or "")
    return Document(doc.doc_id, doc.default_text())


def json_id(record: dict, names: Sequence[str], where: str) -> str:
    """Return the first of the id fields as a string; whole numbers are taken as they are written."""
    for name in names:
        if name in record:
            value = record[name]
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise UserError(f'{where}: the id in "{name}" is not a string but {type(value).__name__}')
            return str(value)
    raise UserError(f"{where}: no id field ({', '.join(names)}; found: {', '.join(record) or 'nothing'})")


def check_id(identifier: str, where: str) -> None:
    """Raise ValueError unless an id can stand in a run, a qrels and a docid file: not empty, no white space."""
    if not identifier:
        raise UserError(f"{where}: empty id")
    if identifier.split() != [identifier]:
        raise UserError(f"{where}: the id {identifier[:50]!r} holds white space, which a TREC run cannot")


def check_unicode(text: str, where: str) -> None:
    """Raise ValueError if a text holds a lone surrogate (from a JSON escape), which no UTF-8 file can."""
    if text.isascii():  # which costs nothing to ask
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: lone surrogate {text[error.start]!a}, not valid Unicode") from error


def _text(value: object, field: str, where: str) -> str:
    if value is None:
        return ""
    if not isinstance(value, str):
        raise UserError(f'{where}: "{field}" is not a string but {type(value).__name__}')
    return value


def _check(document: Document, where: str) -> None:
    check_id(document.doc_id, where)
    for value in document:
        check_unicode(value, where)
