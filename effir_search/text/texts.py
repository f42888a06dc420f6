"""The texts of any corpus, topics or text file, without their ids; a seeded sample of them."""

import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO

from effir_search.errors import UserError
from effir_search.files.reading import decode, lines_of, open_text
from effir_search.text.checks import check_unicode
from effir_search.text.corpus import IR_DATASETS, Document, document_text, read_corpus, text_and_title
from effir_search.text.folders import beir_file, corpus_files
from effir_search.text.layouts import (
    TEXT_FIELDS,
    TOPIC_TEXT_FIELDS,
    columns_of,
    is_table,
    json_object,
    json_rows,
    table_record,
    table_rows,
    table_text_and_title,
)
from effir_search.text.trec import topic_rows, topics_of

# How names of fields begin that only training records have.
_OF_TRAINING = ("positive", "negative", "pos", "neg")


def read_texts(source: str) -> Iterator[str]:
    """Yield the texts of a corpus, of topics, or of a text file with one text a line; ids may be missing.

    The content decides, but for a table's name in ``.tsv`` or ``.csv``: ``<`` begins TREC or XML topics, ``{`` or ``[``
    JSON, a first line of a word, a tab and more is TSV. A folder and ``irds:NAME`` are a corpus.

    Raises:
        ValueError: A bad line, named with its number.
        OSError: The file cannot be read.
    """
    if source.startswith(IR_DATASETS):
        yield from map(document_text, read_corpus(source))
        return
    for path in corpus_files(Path(source)):
        with open_text(path) as file:
            head = file.peek(1).lstrip()
            if head.startswith(b"<"):
                rows = ((where, query.text) for where, query in topics_of(file, path, "title", need_id=False))
            elif _is_json(head):
                rows = ((where, _json_text(row, where)) for where, row in json_rows(file, path))
            elif _is_table(path, head):
                rows = _table_texts(file, path)
            else:
                rows = _lines(file, path)
            yield from _checked(rows)


def read_query_texts(source: str) -> Iterator[str]:
    """Yield the texts of topics as ``read_topics`` reads them, or of a text file; ids may be missing.

    Of a BEIR folder and of ``irds:NAME`` they are the queries.

    Raises:
        ValueError: A bad line, named with its number.
        OSError: The file cannot be read.
    """
    path = Path(source)
    if source.startswith(IR_DATASETS):
        rows = ((where, query.text) for where, query in topic_rows(source))
        yield from _checked(rows)
        return
    with open_text(beir_file(path, "queries.jsonl") if path.is_dir() else path) as file:
        head = file.peek(1).lstrip()
        if head.startswith(b"<") or _is_json(head) or _is_table(path, head):
            rows = ((where, query.text) for where, query in topics_of(file, path, "title", need_id=False))
        else:
            rows = _lines(file, path)
        yield from _checked(rows)


def _checked(rows: Iterable[tuple[str, str]]) -> Iterator[str]:
    for where, text in rows:
        check_unicode(text, where)
        yield text


def _is_json(head: bytes) -> bool:
    """Whether a file begins as JSON does; a line of text may begin with a bracket too, as in ``[1] Smith``."""
    return bool(re.match(rb'\{|\[\s*[{"\]]', head))


def _is_table(path: Path, head: bytes) -> bool:
    return is_table(path) or bool(re.match(rb"[^\s]+\t", head))


def _lines(file: IO[bytes], path: Path) -> Iterator[tuple[str, str]]:
    for line_number, line in lines_of(file, path):
        where = f"{path}:{line_number}"
        yield where, decode(line, where)


def _json_text(row: object, where: str) -> str:
    if isinstance(row, str):
        return row
    record = json_object(row, where)
    if not any(name in record for name in TEXT_FIELDS):
        query = next((record[name] for name in TOPIC_TEXT_FIELDS if name in record), None)
        if any(name.startswith(_OF_TRAINING) for name in record):
            raise UserError(f"{where}: is a training record (found: {', '.join(record)}); it goes with --train")
        if isinstance(query, str):
            return query
    return document_text(Document("", *text_and_title(record, where)))


def _table_texts(file: IO[bytes], path: Path) -> Iterator[tuple[str, str]]:
    for where, row, header in table_rows(file, path, (*TEXT_FIELDS, *TOPIC_TEXT_FIELDS), need_id=False):
        columns = columns_of(row, where)
        if len(columns) == 1 and header is None:
            raise UserError(f"{where}: no tab in it; TSV is id, tab and text, and a file of texts alone has no tabs")
        yield where, document_text(Document("", *table_text_and_title(table_record(columns, header, where))))


def sampled(texts: Iterable[str], size: int, seed: int) -> list[str]:
    """Return ``size`` of the texts, or all of fewer, each as likely as any other, in their order.

    Source: Vitter, Random Sampling with a Reservoir, 1985, algorithm R.
    """
    generator = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for number, text in enumerate(texts):
        if len(kept) < size:
            kept.append((number, text))
        elif (place := generator.randrange(number + 1)) < size:
            kept[place] = (number, text)
    return [text for _, text in sorted(kept)]
