"""Fine-tune an encoder for retrieval: ``effir finetune``."""

import importlib.util
import itertools
import json
import logging
import math
import shutil
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from transformers import EarlyStoppingCallback, PreTrainedModel
from transformers.trainer_callback import TrainerState

from effir_search.encoding.batching import LARGE
from effir_search.encoding.devices import chosen_device, computes_in_bf16
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.model.checkpoint import lasting_name, quiet_transformers
from effir_search.model.save import SPACES_FIELD
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, TrainingSettings
from effir_search.text.examples import Example
from effir_search.training.data import (
    DATA,
    PreparedData,
    ShuffledSequence,
    dev_hashes,
    hashes,
    load,
    objective_of,
    prepare,
    resolved_losses,
    teacher_beside,
    teacher_reading,
)
from effir_search.training.dev import Measure, likeness, ndcg, read_dev_split
from effir_search.training.objective import Objective
from effir_search.training.trainable import make_plain, make_trainable
from effir_search.training.trainer import (
    ObjectiveTrainer,
    last_whole_checkpoint,
    load_trained,
    plain_log,
    stopped_early,
    training_arguments,
)

logger = logging.getLogger(__name__)

DEFAULT_SETTINGS, DEFAULT_LOSSES = TrainingSettings(), LossSettings()


class FinetuningResult(NamedTuple):
    """What was done.

    Attributes:
        num_examples: Examples or texts.
        steps: Of the optimiser, those before a stop included.
        measure: Name of the figure that was watched; None without.
        before: Its value at the start.
        best: Its value of the model that is kept.
        best_step: When that was.
        seconds: Of this process.
    """

    num_examples: int
    steps: int
    measure: str | None
    before: float | None
    best: float | None
    best_step: int
    seconds: float


class _Job(NamedTuple):
    """What a job does, checked and with a value for every setting.

    Attributes:
        objective: The loss of the encoder that is trained.
        teacher: What runs beside; see ``teacher_beside``.
        dev_measure: What the encoder is measured by on ``dev``; None without.
        data: What is learned from.
        files: The hashes of its files.
        settings: How it is trained.
        record: What the result depends on, for the job's folder and the model's.
    """

    objective: Objective
    teacher: Encoder | None
    dev_measure: Measure | None
    data: DataSettings
    files: dict[str, str]
    settings: TrainingSettings
    record: dict[str, object]


class _Outcome(NamedTuple):
    """What training came to: ``FinetuningResult`` has the same figures. ``log`` is what transformers logged."""

    steps: int
    before: float | None
    best: float | None
    best_step: int
    log: list[dict]


def finetune(
    encoder_name: str,
    output: Path,
    data: DataSettings,
    settings: TrainingSettings = DEFAULT_SETTINGS,
    losses: LossSettings = DEFAULT_LOSSES,
    options: EncoderOptions = DEFAULT_OPTIONS,
    *,
    restart: bool = False,
    keep_checkpoints: bool = False,
    prepared: Path | None = None,
    teacher_options: EncoderOptions | None = None,
) -> FinetuningResult | None:
    """Fine-tune an encoder and save it as a model folder; after a stop, the same call goes on from the last checkpoint.

    Checkpoints, prepared data and the log are in ``OUTPUT.training`` until the model is written.

    Args:
        encoder_name: Model folder or hub name, pruned or not.
        output: The new folder.
        data: What is learned from.
        settings: How.
        losses: What is minimised.
        options: How the encoder is loaded and run; a ``dtype`` of None is "saved". The saved model keeps pooling,
            prompts and normalisation, but has the ``max_length`` of the model's own files.
        restart: Discard what a stopped job left, but for data that was prepared from the same files.
        keep_checkpoints: Keep ``OUTPUT.training``.
        prepared: The folder of ``data.prepare`` with the data; None = ``OUTPUT.training``.
        teacher_options: How a bi-encoder as teacher reads a text; None = as ``data.teacher_reading``. It has the device
            and ``stock_architecture`` of ``options``.

    Returns:
        What was done; None in the processes of a launcher that are not its main one.

    Raises:
        ValueError: Bad data, a loss that is not finite, or settings other than those of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    start = time.monotonic()
    refuse_existing(output, replaces=())
    check_training(settings, data, options.device)
    encoder = Encoder.from_pretrained(encoder_name, options.with_defaults(dtype="saved"))
    saved_dtype = encoder.dtype
    process = _join_processes(encoder.device)
    main = process.is_main_process
    machine = {"device": options.device, "stock_architecture": options.stock_architecture}
    teacher_options = replace(teacher_options or teacher_reading(data, encoder, options), **machine)
    job = _set_up(encoder, data, settings, losses, teacher_options)
    folder = output.with_name(f"{output.name}.training")
    with job_folder(folder, job.record, restart=restart, keep=(DATA,)) if main else nullcontext():
        prepared_data = _prepare(job, prepared or folder, teacher_options, restart=restart)
        measure = _measure(job, prepared_data)
        outcome = _train(job, prepared_data, measure, folder)
        result = FinetuningResult(
            len(prepared_data.dataset),
            outcome.steps,
            measure[0] if measure else None,
            outcome.before,
            outcome.best,
            outcome.best_step,
            time.monotonic() - start,
        )
        if main:
            learned = {SPACES_FIELD: [asdict(space) for space in job.objective.spaces()]}
            plain = make_plain(job.objective.encoder, saved_dtype)
            plain.save(output, training=job.record | learned | {"result": result._asdict(), "log": outcome.log})
        process.wait_for_everyone()
    if main and not keep_checkpoints:
        shutil.rmtree(folder)
    return result if main else None


def _join_processes(device: torch.device) -> PartialState:
    """Return the processes of the launcher, of which this is one; only the main one tells what it does."""
    # The others wait while one process prepares the data, which may take hours.
    process = PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7))
    if not process.is_main_process:
        logging.getLogger("effir_search").setLevel(logging.WARNING)
    return process


def _set_up(
    encoder: Encoder,
    data: DataSettings,
    settings: TrainingSettings,
    losses: LossSettings,
    teacher_options: EncoderOptions,
) -> _Job:
    """Return the job; what can be wrong is found here, before hours go into teachers' scores.

    Raises:
        ValueError: Settings that do not fit the model, the teacher or the processes.
        OSError: A file cannot be read.
    """
    process = PartialState()
    teacher = teacher_beside(data, losses, encoder, teacher_options)
    settings = resolved_training(settings, data, encoder.model, encoder.device)
    losses = resolved_losses(losses, data, encoder, teacher)
    files = hashes(data)
    record = {
        "model": lasting_name(encoder.name),
        "model_sha256": encoder.weights_sha256,
        "encoder": asdict(encoder.config),
        "data": asdict(data),
        "files": files | dev_hashes(data),
        "recipe": asdict(settings),
        "losses": asdict(losses),
        "processes": process.num_processes,
    }
    check_processes(settings, process.num_processes, teacher_options.device)
    dev_measure = _dev_measure(data, measures=process.is_main_process)
    objective = objective_of(make_trainable(encoder, settings), losses, teacher, bf16=bool(settings.bf16))
    return _Job(objective, teacher, dev_measure, data, files, settings, record)


def _dev_measure(data: DataSettings, *, measures: bool) -> Measure | None:
    """Return what is measured on ``dev``; where this process measures nothing, only its name."""
    if data.dev is None:
        return None
    if not measures:
        return "nDCG@10", None
    size = {"num_queries": data.dev_queries, "num_documents": data.dev_documents}
    return ndcg(read_dev_split(Path(data.dev), data.dev_split, **size), remove_query=data.dev_remove_query)


def _prepare(job: _Job, folder: Path, teacher_options: EncoderOptions, *, restart: bool) -> PreparedData:
    """Return what is learned from, which the main process prepares in this folder while the others wait."""
    process, seed = PartialState(), job.settings.seed
    if process.is_main_process:
        scored = job.objective.settings.distill_over == "candidates"
        choices = {"files": job.files, "restart": restart, "teacher_options": teacher_options, "scored": scored}
        prepare(folder, job.data, seed, teacher_options.device, **choices)
    process.wait_for_everyone()
    prepared_data = load(folder, job.data, seed)
    job.objective.check(prepared_data.dataset, job.settings.batch_size)
    if job.data.train and not (job.data.teacher or job.data.reranker) and process.is_main_process:
        _warn_of_cosines(prepared_data.dataset, job.objective.settings)
    return prepared_data


def _measure(job: _Job, prepared_data: PreparedData) -> Measure | None:
    """Return what is measured while training: on ``dev``, or else likeness to the teacher on texts held out."""
    measure = job.dev_measure
    if measure is None and len(prepared_data.held_out) > 2:
        measure = likeness(prepared_data.held_out, job.teacher)
    if job.settings.patience and measure is None:
        raise UserError("--patience needs something that is measured: give --dev")
    return measure


def resolved_training(
    settings: TrainingSettings, data: DataSettings, model: PreTrainedModel, device: torch.device
) -> TrainingSettings:
    """Return the settings with a value for every None that stands for one.

    Args:
        settings: As the user has them.
        data: What is learned from.
        model: What learns; it may be on the meta device.
        device: Where it will learn.

    Raises:
        ValueError: Settings of LoRA for a model of which all weights are trained.
    """
    rank = settings.lora_rank
    if rank is None:
        rank = 32 if model.num_parameters() >= LARGE else 0
    if not rank and (settings.lora_alpha or settings.lora_dropout):
        raise UserError("--lora-alpha and --lora-dropout go with LoRA, and all weights are trained: give --lora-rank")
    lora_rate, full_rate = (1e-4, 2e-5) if data.train else (4e-4, 0.2 / model.config.hidden_size)
    return replace(
        settings,
        lora_rank=rank,
        lora_alpha=settings.lora_alpha or 2 * rank,
        learning_rate=settings.learning_rate or (lora_rate if rank else full_rate),
        bf16=computes_in_bf16(device) if settings.bf16 is None else settings.bf16,
    )


def _warn_of_cosines(examples: Sequence[Example], losses: LossSettings) -> None:
    """Warn of scores that look like cosines where they are taken as a reranker's."""
    scores = itertools.chain.from_iterable(examples[row].scores or [] for row in range(min(1000, len(examples))))
    largest = max(map(abs, scores), default=2.0)
    if largest <= 1 and losses.teacher_temperature == 1 != losses.temperature:
        logger.warning(
            "the examples' scores lie in [-1, 1]: if they are cosines, give --teacher-temperature %g, or they tell "
            "candidates hardly apart",
            losses.temperature,
        )


def check_training(settings: TrainingSettings, data: DataSettings, device: str) -> None:
    """Raise ValueError or OSError for what does not fit this machine or this data."""
    chosen_device(device)
    for package in settings.log_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--log-to {package}: is not installed; pip install {package}")
    if settings.patience and data.train and not data.dev:
        raise UserError("--patience needs something that is measured: give --dev")
    if data.dev and not (qrels := Path(data.dev) / "qrels" / f"{data.dev_split}.tsv").is_file():
        raise FileNotFoundError(f"{qrels}: is not there; --dev takes a BEIR folder, --dev-split the name of its qrels")


def check_processes(settings: TrainingSettings, processes: int, device: str) -> None:
    """Raise ValueError if a batch cannot be divided among processes, or all of them were to take one GPU."""
    if processes > 1 and device.startswith("cuda:"):
        raise UserError(f"--device {device}: each of the {processes} processes takes a GPU of its own; give auto")
    if settings.batch_size % processes:
        raise UserError(f"--batch-size {settings.batch_size} is no multiple of the {processes} processes")


def _train(job: _Job, prepared_data: PreparedData, measure: Measure | None, folder: Path) -> _Outcome:
    """Train, from the last checkpoint on, and leave the best weights in the model.

    The outcome is in ``trained.json`` from then on, so that a job that was stopped while it saved trains no further.
    """
    file = folder / "trained.json"
    if not file.is_file():
        outcome = _outcome(_trained_state(job, prepared_data, measure, folder))
        process = PartialState()
        process.wait_for_everyone()
        if process.is_main_process:
            with whole_file(file) as out:
                out.write(json.dumps(outcome._asdict(), indent=1) + "\n")
        process.wait_for_everyone()
    outcome = _Outcome(**read_json(file))
    losses = [entry["loss"] for entry in outcome.log if "loss" in entry]
    if losses and not any(losses):
        raise UserError(
            "the loss was 0 at every step, so nothing was learned: give a larger --batch-size, negatives, or a teacher "
            "that is not the encoder itself"
        )
    load_trained(job.objective, folder / f"checkpoint-{outcome.best_step}")
    if measure and outcome.best <= outcome.before:
        logger.warning(
            "%s was %.4f before training and at best %.4f after it: this training does not help; try a lower "
            "--learning-rate or other data",
            *(measure[0], outcome.before, outcome.best),
        )
    return outcome


def _trained_state(job: _Job, prepared_data: PreparedData, measure: Measure | None, folder: Path) -> TrainerState:
    """Return transformers' state at the end of training, which goes on from the last whole checkpoint."""
    settings, dataset = job.settings, prepared_data.dataset
    batch_size = settings.batch_size * settings.accumulation
    steps = math.ceil(len(dataset) * settings.epochs / batch_size)
    steps = min(steps, settings.max_steps or steps)
    checkpoint = last_whole_checkpoint(folder)
    if checkpoint and settings.patience and (state := stopped_early(checkpoint, settings.patience)):
        return state
    device, begins = job.objective.encoder.device, checkpoint is None
    trainer = ObjectiveTrainer(
        job.objective,
        measure,
        training_arguments(folder, settings, device, steps, begins=begins, watched=measure is not None),
        train_dataset=ShuffledSequence(dataset, steps * batch_size, settings.seed),
        eval_dataset=dataset,  # the trainer asks for one; what is measured is the measure
        data_collator=prepared_data.collate,
        callbacks=[EarlyStoppingCallback(settings.patience)] if settings.patience else [],
    )
    if checkpoint is not None:
        logger.info("continuing from %s", checkpoint)
    with quiet_transformers():
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    return trainer.state


def _outcome(state: TrainerState) -> _Outcome:
    log = plain_log(state)
    figures = [entry["measure"] for entry in log if "measure" in entry]
    return _Outcome(
        steps=state.global_step,
        before=figures[0] if figures else None,
        best=state.best_metric,
        best_step=state.best_global_step or state.global_step,
        log=log,
    )


def describe_finetuned(result: FinetuningResult, output: Path) -> str:
    """Return what ``finetune`` did, in two lines."""
    line = f"{result.num_examples:,} examples, {result.steps:,} steps, {result.seconds:.0f} s"
    if result.measure:
        line += f"; {result.measure} {result.before:.4f} before, {result.best:.4f} at step {result.best_step}"
        line += ", which is kept"
    return f"{line}\n-> {output}"
