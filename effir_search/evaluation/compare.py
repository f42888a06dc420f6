"""Runs beside a baseline: means, differences, wins, ties and losses, paired tests with Holm's correction."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
from ir_measures import Measure

from effir_search.errors import UserError
from effir_search.evaluation.measures import (
    Evaluation,
    evaluate_file,
    parse_measures,
    warn_of_no_positive,
)
from effir_search.evaluation.significance import TIE, PValue, tested
from effir_search.text.trec import read_qrels


class Row(NamedTuple):
    """One run in one measure; of the baseline only the mean.

    Attributes:
        mean: Over all queries that count, also for measures that ``effir evaluate`` sums, such as NumRet.
        difference: The run's mean less the baseline's.
        wins: Queries in which the run is better than the baseline by more than ``TIE``.
        tests: By the names of ``significance.TESTS``, corrected over all runs and measures; of the baseline none.
    """

    measure: Measure
    run: str
    mean: float
    difference: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    tests: Mapping[str, PValue] = MappingProxyType({})


class Comparison(NamedTuple):
    """Runs beside a baseline.

    Attributes:
        rows: By measure, then by run, the baseline first.
        differences: By run, then by measure: run less baseline of each query, ``(queries,)``; ties are 0.
        resamples: Sign patterns that the randomisation test drew, with ``seed``, where there were more.
    """

    baseline: str
    query_ids: list[str]
    rows: list[Row]
    differences: dict[str, dict[Measure, np.ndarray]]
    resamples: int
    seed: int


def compare_runs(
    baseline: Path,
    runs: Sequence[Path],
    qrels: str,
    measures: str,
    *,
    only_with_positives: bool = False,
    resamples: int = 10_000,
    seed: int = 0,
) -> Comparison:
    """Compare run files with a baseline over the same judged queries: ``effir compare``.

    A run's name is its file's without the endings or, where two would be the same, every run's is its path.

    Raises:
        ValueError: A bad run, qrels or measure, a file that is given twice, a run and qrels that share no query.
        OSError: A file cannot be read.
    """
    paths = [baseline, *runs]
    resolved = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        if resolved[place] in resolved[:place]:
            raise UserError(f"{path}: this run is given twice; a comparison needs different files")
    parsed, judgments = parse_measures(measures), read_qrels(qrels)
    evaluations = {
        name: evaluate_file(path, judgments, parsed, only_with_positives=only_with_positives)
        for name, path in zip(_run_names(paths), paths, strict=True)
    }
    if not only_with_positives:
        warn_of_no_positive(next(iter(evaluations.values())))
    return compare(evaluations, resamples=resamples, seed=seed)


def compare(evaluations: Mapping[str, Evaluation], *, resamples: int = 10_000, seed: int = 0) -> Comparison:
    """Compare evaluations over the same queries, by the name of the run; the first one is the baseline.

    Raises:
        ValueError: Fewer than two runs, or evaluations of different queries or measures.
    """
    if len(evaluations) < 2:
        raise UserError(f"a comparison needs a baseline and at least one more run, got {len(evaluations)}")
    (baseline, expected), *others = evaluations.items()
    for run, evaluation in others:
        if evaluation.per_query.keys() != expected.per_query.keys() or evaluation.mean.keys() != expected.mean.keys():
            raise UserError(f'"{run}" and "{baseline}" were not evaluated over the same queries and measures')

    query_ids = list(expected.per_query)
    differences: dict[str, dict[Measure, np.ndarray]] = {run: {} for run, _ in others}
    rows = []
    for measure in expected.mean:
        base_values = _values(expected, query_ids, measure)
        rows.append(Row(measure, baseline, float(base_values.mean())))
        for run, evaluation in others:
            values = _values(evaluation, query_ids, measure)
            difference = values - base_values  # (queries,)
            difference[np.abs(difference) <= TIE] = 0
            differences[run][measure] = difference
            rows.append(
                Row(
                    measure,
                    run,
                    float(values.mean()),
                    difference=float(difference.mean()),
                    wins=int((difference > 0).sum()),
                    ties=int((difference == 0).sum()),
                    losses=int((difference < 0).sum()),
                )
            )
    compared = [differences[row.run][row.measure] for row in rows if row.run != baseline]
    tests = iter(tested(compared, resamples=resamples, seed=seed))
    rows = [row if row.run == baseline else row._replace(tests=next(tests)) for row in rows]
    return Comparison(baseline, query_ids, rows, differences, resamples, seed)


def _run_names(paths: Sequence[Path]) -> list[str]:
    stems = [Path(path.name.removesuffix(".gz")).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _values(evaluation: Evaluation, query_ids: Sequence[str], measure: Measure) -> np.ndarray:
    return np.array([evaluation.per_query[query_id][measure] for query_id in query_ids], dtype=np.float64)
