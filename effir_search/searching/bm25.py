"""BM25 indexes, which are Lucene's through Pyserini: built as a whole from any corpus, opened once and asked often."""

import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
from ir_measures import ScoredDoc

from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_folder
from effir_search.indexing.index_record import absolute_name
from effir_search.searching.pyserini_bridge import bm25_hits, build_bm25, lucene_searcher
from effir_search.searching.searcher import (
    BATCH_SIZE,
    HITS,
    HITS_OF_TEXT,
    available_cores,
    check_hits_and_topics,
    with_text,
)
from effir_search.searching.searcher import DEFAULT_SETTINGS as DEFAULT_SEARCH
from effir_search.settings import Bm25Settings, IndexSettings, SearchSettings
from effir_search.text.corpus import CorpusHasher, Document, read_corpus, scan_corpus
from effir_search.text.trec import Query

logger = logging.getLogger(__name__)

BM25_FILE = "effir-bm25.json"
DEFAULT_INDEX, DEFAULT_BM25 = IndexSettings(), Bm25Settings()
# What Lucene calls its files.
LUCENE_FILES = re.compile(r"segments_\w+|_\w+\.\w+|write\.lock")


@dataclass(frozen=True)
class Bm25Info:
    """What ``effir-bm25.json`` says: what a BM25 index was built from.

    Attributes:
        num_documents: Those of the corpus.
        num_indexed: Those that Lucene holds: documents without a text are left out.
        num_skipped: Bad lines of the corpus that were left out.
        corpus: Where the documents came from.
        corpus_fields: JSON fields that were read, None = the default ones.
        corpus_id_field: JSON field that was the id, None = the default.
        corpus_sha256: See ``corpus.CorpusHasher``.
        analyzer: How texts become words.
        created: UTC time, ISO 8601.
        versions: Of the packages that the index depends on.
    """

    num_documents: int
    num_indexed: int
    num_skipped: int
    corpus: str
    corpus_fields: list[str] | None
    corpus_id_field: str | None
    corpus_sha256: str
    analyzer: str = "English: Porter stemmer, Lucene's stop words"
    created: str = ""
    versions: dict[str, str] | None = None


def is_bm25(index_dir: Path) -> bool:
    """Return whether a folder holds a BM25 index, of ``index_bm25`` or of Pyserini."""
    return (index_dir / BM25_FILE).is_file() or any(index_dir.glob("segments_*"))


def read_bm25_info(index_dir: Path) -> Bm25Info | None:
    """Return what ``effir-bm25.json`` says, or None for a folder without one, as Pyserini makes them.

    Raises:
        ValueError: The file is damaged or of another version.
    """
    path = index_dir / BM25_FILE
    if not path.is_file():
        return None
    try:
        return Bm25Info(**read_json(path))
    except TypeError as error:
        raise UserError(f"{path}: not a record of this version of effir_search ({error})") from error


def index_bm25(corpus: str, index_dir: Path, settings: IndexSettings = DEFAULT_INDEX) -> Bm25Info:
    """Index a corpus for BM25: ``effir index --bm25``. All of it is read and checked once before.

    The texts are those that a dense index encodes: title and text joined by one space.

    Args:
        corpus: As ``read_corpus`` takes it.
        index_dir: The new folder, which appears whole or not at all.
        settings: How the corpus is read, and whether an index that is there is replaced.

    Raises:
        ValueError: A bad corpus, or one that changed meanwhile.
        OSError: A file cannot be read or written.
    """
    replaces = _replaceable(index_dir) if settings.overwrite else ()
    if not settings.overwrite and is_bm25(index_dir):
        raise FileExistsError(f"{index_dir}: an index is there already; choose another --output or --overwrite")
    refuse_existing(index_dir, replaces=replaces)
    fields = {"fields": settings.fields or None, "id_field": settings.id_field}
    summary = scan_corpus(corpus, **fields, skip_bad=settings.skip_bad)
    for complaint in summary.bad_lines:
        logger.warning("skipped %s", complaint)
    on_bad_line = (lambda _complaint: None) if settings.skip_bad else None
    hasher = CorpusHasher()

    def documents() -> Iterator[Document]:
        for document in read_corpus(corpus, **fields, on_bad_line=on_bad_line):
            hasher.add(document)
            yield document

    with whole_folder(index_dir, replaces=replaces) as folder:
        num_indexed = build_bm25(documents(), folder, threads=settings.threads or available_cores())
        if hasher.hexdigest() != summary.sha256:
            raise UserError(f"{corpus}: changed while it was indexed; index it again")
        info = Bm25Info(
            num_documents=summary.num_documents,
            num_indexed=num_indexed,
            num_skipped=len(summary.bad_lines),
            corpus=absolute_name(corpus),
            corpus_fields=list(settings.fields) or None,
            corpus_id_field=settings.id_field,
            corpus_sha256=summary.sha256,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            versions={package: version(package) for package in ("effir_search", "pyserini")},
        )
        text = json.dumps(asdict(info), indent=2, ensure_ascii=False) + "\n"
        (folder / BM25_FILE).write_text(text, encoding="utf-8", newline="\n")
    return info


def _replaceable(index_dir: Path) -> tuple[str, ...]:
    """The files of a BM25 index, which an existing folder may lose; a folder without one may lose nothing."""
    if not is_bm25(index_dir):
        return ()
    return (BM25_FILE, *(file.name for file in index_dir.iterdir() if LUCENE_FILES.fullmatch(file.name)))


def describe_bm25(info: Bm25Info, index_dir: Path) -> str:
    """Return one line about what ``index_bm25`` did."""
    num_empty = info.num_documents - info.num_indexed
    counts = {"without a text left out": num_empty, "bad lines skipped": info.num_skipped}
    notes = "".join(f", {count} {what}" for what, count in counts.items() if count)
    return f"{info.num_documents} documents{notes} -> {index_dir}"


class Bm25Searcher:
    """A BM25 index, opened once and asked often; it has the methods of ``searcher.Searcher``.

    Attributes:
        folders: Of the index, alone in a list.
        infos: What its record says, alone in a list; None where there is none.
        settings: How it is searched.
    """

    def __init__(
        self,
        index_dir: Path,
        settings: SearchSettings = DEFAULT_SEARCH,
        bm25: Bm25Settings = DEFAULT_BM25,
    ) -> None:
        """Open an index.

        Args:
            index_dir: A folder of ``index_bm25``, or of Pyserini.
            settings: How it is searched; what is about FAISS must be None.
            bm25: How words are weighed.

        Raises:
            ValueError: A damaged index, or settings that are about FAISS.
            OSError: No such folder, or one without a BM25 index.
        """
        if not index_dir.is_dir():
            raise FileNotFoundError(f"{index_dir}: no such folder")
        if not is_bm25(index_dir):
            raise FileNotFoundError(f"{index_dir}: no BM25 index in it; effir index --bm25 makes one")
        for name in ("ef_search", "nprobe"):
            if getattr(settings, name) is not None:
                raise UserError(f"--{name.replace('_', '-')} is for FAISS indexes; {index_dir} is a BM25 index")
        self.folders, self.settings, self.infos = [index_dir], settings, [read_bm25_info(index_dir)]
        self._lucene = lucene_searcher(index_dir, k1=bm25.k1, b=bm25.b)
        self.num_documents = int(self._lucene.num_docs)
        (info,) = self.infos
        if info is not None and info.num_indexed != self.num_documents:
            raise UserError(
                f"{index_dir}: {self.num_documents} documents, where {info.num_indexed} were indexed; "
                "effir index --bm25 --overwrite builds it again"
            )
        self._turn = threading.Lock()

    def search(self, topics: Sequence[Query]) -> Iterator[ScoredDoc]:
        """Return the hits of each topic, in the order of the topics, best first, with strictly decreasing scores.

        Only documents that have a word of the query are hits. Of equal scores the smaller document id comes first.

        Raises:
            ValueError: No topic with a text, fewer hits than one.
        """
        return self._search(topics, self.settings.with_defaults(hits=HITS))

    def search_text(self, text: str, hits: int | None = None) -> list[ScoredDoc]:
        """Return the best hits of one text; None = as many as the settings say, or 10."""
        settings = replace(self.settings, hits=self.settings.hits if hits is None else hits, remove_query=False)
        return list(self._search([Query("query", text)], settings.with_defaults(hits=HITS_OF_TEXT)))

    def _search(self, topics: Sequence[Query], settings: SearchSettings) -> Iterator[ScoredDoc]:
        check_hits_and_topics(settings.hits, topics)
        return self._hits(with_text(topics), settings)

    def _hits(self, queries: Sequence[Query], settings: SearchSettings) -> Iterator[ScoredDoc]:
        # Java counts no further than 2^31 - 1.
        depth = min(settings.hits + settings.remove_query, max(1, self.num_documents))
        threads = settings.threads or available_cores()
        for start in range(0, len(queries), BATCH_SIZE):
            batch = queries[start : start + BATCH_SIZE]
            with self._turn:
                hits_of = bm25_hits(self._lucene, batch, k=depth, threads=threads)
            for query_id, _ in batch:
                hits = [pair for pair in hits_of[query_id] if not (settings.remove_query and pair[0] == query_id)]
                yield from _strictly_decreasing(query_id, hits[: settings.hits])


def _strictly_decreasing(query_id: str, hits: Sequence[tuple[str, float]]) -> Iterator[ScoredDoc]:
    """Yield hits in the order in which Anserini gives them, so that those of k hits begin those of any more.

    It lowers a tied score by 1e-6, which a float32 above 16 may not show.
    """
    ceiling = np.float32(np.inf)
    for doc_id, score in hits:
        ceiling = min(np.float32(score), np.nextafter(ceiling, np.float32(-np.inf)))
        yield ScoredDoc(query_id, doc_id, float(ceiling))
