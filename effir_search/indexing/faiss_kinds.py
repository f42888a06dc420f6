"""Kinds of FAISS index, by factory string: which are known, what they cost, how they are trained and searched."""

import re
from collections.abc import Iterable, Iterator

import faiss
import numpy as np

from effir_search.errors import UserError

PATTERN = re.compile(
    r"(?P<opq>OPQ\d+(_\d+)?,)?((IVF(?P<lists>\d+),)|(HNSW(?P<links>\d+)(,(?=.)|$)))?"
    r"(?P<code>Flat|SQ8|SQfp16|PQ(?P<codes>\d+)(x(?P<bits>\d+))?)?"
)
EXAMPLES = "Flat, SQ8, SQfp16, PQ64, HNSW32, IVF4096,Flat, IVF4096,PQ64, OPQ64,IVF4096,PQ64"
# Inverted lists that are searched by default, as a share of all: FAISS's own default of one list misses most hits.
PROBED_SHARE = 1 / 16
EF_SEARCH = 128
# What FAISS asks for to train a list of an IVF, or a centroid of a PQ code, well.
POINTS_PER_CENTROID = faiss.ClusteringParameters().min_points_per_centroid


def new_index(kind: str, dimension: int) -> faiss.Index:
    """Return an empty index of a kind for inner products, in every part of it.

    Raises:
        ValueError: An unknown kind, or one that does not fit the dimension.
    """
    _parse(kind)
    try:
        return faiss.index_factory(dimension, kind, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        reason = str(error).rpartition(":")[2].strip()
        raise UserError(f"--kind {kind}: FAISS cannot make it for {dimension} dimensions ({reason})") from error


def training_size(kind: str, num_documents: int) -> int:
    """Return how many vectors a kind is trained on by default: 0 for kinds without training, all if there are few.

    That is more than FAISS asks for, see ``well_trained_size``, but for codes of more than 10 bits.
    """
    parts = _parse(kind)
    if not (parts["lists"] or parts["codes"] or parts["opq"] or parts["code"] == "SQ8"):
        return 0
    return min(num_documents, max(64 * int(parts["lists"] or 0), 65536))


def memory(kind: str, dimension: int, num_documents: int, train_size: int) -> int:
    """Return about how many bytes building an index takes, beyond the program: rows, links, lists, training sample."""
    parts = _parse(kind)
    row = {"SQ8": dimension, "SQfp16": 2 * dimension}.get(parts["code"], 4 * dimension)
    if parts["codes"]:
        row = int(parts["codes"]) * int(parts["bits"] or 8) // 8
    if parts["links"]:
        # Level 0 has twice as many links as the levels above, which hold few of the rows; 4 bytes a link.
        row += 4 * 2 * int(parts["links"]) + 8
    if parts["lists"]:
        row = 3 * (row + 8) // 2  # each list has room for up to twice what is in it
    lists = int(parts["lists"] or 0) * 4 * dimension
    rotation = 4 * dimension * dimension if parts["opq"] else 0
    return num_documents * row + lists + rotation + train_size * 4 * dimension


def _num_centroids(kind: str) -> int:
    """The centroids of the largest clustering that training does, 0 without any."""
    parts = _parse(kind)
    for_lists, for_codes = int(parts["lists"] or 0), 2 ** int(parts["bits"] or 8) if parts["codes"] else 0
    for_rotation = 256 if parts["opq"] else 0  # FAISS finds it with codes of 8 bits, whatever the index has
    return max(for_lists, for_codes, for_rotation)


def well_trained_size(kind: str) -> int:
    """Return how many vectors FAISS asks for to train a kind well, 0 for kinds without clustering."""
    return POINTS_PER_CENTROID * _num_centroids(kind)


def check_training(kind: str, size: int) -> None:
    """Raise ValueError if a kind cannot be trained on so many vectors."""
    needed = _num_centroids(kind)
    if size < needed:
        raise UserError(f"--kind {kind}: needs at least {needed:,} vectors to train on, there are {size:,}")


def train(index: faiss.Index, kind: str, sample: np.ndarray) -> None:
    """Train an index on ``(vectors, dimension)`` float32.

    Raises:
        ValueError: The kind needs more vectors.
    """
    check_training(kind, len(sample))
    for clustering in _clusterings(index):
        clustering.min_points_per_centroid = 1  # with fewer, FAISS would warn once a clustering
    index.train(sample)


def _clusterings(index: faiss.Index) -> Iterator[faiss.ClusteringParameters]:
    """The settings of every clustering that training an index does."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        rotation = faiss.downcast_VectorTransform(index.chain.at(0))
        if rotation.pq is None:  # OPQMatrix would make one like it, of 8 bits, whose settings are out of reach
            rotation.pq = faiss.ProductQuantizer(rotation.d_out, rotation.M, 8)
        yield rotation.pq.cp
        yield from _clusterings(index.index)
    if isinstance(index, faiss.IndexHNSW):
        yield from _clusterings(index.storage)
    if isinstance(index, faiss.IndexIVF):
        yield index.cp
    if hasattr(index, "pq"):
        yield index.pq.cp


def reserve(index: faiss.Index, num_vectors: int) -> None:
    """Give an empty index the memory of so many vectors at once: as it grows, FAISS doubles it and holds both copies.

    An IVF grows list by list, where that is little.
    """
    inner = innermost(index)
    if isinstance(inner, faiss.IndexHNSW):
        storage = faiss.downcast_index(inner.storage)
        inner.hnsw.neighbors.resize(int(1.1 * num_vectors * inner.hnsw.nb_neighbors(0)))  # a tenth for upper levels
        inner.hnsw.neighbors.resize(0)
        inner = storage
    if isinstance(inner, faiss.IndexFlatCodes):
        inner.codes.resize(num_vectors * inner.code_size)
        inner.codes.resize(0)


def sample_rows(vectors: Iterable[np.ndarray], num_vectors: int, size: int, *, seed: int = 0) -> np.ndarray:
    """Return ``size`` rows of a stream of arrays that has ``num_vectors`` rows, chosen by the seed, in their order."""
    chosen = np.sort(np.random.default_rng(seed).choice(num_vectors, size, replace=False))
    rows, start = [], 0
    for block in vectors:
        chosen_here = chosen[np.searchsorted(chosen, start) : np.searchsorted(chosen, start + len(block))]
        rows.append(block[chosen_here - start])
        start += len(block)
    return np.concatenate(rows)


def innermost(index: faiss.Index) -> faiss.Index:
    """Return the index behind a rotation, or the index itself, as its own class."""
    inner = faiss.downcast_index(index)
    return faiss.downcast_index(inner.index) if isinstance(inner, faiss.IndexPreTransform) else inner


def is_graph(index: faiss.Index) -> bool:
    """Whether an index is an HNSW, whose search follows links from row to row."""
    return isinstance(innermost(index), faiss.IndexHNSW)


def set_search_parameters(
    index: faiss.Index, *, ef_search: int | None = None, nprobe: int | None = None, hits: int = 0
) -> None:
    """Set how much of an approximate index a search looks at; None = a default that finds most of the true hits.

    Args:
        index: Of any kind.
        ef_search: Candidates that a search of an HNSW keeps; the default is 128, and never below the number of hits.
        nprobe: Lists of an IVF that are searched; the default is a sixteenth of them.
        hits: How many rows will be asked for.

    Raises:
        ValueError: The index is not of the kind that the parameter is for.
    """
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        inner.nprobe = min(inner.nlist, nprobe or max(1, round(inner.nlist * PROBED_SHARE)))
    elif nprobe is not None:
        raise UserError(f"--nprobe is for IVF indexes; this one is {type(inner).__name__}")
    if isinstance(inner, faiss.IndexHNSW):
        inner.hnsw.efSearch = ef_search or max(EF_SEARCH, min(hits, index.ntotal))
    elif ef_search is not None:
        raise UserError(f"--ef-search is for HNSW indexes; this one is {type(inner).__name__}")


def short_list_advice(index: faiss.Index) -> str:
    """Return why a search of this index may find fewer hits than asked for, and what to do."""
    inner = innermost(index)
    if isinstance(inner, faiss.IndexIVF):
        return f"the {inner.nprobe} of {inner.nlist} lists that are searched hold no more; raise --nprobe"
    if isinstance(inner, faiss.IndexHNSW):
        return "no more is reached in its graph; raise --ef-search"
    return "it holds rows that have no score; effir verify tells more"


def largest_cosine(index: faiss.Index) -> float:
    """Return what no score among vectors of length 1 is above: 1 and, for rounding or quantisation, a little more."""
    return 1.01 if isinstance(index, faiss.IndexFlat) else 1.5


def _parse(kind: str) -> re.Match:
    parts = PATTERN.fullmatch(kind)
    sizes = [] if not parts else [int(parts[name]) for name in ("lists", "links", "codes", "bits") if parts[name]]
    # FAISS crashes on an HNSW of one link and on codes of no bit.
    if (
        not parts
        or 0 in sizes
        or parts["links"] == "1"
        or kind.startswith("OPQ0")
        or not (parts["code"] or parts["links"])
        or (parts["opq"] and not parts["codes"])
    ):
        raise UserError(f"--kind {kind!r} is unknown; known are FAISS factory strings such as {EXAMPLES}")
    return parts
