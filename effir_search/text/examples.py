"""Training data: queries with their positives and negatives, from every usual format, as a file read by line."""

import hashlib
import itertools
import json
import logging
import math
import os
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from effir_search.errors import UserError
from effir_search.files.lines import Lines
from effir_search.files.reading import open_text
from effir_search.files.whole import whole_file
from effir_search.text.corpus import (
    Document,
    beir_file,
    check_unicode,
    document_text,
    documents_there,
    json_object,
    json_rows,
)
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

Pair = tuple[str, str]
Scorer = Callable[[Sequence[Pair]], list[float]]


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


class Example(NamedTuple):
    """One line of a file that ``prepare_examples`` wrote.

    Attributes:
        query: Without a prompt.
        positive: The document that answers it.
        negatives: Maybe none.
        scores: A teacher's, of the positive and then of the negatives.
        known: ``document_key`` of all positives of this query text, this one among them.
    """

    query: str
    positive: str
    negatives: list[str]
    scores: list[float] | None
    known: list[int]


def document_key(text: str) -> int:
    """Return a signed 64-bit number that stands for a text: the first 8 bytes of its SHA-256."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8")).digest()[:8], "big", signed=True)


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


def prepare_examples(
    source: str | Path,
    output: Path,
    *,
    corpus: str | Path | None = None,
    topics: str | Path | None = None,
    split: str = "train",
    max_negatives: int = 8,
) -> int:
    """Write training data as one line for each query and positive, for ``Examples``; return the number of lines.

    Args:
        source: As ``read_records`` takes it, like the next three; it is read twice.
        output: New file; it appears whole or not at all.
        corpus: See ``read_records``.
        topics: See ``read_records``.
        split: See ``read_records``.
        max_negatives: So many of a record's negatives are kept, the first ones.

    Raises:
        ValueError: A bad record, named with its line; no record at all.
        OSError: A file cannot be read or written.
    """
    if max_negatives < 0:
        raise UserError(f"max_negatives {max_negatives} must be at least 0")
    known: dict[int, dict[int, None]] = {}
    for _, record in read_records(source, corpus=corpus, topics=topics, split=split):
        keys = known.setdefault(document_key(record.query), {})
        keys.update(dict.fromkeys(map(document_key, record.positives)))
    num_lines = 0
    with whole_file(output) as file:
        for _, record in read_records(source, corpus=corpus, topics=topics, split=split, warn=False):
            keys = list(known[document_key(record.query)])
            negatives = record.negatives[:max_negatives]
            for number, positive in enumerate(record.positives):
                scores = None
                if record.scores is not None:
                    first = len(record.positives)
                    scores = [record.scores[number], *record.scores[first : first + len(negatives)]]
                file.write(_line(Example(record.query, positive, negatives, scores, keys)))
                num_lines += 1
    return num_lines


class Examples:
    """The examples of a file that ``prepare_examples`` wrote, read when they are asked for."""

    def __init__(self, path: str | Path) -> None:
        """Find the lines.

        Raises:
            OSError: The file cannot be read.
            ValueError: It is empty.
        """
        self.lines = Lines(Path(path))
        if len(self.lines) == 0:
            raise UserError(f"{path}: no examples in it")

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> Example:
        """Return one example, counted from 0.

        Raises:
            IndexError: There are not so many, or the number is negative.
            ValueError: The line is not one that ``prepare_examples`` writes.
        """
        record = self.lines[number]
        if missing := [name for name in ("query", "positive", "negatives", "known") if name not in record]:
            where = f"{self.lines.path}:{number + 1}"
            raise UserError(f"{where}: no {missing[0]!r} field, so these are no prepared examples; prepare them first")
        return Example(record["query"], record["positive"], record["negatives"], record.get("scores"), record["known"])


def with_scores(examples_file: Path, output: Path, score: Scorer, *, batch_size: int = 256) -> int:
    """Write prepared examples again, with a teacher's scores of the positive and each negative; return their number.

    What a call that was stopped has scored is in ``OUTPUT.part``, and the next one goes on after it.

    Args:
        examples_file: From ``prepare_examples``; scores that are there already are replaced.
        output: New file; it appears whole or not at all.
        score: Gives one score for each ``(query, document)``.
        batch_size: Examples whose pairs are scored together.

    Raises:
        ValueError: Not prepared examples, or scores of another number or not finite.
        OSError: A file cannot be read or written.
    """
    examples, part = Examples(examples_file), output.with_name(f"{output.name}.part")
    done = _whole_lines(part, batch_size)  # so that batches, and the bits of scores, are those of an undisturbed call
    with (
        open(part, "a", encoding="utf-8") as file,
        tqdm(total=len(examples), initial=done, unit="example", disable=None) as progress,
    ):
        for start in range(done, len(examples), batch_size):
            batch = [examples[number] for number in range(start, min(start + batch_size, len(examples)))]
            pairs = [(example.query, text) for example in batch for text in (example.positive, *example.negatives)]
            scores = iter(checked_scores(score(pairs), len(pairs)))
            for example in batch:
                own = list(itertools.islice(scores, 1 + len(example.negatives)))
                file.write(_line(example._replace(scores=own)))
            file.flush()
            progress.update(len(batch))
        os.fsync(file.fileno())
    os.replace(part, output)
    return len(examples)


def _whole_lines(path: Path, multiple: int) -> int:
    """Return the number of lines of a file that a stopped job wrote, once those beyond a multiple are taken away."""
    if not path.is_file():
        return 0
    with open(path, "rb+") as file:
        number = end = at = 0
        for count, line in enumerate(file, start=1):
            at += len(line)
            if count % multiple == 0 and line.endswith(b"\n"):
                number, end = count, at
        file.truncate(end)
    return number


def checked_scores(scores: Sequence[float], number: int) -> Sequence[float]:
    """Return a teacher's scores.

    Raises:
        ValueError: There are not so many, or one is not finite.
    """
    if len(scores) != number:
        raise UserError(f"the teacher gave {len(scores)} scores for {number} pairs")
    if bad := [score for score in scores if not math.isfinite(score)]:
        raise UserError(f"the teacher gave the score {bad[0]}, which is not finite ({len(bad)} of {number})")
    return scores


def find_texts(corpus: str | Path, doc_ids: Collection[str]) -> dict[str, str]:
    """Return the texts of these documents, as far as the corpus has them, reading no further than the last.

    Raises:
        OSError: A file cannot be read.
    """
    return {doc_id: document_text(document) for doc_id, document in documents_there(corpus, doc_ids).items()}


def find_queries(topics: str | Path, query_ids: Collection[str]) -> dict[str, str]:
    """Return the texts of these topics, as far as they are there.

    Raises:
        ValueError: A bad topic.
        OSError: The file cannot be read.
    """
    wanted = set(query_ids)
    return {query.query_id: query.text for query in read_topics(topics) if query.query_id in wanted} if wanted else {}


def warn_of_missing(qrels: str | Path, source: str | Path, kind: str, wanted: Collection[str], found: Mapping) -> None:
    """Warn of what qrels name and its source lacks, which is left out.

    Args:
        qrels: Their file.
        source: The corpus or the topics.
        kind: "document" or "topic".
        wanted: The ids that the qrels name.
        found: By id, what the source has of them.

    Raises:
        ValueError: It has none of them.
    """
    missing = sorted(set(wanted) - found.keys())
    if not missing:
        return
    if len(missing) == len(set(wanted)):
        raise UserError(f'{source}: has no {kind} of {qrels}, such as "{missing[0]}": do they belong together?')
    logger.warning(
        "%s: %d of %d %ss that %s names are not in it and are left out: %s",
        *(source, len(missing), len(set(wanted)), kind, qrels, ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)),
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
        found = ", ".join(sorted(file.stem for file in qrels.parent.glob("*.tsv"))) or "none"
        raise FileNotFoundError(f"{folder}: no qrels/{split}.tsv, which a BEIR folder has (splits found: {found})")
    positives: dict[str, list[str]] = {}
    for qrel in read_qrels(qrels):
        if qrel.relevance > 0:
            positives.setdefault(qrel.query_id, []).append(qrel.doc_id)
    topics = beir_file(folder, "queries.jsonl")
    by_id = find_queries(topics, positives)
    if empty := {query_id for query_id, text in by_id.items() if not text.strip()}:
        logger.warning("%s: %d of %d judged topics are empty and left out", topics, len(empty), len(by_id))
        positives = {query_id: of_query for query_id, of_query in positives.items() if query_id not in empty}
    queries = _Texts("query", "--topics", topics, by_id)
    doc_ids = set(itertools.chain.from_iterable(positives.values()))
    documents = _Texts("document", "--corpus", folder, find_texts(folder, doc_ids))
    if warn:
        warn_of_missing(qrels, topics, "topic", positives, queries.by_id)
        warn_of_missing(qrels, folder, "document", doc_ids, documents.by_id)
    for query_id, of_query in positives.items():
        where = f'{qrels}, query "{query_id}"'
        there = [doc_id for doc_id in of_query if doc_id in documents.by_id]
        if there and query_id in queries.by_id:
            yield where, _record({"query_id": query_id, "positive_ids": there}, where, queries, documents)


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
    given = [role for role in ("scores", *halves) if role in fields]
    if not given:
        return None
    if "scores" in given and len(given) > 1:
        raise UserError(f"{where}: {' and '.join(given)} say the same thing; leave one out")
    scores: list[float] = []
    for role, number in {"scores": num_positives + num_negatives}.items() if "scores" in given else halves.items():
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


def _line(example: Example) -> str:
    fields = example._asdict()
    if example.scores is None:
        del fields["scores"]
    return json.dumps(fields, ensure_ascii=False) + "\n"
