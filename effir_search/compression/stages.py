"""The stages of a compression, a row each: what a stage depends on, what it is called, what it does.

A new stage is a new row. What is kept after a change of settings, what is logged and in which order follow from the
table.
"""

import logging
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from effir_search.compression.slim import slim_encoder
from effir_search.evaluation.benchmark import Benchmark, benchmark
from effir_search.files.whole import whole_folder
from effir_search.model.layers import PartKind
from effir_search.pruning.analyze import analyze
from effir_search.pruning.prune import NAMES, counted, prune_encoder
from effir_search.settings import CompressionSettings, EncoderOptions
from effir_search.text.corpus import document_text, read_corpus
from effir_search.training.finetune import finetune

logger = logging.getLogger(__name__)

# A sample of what is learned from, on which importance and at the end speed are measured.
CALIBRATION_FILE = "calibration.jsonl"


@dataclass(frozen=True)
class Job:
    """What the stages of a job work on.

    Attributes:
        recipe: All settings.
        folder: Of the job; each stage leaves one of its name in it.
        machine: Device, batches and architecture of every model.
        analysis: Folder of an analysis of the encoder by the same texts and criteria, which is not made again.
    """

    recipe: CompressionSettings
    folder: Path
    machine: EncoderOptions
    analysis: Path | None = None

    @property
    def model(self) -> str:
        """The model that the last finished stage has left: its folder, or the encoder where there is none yet."""
        folders = [self.folder / stage.name for stage in reversed(STAGES)]
        return next((str(folder) for folder in folders if (folder / "config.json").is_file()), self.recipe.encoder)

    def options(self, model: str | None) -> EncoderOptions:
        """Return how a model is loaded: it reads texts as the recipe says, if it is the recipe's encoder.

        One that a stage has left says by itself how it reads them, and so does another teacher.
        """
        return replace(self.machine, **asdict(self.recipe.text)) if model == self.recipe.encoder else self.machine

    def own_options(self, model: str) -> EncoderOptions:
        """Return the same, with the length of a text that all stages but the evaluation read."""
        return replace(self.options(model), max_length=self.recipe.max_length)


@dataclass(frozen=True)
class Stage:
    """A step of a compression.

    Attributes:
        name: Of the folder that it leaves; its first character is its number.
        depends_on: The job's settings that count for this stage and for those after it; what no stage names counts for
            all.
        title: What it does, in words; empty where the recipe has nothing for it to do.
        run: Does it, into the folder.
        beside: What else it leaves in the job's folder, besides names that begin with its own and a dot.
        repeats: Whether it is run although its folder is there, and looks itself at what is done.
        by_all_processes: Whether all processes of a launcher run it, and not the main one alone.
    """

    name: str
    depends_on: tuple[str, ...]
    title: Callable[[CompressionSettings], str]
    run: Callable[[Job, Path], object]
    beside: tuple[str, ...] = ()
    repeats: bool = False
    by_all_processes: bool = False


def run_stage(stage: Stage, job: Job) -> object:
    """Run a stage, unless it is done or has nothing to do, and log which it is; return what it measured."""
    title = stage.title(job.recipe)
    if not title:
        return None
    folder = job.folder / stage.name
    done = folder.is_dir() and not stage.repeats
    logger.info("%s of %d: %s%s", stage.name[0], len(STAGES), "done already: " if done else "", title)
    return None if done else stage.run(job, folder)


def unchanged_names(changed: Collection[str], folder: Path) -> list[str]:
    """Return what the stages have left in a job's folder that come before any that depends on a changed setting."""
    names: list[str] = []
    if not set(changed) <= {setting for stage in STAGES for setting in stage.depends_on}:
        return names
    for stage in STAGES:
        if set(changed) & set(stage.depends_on):
            break
        names += [stage.name, *stage.beside, *(child.name for child in folder.glob(f"{stage.name}.*"))]
    return names


def numbers_to_drop(recipe: CompressionSettings) -> dict[PartKind, int]:
    """Return how many parts to drop by kind, in the order in which kinds go."""
    return {kind: number for kind in NAMES if (number := getattr(recipe.prune, f"drop_{kind}"))}


def _analyze(job: Job, folder: Path) -> None:
    if job.analysis is None:
        analyze_parts(job, folder, dict(list(numbers_to_drop(job.recipe).items())[:1]))
        return
    with whole_folder(folder) as copy:
        shutil.copytree(job.analysis, copy, copy_function=shutil.copyfile, dirs_exist_ok=True)


def analyze_parts(job: Job, folder: Path, numbers: dict[PartKind, int]) -> None:
    """Report importance by cosine, in one pass, and by what chooses the first parts to go, for ``drop`` to use.

    Args:
        job: Its folder has the texts.
        folder: The new folder.
        numbers: How many parts are chosen greedily, by kind, where the recipe's criterion is that.
    """
    recipe = job.recipe
    analyze(
        recipe.encoder,
        folder,
        sources=[str(job.folder / CALIBRATION_FILE)],
        criteria=["cosine", recipe.prune.criterion] if numbers else ["cosine"],
        greedy_numbers=numbers,
        size=recipe.prune.num_texts,
        options=job.own_options(recipe.encoder),
    )


def _dropping(recipe: CompressionSettings) -> str:
    numbers = numbers_to_drop(recipe)
    return "dropping " + ", ".join(counted(kind, number) for kind, number in numbers.items()) if numbers else ""


def drop(job: Job, folder: Path) -> None:
    """Save the encoder without what the recipe drops, by the analysis in the job's folder where that has the order."""
    recipe = job.recipe
    result = prune_encoder(
        recipe.encoder,
        folder,
        numbers=numbers_to_drop(recipe),
        layers={},
        criterion=recipe.prune.criterion,
        sources=[str(job.folder / CALIBRATION_FILE)],
        size=recipe.prune.num_texts,
        analysis=job.folder / ANALYSIS.name,
        options=job.own_options(recipe.encoder),
    )
    logger.info("mean cosine of the embeddings to those before: %.4f", result.cosine)


def _narrowing(recipe: CompressionSettings) -> str:
    return f"narrowing the MLPs that are left by {recipe.slim.narrow:.0%}" if recipe.slim.narrow else ""


def narrow(job: Job, folder: Path, *, model: str | None = None) -> None:
    """Save a model with narrower MLPs; None = the one that the last stage has left."""
    recipe, model = job.recipe, model or job.model
    slim_encoder(
        model,
        folder,
        recipe.data,
        recipe.slim,
        recipe.loss,
        job.own_options(model),
        prepared=job.folder,
        teacher_options=job.options(recipe.data.teacher),
    )


def cut(job: Job, folder: Path, *, dropping: Job | None = None) -> str:
    """Return the encoder without what the recipe drops and narrows: a folder in the given one, or the encoder's name.

    Args:
        job: As ``drop`` and ``narrow`` take it.
        folder: What it has already is not made again.
        dropping: The job whose texts choose what is dropped; None = the same.
    """
    model, dropped, narrowed = job.recipe.encoder, folder / "dropped", folder / "narrowed"
    if numbers_to_drop(job.recipe):
        if not dropped.is_dir():
            drop(dropping or job, dropped)
        model = str(dropped)
    if job.recipe.slim.narrow:
        if not narrowed.is_dir():
            narrow(job, narrowed, model=model)
        model = str(narrowed)
    return model


def fine_tune(job: Job, folder: Path, *, model: str | None = None) -> None:
    """Fine-tune a model and save it; None = the one that the last stage has left."""
    recipe, model = job.recipe, model or job.model
    finetune(
        model,
        folder,
        recipe.data,
        recipe.finetune,
        recipe.loss,
        job.own_options(model),
        prepared=job.folder,
        teacher_options=job.options(recipe.data.teacher),
    )


def _evaluate(job: Job, folder: Path) -> Benchmark:
    folder.mkdir(exist_ok=True)
    return benchmark(
        job.recipe.encoder,
        job.model,
        folder,
        texts=[document_text(document) for document in read_corpus(job.folder / CALIBRATION_FILE)],
        settings=job.recipe.evaluate,
        seed=job.recipe.seed,
        options=job.machine,
        text=job.recipe.text,
    )


ANALYSIS = Stage("1-analysis", ("prune",), lambda _: "where the model is redundant", _analyze, (CALIBRATION_FILE,))
STAGES = (
    ANALYSIS,
    Stage("2-dropped", ("prune",), _dropping, drop),
    Stage("3-slimmed", ("slim", "loss"), _narrowing, narrow),
    Stage("4-tuned", ("finetune", "loss"), lambda _: "fine-tuning", fine_tune, by_all_processes=True),
    Stage("5-evaluation", (), lambda _: "evaluation", _evaluate, repeats=True),
)
