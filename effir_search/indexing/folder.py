"""Rows, which are vectors and ids, into the folder of an index, which appears whole or not at all."""

import json
import logging
import platform
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from effir_search.encoding.config import EncoderConfig, scale
from effir_search.errors import UserError
from effir_search.files.reading import file_sha256
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.indexing.copies import COPIES_FILE, first_of_equal, vector_digests
from effir_search.indexing.faiss_kinds import (
    check_training,
    is_graph,
    memory,
    new_index,
    reserve,
    sample_rows,
    set_search_parameters,
    train,
    training_size,
    well_trained_size,
)
from effir_search.indexing.index_record import (
    DOCID_FILE,
    INDEX_FILE,
    INFO_FILE,
    IndexInfo,
    check_files,
    read_index,
    read_index_info,
    require_index,
    store_of,
)
from effir_search.indexing.resume import packages_of
from effir_search.indexing.shard import WHOLE, Shard
from effir_search.indexing.store import Store
from effir_search.settings import IndexSettings

logger = logging.getLogger(__name__)

PACKAGES = ("effir_search", "torch", "transformers", "faiss-cpu", "tokenizers")
# Rows of a flat index that are in memory at once.
BLOCK = 4096

SOURCES = "take a Flat index, or one that was built with --keep-embeddings"

# Yields ``(vectors, ids)`` block by block, from the first row each time it is called.
Rows = Callable[[], Iterator[tuple[np.ndarray, list[str]]]]


def rows_of_store(store: Store, config: EncoderConfig) -> Rows:
    """Return the rows of a store whose parts are all there."""
    return lambda: ((scale(vectors, config), ids) for vectors, ids in store.read_all())


def exact_rows(index_dir: Path) -> Rows:
    """Return the rows of an index that holds exact vectors: a Flat one, or one whose embeddings were kept.

    Raises:
        ValueError: Another index, or one that is damaged.
        OSError: A file cannot be read.
    """
    require_index(index_dir)
    info = read_index_info(index_dir)
    return rows_of_flat(index_dir, info) if info is None or info.kind == "Flat" else rows_of_kept(index_dir, info)


def rows_of_flat(index_dir: Path, info: IndexInfo | None) -> Rows:
    """Return the rows of a Flat index, having checked that its files are what its record says, if it has one."""
    if info is not None:
        check_files(index_dir, info)
    index, doc_ids = read_index(index_dir, memory_map=True)
    if not isinstance(faiss.downcast_index(index), faiss.IndexFlat):
        raise UserError(f"{index_dir}: {type(faiss.downcast_index(index)).__name__} holds no exact vectors; {SOURCES}")
    starts = range(0, index.ntotal, BLOCK)
    return lambda: (
        (index.reconstruct_n(start, min(BLOCK, index.ntotal - start)), doc_ids[start : start + BLOCK])
        for start in starts
    )


def rows_of_kept(index_dir: Path, info: IndexInfo) -> Rows:
    """Return the rows of the store that was kept beside an index, having checked that it is that index's."""
    store = store_of(index_dir)
    if (settings := store.settings()) is None:
        raise UserError(f"{index_dir}: {info.kind} holds no exact vectors; {SOURCES}")
    of_store = (settings.model_sha256, settings.encoder, settings.dtype, settings.corpus_sha256 or info.corpus_sha256)
    of_index = (info.model_sha256, asdict(info.encoder), info.dtype, info.corpus_sha256)
    num_documents = sum(part.num_documents for part in store.parts().values())
    if of_store != of_index or num_documents != info.num_documents:
        raise UserError(f"{store.path}: its embeddings are not those that {index_dir} was built from")
    return rows_of_store(store, info.encoder)


def announce(dimension: int, num_documents: int, settings: IndexSettings, *, shard: Shard = WHOLE) -> None:
    """Say what memory an index takes, once it is sure that there is enough to train it on; of shards the first does."""
    kind = settings.kind
    size, well_trained = _train_size(num_documents, settings), well_trained_size(kind)
    check_training(kind, size)
    if shard.number > 0:
        return
    megabytes = memory(kind, dimension, num_documents, size) / 1e6
    trained = f", trained on {size:,} of them," if size else ""
    logger.info(
        "a %s index of %s vectors%s takes about %.1f MB of memory while it is built",
        *(kind, f"{num_documents:,}", trained, megabytes),
    )
    if size < well_trained:
        advice = "raise --train-size" if size < num_documents else "a smaller kind, such as SQ8, needs fewer"
        logger.warning(
            "%s is trained on %s vectors where FAISS asks for %s, so it may miss more hits: %s",
            *(kind, f"{size:,}", f"{well_trained:,}", advice),
        )


def _train_size(num_documents: int, settings: IndexSettings) -> int:
    default = training_size(settings.kind, num_documents)
    return default if default == 0 or settings.train_size is None else min(num_documents, settings.train_size)


def write_folder(rows: Rows, info: IndexInfo, index_dir: Path, settings: IndexSettings) -> IndexInfo:
    """Write an index folder whole, from rows that are read as often as they are needed, a block at a time.

    Args:
        rows: Of all documents.
        info: The record, to which kind, sample and hashes are added.
        index_dir: The new folder.
        settings: Its kind, the vectors it is trained on, and whether an index that is there is replaced.

    Returns:
        The record as it was written.
    """
    num_documents, kind = info.num_documents, settings.kind
    size = _train_size(num_documents, settings)
    index = new_index(kind, info.dimension)
    if not index.is_trained:
        train(index, kind, sample_rows((vectors for vectors, _ in rows()), num_documents, size))
    first = np.arange(num_documents)
    if is_graph(index):
        first = first_of_equal(vector_digests(vectors) for vectors, _ in rows())
    with whole_folder(index_dir, replaces=_replaceable(settings)) as folder:
        _add_rows(index, rows, first, folder, show_progress=kind != "Flat")
        set_search_parameters(index)  # for Pyserini, which takes them from the file
        try:
            faiss.write_index(index, str(folder / INDEX_FILE))
        except RuntimeError as error:
            raise OSError(
                f"{index_dir}: the index of {num_documents:,} vectors cannot be written; disk full?"
            ) from error
        return _write_record(replace(info, kind=kind, train_size=size), folder)


def _add_rows(index: faiss.Index, rows: Rows, first: np.ndarray, folder: Path, *, show_progress: bool) -> None:
    """Add the rows to an index, and write the ids: of those that are rows of it, and of copies.

    Args:
        index: Empty and trained.
        rows: Of all documents.
        first: Of each document, the position of the first that has the same vector, and alone gets a row.
        folder: Gets the two files; that of copies only if there are any.
        show_progress: Whether the rows are counted on the screen.
    """
    has_row = first == np.arange(len(first))
    row_of = np.cumsum(has_row) - 1
    reserve(index, int(has_row.sum()))
    with (
        open(folder / DOCID_FILE, "w", encoding="utf-8", newline="\n") as docids,
        open(folder / COPIES_FILE, "w", encoding="utf-8", newline="\n") as copies,
    ):
        start = 0
        for vectors, ids in tqdm(rows(), desc="Indexing", unit=" parts", disable=None if show_progress else True):
            index.add(vectors[has_row[start : start + len(ids)]])
            for position, doc_id in enumerate(ids, start=start):
                if has_row[position]:
                    docids.write(f"{doc_id}\n")
                else:
                    copies.write(f"{row_of[first[position]]} {doc_id}\n")
            start += len(ids)
    if index.ntotal == len(first):
        (folder / COPIES_FILE).unlink()


def _write_record(info: IndexInfo, folder: Path) -> IndexInfo:
    """Write ``effir.json`` with the hashes of the files beside it, and return what it says."""
    copies = folder / COPIES_FILE
    packages = (*PACKAGES, *packages_of(info.backend))
    info = replace(
        info,
        index_sha256=file_sha256(folder / INDEX_FILE),
        docid_sha256=file_sha256(folder / DOCID_FILE),
        copies_sha256=file_sha256(copies) if copies.is_file() else "",
        created=datetime.now(UTC).isoformat(timespec="seconds"),
        versions={"python": platform.python_version()} | {package: version(package) for package in packages},
    )
    text = json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n"
    (folder / INFO_FILE).write_text(text, encoding="utf-8", newline="\n")
    return info


def check_output(index_dir: Path, settings: IndexSettings) -> None:
    """Raise FileExistsError if there is something under the name of the new folder that must not be replaced."""
    if not settings.overwrite and (index_dir / INDEX_FILE).is_file():
        raise FileExistsError(f"{index_dir}: an index is there already; choose another --output or --overwrite")
    refuse_existing(index_dir, replaces=_replaceable(settings))


def _replaceable(settings: IndexSettings) -> tuple[str, ...]:
    """The files an existing folder may lose; one that holds anything else is no index, and never replaced."""
    return (INDEX_FILE, DOCID_FILE, COPIES_FILE, INFO_FILE) if settings.overwrite else ()
