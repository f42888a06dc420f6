"""Topics to a run: encode the queries, search an index through Pyserini, order ties as trec_eval does."""

import inspect
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from ir_measures import Qrel, ScoredDoc
from tqdm import tqdm

from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.indexing.build import absolute_name, read_index_info, require_index, scale
from effir_search.indexing.faiss_kinds import largest_cosine, short_list_advice
from effir_search.searching.pyserini_bridge import builtin_topics, faiss_searcher
from effir_search.text.corpus import (
    DEFAULT_FIELDS,
    IR_DATASETS,
    CorpusFields,
    Document,
    documents_there,
    find_documents,
)
from effir_search.text.own_documents import has_text, warn_of_own_documents
from effir_search.text.trec import FLOAT32_MAX, Query, read_qrels, read_topics, strictly_decreasing, write_run

logger = logging.getLogger(__name__)

# Queries that are encoded and searched together.
BATCH_SIZE = 256
# Among so many first hits a document of the query's own id is looked at: is it the query itself?
OWN_HITS = 10
# Difference of two scores of the same two texts, relative: in bfloat16 a vector depends on what shares its batch.
ROUNDING = 5e-3


def search(
    index_dir: Path | Sequence[Path],
    encoder: Encoder,
    topics: Sequence[Query],
    *,
    k: int = 1000,
    threads: int | None = None,
    remove_query: bool = False,
    ef_search: int | None = None,
    nprobe: int | None = None,
) -> Iterator[ScoredDoc]:
    """Return the hits of each topic, in the order of the topics, best first, with strictly decreasing scores.

    Args:
        index_dir: A folder of ``build_index``, or of Pyserini; or several, which are searched as if they were one.
        encoder: The encoder they were built with; any other is an error.
        topics: What is searched for.
        k: Hits a topic; fewer where the index holds fewer.
        threads: Of FAISS; None = one for each core this process may use.
        remove_query: Leave out the document whose id is the query's, and find one more in its place.
        ef_search: Of an HNSW index, see ``faiss_kinds.set_search_parameters``.
        nprobe: Of an IVF index, likewise.

    Raises:
        ValueError: ``k`` below 1, a damaged index, another encoder, a parameter of another kind of index, a document
            that two indexes have; once hits are asked for, a score that a sound index does not give.
        OSError: A file cannot be read.
    """
    if k < 1:
        raise UserError(f"--hits {k}: must be at least 1")
    if topics and not any(query.text.strip() for query in topics):
        raise UserError(f"{len(topics)} topics, none of them with a text")
    folders = _folders(index_dir)
    _check_alike(folders)
    opened = [faiss_searcher(folder, encoder, ef_search=ef_search, nprobe=nprobe) for folder in folders]
    if len(folders) > 1:
        _check_disjoint(folders, [searcher.doc_ids() for searcher in opened])
    searchers = dict(zip(folders, opened, strict=True))
    depth = k + remove_query
    for folder, searcher in searchers.items():
        if ef_search is not None and ef_search < min(depth, searcher.num_docs):
            logger.warning(
                "%s: --ef-search %d is below the %d hits asked for, so many of these are not the best; without the "
                "option it is as large as it must be",
                *(folder, ef_search, min(depth, searcher.num_docs)),
            )
    return _hits(searchers, encoder, topics, k=k, threads=threads or available_cores(), remove_query=remove_query)


def _folders(index_dir: Path | Sequence[Path]) -> list[Path]:
    return [index_dir] if isinstance(index_dir, Path) else list(index_dir)


def _check_alike(folders: Sequence[Path]) -> None:
    """Raise ValueError if indexes were built with different settings: no query has one vector for all of them."""
    infos = [(folder, info) for folder in folders if (info := read_index_info(folder)) is not None]
    for folder, info in infos[1:]:
        ours, theirs = (asdict(of.encoder) | {"model_sha256": of.model_sha256[:12]} for of in (infos[0][1], info))
        if changed := [name for name in ours if ours[name] != theirs[name]]:
            raise UserError(
                f"{infos[0][0]} and {folder} cannot be searched together: {changed[0]} is {ours[changed[0]]!r} in one "
                f"and {theirs[changed[0]]!r} in the other"
            )


def _check_disjoint(folders: Sequence[Path], doc_ids: Sequence[Sequence[str]]) -> None:
    """Raise ValueError if two indexes have a document of one id: a run could not tell the two apart."""
    home: dict[str, Path] = {}
    for folder, of_index in zip(folders, doc_ids, strict=True):
        clash = next((doc_id for doc_id in of_index if doc_id in home), None)
        if clash is not None:
            raise UserError(f'document "{clash}" is in {home[clash]} and in {folder}; ids must be unique among indexes')
        home.update(dict.fromkeys(of_index, folder))


def _largest_score(folder: Path, searcher: Any, encoder: Encoder) -> float:  # noqa: ANN401, a FaissSearcher
    """What no score of a sound index is above, nor its negative below; without a record, lengths are not known."""
    has_length_1 = encoder.config.similarity == "cosine" and read_index_info(folder) is not None
    return largest_cosine(searcher.index) if has_length_1 else FLOAT32_MAX


def _check_scores(hits: Sequence[Any], largest: float, folder: Path) -> None:
    """Raise ValueError if a score, such as NaN, is none that a sound index gives."""
    bad = next((hit for hit in hits if not abs(hit.score) <= largest), None)
    if bad is not None:
        raise UserError(
            f'{folder}: is damaged: document "{bad.docid}" has the score {bad.score:g}; effir verify tells more, '
            "effir index builds it again"
        )


def _hits(
    searchers: Mapping[Path, Any],
    encoder: Encoder,
    topics: Sequence[Query],
    *,
    k: int,
    threads: int,
    remove_query: bool,
) -> Iterator[ScoredDoc]:
    depth = k + remove_query
    largest = {folder: _largest_score(folder, searcher, encoder) for folder, searcher in searchers.items()}
    searched = [query for query in topics if query.text.strip()]
    if len(searched) < len(topics):
        logger.warning("%d of %d topics are empty and get no hits", len(topics) - len(searched), len(topics))
    num_truncated, num_short = 0, dict.fromkeys(searchers, 0)
    with tqdm(total=len(searched), desc="Searching", unit=" queries", disable=None) as progress:
        for start in range(0, len(searched), BATCH_SIZE):
            batch = searched[start : start + BATCH_SIZE]
            encoded = encoder.encode([query.text for query in batch], prompt=encoder.config.query_prompt)
            num_truncated += encoded.num_truncated
            query_ids = [query.query_id for query in batch]
            vectors = scale(encoded.embeddings, encoder.config)
            found = {
                folder: searcher.batch_search(vectors, query_ids, depth, threads)
                for folder, searcher in searchers.items()
            }
            for query_id in query_ids:
                hits = []
                for folder, of in found.items():
                    _check_scores(of[query_id], largest[folder], folder)
                    num_short[folder] += len(of[query_id]) < min(depth, searchers[folder].num_documents)
                    hits += [ScoredDoc(query_id, hit.docid, hit.score) for hit in of[query_id]]
                if remove_query:
                    hits = [hit for hit in hits if hit.doc_id != query_id]
                yield from strictly_decreasing(hits)[:k]
            progress.update(len(batch))
    if num_truncated:
        logger.warning("%d queries were cut at %d tokens", num_truncated, encoder.config.max_length)
    for folder, number in num_short.items():
        if number:
            wanted, advice = min(depth, searchers[folder].num_documents), short_list_advice(searchers[folder].index)
            logger.warning(
                "%s: %d of %d queries have fewer than %d hits: %s", folder, number, len(searched), wanted, advice
            )


def search_topics(
    topics: str,
    output: Path,
    *,
    index_dir: Path | Sequence[Path],
    topics_field: str = "title",
    qrels: str | None = None,
    encoder: str | None = None,
    hits: int | None = None,
    threads: int | None = None,
    ef_search: int | None = None,
    nprobe: int | None = None,
    remove_query: bool = False,
    tag: str = "effir",
    **options: object,
) -> tuple[int, int]:
    """Search topics and write a TREC run: ``effir search --topics``. Return the numbers of topics and of hits.

    Args:
        topics: As ``load_topics`` takes them.
        output: The run; an existing one is replaced once the new one is complete.
        index_dir: The index folder, or several.
        topics_field: Part of a TREC topic that is the query.
        qrels: Qrels whose queries alone are searched.
        encoder: Model folder or hub name; None = the index's own.
        hits: Hits a topic; None = 1000.
        threads: Of FAISS; None = all cores.
        ef_search: Of an HNSW index, see ``faiss_kinds.set_search_parameters``.
        nprobe: Of an IVF index, likewise.
        remove_query: Leave out the document whose id is the query's.
        tag: The run's last column.
        options: As ``Encoder.from_pretrained`` takes them.
    """
    chosen = load_topics(topics, field=topics_field, qrels=read_qrels(qrels) if qrels else None)
    model = load_encoder(_folders(index_dir)[0], encoder, **options)
    effort = {"threads": threads, "ef_search": ef_search, "nprobe": nprobe}
    found = search(index_dir, model, chosen, k=hits or 1000, remove_query=remove_query, **effort)
    own_scores: dict[str, float] = {}
    num_hits = write_run(_noting_own(found, own_scores), output, tag=tag)
    own = [query for query in chosen if query.query_id in own_scores]
    if own and (number := _count_own(_folders(index_dir), model, own, own_scores)):
        warn_of_own_documents(str(output), number, len(chosen), "--remove-query")
    return len(chosen), num_hits


def _noting_own(hits: Iterable[ScoredDoc], own_scores: dict[str, float]) -> Iterator[ScoredDoc]:
    """Yield the hits, and note by query id the score of a document that has this id and is among the first hits."""
    for query_id, of_query in itertools.groupby(hits, key=lambda hit: hit.query_id):
        for rank, hit in enumerate(of_query, start=1):
            if hit.doc_id == query_id and rank <= OWN_HITS:
                own_scores[query_id] = hit.score
            yield hit


def _count_own(
    folders: Sequence[Path], encoder: Encoder, queries: Sequence[Query], own_scores: Mapping[str, float]
) -> int:
    """Return how many of these queries are the text of the document of their id, as far as can be told.

    The corpus tells it if it is where it was. Else the score does: that of a document which is the query.
    """
    infos = [read_index_info(folder) for folder in folders]
    if all(info is not None and Path(info.corpus or "").is_absolute() for info in infos):
        documents: dict[str, Document] = {}
        try:
            for info in infos:
                documents |= documents_there(
                    info.corpus, own_scores.keys(), fields=CorpusFields(info.corpus_fields, info.corpus_id_field)
                )
        except (OSError, ValueError) as error:
            logger.debug("the corpus of the index cannot be read any more: %s", error)
        if documents.keys() == own_scores.keys():
            return sum(has_text(documents[query.query_id], query.text) for query in queries)
    texts = [query.text for query in queries]
    as_queries = scale(encoder.encode_queries(texts), encoder.config)
    as_documents = scale(encoder.encode_documents(texts), encoder.config)
    itself = (as_queries * as_documents).sum(axis=1)
    found = np.array([own_scores[query.query_id] for query in queries])
    return int((abs(found - itself) <= ROUNDING * abs(itself)).sum())


def search_text(
    query: str,
    *,
    index_dir: Path | Sequence[Path],
    corpora: Sequence[str] = (),
    encoder: str | None = None,
    hits: int | None = None,
    threads: int | None = None,
    ef_search: int | None = None,
    nprobe: int | None = None,
    **options: object,
) -> list[tuple[ScoredDoc, Document | None]]:
    """Search for one text: ``effir search --query``. Return the best hits, with their documents if corpora are given.

    Args:
        query: The text.
        index_dir: The index folder, or several.
        corpora: Where the documents are, in one or the other; none = leave them out.
        encoder: Model folder or hub name; None = the index's own.
        hits: How many; None = 10.
        threads: Of FAISS; None = all cores.
        ef_search: Of an HNSW index, see ``faiss_kinds.set_search_parameters``.
        nprobe: Of an IVF index, likewise.
        options: As ``Encoder.from_pretrained`` takes them.
    """
    if not query.strip():
        raise UserError("--query: the text is empty")
    model = load_encoder(_folders(index_dir)[0], encoder, **options)
    effort = {"threads": threads, "ef_search": ef_search, "nprobe": nprobe}
    found = list(search(index_dir, model, [Query("query", query)], k=hits or 10, **effort))
    sources = _with_fields(corpora, _folders(index_dir))
    documents = find_documents(sources, [hit.doc_id for hit in found]) if sources else {}
    return [(hit, documents.get(hit.doc_id)) for hit in found]


def _with_fields(corpora: Sequence[str], folders: Sequence[Path]) -> dict[str, CorpusFields]:
    """The fields of each corpus that were indexed; of one that no index names, those of the first index."""
    infos = [info for folder in folders if (info := read_index_info(folder)) is not None]
    fields = {info.corpus: CorpusFields(info.corpus_fields, info.corpus_id_field) for info in infos}
    others = fields[infos[0].corpus] if infos else DEFAULT_FIELDS
    return {corpus: fields.get(absolute_name(corpus), others) for corpus in corpora}


def format_hits(
    hits: Sequence[tuple[ScoredDoc, Document | None]], *, marks: Sequence[str] = (), width: int = 100
) -> str:
    """Return hits for reading: mark, rank, score, id, title, and the first ``width`` characters of the text below."""
    lines = []
    margin = max(map(len, marks), default=0)
    for rank, (hit, document) in enumerate(hits, start=1):
        mark = marks[rank - 1] if marks else ""
        title = document.title if document and document.title != hit.doc_id else ""
        lines.append(f"{mark:{margin}}{rank:3}  {hit.score:.4f}  {hit.doc_id}  {title}".rstrip())
        if document and document.text:
            text = " ".join(document.text.split())
            lines.append(" " * (margin + 5) + (text if len(text) <= width else text[: width - 3] + "..."))
    return "\n".join(lines)


def load_encoder(index_dir: Path, name: str | None = None, **options: object) -> Encoder:
    """Return the encoder for an index: the one ``effir.json`` names or the one that is given, with its settings.

    Args:
        index_dir: The index folder.
        name: Model folder or hub name; None = the index's own.
        options: As ``Encoder.from_pretrained`` takes them; None = what the index was built with.

    Raises:
        ValueError: The folder does not say which encoder it was built with, and none is given.
        OSError: A file cannot be read.
    """
    require_index(index_dir)
    given = {key: value for key, value in options.items() if value is not None}
    info = read_index_info(index_dir)
    if info is None:
        if name is None:
            raise UserError(f"{index_dir}: no effir.json in it says which encoder made it; give --encoder MODEL")
        return Encoder.from_pretrained(name, **given).pack()
    if name is None and Path(info.model).is_absolute() and not Path(info.model).is_dir():
        raise FileNotFoundError(f"{index_dir}: its model {info.model} is not there; if it has moved, give --encoder")
    recorded = asdict(info.encoder)
    accepted = inspect.signature(Encoder.from_pretrained).parameters
    settings = {field: value for field, value in recorded.items() if field in accepted}
    options = settings | {"dtype": info.dtype, "stock_architecture": info.stock_architecture} | given
    encoder = Encoder.from_pretrained(name or info.model, **options)
    # What a model's files say and no option does is the record's too: with normalize its similarity changed.
    encoder.config = replace(encoder.config, **{key: recorded[key] for key in recorded.keys() - given.keys()})
    return encoder.pack()


def load_topics(source: str, *, field: str = "title", qrels: Sequence[Qrel] | None = None) -> list[Query]:
    """Return topics from a file, ir_datasets or Pyserini's built-in names; only the judged ones if qrels are given.

    Raises:
        ValueError: Bad topics, or none that is judged.
        OSError: Neither a file nor a name, or a download that fails.
    """
    if source.startswith(IR_DATASETS) or Path(source).exists():
        topics = read_topics(source, field=field)
    else:
        topics = builtin_topics(source)
        if topics is None:
            raise FileNotFoundError(f"{source}: no such topics file, and not the name of topics that Pyserini knows")
    if qrels is None:
        return topics
    judged = {qrel.query_id for qrel in qrels}
    chosen = [query for query in topics if query.query_id in judged]
    if not chosen:
        raise UserError(f"{source}: none of its {len(topics)} topics is judged in the qrels")
    return chosen


def available_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
