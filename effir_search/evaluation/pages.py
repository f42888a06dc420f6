"""Tables and figures as Markdown, and as one HTML page that needs no other file."""

import io
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; color: #1c1c1c; background: #fff; margin: 0 auto; max-width: 1220px;
  padding: 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 46rem; } li { max-width: 52rem; }
.wide { overflow-x: auto; margin: .6rem 0; }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #e2e2e2; }
th { vertical-align: bottom; white-space: normal; min-width: 4.5rem; font-weight: 600; border-bottom: 2px solid #888; }
th:first-child, td:first-child { text-align: left; padding-left: 0; position: sticky; left: 0; background: #fff; }
td:first-child { white-space: normal; min-width: 7rem; }
svg { width: 100%; min-width: 620px; height: auto; }
figure { margin: 1rem 0; } figcaption { font-size: .88rem; color: #555; }
ul { padding-left: 1.1rem; font-size: .92rem; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; background: #f5f5f5; padding: .6rem; font-size: .8rem;
  margin: .3rem 0; }
details { border-bottom: 1px solid #e2e2e2; padding: .25rem 0; overflow-wrap: anywhere; } summary { cursor: pointer; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; } a { color: #0b5394; }
"""


class Table(NamedTuple):
    """A table as it is shown.

    Attributes:
        title: Above it.
        text: What it shows, in a sentence or two.
        header: Names of the columns.
        rows: Cells; the first one of a row is its name.
        notes: Sentences below it.
    """

    title: str
    text: str
    header: list[str]
    rows: list[list[str]]
    notes: list[str]


def as_markdown(table: Table) -> str:
    """Return a table in Markdown, with its title."""
    lines = [f"## {table.title}", "", table.text, ""]
    lines.append(f"| {' | '.join(table.header)} |")
    lines.append("| --- |" + " ---: |" * (len(table.header) - 1))
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in table.rows]
    if table.notes:
        lines += ["", *(f"- {note}" for note in table.notes)]
    return "\n".join(lines) + "\n"


def html_page(title: str, body: Sequence[str]) -> str:
    """Return a whole page.

    Args:
        title: Plain text, of the window; the heading is part of the body.
        body: Its parts, HTML.
    """
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


def anchor(table: Table) -> str:
    """Return the id of a table on its page."""
    return "".join(c if c.isalnum() else "-" for c in table.title.lower())


def html_table(table: Table) -> str:
    """Return a table with its title as a part of a page."""
    head = "".join(f"<th>{escape(name)}</th>" for name in table.header)
    rows = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in table.rows)
    notes = "".join(f"<li>{escape(note)}</li>" for note in table.notes)
    return (
        f'<h2 id="{anchor(table)}">{escape(table.title)}</h2>\n<p>{escape(table.text)}</p>\n'
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>\n<tbody>{rows}</tbody></table></div>\n'
        + (f"<ul>{notes}</ul>" if notes else "")
    )


def as_svg(figure: Figure, name: str) -> str:
    """Return a figure as an SVG element for a page, which names no address and has ids of its own."""
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg).replace("xlink:href", "href")
    svg = re.sub(r'\b(id="|href="#|url\(#)', rf"\1{name}-", svg)
    return re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1), count=1
    )
