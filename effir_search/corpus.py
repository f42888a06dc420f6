"""Corpora as streams of documents: BEIR and Pyserini JSONL, TSV, gzip, folders of them, ir_datasets ids."""

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from effir_search.files import decode, read_lines

ID_FIELDS = ("_id", "id", "docid")
TEXT_FIELDS = ("contents", "text")
TSV_ID_FIELDS = (*ID_FIELDS, "pid", "doc_id", "query_id", "query-id", "qid")
SUFFIXES = (".jsonl", ".json", ".tsv")
IR_DATASETS = "irds:"


class Document(NamedTuple):
    """One document of a corpus. ``doc_id`` holds no white space; ``text`` and ``title`` may be empty."""

    doc_id: str
    text: str
    title: str = ""


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
    source: str | Path, *, fields: Sequence[str] | None = None, on_bad_line: BadLine | None = None
) -> Iterator[Document]:
    """Yield the documents of a corpus, in file order; formats are in docs/formats.md.

    Args:
        source: A ``.jsonl``, ``.json`` or ``.tsv`` file, gzipped or not; a folder of them, read in the order of their
            paths (a folder with a ``corpus.jsonl`` is a BEIR data set, of which only that file is read); or
            ``irds:NAME`` for an ir_datasets corpus, which downloads what is not there yet.
        fields: JSON fields whose texts, joined by one space, are the document's text. The default is ``contents``, or
            ``title`` and ``text``.
        on_bad_line: Called with the complaint about each bad line, which is then left out.

    Raises:
        ValueError: A bad line and no ``on_bad_line``; the message names file and line.
        OSError: A file cannot be read.
    """
    seen: set[str] = set()
    for where, parse in _rows(source, fields):
        try:
            document = parse()
            _check(document, where)
            if document.doc_id in seen:
                raise ValueError(f'{where}: repeated id "{document.doc_id}"')
        except ValueError as error:
            if on_bad_line is None:
                raise
            on_bad_line(str(error))
            continue
        seen.add(document.doc_id)
        yield document


def scan_corpus(source: str | Path, *, fields: Sequence[str] | None = None, skip_bad: bool = False) -> CorpusSummary:
    """Read a corpus once, to count, check and hash it before a long job begins.

    Raises:
        ValueError: A bad line and no ``skip_bad``, or no document at all.
        OSError: A file cannot be read.
    """
    bad_lines: list[str] = []
    hasher = CorpusHasher()
    num_empty = 0
    for document in read_corpus(source, fields=fields, on_bad_line=bad_lines.append if skip_bad else None):
        hasher.add(document)
        num_empty += not document_text(document)
    if hasher.num_documents == 0:
        raise ValueError(f"{source}: no documents" + (f", {len(bad_lines)} bad lines" if bad_lines else ""))
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


def find_documents(sources: Mapping[str | Path, Sequence[str] | None], doc_ids: Iterable[str]) -> dict[str, Document]:
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
        raise ValueError(f'{names}: no document "{missing[0]}" ({len(missing)} of {len(wanted)} hits are not there)')
    return found


def documents_there(
    source: str | Path, doc_ids: Collection[str], *, fields: Sequence[str] | None = None
) -> dict[str, Document]:
    """Return the documents of these ids, as far as the corpus has them, reading no further than the last.

    A bad line is passed over: one that was left out of an index must not stop what is made of its hits.

    Args:
        source: As ``read_corpus`` takes it.
        doc_ids: What is looked up.
        fields: As ``read_corpus`` takes them.

    Raises:
        OSError: A file cannot be read.
    """
    wanted = set(doc_ids)
    found: dict[str, Document] = {}
    if not wanted:
        return found
    for document in read_corpus(source, fields=fields, on_bad_line=lambda _complaint: None):
        if document.doc_id in wanted:
            found[document.doc_id] = document
            if len(found) == len(wanted):
                break
    return found


def _rows(source: str | Path, fields: Sequence[str] | None) -> Iterator[tuple[str, Callable[[], Document]]]:
    """Yield ``(where, parse)`` for each row, so that the caller decides what a bad row means."""
    if str(source).startswith(IR_DATASETS):
        if fields is not None:
            raise ValueError(f"{source}: --fields is for JSON files, ir_datasets has fields of its own")
        for number, doc in enumerate(read_ir_datasets(str(source), "docs"), start=1):
            yield f"{source}, document {number}", lambda doc=doc: _from_ir_datasets(doc)
        return
    for path in _corpus_files(Path(source)):
        is_tsv = path.name.removesuffix(".gz").endswith(".tsv")
        if is_tsv and fields is not None:
            raise ValueError(f"{path}: --fields is for JSON; the columns of a TSV file are named in its first row")
        header: list[str] | None = None
        first = True
        for line_number, line in read_lines(path):
            where = f"{path}:{line_number}"
            is_first, first = first, False
            if not is_tsv:
                yield where, lambda line=line, where=where: _from_json(decode(line, where), where, fields)
            elif is_first and is_tsv_header(names := line.decode("utf-8", "replace").lower().split("\t")):
                header = names
            else:
                yield where, lambda line=line, where=where, header=header: _from_tsv(decode(line, where), where, header)


def is_tsv_header(columns: Sequence[str], text_fields: Sequence[str] = TEXT_FIELDS) -> bool:
    """Whether the first row of a TSV file names its columns: an id comes first, and somewhere a text."""
    return columns[0] in TSV_ID_FIELDS and any(name in text_fields for name in columns)


def beir_file(folder: Path, name: str) -> Path:
    """Return a BEIR folder's ``corpus.jsonl``, ``queries.jsonl`` or ``qrels/SPLIT.tsv``; the first two may be .gz.

    Raises:
        FileNotFoundError: It has none.
    """
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder}: has no {name}, which a BEIR folder has")


def _corpus_files(path: Path) -> list[Path]:
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such corpus file or folder")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"{path}: is neither a file nor a folder; a corpus is read twice, so a pipe cannot be one")
    for name in ("corpus.jsonl", "corpus.jsonl.gz"):
        if (path / name).is_file():
            return [path / name]
    files = sorted(
        file for file in path.rglob("*") if file.is_file() and file.name.removesuffix(".gz").endswith(SUFFIXES)
    )
    if not files:
        raise ValueError(f"{path}: no {', '.join(SUFFIXES)} file in this folder, plain or .gz")
    return files


def _from_json(line: str, where: str, fields: Sequence[str] | None) -> Document:
    record = parse_json_object(line, where)
    doc_id = json_id(record, ID_FIELDS, where)
    if fields is not None:
        return Document(doc_id, " ".join(_text(record, field, where) for field in fields).strip())
    for field in TEXT_FIELDS:
        if field in record:
            # Pyserini's "contents" already holds the title.
            title = _text(record, "title", where) if field == "text" and "title" in record else ""
            return Document(doc_id, _text(record, field, where), title)
    raise ValueError(f'{where}: no "text" or "contents" field (found: {", ".join(record)})')


def _from_tsv(line: str, where: str, header: list[str] | None) -> Document:
    columns = line.split("\t")
    names = header or {2: ["id", "text"], 3: ["id", "title", "text"]}.get(len(columns))
    if names is None or len(columns) != len(names):
        raise ValueError(
            f"{where}: {len(columns)} tab-separated columns, expected {len(header) if header else '2 or 3'}"
        )
    record = dict(zip(names, columns, strict=True))
    doc_id = next((record[name] for name in TSV_ID_FIELDS if name in record), "")
    return Document(doc_id, record.get("contents", record.get("text", "")), record.get("title", ""))


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
        raise ValueError(f"{source}: ir_datasets knows no data set of this name") from error
    if not getattr(dataset, f"has_{kind}")():
        raise ValueError(f"{source}: no {kind} in this data set; names like irds:beir/scifact/test have all kinds")
    try:
        yield from getattr(dataset, f"{kind}_iter")()
    except OSError as error:
        raise OSError(f"{source}: cannot be read or downloaded: {error}") from error


def _from_ir_datasets(doc: tuple) -> Document:
    if hasattr(doc, "text") and hasattr(doc, "title"):
        return Document(doc.doc_id, doc.text or "", doc.title or "")
    return Document(doc.doc_id, doc.default_text())


def parse_json_object(line: str, where: str) -> dict:
    """Return the JSON object on a line; ``where`` opens the error if there is none."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not JSON, of which each line holds one object ({error})") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object but {type(record).__name__}; each line holds one object")
    return record


def json_id(record: dict, names: Sequence[str], where: str) -> str:
    """Return the first of the id fields as a string; whole numbers are taken as they are written."""
    for name in names:
        if name in record:
            value = record[name]
            if isinstance(value, bool) or not isinstance(value, str | int):
                raise ValueError(f'{where}: the id in "{name}" is not a string but {type(value).__name__}')
            return str(value)
    raise ValueError(f"{where}: no id field ({', '.join(names)}; found: {', '.join(record) or 'nothing'})")


def check_id(identifier: str, where: str) -> None:
    """Raise ValueError unless an id can stand in a run, a qrels and a docid file: not empty, no white space."""
    if not identifier:
        raise ValueError(f"{where}: empty id")
    if identifier.split() != [identifier]:
        raise ValueError(f"{where}: the id {identifier[:50]!r} holds white space, which a TREC run cannot")


def check_unicode(text: str, where: str) -> None:
    """Raise ValueError if a text holds a lone surrogate (from a JSON escape), which no UTF-8 file can."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: lone surrogate {text[error.start]!a}, not valid Unicode") from error


def _text(record: dict, field: str, where: str) -> str:
    if field == "title" and field in record and record[field] is None:
        return ""
    if field not in record:
        raise ValueError(f'{where}: no "{field}" field (found: {", ".join(record)})')
    if not isinstance(record[field], str):
        raise ValueError(f'{where}: "{field}" is not a string but {type(record[field]).__name__}')
    return record[field]


def _check(document: Document, where: str) -> None:
    check_id(document.doc_id, where)
    for value in document:
        check_unicode(value, where)
