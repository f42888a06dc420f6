"""Fine-tune an encoder for retrieval: ``effir finetune``."""

import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import EarlyStoppingCallback, PreTrainedModel, TrainingArguments, set_seed

from effir_search.encoding.batching import LARGE
from effir_search.encoding.config import own_config
from effir_search.encoding.devices import chosen_device, computes_in_bf16
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.model.checkpoint import lasting_name, quiet_transformers
from effir_search.model.layers import lora_targets
from effir_search.settings import DataSettings, LossSettings, TrainingSettings
from effir_search.text.examples import Example
from effir_search.training.data import (
    DATA,
    Loaded,
    Shuffled,
    checkpoint_activations,
    dev_hashes,
    hashes,
    imitated,
    keep_activations,
    load,
    objective_of,
    prepare,
    resolved,
    teacher_reading,
)
from effir_search.training.dev import Measure, likeness, ndcg, read_dev_split
from effir_search.training.objective import Objective
from effir_search.training.trainer import (
    ObjectiveTrainer,
    last_whole_checkpoint,
    load_trained,
    plain_log,
    stopped_early,
)

logger = logging.getLogger(__name__)


class Finetuned(NamedTuple):
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


def finetune(
    encoder_name: str,
    output: Path,
    data: DataSettings,
    *,
    recipe: TrainingSettings,
    losses: LossSettings,
    max_length: int | None = None,
    device: str = "auto",
    batch_tokens: int | None = None,
    restart: bool = False,
    keep_checkpoints: bool = False,
    prepared: Path | None = None,
    teacher_options: Mapping[str, object] | None = None,
    stock_architecture: bool = False,
    **text_options: object,
) -> Finetuned | None:
    """Fine-tune an encoder and save it as a model folder; after a stop, the same call goes on from the last checkpoint.

    Checkpoints, prepared data and the log are in ``OUTPUT.training`` until the model is written.

    Args:
        encoder_name: Model folder or hub name, pruned or not.
        output: The new folder.
        data: What is learned from.
        recipe: How.
        losses: What is minimised.
        max_length: Tokens of a text that are read in training; the saved model keeps its own.
        device: As ``Encoder.from_pretrained`` takes it.
        batch_tokens: Padded tokens of a forward pass; None = by device.
        restart: Discard what a stopped job left, but for data that was prepared from the same files.
        keep_checkpoints: Keep ``OUTPUT.training``.
        prepared: The folder of ``data.prepare`` with the data; None = ``OUTPUT.training``.
        teacher_options: As text_options, of the teacher, if it is a bi-encoder; None = as ``data.teacher_reading``.
        stock_architecture: As ``Encoder.from_pretrained`` takes it, of all models.
        text_options: Pooling, prompts, normalisation as ``Encoder.from_pretrained`` takes them, which the saved model
            keeps.

    Returns:
        What was done; None in the processes of a launcher that are not its main one.

    Raises:
        ValueError: Bad data, a loss that is not finite, or settings other than those of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    start = time.monotonic()
    refuse_existing(output, replaces=())
    check_training(recipe, data, device)
    given = {name: value for name, value in text_options.items() if value is not None}
    stock = {"stock_architecture": True} if stock_architecture else {}
    machine = {"device": device, "batch_tokens": batch_tokens} | stock
    encoder = Encoder.from_pretrained(encoder_name, dtype="saved", max_length=max_length, **machine, **given)
    # The others wait while one process prepares the data, which may take hours.
    process = PartialState(cpu=encoder.device.type == "cpu", timeout=timedelta(days=7))
    if not process.is_main_process:
        logging.getLogger("effir_search").setLevel(logging.WARNING)
    if teacher_options is None:
        teacher_options = teacher_reading(data, encoder)
    teacher = imitated(data, encoder, device, **teacher_options, **stock)
    recipe = resolved_recipe(recipe, data, encoder.model, encoder.device)
    losses = resolved(losses, data, encoder, teacher)
    files = hashes(data)
    settings = {
        "model": lasting_name(encoder_name),
        "model_sha256": encoder.weights_sha256,
        "encoder": asdict(encoder.config),
        "data": asdict(data),
        "files": files | dev_hashes(data),
        "recipe": asdict(recipe),
        "losses": asdict(losses),
        "processes": process.num_processes,
    }
    dtype = encoder.dtype
    # What can be wrong is found before hours go into teachers' scores.
    check_processes(recipe, process.num_processes, device)
    measure = _dev_measure(data) if process.is_main_process or not data.dev else ("nDCG@10", None)
    _make_trainable(encoder, recipe)
    objective = objective_of(encoder, losses, teacher, bf16=recipe.bf16)
    folder = output.with_name(f"{output.name}.training")
    with job_folder(folder, settings, restart=restart, keep=(DATA,)) if process.is_main_process else nullcontext():
        if process.is_main_process:
            reading = {"teacher_options": {**teacher_options, **stock}}
            prepare(prepared or folder, data, recipe.seed, device, files=files, restart=restart, **reading)
        process.wait_for_everyone()
        loaded = load(prepared or folder, data, recipe.seed)
        objective.check(loaded.dataset, recipe.batch_size)
        if data.train and not (data.teacher or data.reranker) and process.is_main_process:
            _warn_of_cosines(loaded.dataset, losses)
        if measure is None and len(loaded.held_out) > 2:
            measure = likeness(loaded.held_out, teacher)
        if recipe.patience and measure is None:
            raise UserError("--patience needs something that is measured: give --dev")
        outcome = _train(objective, loaded, measure, recipe, folder)
        done = Finetuned(
            num_examples=len(loaded.dataset),
            measure=measure[0] if measure else None,
            seconds=time.monotonic() - start,
            **{name: outcome[name] for name in ("steps", "before", "best", "best_step")},
        )
        if process.is_main_process:
            _make_plain(encoder, dtype)
            record = settings | {"result": done._asdict(), "log": outcome["log"]}
            encoder.save(output, training=record)
        process.wait_for_everyone()
    if not process.is_main_process:
        return None
    if not keep_checkpoints:
        shutil.rmtree(folder)
    return done


def resolved_recipe(
    recipe: TrainingSettings, data: DataSettings, model: PreTrainedModel, device: torch.device
) -> TrainingSettings:
    """Return the recipe with a value for every None that stands for one.

    Args:
        recipe: As it was given.
        data: What is learned from.
        model: What learns; it may be on the meta device.
        device: Where it will learn.

    Raises:
        ValueError: Settings of LoRA for a model of which all weights are trained.
    """
    rank = recipe.lora_rank
    if rank is None:
        rank = 32 if model.num_parameters() >= LARGE else 0
    if not rank and (recipe.lora_alpha or recipe.lora_dropout):
        raise UserError("--lora-alpha and --lora-dropout go with LoRA, and all weights are trained: give --lora-rank")
    of_lora, of_all = (1e-4, 2e-5) if data.train else (4e-4, 0.2 / model.config.hidden_size)
    rate = recipe.learning_rate or (of_lora if rank else of_all)
    bf16 = computes_in_bf16(device) if recipe.bf16 is None else recipe.bf16
    return replace(recipe, lora_rank=rank, lora_alpha=recipe.lora_alpha or 2 * rank, learning_rate=rate, bf16=bf16)


def _warn_of_cosines(examples: Sequence[Example], losses: LossSettings) -> None:
    """Warn of scores that look like cosines where they are taken as a reranker's."""
    some = [examples[row].scores or [] for row in range(min(1000, len(examples)))]
    largest = max((abs(score) for scores in some for score in scores), default=2.0)
    if largest <= 1 and losses.teacher_temperature == 1 != losses.temperature:
        logger.warning(
            "the examples' scores lie in [-1, 1]: if they are cosines, give --teacher-temperature %g, or they tell "
            "candidates hardly apart",
            losses.temperature,
        )


def check_training(recipe: TrainingSettings, data: DataSettings, device: str) -> None:
    """Raise ValueError or OSError for what does not fit this machine or this data."""
    chosen_device(device)
    for package in recipe.log_to:
        if importlib.util.find_spec(package) is None:
            raise UserError(f"--log-to {package}: is not installed; pip install {package}")
    if recipe.patience and data.train and not data.dev:
        raise UserError("--patience needs something that is measured: give --dev")
    if data.dev and not (qrels := Path(data.dev) / "qrels" / f"{data.dev_split}.tsv").is_file():
        raise FileNotFoundError(f"{qrels}: is not there; --dev takes a BEIR folder, --dev-split the name of its qrels")


def check_processes(recipe: TrainingSettings, processes: int, device: str) -> None:
    """Raise ValueError if a batch cannot be divided among processes, or all of them were to take one GPU."""
    if processes > 1 and device.startswith("cuda:"):
        raise UserError(f"--device {device}: each of the {processes} processes takes a GPU of its own; give auto")
    if recipe.batch_size % processes:
        raise UserError(f"--batch-size {recipe.batch_size} is no multiple of the {processes} processes")


def _dev_measure(data: DataSettings) -> Measure | None:
    if data.dev is None:
        return None
    size = {"num_queries": data.dev_queries, "num_documents": data.dev_documents}
    return ndcg(read_dev_split(Path(data.dev), data.dev_split, **size), remove_query=data.dev_remove_query)


def _train(
    objective: Objective, loaded: Loaded, measure: Measure | None, recipe: TrainingSettings, folder: Path
) -> dict:
    """Train, from the last checkpoint on, leave the best weights in the model, and return the figures.

    The figures are in ``trained.json`` from then on, so that a job that was stopped while it saved trains no further.
    """
    file = folder / "trained.json"
    if not file.is_file():
        batch = recipe.batch_size * recipe.accumulation
        steps = math.ceil(len(loaded.dataset) * recipe.epochs / batch)
        steps = min(steps, recipe.max_steps or steps)
        checkpoint = last_whole_checkpoint(folder)
        state = stopped_early(checkpoint, recipe.patience) if checkpoint and recipe.patience else None
        if state is None:
            begins, watched = checkpoint is None, measure is not None
            trainer = ObjectiveTrainer(
                objective,
                measure,
                _arguments(folder, recipe, objective.encoder, steps, begins=begins, watched=watched),
                train_dataset=Shuffled(loaded.dataset, steps * batch, recipe.seed),
                eval_dataset=loaded.dataset,  # the trainer asks for one; what is measured is the measure
                data_collator=loaded.collate,
                callbacks=[EarlyStoppingCallback(recipe.patience)] if recipe.patience else [],
            )
            if checkpoint is not None:
                logger.info("continuing from %s", checkpoint)
            with quiet_transformers():
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
            state = trainer.state
        log = plain_log(state)
        figures = [entry["measure"] for entry in log if "measure" in entry]
        outcome = {
            "steps": state.global_step,
            "before": figures[0] if figures else None,
            "best": state.best_metric,
            "best_step": state.best_global_step or state.global_step,
            "log": log,
        }
        PartialState().wait_for_everyone()
        if PartialState().is_main_process:
            with whole_file(file) as out:
                out.write(json.dumps(outcome, indent=1) + "\n")
        PartialState().wait_for_everyone()
    outcome = read_json(file)
    losses = [entry["loss"] for entry in outcome["log"] if "loss" in entry]
    if losses and not any(losses):
        raise UserError(
            "the loss was 0 at every step, so nothing was learned: give a larger --batch-size, negatives, or a teacher "
            "that is not the encoder itself"
        )
    load_trained(objective, folder / f"checkpoint-{outcome['best_step']}")
    if measure and outcome["best"] <= outcome["before"]:
        told = f"{measure[0]} was {outcome['before']:.4f} before training and at best {outcome['best']:.4f} after it"
        logger.warning("%s: this training does not help; try a lower --learning-rate or other data", told)
    return outcome


def _make_trainable(encoder: Encoder, recipe: TrainingSettings) -> None:
    """Say which parameters are trained: those of LoRA, which are added, or all, in float32."""
    set_seed(recipe.seed)
    model = encoder.model
    if recipe.dropout is False:
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout"):  # what attentions hand to torch's kernels
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)
    if recipe.gradient_checkpointing:
        checkpoint_activations(model)
    if not recipe.lora_rank:
        model.float()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith("pooler."))
    else:
        encoder.model = get_peft_model(
            model,
            LoraConfig(
                r=recipe.lora_rank,
                lora_alpha=recipe.lora_alpha,
                lora_dropout=recipe.lora_dropout,
                target_modules=lora_targets(model),
            ),
        )
    encoder.dtype = model.dtype


@torch.no_grad()
def _make_plain(encoder: Encoder, dtype: torch.dtype) -> None:
    """Leave an encoder with a model of the dtype it had; LoRA is merged in float32, one matrix at a time."""
    if isinstance(encoder.model, PeftModel):
        for module in encoder.model.modules():
            if isinstance(module, LoraLayer):
                matrix = module.get_base_layer()
                matrix.float()
                module.merge()
                matrix.to(dtype)
        encoder.model = encoder.model.unload()
    encoder.model.to(dtype)
    encoder.dtype = dtype
    keep_activations(encoder.model)
    own = own_config(encoder.files, encoder.model, encoder.tokenizer)
    encoder.config = replace(encoder.config, max_length=own.max_length)


def _arguments(
    folder: Path, recipe: TrainingSettings, encoder: Encoder, steps: int, *, begins: bool, watched: bool
) -> TrainingArguments:
    """Return the recipe in transformers' words; ``begins`` says that no step was done yet."""
    every = recipe.eval_steps or max(1, steps // 20)
    on_cpu = encoder.device.type == "cpu"
    # Not in the job's folder, which goes when the model is there.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{folder.with_suffix('')}.tensorboard")
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=recipe.batch_size // PartialState().num_processes,
        gradient_accumulation_steps=recipe.accumulation,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=recipe.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(recipe.schedule, recipe.schedule),
        warmup_steps=int(recipe.warmup * steps),
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        bf16=recipe.bf16,
        use_cpu=on_cpu,
        seed=recipe.seed,
        logging_steps=max(1, min(10, every)),
        eval_strategy="steps" if watched else "no",
        eval_on_start=watched and begins,
        eval_steps=every,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=3,  # the best one, the last one, and the one before while that is written
        load_best_model_at_end=watched,
        metric_for_best_model="eval_measure" if watched else None,
        greater_is_better=True,
        restore_callback_states_from_checkpoint=True,  # of the early stop
        remove_unused_columns=False,
        label_names=[],
        # Buffers are constants here, and must not change between the forward passes of a step.
        ddp_broadcast_buffers=False,
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        report_to=list(recipe.log_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
    )


def describe_finetuned(done: Finetuned, output: Path) -> str:
    """Return what ``finetune`` did, in two lines."""
    line = f"{done.num_examples:,} examples, {done.steps:,} steps, {done.seconds:.0f} s"
    if done.measure:
        line += f"; {done.measure} {done.before:.4f} before, {done.best:.4f} at step {done.best_step}, which is kept"
    return f"{line}\n-> {output}"
