"""Corpora as streams of documents: BEIR, Pyserini and MS MARCO files, tables, folders of them, ir_datasets ids."""

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

from effir_search.errors import UserError
from effir_search.files.reading import open_text
from effir_search.text.checks import check_id, check_unicode
from effir_search.text.folders import corpus_files, warn_of_unread
from effir_search.text.layouts import (
    ID_FIELDS,
    TABLE_ID_FIELDS,
    TEXT_FIELDS,
    columns_of,
    is_table,
    json_id,
    json_object,
    json_rows,
    table_record,
    table_rows,
    table_text_and_title,
)

IR_DATASETS = "irds:"


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
    warn_of_unread(source)
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


def documents_sha256(documents: Iterable[Document]) -> str:
    """Return the hash of some documents, as of a corpus that has only these."""
    hasher = CorpusHasher()
    for document in documents:
        hasher.add(document)
    return hasher.hexdigest()


def find_documents(sources: Mapping[str | Path, CorpusFields], doc_ids: Iterable[str]) -> dict[str, Document]:
    """Return the documents of these ids, reading no further than the last of them.

    Args:
        sources: Each as ``read_corpus`` takes it, with the fields to read. Where two have an id, the first one counts.
        doc_ids: What is looked up.

    Raises:
        ValueError: An id that no source holds.
    """
    wanted_ids = set(doc_ids)
    found: dict[str, Document] = {}
    for source, fields in sources.items():
        found |= existing_documents(source, wanted_ids - found.keys(), fields=fields)
    if missing := sorted(wanted_ids - found.keys()):
        names = ", ".join(map(str, sources))
        raise UserError(f'{names}: no document "{missing[0]}" ({len(missing)} of {len(wanted_ids)} hits are not there)')
    return found


def existing_documents(
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
    wanted_ids = set(doc_ids)
    found: dict[str, Document] = {}
    if not wanted_ids:
        return found
    read = read_corpus(source, fields=fields.texts, id_field=fields.id, on_bad_line=lambda _complaint: None)
    for document in read:
        if document.doc_id in wanted_ids:
            found[document.doc_id] = document
            if len(found) == len(wanted_ids):
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
