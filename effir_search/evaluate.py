"""A run and qrels to measures, by ir-measures: every judged query counts, and ties are ordered as trec_eval does."""

import csv
import io
import itertools
import json
import logging
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import ir_measures
from ir_measures import Measure, Qrel, ScoredDoc, SumAgg

from effir_search.trec import read_qrels, read_run, strictly_decreasing

logger = logging.getLogger(__name__)


class Evaluation(NamedTuple):
    """Measures of one run.

    Attributes:
        mean: Over all queries that count, as ir-measures aggregates them: counts such as NumRet are summed.
        per_query: By query id, then by measure, for the same queries.
        missing: Judged queries that the run has no hit for; they count 0.
        without_positive: Judged queries without a relevant document; they count 0, unless they were left out.
    """

    mean: dict[Measure, float]
    per_query: dict[str, dict[Measure, float]]
    missing: list[str]
    without_positive: list[str]


def parse_measures(text: str) -> list[Measure]:
    """Return the measures of a list in ir-measures' names, divided by blanks or commas: ``nDCG@10 R@100 AP(rel=2)``.

    Raises:
        ValueError: A name that ir-measures does not know, or that no installed tool computes.
    """
    measures = []
    for name in _split_names(text):
        try:
            measure = ir_measures.parse_measure(name)
            supported = ir_measures.DefaultPipeline.supports(measure)
        except (NameError, ValueError, TypeError, SyntaxError, AssertionError) as error:
            raise ValueError(
                f"measure {name!r} is unknown; ir-measures has names like nDCG@10, R@100, RR@10, AP"
            ) from error
        if not supported:
            raise ValueError(f"measure {name!r} is known to ir-measures, but needs a package that is not installed")
        if measure not in measures:
            measures.append(measure)
    if not measures:
        raise ValueError("no measures given; ir-measures has names like nDCG@10, R@100, RR@10, AP")
    return measures


def evaluate(run: Iterable[ScoredDoc], qrels: Iterable[Qrel], measures: Sequence[Measure]) -> dict[Measure, float]:
    """Return the mean of each measure over all judged queries; see ``evaluate_queries`` for the rest."""
    return evaluate_queries(run, qrels, measures).mean


def evaluate_queries(
    run: Iterable[ScoredDoc],
    qrels: Iterable[Qrel],
    measures: Sequence[Measure],
    *,
    only_with_positives: bool = False,
) -> Evaluation:
    """Score a run against qrels.

    Equal scores are ordered as trec_eval orders them, for every measure; hits of other queries are ignored.

    Args:
        run: Hits in any order.
        qrels: Judgments; a relevance above 0 is positive.
        measures: What is computed, see ``parse_measures``.
        only_with_positives: Leave out judged queries that have no relevant document.

    Raises:
        ValueError: No query counts, the run has no hits or none of a judged query, or a measure's own program fails.
    """
    qrels = list(qrels)
    judged = list(dict.fromkeys(qrel.query_id for qrel in qrels))
    positive = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    without_positive = [query_id for query_id in judged if query_id not in positive]
    counted = positive if only_with_positives else set(judged)
    if not judged:
        raise ValueError("the qrels hold no judgments")
    if not counted:
        raise ValueError("no judged query has a relevant document")

    hits: dict[str, list[ScoredDoc]] = {}
    for hit in run:
        hits.setdefault(hit.query_id, []).append(hit)
    if not hits:
        raise ValueError("the run holds no hits")
    if not hits.keys() & counted:
        ours, theirs = next(iter(hits)), next(query_id for query_id in judged if query_id in counted)
        raise ValueError(
            f"no query of the run is judged, so run and qrels do not belong together: {ours!r} is a query of the run, "
            f"{theirs!r} one of the qrels"
        )
    hits = {query_id: of_query for query_id, of_query in hits.items() if query_id in counted}
    ranked = list(itertools.chain.from_iterable(strictly_decreasing(of_query) for of_query in hits.values()))
    try:
        results = ir_measures.calc(measures, [qrel for qrel in qrels if qrel.query_id in counted], ranked)
    except subprocess.CalledProcessError as error:
        names = ", ".join(map(str, measures))
        reason = "gdeval, for ERR, takes only numbers for query ids"
        raise ValueError(f"the program that ir-measures runs for one of {names} failed ({reason})") from error

    order = [query_id for query_id in judged if query_id in counted]
    per_query: dict[str, dict[Measure, float]] = {query_id: {} for query_id in order}
    for metric in results.per_query:
        per_query[metric.query_id][metric.measure] = metric.value
    for query_id in order:
        per_query[query_id] = {measure: per_query[query_id].get(measure, 0.0) for measure in measures}
    return Evaluation(
        mean={measure: results.aggregated[measure] for measure in measures},
        per_query=per_query,
        missing=[query_id for query_id in order if query_id not in hits],
        without_positive=without_positive,
    )


def evaluate_run(run: Path, qrels: str, measures: str, *, only_with_positives: bool = False) -> Evaluation:
    """Score a run file: ``effir evaluate``. What counts 0 without having been searched well or badly is warned of.

    Raises:
        ValueError: A bad run, qrels or measure, or a run and qrels that share no query.
        OSError: A file cannot be read.
    """
    parsed = parse_measures(measures)
    evaluation = evaluate_file(run, read_qrels(qrels), parsed, only_with_positives=only_with_positives)
    if not only_with_positives:
        warn_of_no_positive(evaluation)
    return evaluation


def evaluate_file(
    run: Path, qrels: Sequence[Qrel], measures: Sequence[Measure], *, only_with_positives: bool
) -> Evaluation:
    """Score a run file, see ``evaluate_queries``; errors, and warnings of what it lacks, name the file."""
    hits = read_run(run)
    try:
        evaluation = evaluate_queries(hits, qrels, measures, only_with_positives=only_with_positives)
    except ValueError as error:
        raise ValueError(f"{run}: {error}") from error
    if missing := evaluation.missing:
        names = ", ".join(missing[:10]) + (", ..." if len(missing) > 10 else "")
        logger.warning("%d judged queries are not in %s and count 0: %s", len(missing), run, names)
    if not {qrel[:2] for qrel in qrels} & {hit[:2] for hit in hits}:
        logger.warning(
            "no hit of %s is judged: do they belong together? %r is a document of the run, %r one of the qrels",
            *(run, hits[0].doc_id, qrels[0].doc_id),
        )
    return evaluation


def warn_of_no_positive(evaluation: Evaluation) -> None:
    """Warn of judged queries without a relevant document, which were not left out."""
    if evaluation.without_positive:
        logger.warning(
            "%d judged queries have no relevant document and count 0; --only-with-positives leaves them out",
            len(evaluation.without_positive),
        )


def format_evaluation(evaluation: Evaluation, form: str, *, per_query: bool = False) -> str:
    """Return an evaluation as text; ``form`` is a key of ``FORMATS``. Per-query rows come before the mean, "all"."""
    return FORMATS[form](evaluation.mean, list(evaluation.per_query.items()) if per_query else [])


Values = dict[Measure, float]
Rows = list[tuple[str, Values]]


def _as_text(mean: Values, rows: Rows) -> str:
    """Columns as trec_eval prints them: measure, query id or "all", value."""
    width = max(len(str(measure)) for measure in mean)
    return "\n".join(
        f"{measure!s:{width}}\t{query_id}\t{_readable(measure, value)}"
        for query_id, values in [*rows, ("all", mean)]
        for measure, value in values.items()
    )


def _as_json(mean: Values, rows: Rows) -> str:
    named = {query_id: {str(measure): value for measure, value in of.items()} for query_id, of in rows}
    means = {str(measure): value for measure, value in mean.items()}
    return json.dumps({"mean": means, "per_query": named} if rows else means, indent=2, ensure_ascii=False)


def _as_csv(mean: Values, rows: Rows) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["query_id", *mean])
    writer.writerows([query_id, *values.values()] for query_id, values in [*rows, ("all", mean)])
    return text.getvalue().rstrip("\n")


def _as_markdown(mean: Values, rows: Rows) -> str:
    lines = [["query", *map(str, mean)], ["---", *["---:"] * len(mean)]]
    lines += [[query_id, *(_readable(*pair) for pair in of.items())] for query_id, of in [*rows, ("all", mean)]]
    lines = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


FORMATS = {"text": _as_text, "json": _as_json, "csv": _as_csv, "markdown": _as_markdown}


def _readable(measure: Measure, value: float) -> str:
    """Counts, which are summed over queries, as whole numbers; others with four decimals."""
    return f"{value:.0f}" if isinstance(measure.aggregator(), SumAgg) else f"{value:.4f}"


def _split_names(text: str) -> list[str]:
    """Split at blanks and commas outside brackets: "nDCG(dcg='exp-log2', cutoff=10) AP" are two names."""
    names, depth = [""], 0
    for character in text:
        depth += {"(": 1, ")": -1}.get(character, 0)
        if depth <= 0 and (character.isspace() or character == ","):
            names.append("")
        else:
            names[-1] += character
    return [name for name in names if name]
