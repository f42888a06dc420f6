"""Measures of a suite's runs as tables: one for each measure, with intervals; Markdown, CSV, LaTeX, a page."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ir_measures import Measure

from effir_search.evaluation.bootstrap import RESAMPLES, interval, resample
from effir_search.evaluation.comparison_tables import LATEX_NAMES, LATEX_NUMBERS
from effir_search.evaluation.measures import evaluate_queries
from effir_search.evaluation.pages import Table, as_markdown, html_page, html_table
from effir_search.files.whole import whole_file
from effir_search.suite.collections import Collection
from effir_search.text.trec import Qrel, read_run


@dataclass(frozen=True)
class Results:
    """What was measured.

    Attributes:
        systems: Names of the rows.
        baseline: The row that others are compared with.
        collections: In order.
        values: By measure and by collection, ``(systems, queries)``.
        notes: Sentences about how.
    """

    systems: list[str]
    baseline: int
    collections: list[Collection]
    values: dict[str, dict[str, np.ndarray]]
    notes: list[str]
    seed: int


def measured(run: Path, qrels: Sequence[Qrel], measures: Sequence[Measure]) -> dict[str, list[float]]:
    """Return by measure a run's figures, for the judged queries that have a relevant document, in their order.

    A system that finds nothing for any of them has 0.
    """
    positive = {qrel.query_id for qrel in qrels if qrel.relevance > 0}
    hits = [hit for hit in read_run(run) if hit.query_id in positive] if run.stat().st_size else []
    if not hits:
        return {str(measure): [0.0] * len(positive) for measure in measures}
    per_query = evaluate_queries(hits, qrels, measures, only_with_positives=True).per_query
    return {str(measure): [values[measure] for values in per_query.values()] for measure in measures}


def columns_of(results: Results) -> dict[str, list[str]]:
    """Return the columns of the table, and the collections of each: those of a group are one column, their mean."""
    columns: dict[str, list[str]] = {}
    for collection in results.collections:
        columns.setdefault(collection.group or collection.name, []).append(collection.name)
    return columns


def means_of(results: Results, measure: str) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of each column, ``(columns, systems)``, and the resampled means, ``(resamples + 1, systems)``.

    Queries are drawn within each collection, the same for every system; the mean is over columns, so that the parts of
    a group count together as one.
    """
    of_column = [
        resample({name: results.values[measure][name] for name in names}, seed=results.seed + place).macro
        for place, names in enumerate(columns_of(results).values())
    ]
    return np.array([means[0] for means in of_column]), np.mean(of_column, axis=0)


def table_of(results: Results, measure: str) -> Table:
    """Return the table of one measure."""
    columns, (figures, means) = columns_of(results), means_of(results, measure)
    base = results.systems[results.baseline]
    rows = []
    for place, system in enumerate(results.systems):
        mean_cell = f"{means[0, place]:.4f}"
        rows.append([system, *(f"{value:.4f}" for value in figures[:, place]), mean_cell, _kept(results, means, place)])
    header = ["system", *(_label(name, parts) for name, parts in columns.items()), "mean", f"of {base}"]
    queries = ", ".join(
        f"{name} {results.values[measure][name].shape[1]}" for names in columns.values() for name in names
    )
    notes = [*results.notes, f"Queries that have a relevant document: {queries}."]
    text = (
        f"{measure}, the mean over judged queries that have a relevant document. The last column is the share of the "
        f"mean of {base}, with its 95 % interval (paired bootstrap over queries, {RESAMPLES:,} samples)."
    )
    return Table(measure, text, header, rows, notes)


def _label(name: str, parts: Sequence[str]) -> str:
    return f"{name} (mean of {len(parts)})" if len(parts) > 1 else name


def _kept(results: Results, means: np.ndarray, place: int) -> str:
    """The share of the baseline's mean, with its interval; nothing of the baseline, or where that finds nothing."""
    base = means[:, results.baseline]
    if place == results.baseline or not base.all():
        return "-"
    shares = means[:, place] / base
    low, high = interval(shares)
    return f"{shares[0]:.1%} ({low:.1%} to {high:.1%})"


def write_report(results: Results, folder: Path) -> list[Table]:
    """Write results.md, .csv, .tex and .html, and return the tables."""
    tables = [table_of(results, measure) for measure in results.values]
    title = "Systems on collections"
    _write(folder / "results.md", "\n".join([f"# {title}\n", *map(as_markdown, tables)]))
    _write(folder / "results.html", html_page(title, [f"<h1>{title}</h1>", *map(html_table, tables)]))
    _write(folder / "results.tex", "\n".join(map(as_latex, tables)))
    with whole_file(folder / "results.csv") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["measure", "system", "collection", "group", "queries", "value"])
        writer.writerows(csv_rows(results))
    return tables


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def csv_rows(results: Results) -> list[list[object]]:
    """Return a row for each measure, system and collection, in full precision."""
    groups = {collection.name: collection.group for collection in results.collections}
    return [
        [measure, system, name, groups[name], values.shape[1], float(values[place].mean())]
        for measure, of_measure in results.values.items()
        for place, system in enumerate(results.systems)
        for name, values in of_measure.items()
    ]


def as_latex(table: Table) -> str:
    """Return a table as a tabular for the package booktabs, under its notes as LaTeX comments."""
    lines = [[_latex(cell, LATEX_NAMES) for cell in table.header]]
    lines += [[_latex(row[0], LATEX_NAMES), *(_latex(cell, LATEX_NUMBERS) for cell in row[1:])] for row in table.rows]
    header, *rows = (" & ".join(line) + r" \\" for line in lines)
    top = [f"\\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}", r"\toprule", header, r"\midrule"]
    notes = [f"% {note}" for note in (table.text, *table.notes)]
    return "\n".join([*notes, *top, *rows, r"\bottomrule", r"\end{tabular}", ""])


def _latex(cell: str, characters: Mapping[int, str]) -> str:
    return "--" if cell == "-" else cell.translate(characters).replace("%", r"\%").replace(r"\\%", r"\%")
