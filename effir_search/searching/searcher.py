"""A searcher: index folders and their encoder, opened once and asked often, through Pyserini."""

import logging
import os
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from ir_measures import ScoredDoc
from tqdm import tqdm

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.encoding.same_space import read_spaces
from effir_search.errors import UserError
from effir_search.indexing.faiss_kinds import largest_cosine, short_list_advice
from effir_search.indexing.index_record import IndexInfo, read_index_info, require_index
from effir_search.model.checkpoint import exported_backend, model_configs
from effir_search.searching.feedback import DocumentVectors, fed_back
from effir_search.searching.pyserini_bridge import open_searcher
from effir_search.settings import EncoderOptions, FeedbackSettings, SearchSettings
from effir_search.text.trec import FLOAT32_MAX, Query, strictly_decreasing

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS, NO_FEEDBACK = SearchSettings(), FeedbackSettings()
# Hits of a topic, and of a single text.
HITS, HITS_OF_TEXT = 1000, 10
# Queries that are encoded and searched together.
BATCH_SIZE = 256


@dataclass(frozen=True)
class _OpenIndex:
    """One index of a searcher.

    Attributes:
        folder: Its folder.
        faiss: A ``pyserini.search.faiss.FaissSearcher``.
        largest_score: What no score of a sound index is above, nor its negative below, for a query of length 1.
        vectors: Those of its documents; None where there is no feedback.
    """

    folder: Path
    faiss: Any
    largest_score: float
    vectors: DocumentVectors | None

    def num_hits(self, depth: int) -> int:
        """Return how many hits a search for so many finds if it finds them all."""
        return min(depth, self.faiss.num_documents)

    def check_scores(self, hits: Sequence[Any], length: float) -> None:
        """Raise ValueError if a score, such as NaN, is none that a sound index gives a query of this length, or 1."""
        largest_score = self.largest_score * max(1.0, length)
        bad = next((hit for hit in hits if not abs(hit.score) <= largest_score), None)
        if bad is not None:
            raise UserError(
                f'{self.folder}: is damaged: document "{bad.docid}" has the score {bad.score:g}; effir verify tells '
                "more, effir index builds it again"
            )


class Searcher:
    """One index or several that are searched as if they were one, opened once and asked often.

    Several threads may ask at once: their batches of queries take turns, each on all cores.

    Attributes:
        folders: Of the indexes.
        infos: What the ``effir.json`` of each says; None where there is none.
        encoder: Of the queries.
        settings: How the indexes are searched.
        feedback: Whether queries are searched a second time, with the vectors of what they found.
    """

    def __init__(
        self,
        index_dir: Path | Sequence[Path],
        encoder: Encoder | str | None = None,
        settings: SearchSettings = DEFAULT_SETTINGS,
        options: EncoderOptions = DEFAULT_OPTIONS,
        feedback: FeedbackSettings = NO_FEEDBACK,
    ) -> None:
        """Open indexes.

        Args:
            index_dir: A folder of ``build_index``, or of Pyserini; or several.
            encoder: The encoder they were built with, or a student of it, see ``index_record.check_query_encoder``; or
                its folder or hub name; None = the one the first index names.
            settings: How they are searched.
            options: How an encoder is loaded that is not there yet; what is None is as the first index was built.
            feedback: Whether and how queries are searched a second time. With several indexes the first hits are those
                of all of them.

        Raises:
            ValueError: A damaged index, another encoder, a parameter of another kind of index, a document that two
                indexes have, feedback from an index that does not give vectors back.
            OSError: A file cannot be read.
        """
        self.folders = [index_dir] if isinstance(index_dir, Path) else list(index_dir)
        if not self.folders:
            raise UserError("a search needs at least one index folder")
        self.settings, self.feedback = settings, feedback
        if not isinstance(encoder, Encoder):
            require_index(self.folders[0])
        self.infos = [read_index_info(folder) for folder in self.folders]
        if not isinstance(encoder, Encoder):
            encoder = _load(self.folders[0], self.infos[0], encoder, options)
        self.encoder = encoder
        _check_alike(self.folders, self.infos)
        self._indexes = [self._open(*pair) for pair in zip(self.folders, self.infos, strict=True)]
        teacher = next((info for info in self.infos if info and info.model_sha256 != encoder.weights_sha256), None)
        if teacher is not None:
            logger.info("queries are encoded by the student %s; the documents were by %s", encoder.name, teacher.model)
        if len(self.folders) > 1:
            _check_disjoint(self.folders, [index.faiss.doc_ids() for index in self._indexes])
        # A tokenizer and an HNSW keep in themselves what the search at hand is.
        self._turn = threading.Lock()

    def _open(self, folder: Path, info: IndexInfo | None) -> _OpenIndex:
        effort = {"ef_search": self.settings.ef_search, "nprobe": self.settings.nprobe}
        searcher = open_searcher(folder, self.encoder, info, **effort)
        has_length_1 = self.encoder.config.similarity == "cosine" and info is not None  # without a record nobody knows
        vectors = None
        if self.feedback.prf is not None:
            vectors = DocumentVectors(folder, searcher.index, searcher.docids, searcher.copies)
        largest_score = largest_cosine(searcher.index) if has_length_1 else FLOAT32_MAX
        return _OpenIndex(folder, searcher, largest_score, vectors)

    def search(self, topics: Sequence[Query]) -> Iterator[ScoredDoc]:
        """Return the hits of each topic, in the order of the topics, best first, with strictly decreasing scores.

        Raises:
            ValueError: No topic with a text, fewer hits than one; once hits are asked for, a score that a sound index
                does not give.
        """
        return self._search(topics, self.settings.with_defaults(hits=HITS))

    def search_text(self, text: str, hits: int | None = None) -> list[ScoredDoc]:
        """Return the best hits of one text; None = as many as the settings say, or 10."""
        settings = replace(self.settings, hits=self.settings.hits if hits is None else hits, remove_query=False)
        return list(self._search([Query("query", text)], settings.with_defaults(hits=HITS_OF_TEXT)))

    @property
    def num_documents(self) -> int:
        """Documents of all indexes."""
        return sum(index.faiss.num_documents for index in self._indexes)

    def search_vectors(self, vectors: np.ndarray, hits: int) -> list[list[ScoredDoc]]:
        """Return the best hits of each query, best first, with strictly decreasing scores; its id is its row's number.

        Args:
            vectors: ``(queries, dimension)`` float32, as the encoder gives them.
            hits: Hits a query; fewer where the indexes hold fewer.

        Raises:
            ValueError: A score that a sound index does not give.
        """
        query_ids, scaled = [str(row) for row in range(len(vectors))], scale(vectors, self.encoder.config)
        with self._turn:
            hits_of = self._nearest(scaled, query_ids, hits, self.settings.threads or available_cores())
        found = []
        for query_id, vector in zip(query_ids, scaled, strict=True):
            of_query = []
            for index in self._indexes:
                index.check_scores(hits_of[index.folder][query_id], float(np.linalg.norm(vector)))
                of_query += [ScoredDoc(query_id, hit.docid, hit.score) for hit in hits_of[index.folder][query_id]]
            found.append(strictly_decreasing(of_query)[:hits])
        return found

    def _nearest(
        self, vectors: np.ndarray, query_ids: Sequence[str], depth: int, threads: int
    ) -> dict[Path, dict[str, list[Any]]]:
        """Return the hits of scaled vectors in each index, by query id."""
        return {index.folder: index.faiss.batch_search(vectors, query_ids, depth, threads) for index in self._indexes}

    def _search(self, topics: Sequence[Query], settings: SearchSettings) -> Iterator[ScoredDoc]:
        """Check what is asked for, and return its hits."""
        check_hits_and_topics(settings.hits, topics)
        for index in self._indexes:
            num_rows = min(settings.hits + settings.remove_query, index.faiss.num_docs)
            if settings.ef_search is not None and settings.ef_search < num_rows:
                logger.warning(
                    "%s: --ef-search %d is below the %d hits asked for, so many of these are not the best; without the "
                    "option it is as large as it must be",
                    *(index.folder, settings.ef_search, num_rows),
                )
        return self._hits(topics, settings)

    def _hits(self, topics: Sequence[Query], settings: SearchSettings) -> Iterator[ScoredDoc]:
        depth = settings.hits + settings.remove_query
        queries = with_text(topics)
        num_truncated, num_short = 0, Counter()
        with tqdm(total=len(queries), desc="Searching", unit=" queries", disable=None) as progress:
            for start in range(0, len(queries), BATCH_SIZE):
                batch = queries[start : start + BATCH_SIZE]
                hits_of, lengths, num_cut = self._search_batch(batch, depth, settings)
                num_truncated += num_cut
                for (query_id, _), length in zip(batch, lengths.tolist(), strict=True):
                    hits = []
                    for index in self._indexes:
                        hits_of_query = hits_of[index.folder][query_id]
                        index.check_scores(hits_of_query, length)
                        num_short[index.folder] += len(hits_of_query) < index.num_hits(depth)
                        hits += [ScoredDoc(query_id, hit.docid, hit.score) for hit in hits_of_query]
                    if settings.remove_query:
                        hits = [hit for hit in hits if hit.doc_id != query_id]
                    yield from strictly_decreasing(hits)[: settings.hits]
                progress.update(len(batch))
        if num_truncated:
            logger.warning("%d queries were cut at %d tokens", num_truncated, self.encoder.config.max_length)
        self._warn_of_short_lists(num_short, len(queries), depth)

    def _search_batch(
        self, queries: Sequence[Query], depth: int, settings: SearchSettings
    ) -> tuple[dict[Path, dict[str, list[Any]]], np.ndarray, int]:
        """Return the hits of queries in each index, by query id, their vectors' lengths, and how many were cut."""
        query_ids, threads = [query.query_id for query in queries], settings.threads or available_cores()
        with self._turn:
            encoded = self.encoder.encode([query.text for query in queries], prompt=self.encoder.config.query_prompt)
            vectors = scale(encoded.embeddings, self.encoder.config)
            if self.feedback.prf is not None:
                first = self._nearest(vectors, query_ids, self.feedback.prf_depth + settings.remove_query, threads)
                vectors = self._fed_back(vectors, query_ids, first, remove_query=settings.remove_query)
            hits_of = self._nearest(vectors, query_ids, depth, threads)
        return hits_of, np.linalg.norm(vectors, axis=1), encoded.num_truncated

    def _fed_back(
        self,
        vectors: np.ndarray,
        query_ids: Sequence[str],
        first: Mapping[Path, Mapping[str, Sequence[Any]]],
        *,
        remove_query: bool,
    ) -> np.ndarray:
        """Return queries' vectors moved by their first hits in all indexes, ``(queries, dimension)``."""
        moved = []
        for query_id, vector in zip(query_ids, vectors, strict=True):
            hits = []
            for index in self._indexes:
                index.check_scores(first[index.folder][query_id], float(np.linalg.norm(vector)))
                hits += [
                    (hit.score, hit.docid, index)
                    for hit in first[index.folder][query_id]
                    if not (remove_query and hit.docid == query_id)
                ]
            best = sorted(hits, key=lambda hit: hit[:2], reverse=True)[: self.feedback.prf_depth]
            rows = np.array([index.vectors.of(doc_id) for _, doc_id, index in best])
            moved.append(fed_back(vector, rows, self.feedback))
        return np.array(moved)

    def _warn_of_short_lists(self, num_short: Mapping[Path, int], num_queries: int, depth: int) -> None:
        for index in self._indexes:
            if number := num_short[index.folder]:
                logger.warning(
                    "%s: %d of %d queries have fewer than %d hits: %s",
                    *(index.folder, number, num_queries, index.num_hits(depth), short_list_advice(index.faiss.index)),
                )


def check_hits_and_topics(hits: int, topics: Sequence[Query]) -> None:
    """Raise ValueError if fewer hits than one are asked for, or of topics none has a text."""
    if hits < 1:
        raise UserError(f"--hits {hits}: must be at least 1")
    if topics and not any(query.text.strip() for query in topics):
        raise UserError(f"{len(topics)} topics, none of them with a text")


def with_text(topics: Sequence[Query]) -> list[Query]:
    """Return the topics that have a text; others are warned of."""
    queries = [query for query in topics if query.text.strip()]
    if len(queries) < len(topics):
        logger.warning("%d of %d topics are empty and get no hits", len(topics) - len(queries), len(topics))
    return queries


def _check_alike(folders: Sequence[Path], infos: Sequence[IndexInfo | None]) -> None:
    """Raise ValueError if indexes were built with different settings: no query has one vector for all of them."""
    known = [(folder, info) for folder, info in zip(folders, infos, strict=True) if info is not None]
    for folder, info in known[1:]:
        ours, theirs = (asdict(of.encoder) | {"model_sha256": of.model_sha256[:12]} for of in (known[0][1], info))
        if changed := [name for name in ours if ours[name] != theirs[name]]:
            raise UserError(
                f"{known[0][0]} and {folder} cannot be searched together: {changed[0]} is {ours[changed[0]]!r} in one "
                f"and {theirs[changed[0]]!r} in the other"
            )


def _check_disjoint(folders: Sequence[Path], doc_ids: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if two indexes have a document of one id: a run could not tell the two apart."""
    home: dict[str, Path] = {}
    for folder, index_ids in zip(folders, doc_ids, strict=True):
        clash = next((doc_id for doc_id in index_ids if doc_id in home), None)
        if clash is not None:
            raise UserError(f'document "{clash}" is in {home[clash]} and in {folder}; ids must be unique among indexes')
        home.update(dict.fromkeys(index_ids, folder))


def load_encoder(index_dir: Path, name: str | None = None, options: EncoderOptions = DEFAULT_OPTIONS) -> Encoder:
    """Return the encoder for an index: the one ``effir.json`` names or the one that is given, with its settings.

    A student of the index's encoder has its own settings, see ``index_record.check_query_encoder``.

    Args:
        index_dir: The index folder.
        name: Model folder or hub name; None = the index's own.
        options: How it is loaded; what is None, or a flag that is off, is as the index was built.

    Raises:
        ValueError: The folder does not say which encoder it was built with, and none is given.
        OSError: A file cannot be read.
    """
    require_index(index_dir)
    return _load(index_dir, read_index_info(index_dir), name, options)


def _load(index_dir: Path, info: IndexInfo | None, name: str | None, options: EncoderOptions) -> Encoder:
    """Return the encoder for an index whose record was read."""
    if info is None:
        if name is None:
            raise UserError(f"{index_dir}: no effir.json in it says which encoder made it; give --encoder MODEL")
        return Encoder.from_pretrained(name, options).pack()
    if name is None and Path(info.model).is_absolute() and not Path(info.model).is_dir():
        raise FileNotFoundError(f"{index_dir}: its model {info.model} is not there; if it has moved, give --encoder")
    if options.backend == "auto":
        options = replace(options, backend=None)
    # Another backend may not compute in the index's type of numbers.
    backend = exported_backend(Path(name or info.model)) or options.backend or info.backend
    arithmetic = {"dtype": info.dtype, "backend": info.backend} if backend == info.backend else {}
    if name is not None and _imitates(name, info):
        return Encoder.from_pretrained(
            name, options.with_defaults(dimension=info.encoder.dimension, **arithmetic)
        ).pack()
    recorded = asdict(info.encoder)
    user_options = options.given().keys()
    accepted = {field.name for field in fields(EncoderOptions)}
    as_built = recorded | {"stock_architecture": info.stock_architecture} | arithmetic
    changes = {name: value for name, value in as_built.items() if name in accepted and name not in user_options}
    encoder = Encoder.from_pretrained(name or info.model, replace(options, **changes))
    # What a model's files say and no option does is the record's too: with normalize its similarity changed.
    return encoder.with_config(**{key: recorded[key] for key in recorded.keys() - user_options}).pack()


def _imitates(name: str, info: IndexInfo) -> bool:
    """Return whether a model says that it gives the vectors of an index's encoder, and so reads by its own files."""
    with model_configs(name) as folder:
        return any(space.model_sha256 == info.model_sha256 for space in read_spaces(folder))


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
