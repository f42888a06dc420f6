"""Several lists of hits into one: reciprocal ranks or scores added up. For runs of any program: ``effir fuse``.

Neither torch nor Java is needed here. ``hybrid.py`` fuses a dense list with BM25's by the same functions.
"""

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from ir_measures import ScoredDoc

from effir_search.errors import UserError
from effir_search.settings import FuseSettings, FusionMethod, FusionSettings, Normalization
from effir_search.text.trec import read_run, strictly_decreasing, write_run

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS = FuseSettings()
# By how much Anserini lowers the score of each document that has the score of the one before it.
ANSERINI_STEP = 1e-6


@dataclass
class MissingCounts:
    """How often a list lacked what another had.

    Attributes:
        documents: Documents of all queries that were fused.
        missing: Of these, by the number of the list, those that it lacks.
        empty: By the number of the list, queries for which it has no hit.
        queries: Queries that were fused.
    """

    documents: int = 0
    queries: int = 0
    missing: Counter[int] = field(default_factory=Counter)
    empty: Counter[int] = field(default_factory=Counter)

    def say(self, names: Sequence[str], method: FusionMethod, settings: FusionSettings) -> None:
        """Log what was missing, and what was done about it."""
        score = "counts 0 there" if method == "rrf" or settings.missing == "zero" else "has its lowest score there"
        for place, name in enumerate(names):
            if number := self.missing[place]:
                logger.info("%s lacks %d of %d documents; each %s", name, number, self.documents, score)
            if number := self.empty[place]:
                logger.warning(
                    "%s has no hits for %d of %d queries; their hits are those of the other lists",
                    *(name, number, self.queries),
                )


def fuse_lists(
    lists: Sequence[Sequence[ScoredDoc]],
    *,
    method: FusionMethod,
    weights: Sequence[float],
    settings: FusionSettings,
    counts: MissingCounts | None = None,
) -> list[ScoredDoc]:
    """Return one query's hits fused, best first, with strictly decreasing scores: all documents of all lists.

    A document's score is the sum over lists of the list's weight times what the list gives it: 1 / (rrf_k + rank), or
    its normalised score. A list without hits gives nothing to any document, see ``effective_weights``.

    Args:
        lists: Hits of one query, in any order; ranks are those of ``strictly_decreasing``.
        method: What is added up; "average" is "interpolation" with the weights that are given, which are all alike.
        weights: Of each list.
        settings: Constant, normalisation, depth.
        counts: Gets what was missing.

    Source: Cormack, Clarke and Buettcher, Reciprocal Rank Fusion Outperforms Condorcet (SIGIR 2009).
    """
    ranked = [in_order(hits)[: settings.depth] for hits in lists]
    places = {hit.doc_id: hit for hits in ranked for hit in hits}  # by document
    totals = dict.fromkeys(places, 0.0)
    for weight, hits in zip(effective_weights(weights, ranked), ranked, strict=True):
        scores, missing = list_scores(hits, method=method, settings=settings)
        for doc_id in totals:
            totals[doc_id] += weight * scores.get(doc_id, missing)
    if counts is not None:
        counts.queries += 1
        counts.documents += len(places)
        counts.missing.update({place: len(places) - len(hits) for place, hits in enumerate(ranked) if hits})
        counts.empty.update(place for place, hits in enumerate(ranked) if not hits)
    return strictly_decreasing([hit._replace(score=totals[doc_id]) for doc_id, hit in places.items()])


def effective_weights(weights: Sequence[float], ranked: Sequence[Sequence[ScoredDoc]]) -> list[float]:
    """Return the weights of one query's lists; if none that has hits weighs anything, these weigh 1.

    Else all documents would have the score 0, and the order would be that of their ids.
    """
    if any(weight for weight, hits in zip(weights, ranked, strict=True) if hits):
        return list(weights)
    return [float(bool(hits)) for hits in ranked]


def in_order(hits: Sequence[ScoredDoc]) -> Sequence[ScoredDoc]:
    """Return one query's hits in the order of ``strictly_decreasing``; where they are in it, as they are."""
    scores = _float32(hits)
    return hits if np.isfinite(scores).all() and (np.diff(scores) < 0).all() else strictly_decreasing(hits)


def _float32(hits: Sequence[ScoredDoc]) -> np.ndarray:
    """Return the scores as trec_eval reads them, ``(hits,)``."""
    with np.errstate(over="ignore"):
        return np.array([hit.score for hit in hits]).astype(np.float32)


def list_scores(
    ranked: Sequence[ScoredDoc], *, method: FusionMethod, settings: FusionSettings
) -> tuple[dict[str, float], float]:
    """Return what a list gives its documents, by id, and what it gives any other.

    Args:
        ranked: Hits of one query, as ``strictly_decreasing`` gives them.
        method: Whether ranks or scores count.
        settings: Constant, normalisation, and what others get.
    """
    if method == "rrf":
        return {hit.doc_id: 1 / (settings.rrf_k + rank) for rank, hit in enumerate(ranked, start=1)}, 0.0
    if not ranked:
        return {}, 0.0
    scores, lowest = normalized(_with_ties(_float32(ranked)), settings.normalization)
    missing = 0.0 if settings.missing == "zero" else lowest
    return {hit.doc_id: float(score) for hit, score in zip(ranked, scores, strict=True)}, missing


def normalized(scores: np.ndarray, normalization: Normalization) -> tuple[np.ndarray, float]:
    """Return the scores of a list made comparable, ``(hits,)`` float64, and the lowest score that the list gives.

    - "min-max": from 0 to 1, so that the lowest is 0. Where all scores are equal, each is 1.
    - "z-score": with mean 0 and standard deviation 1, that of the list as a whole. Where all are equal, each is 0.
    - "none": as they are.

    Args:
        scores: ``(hits,)``, at least one.
        normalization: Which of these.
    """
    low, high = scores.min(), scores.max()
    if normalization == "min-max":
        return (scores - low) / (high - low) if high > low else np.ones_like(scores), 0.0
    if normalization == "z-score":
        scores = (scores - scores.mean()) / scores.std() if high > low else np.zeros_like(scores)
    return scores, float(scores.min())


def _with_ties(decreasing: np.ndarray) -> np.ndarray:
    """Return decreasing scores, those equal again that a run tells apart by the smallest step alone.

    Our own runs lower a tied score to the next float32, Anserini's by 1e-6. A list of equal scores would otherwise be
    spread over the whole range of a normalisation.
    """
    scores = decreasing.astype(np.float64)
    steps, smallest = -np.diff(scores), np.spacing(np.abs(scores[:-1]).astype(np.float32)).astype(np.float64)
    is_tied = (steps <= 1.01 * smallest) | (np.abs(steps - ANSERINI_STEP) <= smallest)
    first = np.where(np.concatenate([[False], is_tied]), 0, np.arange(len(scores)))
    return scores[np.maximum.accumulate(first)]


def fuse(runs: Sequence[Path], output: Path, settings: FuseSettings = DEFAULT_SETTINGS, *, tag: str = "effir") -> int:
    """Fuse TREC runs of any programs into one: ``effir fuse``. Return the number of hits.

    Queries come in the order in which the runs have them first. Ranks are by score, whatever the files' column says.

    Args:
        runs: The files, at least two.
        output: The new run; an existing one is replaced once the new one is complete.
        settings: How.
        tag: The run's last column.

    Raises:
        ValueError: Fewer than two runs, another number of weights, a bad run, no query in two of them.
        OSError: A file cannot be read or written.
    """
    if len(runs) < 2:
        raise UserError(f"a fusion needs at least two runs, got {len(runs)}")
    if output.resolve() in [run.resolve() for run in runs]:
        raise UserError(f"--output {output}: is one of the runs, and would replace it; choose another")
    if settings.weights and len(settings.weights) != len(runs):
        raise UserError(f"--weights: {len(settings.weights)} weights for {len(runs)} runs; give one for each")
    lists: list[dict[str, list[ScoredDoc]]] = []
    for run in runs:
        lists.append({})
        for hit in read_run(run):
            lists[-1].setdefault(hit.query_id, []).append(hit)
    queries = Counter(query_id for by_query in lists for query_id in by_query)
    if max(queries.values()) == 1:
        raise UserError(f"no query is in two of {', '.join(map(str, runs))}; are they of the same topics?")
    alike = 1.0 if settings.method == "rrf" else 1 / len(runs)
    how = {"method": settings.method, "weights": settings.weights or [alike] * len(runs), "settings": settings}
    counts = MissingCounts()
    hits = (
        hit
        for query_id in queries
        for hit in fuse_lists([by.get(query_id, []) for by in lists], counts=counts, **how)[: settings.hits]
    )
    num_hits = write_run(hits, output, tag=tag)
    counts.say(list(map(str, runs)), settings.method, settings)
    return num_hits
