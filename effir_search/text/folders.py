"""Which files of a folder hold documents: BEIR's, those of a folder of files, none of queries or qrels."""

import logging
import re
from pathlib import Path

from effir_search.errors import UserError
from effir_search.text.layouts import plain_name

logger = logging.getLogger(__name__)

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv")

# Endings of data that is not read: a folder may hold a part of its corpus in them.
UNREAD = (".parquet", ".arrow", ".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst", ".lz4")

CORPUS_FILES = ("corpus.jsonl", "corpus.jsonl.gz")

# Words in the names of files that hold topics or qrels, as in msmarco-docdev-queries.tsv.
NO_CORPUS = re.compile(r"(?<![a-z])(query|queries|topics?|qrels?)(?![a-z])")


def beir_file(folder: Path, name: str) -> Path:
    """Return a BEIR folder's ``corpus.jsonl``, ``queries.jsonl`` or ``qrels/SPLIT.tsv``; the first two may be .gz.

    Raises:
        FileNotFoundError: It has none.
    """
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise FileNotFoundError(f"{folder}: has no {name}, which a BEIR folder has")


def corpus_files(path: Path) -> list[Path]:
    """Return the files that a corpus' name stands for; of a folder neither hidden ones, nor queries and qrels.

    Raises:
        ValueError: A folder of BEIR folders, or without any such file; neither a file nor a folder.
        FileNotFoundError: There is nothing of this name.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such corpus file or folder")
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{path}: is neither a file nor a folder; a corpus is read twice, so a pipe cannot be one")
    for name in CORPUS_FILES:
        if (path / name).is_file():
            return [path / name]
    visible_files = _visible_files(path)
    if nested := [file.parent for file in visible_files if file.name in CORPUS_FILES]:
        raise UserError(
            f"{path}: holds {len(nested)} BEIR folders, each with a corpus of its own; "
            f"give one of them, as in --corpus {nested[0]}"
        )
    named = [file for file in visible_files if _is_corpus_name(file)]
    files = [file for file in named if not _is_topics_or_qrels(file, path)]
    if not files:
        others = ", plain or .gz" + (", but for queries and qrels" if named else "")
        raise UserError(f"{path}: no {', '.join(SUFFIXES)} file in this folder{others}")
    return files


def _visible_files(folder: Path) -> list[Path]:
    return [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(folder).parts)
    ]


def _is_corpus_name(file: Path) -> bool:
    """Whether a file is one of a corpus by its name; MS MARCO's are called ``msmarco_passage_00.gz``."""
    name = plain_name(file)
    return name.endswith(SUFFIXES) or (name != file.name.lower() and "." not in name)


def _is_topics_or_qrels(file: Path, folder: Path) -> bool:
    parts = [folder.resolve().name, *file.relative_to(folder).parts[:-1]]
    return "qrels" in parts or NO_CORPUS.search(file.name.lower()) is not None


def warn_of_unread(source: str | Path) -> None:
    """Warn of what a folder's corpus does not have: data of other formats, and what is topics or qrels by its name."""
    path = Path(source)
    if path.is_dir() and not any((path / name).is_file() for name in CORPUS_FILES):
        unread = [file for file in _visible_files(path) if file.name.lower().endswith(UNREAD)]
        if unread:
            logger.warning("%s: %d files are not read, such as %s", path, len(unread), unread[0].name)
        links = [place for place in path.rglob("*") if place.is_symlink() and place.is_dir()]
        if links:
            logger.warning(
                "%s: %d links to folders are not followed, such as %s; copy what is in them",
                *(path, len(links), links[0].name),
            )
        left_out = [file for file in _visible_files(path) if _is_corpus_name(file) and _is_topics_or_qrels(file, path)]
        if left_out:
            logger.warning(
                "%s: %d files are topics or qrels by their names, such as %s, and are no documents; rename what is one",
                *(path, len(left_out), left_out[0].name),
            )
