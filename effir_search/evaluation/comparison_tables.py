"""A comparison as text: aligned columns, JSON, CSV, Markdown, LaTeX."""

import csv
import io
import json

from effir_search.evaluation.compare import Comparison, Row
from effir_search.evaluation.significance import TESTS


def format_comparison(comparison: Comparison, form: str, *, alpha: float = 0.05) -> str:
    """Return a comparison as text; ``form`` is a key of ``FORMATS``, ``alpha`` is what a corrected p is marked below.

    JSON and CSV have full precision and no marks.
    """
    return FORMATS[form](comparison, alpha)


HEADER = ["measure", "run", "mean", "difference", "wins/ties/losses"]
HEADER += [title for test in TESTS.values() for title in (test.column, "Holm")]


def _cells(row: Row, alpha: float) -> list[str]:
    """One line under ``HEADER``, the marks padded so that decimal points stand below each other; "-": undefined."""
    corrected = {TESTS[name].mark: value.holm for name, value in row.tests.items()}
    marks = "".join(mark for mark, p in corrected.items() if p is not None and p < alpha)
    cells = [str(row.measure), row.run, f"{row.mean:.4f}{marks:{len(TESTS)}}"]
    if row.difference is None:
        return cells + [""] * (len(HEADER) - len(cells))
    p_values = [p for value in row.tests.values() for p in value]
    return [*cells, f"{row.difference:+.4f}", f"{row.wins}/{row.ties}/{row.losses}", *map(_readable, p_values)]


def _readable(p: float | None) -> str:
    return "-" if p is None else "<0.0001" if p < 0.0001 else f"{p:.4f}"


def _notes(comparison: Comparison, alpha: float) -> list[str]:
    family = sum(row.difference is not None for row in comparison.rows)
    drawn = comparison.resamples
    return [
        f"{len(comparison.query_ids)} queries; difference, wins, ties and losses against {comparison.baseline}.",
        f"Two-sided p; randomisation: {drawn} sign patterns, or all if fewer; Holm over {family} comparisons each.",
        f"After Holm's correction p < {alpha:g}: {', '.join(f'{test.mark} {test.title}' for test in TESTS.values())}.",
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
    rows = [_fields(row) | {"measure": str(row.measure)} for row in comparison.rows]
    facts = {
        "baseline": comparison.baseline,
        "num_queries": len(comparison.query_ids),
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "rows": rows,
    }
    return json.dumps(facts, indent=2, ensure_ascii=False)


def _fields(row: Row) -> dict[str, object]:
    """Return the fields of JSON and CSV: each test has its p and that after Holm's correction."""
    fields = row._asdict()
    del fields["tests"]
    for name in TESTS:
        value = row.tests.get(name)
        fields |= {f"{name}_p": value and value.p, f"{name}_holm": value and value.holm}
    return fields


def _as_csv(comparison: Comparison, _alpha: float) -> str:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_fields(comparison.rows[0]))
    writer.writerows(_fields(row).values() for row in comparison.rows)
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
