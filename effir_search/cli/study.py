"""``effir study``: many models of one encoder, made alike and compared."""

from pathlib import Path

import click

from effir_search.cli.options import PATH, options_of, was_given
from effir_search.settings import EncoderOptions, StudySettings


@click.command()
@click.option("--recipe", "recipe_file", type=PATH, required=True, help="TOML file: a recipe of compress, and [study].")
@click.option("--output", type=PATH, required=True, help="Folder of the study; one that was begun is continued.")
@options_of(StudySettings, unset=True)
@click.option("--keep-models", is_flag=True, help="Keep the weights of every model, not only runs and figures.")
@click.option("--devices", help="A process for each of these, as in cuda:0,cuda:1, which share the models.")
@options_of(EncoderOptions, only=("device", "batch_tokens"))
@click.option("--plan", is_flag=True, help="Print what would be made, and stop.")
def study(
    recipe_file: Path,
    output: Path,
    keep_models: bool,
    devices: str | None,
    device: str,
    batch_tokens: int | None,
    plan: bool,
    **options: object,
) -> None:
    """Compare what an encoder can lose: kinds of parts, depth and width, criteria, native shapes; tables and a page.

    Every model is trained alike. What is there already is used again, so that after a stop the same command goes on,
    and changed settings make again only the models that depend on them. Options come before the recipe's [study].
    """
    from effir_search.compression.defaults_without_labels import merged
    from effir_search.compression.recipe import read_recipe
    from effir_search.study.plan import as_study
    from effir_search.study.study import describe_plan, make_study

    section = {name: _listed(value) for name, value in options.items() if was_given(name)}
    recipe = as_study(merged(read_recipe(recipe_file), {"study": section}), where=str(recipe_file))
    if plan:
        click.echo(describe_plan(recipe))
        return
    machine = {"device": device, "batch_tokens": batch_tokens, "keep_models": keep_models}
    click.echo(make_study(recipe, output, devices=devices, **machine))


def _listed(value: object) -> object:
    """Return the values of a list option as one list."""
    if not isinstance(value, tuple):
        return value
    return [part for one in value for part in (one if isinstance(one, tuple) else (one,))]
