"""A study from a recipe to its page: ``effir study``."""

from pathlib import Path

import tomli_w
from accelerate import PartialState

from effir_search.encoding.devices import chosen_device
from effir_search.errors import UserError
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.indexing.workers import worker_devices
from effir_search.model.sentence_files import prunable_config
from effir_search.study.page import write_report
from effir_search.study.plan import SECTION, Planner, StudyRecipe, all_cells
from effir_search.study.results import results_of
from effir_search.study.run import open_study, run_study
from effir_search.study.tables import verdict

RECIPE_FILE = "study.toml"


def make_study(
    recipe: StudyRecipe,
    folder: Path,
    *,
    device: str = "auto",
    devices: str | None = None,
    batch_tokens: int | None = None,
    keep_models: bool = False,
) -> str:
    """Make and measure all models of a study, write its tables and its page, and return what they say.

    Args:
        recipe: See ``plan.as_study``.
        folder: Gets everything; one of the same study is continued.
        device: As ``Encoder.from_pretrained`` takes it.
        devices: A process for each of these devices, separated by commas; None = this process alone.
        batch_tokens: Padded tokens of a forward pass; None = by device.
        keep_models: Keep the weights of every model.

    Raises:
        ValueError: Bad data, or a model that cannot be pruned.
        OSError: A file cannot be read or written.
    """
    names = worker_devices(None, devices)
    first = names[0] if names else device
    if (processes := PartialState(cpu=chosen_device(first).type == "cpu").num_processes) > 1:
        raise UserError(
            f"a study starts its own processes, and was started as {processes}: give --devices, no launcher"
        )
    _claim(folder, recipe)
    study = open_study(recipe, folder, device=first, batch_tokens=batch_tokens, keep_models=keep_models)
    results = results_of(study, run_study(study, devices=names))
    page = write_report(study, results)
    told = [verdict(d) for differences in results.differences.values() for d in differences if d.trained]
    return "\n".join([*told, f"page -> {page}"])


def _claim(folder: Path, recipe: StudyRecipe) -> None:
    """Write the recipe into the folder of a study, which is new, empty or one already.

    Raises:
        FileExistsError: There is something else.
    """
    file = folder / RECIPE_FILE
    if folder.exists() and not file.is_file():
        refuse_existing(folder, replaces=())
    with whole_file(file) as out:
        out.write(tomli_w.dumps({**recipe.recipe, SECTION: recipe.section}))


def describe_plan(recipe: StudyRecipe) -> str:
    """Return the rows of a study's tables, the share of the parameters that each leaves, and how many models."""
    config = prunable_config(recipe.base.encoder, stock_architecture=recipe.base.stock_architecture)
    planner = Planner(recipe, config)
    tables = planner.tables()
    lines = []
    for name, rows in tables.items():
        lines.append(name)
        lines += [f"  {row.label:40} {planner.share_left(row.plan):6.1%}  {row.plan.name}" for row in rows]
    if "native" in tables:
        lines.append("  and whole blocks and one width for all layers, as fast as EffiR's model")
    cells = all_cells(tables, recipe)
    trained = sum(cell.trained for cell in cells)
    native = " and those of native shapes" * ("native" in tables)
    return "\n".join([*lines, "", f"{len(cells)} models, {trained} of them trained{native}"])
