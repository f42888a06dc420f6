"""A benchmark for people: tables, a picture, a page that needs no other file; and the raw figures as JSON."""

import json
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

from matplotlib.figure import Figure

from effir_search.benchmarking.record import BenchmarkRecord, Figures, figures_of, pareto_front
from effir_search.evaluation.bootstrap import RESAMPLES
from effir_search.evaluation.pages import Table, as_markdown, as_svg, html_page, html_table
from effir_search.evaluation.turns import TURN
from effir_search.files.whole import whole_file
from effir_search.model.arithmetic import aligned

JSON, MARKDOWN, PICTURE, PAGE = "benchmark.json", "benchmark.md", "pareto.png", "index.html"
TITLE = "Encoders side by side"
# Of a line of text on a terminal.
WIDTH = 110
FRONT, OTHER = "#0072b2", "#888888"
# A column: its name, and a cell of it by the place of the encoder; a column without any cell is left out.
Column = tuple[str, Callable[[int], str]]


def write_report(record: BenchmarkRecord, folder: Path) -> str:
    """Write everything into a folder, where files of these names are replaced; return the tables as text."""
    figures = figures_of(record)
    tables = tables_of(record, figures)
    picture = pareto_figure(record, figures)
    raw = asdict(record) | {"figures": [row._asdict() for row in figures]}
    texts = {
        MARKDOWN: _markdown(record, tables),
        PAGE: _html(record, tables, as_svg(picture, "pareto")),
        JSON: json.dumps(raw, indent=1, ensure_ascii=False) + "\n",
    }
    with whole_file(folder / PICTURE) as file:  # A text file; a PNG goes into the bytes below it.
        picture.savefig(file.buffer, format="png")
    for name, text in texts.items():
        with whole_file(folder / name) as file:
            file.write(text)
    return "\n\n".join([*map(_as_text, tables), f"Raw figures, tables, picture and page: {folder}"])


def tables_of(record: BenchmarkRecord, figures: Sequence[Figures]) -> list[Table]:
    """Return the tables: what encoders are worth, and what they take."""
    encoders = record.encoders
    worth: list[Column] = [
        ("documents/s", lambda i: f"{figures[i].documents_per_second:.0f}"),
        ("speedup", lambda i: f"{figures[i].speedup:.2f}x"),
        ("tokens/s", lambda i: f"{figures[i].tokens_per_second:,.0f}"),
        ("query p50, ms", lambda i: _number(figures[i].latency_p50, ".1f")),
        ("p99, ms", lambda i: _number(figures[i].latency_p99, ".1f")),
        ("p50 speedup", lambda i: _number(figures[i].latency_speedup, ".2f", "x")),
        ("cosine", lambda i: _number(encoders[i].cosine, ".4f")),
        ("nDCG@10", lambda i: _number(figures[i].ndcg, ".4f")),
        ("kept", lambda i: _kept(figures[i].kept) if i else ""),
    ]
    taken: list[Column] = [
        ("parameters", lambda i: f"{encoders[i].sizes['parameters']:,}"),
        ("without embeddings", lambda i: _number(encoders[i].sizes.get("parameters_without_embeddings"), ",")),
        ("weights, MB", lambda i: f"{encoders[i].sizes['weights_bytes'] / 1e6:.1f}"),
        ("peak memory, MB", lambda i: f"{encoders[i].memory['peak'] / 1e6:.0f}"),
        ("GPU memory, MB", lambda i: _number(encoders[i].memory["gpu"], ".0f", scale=1e6)),
        ("GFLOP a text", lambda i: _number(figures[i].flops_per_text, ".3f", scale=1e9)),
        ("FLOP ratio", lambda i: _number(figures[i].flops_ratio, ".2f", "x")),
        ("of peak", lambda i: _number(figures[i].share_of_peak, ".1%")),
        ("J/1000 documents", lambda i: _number(figures[i].joules_per_thousand, ".1f")),
    ]
    return [
        _table("Speed and quality", _of_texts(record), record, worth, _notes_on_worth(record, figures)),
        _table("Size, memory and work", _of_machine(record), record, taken, _notes_on_work(record, figures)),
    ]


def _table(title: str, text: str, record: BenchmarkRecord, columns: Sequence[Column], notes: list[str]) -> Table:
    places = range(len(record.encoders))
    shown = [(name, cells) for name, cell in columns if any(cells := [cell(place) for place in places])]
    rows = [[record.encoders[place].label, *(cells[place] for _name, cells in shown)] for place in places]
    return Table(title, text, ["", *(name for name, _cells in shown)], rows, notes)


def _number(value: float | None, form: str, unit: str = "", *, scale: float = 1) -> str:
    return "" if value is None else f"{value / scale if scale != 1 else value:{form}}{unit}"


def _kept(kept: tuple[float, float, float] | None) -> str:
    return f"{kept[0]:.1%} [{kept[1]:.1%}, {kept[2]:.1%}]" if kept else ""


def _of_texts(record: BenchmarkRecord) -> str:
    first, corpus = record.encoders[0], record.corpus
    return (
        f"{record.num_texts:,} of {corpus['documents']:,} documents of {_short(corpus['name'])}, "
        f"{first.tokens / record.num_texts:.1f} tokens each for {first.label}; ratios are to it."
    )


def _of_machine(record: BenchmarkRecord) -> str:
    machine = record.machine
    device = "" if machine["device"] == "cpu" else f"{machine['device']}; "
    number = f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"
    return f"{device}{machine['processor']}, {number}; torch {record.versions['torch']}."


def _notes_on_worth(record: BenchmarkRecord, figures: Sequence[Figures]) -> list[str]:
    rounds, (number, source) = len(record.encoders[0].seconds), record.num_queries
    turn = min(TURN, record.num_texts)
    notes = [f"Speed is the median of {rounds} rounds in turns of {turn} documents, a speedup of the rounds' ratios."]
    if number:
        notes.append(
            f"A query is timed from its text to its vector, one at a time, in turns: {number} {source} a round."
        )
    else:
        notes.append("No latency: no topics were given, and no document has a title.")
    if any(encoder.cosine is None for encoder in record.encoders):
        notes.append("No cosine where vectors have other lengths than the first encoder's.")
    if record.encoders[0].ndcg:
        notes.append(
            f"nDCG@10 is the mean over {len(record.encoders[0].ndcg)} judged queries with a relevant document in all "
            f"documents; in brackets are 95 % of {RESAMPLES:,} paired bootstrap samples of these."
        )
        if figures[0].kept is None:
            notes.append("No share is kept of a first encoder that finds nothing.")
    front = [record.encoders[place].label for place in _front(record, figures)]
    notes.append(f"No other is both faster and better ({_quality(record)}) than: {', '.join(front)}.")
    return notes


def _notes_on_work(record: BenchmarkRecord, figures: Sequence[Figures]) -> list[str]:
    before = max(encoder.memory["before"] for encoder in record.encoders) / 1e6
    notes = [
        "Peak memory is all of a process that loads the encoder and encodes the documents; up to "
        f"{before:.0f} MB of it are there before the encoder is."
    ]
    peaks = {encoder.dtype: encoder.matmul_flops for encoder in record.encoders}
    told = ", ".join(f"{peak / 1e9:,.0f} GFLOP/s in {dtype}" for dtype, peak in peaks.items())
    notes.append(
        f"Peak is the fastest of large products of matrices in this run: {told}. Padding does not count as work."
    )
    if any(row.flops_per_text is None for row in figures):
        notes.append("No FLOPs of families that cannot be pruned, whose parts are not known.")
    if record.encoders[0].joules is None:
        notes.append("No energy: this machine does not tell, or not everyone, or a GPU computes.")
    return notes


def _short(name: object) -> str:
    """Return a file's name with that of its folder."""
    return "/".join(Path(str(name)).parts[-2:])


def _quality(record: BenchmarkRecord) -> str:
    return "nDCG@10" if record.encoders[0].ndcg else "cosine to the first"


def _points(record: BenchmarkRecord, figures: Sequence[Figures]) -> dict[int, tuple[float, float]]:
    """Return by place speed and quality: nDCG@10, or without it the cosine to the first encoder's vectors."""
    points = {}
    for place, (row, encoder) in enumerate(zip(figures, record.encoders, strict=True)):
        quality = encoder.cosine if row.ndcg is None else row.ndcg
        if quality is not None:
            points[place] = (row.documents_per_second, quality)
    return points


def _front(record: BenchmarkRecord, figures: Sequence[Figures]) -> list[int]:
    points = _points(record, figures)
    places = list(points)
    return [places[place] for place in pareto_front(list(points.values()))]


def pareto_figure(record: BenchmarkRecord, figures: Sequence[Figures]) -> Figure:
    """Return quality against speed; those than which no other is both faster and better are joined by a line."""
    points, front = _points(record, figures), _front(record, figures)
    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")
    panel = figure.subplots()
    line = sorted(points[place] for place in front)
    panel.plot(*zip(*line, strict=True), color=FRONT, linewidth=1, linestyle="dotted", zorder=1)
    best = max(y for _, y in points.values())
    panel.set_ylim(min(0.9 * best, *(0.99 * y for _, y in points.values())), 1.03 * best or 1)
    middle = (min(x for x, _ in points.values()) + max(x for x, _ in points.values())) / 2
    for place, (x, y) in points.items():
        color = FRONT if place in front else OTHER
        panel.plot(x, y, "s" if place == 0 else "o", color=color, markersize=7)
        # Labels lean away from the nearer side, so that they stay in the panel.
        panel.annotate(
            *(record.encoders[place].label, (x, y), (-6 if x > middle else 6, 8)),
            textcoords="offset points",
            ha="right" if x > middle else "left",
            fontsize="small",
            parse_math=False,
        )
    panel.margins(x=0.15)
    panel.set_title("square: the first encoder; line: no other is both faster and better", fontsize="small", loc="left")
    panel.set_xlabel("documents encoded a second")
    panel.set_ylabel(_quality(record))
    panel.grid(color="#dddddd", linewidth=0.6)
    panel.spines[["top", "right"]].set_visible(False)
    return figure


def _as_text(table: Table) -> str:
    words = [textwrap.fill(text, WIDTH, break_on_hyphens=False) for text in (table.text, *table.notes)]
    return "\n".join([table.title, "", aligned([table.header, *table.rows]), "", *words])


def _markdown(record: BenchmarkRecord, tables: Sequence[Table]) -> str:
    parts = [f"# {TITLE}", f"![{_caption(record)}]({PICTURE})", *(as_markdown(table).rstrip("\n") for table in tables)]
    return "\n\n".join([*parts, f"```\n{record.command}\n```", f"{_versions(record)}\n"])


def _html(record: BenchmarkRecord, tables: Sequence[Table], svg: str) -> str:
    caption = f"<figcaption>{escape(_caption(record))}</figcaption>"
    body = [f"<h1>{TITLE}</h1>", f'<figure><div class="wide">{svg}</div>{caption}</figure>', *map(html_table, tables)]
    body += ["<h2>The command</h2>", f"<pre>{escape(record.command)}</pre>", f"<p>{escape(_versions(record))}</p>"]
    return html_page(TITLE, body)


def _caption(record: BenchmarkRecord) -> str:
    return f"{_quality(record)} against speed; the square is the first encoder, the line joins the best choices."


def _versions(record: BenchmarkRecord) -> str:
    return ", ".join(f"{name} {version}" for name, version in record.versions.items()) + "."
