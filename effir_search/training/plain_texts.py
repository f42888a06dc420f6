"""Texts without labels, from which an encoder learns what a teacher makes of them."""

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.lines import Lines
from effir_search.files.whole import whole_file
from effir_search.text.texts import read_query_texts, read_texts, sampled


class PlainText(NamedTuple):
    """A text, and whether it is a query; else it is a document."""

    text: str
    query: bool


def prepare_texts(
    documents: Sequence[str], queries: Sequence[str], output: Path, *, size: int | None = None, seed: int = 0
) -> int:
    """Write the distinct texts of some files as JSONL of ``{"text", "query"}`` and return how many there are.

    Args:
        documents: Files of texts that get the document prompt, each as ``texts.read_texts`` takes it.
        queries: Files of texts that get the query prompt, each as ``texts.read_query_texts`` takes it.
        output: The new file.
        size: At most so many, a seeded sample of all; None = all.
        seed: Of the sample.

    Raises:
        ValueError: No text, or a bad line.
        OSError: A file cannot be read.
    """
    pairs = _distinct(documents, queries)
    if size is not None:
        pairs = sampled(pairs, size, seed)
    number = 0
    with whole_file(output) as file:
        for text, query in pairs:
            file.write(json.dumps({"text": text, "query": query}, ensure_ascii=False) + "\n")
            number += 1
    if not number:
        output.unlink()
        raise UserError(f"{', '.join([*documents, *queries])}: no text in it to learn from")
    return number


def _distinct(documents: Sequence[str], queries: Sequence[str]) -> Iterator[tuple[str, bool]]:
    seen: set[int] = set()
    for query, read, sources in ((False, read_texts, documents), (True, read_query_texts, queries)):
        for text in itertools.chain.from_iterable(map(read, sources)):
            if text.strip() and (key := hash((text, query))) not in seen:
                seen.add(key)
                yield text, query


def encode_texts(encoder: Encoder, texts: Sequence[str], queries: Sequence[bool]) -> np.ndarray:
    """Return ``(texts, dimension)`` float32, each text encoded as the query or the document it is."""
    embeddings = np.zeros((len(texts), encoder.dimension), dtype=np.float32)
    for kind, encode in ((True, encoder.encode_queries), (False, encoder.encode_documents)):
        rows = [row for row, query in enumerate(queries) if query == kind]
        embeddings[rows] = encode([texts[row] for row in rows])
    return embeddings


class PlainTexts:
    """Texts that ``prepare_texts`` wrote, as a sequence; they are not in memory."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> PlainText:
        return PlainText(**self.lines[number])


def as_batch(texts: Sequence[PlainText]) -> dict[str, object]:
    """Return what ``ImitationObjective`` takes."""
    return {"texts": [text.text for text in texts], "queries": [text.query for text in texts]}
