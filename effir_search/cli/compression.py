"""``effir compress`` and ``demo``: all of it, end to end."""

from pathlib import Path

import click

from effir_search.cli.options import OWN_LENGTH, PATH, Command, option_of, options_of, refuse
from effir_search.compression.defaults_without_labels import WITHOUT_LABELS
from effir_search.compression.recipe_options import IN_RECIPE, parameter_of, recipe_of
from effir_search.settings import SECTIONS, CompressionSettings, EncoderOptions

# Help that tells the options of one section from those of another.
HELP = {
    "--criterion": "What tells which parts to drop.",
    "--unit-criterion": "What tells which units to cut.",
    "--max-length": OWN_LENGTH.format("all stages but the evaluation"),
    "--learning-rate": "Highest, of fine-tuning.",
    "--max-steps": "Steps of fine-tuning, at most; no more than 1 pass over the data, without labels 20.",
}


def recipe_options(command: Command) -> Command:
    """Add the options of ``IN_RECIPE``; each is None, or a list empty, unless it is given."""
    for name, (section, field) in reversed(IN_RECIPE.items()):
        kind = SECTIONS[section] if section else CompressionSettings
        texts = {"help": HELP.get(name), "default_text": _default_text(kind, section, field)}
        parameter = parameter_of(section, field)
        command = option_of(kind, field, name=name, parameter=parameter, unset=True, **texts)(command)
    return command


def _default_text(kind: type, section: str, field: str) -> str | None:
    """Return both defaults of a field that has another one without labels; None = the field's own text will do."""
    if field not in WITHOUT_LABELS.get(section, {}):
        return None
    with_labels = kind.__dataclass_fields__[field].metadata["default_text"] or getattr(kind, field)
    return f"{with_labels}; no labels: {WITHOUT_LABELS[section][field]}"


@click.command()
@click.option("--recipe", "recipe_file", type=PATH, help="TOML file with all settings; options here come before it.")
@recipe_options
@options_of(EncoderOptions, only=("device", "batch_tokens"))
@click.option("--restart", is_flag=True, help="Discard what a stopped job left, or what depends on changed settings.")
@click.option(
    "--plan",
    is_flag=True,
    help="Print the whole recipe and the sizes it leads to, and stop; the data are not looked at.",
)
def compress(
    recipe_file: Path | None,
    device: str,
    batch_tokens: int | None,
    restart: bool,
    plan: bool,
    **options: object,
) -> None:
    """EffiR from end to end: analyse, drop, narrow, fine-tune, evaluate; after a stop, the same command continues.

    All but --encoder, --output and --train (or --texts) have defaults: the paper's, or without labels those for small
    encoders. A recipe has these options and what else the loss, slim and finetune depend on (docs/formats.md). If
    settings are changed after a stop, --restart keeps the stages that do not depend on them.
    """
    from effir_search.compression.compress import compress, describe_compression, describe_plan
    from effir_search.compression.defaults_without_labels import merged
    from effir_search.compression.recipe import as_compression, read_recipe

    recipe = merged(read_recipe(recipe_file) if recipe_file else {}, recipe_of(options))
    compression = as_compression(recipe, where=str(recipe_file or "the recipe"))
    if plan:
        click.echo(describe_plan(compression))
        return
    if compression.output is None:
        raise click.UsageError("where to? give --output, or output in the recipe: a new folder")
    output, machine = Path(compression.output), {"device": device, "batch_tokens": batch_tokens, "restart": restart}
    if compression.target:
        from effir_search.study.target import compress_to_target

        measured, candidates = compress_to_target(compression, output, **machine)
        click.echo(f"{candidates}\n")
    else:
        measured = compress(compression, output, **machine)
    if measured is not None:
        click.echo(describe_compression(measured, output))


@click.command()
@click.option("--query", help="Search the demo collection for this text.")
@click.option("--llm", is_flag=True, help="Make a retriever of a language model, and then a smaller one.")
@click.option("--steps", type=click.IntRange(1), help="With --llm: of each of its two trainings.  [default: 300]")
@click.option("--data", type=PATH, help="With --llm: a folder of BEIR folders.  [default: Python's documentation]")
@click.option(
    "--output", type=PATH, help="Folder of the demo's files.  [default: indexes/demo; with --llm indexes/llm]"
)
def demo(query: str | None, llm: bool, steps: int | None, data: Path | None, output: Path | None) -> None:
    """Try it all on the documentation of Python itself, beside BM25; after a stop, the same command continues."""
    from effir_search.demo.demo import demo_model, run_demo
    from effir_search.demo.language_model import Demo, language_model_file, run_language_model_demo

    if not llm:
        refuse(["steps", "data"], "goes with --llm")
        run_demo(output or Path("indexes/demo"), query=query, echo=click.echo)
        return
    refuse(["query"], "does not go with --llm")
    folder = output or Path("indexes/llm")
    run_language_model_demo(Demo(folder, language_model_file(), demo_model(), steps or 300, data), echo=click.echo)
