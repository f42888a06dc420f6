"""Topics to a run, or one text to hits with their documents: what ``effir search`` does."""

import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.indexing.index_record import IndexInfo, absolute_name
from effir_search.searching.bm25 import Bm25Info, Bm25Searcher
from effir_search.searching.hybrid import PLAIN, HybridSearcher, Ranking, open_index
from effir_search.searching.pyserini_bridge import builtin_topics
from effir_search.searching.searcher import DEFAULT_SETTINGS, Searcher
from effir_search.settings import EncoderOptions, SearchSettings, TopicField
from effir_search.text.checks import check_unicode
from effir_search.text.corpus import (
    DEFAULT_FIELDS,
    IR_DATASETS,
    CorpusFields,
    Document,
    existing_documents,
    find_documents,
)
from effir_search.text.own_documents import has_text, warn_of_own_documents
from effir_search.text.trec import Query, read_qrels, read_topics, write_run

logger = logging.getLogger(__name__)

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

    A ``Searcher`` does the same for indexes that are asked more than once.

    Args:
        index_dir: A folder of ``build_index``, or of Pyserini; or several, which are searched as if they were one.
        encoder: The encoder they were built with, or a student of it; any other is an error.
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
    settings = SearchSettings(k, remove_query, threads, ef_search, nprobe)
    return Searcher(index_dir, encoder, settings).search(topics)


def search_topics(
    topics: str,
    output: Path,
    *,
    index_dir: Path | Sequence[Path],
    settings: SearchSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    encoder: str | None = None,
    ranking: Ranking = PLAIN,
    topics_field: TopicField = "title",
    qrels: str | None = None,
    tag: str = "effir",
) -> tuple[int, int]:
    """Search topics and write a TREC run: ``effir search --topics``. Return the numbers of topics and of hits.

    Args:
        topics: As ``load_topics`` takes them.
        output: The run; an existing one is replaced once the new one is complete.
        index_dir: The index folder, or several.
        settings: How they are searched.
        options: How the encoder is loaded; what is None is as the index was built.
        encoder: Model folder or hub name; None = the index's own.
        ranking: What ranks documents besides the vectors.
        topics_field: Part of a TREC topic that is the query.
        qrels: Qrels whose queries alone are searched.
        tag: The run's last column.
    """
    queries = load_topics(topics, field=topics_field, qrels=read_qrels(qrels) if qrels else None)
    searcher = open_index(index_dir, encoder, settings, options, ranking)
    return len(queries), search_queries(queries, output, searcher, tag=tag)


def search_queries(
    queries: Sequence[Query],
    output: Path,
    searcher: Searcher | Bm25Searcher | HybridSearcher,
    *,
    tag: str = "effir",
) -> int:
    """Search for queries, write a TREC run, return the number of hits; warn of queries that find themselves."""
    own_scores: dict[str, float] = {}
    num_hits = write_run(_noting_own(searcher.search(queries), own_scores), output, tag=tag)
    own = [query for query in queries if query.query_id in own_scores]
    if own and (number := _count_own(searcher, own, own_scores)):
        warn_of_own_documents(str(output), number, len(queries), "--remove-query")
    return num_hits


def _noting_own(hits: Iterable[ScoredDoc], own_scores: dict[str, float]) -> Iterator[ScoredDoc]:
    """Yield the hits, and note by query id the score of a document that has this id and is among the first hits."""
    for query_id, query_hits in itertools.groupby(hits, key=lambda hit: hit.query_id):
        for rank, hit in enumerate(query_hits, start=1):
            if hit.doc_id == query_id and rank <= OWN_HITS:
                own_scores[query_id] = hit.score
            yield hit


def _count_own(
    searcher: Searcher | Bm25Searcher | HybridSearcher, queries: Sequence[Query], own_scores: Mapping[str, float]
) -> int:
    """Return how many of these queries are the text of the document of their id, as far as can be told.

    The corpus tells it if it is where it was. Else the score of a dense search does: that of a document which is the
    query.
    """
    documents = _own_documents(searcher.infos, own_scores)
    is_plain = isinstance(searcher, Searcher) and searcher.feedback.prf is None
    if documents.keys() == own_scores.keys() or not is_plain:
        known = [query for query in queries if query.query_id in documents]
        return sum(has_text(documents[query.query_id], query.text) for query in known)
    encoder, texts = searcher.encoder, [query.text for query in queries]
    as_queries = scale(encoder.encode_queries(texts), encoder.config)
    as_documents = scale(encoder.encode_documents(texts), encoder.config)
    own_products = (as_queries * as_documents).sum(axis=1)
    scores = np.array([own_scores[query.query_id] for query in queries])
    return int((abs(scores - own_products) <= ROUNDING * abs(own_products)).sum())


def _own_documents(infos: Sequence[IndexInfo | Bm25Info | None], doc_ids: Mapping[str, float]) -> dict[str, Document]:
    """Return the documents of these ids, as far as the corpora of the indexes are where they were."""
    documents: dict[str, Document] = {}
    if not all(info is not None and Path(info.corpus or "").is_absolute() for info in infos):
        return documents
    try:
        for info in infos:
            documents |= existing_documents(info.corpus, doc_ids.keys(), fields=_fields_of(info))
    except (OSError, ValueError) as error:
        logger.debug("the corpus of the index cannot be read any more: %s", error)
    return documents


def _fields_of(info: IndexInfo | Bm25Info) -> CorpusFields:
    """The fields of a corpus that were indexed."""
    return CorpusFields(info.corpus_fields, info.corpus_id_field)


def search_text(
    query: str,
    *,
    index_dir: Path | Sequence[Path],
    settings: SearchSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    corpora: Sequence[str] = (),
    encoder: str | None = None,
    ranking: Ranking = PLAIN,
) -> list[tuple[ScoredDoc, Document | None]]:
    """Search for one text: ``effir search --query``. Return the best hits, with their documents if corpora are given.

    Args:
        query: The text.
        index_dir: The index folder, or several.
        settings: How they are searched.
        options: How the encoder is loaded; what is None is as the index was built.
        corpora: Where the documents are, in one or the other; none = leave them out.
        encoder: Model folder or hub name; None = the index's own.
        ranking: What ranks documents besides the vectors.
    """
    if not query.strip():
        raise UserError("--query: the text is empty")
    check_unicode(query, "--query")
    searcher = open_index(index_dir, encoder, settings, options, ranking)
    hits = searcher.search_text(query)
    sources = _with_fields(corpora, searcher.infos)
    documents = find_documents(sources, [hit.doc_id for hit in hits]) if sources else {}
    return [(hit, documents.get(hit.doc_id)) for hit in hits]


def _with_fields(corpora: Sequence[str], infos: Sequence[IndexInfo | Bm25Info | None]) -> dict[str, CorpusFields]:
    """The fields of each corpus that were indexed; of one that no index names, those of the first index."""
    known = [info for info in infos if info is not None]
    fields = {info.corpus: _fields_of(info) for info in known}
    others = fields[known[0].corpus] if known else DEFAULT_FIELDS
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
