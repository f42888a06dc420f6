"""Documents into a folder that Pyserini opens, with a record of what it was built from; reading such a folder."""

import json
import logging
import platform
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import faiss
import numpy as np
import torch
from tqdm import tqdm

from effir_search.encoding.config import EncoderConfig
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.reading import file_sha256, read_json
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
from effir_search.indexing.store import PART_SIZE, WHOLE, Shard, Store, encode_corpus, number_of_parts, settings_of
from effir_search.indexing.workers import run_workers
from effir_search.model.checkpoint import dtype_name
from effir_search.text.corpus import CorpusSummary, Document, read_corpus, scan_corpus

logger = logging.getLogger(__name__)

INDEX_FILE, DOCID_FILE, INFO_FILE = "index", "docid", "effir.json"
PACKAGES = ("effir_search", "torch", "transformers", "faiss-cpu", "tokenizers")

# Yields ``(vectors, ids)`` block by block, from the first row each time it is called.
Rows = Callable[[], Iterator[tuple[np.ndarray, list[str]]]]


@dataclass(frozen=True)
class IndexInfo:
    """What ``effir.json`` says: what an index was built from, and the hashes of its files.

    Attributes:
        model: Folder or hub name the encoder was loaded from.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        encoder: The ``EncoderConfig`` of the documents' vectors, and of the queries to come.
        dtype: Of the transformer's arithmetic, as torch names it.
        dimension: Components of a vector.
        num_documents: Those of the corpus; of an HNSW, equal vectors are one row, see ``copies``.
        num_empty: Documents without any text; they are encoded and counted all the same.
        num_truncated: Documents longer than the encoder's max_length.
        num_skipped: Bad lines of the corpus that were left out.
        corpus: Where the documents came from, None if they came from a program.
        corpus_fields: JSON fields that were read, None = the default ones.
        corpus_id_field: JSON field that was the id, None = the default.
        corpus_sha256: See ``corpus.CorpusHasher``.
        kind: FAISS factory string.
        train_size: Vectors that an approximate kind was trained on.
        index_sha256: Of the file "index".
        docid_sha256: Of the file "docid".
        copies_sha256: Of the file "copies", empty where there is none.
        created: UTC time, ISO 8601.
        versions: Of Python and of the packages that the vectors depend on.
        stock_architecture: Whether the model's own code, if it has any, was passed over, see ``Encoder``.
    """

    model: str
    model_sha256: str
    encoder: EncoderConfig
    dtype: str
    dimension: int
    num_documents: int
    num_empty: int
    num_truncated: int
    num_skipped: int
    corpus: str | None
    corpus_fields: list[str] | None
    corpus_sha256: str
    corpus_id_field: str | None = None
    kind: str = "Flat"
    train_size: int = 0
    index_sha256: str = ""
    docid_sha256: str = ""
    copies_sha256: str = ""
    created: str = ""
    versions: dict[str, str] | None = None
    stock_architecture: bool = False


def build_index(
    documents: Iterable[Document],
    encoder: Encoder,
    index_dir: Path,
    *,
    kind: str = "Flat",
    train_size: int | None = None,
    shard: Shard = WHOLE,
    restart: bool = False,
    keep_embeddings: bool = False,
    overwrite: bool = False,
    num_documents: int | None = None,
    num_skipped: int = 0,
    corpus: str | Path | None = None,
    corpus_fields: list[str] | None = None,
    corpus_id_field: str | None = None,
    corpus_sha256: str | None = None,
) -> int:
    """Encode documents into an inner-product index in Pyserini's layout and return their number.

    The folder appears whole or not at all. It holds ``index`` (``faiss.write_index``), ``docid`` (one id a line, in row
    order) and ``effir.json`` (see ``IndexInfo``). For an encoder whose similarity is cosine, vectors have length 1.
    Until it is there, the vectors are in the store ``NAME.parts``, from which the same call continues after a stop.

    Args:
        documents: Read once, in order; ids must be unique.
        encoder: Turns them into vectors.
        index_dir: The new folder.
        kind: FAISS factory string, see ``kinds``.
        train_size: Vectors that a kind is trained on; None = see ``faiss_kinds.training_size``.
        shard: The share of the documents that this call encodes; the call that completes the store writes the index.
        restart: Discard what an earlier call left in the store.
        keep_embeddings: Keep the store, now and whenever an index is built from it.
        overwrite: Replace an existing index, once the new one is complete.
        num_documents: How many there are: for the time left in the progress bar, and needed for shards.
        num_skipped: Bad lines that ``documents`` leaves out, for the record.
        corpus: Where they come from, for the record and for ``verify_index``.
        corpus_fields: The fields that were read, likewise.
        corpus_id_field: The field that was the id, likewise.
        corpus_sha256: Hash of all documents, if known: another corpus is then noticed before it is read.

    Returns:
        The number of documents in the index, or 0 if parts of other shards are still missing, or their job wrote it.

    Raises:
        ValueError: No documents, a repeated id, a vector that is not finite, a store of another job, an unknown kind.
        OSError: The folder exists or cannot be written, or another job is at work on it.
    """
    new_index(kind, encoder.dimension)
    store, before = store_of(index_dir), _written_at(index_dir)
    if shard.count > 1 and num_documents is not None and not shard.parts(number_of_parts(num_documents)):
        return 0
    if not overwrite and _is_built(index_dir, encoder, kind, corpus_sha256):
        num_indexed = read_index_info(index_dir).num_documents
        # What a job leaves that was stopped between the index and the end: all parts, or in the middle of that, none.
        whole = len(store.parts()) in (0, number_of_parts(num_indexed))
        left = store.is_there() and not store.is_kept() and whole
        if left:
            _remove_left(store)
        if left or shard.count > 1:  # the other shards' jobs needed nothing of this one
            return num_indexed if shard.count == 1 else 0
    replaced = _replaced(overwrite, index_dir)
    refuse_existing(index_dir, replaces=replaced)
    if restart:
        _discard(store, shard)
    if num_documents is not None:
        _announce(kind, encoder.dimension, num_documents, train_size, shard=shard)
    with store.at_work(shard):
        store.begin(settings_of(encoder, corpus_sha256))
        try:
            num_parts, found_sha256 = encode_corpus(documents, encoder, store, shard=shard, num_documents=num_documents)
            if corpus_sha256 not in (None, found_sha256):
                raise UserError(f"{corpus}: its documents changed while they were read; --restart begins anew")
            if num_parts == 0:
                raise UserError(f"{corpus or 'corpus'}: no documents")
        except BaseException:
            if shard.count == 1 and not store.parts():
                store.remove()
            raise
        with store.finishing() as there:
            if not there or len(store.parts()) < num_parts:
                return 0
            if _written_at(index_dir) != before and _is_built(index_dir, encoder, kind, found_sha256):
                return 0  # another shard's job wrote it while this one waited for its turn
            records = store.parts().values()
            info = IndexInfo(
                model=absolute_name(encoder.name),
                model_sha256=encoder.weights_sha256,
                encoder=encoder.config,
                dtype=dtype_name(encoder.dtype),
                dimension=encoder.dimension,
                num_documents=sum(part.num_documents for part in records),
                num_empty=sum(part.num_empty for part in records),
                num_truncated=sum(part.num_truncated for part in records),
                num_skipped=num_skipped,
                corpus=absolute_name(str(corpus)) if corpus is not None else None,
                corpus_fields=corpus_fields,
                corpus_id_field=corpus_id_field,
                corpus_sha256=found_sha256,
                kind=kind,
                stock_architecture=encoder.stock_architecture,
            )
            if num_documents is None:
                _announce(kind, info.dimension, info.num_documents, train_size)
            if keep_embeddings:
                store.keep()
            _write_folder(_rows_of_store(store, encoder.config), info, index_dir, replaced, train_size=train_size)
            if not store.is_kept():
                store.remove()
    return info.num_documents


def _is_built(index_dir: Path, encoder: Encoder, kind: str, corpus_sha256: str | None) -> bool:
    """Whether a folder holds the index of this corpus, encoder and kind."""
    info = read_index_info(index_dir) if (index_dir / INDEX_FILE).is_file() else None
    return info is not None and (
        (info.corpus_sha256, info.model_sha256, info.encoder, info.dtype, info.kind)
        == (corpus_sha256, encoder.weights_sha256, encoder.config, dtype_name(encoder.dtype), kind)
    )


def _written_at(index_dir: Path) -> int | None:
    """Return when the index in a folder was written, which tells it from one that replaces it; None without one."""
    file = index_dir / INDEX_FILE
    return file.stat().st_mtime_ns if file.is_file() else None


def _remove_left(store: Store) -> None:
    """Remove the store of an index that is there: what a job had left to do that was stopped after it wrote it."""
    with store.finishing() as there:
        if there:
            logger.info("the index is complete already; its job was stopped before it removed %s", store.path)
            store.remove()


def store_of(index_dir: Path) -> Store:
    """Return the store that belongs to an index folder, ``NAME.parts`` beside it; it need not exist."""
    return Store(index_dir.with_name(f"{index_dir.name}.parts"))


def describe_store(store: Store) -> str:
    """Return what a store is: of a job that is not finished, and how far that is, or kept beside its index."""
    parts, index_dir = store.parts().values(), store.path.with_name(store.path.name.removesuffix(".parts"))
    num_documents = sum(part.num_documents for part in parts)
    info = read_index_info(index_dir) if index_dir != store.path else None
    if info is not None and info.num_documents == num_documents:
        return f"the embeddings that were kept of the index {index_dir.name} beside it"
    done = f"{num_documents:,} documents in {len(parts):,} parts are encoded, as its manifest says"
    return f"the store of an index job that is not finished: {done}; the same effir index command continues it"


def _rows_of_store(store: Store, config: EncoderConfig) -> Rows:
    return lambda: ((scale(vectors, config), ids) for vectors, ids in store.read_all())


def _write_folder(
    rows: Rows, info: IndexInfo, index_dir: Path, replaced: tuple[str, ...], *, train_size: int | None
) -> IndexInfo:
    """Write an index folder whole, from rows that are read as often as they are needed, a block at a time."""
    num_documents, kind = info.num_documents, info.kind
    size = _train_size(kind, num_documents, train_size)
    index = new_index(kind, info.dimension)
    if not index.is_trained:
        train(index, kind, sample_rows((vectors for vectors, _ in rows()), num_documents, size))
    first = np.arange(num_documents)
    if is_graph(index):
        first = first_of_equal(vector_digests(vectors) for vectors, _ in rows())
    is_node = first == np.arange(num_documents)
    node = np.cumsum(is_node) - 1
    reserve(index, int(is_node.sum()))
    with whole_folder(index_dir, replaces=replaced) as folder:
        with (
            open(folder / DOCID_FILE, "w", encoding="utf-8", newline="\n") as docids,
            open(folder / COPIES_FILE, "w", encoding="utf-8", newline="\n") as copies,
        ):
            start = 0
            for vectors, ids in tqdm(rows(), desc="Indexing", unit=" parts", disable=None if kind != "Flat" else True):
                index.add(vectors[is_node[start : start + len(ids)]])
                for row, doc_id in enumerate(ids, start=start):
                    if is_node[row]:
                        docids.write(f"{doc_id}\n")
                    else:
                        copies.write(f"{node[first[row]]} {doc_id}\n")
                start += len(ids)
        if index.ntotal == num_documents:
            (folder / COPIES_FILE).unlink()
        set_search_parameters(index)  # for Pyserini, which takes them from the file
        try:
            faiss.write_index(index, str(folder / INDEX_FILE))
        except RuntimeError as error:
            raise OSError(
                f"{index_dir}: the index of {num_documents:,} vectors cannot be written; disk full?"
            ) from error
        info = replace(
            info,
            train_size=size,
            index_sha256=file_sha256(folder / INDEX_FILE),
            docid_sha256=file_sha256(folder / DOCID_FILE),
            copies_sha256=file_sha256(folder / COPIES_FILE) if (folder / COPIES_FILE).is_file() else "",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        )
        (folder / INFO_FILE).write_text(
            json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="\n"
        )
    return info


def rebuild_index(
    source_dir: Path,
    index_dir: Path,
    *,
    kind: str,
    train_size: int | None = None,
    overwrite: bool = False,
) -> IndexInfo:
    """Build another kind of index from the vectors of a flat one, without encoding: ``effir index --from``.

    Args:
        source_dir: A Flat index folder of ``build_index``, or one of another kind whose store was kept.
        index_dir: The new folder.
        kind: FAISS factory string, see ``kinds``.
        train_size: Vectors that the kind is trained on; None = see ``faiss_kinds.training_size``.
        overwrite: Replace an existing index, once the new one is complete.

    Raises:
        ValueError: The source does not hold exact vectors, or an unknown kind.
        OSError: A file cannot be read or written.
    """
    replaced = _replaced(overwrite, index_dir)
    refuse_existing(index_dir, replaces=replaced)
    require_index(source_dir)
    info = read_index_info(source_dir)
    if info is None:
        raise UserError(f"{source_dir}: no {INFO_FILE} in it; --from takes an index that effir built")
    new_index(kind, info.dimension)
    rows = _rows_of_flat(source_dir, info) if info.kind == "Flat" else rows_of_kept(source_dir, info)
    _announce(kind, info.dimension, info.num_documents, train_size)
    return _write_folder(rows, replace(info, kind=kind), index_dir, replaced, train_size=train_size)


def rows_of_kept(index_dir: Path, info: IndexInfo) -> Rows:
    """Return the rows of the store that was kept beside an index, having checked that it is that index's."""
    store = store_of(index_dir)
    if (settings := store.settings()) is None:
        raise UserError(
            f"{index_dir}: {info.kind} holds no exact vectors; --from takes a Flat index or kept embeddings"
        )
    of_store = (settings.model_sha256, settings.encoder, settings.dtype, settings.corpus_sha256 or info.corpus_sha256)
    of_index = (info.model_sha256, asdict(info.encoder), info.dtype, info.corpus_sha256)
    num_documents = sum(part.num_documents for part in store.parts().values())
    if of_store != of_index or num_documents != info.num_documents:
        raise UserError(f"{store.path}: its embeddings are not those that {index_dir} was built from")
    return _rows_of_store(store, info.encoder)


def _train_size(kind: str, num_documents: int, asked: int | None) -> int:
    default = training_size(kind, num_documents)
    return default if default == 0 or asked is None else min(num_documents, asked)


def _announce(kind: str, dimension: int, num_documents: int, train_size: int | None, *, shard: Shard = WHOLE) -> None:
    """Say what memory an index takes, once it is sure that there is enough to train it on; of shards the first does."""
    size, wanted = _train_size(kind, num_documents, train_size), well_trained_size(kind)
    check_training(kind, size)
    if shard.number > 0:
        return
    megabytes = memory(kind, dimension, num_documents, size) / 1e6
    trained = f", trained on {size:,} of them," if size else ""
    logger.info(
        "a %s index of %s vectors%s takes about %.1f MB of memory while it is built",
        *(kind, f"{num_documents:,}", trained, megabytes),
    )
    if size < wanted:
        advice = "raise --train-size" if size < num_documents else "a smaller kind, such as SQ8, needs fewer"
        logger.warning(
            "%s is trained on %s vectors where FAISS asks for %s, so it may miss more hits: %s",
            *(kind, f"{size:,}", f"{wanted:,}", advice),
        )


def check_files(index_dir: Path, info: IndexInfo) -> None:
    """Raise ValueError for a file of an index that is not as it was written; all of each is read."""
    files = {INDEX_FILE: info.index_sha256, DOCID_FILE: info.docid_sha256}
    if info.copies_sha256:
        files[COPIES_FILE] = info.copies_sha256
    for name, sha256 in files.items():
        if file_sha256(index_dir / name) != sha256:
            raise UserError(f"{index_dir / name}: its SHA-256 is not the one in {INFO_FILE}; build the index again")


def _rows_of_flat(index_dir: Path, info: IndexInfo, block: int = 4096) -> Rows:
    check_files(index_dir, info)
    index, doc_ids = read_index(index_dir, memory_map=True)
    starts = range(0, index.ntotal, block)
    return lambda: (
        (index.reconstruct_n(start, min(block, index.ntotal - start)), doc_ids[start : start + block])
        for start in starts
    )


@dataclass(frozen=True)
class _Job:
    """A shard of a corpus that was read and checked, and how it is indexed; see ``index_corpus``."""

    corpus: str
    summary: CorpusSummary
    fields: list[str] | None
    id_field: str | None
    skip_bad: bool
    encoder_name: str
    options: dict[str, object]
    threads: int | None
    index_dir: Path
    settings: dict[str, object]
    shard: Shard


def index_corpus(
    corpus: str,
    encoder_name: str,
    index_dir: Path,
    *,
    fields: list[str] | None = None,
    id_field: str | None = None,
    skip_bad: bool = False,
    threads: int | None = None,
    restart: bool = False,
    repair: bool = False,
    overwrite: bool = False,
    kind: str = "Flat",
    train_size: int | None = None,
    shard: Shard = WHOLE,
    devices: Sequence[str] = (),
    keep_embeddings: bool = False,
    **options: object,
) -> IndexInfo | None:
    """Index a corpus: ``effir index``. All of it is read and checked once before the encoding begins.

    A stopped job is continued by the same call, with the arithmetic, threads and batches it was begun with.

    Args:
        corpus: As ``read_corpus`` takes it.
        encoder_name: Model folder or hub name.
        index_dir: The new folder.
        fields: As ``read_corpus`` takes them.
        id_field: Likewise.
        skip_bad: Leave out bad lines, with a warning for each.
        threads: Of torch, in each process; None = those of the job that is continued, or all cores, shared.
        restart: Discard what an earlier call left in the store.
        repair: Encode again what is damaged or missing in the store, instead of raising.
        overwrite: Replace an existing index, once the new one is complete.
        kind: See ``build_index``.
        train_size: See ``build_index``.
        shard: See ``build_index``.
        devices: A process on each of them shares the work; ``["cpu", "cpu"]`` are two on the CPU.
        keep_embeddings: See ``build_index``.
        options: As ``Encoder.from_pretrained`` takes them; None = its default.

    Returns:
        The record of the index, or None if parts of other shards are still missing.

    Raises:
        ValueError: A bad corpus or model, or a store of another job.
        OSError: A file cannot be read or written.
    """
    store = store_of(index_dir)
    if shard.count == 1 and not (store.is_there() and not store.is_kept()):
        refuse_existing(index_dir, replaces=_replaced(overwrite, index_dir))
    training_size(kind, 0)  # an unknown kind is an error before the corpus is read
    summary = scan_corpus(corpus, fields=fields, id_field=id_field, skip_bad=skip_bad)
    if restart:
        _discard(store, shard)
    elif repair and store.is_there():
        with store.at_work(shard):
            store.forget_damaged(shard.parts(number_of_parts(summary.num_documents)))
    for complaint in summary.bad_lines:
        logger.warning("skipped %s", complaint)
    given = {name: value for name, value in options.items() if value is not None}
    if (begun := store.settings()) is not None:
        given = {"dtype": begun.dtype, "batch_tokens": begun.batch_tokens} | given
        threads = threads or begun.threads
        if given.get("device", "auto") == "auto" and begun.device == "cpu":
            given["device"] = "cpu"
    if len(devices) == 1:
        given["device"] = devices[0]
    settings = {
        "kind": kind,
        "train_size": train_size,
        "overwrite": overwrite,
        "keep_embeddings": keep_embeddings,
    }
    job = _Job(corpus, summary, fields, id_field, skip_bad, encoder_name, given, threads, index_dir, settings, shard)
    if len(devices) > 1:
        _index_with_workers(job, devices)
    else:
        _index_shard(job)
    # The job that completes the store writes the index, and removes the store unless it is to be kept.
    num_encoded, num_parts = len(store.parts()), number_of_parts(summary.num_documents)
    complete = store.settings() is None or num_encoded == num_parts
    info = read_index_info(index_dir) if complete else None
    if info is None:
        logger.warning(
            "no index was written, since other shards than this, %d of %d, are not encoded yet (%d of %d parts are); "
            "the job that encodes the last part writes %s",
            *(shard.number, shard.count, num_encoded, num_parts, index_dir),
        )
    return info


def _discard(store: Store, shard: Shard) -> None:
    if shard.count > 1:
        raise UserError(f"--restart would discard the other shards' parts; delete {store.path} before the first job")
    if store.path.is_dir():
        with store.at_work(shard):
            store.clear()


def _index_shard(job: _Job) -> None:
    """Index a shard in this process."""
    if job.threads is not None:
        torch.set_num_threads(job.threads)
    encoder = Encoder.from_pretrained(job.encoder_name, **job.options).pack()
    logger.info("%d documents, encoded in %s on %s", job.summary.num_documents, encoder.dtype, encoder.device)
    on_bad_line = (lambda _complaint: None) if job.skip_bad else None
    build_index(
        read_corpus(job.corpus, fields=job.fields, id_field=job.id_field, on_bad_line=on_bad_line),
        encoder,
        job.index_dir,
        shard=job.shard,
        num_documents=job.summary.num_documents,
        num_skipped=len(job.summary.bad_lines),
        corpus=job.corpus,
        corpus_fields=job.fields,
        corpus_id_field=job.id_field,
        corpus_sha256=job.summary.sha256,
        **job.settings,
    )


def _index_with_workers(job: _Job, devices: Sequence[str]) -> None:
    """Divide a shard among processes, one on each device, and show how far they are together."""
    threads = job.threads or max(1, torch.get_num_threads() // max(1, devices.count("cpu")))
    jobs = [
        replace(
            job,
            options=job.options | {"device": device},
            threads=threads,
            shard=Shard(job.shard.number * len(devices) + number, job.shard.count * len(devices)),
        )
        for number, device in enumerate(devices)
    ]
    store, total = store_of(job.index_dir), job.summary.num_documents
    blocks = [worker.shard.parts(number_of_parts(total)) for worker in jobs]
    mine = range(blocks[0].start, blocks[-1].stop)
    total = min(mine.stop * PART_SIZE, total) - mine.start * PART_SIZE

    def num_encoded() -> int:
        return sum(part.num_documents for number, part in store.parts().items() if number in mine)

    with tqdm(total=total, initial=num_encoded(), desc="Encoding", unit=" documents", disable=None) as progress:
        run_workers(_index_shard, jobs, watch=lambda: progress.update(max(0, num_encoded() - progress.n)))
        progress.update(total - progress.n)


def describe_built(info: IndexInfo | None, index_dir: Path) -> str:
    """Return one line about what ``index_corpus`` or ``rebuild_index`` did."""
    if info is None:
        return f"this shard is encoded; the job that encodes the last part writes {index_dir}"
    counts = {
        "empty": info.num_empty,
        f"cut at {info.encoder.max_length} tokens": info.num_truncated,
        "bad lines skipped": info.num_skipped,
    }
    told = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{info.num_documents} documents{told} -> {index_dir}"


def _replaced(overwrite: bool, index_dir: Path) -> tuple[str, ...]:
    """The files an existing folder may lose; one that holds anything else is no index, and never replaced."""
    if not overwrite and (index_dir / INDEX_FILE).is_file():
        raise FileExistsError(f"{index_dir}: an index is there already; choose another --output or --overwrite")
    return (INDEX_FILE, DOCID_FILE, COPIES_FILE, INFO_FILE) if overwrite else ()


def scale(embeddings: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Return the vectors whose inner product is the model's similarity: of length 1 for cosine, else as they are."""
    if config.similarity == "dot" or (config.normalize and config.dimension is None):
        return embeddings
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(lengths == 0, 1, lengths)


def read_index(index_dir: Path, *, memory_map: bool = False) -> tuple[faiss.Index, list[str]]:
    """Return the FAISS index of a folder, and the document id of each row.

    Args:
        index_dir: The folder.
        memory_map: Leave the vectors on the disk until they are asked for.

    Raises:
        OSError: No such folder, or a file of it cannot be read.
        ValueError: The index is cut, foreign, not an inner-product one, or has another number of rows than ids.
    """
    require_index(index_dir)
    try:
        index = faiss.read_index(str(index_dir / INDEX_FILE), faiss.IO_FLAG_MMAP if memory_map else 0)
    except (RuntimeError, MemoryError) as error:
        with open(index_dir / INDEX_FILE, "rb"):  # an unreadable file is an OSError of its own
            raise UserError(f"{index_dir / INDEX_FILE}: not a FAISS index, or a cut one; build it again") from error
    if not hasattr(index, "metric_type") or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise UserError(
            f"{index_dir / INDEX_FILE}: its metric is not the inner product, so its scores are no similarities"
        )
    try:
        with open(index_dir / DOCID_FILE, encoding="utf-8") as file:
            doc_ids = [line.rstrip() for line in file]  # as Pyserini reads them
    except UnicodeDecodeError as error:
        raise UserError(f"{index_dir / DOCID_FILE}: invalid UTF-8 at byte {error.start}") from error
    if len(doc_ids) != index.ntotal:
        raise UserError(f"{index_dir}: {index.ntotal} vectors and {len(doc_ids)} document ids; build the index again")
    return index, doc_ids


def require_index(index_dir: Path) -> None:
    """Raise FileNotFoundError unless the folder holds an index in Pyserini's layout, ValueError if it is a store."""
    if (store := Store(index_dir)).is_there():
        raise UserError(f"{index_dir}: is no index but {describe_store(store)}")
    if not index_dir.exists():
        store = store_of(index_dir)
        beside = f"; {store.path.name} beside it is {describe_store(store)}" if store.is_there() else ""
        raise FileNotFoundError(f"{index_dir}: no such folder{beside}")
    for name in (INDEX_FILE, DOCID_FILE):
        if not (index_dir / name).is_file():
            raise FileNotFoundError(f"{index_dir}: no file {name!r} in it, so it is not a FAISS index folder")


def read_index_info(index_dir: Path) -> IndexInfo | None:
    """Return what ``effir.json`` says, or None for a folder without one, as Pyserini makes them.

    Raises:
        ValueError: The file is damaged or of another version.
    """
    path = index_dir / INFO_FILE
    if not path.is_file():
        return None
    record = read_json(path)
    try:
        return IndexInfo(**{**record, "encoder": EncoderConfig(**record["encoder"])})
    except (TypeError, KeyError) as error:
        raise UserError(f"{path}: not a record of this version of effir_search ({error})") from error


def check_encoder(info: IndexInfo, encoder: Encoder, index_dir: Path) -> None:
    """Raise ValueError, naming the field and both values, if an encoder is not the one the index was built with."""
    pairs = [("weights", info.model_sha256, encoder.weights_sha256), ("dimension", info.dimension, encoder.dimension)]
    ours, theirs = asdict(info.encoder), asdict(encoder.config)
    for name, of_index, of_encoder in pairs + [(name, ours[name], theirs[name]) for name in ours]:
        if of_index != of_encoder:
            advice = "search with what the index has"
            if name == "weights":
                advice = "give the model that the index was made with as --encoder"
                # The first digits tell two hashes apart, and the advice still fits the line.
                of_index, of_encoder = of_index[:12], of_encoder[:12]
            raise UserError(
                f"{index_dir}: this encoder is not the index's: {name} is {of_index!r} in the index "
                f"and {of_encoder!r} in the encoder; {advice}, or index again"
            )


def absolute_name(name: str) -> str:
    """Return a path that still holds when the next command is run elsewhere; hub names and ids stay as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name
