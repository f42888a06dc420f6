"""One model of a study: made from what is there, measured, and its record."""

import json
import logging
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

from effir_search.compression.compress import job_settings
from effir_search.compression.recipe import format_recipe
from effir_search.compression.stages import CALIBRATION_FILE, Job, cut, fine_tune
from effir_search.encoding.encoder import Encoder
from effir_search.evaluation.benchmark import collection_files, ndcg_of_queries, search_collection
from effir_search.files.job import job_folder, read_settings, same_settings
from effir_search.files.reading import read_json
from effir_search.files.whole import whole_file
from effir_search.model.arithmetic import empty_model, facts
from effir_search.model.checkpoint import dtype_name
from effir_search.model.save import TRAINING_FILE
from effir_search.settings import EncoderOptions, TrainingSettings
from effir_search.study.plan import (
    Cell,
    Collection,
    StudyRecipe,
    as_json,
    start_of,
)
from effir_search.study.speed import Shape, shape_of
from effir_search.text.trec import read_qrels

logger = logging.getLogger(__name__)

RECORD, QUERIES, RECIPE = "record.json", "ndcg.json", "recipe.toml"

CELLS, MODELS, SPEEDS = "cells", "models", "speeds"


@dataclass(frozen=True)
class Study:
    """A study at work.

    Attributes:
        recipe: What is compared.
        folder: Where everything is.
        machine: Device, batches and architecture of every model.
        budget: How every model is trained, but for its seed.
        files: The ``hashes`` of the data.
        encoder_sha256: Of the whole model's weights.
        collections: What models are measured on.
        collection_hashes: By collection those of its files.
        keep_models: Keep the weights of every model after it was measured.
    """

    recipe: StudyRecipe
    folder: Path
    machine: EncoderOptions
    budget: TrainingSettings
    files: dict[str, str]
    encoder_sha256: str
    collections: list[Collection]
    collection_hashes: dict[str, list[str]]
    keep_models: bool = False

    def job(self, cell: Cell) -> Job:
        """Return what the stages of a compression work on for a cell, in the folder of its seed."""
        compression = self.recipe.compression(cell.plan, cell.seed)
        compression = replace(compression, finetune=replace(self.budget, seed=cell.seed))
        return Job(compression, self.seed_folder(cell.seed), self.machine)

    def seed_folder(self, seed: int) -> Path:
        """Return the folder of the data that are prepared with a seed."""
        return self.folder / f"seed-{seed}"

    @property
    def first_seed(self) -> int:
        """The seed of the sample that parts are chosen on, for all models."""
        return self.recipe.settings.seeds[0]

    @property
    def calibration(self) -> Path:
        """The texts that parts are chosen on, and speed is measured on."""
        return self.seed_folder(self.first_seed) / CALIBRATION_FILE

    def cell_folder(self, cell: Cell) -> Path:
        """Return the folder of a cell."""
        return self.folder / CELLS / cell.name


def is_of_other(folder: Path, settings: dict[str, object]) -> bool:
    """Return whether a folder is of other settings, so that what is in it has to be made again."""
    recorded = read_settings(folder)
    changed = recorded is not None and not same_settings(json.loads(json.dumps(settings)), recorded)
    if changed:
        logger.info("%s: settings have changed, so it is made again", folder)
    return changed


def settings_of(study: Study, cell: Cell) -> dict[str, object]:
    """Return all settings of a cell's compression, see ``compress.job_settings``."""
    return job_settings(study.job(cell).recipe, study.files, encoder_sha256=study.encoder_sha256)


def cell_settings(study: Study, cell: Cell) -> dict[str, object]:
    """Return all that a cell's model depends on, in JSON types; what has no part in it is left out."""
    settings = settings_of(study, cell)
    start, plan = start_of(cell, study.recipe), cell.plan
    settings |= {"calibration_seed": study.first_seed, "seed": start.seed if plan.narrow else None}
    if not plan.drops:
        del settings["prune"]
    if not plan.narrow:
        del settings["slim"]
    if not cell.trained:
        del settings["finetune"]
    if not cell.trained and not plan.narrow:
        del settings["loss"]
    return settings


def run_cell(study: Study, cell: Cell) -> dict[str, object]:
    """Return the record of a model, which is made and measured unless it is there.

    The folder of a cell has ``record.json``, ``ndcg.json`` with each query's nDCG@10, a run for each collection, and
    ``recipe.toml``; with ``keep_models`` the model, too. After a stop the same call goes on where it was.
    """
    folder = study.cell_folder(cell)
    settings = cell_settings(study, cell)
    if is_done(study, cell, settings):
        return read_json(folder / RECORD)
    with job_folder(folder, settings, restart=is_of_other(folder, settings)):
        begun = time.monotonic()
        model = _model(study, cell, folder / "model")
        made = time.monotonic()
        job = study.job(cell)
        _search(study, job, model, folder)
        ended = time.monotonic()
        record = as_json(cell) | {"settings": settings, "made_in": made - begun, "measured_in": ended - made}
        record = _record(study, cell, model) | record
        with whole_file(folder / RECORD) as file:
            file.write(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        if not study.keep_models:
            shutil.rmtree(folder / "model", ignore_errors=True)
    return read_json(folder / RECORD)


def is_done(study: Study, cell: Cell, settings: dict[str, object] | None = None) -> bool:
    """Return whether a cell has its record, of these settings and of all collections as they are."""
    file = study.cell_folder(cell) / RECORD
    if not file.is_file():
        return False
    record = read_json(file)
    settings = cell_settings(study, cell) if settings is None else settings
    known, asked = record["collections"], study.recipe.settings
    return (
        same_settings(settings, record["settings"])
        and all(known.get(name) == value for name, value in study.collection_hashes.items())
        and record["remove_query"] == asked.remove_query
    )


def _model(study: Study, cell: Cell, output: Path) -> str:
    """Return the folder of a cell's model, or the name of the encoder; it is made unless it is there."""
    if cell.trained and output.is_dir():
        return str(output)
    start = _start_model(study, start_of(cell, study.recipe))
    if not cell.trained:
        return start
    fine_tune(study.job(cell), output, model=start)
    return str(output)


def _start_model(study: Study, start: Cell) -> str:
    """Return the folder of a model that is not trained: the encoder, less what it loses."""
    if start.plan.is_whole:
        return study.recipe.base.encoder
    folder = study.folder / MODELS / start.name
    settings = cell_settings(study, start)
    with job_folder(folder, settings, restart=is_of_other(folder, settings)):
        # Parts are chosen on the same sample for all seeds.
        return cut(study.job(start), folder, dropping=study.job(replace(start, seed=study.first_seed)))


def _search(study: Study, job: Job, model: str, folder: Path) -> None:
    """Make the runs that a cell lacks, or that are of other files."""
    file = folder / "collections.json"
    known = read_json(file) if file.is_file() else {}
    for collection in study.collections:
        run, hashes_now = folder / f"{collection.name}.trec", study.collection_hashes[collection.name]
        if run.is_file() and known.get(collection.name) == hashes_now:
            continue
        run.unlink(missing_ok=True)
        shutil.rmtree(run.with_suffix(".index"), ignore_errors=True)
        files = map(str, collection_files(collection.folder, collection.split))
        search_collection(*files, run, model, job.options(model))
        known[collection.name] = hashes_now
        with whole_file(file) as out:
            out.write(json.dumps(known, indent=1) + "\n")


def _record(study: Study, cell: Cell, model: str) -> dict[str, object]:
    """Return what is known of a cell's model, and write each query's figure and the recipe beside it."""
    job, folder = study.job(cell), study.cell_folder(cell)
    encoder = Encoder.from_pretrained(model, job.options(model))
    remove_query = study.recipe.settings.remove_query
    per_query = {}
    for collection in study.collections:
        judgments = read_qrels(str(collection_files(collection.folder, collection.split)[2]))
        run = folder / f"{collection.name}.trec"
        per_query[collection.name] = ndcg_of_queries(run, judgments, remove_query=remove_query)
    with whole_file(folder / QUERIES) as file:
        file.write(json.dumps(per_query, indent=1) + "\n")
    with whole_file(folder / RECIPE) as file:
        file.write(format_recipe(replace(job.recipe, output=None)))
    return {
        "shape": shape_of(encoder)._asdict(),
        "sizes": facts(empty_model(encoder.model.config)),
        "pruned": getattr(encoder.model.config, "plan", []),
        "dtype": dtype_name(encoder.dtype),
        "training": read_json(Path(model) / TRAINING_FILE)["result"] if cell.trained else None,
        "collections": study.collection_hashes,
        "remove_query": remove_query,
        "ndcg": {name: sum(values.values()) / len(values) for name, values in per_query.items()},
        "queries": {name: len(values) for name, values in per_query.items()},
    }


def read_record(study: Study, cell: Cell) -> dict[str, object]:
    """Return the record of a cell that is done."""
    return read_json(study.cell_folder(cell) / RECORD)


def read_queries(study: Study, cell: Cell) -> dict[str, dict[str, float]]:
    """Return by collection each query's nDCG@10 of a cell that is done."""
    queries = read_json(study.cell_folder(cell) / QUERIES)
    return {collection.name: queries[collection.name] for collection in study.collections}


def shape_of_record(record: dict[str, object]) -> Shape:
    """Return the shape in a record."""
    return Shape(*(tuple(record["shape"][name]) for name in Shape._fields))
