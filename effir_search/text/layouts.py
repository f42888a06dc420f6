"""Rows of a file of texts, whatever its layout: JSON lines, a JSON array, TSV, CSV; and the names their fields have."""

import csv
import io
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO

from effir_search.errors import UserError
from effir_search.files.reading import decode, lines_of, parse_json_object

# In the order in which they are looked for: a passage has its own id before that of the document it is from.
ID_FIELDS = ("_id", "id", "pid", "passage_id", "docid", "doc_id", "docno")

QUERY_ID_FIELDS = ("_id", "id", "qid", "query_id", "query-id", "topic_id", *ID_FIELDS[2:])

TEXT_FIELDS = ("contents", "text", "passage", "segment", "body")

TOPIC_TEXT_FIELDS = ("text", "query", "query_text", "question")

TABLE_ID_FIELDS = (*ID_FIELDS, *QUERY_ID_FIELDS[2:6])

# Columns of a table without a header, by their number; four are MS MARCO's documents.
COLUMNS = {2: ("id", "text"), 3: ("id", "title", "text"), 4: ("id", "url", "title", "text")}

# What a column of a table may be called besides its field's name, without what is no letter.
SPELLINGS = {
    **{re.sub("[^a-z]", "", name): name for name in (*TABLE_ID_FIELDS, *TEXT_FIELDS, *TOPIC_TEXT_FIELDS)},
    **dict.fromkeys(("id", "corpusid", "documentid", "doc"), "id"),
    **dict.fromkeys(("topic", "topicno", "number", "num"), "topic_id"),
    "content": "contents",
}
# Names that no row of texts has in all its columns: such a row is a header.
COLUMN_NAMES = {*TABLE_ID_FIELDS, *TEXT_FIELDS, *TOPIC_TEXT_FIELDS, "title", "description", "narrative", "url"}

# Names in a header of qrels, without what is no letter.
QREL_NAMES = {
    "query_id": {"qid", "queryid", "query", "topic", "topicid", "topicno", "topicnum"},
    "doc_id": {"docid", "docno", "doc", "did", "document", "documentid", "corpusid", "pid", "passageid"},
    "relevance": {"rel", "relevance", "relevancy", "score", "grade", "label", "judgment", "judgement", "rating"},
}


def is_table(path: Path) -> bool:
    """Whether a file is TSV or CSV by its name."""
    return plain_name(path).endswith((".tsv", ".csv"))


def table_rows(
    file: IO[bytes], path: Path, text_fields: Sequence[str], *, need_id: bool = True
) -> Iterator[tuple[str, bytes | list[str], list[str] | None]]:
    """Yield ``(where, row, header)`` of a table that ``open_text`` opened; ``columns_of`` takes the row apart.

    The header is the first row's names in lower case, or None if that row is data; in CSV it must be there.

    Raises:
        ValueError: Quotes of a CSV file that do not match, or no header in it; qrels; damage.
    """
    is_csv = plain_name(path).endswith(".csv")
    rows = _csv_rows(file, path) if is_csv else ((f"{path}:{n}", line) for n, line in lines_of(file, path))
    header: list[str] | None = None
    for number, (where, row) in enumerate(rows):
        if number == 0:
            columns = row if is_csv else row.decode("utf-8", "replace").split("\t")
            names = [_column_name(name) for name in columns]
            if any(name in text_fields for name in names) and (
                any(name in TABLE_ID_FIELDS for name in names) or not (need_id or set(names) - {*text_fields, "title"})
            ):
                header = names
                continue
            if is_qrels_header(columns):
                raise UserError(f"{where}: these are qrels, which hold no texts")
            if len(names) > 1 and COLUMN_NAMES.issuperset(names) and not {"title"}.issuperset(names):
                raise UserError(f"{where}: a header that names no text, one of {', '.join(text_fields)}")
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


def _column_name(name: str) -> str:
    """Return the field that a column of a header is, or its name in lower case."""
    name = name.strip().strip('"').lower()
    return name if name in COLUMN_NAMES else SPELLINGS.get(_letters(name), name)


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
            except ValueError as error:  # a number of thousands of digits
                raise UserError(f"{self._path}:{self.line}: not JSON: {error}") from error

    def _go_to(self, end: int) -> None:
        self.line += self._piece.count("\n", self._at, end)
        self._at = end

    def _read_more(self) -> bool:
        """Read as much again as is left, so that a long value is not begun anew too often; False at the end."""
        rest = self._piece[self._at :]
        more = self._text.read(max(self.PIECE, len(rest)))
        self._piece, self._at = rest + more, 0
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


def plain_name(path: Path) -> str:
    """Return a file's name in lower case, without .gz."""
    return path.name.lower().removesuffix(".gz")


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


def json_id(record: dict, names: Sequence[str], where: str) -> str:
    """Return the first of the id fields as a string; whole numbers are taken as they are written."""
    present = [name for name in names if name in record]
    if present:
        name = next((name for name in present if record[name] is not None), present[0])
        value = record[name]
        if isinstance(value, bool) or not isinstance(value, str | int):
            raise UserError(f'{where}: the id in "{name}" is not a string but {type(value).__name__}')
        return str(value)
    raise UserError(f"{where}: no id field ({', '.join(names)}; found: {', '.join(record) or 'nothing'})")
