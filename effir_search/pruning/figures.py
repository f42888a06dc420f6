"""The figures of an analysis: importance by layer, order of dropping, size against drift."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

if TYPE_CHECKING:
    from effir_search.pruning.analyze import Analysis

# Told apart also by those who see no colours (Okabe and Ito).
COLORS = {"attention": "#0072b2", "mlp": "#d55e00", "block": "#555555"}
# What a criterion's score is.
SCORES = {
    "cosine": "1 - cos of input and output",
    "embedding": "drift without this part",
    "greedy": "drift without all so far",
}
MARKERS = {"attention": "o", "mlp": "s", "block": "^"}


def importance_figure(analysis: Analysis) -> Figure:
    """Return a panel for each criterion with the score of every part, by layer."""
    figure = Figure(figsize=(4.5 * len(analysis.order), 3.6), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(analysis.order), squeeze=False)[0]
    for panel, (name, order) in zip(panels, analysis.order.items(), strict=True):
        for kind, parts in order.items():
            x, y = zip(*sorted(parts), strict=True) if parts else ((), ())
            line = "none" if name == "greedy" else "solid"  # whose scores grow in another order than that of layers
            panel.plot(x, y, color=COLORS[kind], marker=MARKERS[kind], markersize=4, linestyle=line, label=kind)
        panel.set_title(name, loc="left", fontsize="medium", fontweight="bold")
        panel.set_xlabel("layer")
        panel.set_ylabel(SCORES[name])
        panel.set_ylim(bottom=0)
        _tidy(panel)
    panels[0].legend(frameon=False)
    return figure


def order_figure(analysis: Analysis) -> Figure:
    """Return a panel for each criterion and kind: in the row of N parts dropped, the layers they are of."""
    num_layers = analysis.num_hidden_layers
    kinds = list(next(iter(analysis.order.values())))
    figure = Figure(figsize=(3 * len(kinds), 2.9 * len(analysis.order)), dpi=150, layout="constrained")
    panels = figure.subplots(len(analysis.order), len(kinds), squeeze=False, sharex=True)
    for row, (name, order) in zip(panels, analysis.order.items(), strict=True):
        for panel, (kind, parts) in zip(row, order.items(), strict=True):
            for number, (layer_idx, _score) in enumerate(parts, start=1):
                height = len(parts) - number + 1  # dropped from this row on
                panel.bar(layer_idx, height, bottom=number - 0.5, width=0.9, color=COLORS[kind])
            panel.set_xlim(-0.5, num_layers - 0.5)
            panel.set_ylim(0.5, len(parts) + 0.5 if parts else 1.5)
            panel.set_title(f"{kind}, {name}", loc="left", fontsize="medium", fontweight="bold")
            panel.yaxis.set_major_locator(MaxNLocator(integer=True))
            _tidy(panel)
    figure.supxlabel("layer (the longest bar is the first to go)", fontsize="medium")
    figure.supylabel("parts dropped", fontsize="medium")
    return figure


def curves_figure(analysis: Analysis) -> Figure:
    """Return a panel for each criterion: drift of the embedding against the share of parameters dropped, by kind."""
    figure = Figure(figsize=(max(4.5 * len(analysis.curves), 5.5), 4), dpi=150, layout="constrained")
    panels = figure.subplots(1, len(analysis.curves), squeeze=False, sharex=True, sharey=True)[0]
    for panel, (name, curves) in zip(panels, analysis.curves.items(), strict=True):
        for kind, curve in curves.items():
            _numbers, shares, drifts = np.array(curve).T
            panel.plot(100 * (1 - shares), drifts, color=COLORS[kind], marker=MARKERS[kind], markersize=4, label=kind)
        panel.set_title(name, loc="left", fontsize="medium", fontweight="bold")
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlim(-2, 102)
    panels[0].set_ylim(bottom=0)
    panels[0].set_ylabel("drift of the embedding, 1 - cos")
    figure.supxlabel("parameters outside the embeddings that are dropped (%)", fontsize="medium")
    # Above the panels, since a line may be anywhere in them.
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=3, frameon=False)
    return figure


CURVES = "curves.png"
FIGURES: dict[str, Callable[[Analysis], Figure]] = {
    "importance.png": importance_figure,
    "order.png": order_figure,
    CURVES: curves_figure,
}


def _tidy(panel: object) -> None:
    panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    panel.spines[["top", "right"]].set_visible(False)
