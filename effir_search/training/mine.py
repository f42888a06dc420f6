"""Hard negatives from a run: what it ranks high, is no positive, and a teacher does not take for one."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ir_measures import ScoredDoc
from tqdm import tqdm

from effir_search.files import whole_file
from effir_search.training.examples import Scorer, checked_scores, find_queries, find_texts
from effir_search.training.teachers import load_teacher
from effir_search.trec import read_qrels, read_run, strictly_decreasing

# Queries whose pairs go to the teacher together: it encodes each distinct text of them once.
CHUNK = 1024


class Mined(NamedTuple):
    """What mining did.

    Attributes:
        num_queries: Written, each with at least one positive and one negative.
        num_negatives: Of all of them.
        num_false: Candidates left out as probable positives, by the margin or the teacher.
        without_positive: Queries of the run without a positive; left out.
        without_negative: Queries of the run of which no candidate was left; left out.
        not_in_run: Queries with a positive that the run does not have; left out.
        without_text: Queries that are empty; left out.
    """

    num_queries: int
    num_negatives: int
    num_false: int
    without_positive: int
    without_negative: int
    not_in_run: int
    without_text: int = 0


class _Query(NamedTuple):
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
    *,
    first: int = 1,
    last: int = 100,
    negatives: int = 8,
    margin: float | None = None,
    teacher: str | None = None,
    reranker: str | None = None,
    teacher_ratio: float = 0.95,
    sample: str = "random",
    seed: int = 0,
    device: str = "auto",
) -> Mined:
    """Write training data with hard negatives of a run, readable by ``read_records``.

    Candidates are the hits of a query from rank ``first`` to ``last``, in trec_eval's order, but for positives,
    documents with the text of a positive or of a better candidate, and empty ones. Documents judged 0 are candidates.
    The run is held in memory, and of the corpus the texts of positives and candidates.

    Args:
        run: TREC run of any searcher.
        qrels: Judgments; a relevance above 0 is positive.
        corpus: As ``read_corpus`` takes it.
        topics: As ``read_topics`` takes it.
        output: New JSONL file; it appears whole or not at all.
        first: Rank of the first candidate, from 1.
        last: Rank of the last candidate.
        negatives: At most so many a query.
        margin: Leave out candidates whose score in the run is above that of the query's lowest positive less this.
            Where the run has no positive of the query, nothing is left out.
        teacher: A bi-encoder: leave out candidates whose score it puts above a share of that of the query's lowest
            positive, and write its scores.
        reranker: The same with a cross-encoder.
        teacher_ratio: That share. Where the positive's score p is negative, the bound is p - (1 - share) |p|, which is
            the same for a score above 0.
        sample: A key of ``SAMPLES``: which of the candidates are taken.
        seed: Of a random sample; what a query gets does not depend on other queries.
        device: Of the teacher.

    Raises:
        ValueError: Ranks, numbers or a share that cannot be, a run and qrels that share no query, an id that topics or
            corpus lack, or nothing left to write.
        OSError: A file cannot be read or written.

    Source: the bound is TopK-PercPos of NV-Retriever, arXiv 2407.15831.
    """
    if not 1 <= first <= last:
        raise ValueError(f"ranks from {first} to {last}: --first must be at least 1, and --last not below it")
    if negatives < 1:
        raise ValueError(f"--negatives {negatives} must be at least 1")
    if not 0 < teacher_ratio <= 1:
        raise ValueError(f"--teacher-ratio {teacher_ratio} must be above 0 and at most 1")
    if sample not in SAMPLES:
        raise ValueError(f"sample {sample!r} is unknown; known are {', '.join(SAMPLES)}")

    positives: dict[str, list[str]] = {}
    for qrel in read_qrels(qrels):
        of_query = positives.setdefault(qrel.query_id, [])
        if qrel.relevance > 0:
            of_query.append(qrel.doc_id)
    hits: dict[str, list[ScoredDoc]] = {}
    for hit in read_run(run):
        hits.setdefault(hit.query_id, []).append(hit)
    if not hits.keys() & positives.keys():
        raise ValueError(f"{run}: no query of the run is judged in {qrels}: do run and qrels belong together?")

    mined = [query_id for query_id, of_query in positives.items() if of_query and query_id in hits]
    ranked: dict[str, list[str]] = {}
    num_false = 0
    for query_id in mined:
        ranked[query_id], num_left_out = _ranked(hits[query_id], positives[query_id], first, last, margin)
        num_false += num_left_out
    queries = find_queries(topics, mined)
    doc_ids = set(itertools.chain.from_iterable(positives[query_id] + ranked[query_id] for query_id in mined))
    texts = find_texts(corpus, doc_ids)
    _check_found(topics, "topic", mined, queries)
    with_text = [query_id for query_id in mined if queries[query_id].strip()]
    without_text, mined = len(mined) - len(with_text), with_text
    _check_found(corpus, "document", doc_ids, texts)

    score = load_teacher(teacher, reranker, device=device) if teacher is not None or reranker is not None else None
    without_positive = sum(not positives.get(query_id) for query_id in hits)
    num_queries = num_negatives = without_negative = 0
    with whole_file(output) as file, tqdm(total=len(mined), unit="query", disable=None) as progress:
        for start in range(0, len(mined), CHUNK):
            chunk = [
                _query(query_id, queries[query_id], positives[query_id], ranked[query_id], texts)
                for query_id in mined[start : start + CHUNK]
            ]
            for query, scores in _scored(chunk, score):
                if not query.positives:
                    without_positive += 1
                    continue
                kept = list(query.candidates)
                if scores is not None:
                    bound = highest_negative(min(scores[doc_id] for doc_id in query.positives), teacher_ratio)
                    kept = [doc_id for doc_id in kept if scores[doc_id] <= bound]
                    num_false += len(query.candidates) - len(kept)
                taken = SAMPLES[sample](kept, negatives, random.Random(f"{seed} {query.query_id}"))
                if not taken:
                    without_negative += 1
                    continue
                file.write(json.dumps(_fields(query, taken, scores), ensure_ascii=False) + "\n")
                num_queries += 1
                num_negatives += len(taken)
            progress.update(len(chunk))
        if not num_queries:
            raise ValueError(
                f"{run}: no query has both a positive and a negative left ({without_positive} without a positive, "
                f"{without_negative} without a negative, {without_text} empty); nothing is written"
            )
    not_in_run = sum(bool(of_query) and query_id not in hits for query_id, of_query in positives.items())
    return Mined(num_queries, num_negatives, num_false, without_positive, without_negative, not_in_run, without_text)


def describe_mined(mined: Mined) -> str:
    """Return what mining did in one line."""
    left_out = {
        "without a positive": mined.without_positive,
        "without a negative": mined.without_negative,
        "not in the run": mined.not_in_run,
        "without a text": mined.without_text,
    }
    parts = [f"{mined.num_queries} queries, {mined.num_negatives} negatives"]
    parts += [f"{mined.num_false} probable positives left out"] if mined.num_false else []
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


def _ranked(
    hits: Sequence[ScoredDoc], positives: Sequence[str], first: int, last: int, margin: float | None
) -> tuple[list[str], int]:
    """Return the candidates of one query, best first, and how many more the margin left out."""
    doc_ids = [hit.doc_id for hit in strictly_decreasing(hits)[first - 1 : last]]
    candidates = [doc_id for doc_id in doc_ids if doc_id not in positives]
    scores = {hit.doc_id: hit.score for hit in hits}
    of_positives = [scores[doc_id] for doc_id in positives if doc_id in scores]
    if margin is None or not of_positives:
        return candidates, 0
    kept = [doc_id for doc_id in candidates if scores[doc_id] <= min(of_positives) - margin]
    return kept, len(candidates) - len(kept)


def _query(
    query_id: str, text: str, positives: Sequence[str], candidates: Sequence[str], texts: Mapping[str, str]
) -> _Query:
    """Return a query with the texts of its positives and candidates; empty and repeated ones are left out."""
    of_positives = {doc_id: texts[doc_id] for doc_id in positives if texts[doc_id]}
    seen = {"", *of_positives.values()}
    of_candidates: dict[str, str] = {}
    for doc_id in candidates:
        if texts[doc_id] not in seen:
            seen.add(texts[doc_id])
            of_candidates[doc_id] = texts[doc_id]
    return _Query(query_id, text, of_positives, of_candidates)


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


def highest_negative(positive: float, ratio: float) -> float:
    """Return the highest score of a negative: a share of the positive's, and below it also where that is negative."""
    return positive - (1 - ratio) * abs(positive)


def _fields(query: _Query, taken: Sequence[str], scores: Mapping[str, float] | None) -> dict[str, object]:
    fields: dict[str, object] = {
        "query_id": query.query_id,
        "query": query.text,
        "positives": list(query.positives.values()),
        "positive_ids": list(query.positives),
        "negatives": [query.candidates[doc_id] for doc_id in taken],
        "negative_ids": list(taken),
    }
    if scores is not None:
        fields["scores"] = [scores[doc_id] for doc_id in (*query.positives, *taken)]
    return fields


def _check_found(source: str, kind: str, wanted: Sequence[str] | set[str], found: Mapping[str, str]) -> None:
    if missing := sorted(set(wanted) - found.keys()):
        counts = f"{len(missing)} of {len(set(wanted))} that run and qrels name are not in it"
        raise ValueError(f'{source}: no {kind} "{missing[0]}" ({counts})')
