"""A figure of a comparison: each query's difference, one panel a run."""

import logging
from pathlib import Path

import numpy as np

from effir_search.errors import UserError
from effir_search.evaluation.compare import Comparison
from effir_search.files.whole import whole_file

logger = logging.getLogger(__name__)

WIN, LOSS = "#0072b2", "#d55e00"  # Wong's palette: told apart by colour-blind readers, and in grey.


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


def _fitting(title: str) -> str:
    """Cut a long title at its front: the end of a path tells more."""
    return title if len(title) <= 80 else "..." + title[-77:]
