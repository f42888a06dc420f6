"""The texts that importance is measured on: a seeded sample of any corpus, topics or text files."""

import hashlib
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from effir_search.corpus import IR_DATASETS, document_text, read_corpus
from effir_search.files import decode, read_lines
from effir_search.trec import read_topics

NUM_TEXTS = 256


class Calibration(NamedTuple):
    """A sample of texts, and what is kept of it with a model: enough to tell another sample from it.

    Attributes:
        texts: In the order of the files.
        sources: Names of the files, without their folders.
        seed: Of the sample.
        sha256: Of the texts, each before a line end.
    """

    texts: list[str]
    sources: list[str]
    seed: int
    sha256: str

    def record(self) -> dict:
        """Return what is written down, in JSON types."""
        return {"texts": len(self.texts), "sources": self.sources, "seed": self.seed, "sha256": self.sha256}


def sample_texts(sources: Sequence[str], *, size: int = NUM_TEXTS, seed: int = 0) -> Calibration:
    """Return a sample of texts, the same share from every source, as far as it has so many.

    Args:
        sources: Each as ``read_texts`` takes it.
        size: How many texts; of fewer all are taken.
        seed: The same seed takes the same texts of the same files.

    Raises:
        ValueError: A bad line, or a source without any text.
        OSError: A file cannot be read.
    """
    texts: list[str] = []
    for number, source in enumerate(sources):
        share = size * (number + 1) // len(sources) - size * number // len(sources)
        taken = _reservoir((text for text in read_texts(source) if text.strip()), share, seed)
        if share and not taken:
            raise ValueError(f"{source}: no text in it to measure importance on")
        texts += taken
    digest = hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()
    return Calibration(texts, [Path(source).name for source in sources], seed, digest)


def read_texts(source: str) -> Iterator[str]:
    """Yield the texts of a corpus, of topics, or of a text file with one text a line.

    The content decides: ``<`` begins TREC topics, ``{`` JSONL; a name in ``.tsv``, a folder and ``irds:NAME`` are a
    corpus. BEIR's and TSV topics look like a corpus and are read as one.

    Raises:
        ValueError: A bad line, named with its number.
        OSError: The file cannot be read.
    """
    path = Path(source)
    if source.startswith(IR_DATASETS) or not path.is_file() or path.name.removesuffix(".gz").endswith(".tsv"):
        yield from map(document_text, read_corpus(source))
        return
    first = next((line.lstrip()[:1] for _, line in read_lines(path)), b"")
    if first == b"{":
        yield from map(document_text, read_corpus(source))
    elif first == b"<":
        yield from (query.text for query in read_topics(source))
    else:
        yield from (decode(line, f"{path}:{number}") for number, line in read_lines(path))


def _reservoir(texts: Iterable[str], size: int, seed: int) -> list[str]:
    """Return ``size`` of the texts, each as likely as any other, in their order (Vitter 1985, algorithm R)."""
    generator = random.Random(seed)
    kept: list[tuple[int, str]] = []
    for number, text in enumerate(texts):
        if len(kept) < size:
            kept.append((number, text))
        elif (place := generator.randrange(number + 1)) < size:
            kept[place] = (number, text)
    return [text for _, text in sorted(kept)]
