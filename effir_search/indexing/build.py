"""Documents, or the vectors of another index, into the folder of an index."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import torch
from tqdm import tqdm

from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.indexing.encode import CorpusRead, encode_corpus
from effir_search.indexing.faiss_kinds import new_index, training_size
from effir_search.indexing.fastest import TRIED_TEXTS, fastest_options
from effir_search.indexing.folder import announce, check_output, exact_rows, rows_of_store, write_folder
from effir_search.indexing.index_record import (
    INDEX_FILE,
    INFO_FILE,
    IndexInfo,
    absolute_name,
    read_index_info,
    require_index,
    store_of,
)
from effir_search.indexing.resume import StoreSettings, settings_of
from effir_search.indexing.shard import WHOLE, Shard
from effir_search.indexing.store import Store, documents_in, number_of_parts
from effir_search.indexing.workers import run_workers
from effir_search.model.checkpoint import dtype_name
from effir_search.settings import EncoderOptions, IndexSettings
from effir_search.text.corpus import CorpusSummary, Document, document_text, read_corpus, scan_corpus

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = IndexSettings()


@dataclass(frozen=True)
class Source:
    """Where documents come from, as far as that is known before they are read.

    Attributes:
        corpus: The corpus, for the record and for ``verify_index``; None = a program.
        num_documents: How many there are: for the time left in the progress bar, and needed for shards.
        num_skipped: Bad lines that are left out, for the record.
        sha256: Hash of all documents; if it is known, another corpus is noticed before it is read.
    """

    corpus: str | Path | None = None
    num_documents: int | None = None
    num_skipped: int = 0
    sha256: str | None = None


A_PROGRAM = Source()


def build_index(
    documents: Iterable[Document],
    encoder: Encoder,
    index_dir: Path,
    settings: IndexSettings = DEFAULT_SETTINGS,
    *,
    shard: Shard = WHOLE,
    source: Source = A_PROGRAM,
) -> int:
    """Encode documents into an inner-product index in Pyserini's layout and return their number.

    The folder appears whole or not at all. It holds ``index`` (``faiss.write_index``), ``docid`` (one id a line, in row
    order) and ``effir.json`` (see ``IndexInfo``). For an encoder whose similarity is cosine, vectors have length 1.
    Until it is there, the vectors are in the store ``NAME.parts``, from which the same call continues after a stop.

    Args:
        documents: Read once, in order; ids must be unique.
        encoder: Turns them into vectors.
        index_dir: The new folder.
        settings: What the index becomes, and what happens to what is there. How a corpus is read is only recorded:
            that, the repair of a store and the threads are matters of ``index_corpus``.
        shard: The share of the documents that this call encodes; the call that completes the store writes the index.
        source: Where the documents come from.

    Returns:
        The number of documents in the index, or 0 if parts of other shards are still missing, or their job wrote it.

    Raises:
        ValueError: No documents, a repeated id, a vector that is not finite, a store of another job, an unknown kind.
        OSError: The folder exists or cannot be written, or another job is at work on it.
    """
    new_index(settings.kind, encoder.dimension)
    store, written_at = store_of(index_dir), _written_at(index_dir)
    if shard.count > 1 and source.num_documents is not None and not shard.parts(number_of_parts(source.num_documents)):
        return 0
    if not settings.overwrite and _is_built(index_dir, encoder, settings.kind, source.sha256):
        num_indexed = read_index_info(index_dir).num_documents
        # The other shards' jobs needed nothing of this one.
        if _is_removed(store, num_indexed) or shard.count > 1:
            return num_indexed if shard.count == 1 else 0
    check_output(index_dir, settings)
    if settings.restart:
        _discard(store, shard)
    if source.num_documents is not None:
        announce(encoder.dimension, source.num_documents, settings, shard=shard)
    with store.at_work(shard):
        corpus = _fill_store(documents, encoder, store, shard, source)
        with store.finishing() as exists:
            if not exists or len(store.parts()) < corpus.num_parts:
                return 0
            if _written_at(index_dir) != written_at and _is_built(index_dir, encoder, settings.kind, corpus.sha256):
                return 0  # another shard's job wrote it while this one waited for its turn
            return _write_index(store, encoder, index_dir, settings, source=source, corpus_sha256=corpus.sha256)


def _is_built(index_dir: Path, encoder: Encoder, kind: str, corpus_sha256: str | None) -> bool:
    """Whether a folder holds the index of this corpus, encoder and kind."""
    info = read_index_info(index_dir) if (index_dir / INDEX_FILE).is_file() else None
    return info is not None and (
        (info.corpus_sha256, info.model_sha256, info.encoder, info.dtype, info.backend, info.kind)
        == (corpus_sha256, encoder.weights_sha256, encoder.config, dtype_name(encoder.dtype), encoder.backend, kind)
    )


def _written_at(index_dir: Path) -> int | None:
    """Return when the index in a folder was written, which tells it from one that replaces it; None without one."""
    file = index_dir / INDEX_FILE
    return file.stat().st_mtime_ns if file.is_file() else None


def _is_removed(store: Store, num_indexed: int) -> bool:
    """Remove the store of an index that is there, if a job was stopped before it did; return whether there was one."""
    # Such a job leaves all parts, or if it was stopped while it removed them, none.
    is_whole = len(store.parts()) in (0, number_of_parts(num_indexed))
    if not store.is_there() or store.is_kept() or not is_whole:
        return False
    with store.finishing() as exists:
        if exists:
            logger.info("the index is complete already; its job was stopped before it removed %s", store.path)
            store.remove()
    return True


def _discard(store: Store, shard: Shard) -> None:
    """Forget all that a store has."""
    if shard.count > 1:
        raise UserError(f"--restart would discard the other shards' parts; delete {store.path} before the first job")
    if store.path.is_dir():
        with store.at_work(shard):
            store.clear()


def _fill_store(
    documents: Iterable[Document], encoder: Encoder, store: Store, shard: Shard, source: Source
) -> CorpusRead:
    """Encode what a store lacks of a shard; one that is left without any part is removed."""
    store.begin(settings_of(encoder, source.sha256))
    try:
        corpus = encode_corpus(documents, encoder, store, shard=shard, num_documents=source.num_documents)
        if source.sha256 not in (None, corpus.sha256):
            raise UserError(f"{source.corpus}: its documents changed while they were read; --restart begins anew")
        if corpus.num_parts == 0:
            raise UserError(f"{source.corpus or 'corpus'}: no documents")
    except BaseException:
        if shard.count == 1 and not store.parts():
            store.remove()
        raise
    return corpus


def _write_index(
    store: Store, encoder: Encoder, index_dir: Path, settings: IndexSettings, *, source: Source, corpus_sha256: str
) -> int:
    """Write the index of a store whose parts are all there, and remove the store unless it is kept."""
    parts = store.parts().values()
    info = IndexInfo(
        model=absolute_name(encoder.name),
        model_sha256=encoder.weights_sha256,
        encoder=encoder.config,
        dtype=dtype_name(encoder.dtype),
        dimension=encoder.dimension,
        num_documents=sum(part.num_documents for part in parts),
        num_empty=sum(part.num_empty for part in parts),
        num_truncated=sum(part.num_truncated for part in parts),
        num_skipped=source.num_skipped,
        corpus=absolute_name(str(source.corpus)) if source.corpus is not None else None,
        corpus_fields=list(settings.fields) or None,
        corpus_id_field=settings.id_field,
        corpus_sha256=corpus_sha256,
        kind=settings.kind,
        stock_architecture=encoder.stock_architecture,
        backend=encoder.backend,
    )
    if source.num_documents is None:
        announce(info.dimension, info.num_documents, settings)
    if settings.keep_embeddings:
        store.keep()
    write_folder(rows_of_store(store, encoder.config), info, index_dir, settings)
    if not store.is_kept():
        store.remove()
    return info.num_documents


def rebuild_index(source_dir: Path, index_dir: Path, settings: IndexSettings) -> IndexInfo:
    """Build another kind of index from the vectors of a flat one, without encoding: ``effir index --from``.

    Args:
        source_dir: A Flat index folder of ``build_index``, or one of another kind whose store was kept.
        index_dir: The new folder.
        settings: Its kind, the vectors it is trained on, and whether an index that is there is replaced.

    Raises:
        ValueError: The source does not hold exact vectors, or an unknown kind.
        OSError: A file cannot be read or written.
    """
    check_output(index_dir, settings)
    require_index(source_dir)
    info = read_index_info(source_dir)
    if info is None:
        raise UserError(f"{source_dir}: no {INFO_FILE} in it; --from takes an index that effir built")
    new_index(settings.kind, info.dimension)
    rows = exact_rows(source_dir)
    announce(info.dimension, info.num_documents, settings)
    return write_folder(rows, info, index_dir, settings)


@dataclass(frozen=True)
class _Job:
    """A shard of a corpus that was read and checked, and how it is indexed; see ``index_corpus``."""

    corpus: str
    summary: CorpusSummary
    encoder_name: str
    index_dir: Path
    settings: IndexSettings
    options: EncoderOptions
    shard: Shard


def index_corpus(
    corpus: str,
    encoder_name: str,
    index_dir: Path,
    settings: IndexSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    *,
    shard: Shard = WHOLE,
    devices: Sequence[str] = (),
) -> IndexInfo | None:
    """Index a corpus: ``effir index``. All of it is read and checked once before the encoding begins.

    A stopped job is continued by the same call, with the arithmetic, threads and batches it was begun with.

    Args:
        corpus: As ``read_corpus`` takes it.
        encoder_name: Model folder or hub name.
        index_dir: The new folder.
        settings: How the corpus is read, and what the index becomes.
        options: How the model is loaded and run.
        shard: See ``build_index``.
        devices: A process on each of them shares the work; ``["cpu", "cpu"]`` are two on the CPU.

    Returns:
        The record of the index, or None if parts of other shards are still missing.

    Raises:
        ValueError: A bad corpus or model, or a store of another job.
        OSError: A file cannot be read or written.
    """
    store = store_of(index_dir)
    if shard.count == 1 and not (store.is_there() and not store.is_kept()):
        check_output(index_dir, settings)
    training_size(settings.kind, 0)  # an unknown kind is an error before the corpus is read
    summary = scan_corpus(
        corpus, fields=settings.fields or None, id_field=settings.id_field, skip_bad=settings.skip_bad
    )
    if settings.restart:
        _discard(store, shard)
    elif settings.repair and store.is_there():
        with store.at_work(shard):
            store.forget_damaged(shard.parts(number_of_parts(summary.num_documents)))
    for complaint in summary.bad_lines:
        logger.warning("skipped %s", complaint)
    settings = replace(settings, restart=False, repair=False)
    if (begun := store.settings()) is not None:
        settings, options = settings.with_defaults(threads=begun.threads), _as_begun(options, begun)
    if devices:  # each worker has its own; the first one is where backends are tried
        options = replace(options, device=devices[0])
    if options.backend == "auto":
        options = _with_fastest(corpus, encoder_name, settings, options)
    job = _Job(corpus, summary, encoder_name, index_dir, settings, options, shard)
    if len(devices) > 1:
        _index_with_workers(job, devices)
    else:
        _index_shard(job)
    return _built(job)


def _as_begun(options: EncoderOptions, begun: StoreSettings) -> EncoderOptions:
    """Return the options with those of the job that began a store, where nothing else is asked for."""
    if options.backend == "auto":
        options = replace(options, backend=begun.backend)
    options = options.with_defaults(batch_tokens=begun.batch_tokens, backend=begun.backend)
    if options.backend == begun.backend:  # another one may not compute in that
        options = options.with_defaults(dtype=begun.dtype)
    return replace(options, device="cpu") if options.device == "auto" and begun.device == "cpu" else options


def _with_fastest(corpus: str, encoder_name: str, settings: IndexSettings, options: EncoderOptions) -> EncoderOptions:
    """Return the options with the backend that encodes the first documents fastest."""
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    documents = read_corpus(
        corpus, fields=settings.fields or None, id_field=settings.id_field, on_bad_line=lambda _complaint: None
    )
    texts = [document_text(document) for document in islice(documents, TRIED_TEXTS)]
    return fastest_options(encoder_name, texts, options)


def _built(job: _Job) -> IndexInfo | None:
    """Return the record of a job's index, or None, with a warning, if parts of other shards are still missing."""
    store, index_dir, shard = store_of(job.index_dir), job.index_dir, job.shard
    # The job that completes the store writes the index, and removes the store unless it is to be kept.
    num_encoded, num_parts = len(store.parts()), number_of_parts(job.summary.num_documents)
    is_complete = store.settings() is None or num_encoded == num_parts
    info = read_index_info(index_dir) if is_complete else None
    if info is None:
        logger.warning(
            "no index was written, since other shards than this, %d of %d, are not encoded yet (%d of %d parts are); "
            "the job that encodes the last part writes %s",
            *(shard.number, shard.count, num_encoded, num_parts, index_dir),
        )
    return info


def _index_shard(job: _Job) -> None:
    """Index a shard in this process."""
    settings, summary = job.settings, job.summary
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    encoder = Encoder.from_pretrained(job.encoder_name, job.options).pack()
    by = "" if encoder.backend == "torch" else f" by {encoder.backend}"
    logger.info("%d documents, encoded in %s on %s%s", summary.num_documents, encoder.dtype, encoder.device, by)
    on_bad_line = (lambda _complaint: None) if settings.skip_bad else None
    documents = read_corpus(
        job.corpus, fields=settings.fields or None, id_field=settings.id_field, on_bad_line=on_bad_line
    )
    source = Source(job.corpus, summary.num_documents, len(summary.bad_lines), summary.sha256)
    build_index(documents, encoder, job.index_dir, settings, shard=job.shard, source=source)


def _index_with_workers(job: _Job, devices: Sequence[str]) -> None:
    """Divide a shard among processes, one on each device, and show how far they are together."""
    threads = job.settings.threads or max(1, torch.get_num_threads() // max(1, devices.count("cpu")))
    jobs = [
        replace(
            job,
            options=replace(job.options, device=device),
            settings=replace(job.settings, threads=threads),
            shard=Shard(job.shard.number * len(devices) + number, job.shard.count * len(devices)),
        )
        for number, device in enumerate(devices)
    ]
    store, num_documents = store_of(job.index_dir), job.summary.num_documents
    blocks = [worker.shard.parts(number_of_parts(num_documents)) for worker in jobs]
    numbers = range(blocks[0].start, blocks[-1].stop)
    total = documents_in(numbers, num_documents)

    def num_encoded() -> int:
        return sum(part.num_documents for number, part in store.parts().items() if number in numbers)

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
    notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{info.num_documents} documents{notes} -> {index_dir}"
