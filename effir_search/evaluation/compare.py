"""Runs beside a baseline: means, differences, wins, ties and losses, two paired tests with Holm's correction."""

import csv
import io
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from ir_measures import Measure
from scipy import stats

from effir_search.errors import UserError
from effir_search.evaluation.measures import (
    Evaluation,
    evaluate_file,
    parse_measures,
    warn_of_no_positive,
)
from effir_search.files.whole import whole_file
from effir_search.text.trec import read_qrels

logger = logging.getLogger(__name__)

# Values of a query that are no further apart are a tie: measures are sums of fractions, rounded at about 1e-16.
TIE = 1e-9
# Sign patterns held in memory at a time; it changes neither draw nor result.
BATCH = 500
MARKS = {"t_test_holm": "†", "randomisation_holm": "‡"}
WIN, LOSS = "#0072b2", "#d55e00"  # Wong's palette: told apart by colour-blind readers, and in grey.


class Row(NamedTuple):
    """One run in one measure; of the baseline only the mean.

    Attributes:
        mean: Over all queries that count, also for measures that ``effir evaluate`` sums, such as NumRet.
        difference: The run's mean less the baseline's.
        wins: Queries in which the run is better than the baseline by more than ``TIE``.
        t_test_p: None where the test is undefined: a single query, or the same difference in all.
        t_test_holm: The same, corrected by ``holm`` over all runs and measures.
    """

    measure: Measure
    run: str
    mean: float
    difference: float | None = None
    wins: int | None = None
    ties: int | None = None
    losses: int | None = None
    t_test_p: float | None = None
    t_test_holm: float | None = None
    randomisation_p: float | None = None
    randomisation_holm: float | None = None


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
                    t_test_p=t_test(difference),
                    randomisation_p=randomisation_test(difference, resamples=resamples, seed=seed),
                )
            )
    for test in ("t_test", "randomisation"):
        corrected = holm([getattr(row, f"{test}_p") for row in rows])
        rows = [row._replace(**{f"{test}_holm": p}) for row, p in zip(rows, corrected, strict=True)]
    return Comparison(baseline, query_ids, rows, differences, resamples, seed)


def t_test(differences: np.ndarray) -> float | None:
    """Return the two-sided p of the paired t-test, 1 if all differences are 0, None where it is undefined.

    Source: Student, The probable error of a mean, Biometrika 6 (1908).
    """
    if len(differences) < 2:
        return None
    if not differences.any():
        return 1.0
    if np.ptp(differences) <= TIE:  # No variance to divide by.
        return None
    return float(stats.ttest_1samp(differences, 0).pvalue)


def randomisation_test(differences: np.ndarray, *, resamples: int = 10_000, seed: int = 0) -> float:
    """Return the two-sided p of the paired randomisation test of the mean.

    If it is chance which of two runs gave which of a query's two values, every pattern of signs is as likely. p is
    the share of patterns whose mean is at least as far from 0: of all where ``resamples`` permits it, else of that
    many drawn with ``seed``, plus the one observed. It depends on neither the order of queries nor that of the runs.

    Source: Smucker, Allan and Carterette, A comparison of statistical significance tests for information retrieval
    evaluation, CIKM 2007.
    """
    differences = differences[differences != 0]  # A tie is 0 under both signs.
    if len(differences) < 2:
        return 1.0
    # One order and one direction, so that the same patterns meet the same differences.
    differences = np.sort(differences * np.sign(differences.sum()))
    return float(
        stats.permutation_test(
            (differences,),
            _distance_from_0,
            permutation_type="samples",
            vectorized=True,
            n_resamples=resamples,
            batch=BATCH,
            alternative="greater",
            rng=np.random.default_rng(seed),
        ).pvalue
    )


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values corrected for their number, in their order; None is no test, and stays.

    The smallest of m is multiplied by m, the next by m - 1 and so on; none becomes less than the one before, nor
    more than 1.

    Source: Holm, A simple sequentially rejective multiple test procedure, Scandinavian Journal of Statistics 6 (1979).
    """
    corrected = list(p_values)
    order = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    largest = 0.0
    for rank, (p, place) in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p))
        corrected[place] = largest
    return corrected


def format_comparison(comparison: Comparison, form: str, *, alpha: float = 0.05) -> str:
    """Return a comparison as text; ``form`` is a key of ``FORMATS``, ``alpha`` is what a corrected p is marked below.

    JSON and CSV have full precision and no marks.
    """
    return FORMATS[form](comparison, alpha)


def draw_figure(comparison: Comparison, path: Path) -> None:
    """Write a PNG with each query's difference in the first measure, sorted, one panel a run.

    Raises:
        ValueError: The name does not end in ``.png``.
        OSError: The file cannot be written.
    """
    if path.suffix.lower() != ".png":
        raise UserError(f"{path}: a figure is a PNG; give a name that ends in .png")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    measure = comparison.rows[0].measure
    rows = [row for row in comparison.rows if row.measure == measure and row.difference is not None]
    num_queries = len(comparison.query_ids)
    figure = Figure(figsize=(8, 1 + 2.4 * len(rows)), dpi=150, layout="constrained")
    panels = figure.subplots(len(rows), sharex=True, sharey=True, squeeze=False)[:, 0]
    # Bars and the gaps between them as one shape a colour: a shape for each query takes seconds for thousands.
    edges = (np.arange(num_queries)[:, None] + [0.55, 1.45]).ravel()
    heights = np.zeros(2 * num_queries - 1)
    for panel, row in zip(panels, rows, strict=True):
        heights[::2] = -np.sort(-comparison.differences[row.run][measure])
        panel.stairs(heights.clip(min=0), edges, fill=True, color=WIN)
        panel.stairs(heights.clip(max=0), edges, fill=True, color=LOSS)
        panel.axhline(0, color="black", linewidth=0.8)
        panel.axhline(row.difference, color="black", linewidth=0.8, linestyle="dashed")
        # Above the bars, which may be anywhere in the panel.
        title = {"parse_math": False, "loc": "left", "fontsize": "medium", "fontweight": "bold"}
        panel.set_title(_fitting(row.run), pad=18, **title)
        counts = f"{row.wins} wins, {row.ties} ties, {row.losses} losses; mean {row.difference:+.4f} (dashed)"
        panel.text(0, 1.03, counts, transform=panel.transAxes, fontsize="small", va="bottom")
        panel.set_xlim(0, num_queries + 1)
        panel.margins(y=0.15)
        panel.spines[["top", "right"]].set_visible(False)
    panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    panels[-1].set_xlabel(f"{num_queries} queries, best first in each panel")
    figure.supylabel(f"difference in {measure}", parse_math=False, fontsize="medium")
    figure.suptitle(_fitting(f"{measure}, query by query, against {comparison.baseline}"), parse_math=False)
    with whole_file(path) as file:  # A text file; a PNG goes into the bytes below it.
        figure.savefig(file.buffer, format="png")
    logger.info("differences of each query -> %s", path)


def _run_names(paths: Sequence[Path]) -> list[str]:
    stems = [Path(path.name.removesuffix(".gz")).stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path) for path in paths]


def _values(evaluation: Evaluation, query_ids: Sequence[str], measure: Measure) -> np.ndarray:
    return np.array([evaluation.per_query[query_id][measure] for query_id in query_ids], dtype=np.float64)


def _fitting(title: str) -> str:
    """Cut a long title at its front: the end of a path tells more."""
    return title if len(title) <= 80 else "..." + title[-77:]


def _distance_from_0(differences: np.ndarray, axis: int) -> np.ndarray:
    """Absolute sum, in which patterns that tie are equal whatever the rounding of floats."""
    return np.abs(differences.sum(axis=axis)).round(9)


HEADER = ["measure", "run", "mean", "difference", "wins/ties/losses", "t-test p", "Holm", "randomisation p", "Holm"]


def _cells(row: Row, alpha: float) -> list[str]:
    """One line under ``HEADER``, the marks padded so that decimal points stand below each other; "-": undefined."""
    marks = "".join(mark for test, mark in MARKS.items() if (p := getattr(row, test)) is not None and p < alpha)
    cells = [str(row.measure), row.run, f"{row.mean:.4f}{marks:{len(MARKS)}}"]
    if row.difference is None:
        return cells + [""] * (len(HEADER) - len(cells))
    tests = [row.t_test_p, row.t_test_holm, row.randomisation_p, row.randomisation_holm]
    return [*cells, f"{row.difference:+.4f}", f"{row.wins}/{row.ties}/{row.losses}", *map(_readable, tests)]


def _readable(p: float | None) -> str:
    return "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _notes(comparison: Comparison, alpha: float) -> list[str]:
    family = sum(row.difference is not None for row in comparison.rows)
    drawn = comparison.resamples
    return [
        f"{len(comparison.query_ids)} queries; difference, wins, ties and losses against {comparison.baseline}.",
        f"Two-sided p; randomisation: {drawn} sign patterns, or all if fewer; Holm over {family} comparisons each.",
        f"After Holm's correction p < {alpha:g}: † t-test, ‡ randomisation test.",
    ]


def _as_text(comparison: Comparison, alpha: float) -> str:
    lines = [HEADER, *(_cells(row, alpha) for row in comparison.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    table = []
    for line in lines:
        names = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        table.append("  ".join(names + numbers).rstrip())
    return "\n".join([*table, "", *_notes(comparison, alpha)])


def _as_json(comparison: Comparison, _alpha: float) -> str:
    rows = [row._asdict() | {"measure": str(row.measure)} for row in comparison.rows]
    facts = {
        "baseline": comparison.baseline,
        "num_queries": len(comparison.query_ids),
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "rows": rows,
    }
    return json.dumps(facts, indent=2, ensure_ascii=False)


def _as_csv(comparison: Comparison, _alpha: float) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(Row._fields)
    writer.writerows(comparison.rows)
    return text.getvalue().rstrip("\n")


def _as_markdown(comparison: Comparison, alpha: float) -> str:
    lines = [HEADER, ["---", "---", *["---:"] * (len(HEADER) - 2)]]
    lines += [[cell.strip().replace("|", "\\|") for cell in _cells(row, alpha)] for row in comparison.rows]
    table = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([*table, "", *_notes(comparison, alpha)])


# Names keep their hyphens, numbers get a minus; "<" alone would print as an inverted exclamation mark.
LATEX_NAMES = str.maketrans(
    {character: f"\\{character}" for character in "_%&#${}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    | {"<": "$<$", ">": "$>$", "|": "$|$"}
)
LATEX_NUMBERS = str.maketrans({"-": "$-$", "+": "$+$", "<": "$<$", "†": r"$^\dagger$", "‡": r"$^\ddagger$"})


def _as_latex(comparison: Comparison, alpha: float) -> str:
    """A tabular for the package booktabs, under its notes as LaTeX comments."""
    lines = [HEADER]
    for row in comparison.rows:
        cells = [cell.strip() for cell in _cells(row, alpha)]
        lines.append([cell.translate(LATEX_NAMES) for cell in cells[:2]])
        lines[-1] += ["--" if cell == "-" else cell.translate(LATEX_NUMBERS) for cell in cells[2:]]
    header, *rows = (" & ".join(line) + r" \\" for line in lines)
    notes = [f"% {note}" for note in _notes(comparison, alpha)]
    columns = "ll" + "r" * (len(HEADER) - 2)
    top = [f"\\begin{{tabular}}{{{columns}}}", r"\toprule", header, r"\midrule"]
    return "\n".join([*notes, *top, *rows, r"\bottomrule", r"\end{tabular}"])


FORMATS = {"text": _as_text, "json": _as_json, "csv": _as_csv, "markdown": _as_markdown, "latex": _as_latex}
