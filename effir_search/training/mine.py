"""Hard negatives from a run: what it ranks high, is no positive, and a teacher does not take for one."""

import itertools
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ir_measures import ScoredDoc
from tqdm import tqdm

from effir_search.errors import UserError
from effir_search.files.whole import whole_file
from effir_search.settings import EncoderOptions, MiningSettings
from effir_search.text.corpus import Document, document_text, existing_documents
from effir_search.text.examples import Scorer, checked_scores, document_key
from effir_search.text.own_documents import comparable
from effir_search.text.training_records import find_queries, warn_of_missing
from effir_search.text.trec import read_qrels, read_run, strictly_decreasing
from effir_search.training.teachers import load_teacher

# Queries whose pairs go to the teacher together: it encodes each distinct text of them once.
CHUNK = 1024
DEFAULT_SETTINGS = MiningSettings()


class MiningResult(NamedTuple):
    """What mining did.

    Attributes:
        num_queries: Written, each with at least one positive and one negative.
        num_negatives: Of all of them.
        num_false: Candidates left out as probable positives, by the margin or the teacher.
        num_own: Candidates left out because they have the text of the query itself.
        num_copies: Candidates left out because they have the text of a positive.
        without_positive: Queries of the run without a positive; left out.
        without_negative: Queries of the run of which no candidate was left; left out.
        not_in_run: Queries with a positive that the run does not have; left out.
        without_text: Queries that are empty; left out.
    """

    num_queries: int
    num_negatives: int
    num_false: int
    num_own: int
    num_copies: int
    without_positive: int
    without_negative: int
    not_in_run: int
    without_text: int = 0


class _Text(NamedTuple):
    """What a document says, and keys by which equal texts are told, with its title and without."""

    text: str
    key: int
    key_without_title: int


class _Query(NamedTuple):
    """A query with the texts of its positives and of its candidates, best first, by id."""

    query_id: str
    text: str
    positives: dict[str, str]
    candidates: dict[str, str]


def mine(
    run: Path,
    qrels: str,
    corpus: str,
    topics: str,
    output: Path,
    settings: MiningSettings = DEFAULT_SETTINGS,
) -> MiningResult:
    """Write training data with hard negatives of a run, readable by ``read_records``.

    Candidates are the hits of a query from rank ``first`` to ``last``, in trec_eval's order, but for positives,
    documents with the text of the query, of a positive or of a better candidate, and empty ones; case, white space and
    whether the query's text has a title before it do not count. Documents judged 0 are candidates.

    Positives that the corpus lacks and queries that the topics lack are left out, with a warning. The run is held in
    memory, and of the corpus the texts of positives and candidates.

    Args:
        run: TREC run of any searcher.
        qrels: Judgments; a relevance above 0 is positive.
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it.
        output: New JSONL file; it appears whole or not at all.
        settings: Which candidates become negatives.

    Raises:
        ValueError: Ranks, numbers or a share that cannot be, a run and qrels that share no query, a hit that the corpus
            lacks, no topic or no positive that is there, or nothing left to write.
        OSError: A file cannot be read or written.

    Source: the bound of a teacher's scores is TopK-PercPos of NV-Retriever, arXiv 2407.15831.
    """
    check_mining(settings)
    positives, hits = _read_positives(qrels), _read_hits(run)
    if not hits.keys() & positives.keys():
        raise UserError(f"{run}: no query of the run is judged in {qrels}: do run and qrels belong together?")
    # By the names of MiningResult.
    counts = Counter(
        without_positive=sum(not positives.get(query_id) for query_id in hits),
        not_in_run=sum(bool(doc_ids) and query_id not in hits for query_id, doc_ids in positives.items()),
    )
    positives = {query_id: doc_ids for query_id, doc_ids in positives.items() if doc_ids and query_id in hits}
    candidates = _candidates(hits, positives, settings, counts)
    topic_texts = _read_topic_texts(topics, qrels, positives, counts)
    texts = _read_document_texts(corpus, qrels, topic_texts, positives, candidates)
    score = None
    if settings.teacher is not None or settings.reranker is not None:
        options = EncoderOptions(device=settings.device, stock_architecture=settings.stock_architecture)
        score = load_teacher(settings.teacher, settings.reranker, options)
    queries = (
        _query(query_id, text, positives[query_id], candidates[query_id], texts, counts)
        for query_id, text in topic_texts.items()
    )
    with whole_file(output) as file, tqdm(total=len(topic_texts), unit="query", disable=None) as progress:
        while chunk := list(itertools.islice(queries, CHUNK)):
            for query, scores in _scored(chunk, score):
                if negative_ids := _choose_negatives(query, scores, settings, counts):
                    file.write(json.dumps(_record(query, negative_ids, scores), ensure_ascii=False) + "\n")
            progress.update(len(chunk))
        if not counts["num_queries"]:
            raise UserError(
                f"{run}: no query has both a positive and a negative left ({counts['without_positive']} without a "
                f"positive, {counts['without_negative']} without a negative, {counts['without_text']} empty); nothing "
                "is written"
            )
    return MiningResult(**{name: counts[name] for name in MiningResult._fields})


def check_mining(settings: MiningSettings) -> None:
    """Raise ValueError for ranks, numbers or a share that cannot be."""
    if not 1 <= settings.first <= settings.last:
        raise UserError(
            f"ranks from {settings.first} to {settings.last}: --first must be at least 1, and --last not below it"
        )
    if settings.negatives < 1:
        raise UserError(f"--negatives {settings.negatives} must be at least 1")
    if not 0 < settings.teacher_ratio <= 1:
        raise UserError(f"--teacher-ratio {settings.teacher_ratio} must be above 0 and at most 1")
    if settings.sample not in SAMPLES:
        raise UserError(f"sample {settings.sample!r} is unknown; known are {', '.join(SAMPLES)}")


def describe_mined(result: MiningResult) -> str:
    """Return what mining did in one line."""
    left_out = {
        "without a positive": result.without_positive,
        "without a negative": result.without_negative,
        "not in the run": result.not_in_run,
        "without a text": result.without_text,
    }
    parts = [f"{result.num_queries} queries, {result.num_negatives} negatives"]
    parts += [f"{result.num_false} probable positives left out"] if result.num_false else []
    parts += [f"{result.num_own} hits with the query's own text left out"] if result.num_own else []
    parts += [f"{result.num_copies} copies of positives left out"] if result.num_copies else []
    parts += [f"{number} queries {why}" for why, number in left_out.items() if number]
    return "; ".join(parts)


def _take_random(doc_ids: Sequence[str], number: int, generator: random.Random) -> list[str]:
    places = generator.sample(range(len(doc_ids)), min(number, len(doc_ids)))
    return [doc_ids[place] for place in sorted(places)]


def _take_top(doc_ids: Sequence[str], number: int, _generator: random.Random) -> list[str]:
    return list(doc_ids[:number])


SAMPLES: dict[str, Callable[[Sequence[str], int, random.Random], list[str]]] = {
    "random": _take_random,
    "top": _take_top,
}


def _read_positives(qrels: str) -> dict[str, list[str]]:
    """Return the ids of each judged query's positives, maybe none."""
    positives: dict[str, list[str]] = {}
    for qrel in read_qrels(qrels):
        doc_ids = positives.setdefault(qrel.query_id, [])
        if qrel.relevance > 0:
            doc_ids.append(qrel.doc_id)
    return positives


def _read_hits(run: Path) -> dict[str, list[ScoredDoc]]:
    hits: dict[str, list[ScoredDoc]] = {}
    for hit in read_run(run):
        hits.setdefault(hit.query_id, []).append(hit)
    return hits


def _candidates(
    hits: Mapping[str, Sequence[ScoredDoc]],
    positives: Mapping[str, Sequence[str]],
    settings: MiningSettings,
    counts: Counter[str],
) -> dict[str, list[str]]:
    """Return the ids of each query's candidates, best first; what the margin leaves out is counted."""
    candidates: dict[str, list[str]] = {}
    for query_id, positive_ids in positives.items():
        ranked = strictly_decreasing(hits[query_id])[settings.first - 1 : settings.last]
        doc_ids = [hit.doc_id for hit in ranked if hit.doc_id not in positive_ids]
        scores = {hit.doc_id: hit.score for hit in hits[query_id]}
        positive_scores = [scores[doc_id] for doc_id in positive_ids if doc_id in scores]
        candidates[query_id] = doc_ids
        if settings.margin is not None and positive_scores:
            bound = min(positive_scores) - settings.margin
            candidates[query_id] = [doc_id for doc_id in doc_ids if scores[doc_id] <= bound]
            counts["num_false"] += len(doc_ids) - len(candidates[query_id])
    return candidates


def _read_topic_texts(
    topics: str, qrels: str, positives: Mapping[str, Sequence[str]], counts: Counter[str]
) -> dict[str, str]:
    """Return the texts of the topics that have positives, in the order of these; empty ones are counted."""
    texts = find_queries(topics, positives)
    warn_of_missing(qrels, topics, "topic", positives, texts)
    counts["without_text"] = sum(not text.strip() for text in texts.values())
    return {query_id: texts[query_id] for query_id in positives if texts.get(query_id, "").strip()}


def _read_document_texts(
    corpus: str,
    qrels: str,
    query_ids: Mapping[str, str],
    positives: Mapping[str, Sequence[str]],
    candidates: Mapping[str, Sequence[str]],
) -> dict[str, _Text]:
    """Return the texts of these queries' positives, as far as the corpus has them, and candidates, which it must."""
    positive_ids = set(itertools.chain.from_iterable(positives[query_id] for query_id in query_ids))
    candidate_ids = set(itertools.chain.from_iterable(candidates[query_id] for query_id in query_ids))
    documents = existing_documents(corpus, positive_ids | candidate_ids)
    if query_ids:
        if missing := sorted(candidate_ids - documents.keys()):
            raise UserError(
                f'{corpus}: no document "{missing[0]}" ({len(missing)} of {len(candidate_ids)} hits of the run are not '
                "in it)"
            )
        warn_of_missing(qrels, corpus, "document", positive_ids, documents)
    return {doc_id: _text(document) for doc_id, document in documents.items()}


def _text(document: Document) -> _Text:
    text = document_text(document)
    return _Text(text, _key(text), _key(document.text))


def _key(text: str) -> int:
    """Stand for a text without differences in case and white space."""
    return document_key(comparable(text))


def _query(
    query_id: str,
    text: str,
    positive_ids: Sequence[str],
    candidate_ids: Sequence[str],
    texts: Mapping[str, _Text],
    counts: Counter[str],
) -> _Query:
    """Return a query with the texts of its positives and candidates.

    Empty and repeated ones are left out; candidates that are the query itself or a copy of a positive are counted.
    """
    positives = {doc_id: texts[doc_id] for doc_id in positive_ids if doc_id in texts and texts[doc_id].text}
    own_key, positive_keys = _key(text), {positive.key for positive in positives.values()}
    seen = {_key("")}
    candidates: dict[str, str] = {}
    for doc_id in candidate_ids:
        candidate = texts[doc_id]
        if own_key in (candidate.key, candidate.key_without_title):
            counts["num_own"] += 1
        elif candidate.key in positive_keys:
            counts["num_copies"] += 1
        elif candidate.key not in seen:
            seen.add(candidate.key)
            candidates[doc_id] = candidate.text
    return _Query(query_id, text, {doc_id: positive.text for doc_id, positive in positives.items()}, candidates)


def _scored(chunk: Sequence[_Query], score: Scorer | None) -> Iterator[tuple[_Query, dict[str, float] | None]]:
    """Yield each query with the teacher's score of each of its documents, None without a teacher."""
    if score is None:
        yield from ((query, None) for query in chunk)
        return
    pairs = [(query.text, text) for query in chunk for text in (*query.positives.values(), *query.candidates.values())]
    scores = iter(checked_scores(score(pairs), len(pairs)))
    for query in chunk:
        doc_ids = [*query.positives, *query.candidates]
        yield query, dict(zip(doc_ids, itertools.islice(scores, len(doc_ids)), strict=True))


def _choose_negatives(
    query: _Query, scores: Mapping[str, float] | None, settings: MiningSettings, counts: Counter[str]
) -> list[str]:
    """Return the ids of a query's negatives, best first; none for a query that is left out, which is counted."""
    if not query.positives:
        counts["without_positive"] += 1
        return []
    doc_ids = list(query.candidates)
    if scores is not None:
        bound = highest_negative(min(scores[doc_id] for doc_id in query.positives), settings.teacher_ratio)
        doc_ids = [doc_id for doc_id in doc_ids if scores[doc_id] <= bound]
        counts["num_false"] += len(query.candidates) - len(doc_ids)
    generator = random.Random(f"{settings.seed} {query.query_id}")
    negative_ids = SAMPLES[settings.sample](doc_ids, settings.negatives, generator)
    counts.update({"num_queries": 1, "num_negatives": len(negative_ids)} if negative_ids else {"without_negative": 1})
    return negative_ids


def highest_negative(positive: float, ratio: float) -> float:
    """Return the highest score of a negative: a share of the positive's, and below it also where that is negative."""
    return positive - (1 - ratio) * abs(positive)


def _record(query: _Query, negative_ids: Sequence[str], scores: Mapping[str, float] | None) -> dict[str, object]:
    """Return a line of the training data."""
    record: dict[str, object] = {
        "query_id": query.query_id,
        "query": query.text,
        "positives": list(query.positives.values()),
        "positive_ids": list(query.positives),
        "negatives": [query.candidates[doc_id] for doc_id in negative_ids],
        "negative_ids": list(negative_ids),
    }
    if scores is not None:
        record["scores"] = [scores[doc_id] for doc_id in (*query.positives, *negative_ids)]
    return record
