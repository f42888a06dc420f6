"""The figures of a study: the order of dropping, and quality kept against size and speed."""

from pathlib import Path

from matplotlib.figure import Figure

from effir_search.files.reading import read_json
from effir_search.pruning.analyze import Analysis
from effir_search.pruning.dropping_order import RankedPart
from effir_search.pruning.figures import COLORS, MARKERS, order_figure
from effir_search.study.plan import Plan
from effir_search.study.results import Outcome, Results

# Models that lose parts of several kinds, or units.
MIXED, MIXED_COLOR, MIXED_MARKER = "depth and width", "#009e73", "D"
NAMES = {"mlp": "MLPs", "attention": "attentions", "block": "blocks", MIXED: MIXED}


def read_analysis(folder: Path) -> Analysis:
    """Return an analysis from its folder."""
    record = read_json(folder / "analysis.json")
    order = {
        name: {kind: [RankedPart(*part) for part in parts] for kind, parts in kinds.items()}
        for name, kinds in record["order"].items()
    }
    return Analysis(**record | {"order": order})


def dropping_figure(folder: Path) -> Figure:
    """Return which layers lack a part once so many are dropped, a panel for each criterion and kind."""
    return order_figure(read_analysis(folder))


def pareto_figure(results: Results) -> Figure:
    """Return the share of nDCG@10 kept against parameters left and, where it was measured, against speed."""
    dtypes = list(dict.fromkeys(dtype for _plan, dtype in results.speeds))
    figure = Figure(figsize=(9.5, 4.2), dpi=150, layout="constrained")
    panels = figure.subplots(1, 1 + bool(dtypes), squeeze=False, sharey=True)[0]
    _draw(panels[0], results, {key: 100 * outcome.share_left for key, outcome in results.outcomes.items()})
    panels[0].set_xlabel("parameters outside the embeddings left (%)")
    panels[0].set_xlim(102, 0)
    panels[0].set_ylabel("nDCG@10 kept (%)")
    if dtypes:
        speeds = {
            key: results.speeds[key[0], dtypes[0]].speedup
            for key in results.outcomes
            if (key[0], dtypes[0]) in results.speeds
        }
        _draw(panels[1], results, speeds)
        panels[1].set_xlabel(f"documents a second, times the full model's ({dtypes[0]})")
    for panel in panels:
        panel.axhline(100, color="#888888", linewidth=0.8)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="outside upper left", ncols=4, frameon=False, fontsize="small")
    return figure


def _draw(panel: object, results: Results, places: dict[tuple[Plan, bool], float]) -> None:
    for trained, words in ((False, "untrained"), (True, "trained")):
        series: dict[str, list[tuple[float, Outcome]]] = {}
        for (plan, is_trained), place in places.items():
            if is_trained == trained and not plan.is_whole:
                series.setdefault(_series(plan), []).append((place, results.outcomes[plan, trained]))
        for name, points in series.items():
            points.sort(key=lambda point: point[0])
            color, marker = COLORS.get(name, MIXED_COLOR), MARKERS.get(name, MIXED_MARKER)
            x, kept = [place for place, _ in points], [outcome.kept for _, outcome in points]
            y = [100 * estimate.value for estimate in kept]
            ends = [[100 * max(0, e.value - e.low) for e in kept], [100 * max(0, e.high - e.value) for e in kept]]
            line = "none" if name == MIXED else "solid" if trained else "dotted"
            panel.errorbar(
                *(x, y),
                yerr=ends if trained else None,
                color=color,
                marker=marker,
                markersize=5,
                markerfacecolor=color if trained else "white",
                linestyle=line,
                linewidth=1,
                elinewidth=0.8,
                label=f"{NAMES[name]}, {words}",
            )


def _series(plan: Plan) -> str:
    return MIXED if plan.narrow or len(plan.drops) != 1 else next(iter(plan.drops))
