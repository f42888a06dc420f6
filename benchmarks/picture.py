"""Draw docs/quality-and-speed.svg, the README's picture, from quality-and-speed.csv beside this file."""

import csv
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

HERE = Path(__file__).parent
TABLE = HERE / "quality-and-speed.csv"
PICTURE = HERE.parent / "docs" / "quality-and-speed.svg"
# Of Okabe and Ito's palette, whose colours differ for colour-blind readers too; the shapes differ as well.
FULL, SMALLER = "#000000", "#0072B2"
# Labels stand above the interval; the label of this model stands below it, since its neighbour's would touch.
BELOW = "48 % left"


def draw(rows: list[dict[str, str]]) -> Figure:
    """Return the figure: a point a model, with its 95 % interval."""
    figure = Figure(figsize=(7.6, 4.2), layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.axhline(100, color="0.6", linewidth=1, linestyle="--", zorder=0)
    for row in rows:
        speed, kept = float(row["speed"]), float(row["kept"])
        label, ends = f"{row['model']}\n{kept:.1f} % kept", (kept, kept)
        if row["low"]:
            ends = float(row["low"]), float(row["high"])
            axes.plot([speed, speed], ends, color=SMALLER, alpha=0.45, linewidth=2)
            axes.plot(speed, kept, "o", color=SMALLER, markersize=9)
        else:
            label = row["model"]
            axes.plot(speed, kept, "s", color=FULL, markersize=9)
        below = row["model"] == BELOW
        axes.annotate(
            label, (speed, ends[0] if below else ends[1]), (0, -6 if below else 8), textcoords="offset points",
            ha="center", va="top" if below else "bottom", fontsize=10,
        )  # fmt: skip
    axes.set(xlim=(0.9, 1.8), ylim=(91.5, 106))
    axes.set_xlabel("documents encoded a second, times the full model's (bfloat16, 2 CPU cores)")
    axes.set_ylabel("nDCG@10, % of the full model's")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def main() -> None:
    """Read the table and write the picture."""
    with TABLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    # Letters are drawn as paths, so that no font is needed; the salt makes the same bytes each time.
    matplotlib.rcParams.update({"svg.fonttype": "path", "svg.hashsalt": "effir", "font.size": 11})
    draw(rows).savefig(PICTURE, format="svg", metadata={"Date": None, "Creator": None})


if __name__ == "__main__":
    main()
