"""The folder of an index: the names of its files, its record ``effir.json``, and how both are read and checked."""

from dataclasses import asdict, dataclass
from pathlib import Path

import faiss

from effir_search.encoding.config import EncoderConfig
from effir_search.encoding.encoder import Encoder
from effir_search.encoding.same_space import FREE, changed_reading, spaces_of
from effir_search.errors import UserError
from effir_search.files.reading import file_sha256, read_json
from effir_search.indexing.copies import COPIES_FILE
from effir_search.indexing.store import Store
from effir_search.model.save import SPACES_FIELD, TRAINING_FILE

INDEX_FILE, DOCID_FILE, INFO_FILE = "index", "docid", "effir.json"


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
        backend: What computed, likewise.
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
    backend: str = "torch"


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


def check_files(index_dir: Path, info: IndexInfo) -> None:
    """Raise ValueError for a file of an index that is not as it was written; all of each is read."""
    files = {INDEX_FILE: info.index_sha256, DOCID_FILE: info.docid_sha256}
    if info.copies_sha256:
        files[COPIES_FILE] = info.copies_sha256
    for name, sha256 in files.items():
        if file_sha256(index_dir / name) != sha256:
            raise UserError(f"{index_dir / name}: its SHA-256 is not the one in {INFO_FILE}; build the index again")


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
    if any(index_dir.glob("segments_*")):
        raise UserError(f"{index_dir}: is a BM25 index, which has no vectors; effir search and effir info take it")
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
    if info.model_sha256 != encoder.weights_sha256:
        raise _other_weights(info, encoder, index_dir, "give the model that the index was made with as --encoder")
    ours, theirs = asdict(info.encoder), asdict(encoder.config)
    for name, of_index, of_encoder in (
        ("dimension", info.dimension, encoder.dimension),
        *((name, ours[name], theirs[name]) for name in ours),
    ):
        if of_index != of_encoder:
            raise UserError(
                f"{index_dir}: this encoder is not the index's: {name} is {of_index!r} in the index "
                f"and {of_encoder!r} in the encoder; search with what the index has, or index again"
            )


def _other_weights(info: IndexInfo, encoder: Encoder, index_dir: Path, advice: str) -> UserError:
    # The first digits tell two hashes apart, and the advice still fits the line.
    of_index, of_encoder = info.model_sha256[:12], encoder.weights_sha256[:12]
    return UserError(
        f"{index_dir}: this encoder is not the index's: weights is {of_index!r} in the index and {of_encoder!r} in the "
        f"encoder; {advice}, or index again"
    )


def check_query_encoder(info: IndexInfo, encoder: Encoder, index_dir: Path) -> None:
    """Raise ValueError unless an encoder's queries go with an index's documents.

    It is the one that the index was built with, or a student that learned to give the vectors of that. A student reads
    a query by its own files, as it learned it. The documents must have been read as its teacher read them, and their
    vectors have no more components than it learned.
    """
    if encoder.weights_sha256 == info.model_sha256:
        check_encoder(info, encoder, index_dir)
        return
    space = next((space for space in spaces_of(encoder) if space.model_sha256 == info.model_sha256), None)
    if space is None:
        advice = "give the model that the index was made with as --encoder, or a student of it"
        raise _other_weights(info, encoder, index_dir, f"{advice} ({SPACES_FIELD} in its {TRAINING_FILE})")
    of_index, of_teacher = asdict(info.encoder), asdict(space.encoder)
    if changed := [name for name in of_index if name not in FREE and of_index[name] != of_teacher[name]]:
        raise UserError(
            f"{index_dir}: {changed[0]} is {of_index[changed[0]]!r} in the index, and was {of_teacher[changed[0]]!r} "
            f"when {encoder.name} learned the vectors of {space.model}; index again with that"
        )
    # The index says how many components are kept; all else is the student's.
    if (name := changed_reading(encoder.with_config(dimension=encoder.files.dimension))) is not None:
        raise UserError(
            f"{index_dir}: {encoder.name} learned the vectors of {space.model} with the {name} of its own files, and "
            f"{getattr(encoder.config, name)!r} is asked for; leave that out"
        )
    if info.dimension > space.dimension:
        raise UserError(
            f"{index_dir}: {encoder.name} learned the first {space.dimension} components of the vectors of "
            f"{space.model}, and the index has {info.dimension}; index again with --dimension {space.dimension}"
        )


def absolute_name(name: str) -> str:
    """Return a path that still holds when the next command is run elsewhere; hub names and ids stay as they are."""
    return str(Path(name).absolute()) if Path(name).exists() else name
