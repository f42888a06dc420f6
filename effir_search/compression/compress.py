"""EffiR from end to end: analyse, drop, narrow, fine-tune, evaluate; each stage leaves a folder: ``effir compress``."""

import json
import logging
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path

from accelerate import PartialState
from transformers import PretrainedConfig

from effir_search.compression.recipe import RECIPE_FILE, format_recipe
from effir_search.compression.slim import OF_LOSS, check_cut, slim_encoder
from effir_search.encoding.devices import chosen_device
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import Benchmark, benchmark, collection_files, format_benchmark
from effir_search.files.job import job_folder, read_settings
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.model.arithmetic import empty_model, facts, format_facts, planned
from effir_search.model.checkpoint import lasting_name, resolve_model, weights_sha256
from effir_search.model.layers import PartKind, mlp_widths, parts_of
from effir_search.model.save import TRAINING_FILE
from effir_search.model.sentence_files import prunable_config, read_sentence_files
from effir_search.pruning.analyze import analyze
from effir_search.pruning.prune import NAMES, prune_encoder
from effir_search.settings import CompressionSettings
from effir_search.text.corpus import document_text, read_corpus
from effir_search.training.data import DATA, Loaded, dev_hashes, hashes, load, prepare, sampled_texts
from effir_search.training.finetune import check_processes, check_training, finetune, resolved_recipe
from effir_search.training.objective import check_examples

logger = logging.getLogger(__name__)

ANALYSIS, DROPPED, SLIMMED, TUNED, EVALUATION = "1-analysis", "2-dropped", "3-slimmed", "4-tuned", "5-evaluation"
CALIBRATION_FILE, BENCHMARK_FILE = "calibration.jsonl", "benchmark.json"


def compress(
    compression: CompressionSettings,
    output: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    restart: bool = False,
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

    Returns:
        What was measured at the end; None in the processes of a launcher that are not its main one.

    Raises:
        ValueError: Bad data, a model that cannot be pruned, or another recipe than that of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    compression = with_numbers(compression)
    _check(compression, device)
    # Whoever asks first says what the processes are: the others wait while one does all stages but fine-tuning.
    process = PartialState(cpu=chosen_device(device).type == "cpu", timeout=timedelta(days=7))
    check_processes(compression.finetune, process.num_processes, device)
    folder = stages_of(output)
    stock = {"stock_architecture": True} if compression.stock_architecture else {}
    machine = {"device": device, "batch_tokens": batch_tokens} | stock
    data, main = compression.data, process.is_main_process
    files = hashes(data)
    settings = job_settings(compression, files)
    keep = (DATA, *unchanged_stages(settings, folder)) if main else ()
    with job_folder(folder, settings, restart=restart, keep=keep) if main else nullcontext():
        if main:
            reading = _teacher_options(compression) | stock
            prepare(folder, data, compression.seed, device, files=files, restart=restart, teacher_options=reading)
            loaded = load(folder, data, compression.seed)
            _check_examples(compression, loaded)
            _write_calibration(loaded, folder / CALIBRATION_FILE, compression)
            _analyze(compression, folder, machine)
            _drop(compression, folder, machine)
            _narrow(compression, folder, machine)
        process.wait_for_everyone()
        _fine_tune(compression, folder, machine)
        if not main:
            return None
        measured = _evaluate(compression, folder, machine)
        _save(compression, measured, folder, output)
    return measured


def stages_of(output: Path) -> Path:
    """Return the folder of a job's stages."""
    return output.with_name(f"{output.name}.stages")


def job_settings(compression: CompressionSettings, files: dict[str, str]) -> dict[str, object]:
    """Return all that a job's stages depend on, in JSON types; what is evaluated at the end is not part of that.

    What changes a stage's memory and not its result is that of fine-tuning alone.

    Args:
        compression: The recipe, ``with_numbers``.
        files: The ``hashes`` of its data.
    """
    model = read_sentence_files(resolve_model(compression.encoder))
    settings = asdict(compression) | {"files": files}
    settings["encoder_sha256"] = weights_sha256(model.folder, model.weight_folders)
    del settings["output"], settings["evaluate"], settings["slim"]["gradient_checkpointing"]
    dev = {name: settings["data"].pop(name) for name in list(settings["data"]) if name.startswith("dev")}
    if not dev["dev_remove_query"]:  # jobs of before there was this setting go on
        del dev["dev_remove_query"]
    settings["finetune"] |= {"cached": settings["loss"].pop("cached"), **dev, "dev_files": dev_hashes(compression.data)}
    return json.loads(json.dumps(settings))


def unchanged_stages(settings: dict[str, object], folder: Path) -> list[str]:
    """Return what a job with other settings has left that is the same with these; nothing if they are its own."""
    found = read_settings(folder)
    if found is None or found == settings:
        return []
    changed = {name for name in settings | found if settings.get(name) != found.get(name)}
    of_depth = [CALIBRATION_FILE, ANALYSIS, DROPPED] if changed <= {"slim", "loss", "finetune"} else []
    return of_depth + ([SLIMMED, f"{SLIMMED}.slimming"] if changed <= {"finetune"} else [])


def with_numbers(compression: CompressionSettings) -> CompressionSettings:
    """Return the recipe with the number of MLPs to drop: where it says none, half of those that the encoder has.

    Raises:
        ValueError: A model that cannot be pruned.
        OSError: It cannot be read.
    """
    if compression.prune.drop_mlp is not None:
        return compression
    half = len(parts_of(empty_model(_config(compression)), "mlp")) // 2
    return replace(compression, prune=replace(compression.prune, drop_mlp=half))


def _check(compression: CompressionSettings, device: str) -> None:
    """Raise now what would otherwise end the job after hours."""
    data, slim = compression.data, compression.slim
    check_training(compression.finetune, data, device)
    drops = _drops(compression)
    left = empty_model(planned(_config(compression), **drops))
    resolved_recipe(compression.finetune, data, left, chosen_device(device))
    if slim.narrow:
        widths = {layer_idx: width for layer_idx, width in enumerate(mlp_widths(left)) if width}
        check_cut(widths, slim.narrow, floor=slim.floor, multiple=slim.multiple)
        own = not data.train and resolve_model(data.teacher).resolve() == resolve_model(compression.encoder).resolve()
        if slim.criterion == "taylor" and own and not any(drops.values()):
            raise UserError(
                "--unit-criterion taylor: nothing is dropped, so the model is at no distance from itself and no unit "
                "matters to that; activation or magnitude tell units apart without labels"
            )
    evaluated, names = compression.evaluate, set()
    for collection in map(Path, evaluated.collections):
        if collection.name in names:
            raise UserError(f"{collection}: two collections to evaluate on have this name; rename one")
        names.add(collection.name)
        collection_files(collection, evaluated.split)


def _config(compression: CompressionSettings) -> PretrainedConfig:
    return prunable_config(compression.encoder, stock_architecture=compression.stock_architecture)


def _check_examples(compression: CompressionSettings, loaded: Loaded) -> None:
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


def _write_calibration(loaded: Loaded, path: Path, compression: CompressionSettings) -> None:
    """Write a sample of what is learned from as a corpus; of examples, queries and their positives."""
    if path.is_file():
        return
    number = compression.prune.num_texts
    texts = sampled_texts(loaded, number, compression.seed)[:number]
    with whole_file(path) as file:
        for doc_id, text in enumerate(texts, start=1):
            file.write(json.dumps({"_id": str(doc_id), "text": text.text}, ensure_ascii=False) + "\n")


def _current(compression: CompressionSettings, folder: Path) -> str:
    """Return the model that the last finished stage before fine-tuning left."""
    done = [folder / name for name in (SLIMMED, DROPPED) if (folder / name).is_dir()]
    return str(done[0]) if done else compression.encoder


def _text_options(compression: CompressionSettings, model: str) -> dict[str, object]:
    """Return how a text becomes a vector; a model that was made in a stage before says it itself."""
    if model != compression.encoder:
        return {}
    return {name: value for name, value in asdict(compression.text).items() if value not in (None, False)}


def _teacher_options(compression: CompressionSettings) -> dict[str, object]:
    """Return how a text becomes a vector for a bi-encoder as teacher: as the recipe says for the model as it was."""
    teacher = compression.data.teacher
    return _text_options(compression, teacher) if teacher else {}


def _begins(folder: Path, name: str, what: str) -> bool:
    """Return whether a stage is still to be done, and tell which it is."""
    done = (folder / name).is_dir()
    logger.info("%s of 5: %s%s", name[0], "done already: " if done else "", what)
    return not done


def _numbers(compression: CompressionSettings) -> dict[PartKind, int]:
    """Return how many parts to drop by kind, in the order in which kinds go."""
    return {kind: number for kind in NAMES if (number := getattr(compression.prune, f"drop_{kind}"))}


def _analyze(compression: CompressionSettings, folder: Path, machine: dict) -> None:
    """Report importance by cosine, in one pass, and by what chooses the first parts to go, for ``_drop`` to use."""
    if _begins(folder, ANALYSIS, "where the model is redundant"):
        numbers = _numbers(compression)
        analyze(
            compression.encoder,
            folder / ANALYSIS,
            sources=[str(folder / CALIBRATION_FILE)],
            criteria=["cosine", compression.prune.criterion] if numbers else ["cosine"],
            greedy_numbers=dict(list(numbers.items())[:1]),
            size=compression.prune.num_texts,
            max_length=compression.max_length,
            **_text_options(compression, compression.encoder),
            **machine,
        )


def _drop(compression: CompressionSettings, folder: Path, machine: dict) -> None:
    numbers = _numbers(compression)
    told = ", ".join(f"{number} {NAMES[kind]}" for kind, number in numbers.items())
    if told and _begins(folder, DROPPED, f"dropping {told}"):
        pruned = prune_encoder(
            compression.encoder,
            folder / DROPPED,
            numbers=numbers,
            layers={},
            criterion=compression.prune.criterion,
            sources=[str(folder / CALIBRATION_FILE)],
            size=compression.prune.num_texts,
            calibration_length=compression.max_length,
            analysis=folder / ANALYSIS,
            **_text_options(compression, compression.encoder),
            **machine,
        )
        logger.info("mean cosine of the embeddings to those before: %.4f", pruned.cosine)


def _narrow(compression: CompressionSettings, folder: Path, machine: dict) -> None:
    settings = compression.slim
    if settings.narrow and _begins(folder, SLIMMED, f"narrowing the MLPs that are left by {settings.narrow:.0%}"):
        model = _current(compression, folder)
        slim_encoder(
            model,
            folder / SLIMMED,
            settings.narrow,
            compression.data,
            scoring=settings,
            losses=compression.loss,
            floor=settings.floor,
            multiple=settings.multiple,
            max_length=compression.max_length,
            prepared=folder,
            teacher_options=_teacher_options(compression),
            **_text_options(compression, model),
            **machine,
        )


def _fine_tune(compression: CompressionSettings, folder: Path, machine: dict) -> None:
    if _begins(folder, TUNED, "fine-tuning"):
        model = _current(compression, folder)
        finetune(
            model,
            folder / TUNED,
            compression.data,
            recipe=compression.finetune,
            losses=compression.loss,
            max_length=compression.max_length,
            prepared=folder,
            teacher_options=_teacher_options(compression),
            **_text_options(compression, model),
            **machine,
        )


def _evaluate(compression: CompressionSettings, folder: Path, machine: dict) -> Benchmark:
    logger.info("5 of 5: evaluation")
    texts = [document_text(document) for document in read_corpus(folder / CALIBRATION_FILE)]
    (folder / EVALUATION).mkdir(exist_ok=True)
    return benchmark(
        compression.encoder,
        str(folder / TUNED),
        folder / EVALUATION,
        texts=texts,
        collections=compression.evaluate.collections,
        split=compression.evaluate.split,
        remove_query=compression.evaluate.remove_query,
        seed=compression.seed,
        text_options=_text_options(compression, compression.encoder),
        **machine,
    )


def _save(compression: CompressionSettings, measured: Benchmark, folder: Path, output: Path) -> None:
    """Write the fine-tuned model under its final name, with the recipe and what was measured."""
    encoder = Encoder.from_pretrained(str(folder / TUNED), device="cpu", dtype="saved")
    beside = {
        RECIPE_FILE: format_recipe(replace(compression, output=None)),
        BENCHMARK_FILE: json.dumps(asdict(measured), indent=1) + "\n",
    }
    told = f"## Beside {lasting_name(compression.encoder)}\n\n```\n{format_benchmark(measured)}\n```\n"
    pruned = f"{lasting_name(compression.encoder)}, pruned as above"
    training = read_json(folder / TUNED / TRAINING_FILE) | {"model": pruned}
    encoder.save(output, training=training, beside=beside, measured=told)


def describe_compressed(measured: Benchmark, output: Path) -> str:
    """Return what ``compress`` measured, and where everything is."""
    return f"{format_benchmark(measured)}\n\nThe stages are in {output}.stages.\n-> {output}"


def describe_plan(compression: CompressionSettings) -> str:
    """Return a recipe with all its settings, and the sizes of the model before and after, counted from its config."""
    compression = with_numbers(compression)
    config = _config(compression)
    left = planned(config, narrow=compression.slim.narrow, **_drops(compression))
    sizes = format_facts(facts(empty_model(config)), facts(empty_model(left)), names=("full", "compressed"))
    return f"{format_recipe(compression)}\n{sizes}"
