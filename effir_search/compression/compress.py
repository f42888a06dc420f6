"""EffiR from end to end: analyse, drop, narrow, fine-tune, evaluate; each stage leaves a folder: ``effir compress``."""

import json
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from transformers import PretrainedConfig

from effir_search.compression.native import check_native, save_native, shape_in_words, with_native_numbers
from effir_search.compression.recipe import RECIPE_FILE, format_recipe
from effir_search.compression.slim import OF_LOSS, check_cut
from effir_search.compression.stages import CALIBRATION_FILE, STAGES, Job, run_stage, unchanged_names
from effir_search.encoding.devices import chosen_device
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import Benchmark, collection_files, format_benchmark
from effir_search.files.job import changed_settings, job_folder, read_settings
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.model.arithmetic import empty_model, facts, format_facts, planned
from effir_search.model.checkpoint import lasting_name, resolve_model, weights_sha256
from effir_search.model.layers import mlp_widths, parts_of
from effir_search.model.save import TRAINING_FILE, copy_model
from effir_search.model.sentence_files import prunable_config, read_sentence_files
from effir_search.model.stock import stock_config
from effir_search.settings import CompressionSettings, EncoderOptions
from effir_search.training.data import (
    DATA,
    PreparedData,
    check_losses,
    dev_hashes,
    hashes,
    load,
    prepare,
    sampled_texts,
)
from effir_search.training.finetune import check_processes, check_training, resolved_training
from effir_search.training.in_batch_negatives import check_examples

BENCHMARK_FILE = "benchmark.json"


def compress(
    compression: CompressionSettings,
    output: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    restart: bool = False,
    analysis: Path | None = None,
    section: str = "",
) -> Benchmark | None:
    """Compress a model by a recipe; after a stop, the same call goes on where it was.

    ``OUTPUT.stages`` gets a folder of each stage: the report of the analysis, the model without what was dropped, the
    one that was narrowed, the one that was fine-tuned, and the runs of the evaluation. ``OUTPUT`` is the last model,
    with the recipe and what was measured beside it. Under a launcher of several processes all of them fine-tune, and
    the main one does the rest.

    Args:
        compression: The recipe.
        output: The new folder.
        device: As ``Encoder.from_pretrained`` takes it.
        batch_tokens: Padded tokens of a forward pass; None = by device.
        restart: Discard what a stopped job left, but for data that was prepared from the same files. Of a job with
            other settings only the stages that depend on these go.
        analysis: See ``Job``.
        section: One more section of the model card.

    Returns:
        What was measured at the end; None in the processes of a launcher that are not its main one.

    Raises:
        ValueError: Bad data, a model that cannot be pruned, or another recipe than that of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    compression = with_numbers(compression)
    check_compression(compression, device)
    # accelerate fixes the number of processes at the first call; the others wait while the main one runs its stages.
    process = PartialState(cpu=chosen_device(device).type == "cpu", timeout=timedelta(days=7))
    check_processes(compression.finetune, process.num_processes, device)
    folder, main = stages_of(output), process.is_main_process
    machine = EncoderOptions(
        device=device, batch_tokens=batch_tokens, stock_architecture=compression.stock_architecture
    )
    job, files = Job(compression, folder, machine, analysis), hashes(compression.data)
    settings = job_settings(compression, files)
    keep = (DATA, *unchanged_stages(settings, folder)) if main else ()
    measured = None
    with job_folder(folder, settings, restart=restart, keep=keep) if main else nullcontext():
        if main:
            prepare_job(job, files, restart=restart)
        for stage in STAGES:
            if stage.by_all_processes:
                process.wait_for_everyone()
            if main or stage.by_all_processes:
                measured = run_stage(stage, job)
            if compression.native:
                check_native(job.model)
        if not main:
            return None
        _save(job, measured, output, section)
    return measured


def prepare_job(job: Job, files: dict[str, str], *, restart: bool) -> None:
    """Prepare what is learned from, and take the sample that is measured on; what is in the job's folder is used again.

    Args:
        job: Its folder gets both.
        files: The ``hashes`` of the recipe's data.
        restart: Discard what was prepared with other settings, instead of raising.
    """
    recipe = job.recipe
    scored = recipe.loss.distill_over == "candidates"
    teaching = {"files": files, "restart": restart, "teacher_options": job.options(recipe.data.teacher)}
    teaching["scored"] = scored
    prepare(job.folder, recipe.data, recipe.seed, job.machine.device, **teaching)
    loaded = load(job.folder, recipe.data, recipe.seed)
    _check_examples(recipe, loaded)
    _write_calibration(loaded, job.folder / CALIBRATION_FILE, recipe)


def stages_of(output: Path) -> Path:
    """Return the folder of a job's stages."""
    return output.with_name(f"{output.name}.stages")


def job_settings(
    compression: CompressionSettings, files: dict[str, str], *, encoder_sha256: str | None = None
) -> dict[str, object]:
    """Return all that a job's stages depend on, in JSON types; what is evaluated at the end is not part of that.

    What changes a stage's memory and not its result is that of fine-tuning alone.

    Args:
        compression: The recipe, ``with_numbers``.
        files: The ``hashes`` of its data.
        encoder_sha256: See ``encoder_hash``, where it is known.
    """
    settings = asdict(compression) | {"files": files}
    settings["encoder_sha256"] = encoder_sha256 or encoder_hash(compression.encoder)
    del settings["output"], settings["evaluate"], settings["slim"]["gradient_checkpointing"]
    dev = {name: settings["data"].pop(name) for name in list(settings["data"]) if name.startswith("dev")}
    settings["finetune"] |= {"cached": settings["loss"].pop("cached"), **dev, "dev_files": dev_hashes(compression.data)}
    return json.loads(json.dumps(settings))


def encoder_hash(encoder: str) -> str:
    """Return the SHA-256 of an encoder's weights."""
    model = read_sentence_files(resolve_model(encoder))
    return weights_sha256(model.folder, model.weight_folders)


def unchanged_stages(settings: dict[str, object], folder: Path) -> list[str]:
    """Return what a job with other settings has left that is the same with these; nothing if they are its own."""
    recorded = read_settings(folder)
    changed = changed_settings(settings, recorded) if recorded is not None else []
    return unchanged_names(changed, folder) if changed else []


def with_numbers(compression: CompressionSettings) -> CompressionSettings:
    """Return the recipe with the number of MLPs to drop: where it says none, half of those that the encoder has.

    Raises:
        ValueError: A model that cannot be pruned, or a recipe with a target, whose numbers are still to be found.
        OSError: It cannot be read.
    """
    if compression.target:
        raise UserError(
            f"target {compression.target}: what goes is found by effir compress --target, without --plan, in no study"
        )
    if compression.native:
        return with_native_numbers(compression, config_of(compression))
    if compression.prune.drop_mlp is not None:
        return compression
    half = len(parts_of(empty_model(config_of(compression)), "mlp")) // 2
    return replace(compression, prune=replace(compression.prune, drop_mlp=half))


def check_compression(compression: CompressionSettings, device: str) -> None:
    """Raise now what would otherwise end the job after hours."""
    data, slim = compression.data, compression.slim
    check_training(compression.finetune, data, device)
    check_losses(compression.loss, data)
    drops = _drops(compression)
    dropped = empty_model(planned(config_of(compression), **drops))
    resolved_training(compression.finetune, data, dropped, chosen_device(device))
    if compression.native:
        stock_config(dropped.config)  # raises for an encoder that lacks single parts already
    if slim.narrow:
        check_cut({layer_idx: width for layer_idx, width in enumerate(mlp_widths(dropped)) if width}, slim)
        own = not data.train and resolve_model(data.teacher).resolve() == resolve_model(compression.encoder).resolve()
        if slim.criterion == "taylor" and own and not any(drops.values()):
            raise UserError(
                "--unit-criterion taylor: nothing is dropped, so the model is at no distance from itself and no unit "
                "matters to that; activation or magnitude tell units apart without labels"
            )
    names: set[str] = set()
    for collection in map(Path, compression.evaluate.collections):
        if collection.name in names:
            raise UserError(f"{collection}: two collections to evaluate on have this name; rename one")
        names.add(collection.name)
        collection_files(collection, compression.evaluate.split)


def config_of(compression: CompressionSettings) -> PretrainedConfig:
    """Return the config of a recipe's encoder."""
    return prunable_config(compression.encoder, stock_architecture=compression.stock_architecture)


def _check_examples(compression: CompressionSettings, loaded: PreparedData) -> None:
    """Raise now what slimming and fine-tuning would raise of examples that nothing can be learned from."""
    if not compression.data.train:
        return
    sizes = [compression.finetune.batch_size]
    if compression.slim.narrow and compression.slim.criterion in OF_LOSS:
        sizes.append(compression.slim.batch_size)
    for size in sizes:
        check_examples(loaded.dataset, size, compression.loss)


def _drops(compression: CompressionSettings) -> dict[str, int]:
    return {name: getattr(compression.prune, name) for name in ("drop_mlp", "drop_attention", "drop_block")}


def _write_calibration(loaded: PreparedData, path: Path, compression: CompressionSettings) -> None:
    """Write a sample of what is learned from as a corpus; of examples, queries and their positives."""
    if path.is_file():
        return
    number = compression.prune.num_texts
    texts = sampled_texts(loaded, number, compression.seed)[:number]
    with whole_file(path) as file:
        for doc_id, text in enumerate(texts, start=1):
            file.write(json.dumps({"_id": str(doc_id), "text": text.text}, ensure_ascii=False) + "\n")


def _save(job: Job, measured: Benchmark, output: Path, more: str) -> None:
    """Copy the model that the stages have left to its final name, with the recipe and what was measured."""
    model, name = Path(job.model), lasting_name(job.recipe.encoder)
    beside = {
        RECIPE_FILE: format_recipe(replace(job.recipe, output=None)),
        BENCHMARK_FILE: json.dumps(asdict(measured), indent=1) + "\n",
    }
    section = f"## Beside {name}\n\n```\n{format_benchmark(measured)}\n```\n"
    where = "below" if job.recipe.native else "above"
    training = read_json(model / TRAINING_FILE) | {"model": f"{name}, pruned as {where}"}
    sections = "\n".join(filter(None, [more, section]))
    save = save_native if job.recipe.native else copy_model
    save(model, output, training=training, beside=beside, measured=sections)


def describe_compression(measured: Benchmark, output: Path) -> str:
    """Return what ``compress`` measured, and where everything is."""
    return f"{format_benchmark(measured)}\n\nThe stages are in {output}.stages.\n-> {output}"


def describe_plan(compression: CompressionSettings) -> str:
    """Return a recipe with all its settings, and the sizes of the model before and after, counted from its config."""
    compression = with_numbers(compression)
    full = config_of(compression)
    compressed = planned(full, narrow=compression.slim.narrow, **_drops(compression))
    sizes = format_facts(facts(empty_model(full)), facts(empty_model(compressed)), names=("full", "compressed"))
    native = f"\n\nIt becomes {shape_in_words(stock_config(compressed))}." if compression.native else ""
    return f"{format_recipe(compression)}\n{sizes}{native}"
