"""Hard negatives from a run: what it ranks high, is no positive, and a teacher does not take for one."""

import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ir_measures import ScoredDoc
from tqdm import tqdm

from effir_search.errors import UserError
from effir_search.files.whole import whole_file
from effir_search.text.corpus import Document, document_text, documents_there
from effir_search.text.examples import Scorer, checked_scores, document_key, find_queries, warn_of_missing
from effir_search.text.own_documents import comparable
from effir_search.text.trec import read_qrels, read_run, strictly_decreasing
from effir_search.training.teachers import load_teacher

# Queries whose pairs go to the teacher together: it encodes each distinct text of them once.
CHUNK = 1024


class Mined(NamedTuple):
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
    query_id: str
    text: str
    positives: dict[str, str]
    candidates: dict[str, str]
    num_own: int
    num_copies: int


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
    stock_architecture: bool = False,
) -> Mined:
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
        stock_architecture: Of the teacher, as ``Encoder.from_pretrained`` takes it.

    Raises:
        ValueError: Ranks, numbers or a share that cannot be, a run and qrels that share no query, a hit that the corpus
            lacks, no topic or no positive that is there, or nothing left to write.
        OSError: A file cannot be read or written.

    Source: the bound is TopK-PercPos of NV-Retriever, arXiv 2407.15831.
    """
    if not 1 <= first <= last:
        raise UserError(f"ranks from {first} to {last}: --first must be at least 1, and --last not below it")
    if negatives < 1:
        raise UserError(f"--negatives {negatives} must be at least 1")
    if not 0 < teacher_ratio <= 1:
        raise UserError(f"--teacher-ratio {teacher_ratio} must be above 0 and at most 1")
    if sample not in SAMPLES:
        raise UserError(f"sample {sample!r} is unknown; known are {', '.join(SAMPLES)}")

    positives: dict[str, list[str]] = {}
    for qrel in read_qrels(qrels):
        of_query = positives.setdefault(qrel.query_id, [])
        if qrel.relevance > 0:
            of_query.append(qrel.doc_id)
    hits: dict[str, list[ScoredDoc]] = {}
    for hit in read_run(run):
        hits.setdefault(hit.query_id, []).append(hit)
    if not hits.keys() & positives.keys():
        raise UserError(f"{run}: no query of the run is judged in {qrels}: do run and qrels belong together?")

    mined = [query_id for query_id, of_query in positives.items() if of_query and query_id in hits]
    ranked: dict[str, list[str]] = {}
    num_false = 0
    for query_id in mined:
        ranked[query_id], num_left_out = _ranked(hits[query_id], positives[query_id], first, last, margin)
        num_false += num_left_out
    queries = find_queries(topics, mined)
    warn_of_missing(qrels, topics, "topic", mined, queries)
    mined = [query_id for query_id in mined if query_id in queries]
    with_text = [query_id for query_id in mined if queries[query_id].strip()]
    without_text, mined = len(mined) - len(with_text), with_text
    relevant = set(itertools.chain.from_iterable(positives[query_id] for query_id in mined))
    candidates = set(itertools.chain.from_iterable(ranked[query_id] for query_id in mined))
    texts = {doc_id: _text(document) for doc_id, document in documents_there(corpus, relevant | candidates).items()}
    if mined:
        _check_hits(corpus, candidates, texts)
        in_corpus = {doc_id: texts[doc_id] for doc_id in relevant & texts.keys()}
        warn_of_missing(qrels, corpus, "document", relevant, in_corpus)

    score = None
    if teacher is not None or reranker is not None:
        score = load_teacher(teacher, reranker, device=device, stock_architecture=stock_architecture)
    without_positive = sum(not positives.get(query_id) for query_id in hits)
    num_queries = num_negatives = without_negative = num_own = num_copies = 0
    with whole_file(output) as file, tqdm(total=len(mined), unit="query", disable=None) as progress:
        for start in range(0, len(mined), CHUNK):
            chunk = [
                _query(query_id, queries[query_id], positives[query_id], ranked[query_id], texts)
                for query_id in mined[start : start + CHUNK]
            ]
            num_own += sum(query.num_own for query in chunk)
            num_copies += sum(query.num_copies for query in chunk)
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
            raise UserError(
                f"{run}: no query has both a positive and a negative left ({without_positive} without a positive, "
                f"{without_negative} without a negative, {without_text} empty); nothing is written"
            )
    not_in_run = sum(bool(of_query) and query_id not in hits for query_id, of_query in positives.items())
    return Mined(
        num_queries,
        num_negatives,
        num_false=num_false,
        num_own=num_own,
        num_copies=num_copies,
        without_positive=without_positive,
        without_negative=without_negative,
        not_in_run=not_in_run,
        without_text=without_text,
    )


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
    parts += [f"{mined.num_own} hits with the query's own text left out"] if mined.num_own else []
    parts += [f"{mined.num_copies} copies of positives left out"] if mined.num_copies else []
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


def _text(document: Document) -> _Text:
    text = document_text(document)
    return _Text(text, _key(text), _key(document.text))


def _key(text: str) -> int:
    """Stand for a text without differences in case and white space."""
    return document_key(comparable(text))


def _query(
    query_id: str, text: str, positives: Sequence[str], candidates: Sequence[str], texts: Mapping[str, _Text]
) -> _Query:
    """Return a query with the texts of its positives and candidates; empty and repeated ones are left out."""
    of_positives = {doc_id: texts[doc_id] for doc_id in positives if doc_id in texts and texts[doc_id].text}
    own, of_positive = _key(text), {positive.key for positive in of_positives.values()}
    seen = {_key("")}
    of_candidates: dict[str, str] = {}
    num_own = num_copies = 0
    for doc_id in candidates:
        candidate = texts[doc_id]
        if own in (candidate.key, candidate.key_without_title):
            num_own += 1
        elif candidate.key in of_positive:
            num_copies += 1
        elif candidate.key not in seen:
            seen.add(candidate.key)
            of_candidates[doc_id] = candidate.text
    plain = {doc_id: positive.text for doc_id, positive in of_positives.items()}
    return _Query(query_id, text, plain, of_candidates, num_own, num_copies)


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


def _check_hits(corpus: str, doc_ids: set[str], found: Mapping[str, _Text]) -> None:
    if missing := sorted(doc_ids - found.keys()):
        raise UserError(
            f'{corpus}: no document "{missing[0]}" ({len(missing)} of {len(doc_ids)} hits of the run are not in it)'
        )
