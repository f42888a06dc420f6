"""Training records: queries with their positives and negatives, read from every usual format."""

import itertools
import logging
import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from effir_search.errors import UserError
from effir_search.files.reading import open_text
from effir_search.text.checks import check_unicode
from effir_search.text.corpus import Document, document_text, existing_documents
from effir_search.text.folders import beir_file
from effir_search.text.layouts import json_object, json_rows
from effir_search.text.trec import FLOAT32_MAX, read_qrels, read_topics

logger = logging.getLogger(__name__)

# What a field of a record is, and the names it has in the formats that docs/formats.md lists.
FIELDS = {
    "query": ("query", "query_text", "anchor"),
    "positives": ("positives", "positive", "positive_passages", "pos"),
    "negatives": ("negatives", "negative", "negative_passages", "neg"),
    "scores": ("scores", "score", "label"),
    "positive_scores": ("positive_scores", "pos_scores"),
    "negative_scores": ("negative_scores", "neg_scores"),
    "query_id": ("query_id",),
    "positive_ids": ("positive_ids", "positive_document_ids"),
    "negative_ids": ("negative_ids", "negative_document_ids"),
}
# Fields of the same formats that no training reads.
UNREAD = (
    "_id",
    "answer",
    "answers",
    "dataset",
    "id",
    "known",
    "lang",
    "language",
    "metadata",
    "neg_id",
    "pos_id",
    "prompt",
    "source",
    "split",
    "task",
    "type",
)
NUMBERED_NEGATIVE = re.compile(r"negative_([0-9]+)")
_ROLES = {name: role for role, names in FIELDS.items() for name in names}


class Record(NamedTuple):
    """A query, the documents that answer it and some that do not; no text is empty.

    Attributes:
        query: Without a prompt.
        positives: At least one.
        negatives: Maybe none.
        scores: A teacher's, of the positives and then of the negatives.
    """

    query: str
    positives: list[str]
    negatives: list[str]
    scores: list[float] | None


def read_records(
    source: str | Path,
    *,
    corpus: str | Path | None = None,
    topics: str | Path | None = None,
    split: str = "train",
    warn: bool = True,
) -> Iterator[tuple[str, Record]]:
    """Yield ``(where, record)`` for each record of training data, in file order; formats are in docs/formats.md.

    Of a file whose records name texts by id, only the texts that they name are kept in memory; it is read twice.

    Args:
        source: A JSONL file, gzipped or not, or a BEIR folder, whose judged queries become records without negatives.
        corpus: Where the documents are that a file names by id.
        topics: Where the queries are that a file names by id.
        split: Of a BEIR folder: the ``qrels`` file. What it names and the folder lacks is left out.
        warn: Whether to tell of what is left out.

    Raises:
        ValueError: A bad record, named with its line; no record at all.
        OSError: A file cannot be read.
    """
    path = Path(source)
    if not path.is_dir():
        records = _file_records(path, corpus, topics)
    elif corpus is None and topics is None:
        records = _beir_records(path, split, warn=warn)
    else:
        raise UserError(f"{path}: is a folder with texts of its own; --corpus and --topics go with a file")
    first = next(records, None)
    if first is None:
        raise UserError(f"{path}: no training record in it")
    yield from itertools.chain([first], records)


def find_texts(corpus: str | Path, doc_ids: Collection[str]) -> dict[str, str]:
    """Return the texts of these documents, as far as the corpus has them, reading no further than the last.

    Raises:
        OSError: A file cannot be read.
    """
    return {doc_id: document_text(document) for doc_id, document in existing_documents(corpus, doc_ids).items()}


def find_queries(topics: str | Path, query_ids: Collection[str]) -> dict[str, str]:
    """Return the texts of these topics, as far as they are there.

    Raises:
        ValueError: A bad topic.
        OSError: The file cannot be read.
    """
    if not query_ids:
        return {}
    ids = set(query_ids)
    return {query.query_id: query.text for query in read_topics(topics) if query.query_id in ids}


def warn_of_missing(qrels: str | Path, source: str | Path, kind: str, ids: Collection[str], by_id: Mapping) -> None:
    """Warn of what qrels name and its source lacks, which is left out.

    Args:
        qrels: Their file.
        source: The corpus or the topics.
        kind: "document" or "topic".
        ids: Those that the qrels name.
        by_id: What the source has of them.

    Raises:
        ValueError: It has none of them.
    """
    missing, number = sorted(set(ids) - by_id.keys()), len(set(ids))
    if not missing:
        return
    if len(missing) == number:
        raise UserError(f'{source}: has no {kind} of {qrels}, such as "{missing[0]}": do they belong together?')
    logger.warning(
        "%s: %d of %d %ss that %s names are not in it and are left out: %s",
        *(source, len(missing), number, kind, qrels, ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)),
    )


class _Texts(NamedTuple):
    """Texts by id; ``source`` is None where the caller did not say where they are."""

    kind: str
    option: str
    source: str | Path | None
    by_id: Mapping[str, str]

    def get(self, identifier: str, where: str) -> str:
        if self.source is None:
            raise UserError(f"{where}: names a {self.kind} by id; say with {self.option} where its text is")
        if identifier not in self.by_id:
            raise UserError(f'{where}: no {self.kind} "{identifier}" in {self.source}')
        return self.by_id[identifier]


def _file_records(path: Path, corpus: str | Path | None, topics: str | Path | None) -> Iterator[tuple[str, Record]]:
    query_ids: set[str] = set()
    doc_ids: set[str] = set()
    if corpus is not None or topics is not None:
        for where, fields in _file_fields(path):
            query_ids.update([] if "query" in fields else _ids(fields, "query_id", where))
            for kind in ("positive", "negative"):
                doc_ids.update([] if f"{kind}s" in fields else _ids(fields, f"{kind}_ids", where))
    queries = _Texts("query", "--topics", topics, find_queries(topics, query_ids) if topics is not None else {})
    documents = _Texts("document", "--corpus", corpus, find_texts(corpus, doc_ids) if corpus is not None else {})
    for where, fields in _file_fields(path):
        yield where, _record(fields, where, queries, documents)


def _beir_records(folder: Path, split: str, *, warn: bool) -> Iterator[tuple[str, Record]]:
    qrels = folder / "qrels" / f"{split}.tsv"
    if not qrels.is_file():
        splits = ", ".join(sorted(file.stem for file in qrels.parent.glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"{folder}: no qrels/{split}.tsv, which a BEIR folder has (splits found: {splits})")
    positives: dict[str, list[str]] = {}
    for qrel in read_qrels(qrels):
        if qrel.relevance > 0:
            positives.setdefault(qrel.query_id, []).append(qrel.doc_id)
    topics = beir_file(folder, "queries.jsonl")
    by_id = find_queries(topics, positives)
    if empty := {query_id for query_id, text in by_id.items() if not text.strip()}:
        logger.warning("%s: %d of %d judged topics are empty and left out", topics, len(empty), len(by_id))
        positives = {query_id: doc_ids for query_id, doc_ids in positives.items() if query_id not in empty}
    queries = _Texts("query", "--topics", topics, by_id)
    relevant = set(itertools.chain.from_iterable(positives.values()))
    documents = _Texts("document", "--corpus", folder, find_texts(folder, relevant))
    if warn:
        warn_of_missing(qrels, topics, "topic", positives, queries.by_id)
        warn_of_missing(qrels, folder, "document", relevant, documents.by_id)
    for query_id, doc_ids in positives.items():
        where = f'{qrels}, query "{query_id}"'
        positive_ids = [doc_id for doc_id in doc_ids if doc_id in documents.by_id]
        if positive_ids and query_id in queries.by_id:
            yield where, _record({"query_id": query_id, "positive_ids": positive_ids}, where, queries, documents)


def _file_fields(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    with open_text(path) as file:
        for where, row in json_rows(file, path):
            yield where, _fields(json_object(row, where), where)


def _fields(record: dict[str, object], where: str) -> dict[str, object]:
    """Return the values of a record by role, ``FIELDS``' keys; numbered negatives are joined, nulls left out."""
    fields: dict[str, object] = {}
    names: dict[str, str] = {}
    numbered: list[tuple[int, object]] = []
    unknown = [
        name
        for name, value in record.items()
        if value is not None and name not in (*_ROLES, *UNREAD) and not NUMBERED_NEGATIVE.fullmatch(name)
    ]
    if unknown:
        named = ", ".join(unknown[:3]) + (f" and {len(unknown) - 3} more" if len(unknown) > 3 else "")
        known = ", ".join(FIELDS)
        raise UserError(f"{where}: unknown fields: {named}; docs/formats.md lists what is known: {known}, ...")
    for name, value in record.items():
        if value is None or name in UNREAD:
            continue
        if number := NUMBERED_NEGATIVE.fullmatch(name):
            numbered.append((int(number[1]), value))
            continue
        role = _ROLES[name]
        if role in fields:
            raise UserError(f'{where}: "{names[role]}" and "{name}" are two names of one field; leave one out')
        fields[role], names[role] = value, name
    if numbered:
        numbered.sort(key=lambda pair: pair[0])
        fields["negatives"] = [*_listed(fields.get("negatives", [])), *(value for _, value in numbered)]
    for role, by_id in (("query", "query_id"), ("positives", "positive_ids")):
        if role not in fields and by_id not in fields:
            needed = ", ".join((*FIELDS[role], *FIELDS[by_id]))
            raise UserError(f"{where}: no {role}, one of {needed} (found: {', '.join(record) or 'nothing'})")
    return fields


def _record(fields: Mapping[str, object], where: str, queries: _Texts, documents: _Texts) -> Record:
    query = fields["query"] if "query" in fields else queries.get(*_ids(fields, "query_id", where), where)
    if not isinstance(query, str):
        raise UserError(f"{where}: the query is not a string but {type(query).__name__}")
    if not query.strip():
        raise UserError(f"{where}: the query is empty")
    check_unicode(query, where)
    positives = _candidates(fields, "positive", where, documents)
    if not positives:
        raise UserError(f"{where}: no positives, the list is empty; leave the record out")
    negatives = _candidates(fields, "negative", where, documents)
    return Record(query, positives, negatives, _scores(fields, where, len(positives), len(negatives)))


def _candidates(fields: Mapping[str, object], kind: str, where: str, documents: _Texts) -> list[str]:
    """Return the texts of the positives or negatives; ids are looked up only where there are no texts."""
    if f"{kind}s" in fields:
        texts = [_text(value, f"{where}: {kind} {i}") for i, value in enumerate(_listed(fields[f"{kind}s"]), start=1)]
    else:
        texts = [documents.get(doc_id, where) for doc_id in _ids(fields, f"{kind}_ids", where)]
    for number, text in enumerate(texts, start=1):
        if not text:
            raise UserError(f"{where}: {kind} {number} is empty; leave it out")
        check_unicode(text, where)
    return texts


def _text(value: object, where: str) -> str:
    """Return the text of a passage, which is a string or an object with ``text`` and maybe ``title``."""
    if isinstance(value, str):
        return document_text(Document("", value))
    if not isinstance(value, dict):
        raise UserError(f"{where} is not a text but {type(value).__name__}")
    text, title = value.get("text", ""), value.get("title") or ""
    text = "" if text is None else text
    if "text" not in value or not isinstance(text, str) or not isinstance(title, str):
        raise UserError(
            f'{where} has no "text" that is a string, with or without a "title" (found: {", ".join(value)})'
        )
    return document_text(Document("", text, title))


def _ids(fields: Mapping[str, object], role: str, where: str) -> list[str]:
    ids = [fields[role]] if role == "query_id" else _listed(fields.get(role, []))
    if bad := [value for value in ids if isinstance(value, bool) or not isinstance(value, str | int)]:
        raise UserError(f"{where}: {role} holds no id but {type(bad[0]).__name__}")
    return [str(value) for value in ids]


def _scores(fields: Mapping[str, object], where: str, num_positives: int, num_negatives: int) -> list[float] | None:
    halves = {"positive_scores": num_positives, "negative_scores": num_negatives}
    roles = [role for role in ("scores", *halves) if role in fields]
    if not roles:
        return None
    if "scores" in roles and len(roles) > 1:
        raise UserError(f"{where}: {' and '.join(roles)} say the same thing; leave one out")
    scores: list[float] = []
    for role, number in {"scores": num_positives + num_negatives}.items() if "scores" in roles else halves.items():
        values = fields.get(role, [])
        if not isinstance(values, list):
            raise UserError(f"{where}: {role} is not a list of numbers but {type(values).__name__}")
        if len(values) != number:
            counts = f"{num_positives} positives and {num_negatives} negatives"
            raise UserError(f"{where}: {len(values)} {role}, {number} are needed for {counts}")
        for value in values:
            # Losses take them as float32; a NaN compares as false.
            if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= FLOAT32_MAX:
                raise UserError(f"{where}: {role} holds {str(value)[:30]!r}, which is not a finite number")
        scores += map(float, values)
    return scores


def _listed(value: object) -> list:
    return value if isinstance(value, list) else [value]
