"""The command lines that make and measure a model of a study by hand."""

import shlex
from dataclasses import fields, replace

from effir_search.compression.slim import OF_LOSS, WITHOUT_TEXTS
from effir_search.compression.stages import Job
from effir_search.evaluation.benchmark import HITS, collection_files
from effir_search.pruning.prune import NAMES
from effir_search.study.cells import Study
from effir_search.study.plan import Cell, Collection, start_of

# What ``effir slim`` has no option for.
NOT_OF_SLIM = ("token_weight",)
# What an encoder's options name of the machine, not of the model.
OF_MACHINE = ("device", "batch_tokens", "dtype", "dimension")


def commands_of(study: Study, cell: Cell, output: str) -> list[str]:
    """Return what makes a cell's model as ``output`` by hand, a line each; nothing for the encoder as it is."""
    start, model, lines = start_of(cell, study.recipe), study.recipe.base.encoder, []
    first, job, trained = (study.job(c) for c in (replace(start, seed=study.first_seed), start, cell))
    steps = [bool(start.plan.drops), bool(start.plan.narrow), cell.trained]
    names = [f"{output}-dropped", f"{output}-narrowed", output]
    last = max((number for number, taken in enumerate(steps) if taken), default=None)
    for number, make in enumerate((_prune, _slim, _finetune)):
        if steps[number]:
            target = output if number == last else names[number]
            lines.append(shlex.join(["effir", *make(study, (first, job, trained)[number], model), "--output", target]))
            model = target
    return [*_what_no_option_says(job, steps), *lines]


def _what_no_option_says(job: Job, steps: list[bool]) -> list[str]:
    """Return comments on what the commands below do otherwise than the study did."""
    recipe, comments = job.recipe, []
    if recipe.text.given() and recipe.data.teacher == recipe.encoder and any(steps[1:]):
        comments.append(
            "# The study's teacher reads texts as [text] of the recipe says, here it reads them as its files say."
        )
    for name in NOT_OF_SLIM:
        if getattr(recipe.loss, name) is not None and steps[1] and recipe.slim.criterion in OF_LOSS:
            comments.append(
                f"# The study scored units with {name} = {getattr(recipe.loss, name):g}, here it has its default."
            )
    return comments


def _prune(study: Study, job: Job, model: str) -> list[str]:
    drops = [word for kind in NAMES for word in _number(job, kind)]
    recipe = job.recipe
    sample = ["--texts", str(study.calibration), "--num-texts", str(recipe.prune.num_texts)]
    return ["prune", "--encoder", model, *drops, "--criterion", recipe.prune.criterion, *sample, *_reading(job, model)]


def _number(job: Job, kind: str) -> list[str]:
    number = getattr(job.recipe.prune, f"drop_{kind}")
    return [f"--drop-{kind}", str(number)] if number else []


def _slim(_study: Study, job: Job, model: str) -> list[str]:
    recipe = job.recipe
    cut = ["--narrow", str(recipe.slim.narrow), "--criterion", recipe.slim.criterion]
    data = recipe.data.as_options(without=[f.name for f in fields(recipe.data) if f.name.startswith("dev")])
    width = recipe.slim.as_options(without=["narrow", "criterion", *_unused(job)])
    losses = recipe.loss.as_options(without=NOT_OF_SLIM) if recipe.slim.criterion in OF_LOSS else []
    return ["slim", "--encoder", model, *cut, *data, *width, *losses, *_reading(job, model)]


def _unused(job: Job) -> list[str]:
    """Return the settings that the command refuses beside the criterion, which does not use them."""
    criterion = job.recipe.slim.criterion
    unused = [] if criterion == "gates" else ["learning_rate", "penalty"]
    return unused + (["steps", "batch_size"] if criterion in WITHOUT_TEXTS else [])


def _finetune(_study: Study, job: Job, model: str) -> list[str]:
    recipe, rank = job.recipe, job.recipe.finetune.lora_rank
    weights = ["--lora-rank", str(rank)] if rank else ["--full"]
    without = ["lora_rank", *([] if rank else ["lora_alpha", "lora_dropout"])]
    training = recipe.finetune.as_options(without=without)
    return [
        *("finetune", "--encoder", model, *recipe.data.as_options(), *weights, *training, *recipe.loss.as_options()),
        *_reading(job, model),
    ]


def _reading(job: Job, model: str) -> list[str]:
    """Return how a model reads its texts, as far as its own files say otherwise."""
    return job.own_options(model).as_options(without=OF_MACHINE)


def measuring_commands(study: Study, collection: Collection, model: str, folder: str) -> list[str]:
    """Return what makes a model's run of a collection in a folder, and scores it."""
    corpus, topics, qrels = map(str, collection_files(collection.folder, collection.split))
    index, run = f"{folder}/{collection.name}", f"{folder}/{collection.name}.trec"
    removing = ["--remove-query"] if study.recipe.settings.remove_query else []
    search = ["search", "--index", index, "--topics", topics, "--hits", str(HITS), *removing, "--output", run]
    making = [["index", "--corpus", corpus, "--encoder", model, "--output", index], search]
    return [*(shlex.join(["effir", *words]) for words in making), _evaluate(run, qrels)]


def scoring_command(study: Study, cell: Cell, collection: Collection) -> str | None:
    """Return what scores the run that a cell has left; None where the query's own document is still in it."""
    if study.recipe.settings.remove_query:
        return None
    run = study.cell_folder(cell) / f"{collection.name}.trec"
    return _evaluate(str(run), str(collection_files(collection.folder, collection.split)[2]))


def _evaluate(run: str, qrels: str) -> str:
    return shlex.join(
        ["effir", "evaluate", "--run", run, "--qrels", qrels, "--measures", "nDCG@10", "--only-with-positives"]
    )
