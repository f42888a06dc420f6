"""The tables of a study: words for people, numbers for CSV."""

import csv
from collections.abc import Iterable, Sequence
from pathlib import Path

from effir_search.encoding.devices import DTYPES
from effir_search.evaluation.pages import Table
from effir_search.files.reading import read_json
from effir_search.pruning.prune import NAMES
from effir_search.settings import StudyTable
from effir_search.study.plan import Plan, Row
from effir_search.study.results import Difference, Estimate, Outcome, Results

TITLES: dict[StudyTable, str] = {
    "kinds": "Dropping MLPs, attentions or blocks",
    "shape": "Depth, width, or both, at one size",
    "parts": "What tells which parts to drop",
    "units": "What tells which units to cut",
    "native": "Shapes that any program runs, at the same measured speed",
}
EXPLAINED: dict[StudyTable, str] = {
    "kinds": "So many parts of one kind are dropped, the least important first.",
    "shape": "The recipe's model beside models of its number of parameters that lose parts alone, or units alone.",
    "parts": "The same number of parts goes, chosen by each criterion; no unit is cut.",
    "units": "The same parts and the same number of units go; the units are chosen by each criterion.",
    "native": "Whole blocks alone, and one width for all layers, each as nearly as fast as the recipe's model as such "
    "a shape can be, measured in turns on this machine.",
}
ORDER = "Order of dropping"
STATES = ((False, "untrained"), (True, "trained"))


def tables_of(results: Results, analysis: Path) -> list[Table]:
    """Return all tables, in the order in which they are shown.

    Args:
        results: What came out.
        analysis: The folder of the whole model's analysis.
    """
    shown = [_comparison(name, rows, results) for name, rows in results.tables.items()]
    retention = [_retention(results)] if results.speeds else []
    return [*shown, *retention, _order(analysis), _by_collection(results)]


def _comparison(name: StudyTable, rows: Sequence[Row], results: Results) -> Table:
    header = ["", "parameters left"]
    states = [state for state in STATES if any((row.plan, state[0]) in results.outcomes for row in rows)]
    for trained, words in states:
        header += [f"nDCG@10, {words}", f"kept, {words}"]
        if any(
            results.outcomes[row.plan, trained].seed_range for row in rows if (row.plan, trained) in results.outcomes
        ):
            header.append(f"kept by seeds, {words}")
    body = []
    for row in rows:
        cells = [row.label, f"{results.outcomes[row.plan, False].share_left:.1%}"]
        for trained, words in states:
            outcome = results.outcomes.get((row.plan, trained))
            cells += [f"{outcome.macro:.4f}", with_interval(outcome.kept)] if outcome else ["", ""]
            if f"kept by seeds, {words}" in header:
                span = outcome.seed_range if outcome else None
                cells.append(f"{span[0]:.1%} to {span[1]:.1%}" if span else "")
        body.append(cells)
    return Table(TITLES[name], EXPLAINED[name], header, body, _verdicts(results.differences[name]))


def _verdicts(differences: Sequence[Difference]) -> list[str]:
    """Return a sentence for each difference: what it is, or that none is shown."""
    return [verdict(difference) for difference in sorted(differences, key=lambda d: not d.trained)]


def verdict(difference: Difference) -> str:
    """Return a difference in a sentence."""
    first, second, sizes, trained, estimate = difference
    state = "Trained" if trained else "Untrained"
    gap = f"{estimate.value:+.4f} [{estimate.low:+.4f}, {estimate.high:+.4f}]"
    size = f" ({sizes[0]:.1%} and {sizes[1]:.1%} of the parameters left)" if max(sizes) - min(sizes) > 0.0005 else ""
    over = "over collections it contains 0"
    if estimate.is_none:
        return f"{state}, {first} and {second}{size}: no difference is shown; nDCG@10 {gap} contains 0."
    word = "better" if estimate.value > 0 else "worse"
    doubt = f", but {over}" if estimate.low_over_collections <= 0 <= estimate.high_over_collections else ""
    return f"{state}, {first} is {word} than {second}{size}: nDCG@10 {gap}{doubt}."


def with_interval(estimate: Estimate) -> str:
    """Return a share with its interval over queries."""
    return f"{estimate.value:.1%} [{estimate.low:.1%}, {estimate.high:.1%}]"


def over_collections(estimate: Estimate) -> str:
    """Return the interval of a share over collections."""
    return f"[{estimate.low_over_collections:.1%}, {estimate.high_over_collections:.1%}]"


def _retention(results: Results) -> Table:
    dtypes = list(dict.fromkeys(dtype for _plan, dtype in results.speeds))
    plans = list(dict.fromkeys(plan for plan, _dtype in results.speeds))
    header = ["", "parameters", *(f"MB, {dtype}" for dtype in dtypes)]
    header += [f"documents/s, {dtype}" for dtype in dtypes]
    header += ["kept, mean of collections", "the same, over collections", "kept, mean of queries"]
    rows = []
    for plan in [Plan(), *plans]:
        outcome = best_trained(results, plan)
        label = "the model as it is" if plan.is_whole else label_of(results, plan)
        cells = [label, f"{outcome.parameters:,}"]
        cells += [f"{outcome.parameters * DTYPES[dtype].itemsize / 1e6:.1f}" for dtype in dtypes]
        for dtype in dtypes:
            if plan.is_whole:
                cells.append("1.00x")
            else:
                speed = results.speeds[plan, dtype]
                cells.append(f"{speed.shape:.0f} ({speed.speedup:.2f}x)")
        if plan.is_whole:
            cells += [f"100% ({outcome.macro:.4f})", "", f"100% ({outcome.micro:.4f})"]
        else:
            cells += [with_interval(outcome.kept), over_collections(outcome.kept), with_interval(outcome.kept_micro)]
        rows.append(cells)
    queries = ", ".join(f"{name} {number:,}" for name, number in results.queries.items())
    text = (
        "Quality kept against size and speed, trained where models are trained. Parameters and MB with embeddings; "
        "documents a second of a shape beside the full model in the same minutes, as a ratio of that in brackets. "
        f"The mean of collections counts each collection alike, the mean of queries each query: {queries}."
    )
    return Table("What is kept, against size and speed", text, header, rows, [])


def best_trained(results: Results, plan: Plan) -> Outcome:
    """Return a plan's outcome, trained if it is."""
    return results.outcomes.get((plan, True)) or results.outcomes[plan, False]


def label_of(results: Results, plan: Plan) -> str:
    """Return the first words that a table has for a plan."""
    return next(row.label for rows in results.tables.values() for row in rows if row.plan == plan)


def _order(analysis: Path) -> Table:
    order = read_json(analysis / "analysis.json")["order"]
    rows = [
        [criterion, NAMES[kind], ", ".join(str(layer_idx) for layer_idx, _score in parts)]
        for criterion, by_kind in order.items()
        for kind, parts in by_kind.items()
        if parts
    ]
    text = "Layers of the whole model, counted from 0, the first to go first; greedy as far as a model needs it."
    return Table(ORDER, text, ["criterion", "parts", "layers"], rows, [])


def _by_collection(results: Results) -> Table:
    names = list(results.queries)
    header = ["", "", *(f"{name} ({number:,} queries)" for name, number in results.queries.items()), "mean"]
    labels = {Plan(): "the model as it is"}
    for name, rows in results.tables.items():
        for row in rows:
            prefix = {"parts": "parts by ", "units": "units by "}.get(name, "")
            labels.setdefault(row.plan, prefix + row.label)
    rows = []
    for plan, label in labels.items():
        for trained, words in STATES:
            if outcome := results.outcomes.get((plan, trained)):
                figures = [f"{outcome.ndcg[name]:.4f}" for name in names]
                rows.append([label, words, *figures, f"{outcome.macro:.4f}"])
    return Table("nDCG@10 by collection", "Means over seeds, where there are several.", header, rows, [])


def csv_rows(results: Results) -> list[dict[str, object]]:
    """Return every figure of every row of the comparisons, a dict for each row and state."""
    rows = []
    full = ("full", [Row("full", Plan())])
    for name, table in [full, *results.tables.items()]:
        for row in table:
            for trained, words in STATES:
                if outcome := results.outcomes.get((row.plan, trained)):
                    rows.append({"table": name, "row": row.label, "state": words} | _numbers(outcome, results))
    return rows


def _numbers(outcome: Outcome, results: Results) -> dict[str, object]:
    numbers: dict[str, object] = {
        "models": " ".join(cell.name for cell in outcome.cells),
        "parameters": outcome.parameters,
        "share_left": outcome.share_left,
        **{f"nDCG@10 {name}": value for name, value in outcome.ndcg.items()},
        "macro": outcome.macro,
        "micro": outcome.micro,
    }
    for name, estimate in (("kept", outcome.kept), ("kept_micro", outcome.kept_micro)):
        numbers |= {name if part == "value" else f"{name}_{part}": value for part, value in estimate._asdict().items()}
    low, high = outcome.seed_range or ("", "")
    before, best = outcome.likeness or ("", "")
    numbers |= {"kept_lowest_seed": low, "kept_highest_seed": high, "watched_before": before, "watched_best": best}
    numbers |= {"steps": outcome.steps}
    for dtype in dict.fromkeys(dtype for _plan, dtype in results.speeds):
        speed = results.speeds.get((outcome.plan, dtype))
        numbers |= {f"documents_per_second_{dtype}": speed.shape if speed else ""}
        numbers |= {f"speedup_{dtype}": speed.speedup if speed else ""}
    return numbers


def difference_rows(results: Results) -> list[dict[str, object]]:
    """Return every difference between rows, a dict for each."""
    return [
        {
            "table": name,
            "first": difference.first,
            "second": difference.second,
            "state": dict(STATES)[difference.trained],
            "share_left_first": difference.share_left[0],
            "share_left_second": difference.share_left[1],
            **difference.estimate._asdict(),
            "none": difference.estimate.is_none,
        }
        for name, differences in results.differences.items()
        for difference in differences
    ]


def write_csv(path: Path, rows: Iterable[dict[str, object]]) -> None:
    """Write dicts of the same names as CSV."""
    rows = list(rows)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]) if rows else [], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
