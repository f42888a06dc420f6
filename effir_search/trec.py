"""Topics, qrels and runs: every TREC and BEIR text format, and the one rule for tied scores."""

import itertools
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.corpus import (
    ID_FIELDS,
    IR_DATASETS,
    check_id,
    check_unicode,
    is_tsv_header,
    json_id,
    parse_json_object,
    read_ir_datasets,
)
from effir_search.files import decode, read_lines, whole_file

QUERY_ID_FIELDS = (*ID_FIELDS, "query_id", "qid")
FLOAT32_MAX = float(np.finfo(np.float32).max)
TOPIC_TEXT_FIELDS = ("text", "query")
TOPIC_FIELDS = ("title", "description", "narrative")
_TREC_TAGS = {"title": "title", "description": "desc", "narrative": "narr"}
_TREC_LABELS = {"num": "Number:", "title": "Topic:", "desc": "Description:", "narr": "Narrative:"}


class Query(NamedTuple):
    """One topic as it is searched: ``query_id`` holds no white space; an empty ``text`` finds nothing."""

    query_id: str
    text: str


def read_topics(source: str | Path, *, field: str = "title") -> list[Query]:
    """Return the topics of a file, in file order. The format is told by the content, not by the name.

    Args:
        source: BEIR JSONL (``_id``, ``text``), TSV (id, text) or TREC ``<top>`` topics, may be .gz; or ``irds:NAME``.
        field: Which part of a TREC topic is the query: ``title``, ``description`` or ``narrative``.

    Raises:
        ValueError: A bad or repeated topic, named with its line; no topic at all.
        OSError: The file cannot be read.
    """
    topics: list[Query] = []
    seen: set[str] = set()
    for where, query in _topic_rows(source, field):
        check_id(query.query_id, where)
        check_unicode(query.query_id, where)
        check_unicode(query.text, where)
        if query.query_id in seen:
            raise ValueError(f'{where}: repeated topic id "{query.query_id}"')
        seen.add(query.query_id)
        topics.append(query)
    if not topics:
        raise ValueError(f"{source}: no topics")
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
    path = Path(source)
    for line_number, line in read_lines(path):
        where = f"{path}:{line_number}"
        columns = decode(line, where).split()
        if not grades and len(columns) == 3 and columns[0] in ("query-id", "query_id", "qid"):
            continue
        if len(columns) == 3:
            query_id, doc_id, grade = columns
        elif len(columns) == 4:
            query_id, _iteration, doc_id, grade = columns
        else:
            raise ValueError(f"{where}: {len(columns)} columns; qrels have 3 (BEIR) or 4 (TREC)")
        if not re.fullmatch(r"[+-]?[0-9]{1,9}", grade):
            raise ValueError(f"{where}: the grade {grade[:30]!r} is not a whole number")
        relevance = int(grade)
        if grades.setdefault((query_id, doc_id), relevance) != relevance:
            raise ValueError(f'{where}: a second, different grade for query "{query_id}", document "{doc_id}"')
    if not grades:
        raise ValueError(f"{source}: no judgments")
    return [Qrel(query_id, doc_id, relevance) for (query_id, doc_id), relevance in grades.items()]


def read_run(path: Path) -> list[ScoredDoc]:
    """Return the hits of a TREC run (``query_id Q0 doc_id rank score tag``), in file order.

    Raises:
        ValueError: A line without six columns, a score that is not a finite number, a document that a query has twice;
            named with the line. No hit at all.
        OSError: The file cannot be read.
    """
    hits: list[ScoredDoc] = []
    seen: set[tuple[str, str]] = set()
    for line_number, line in read_lines(path):
        where = f"{path}:{line_number}"
        columns = decode(line, where).split()
        if len(columns) != 6:
            raise ValueError(f"{where}: {len(columns)} columns; a TREC run has 6 (query_id Q0 doc_id rank score tag)")
        query_id, _q0, doc_id, _rank, text, _tag = columns
        try:
            score = math.nan if "_" in text else float(text)
        except ValueError:
            score = math.nan
        if not math.isfinite(score):
            raise ValueError(f"{where}: the score {text[:30]!r} is not a finite number")
        if (query_id, doc_id) in seen:
            raise ValueError(f'{where}: document "{doc_id}" is there twice for query "{query_id}"')
        seen.add((query_id, doc_id))
        hits.append(ScoredDoc(query_id, doc_id, score))
    if not hits:
        raise ValueError(f"{path}: no hits; a TREC run has lines of query_id Q0 doc_id rank score tag")
    return hits


def write_run(hits: Iterable[ScoredDoc], path: Path, *, tag: str = "effir") -> int:
    """Write hits as a TREC run and return their number; the file appears whole or not at all.

    Hits of a query stand together, best first, with strictly decreasing scores, as ``strictly_decreasing`` gives them.
    Ranks are 1-based. Scores have 9 significant digits, which tell any two float32 numbers apart.

    Raises:
        ValueError: The tag is empty or holds white space.
    """
    if tag.split() != [tag]:
        raise ValueError(f"run tag {tag!r}: must be one word")
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
            raise ValueError(f"{pair}: the score {hit.score} is not a finite float32")
    ranked = sorted(hits, key=lambda hit: hit.doc_id, reverse=True)
    ranked.sort(key=lambda hit: -np.float32(hit.score))
    result: list[ScoredDoc] = []
    ceiling = np.float32(np.inf)
    for hit in ranked:
        score = min(np.float32(hit.score), np.nextafter(ceiling, np.float32(-np.inf)))
        result.append(hit._replace(score=float(score)))
        ceiling = score
    return result


def _topic_rows(source: str | Path, field: str) -> Iterator[tuple[str, Query]]:
    if str(source).startswith(IR_DATASETS):
        for number, query in enumerate(read_ir_datasets(str(source), "queries"), start=1):
            yield f"{source}, topic {number}", Query(query.query_id, query.default_text())
        return
    path = Path(source)
    lines = ((f"{path}:{number}", decode(line, f"{path}:{number}")) for number, line in read_lines(path))
    first = next(lines, None)
    if first is None:
        return
    lines = itertools.chain([first], lines)
    if first[1].lstrip().startswith("<"):
        yield from _trec_topics(lines, field)
        return
    if first[1].lstrip().startswith("{"):
        yield from ((where, _json_topic(line, where)) for where, line in lines)
        return
    names = first[1].lower().split("\t")
    text_column = None
    if is_tsv_header(names, TOPIC_TEXT_FIELDS):
        text_column = next(names.index(name) for name in TOPIC_TEXT_FIELDS if name in names)
        next(lines)
    for where, line in lines:
        yield where, _tsv_topic(line, where, text_column)


def _json_topic(line: str, where: str) -> Query:
    record = parse_json_object(line, where)
    text = next((record[name] for name in TOPIC_TEXT_FIELDS if name in record), None)
    if not isinstance(text, str):
        raise ValueError(f'{where}: no "text" field that is a string (found: {", ".join(record)})')
    return Query(json_id(record, QUERY_ID_FIELDS, where), text)


def _tsv_topic(line: str, where: str, text_column: int | None) -> Query:
    """Without a header, all that follows the first tab is the text."""
    columns = line.split("\t", 1 if text_column is None else -1)
    if len(columns) <= (text_column or 1):
        raise ValueError(f"{where}: neither JSON, nor a TREC <top>, nor id and text with a tab between")
    return Query(columns[0], columns[text_column or 1])


def _trec_topics(lines: Iterable[tuple[str, str]], field: str) -> Iterator[tuple[str, Query]]:
    """Parse ``<top> <num> Number: 301 <title> ... <desc> ... </top>``; closing tags are optional."""
    start, block = "", None
    for where, line in lines:
        for piece in re.split(r"(</?top>)", line):
            if piece == "<top>":
                if block is not None:
                    raise ValueError(f"{where}: a second <top> before the </top> of the one at {start}")
                start, block = where, []
            elif piece == "</top>" and block is not None:
                yield start, _trec_topic(" ".join(block), field, start)
                block = None
            elif block is not None:
                block.append(piece)
            elif not start and piece.lstrip().startswith("<"):
                raise ValueError(
                    f"{where}: {piece.strip()[:30]!r} is no <top>; topics in XML are not read: "
                    "make them a TSV file, id and text with a tab between"
                )
            elif piece.strip():
                raise ValueError(f"{where}: text outside <top> ... </top>")
    if block is not None:
        raise ValueError(f"{start}: <top> without </top>")


def _trec_topic(text: str, field: str, where: str) -> Query:
    parts = dict(re.findall(r"<(num|title|desc|narr)>(.*?)(?=<(?:num|title|desc|narr)>|$)", text, re.S))
    return Query(*(_topic_part(parts, tag, where) for tag in ("num", _TREC_TAGS[field])))


def _topic_part(parts: dict[str, str], tag: str, where: str) -> str:
    if tag not in parts:
        raise ValueError(f"{where}: topic without <{tag}>")
    text = " ".join(re.sub(r"</?\w+>", " ", parts[tag]).split())
    return text.removeprefix(_TREC_LABELS[tag]).strip()
