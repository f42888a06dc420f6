"""Texts with a teacher's embeddings: what an encoder learns from without labels."""

import itertools
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from effir_search.encoder import Encoder
from effir_search.files import whole_file, write_whole
from effir_search.texts import read_texts, sampled
from effir_search.training.lines import Lines

logger = logging.getLogger(__name__)

# Texts of a file of embeddings: what a stopped job loses at most.
PART_SIZE = 1024


class TaughtText(NamedTuple):
    """A text, whether it is a query, and the teacher's embedding, ``(dimension,)`` float32."""

    text: str
    query: bool
    embedding: Tensor


def prepare_texts(
    documents: Sequence[str], queries: Sequence[str], output: Path, *, size: int | None = None, seed: int = 0
) -> int:
    """Write the distinct texts of some files as JSONL of ``{"text", "query"}`` and return how many there are.

    Args:
        documents: Files of texts that get the document prompt, each as ``texts.read_texts`` takes it.
        queries: Files of texts that get the query prompt.
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
        raise ValueError(f"{', '.join([*documents, *queries])}: no text in it to learn from")
    return number


def _distinct(documents: Sequence[str], queries: Sequence[str]) -> Iterator[tuple[str, bool]]:
    seen: set[int] = set()
    for query, sources in ((False, documents), (True, queries)):
        for text in itertools.chain.from_iterable(map(read_texts, sources)):
            if text.strip() and (key := hash((text, query))) not in seen:
                seen.add(key)
                yield text, query


def teach(lines: Lines, teacher: Encoder, folder: Path) -> None:
    """Write the teacher's embeddings of all texts, in parts; those that are there already are kept.

    Args:
        lines: As ``prepare_texts`` wrote them.
        teacher: Embeds queries and documents with its own prompts.
        folder: Where the parts go, ``teacher-00012.npy``, each ``(texts, dimension)`` float32.
    """
    starts = range(0, len(lines), PART_SIZE)
    missing = [start for start in starts if not _part(folder, start).is_file()]
    if missing and len(missing) < len(starts):
        logger.info(
            "continuing: the teacher has embedded %d of %d texts", (len(starts) - len(missing)) * PART_SIZE, len(lines)
        )
    with tqdm(
        total=len(lines), initial=(len(starts) - len(missing)) * PART_SIZE, desc="Teacher", unit=" texts", disable=None
    ) as progress:
        for start in missing:
            records = [lines[number] for number in range(start, min(start + PART_SIZE, len(lines)))]
            texts, queries = ([record[name] for record in records] for name in ("text", "query"))
            embeddings = encode_texts(teacher, texts, queries)
            write_whole(_part(folder, start), lambda file, embeddings=embeddings: np.save(file, embeddings))
            progress.update(len(records))


def encode_texts(encoder: Encoder, texts: Sequence[str], queries: Sequence[bool]) -> np.ndarray:
    """Return ``(texts, dimension)`` float32, each text encoded as the query or the document it is."""
    embeddings = np.zeros((len(texts), encoder.dimension), dtype=np.float32)
    for kind, encode in ((True, encoder.encode_queries), (False, encoder.encode_documents)):
        rows = [row for row, query in enumerate(queries) if query == kind]
        embeddings[rows] = encode([texts[row] for row in rows])
    return embeddings


class TaughtTexts:
    """The texts with the teacher's embeddings, as a sequence; neither is in memory."""

    def __init__(self, lines: Lines, folder: Path) -> None:
        self.lines, self.folder = lines, folder

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, number: int) -> TaughtText:
        record = self.lines[number]
        part = np.load(_part(self.folder, number), mmap_mode="r", allow_pickle=False)
        return TaughtText(record["text"], record["query"], torch.from_numpy(part[number % PART_SIZE].copy()))


def as_batch(texts: Sequence[TaughtText]) -> dict[str, object]:
    """Return what ``ImitationObjective`` takes."""
    return {
        "texts": [text.text for text in texts],
        "queries": [text.query for text in texts],
        "teacher": torch.stack([text.embedding for text in texts]),
    }


def _part(folder: Path, number: int) -> Path:
    """The file that the text of this number is in."""
    return folder / f"teacher-{number // PART_SIZE:05}.npy"
