"""Makes and measures the models of a study: ``effir study``; what is there already is used again."""

import fcntl
import logging
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from effir_search.compression.compress import check_compression, encoder_hash, prepare_job
from effir_search.compression.stages import ANALYSIS, CALIBRATION_FILE, Job
from effir_search.encoding.devices import chosen_device
from effir_search.evaluation.benchmark import check_topics, collection_files
from effir_search.files.job import job_folder, read_settings, try_lock
from effir_search.files.reading import file_sha256
from effir_search.indexing.workers import run_workers
from effir_search.model.arithmetic import empty_model
from effir_search.model.sentence_files import prunable_config
from effir_search.pruning.analyze import analyze
from effir_search.settings import EncoderOptions
from effir_search.study.cells import (
    MODELS,
    SPEEDS,
    Study,
    cell_settings,
    is_done,
    is_of_other,
    read_record,
    run_cell,
    settings_of,
    shape_of_record,
)
from effir_search.study.plan import (
    Cell,
    Plan,
    Planner,
    Row,
    StudyRecipe,
    Tables,
    all_cells,
    collections_of,
    greedy_numbers,
    start_of,
)
from effir_search.study.speed import Shape, SpeedRecords, nearest_in_speed
from effir_search.text.corpus import document_text, read_corpus
from effir_search.training.data import DATA, hashes
from effir_search.training.finetune import resolved_training

logger = logging.getLogger(__name__)

# Widths of one size for all layers that are tried are multiples of it, as of those that a packed model is filled up to.
STEP = 16


class StudyResult(NamedTuple):
    """What was made: the rows of the tables, and the speeds that were measured."""

    tables: Tables
    speeds: SpeedRecords


def open_study(
    recipe: StudyRecipe,
    folder: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    keep_models: bool = False,
) -> Study:
    """Return a study, checked; nothing is made yet.

    Raises:
        ValueError: Bad data, a model that cannot be pruned, a model of the study that cannot be made.
        OSError: A file cannot be read.
    """
    base = recipe.base
    config = prunable_config(base.encoder, stock_architecture=base.stock_architecture)
    collections = collections_of(recipe.settings.collections)
    study = Study(
        recipe,
        folder,
        EncoderOptions(device=device, batch_tokens=batch_tokens, stock_architecture=base.stock_architecture),
        resolved_training(base.finetune, base.data, empty_model(config), chosen_device(device)),
        hashes(base.data),
        encoder_hash(base.encoder),
        collections,
        {c.name: [file_sha256(file) for file in collection_files(c.folder, c.split)] for c in collections},
        keep_models,
    )
    _check(study, all_cells(Planner(recipe, config).tables(), recipe))
    return study


def _check(study: Study, cells: Sequence[Cell]) -> None:
    """Raise now what would otherwise end the study after hours."""
    for plan in dict.fromkeys(cell.plan for cell in cells if not cell.plan.is_whole):
        check_compression(study.job(Cell(plan, study.first_seed)).recipe, study.machine.device)


def run_study(study: Study, *, devices: Sequence[str] = ()) -> StudyResult:
    """Make and measure all models; after a stop, the same call goes on where it was.

    Args:
        study: See ``open_study``.
        devices: A process for each, which share the models; empty = this process makes one after the other.

    Raises:
        ValueError: See ``finetune`` and the other stages.
        OSError: A file cannot be read or written.
    """
    base = study.recipe.base
    planner = Planner(study.recipe, prunable_config(base.encoder, stock_architecture=base.stock_architecture))
    tables = planner.tables()
    cells = all_cells(tables, study.recipe)
    prepare_study(study, cells)
    for collection in study.collections:
        files = map(str, collection_files(collection.folder, collection.split))
        check_topics(collection.folder, *files, remove_query=study.recipe.settings.remove_query)
    run_cells(study, cells, devices=devices)
    check_done(study, cells)
    speeds = _speed_records(study)
    if "native" in tables:
        tables["native"] += _native_rows(study, planner, speeds)
        more = [cell for cell in all_cells(tables, study.recipe) if cell not in cells]
        _check(study, more)
        prepare_study(study, cells + more)
        run_cells(study, more, devices=devices)
        check_done(study, more)
    _measure_speeds(study, tables, speeds)
    return StudyResult(tables, speeds)


def prepare_study(study: Study, cells: Sequence[Cell]) -> None:
    """Prepare the data of every seed, and analyse the whole model by all criteria that parts are chosen by.

    What is there already is used again. ``run_cell`` and ``run_cells`` need it for the cells that they make.
    """
    for seed in dict.fromkeys([study.first_seed, *(cell.seed for cell in cells)]):
        whole = Cell(Plan(), seed)
        job = study.job(whole)
        settings = {"data": _data_settings(study, whole), "num_texts": job.recipe.prune.num_texts, "seed": seed}
        if seed == study.first_seed:
            settings["analysis"] = _analysis_settings(job.folder, cells)
        with job_folder(job.folder, settings, restart=is_of_other(job.folder, settings), keep=(DATA,)):
            prepare_job(job, study.files, restart=True)
            if "analysis" in settings and not (job.folder / ANALYSIS.name).is_dir():
                _analyze(job, **settings["analysis"])


def _data_settings(study: Study, cell: Cell) -> dict[str, object]:
    """Return what the data and the sample of them depend on."""
    settings = settings_of(study, cell)
    return {name: settings[name] for name in ("data", "files", "encoder_sha256", "max_length", "text")}


def _analysis_settings(folder: Path, cells: Sequence[Cell]) -> dict[str, object]:
    """Return what is analysed: all parts by cosine and by what chooses them; what is there, if it says all of that."""
    names = {"cosine", *(cell.plan.criterion for cell in cells if cell.plan.criterion)}
    numbers = greedy_numbers(cells)
    known = (read_settings(folder) or {}).get("analysis", {"criteria": [], "greedy_numbers": {}})
    if names <= set(known["criteria"]) and all(
        known["greedy_numbers"].get(kind, 0) >= numbers[kind] for kind in numbers
    ):
        return known
    return {"criteria": sorted(names), "greedy_numbers": numbers}


def _analyze(job: Job, criteria: Sequence[str], greedy_numbers: dict) -> None:
    analyze(
        job.recipe.encoder,
        job.folder / ANALYSIS.name,
        sources=[str(job.folder / CALIBRATION_FILE)],
        criteria=criteria,
        greedy_numbers=greedy_numbers,
        size=job.recipe.prune.num_texts,
        options=job.own_options(job.recipe.encoder),
    )


def run_cells(study: Study, cells: Sequence[Cell], *, devices: Sequence[str] = ()) -> None:
    """Make and measure models, those that are there already left out.

    Args:
        study: What they belong to, prepared.
        cells: The models.
        devices: A process for each; empty = this process alone.
    """
    if not devices:
        with _Progress(study, cells) as progress:
            _work_through(study, cells, progress)
        return
    jobs = [(replace(study, machine=replace(study.machine, device=device)), cells) for device in devices]
    with _Progress(study, cells) as progress:
        run_workers(_work, jobs, watch=progress.look)
        progress.look()


def check_done(study: Study, cells: Sequence[Cell]) -> None:
    """Raise OSError if another process is still at work at models of this study."""
    missing = [cell for cell in cells if not is_done(study, cell)]
    if missing:
        raise OSError(
            f"{study.folder}: another process is at work at {missing[0].name} and {len(missing) - 1} more; give the "
            "same command again when it has ended"
        )


def _work(job: tuple[Study, Sequence[Cell]]) -> None:
    """What a process of its own does: it takes what no other one is at work at."""
    _work_through(*job)


def _work_through(study: Study, cells: Sequence[Cell], progress: "_Progress | None" = None) -> None:
    starts = dict.fromkeys(start_of(cell, study.recipe) for cell in cells)
    for start in starts:
        with _alone(study.folder / MODELS / f"{start.name}.lock") as taken:
            for cell in cells if taken else ():
                if start_of(cell, study.recipe) == start:
                    run_cell(study, cell)
                    if progress:
                        progress.look()
            if taken and not study.keep_models:
                shutil.rmtree(study.folder / MODELS / start.name, ignore_errors=True)


@contextmanager
def _alone(lock: Path) -> Iterator[bool]:
    """Give whether this process is the only one in the block for a lock file."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    with open(lock, "w", encoding="utf-8") as file:
        yield try_lock(file, fcntl.LOCK_EX)


def _speed_records(study: Study) -> SpeedRecords:
    """Return the measured speeds, those of another model, text or machine discarded."""
    texts = [document_text(document) for document in read_corpus(study.calibration)]
    size = study.recipe.settings.speed_texts
    texts = (texts * (size // len(texts) + 1))[:size]
    job, folder = study.job(Cell(Plan(), study.first_seed)), study.folder / SPEEDS
    settings = {
        "data": _data_settings(study, Cell(Plan(), study.first_seed)),
        "speed_texts": size,
        "device": study.machine.device,
        "batch_tokens": study.machine.batch_tokens,
    }
    with job_folder(folder, settings, restart=is_of_other(folder, settings)):
        # How long a text a model reads is its own affair here, as it is in the evaluation.
        return SpeedRecords(folder / "shapes", study.recipe.base.encoder, job.options(job.recipe.encoder), texts)


def _native_rows(study: Study, planner: Planner, speeds: SpeedRecords) -> list[Row]:
    """Return whole blocks alone, and one width for all layers, each as nearly as fast as EffiR's model as it can be."""
    cell = Cell(planner.effir, study.first_seed)
    record, dtype = read_record(study, cell), study.recipe.settings.dtypes[0]
    target = speeds.of(shape_of_record(record), dtype).speedup
    rows = []
    whole = shape_of_record(read_record(study, Cell(Plan(), study.first_seed)))
    layers = len(whole.widths)
    present = [layer_idx for layer_idx in range(layers) if whole.widths[layer_idx] or whole.attentions[layer_idx]]

    def without_blocks(number: int) -> Shape:
        gone = present[len(present) - number :]
        widths = tuple(0 if i in gone else width for i, width in enumerate(whole.widths))
        return Shape(widths, tuple(a and i not in gone for i, a in enumerate(whole.attentions)))

    def as_narrow(width: int) -> Shape:
        return Shape(tuple(min(width, of_layer) for of_layer in whole.widths), whole.attentions)

    if len(present) > 1:
        numbers = list(range(1, len(present)))
        number = nearest_in_speed(target, numbers, lambda n: speeds.of(without_blocks(n), dtype).speedup)
        rows.append(Row(f"{number} whole blocks" if number > 1 else "1 whole block", planner.blocks(number)))
    if len(set(planner.widths)) == 1 and planner.widths[0] > STEP:
        widths = list(range(STEP * ((planner.widths[0] - 1) // STEP), 0, -STEP))
        width = nearest_in_speed(target, widths, lambda w: speeds.of(as_narrow(w), dtype).speedup)
        rows.append(Row(f"one width, {width} of {planner.widths[0]} units", planner.uniform(width)))
    else:
        logger.warning("the MLPs have several widths, or hardly any, so one width for all layers is not compared")
    return rows


def _measure_speeds(study: Study, tables: Tables, speeds: SpeedRecords) -> None:
    """Measure the shape of every row whose size or speed is compared, each once, after everything else is done."""
    shapes = list(dict.fromkeys(shape.canonical for shape in timed_shapes(study, tables).values()))
    wanted = [(shape, dtype) for dtype in study.recipe.settings.dtypes for shape in shapes]
    missing = [pair for pair in wanted if not speeds.file(*pair).is_file()]
    for shape, dtype in tqdm(missing, desc="speed", unit=" shapes", disable=None):
        speeds.of(shape, dtype)


def timed_shapes(study: Study, tables: Tables) -> dict[Plan, Shape]:
    """Return the shapes of the plans whose speed is told; criteria of units change shapes hardly."""
    plans = [row.plan for name in ("kinds", "shape", "native") for row in tables.get(name, ())]
    cells = [Cell(plan, study.first_seed) for plan in dict.fromkeys(plans)]
    return {cell.plan: shape_of_record(read_record(study, cell)) for cell in cells}


class _Progress:
    """A bar over the models, and a line in the log for each, with the time that is left.

    Trained and untrained models take different times, so that each kind is counted by its own mean.
    """

    def __init__(self, study: Study, cells: Sequence[Cell]) -> None:
        self.study, self.settings = study, {cell: cell_settings(study, cell) for cell in cells}
        self.waiting = [cell for cell in cells if not self._is_done(cell)]
        self.total, self.begun = len(self.waiting), time.monotonic()
        self.seconds: dict[bool, list[float]] = {False: [], True: []}
        if len(cells) > self.total:
            logger.info("%d of %d models are done already", len(cells) - self.total, len(cells))

    def __enter__(self) -> "_Progress":
        self.bar = tqdm(total=self.total, desc="models", unit=" models", disable=None)
        return self

    def __exit__(self, *_error: object) -> None:
        self.bar.close()

    def look(self) -> None:
        """Count what has been done since the last look."""
        for cell in list(self.waiting):
            if not self._is_done(cell):
                continue
            self.waiting.remove(cell)
            record = read_record(self.study, cell)
            self.seconds[cell.trained].append(record["made_in"] + record["measured_in"])
            self.bar.update(1)
            self.bar.set_postfix_str(self._left())
            ndcg = ", ".join(f"{name} {value:.4f}" for name, value in record["ndcg"].items())
            number = self.total - len(self.waiting)
            logger.info("model %d of %d: %s: %s; %s", number, self.total, cell.name, ndcg, self._left())

    def _is_done(self, cell: Cell) -> bool:
        return is_done(self.study, cell, self.settings[cell])

    def _left(self) -> str:
        """Return about how long the rest takes, by what has been done at once so far."""
        done = sum(self.seconds[False]) + sum(self.seconds[True])
        at_once = done / max(time.monotonic() - self.begun, 1e-9)
        longest = max((sum(values) / len(values) for values in self.seconds.values() if values), default=0)
        left = sum(
            sum(self.seconds[cell.trained]) / len(self.seconds[cell.trained]) if self.seconds[cell.trained] else longest
            for cell in self.waiting
        )
        minutes = left / max(at_once, 1e-9) / 60
        return f"about {minutes:.0f} min left" if minutes >= 1.5 else f"about {60 * minutes:.0f} s left"
