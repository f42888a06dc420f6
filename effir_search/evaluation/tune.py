"""The weight and the normalisation of a hybrid search, chosen on queries that are not the ones searched for."""

import itertools
import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from ir_measures import Qrel, ScoredDoc

from effir_search.encoding.encoder import DEFAULT_OPTIONS
from effir_search.errors import UserError
from effir_search.evaluation.measures import evaluate_queries, parse_measures
from effir_search.files.whole import whole_file
from effir_search.searching.fuse import effective_weights, in_order, list_scores
from effir_search.searching.hybrid import HybridSearcher, Ranking, open_index
from effir_search.searching.search_topics import load_topics, search_queries
from effir_search.searching.searcher import BATCH_SIZE, DEFAULT_SETTINGS
from effir_search.settings import (
    EncoderOptions,
    FusionSettings,
    Normalization,
    SearchSettings,
    TopicField,
    TuningSettings,
)
from effir_search.text.own_documents import comparable
from effir_search.text.trec import Query, read_qrels

logger = logging.getLogger(__name__)

MEASURE = "nDCG@10"
CUTOFF = 10
# Weights of the dense list that are tried; 0 and 1 are BM25 and the dense search alone.
WEIGHTS = tuple(round(0.05 * step, 2) for step in range(21))
NORMALIZATIONS: tuple[Normalization, ...] = ("min-max", "z-score")


@dataclass(frozen=True)
class Candidate:
    """One way to fuse, and how good it was.

    Attributes:
        normalization: Of the scores.
        weight: Of the dense list.
        ndcg: nDCG@10 on the dev queries that have a relevant document.
    """

    normalization: Normalization
    weight: float
    ndcg: float


def search_tuned(
    topics: str,
    output: Path,
    *,
    tuning: TuningSettings,
    index_dir: Path | Sequence[Path],
    ranking: Ranking,
    normalizations: Sequence[Normalization] = NORMALIZATIONS,
    settings: SearchSettings = DEFAULT_SETTINGS,
    options: EncoderOptions = DEFAULT_OPTIONS,
    encoder: str | None = None,
    topics_field: TopicField = "title",
    qrels: str | None = None,
    tag: str = "effir",
) -> tuple[int, int]:
    """Tune a hybrid search on dev queries, then search topics: ``effir search --tune``; see ``search_topics``.

    What was tried lies beside the run, as ``RUN.tuning.json``.

    Args:
        topics: What is searched for.
        output: The run.
        tuning: The dev queries and their judgments.
        index_dir: The dense index.
        ranking: Names the BM25 index; the fusion is "interpolation".
        normalizations: What is tried.
        settings: How the indexes are searched.
        options: How the encoder is loaded.
        encoder: Model folder or hub name; None = the index's own.
        topics_field: Part of a TREC topic that is the query.
        qrels: Qrels whose queries alone are searched.
        tag: The run's last column.

    Raises:
        ValueError: A dev query is one of those searched for.
        OSError: A file cannot be read or written.
    """
    queries = load_topics(topics, field=topics_field, qrels=read_qrels(qrels) if qrels else None)
    judgments = read_qrels(tuning.tune)
    dev = load_topics(tuning.tune_topics or topics, field=topics_field, qrels=judgments)
    dev = separate(dev, queries, tuning.tune)
    searcher = open_index(index_dir, encoder, settings, options, ranking)
    candidates = tune(searcher, dev, judgments, normalizations=normalizations)
    best = best_candidate(candidates)
    logger.info("%s on %s: %s", MEASURE, tuning.tune, describe_tuned(candidates))
    chosen = replace(ranking.hybrid, weight=best.weight, normalization=best.normalization)
    num_hits = search_queries(queries, output, searcher.with_settings(chosen), tag=tag)
    record = {"measure": MEASURE, "qrels": tuning.tune, "topics": tuning.tune_topics or topics, "queries": len(dev)}
    with whole_file(output.with_name(f"{output.name}.tuning.json")) as file:
        tried = {"chosen": asdict(best), "tried": list(map(asdict, candidates))}
        file.write(json.dumps(record | tried, indent=1, ensure_ascii=False) + "\n")
    return len(queries), num_hits


def separate(dev: Sequence[Query], queries: Sequence[Query], where: str) -> list[Query]:
    """Return the dev queries whose text is not searched for, too, under another id; others are warned of.

    Raises:
        ValueError: A dev query has the id of one that is searched for, or none is left.
    """
    ids, texts = {query.query_id for query in queries}, {comparable(query.text) for query in queries} - {""}
    if shared := [query.query_id for query in dev if query.query_id in ids]:
        raise UserError(
            f'{where}: {len(shared)} of {len(dev)} queries, such as "{shared[0]}", are also searched for, and their '
            "figures would be too good; search others with --qrels, or tune on others"
        )
    others = [query for query in dev if comparable(query.text) not in texts]
    if not others:
        raise UserError(f"{where}: every query has the text of one that is searched for; tune on others")
    if number := len(dev) - len(others):
        logger.warning(
            "%s: %d of %d queries have the text of one that is searched for, and are left out", where, number, len(dev)
        )
    return others


def tune(
    searcher: HybridSearcher,
    dev: Sequence[Query],
    judgments: Sequence[Qrel],
    *,
    normalizations: Sequence[Normalization] = NORMALIZATIONS,
) -> list[Candidate]:
    """Return how good each normalisation and weight is on dev queries; their lists are searched once.

    Args:
        searcher: Over both indexes.
        dev: The queries; those without a relevant document do not count.
        judgments: Of these.
        normalizations: What is tried, each with all ``WEIGHTS``.

    Raises:
        ValueError: No dev query has a relevant document.
    """
    positive = {qrel.query_id for qrel in judgments if qrel.relevance > 0}
    counted = [query for query in dev if query.query_id in positive]
    if not counted:
        raise UserError("none of the queries to tune on has a relevant document")
    (measure,) = parse_measures(MEASURE)
    sums: dict[tuple[Normalization, float], float] = dict.fromkeys(itertools.product(normalizations, WEIGHTS), 0.0)
    for start in range(0, len(counted), BATCH_SIZE):
        batch = counted[start : start + BATCH_SIZE]
        pairs = list(searcher.lists(batch))
        ids = {query.query_id for query in batch}
        of_batch = [qrel for qrel in judgments if qrel.query_id in ids]
        for names, run in _first_hits(pairs, searcher.hybrid, normalizations).items():
            if run:
                per_query = evaluate_queries(run, of_batch, [measure], only_with_positives=True).per_query
                sums[names] += sum(values[measure] for values in per_query.values())
    return [Candidate(*names, total / len(counted)) for names, total in sums.items()]


def _first_hits(
    pairs: Iterable[tuple[list[ScoredDoc], list[ScoredDoc]]],
    settings: FusionSettings,
    normalizations: Sequence[Normalization],
) -> dict[tuple[Normalization, float], list[ScoredDoc]]:
    """Return for each normalisation and weight the best hits of all queries, as many as count, ties complete."""
    runs: dict[tuple[Normalization, float], list[ScoredDoc]] = {
        names: [] for names in itertools.product(normalizations, WEIGHTS)
    }
    for pair in pairs:
        ranked = [in_order(hits)[: settings.depth] for hits in pair]
        hits = list({hit.doc_id: hit for hits in ranked for hit in hits}.values())
        if not hits:
            continue
        cutoff = min(CUTOFF, len(hits))
        weights = np.array([effective_weights((weight, 1 - weight), ranked) for weight in WEIGHTS])  # (weights, 2)
        for normalization in normalizations:
            how = replace(settings, normalization=normalization)
            dense, bm25 = (
                np.array([scores.get(hit.doc_id, missing) for hit in hits])
                for scores, missing in (list_scores(one, method="interpolation", settings=how) for one in ranked)
            )
            fused = (weights[:, :1] * dense + weights[:, 1:] * bm25).astype(np.float32)  # (weights, documents)
            lowest = np.partition(fused, -cutoff, axis=1)[:, -cutoff]
            for weight, scores, low in zip(WEIGHTS, fused, lowest, strict=True):
                best = (hits[place]._replace(score=float(scores[place])) for place in np.flatnonzero(scores >= low))
                runs[normalization, weight].extend(best)
    return runs


def best_candidate(candidates: Sequence[Candidate]) -> Candidate:
    """Return the best of them; of equal ones that whose weight is closest to a half, then the first."""
    return max(candidates, key=lambda one: (round(one.ndcg, 9), -abs(one.weight - 0.5)))


def describe_tuned(candidates: Sequence[Candidate]) -> str:
    """Return one line: what is best, and what both searches alone and their even mean are."""
    best, normalization = best_candidate(candidates), candidates[0].normalization
    of_weight = {one.weight: one.ndcg for one in candidates if one.normalization == normalization}
    return (
        f"{best.ndcg:.4f} with weight {best.weight:g}, {best.normalization}; BM25 alone {of_weight[0.0]:.4f}, "
        f"dense alone {of_weight[1.0]:.4f}, weight 0.5 {of_weight[0.5]:.4f} ({normalization})"
    )
