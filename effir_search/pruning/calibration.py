"""The texts that importance is measured on: a seeded sample of any corpus, topics or text files."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from effir_search.errors import UserError
from effir_search.settings import NUM_TEXTS
from effir_search.text.texts import read_texts, sampled


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

    def record(self, max_length: int) -> dict:
        """Return what is written down, in JSON types, of texts of which ``max_length`` tokens were read."""
        sample = {"texts": len(self.texts), "sources": self.sources, "seed": self.seed, "sha256": self.sha256}
        return sample | {"max_length": max_length}


def sample_texts(sources: Sequence[str], *, size: int = NUM_TEXTS, seed: int = 0) -> Calibration:
    """Return a sample of texts, the same share from every source, as far as it has so many.

    Args:
        sources: Each as ``texts.read_texts`` takes it.
        size: How many texts; of fewer all are taken.
        seed: The same seed takes the same texts of the same files.

    Raises:
        ValueError: A bad line, a source without any text, or fewer texts than sources.
        OSError: A file cannot be read.
    """
    if size < len(sources):
        raise UserError(f"{size} texts cannot be taken from {len(sources)} sources; give --num-texts {len(sources)}")
    texts: list[str] = []
    for number, source in enumerate(sources):
        share = size * (number + 1) // len(sources) - size * number // len(sources)
        sample = sampled((text for text in read_texts(source) if text.strip()), share, seed)
        if not sample:
            raise UserError(f"{source}: no text in it to measure on")
        texts += sample
    digest = hashlib.sha256("".join(f"{text}\n" for text in texts).encode()).hexdigest()
    return Calibration(texts, [Path(source).name for source in sources], seed, digest)
