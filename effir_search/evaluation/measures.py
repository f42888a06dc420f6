"""A run and qrels to measures, by ir-measures: every judged query counts, and ties are ordered as trec_eval does."""

import csv
import io
import json
import logging
import math
import re
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import ir_measures
from ir_measures import Measure, Qrel, ScoredDoc, SumAgg

from effir_search.errors import UserError
from effir_search.text.trec import read_qrels, read_run, strictly_decreasing

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


# Grades and cutoffs that trec_eval still computes with: for each grade up to the highest it keeps a number.
LARGEST_GRADE = 1_000_000
LARGEST_CUTOFF = 2**31 - 1
NAMES_LIKE = "ir-measures has names like nDCG@10, R@100, RR@10, AP, and trec_eval's ndcg_cut_10, recall_100, map"
# What trec_eval calls them, and ir-measures.
TREC_NAMES = {
    "map": "AP", "ndcg": "nDCG", "recip_rank": "RR", "bpref": "Bpref", "set_map": "SetAP", "set_F": "SetF",
    "set_P": "SetP", "set_recall": "SetR", "set_relative_P": "SetRelP", "num_q": "NumQ", "num_rel": "NumRel",
    "num_ret": "NumRet", "num_rel_ret": "NumRelRet",
}  # fmt: skip
# The same of those with a number, as in ndcg_cut_10 or ndcg_cut.10.
TREC_NUMBERED = {
    "map_cut": "AP@{}", "ndcg_cut": "nDCG@{}", "P": "P@{}", "recall": "R@{}", "success": "Success@{}",
    "iprec_at_recall": "IPrec@{}", "set_F": "SetF(beta={})",
}  # fmt: skip
# What parameters must be, where ir-measures takes more and its tools then fail or compute something else.
LIMITS: dict[str, tuple[Callable, str]] = {
    "cutoff": (lambda value: 1 <= value <= LARGEST_CUTOFF, f"from 1 to {LARGEST_CUTOFF}"),
    "rel": (lambda value: 1 <= value <= LARGEST_GRADE, f"from 1 to {LARGEST_GRADE}"),
    "recall": (lambda value: 0 <= value <= 1 and round(value, 2) == value, "from 0 to 1, with two decimals at most"),
    "beta": (lambda value: value == 0 or 1e-4 <= value <= 1e6, "0, or from 0.0001 to 1000000"),
    "p": (lambda value: 0 < value < 1, "between 0 and 1"),
    "gains": (
        lambda value: all(type(n) is int and n <= LARGEST_GRADE for pair in value.items() for n in pair),
        f"whole numbers by grade, up to {LARGEST_GRADE}, as in {{1: 3, 2: 10}}",
    ),
}


def parse_measures(text: str) -> list[Measure]:
    """Return the measures of a list, divided by blanks or commas: ``nDCG@10 R@100 AP(rel=2)``.

    Names are those of ir-measures, or trec_eval's, such as ``ndcg_cut_10``.

    Raises:
        ValueError: A name that neither knows, a parameter that is missing, unknown or out of range, or a measure that
            no installed tool computes.
    """
    measures = []
    for name in _split_names(text):
        measure = _parse_measure(name)
        _check_parameters(name, measure)
        _check_computable(name, measure)
        if measure not in measures:
            measures.append(measure)
    if not measures:
        raise UserError(f"no measures given; {NAMES_LIKE}")
    return measures


def _parse_measure(name: str) -> Measure:
    """Return the measure of a name, its parameters not checked but for whole numbers that may be real ones."""
    ours = TREC_NAMES.get(name, name)
    if numbered := re.fullmatch(r"(\w+?)[._](\d+(?:\.\d+)?)", name):
        ours = TREC_NUMBERED.get(numbered[1], name).format(numbered[2])
    try:
        measure = ir_measures.parse_measure(ours)
    except NameError as error:
        raise UserError(f"measure {name!r} is unknown; {NAMES_LIKE}") from error
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
        raise UserError(f"measure {name!r} cannot be read; {NAMES_LIKE}") from error
    real = [key for key, info in measure.SUPPORTED_PARAMS.items() if info.dtype is float]
    return measure(**{key: float(value) for key, value in measure.params.items() if key in real and type(value) is int})


def _check_parameters(name: str, measure: Measure) -> None:
    known = measure.SUPPORTED_PARAMS
    if unknown := [key for key in measure.params if key not in known]:
        raise UserError(f"measure {name!r} takes no {unknown[0]}; it takes {', '.join(known) or 'no parameter'}")
    if missing := [key for key, info in known.items() if info.required and key not in measure.params]:
        example = {"cutoff": "@10", "recall": "@0.5"}.get(missing[0], f"({missing[0]}=3)")
        raise UserError(f"measure {name!r} needs a {missing[0]}, as in {measure.__name__}{example}")
    for key, value in measure.params.items():
        info = known[key]
        fits, limits = LIMITS.get(key, (lambda _: True, f"a {info.dtype.__name__}"))
        if info.dtype is str:
            limits = f"one of {', '.join(info.choices)}"
        is_whole = info.dtype is not int or type(value) is int  # to Python, True is 1
        if not (is_whole and info.validate(value) and fits(value)):
            raise UserError(f"measure {name!r}: its {key} is {value!r}; it must be {limits}")


def _check_computable(name: str, measure: Measure) -> None:
    if ir_measures.DefaultPipeline.supports(measure):
        return
    tools = [tool for tool in ir_measures.DefaultPipeline.providers if tool.supports(measure)]
    if advice := [instructions for tool in tools if (instructions := tool.install_instructions())]:
        raise UserError(
            f"measure {name!r} is known to ir-measures, but needs a package that is not installed: {advice[0]}"
        )
    raise UserError(f"measure {name!r} is known to ir-measures, but no tool computes it so; try other parameters")


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
        ValueError: No query counts, the run has no hits or none of a judged query, a grade is too high, a measure has
            no value for a query, or its own program fails.
    """
    qrels = list(qrels)
    judged = list(dict.fromkeys(qrel.query_id for qrel in qrels))
    positive = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    without_positive = [query_id for query_id in judged if query_id not in positive]
    counted = positive if only_with_positives else set(judged)
    if not judged:
        raise UserError("the qrels hold no judgments")
    if not counted:
        raise UserError("no judged query has a relevant document")

    hits: dict[str, list[ScoredDoc]] = {}
    for hit in run:
        hits.setdefault(hit.query_id, []).append(hit)
    if not hits:
        raise UserError("the run holds no hits")
    if not hits.keys() & counted:
        ours, theirs = next(iter(hits)), next(query_id for query_id in judged if query_id in counted)
        raise UserError(
            f"no query of the run is judged, so run and qrels do not belong together: {ours!r} is a query of the run, "
            f"{theirs!r} one of the qrels"
        )
    if too_high := [qrel for qrel in qrels if qrel.relevance > LARGEST_GRADE]:
        raise UserError(f"the qrels have the grade {too_high[0].relevance}; the highest that counts is {LARGEST_GRADE}")
    order = [query_id for query_id in judged if query_id in counted]
    grades: dict[str, dict[str, int]] = {query_id: {} for query_id in order}
    for qrel in qrels:
        if qrel.query_id in counted:
            grades[qrel.query_id][qrel.doc_id] = qrel.relevance
    ranked = {
        query_id: {hit.doc_id: hit.score for hit in strictly_decreasing(hits[query_id])}
        for query_id in order
        if query_id in hits
    }
    per_query: dict[str, dict[Measure, float]] = {query_id: {} for query_id in order}
    for measure in measures:
        values = _values(measure, grades, ranked)
        for query_id in order:
            per_query[query_id][measure] = values.get(query_id, 0.0)
    return Evaluation(
        mean={measure: _mean(measure, [per_query[query_id][measure] for query_id in order]) for measure in measures},
        per_query=per_query,
        missing=[query_id for query_id in order if query_id not in hits],
        without_positive=without_positive,
    )


def _values(
    measure: Measure, grades: Mapping[str, Mapping[str, int]], ranked: Mapping[str, Mapping[str, float]]
) -> dict[str, float]:
    """Return a measure by query; of queries that are left out it is 0.

    Each is computed by itself: of several ir-measures mixes some up, such as NumRet beside one with judged_only.

    Args:
        measure: What is computed.
        grades: By query and document.
        ranked: Scores by query and document, no two of a query equal.

    Raises:
        ValueError: The measure has no value for a query, or its own program fails.
    """
    # What depends on the qrels alone is there for queries that the run lacks, too; ir-measures leaves these out.
    if measure.NAME == "NumQ":
        return dict.fromkeys(grades, 1.0)
    if measure.NAME == "NumRel":
        return {
            query_id: float(sum(grade >= 1 for grade in query_grades.values()))
            for query_id, query_grades in grades.items()
        }
    # trec_eval's bpref reads beyond its memory where no grade of a query is as high as the level that counts.
    lowest = measure.params.get("rel", -math.inf)
    grades = {
        query_id: query_grades for query_id, query_grades in grades.items() if max(query_grades.values()) >= lowest
    }
    ranked = {query_id: ranked[query_id] for query_id in grades if query_id in ranked}
    if not ranked:
        return {}
    try:
        return {
            metric.query_id: float(metric.value) for metric in ir_measures.calc([measure], grades, ranked).per_query
        }
    except subprocess.CalledProcessError as error:
        reason = "gdeval, for ERR, takes only numbers for query ids"
        raise UserError(f"the program that ir-measures runs for {measure} failed ({reason})") from error
    except ZeroDivisionError as error:
        raise UserError(
            f"{measure} has no value for a query of which all hits that count are relevant, or none counts"
        ) from error


def _mean(measure: Measure, values: Sequence[float]) -> float:
    """Return the mean, or of counts the sum; a query for which a tool gives no value counts 0 like any other."""
    return sum(values) if isinstance(measure.aggregator(), SumAgg) else sum(values) / len(values)


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
        raise UserError(f"{run}: {error}") from error
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
