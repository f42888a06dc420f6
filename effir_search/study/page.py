"""What a study leaves for people: Markdown, CSV, PNG, and one HTML page that needs no other file."""

from html import escape
from pathlib import Path

from effir_search.compression.stages import ANALYSIS
from effir_search.evaluation.bootstrap import RESAMPLES
from effir_search.evaluation.pages import Table, anchor, as_markdown, as_svg, html_page, html_table
from effir_search.files.whole import whole_file
from effir_search.model.checkpoint import lasting_name
from effir_search.pruning.prune import NAMES
from effir_search.study.cells import Study, read_record
from effir_search.study.commands import commands_of, measuring_commands, scoring_command
from effir_search.study.figures import dropping_figure, pareto_figure
from effir_search.study.plan import Cell, Plan
from effir_search.study.results import Results
from effir_search.study.tables import (
    ORDER,
    STATES,
    csv_rows,
    difference_rows,
    tables_of,
    write_csv,
)

MARKDOWN, PAGE = "README.md", "index.html"
FIGURES = {
    "pareto": "nDCG@10 kept against size and speed; bars are 95 % intervals over queries.",
    "order": "Order of dropping, read from below: with N parts dropped, row N, the filled layers lack theirs.",
}


def write_report(study: Study, results: Results) -> Path:
    """Write tables, figures and the page of a study into its folder, and return the page."""
    analysis = study.seed_folder(study.first_seed) / ANALYSIS.name
    tables = tables_of(results, analysis)
    figures = {"pareto": pareto_figure(results), "order": dropping_figure(analysis)}
    for name, figure in figures.items():
        figure.savefig(study.folder / f"{name}.png", format="png")
    write_csv(study.folder / "results.csv", csv_rows(results))
    write_csv(study.folder / "differences.csv", difference_rows(results))
    _write(study.folder / MARKDOWN, _markdown(study, results, tables))
    page = study.folder / PAGE
    _write(page, _html(study, results, tables, {name: as_svg(figure, name) for name, figure in figures.items()}))
    return page


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text)


def title_of(study: Study) -> str:
    """Return the heading of a study."""
    return f"What {lasting_name(study.recipe.base.encoder)} can lose"


def paragraphs_of(study: Study, results: Results) -> list[str]:
    """Return what was done, and how its figures are made."""
    base, settings, budget = study.recipe.base, study.recipe.settings, study.budget
    first = next(iter(results.outcomes.values())).cells[0]
    data = base.data
    sources = [data.train] if data.train else [*data.texts, *data.queries]
    names = ", ".join(dict.fromkeys(map(_short, filter(None, sources))))
    learned = f"examples of {names}" if data.train else f"texts of {names}, without labels, from {_short(data.teacher)}"
    length = f"texts of at most {base.max_length} tokens" if base.max_length else "texts as long as the model reads"
    steps = max(outcome.steps for outcome in results.outcomes.values())
    training = (
        f"Every trained model learned for {steps:,} steps of {budget.batch_size * budget.accumulation} from {learned}, "
        f"at the rate {budget.learning_rate:g}, {length}; seeds {', '.join(map(str, settings.seeds))}. "
        if steps
        else f"Nothing was trained; parts and units were chosen on {learned}. "
    )
    queries = ", ".join(f"{name} ({number:,})" for name, number in results.queries.items())
    return [
        f"{training}Figures are nDCG@10 of the first 100 hits, in {read_record(study, first)['dtype']}, on the judged "
        f"queries of {queries}. The main figure is the mean of the collections.",
        f"Kept is the share of the full model's figure. In brackets are 95 % intervals of {RESAMPLES:,} paired "
        "bootstrap samples of the queries of each collection: what other queries might have shown. Where it says over "
        "collections, collections are drawn as well; of a few that interval is coarse. Where several seeds were run, "
        "figures are means over them, and the lowest and the highest of a seed stand beside. A difference is the first "
        "model's figure less the second's; one whose interval contains 0 is called none. Intervals are not corrected "
        "for their number.",
        "study.toml beside this page is the whole recipe: effir study --recipe study.toml --output FOLDER makes all "
        "of it again.",
    ]


def _short(name: str) -> str:
    """Return a file's or folder's name with that of its folder, or a model's name."""
    path = Path(name)
    if path.is_file():
        return "/".join(path.parts[-2:])
    return lasting_name(name)


def _markdown(study: Study, results: Results, tables: list[Table]) -> str:
    parts = [f"# {title_of(study)}", *paragraphs_of(study, results)]
    parts += [f"![{caption}]({name}.png)" for name, caption in FIGURES.items()]
    parts += map(as_markdown, tables)
    parts.append(f"Every model, and the commands that make it again, are on the page {PAGE}.\n")
    return "\n\n".join(part.rstrip("\n") for part in parts) + "\n"


def _html(study: Study, results: Results, tables: list[Table], figures: dict[str, str]) -> str:
    links = "".join(f'<a href="#{anchor(table)}">{escape(table.title)}</a>' for table in tables)
    body = [
        f"<h1>{escape(title_of(study))}</h1>",
        *(f"<p>{escape(text)}</p>" for text in paragraphs_of(study, results)),
    ]
    body.append(f'<nav>{links}<a href="#models">Every model and its commands</a></nav>')
    shown = {
        name: f'<figure><div class="wide">{svg}</div><figcaption>{escape(FIGURES[name])}</figcaption></figure>'
        for name, svg in figures.items()
    }
    body.append(shown["pareto"])
    for table in tables:
        body.append(html_table(table))
        if table.title == ORDER:
            body.append(shown["order"])
    body.append(_models(study, results))
    return html_page(title_of(study), body)


def _models(study: Study, results: Results) -> str:
    """Return every model with its figures and the commands that repeat them."""
    whole = results.outcomes[Plan(), False].cells[0]
    example = [
        line for collection in study.collections for line in measuring_commands(study, collection, "MODEL", "indexes")
    ]
    items = [
        '<h2 id="models">Every model and its commands</h2>',
        f"<p>{len(results.outcomes)} models or means of models. The commands under a name make that model again in the "
        "current folder, and score the run that is stored in the folder of this study. A run is made anew by</p>",
        f"<pre>{escape(chr(10).join(example))}</pre>",
        f"<p>with the model in the place of MODEL; the full model is {escape(study.recipe.base.encoder)}.</p>",
    ]
    for outcome in results.outcomes.values():
        for cell in outcome.cells:
            items.append(_model(study, cell, whole))
    return "\n".join(items)


def _model(study: Study, cell: Cell, whole: Cell) -> str:
    record = read_record(study, cell)
    figures = ", ".join(f"{name} {record['ndcg'][name]:.4f}" for name in study.collection_hashes)
    words = "the full model" if cell == whole else f"{cell.plan.name}, seed {cell.seed}, {dict(STATES)[cell.trained]}"
    lines = commands_of(study, cell, cell.name)
    lines += [line for c in study.collections if (line := scoring_command(study, cell, c))]
    lost = ""
    if step := next((step for step in record["pruned"] if set(step) & set(NAMES)), None):
        lost = "; ".join(f"{kind} of layers {step[kind]}" for kind in NAMES if kind in step)
        lost = f"<p>Dropped: {escape(lost)}. Units by layer: {escape(str(record['shape']['widths']))}.</p>"
    return (
        f"<details><summary>{escape(words)}: {escape(figures)}</summary>{lost}"
        f"<pre>{escape(chr(10).join(lines))}</pre></details>"
    )
