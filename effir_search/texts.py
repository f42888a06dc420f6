"""The texts of any corpus, topics or text file, without their ids; a seeded sample of them."""

import random
from collections.abc import Iterable, Iterator
from pathlib import Path

from effir_search.corpus import IR_DATASETS, document_text, read_corpus
from effir_search.files import decode, read_lines
from effir_search.trec import read_topics


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
