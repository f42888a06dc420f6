"""Topics, qrels and runs: every TREC and BEIR text format, and the one rule for tied scores."""

import csv
import html
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.errors import UserError
from effir_search.files.reading import decode, lines_of, open_text, read_lines
from effir_search.files.whole import whole_file
from effir_search.text.checks import check_id, check_unicode
from effir_search.text.corpus import IR_DATASETS, read_ir_datasets
from effir_search.text.layouts import (
    QUERY_ID_FIELDS,
    TABLE_ID_FIELDS,
    TOPIC_TEXT_FIELDS,
    columns_of,
    is_qrels_header,
    json_id,
    json_object,
    json_rows,
    qrels_places,
    table_rows,
)

FLOAT32_MAX = float(np.finfo(np.float32).max)
TOPIC_FIELDS = ("title", "description", "narrative")
# The names that the parts of a TREC topic have, by what they are; the first that a topic has counts.
TOPIC_TAGS = {
    "id": ("num", "number", "identifier", "qid", "id"),
    "title": ("title", "query"),
    "description": ("desc", "description", "question"),
    "narrative": ("narr", "narrative"),
}
_LABELS = {"num": "Number:", "title": "Topic:", "desc": "Description:", "narr": "Narrative:"}
_WRAPPERS = ("top", "topic", "query")
# HTML in a text; any other tag ends a part of a topic.
_INLINE = ("a", "b", "br", "em", "i", "p", "span", "strong", "sub", "sup", "u")
_ATTRIBUTE = r"""\s+([\w:-]+)\s*=\s*("[^"]*"|'[^']*'|[^\s<>"']+)"""
_MARKUP = re.compile(
    rf"""<!--.*?-->|<!\[CDATA\[(?P<raw>.*?)\]\]>|<\?.*?\?>|<!DOCTYPE(?P<inside>[^>]*)>
    |<(?P<close>/?)(?P<name>[a-z][\w:-]*)(?P<attributes>(?:{_ATTRIBUTE})*)\s*/?>""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
_ENTITY = re.compile(r"&(?:#[0-9]+|#x[0-9a-f]+|[a-z][a-z0-9]*);", re.IGNORECASE)


class Query(NamedTuple):
    """One topic as it is searched: ``query_id`` holds no white space; an empty ``text`` finds nothing."""

    query_id: str
    text: str


def read_topics(source: str | Path, *, field: str = "title") -> list[Query]:
    """Return the topics of a file, in file order. The format is told by the content, not by the name.

    Args:
        source: JSON (``_id``, ``text``), TSV or CSV (id, text), TREC ``<top>`` or XML topics, may be gzipped; or
            ``irds:NAME``.
        field: Which part of a topic that has several is the query: ``title``, ``description`` or ``narrative``.

    Raises:
        ValueError: A bad or repeated topic, named with its line; no topic at all.
        OSError: The file cannot be read.
    """
    topics: list[Query] = []
    seen: set[str] = set()
    for where, query in topic_rows(source, field):
        check_id(query.query_id, where)
        check_unicode(query.query_id, where)
        check_unicode(query.text, where)
        if query.query_id in seen:
            raise UserError(f'{where}: repeated topic id "{query.query_id}"')
        seen.add(query.query_id)
        topics.append(query)
    if not topics:
        raise UserError(f"{source}: no topics")
    return topics


def read_qrels(source: str | Path) -> list[Qrel]:
    """Return the judgments of a BEIR TSV (with or without its header), a TREC qrels file or ``irds:NAME``.

    Raises:
        ValueError: A bad line, or two different grades for one pair, named with the line; no judgment at all.
        OSError: The file cannot be read.
    """
    if str(source).startswith(IR_DATASETS):
        return [Qrel(q.query_id, q.doc_id, q.relevance) for q in read_ir_datasets(str(source), "qrels")]
    grades: dict[tuple[str, str], int] = {}
    places: list[int] = []
    width = 0
    for where, columns in _column_rows(Path(source), "qrels, which have 3 (BEIR) or 4 (TREC) columns", (3, 4)):
        if not width:
            if len(columns) not in (3, 4):
                raise UserError(f"{where}: {len(columns)} columns; qrels have 3 (BEIR) or 4 (TREC)")
            width = len(columns)
            places = [0, width - 2, width - 1]
            if is_qrels_header(columns):
                places = qrels_places(columns)
                if len(set(places)) < len(places):
                    raise UserError(f"{where}: it is not clear what the columns {' '.join(columns)} are")
                continue
        if len(columns) != width:
            raise UserError(f"{where}: {len(columns)} columns; the lines above have {width}")
        query_id, doc_id, grade = (columns[place] for place in places)
        check_id(query_id, where)
        check_id(doc_id, where)
        if not re.fullmatch(r"[+-]?[0-9]{1,9}(\.0*)?", grade):
            raise UserError(f"{where}: the grade {grade[:30]!r} is not a whole number")
        relevance = int(grade.split(".")[0])
        if grades.setdefault((query_id, doc_id), relevance) != relevance:
            raise UserError(f'{where}: a second, different grade for query "{query_id}", document "{doc_id}"')
    if not grades:
        raise UserError(f"{source}: no judgments")
    return [Qrel(query_id, doc_id, relevance) for (query_id, doc_id), relevance in grades.items()]


def _column_rows(path: Path, what: str, widths: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    """Yield ``(where, columns)`` of lines: divided by tabs where there is one, else by white space or by commas.

    Commas count only where the first line has as many columns by them and is one word without them.
    """
    by_commas = False
    for number, (line_number, line) in enumerate(read_lines(path)):
        where, text = f"{path}:{line_number}", decode(line, f"{path}:{line_number}")
        if number == 0:
            if text.lstrip()[0] in "[{":
                raise UserError(f"{where}: it looks like JSON, not {what}")
            by_commas = "\t" not in text and len(text.split()) == 1 and len(_split_commas(text, where)) in widths
        if by_commas or "\t" in text:
            columns = _split_commas(text, where) if by_commas else text.split("\t")
            yield where, [column.strip() for column in columns]
        else:
            yield where, text.split()


def _split_commas(text: str, where: str) -> list[str]:
    try:
        return next(csv.reader([text], strict=True))
    except csv.Error as error:
        raise UserError(f"{where}: not CSV: {error}") from error


def read_run(path: Path) -> list[ScoredDoc]:
    """Return the hits of a TREC run (``query_id Q0 doc_id rank score tag``), in file order.

    Raises:
        ValueError: A line without six columns, a score that is not a finite number, a document that a query has twice;
            named with the line. No hit at all.
        OSError: The file cannot be read.
    """
    hits: list[ScoredDoc] = []
    seen: set[tuple[str, str]] = set()
    for where, columns in _column_rows(path, "a TREC run, which has 6 columns", (6,)):
        if len(columns) != 6:
            raise UserError(f"{where}: {len(columns)} columns; a TREC run has 6 (query_id Q0 doc_id rank score tag)")
        query_id, _q0, doc_id, _rank, text, _tag = columns
        check_id(query_id, where)
        check_id(doc_id, where)
        try:
            score = math.nan if "_" in text else float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise UserError(f"{where}: the score {text[:30]!r} is not a finite number")
        if (query_id, doc_id) in seen:
            raise UserError(f'{where}: document "{doc_id}" is there twice for query "{query_id}"')
        seen.add((query_id, doc_id))
        hits.append(ScoredDoc(query_id, doc_id, score))
    if not hits:
        raise UserError(f"{path}: no hits; a TREC run has lines of query_id Q0 doc_id rank score tag")
    return hits


def write_run(hits: Iterable[ScoredDoc], path: Path, *, tag: str = "effir") -> int:
    """Write hits as a TREC run and return their number; the file appears whole or not at all.

    Hits of a query stand together, best first, with strictly decreasing scores, as ``strictly_decreasing`` gives them.
    Ranks are 1-based. Scores have 9 significant digits, which tell any two float32 numbers apart.

    Raises:
        ValueError: The tag is empty or holds white space.
    """
    if tag.split() != [tag]:
        raise UserError(f"run tag {tag!r}: must be one word")
    num_hits = 0
    with whole_file(path) as file:
        for query_id, of_query in itertools.groupby(hits, key=lambda hit: hit.query_id):
            for rank, hit in enumerate(of_query, start=1):
                file.write(f"{query_id} Q0 {hit.doc_id} {rank} {hit.score:.9g} {tag}\n")
                num_hits += 1
    return num_hits


def strictly_decreasing(hits: Sequence[ScoredDoc]) -> list[ScoredDoc]:
    """Return one query's hits best first, no two with the same score, in the order in which trec_eval ranks them.

    trec_eval reads scores as float32 and orders equal ones by document id, descending; others break ties by id
    ascending or by file order. A tied score is lowered to the next float32 below the one before it, so that all agree.

    Source: ``trec_eval/form_res_rels.c`` (comp_sim_docno) of the TREC evaluation software.

    Raises:
        ValueError: A score that is not a finite float32.
    """
    for hit in hits:
        if not abs(hit.score) <= FLOAT32_MAX:
            pair = f'query "{hit.query_id}", document "{hit.doc_id}"'
            raise UserError(f"{pair}: the score {hit.score} is not a finite float32")
    ranked = sorted(hits, key=lambda hit: hit.doc_id, reverse=True)
    ranked.sort(key=lambda hit: -np.float32(hit.score))
    result: list[ScoredDoc] = []
    ceiling = np.float32(np.inf)
    for hit in ranked:
        score = min(np.float32(hit.score), np.nextafter(ceiling, np.float32(-np.inf)))
        result.append(hit._replace(score=float(score)))
        ceiling = score
    return result


def topic_rows(source: str | Path, field: str = "title", *, need_id: bool = True) -> Iterator[tuple[str, Query]]:
    """Yield ``(where, query)`` of topics in any format, in file order; neither id nor text is checked.

    Args:
        source: As ``read_topics`` takes it.
        field: See ``read_topics``.
        need_id: A JSON or table topic without an id is an error; else its id is empty.

    Raises:
        ValueError: A row that is no topic, named with its line.
        OSError: The file cannot be read.
    """
    if str(source).startswith(IR_DATASETS):
        for number, query in enumerate(read_ir_datasets(str(source), "queries"), start=1):
            where = f"{source}, topic {number}"
            if field != "title" and not hasattr(query, field):
                raise UserError(f"{where}: has no {field} (found: {', '.join(query._fields)})")
            yield where, Query(query.query_id, query.default_text() if field == "title" else getattr(query, field))
        return
    with open_text(Path(source)) as file:
        yield from topics_of(file, Path(source), field, need_id=need_id)


def topics_of(file: IO[bytes], path: Path, field: str, *, need_id: bool) -> Iterator[tuple[str, Query]]:
    """Yield what ``topic_rows`` yields, of a file that ``open_text`` opened."""
    head = file.peek(1).lstrip()[:1]
    if head == b"<":
        yield from _trec_topics(file, path, field)
    elif head in (b"{", b"["):
        for where, row in json_rows(file, path):
            yield where, _json_topic(json_object(row, where), where, field, need_id=need_id)
    else:
        yield from _table_topics(file, path, field, need_id=need_id)


def _text_names(field: str) -> Sequence[str]:
    """Where the text of a JSON or table topic is, in this order: a part other than the title is asked for by name."""
    return (*TOPIC_TEXT_FIELDS, field) if field == "title" else (field,)


def _json_topic(record: dict, where: str, field: str, *, need_id: bool) -> Query:
    text = next((record[name] for name in _text_names(field) if record.get(name) is not None), None)
    if not isinstance(text, str):
        name = "text" if field == "title" else field
        raise UserError(f'{where}: no "{name}" field that is a string (found: {", ".join(record)})')
    needed = need_id or any(name in record for name in QUERY_ID_FIELDS)
    return Query(json_id(record, QUERY_ID_FIELDS, where) if needed else "", text)


def _table_topics(file: IO[bytes], path: Path, field: str, *, need_id: bool) -> Iterator[tuple[str, Query]]:
    """Of TSV without a header, all that follows the first tab is the text."""
    names = (*TOPIC_TEXT_FIELDS, *TOPIC_FIELDS)
    for where, row, header in table_rows(file, path, names, need_id=need_id):
        columns = columns_of(row, where)
        if header is None:
            if len(columns) < 2:
                raise UserError(f"{where}: neither JSON, nor a TREC <top>, nor id and text with a tab between")
            if field != "title":
                raise UserError(f"{where}: no header names the columns, so none is the {field}")
            yield where, Query(columns[0], "\t".join(columns[1:]))
            continue
        column = next((name for name in _text_names(field) if name in header), None)
        if column is None:
            raise UserError(f"{where}: no column is the {field} (found: {', '.join(header)})")
        if len(columns) != len(header):
            raise UserError(f"{where}: {len(columns)} columns, expected {len(header)}")
        id_column = next((name for name in (*QUERY_ID_FIELDS, *TABLE_ID_FIELDS) if name in header), None)
        query_id = columns[header.index(id_column)] if id_column is not None else ""
        yield where, Query(query_id, columns[header.index(column)])


class _Topic:
    """A TREC or XML topic while it is read: its parts by the names of their tags, "" is what is outside them."""

    def __init__(self, where: str, attributes: dict[str, str]) -> None:
        self.where, self.attributes = where, attributes
        self.parts: dict[str, list[str]] = {"": [""]}
        self._name = ""

    def begin(self, name: str) -> None:
        """Begin a part, which ends the one before."""
        self._name = name
        self.parts.setdefault(name, []).append("")

    def end(self) -> None:
        self._name = ""

    def add(self, text: str) -> None:
        self.parts[self._name][-1] += text

    def query(self, field: str) -> Query:
        return Query(self._id(), self._field(field))

    def _id(self) -> str:
        for name in TOPIC_TAGS["id"]:
            if name in self.parts:
                return self._text(name)
        for name in TOPIC_TAGS["id"]:
            if name in self.attributes:
                return self.attributes[name].strip()
        raise UserError(f"{self.where}: topic without <num>, <number> or another id")

    def _field(self, field: str) -> str:
        for name in TOPIC_TAGS[field]:
            if name in self.parts:
                return self._text(name)
        others = self.parts.keys() - {"", *TOPIC_TAGS["id"]}
        if field == "title" and not others and self._text(""):
            return self._text("")  # all of the topic is its text, as in the clinical trials' track
        found = ", ".join(f"<{name}>" for name in self.parts if name) or "text alone"
        raise UserError(f"{self.where}: topic without <{TOPIC_TAGS[field][0]}>, its {field} (found: {found})")

    def _text(self, name: str) -> str:
        if len(self.parts[name]) > 1:
            raise UserError(f"{self.where}: a topic with {len(self.parts[name])} times <{name}>; leave one")
        text = " ".join(self.parts[name][0].split())
        label = _LABELS.get(name, "")
        return text[len(label) :].strip() if label and text.lower().startswith(label.lower()) else text


def _trec_topics(file: IO[bytes], path: Path, field: str) -> Iterator[tuple[str, Query]]:
    """Read ``<top> <num> Number: 301 <title> ... </top>`` or XML; closing tags other than the topic's are optional.

    Nothing but tags and characters is read: entities that a DOCTYPE declares, and what it names, are not.
    """
    topic: _Topic | None = None
    wrapper = ""
    for where, markup, text in _pieces(file, path):
        if markup is None or markup["raw"] is not None:
            if topic is not None:
                topic.add(text if markup is None else markup["raw"])
            elif text.strip():
                raise UserError(f"{where}: text outside <{wrapper or 'top'}> ... </{wrapper or 'top'}>")
            continue
        if markup["inside"] is not None and "[" in markup["inside"]:
            raise UserError(f"{where}: the DOCTYPE declares names of its own, which are not read; take it out")
        if markup["name"] is None:
            continue
        name, closes = re.sub("^[a-z]{2}-", "", markup["name"].lower()), bool(markup["close"])
        if not wrapper and name in _WRAPPERS and not closes:
            wrapper = name
        if name == wrapper and closes:
            if topic is not None:
                yield topic.where, topic.query(field)
            topic = None
        elif name == wrapper:
            if topic is not None:
                raise UserError(f"{where}: a second <{wrapper}> before the </{wrapper}> of the one at {topic.where}")
            topic = _Topic(where, _attributes(markup["attributes"]))
        elif topic is None:
            continue
        elif name in _INLINE:
            topic.add(" ")
        elif closes:
            topic.end()
        else:
            topic.begin(name)
            if markup[0].endswith("/>"):
                topic.end()
    if topic is not None:
        raise UserError(f"{topic.where}: <{wrapper}> without </{wrapper}>")
    if not wrapper:
        raise UserError(f"{path}: begins with <, and has no <top> or <topic>; other topics are TSV, id and text")


def _pieces(file: IO[bytes], path: Path) -> Iterator[tuple[str, re.Match | None, str]]:
    """Yield ``(where, markup, text)`` of what is markup and what is between, its entities decoded."""
    lines: list[str] = []
    for number, line in lines_of(file, path):
        lines += [""] * (number - 1 - len(lines))  # blank lines, so that they count
        lines.append(decode(line, f"{path}:{number}"))
    text = "\n".join(lines)
    at, line_number, counted = 0, 1, 0
    for markup in itertools.chain(_MARKUP.finditer(text), [None]):
        start = markup.start() if markup else len(text)
        between = text[at:start]
        blank = len(between) - len(between.lstrip())
        line_number += text.count("\n", counted, at + blank)
        yield f"{path}:{line_number}", None, _ENTITY.sub(lambda entity: html.unescape(entity[0]), between)
        if markup:
            line_number, counted, at = line_number + text.count("\n", at + blank, start), start, markup.end()
            yield f"{path}:{line_number}", markup, markup[0]


def _attributes(text: str) -> dict[str, str]:
    pairs = re.findall(_ATTRIBUTE, text)
    return {name.lower(): html.unescape(value.strip("\"'")) for name, value in pairs}
