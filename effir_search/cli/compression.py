"""``effir compress`` and ``demo``: all of it, end to end."""

from pathlib import Path

import click
from click.core import ParameterSource

from effir_search.cli.legacy_options import CRITERIA, OWN_LENGTH, PATH, UNIT_CRITERIA, data_options


@click.command()
@click.option("--recipe", "recipe_file", type=PATH, help="TOML file with all settings; options here come before it.")
@click.option("--encoder", help="Model folder or hub name.  [default: the recipe's]")
@click.option("--output", help="New model folder; OUTPUT.stages gets that of each stage.  [default: the recipe's]")
@click.option("--drop-mlp", type=click.IntRange(0), help="MLPs to drop.  [default: half of them]")
@click.option("--drop-attention", type=click.IntRange(0), help="Attentions to drop.  [default: 0]")
@click.option("--drop-block", type=click.IntRange(0), help="Whole layers to drop.  [default: 0]")
@click.option(
    "--criterion", type=click.Choice(CRITERIA), help="What tells which to drop.  [default: cosine; no labels: greedy]"
)
@click.option(
    "--narrow", type=click.FloatRange(0, 1, max_open=True), help="Share of the units left to cut.  [default: 0.3]"
)
@click.option(
    "--unit-criterion",
    type=click.Choice(UNIT_CRITERIA),
    help="What tells which units.  [default: gates; no labels: taylor]",
)
@data_options
@click.option(
    "--max-length",
    type=click.IntRange(1),
    help=OWN_LENGTH.format("all stages but the evaluation"),
)
@click.option(
    "--lora-rank", type=click.IntRange(0), help="Train LoRA; 0 = all weights.  [default: 32 from 1 billion on]"
)
@click.option("--learning-rate", type=click.FloatRange(0, min_open=True), help="Highest.  [default: as effir finetune]")
@click.option("--batch-size", type=click.IntRange(1), help="Examples or texts a step.  [default: 64]")
@click.option(
    "--max-steps",
    type=click.IntRange(1),
    help="Steps of fine-tuning, at most.  [default: 1 pass over the data; no labels: 2000, and at most 20 passes]",
)
@click.option("--dev", help="BEIR folder whose nDCG@10 to watch.")
@click.option("--dev-remove-query", is_flag=True, help="There, drop the document whose id is the query's.")
@click.option("--evaluate", "collections", multiple=True, help="BEIR folder to compare both models on; repeatable.")
@click.option("--remove-query", is_flag=True, help="In all of these, drop the document whose id is the query's.")
@click.option("--seed", type=click.IntRange(0), help="Of samples, order, LoRA.  [default: 0]")
@click.option("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
@click.option("--batch-tokens", type=click.IntRange(1), help="Padded tokens a forward pass.  [default: by device]")
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
    from effir_search.compression.compress import compress, describe_compressed, describe_plan
    from effir_search.compression.recipe import as_compression, merged, read_recipe

    given = read_recipe(recipe_file) if recipe_file else {}
    compression = as_compression(merged(given, given_settings(options)), where=str(recipe_file or "the recipe"))
    if plan:
        click.echo(describe_plan(compression))
        return
    if compression.output is None:
        raise click.UsageError("where to? give --output, or output in the recipe: a new folder")
    output = Path(compression.output)
    measured = compress(compression, output, device=device, batch_tokens=batch_tokens, restart=restart)
    if measured is not None:
        click.echo(describe_compressed(measured, output))


# Where in a recipe the options of ``compress`` belong that are not in its [data].
IN_RECIPE = {
    "encoder": ("encoder",),
    "output": ("output",),
    "max_length": ("max_length",),
    "seed": ("seed",),
    "stock_architecture": ("stock_architecture",),
    "drop_mlp": ("prune", "drop_mlp"),
    "drop_attention": ("prune", "drop_attention"),
    "drop_block": ("prune", "drop_block"),
    "criterion": ("prune", "criterion"),
    "narrow": ("slim", "narrow"),
    "unit_criterion": ("slim", "criterion"),
    "lora_rank": ("finetune", "lora_rank"),
    "learning_rate": ("finetune", "learning_rate"),
    "batch_size": ("finetune", "batch_size"),
    "max_steps": ("finetune", "max_steps"),
    "collections": ("evaluate", "collections"),
    "remove_query": ("evaluate", "remove_query"),
}


def given_settings(options: dict[str, object]) -> dict[str, object]:
    """Return the options that were given, as a recipe has them."""
    context = click.get_current_context()
    settings: dict[str, object] = {}
    for name, value in options.items():
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE:
            *section, field = IN_RECIPE.get(name, ("data", name))
            home = settings.setdefault(section[0], {}) if section else settings
            home[field] = list(value) if isinstance(value, tuple) else value
    return settings


@click.command()
@click.option("--query", help="Search the demo collection for this text.")
@click.option("--output", type=PATH, default=Path("indexes/demo"), help="Folder of the demo's files.")
def demo(query: str | None, output: Path) -> None:
    """Try it all on the documentation of Python itself, beside BM25."""
    from effir_search.demo.demo import run_demo

    run_demo(output, query=query, echo=click.echo)
