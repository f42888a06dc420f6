"""Documents into a folder that Pyserini opens, with a record of what it was built from; reading such a folder."""

import json
import logging
import platform
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from itertools import islice
from pathlib import Path

import faiss
import numpy as np
from tqdm import tqdm

from effir_search.corpus import CorpusHasher, Document, document_text, read_corpus, scan_corpus
from effir_search.encoder import Encoder, EncoderConfig
from effir_search.files import refuse_existing, whole_folder
from effir_search.model.checkpoint import file_sha256, read_json

logger = logging.getLogger(__name__)

INDEX_FILE, DOCID_FILE, INFO_FILE = "index", "docid", "effir.json"
# Documents that are encoded together; a fixed number, so that the same corpus is always batched alike.
PART_SIZE = 1024
PACKAGES = ("effir_search", "torch", "transformers", "faiss-cpu", "tokenizers")


@dataclass(frozen=True)
class IndexInfo:
    """What ``effir.json`` says: what an index was built from, and the hashes of its two files.

    Attributes:
        model: Folder or hub name the encoder was loaded from.
        model_sha256: See ``model.checkpoint.weights_sha256``.
        encoder: The ``EncoderConfig`` of the documents' vectors, and of the queries to come.
        dtype: Of the transformer's arithmetic, as torch names it.
        dimension: Components of a vector.
        num_documents: Rows of the index.
        num_empty: Documents without any text; they are encoded and counted all the same.
        num_truncated: Documents longer than the encoder's max_length.
        num_skipped: Bad lines of the corpus that were left out.
        corpus: Where the documents came from, None if they came from a program.
        corpus_fields: JSON fields that were read, None = the default ones.
        corpus_sha256: See ``corpus.CorpusHasher``.
        index_sha256: Of the file "index".
        docid_sha256: Of the file "docid".
        kind: FAISS factory string.
        created: UTC time, ISO 8601.
        versions: Of Python and of the packages that the vectors depend on.
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
    index_sha256: str
    docid_sha256: str
    kind: str
    created: str
    versions: dict[str, str]


def build_index(
    documents: Iterable[Document],
    encoder: Encoder,
    index_dir: Path,
    *,
    num_documents: int | None = None,
    num_skipped: int = 0,
    corpus: str | Path | None = None,
    corpus_fields: list[str] | None = None,
    overwrite: bool = False,
) -> int:
    """Encode documents into a flat inner-product index in Pyserini's layout and return their number.

    The folder appears whole or not at all. It holds ``index`` (``faiss.write_index``), ``docid`` (one id a line, in row
    order) and ``effir.json`` (see ``IndexInfo``). For an encoder whose similarity is cosine, vectors have length 1.

    Args:
        documents: Read once, in order; ids must be unique.
        encoder: Turns them into vectors.
        index_dir: The new folder.
        num_documents: How many there will be, for the time left in the progress bar.
        num_skipped: Bad lines that ``documents`` leaves out, for the record.
        corpus: Where they come from, for the record and for ``verify_index``.
        corpus_fields: The fields that were read, likewise.
        overwrite: Replace an existing index, once the new one is complete.

    Raises:
        ValueError: No documents, a repeated id, or a vector that is not finite.
        OSError: The folder exists or cannot be written.
    """
    hasher = CorpusHasher()
    index = faiss.IndexFlatIP(encoder.dimension)
    doc_ids: dict[str, None] = {}
    num_empty = num_truncated = 0
    with whole_folder(index_dir, replaces=_replaced(overwrite, index_dir)) as folder:
        with tqdm(total=num_documents, desc="Encoding", unit=" documents", disable=None, smoothing=0.1) as progress:
            for part in parts(documents):
                texts = [document_text(document) for document in part]
                encoded = encoder.encode(texts, prompt=encoder.config.document_prompt)
                index.add(scale(encoded.embeddings, encoder.config))
                num_truncated += encoded.num_truncated
                num_empty += texts.count("")
                for document in part:
                    if document.doc_id in doc_ids:
                        raise ValueError(f'repeated document id "{document.doc_id}"')
                    doc_ids[document.doc_id] = None
                    hasher.add(document)
                progress.update(len(part))
        if not doc_ids:
            raise ValueError(f"{corpus or 'corpus'}: no documents")
        _write_index(index, folder / INDEX_FILE, index_dir)
        (folder / DOCID_FILE).write_text("".join(f"{doc_id}\n" for doc_id in doc_ids), encoding="utf-8", newline="\n")
        info = IndexInfo(
            model=_lasting_name(encoder.name),
            model_sha256=encoder.weights_sha256,
            encoder=encoder.config,
            dtype=str(encoder.dtype).removeprefix("torch."),
            dimension=encoder.dimension,
            num_documents=len(doc_ids),
            num_empty=num_empty,
            num_truncated=num_truncated,
            num_skipped=num_skipped,
            corpus=_lasting_name(str(corpus)) if corpus is not None else None,
            corpus_fields=corpus_fields,
            corpus_sha256=hasher.hexdigest(),
            index_sha256=file_sha256(folder / INDEX_FILE),
            docid_sha256=file_sha256(folder / DOCID_FILE),
            kind="Flat",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        )
        (folder / INFO_FILE).write_text(json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return len(doc_ids)


def index_corpus(
    corpus: str,
    encoder_name: str,
    index_dir: Path,
    *,
    fields: list[str] | None = None,
    skip_bad: bool = False,
    overwrite: bool = False,
    **options: object,
) -> IndexInfo:
    """Index a corpus: ``effir index``. All of it is read and checked once before the encoding begins.

    Args:
        corpus: As ``read_corpus`` takes it.
        encoder_name: Model folder or hub name.
        index_dir: The new folder.
        fields: As ``read_corpus`` takes them.
        skip_bad: Leave out bad lines, with a warning for each.
        overwrite: Replace an existing index, once the new one is complete.
        options: As ``Encoder.from_pretrained`` takes them; None = its default.

    Raises:
        ValueError: A bad corpus or model.
        OSError: A file cannot be read or written.
    """
    refuse_existing(index_dir, replaces=_replaced(overwrite, index_dir))
    summary = scan_corpus(corpus, fields=fields, skip_bad=skip_bad)
    for complaint in summary.bad_lines:
        logger.warning("skipped %s", complaint)
    given = {name: value for name, value in options.items() if value is not None}
    encoder = Encoder.from_pretrained(encoder_name, **given)
    logger.info("%d documents, encoded in %s on %s", summary.num_documents, encoder.dtype, encoder.device)
    build_index(
        read_corpus(corpus, fields=fields, on_bad_line=(lambda _complaint: None) if skip_bad else None),
        encoder,
        index_dir,
        num_documents=summary.num_documents,
        num_skipped=len(summary.bad_lines),
        corpus=corpus,
        corpus_fields=fields,
        overwrite=overwrite,
    )
    return read_index_info(index_dir)


def _replaced(overwrite: bool, index_dir: Path) -> tuple[str, ...]:
    """The files an existing folder may lose; one that holds anything else is no index, and never replaced."""
    if not overwrite and (index_dir / INDEX_FILE).is_file():
        raise FileExistsError(f"{index_dir}: an index is there already; choose another --output or --overwrite")
    return (INDEX_FILE, DOCID_FILE, INFO_FILE) if overwrite else ()


def parts(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Yield consecutive documents in lists of ``PART_SIZE``; the last may be shorter."""
    iterator = iter(documents)
    while part := list(islice(iterator, PART_SIZE)):
        yield part


def scale(embeddings: np.ndarray, config: EncoderConfig) -> np.ndarray:
    """Return the vectors whose inner product is the model's similarity: of length 1 for cosine, else as they are."""
    if config.similarity == "dot" or (config.normalize and config.dimension is None):
        return embeddings
    lengths = np.linalg.norm(embeddings, axis=1, keepdims=True)
    return embeddings / np.where(lengths == 0, 1, lengths)


def read_index(index_dir: Path) -> tuple[faiss.Index, list[str]]:
    """Return the FAISS index of a folder, and the document id of each row.

    Raises:
        OSError: No such folder, or a file of it cannot be read.
        ValueError: The index is cut, foreign, not an inner-product one, or has another number of rows than ids.
    """
    require_index(index_dir)
    try:
        index = faiss.read_index(str(index_dir / INDEX_FILE))
    except (RuntimeError, MemoryError) as error:
        with open(index_dir / INDEX_FILE, "rb"):  # an unreadable file is an OSError of its own
            raise ValueError(f"{index_dir / INDEX_FILE}: not a FAISS index, or a cut one; build it again") from error
    if not hasattr(index, "metric_type") or index.metric_type != faiss.METRIC_INNER_PRODUCT:
        raise ValueError(
            f"{index_dir / INDEX_FILE}: its metric is not the inner product, so its scores are no similarities"
        )
    try:
        with open(index_dir / DOCID_FILE, encoding="utf-8") as file:
            doc_ids = [line.rstrip() for line in file]  # as Pyserini reads them
    except UnicodeDecodeError as error:
        raise ValueError(f"{index_dir / DOCID_FILE}: invalid UTF-8 at byte {error.start}") from error
    if len(doc_ids) != index.ntotal:
        raise ValueError(f"{index_dir}: {index.ntotal} vectors and {len(doc_ids)} document ids; build the index again")
    return index, doc_ids


def require_index(index_dir: Path) -> None:
    """Raise FileNotFoundError unless the folder holds an index in Pyserini's layout."""
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
        raise ValueError(f"{path}: not a record of this version of effir_search ({error})") from error


def check_encoder(info: IndexInfo, encoder: Encoder, index_dir: Path) -> None:
    """Raise ValueError, naming the field and both values, if an encoder is not the one the index was built with."""
    pairs = [("weights", info.model_sha256, encoder.weights_sha256), ("dimension", info.dimension, encoder.dimension)]
    ours, theirs = asdict(info.encoder), asdict(encoder.config)
    for name, of_index, of_encoder in pairs + [(name, ours[name], theirs[name]) for name in ours]:
        if of_index != of_encoder:
            raise ValueError(
                f"{index_dir}: this encoder is not the index's: {name} is {of_index!r} in the index "
                f"and {of_encoder!r} in the encoder"
            )


def _write_index(index: faiss.Index, path: Path, index_dir: Path) -> None:
    try:
        faiss.write_index(index, str(path))
    except RuntimeError as error:
        raise OSError(
            f"{index_dir}: the index cannot be written ({index.ntotal * index.d * 4:,} bytes); disk full?"
        ) from error


def _lasting_name(name: str) -> str:
    """A path that still holds when the next command is run elsewhere; hub names and ids stay as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name
