"""transformers' training loop around an objective: our checkpoints, our measure, one clear error."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import TrainerControl, TrainerState
from transformers.training_args import ParallelMode

from effir_search.encoding.encoder import NotFiniteError
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.files.whole import whole_file
from effir_search.settings import TrainingSettings
from effir_search.training.dev import Measure
from effir_search.training.objective import Objective

logger = logging.getLogger(__name__)

WEIGHTS_FILE = "model.safetensors"
STATE_FILE = "trainer_state.json"
LOG_FILE = "log.jsonl"


class ObjectiveTrainer(Trainer):
    """Trains an ``Objective``: batches are what its collator makes, and go to the objective as they are.

    A checkpoint holds the parameters that are trained, those of LoRA or all; the rest is in the base model.
    """

    def __init__(
        self, objective: Objective, measure: Measure | None, args: TrainingArguments, **kwargs: object
    ) -> None:
        args._n_gpu = min(args.n_gpu, 1)  # several GPUs are for several processes, not for threads of one
        device = objective.encoder.device
        if device.type == "cuda" and args.parallel_mode is not ParallelMode.DISTRIBUTED:
            # transformers takes the first GPU for a process that is alone, accelerate the current one.
            args.__dict__["_setup_devices"] = device
            torch.cuda.set_device(device)
        super().__init__(objective, args, **kwargs)
        self.objective, self.measure = objective, measure
        self.remove_callback(PrinterCallback)
        self.remove_callback(ProgressCallback)
        if not args.disable_tqdm:
            self.add_callback(_Progress())
        self.add_callback(_Log(Path(args.output_dir) / LOG_FILE))

    def training_step(self, *args: object, **kwargs: object) -> Tensor:
        """Return the loss of a step, whose gradients are then there.

        Raises:
            ValueError: Not enough GPU memory.
        """
        try:
            return super().training_step(*args, **kwargs)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"step {self.state.global_step + 1}: out of GPU memory; give --grad-cache and a lower --batch-tokens, "
                "and for large models --gradient-checkpointing ([loss] and [finetune] of a recipe), with --restart"
            ) from error

    def compute_loss(self, model: nn.Module, inputs: dict, *args: object, **kwargs: object) -> Tensor:
        """Return the objective's loss.

        Raises:
            ValueError: It is not finite.
        """
        terms = model(**inputs)
        if not torch.isfinite(terms["loss"]):
            values = ", ".join(f"{name} {value.item():.4g}" for name, value in terms.items())
            raise UserError(f"the loss of step {self.state.global_step + 1} is not finite ({values}); {self._advice()}")
        return terms["loss"]

    def evaluate(self, *args: object, **kwargs: object) -> dict[str, float]:
        """Return the measure of the encoder as it is, logged; the main process measures for all.

        Raises:
            ValueError: The weights are not finite any more.
        """
        self._check_weights()
        name, measure = self.measure
        figures: list[float | None] = [None]  # of the main process, for all
        if self.is_world_process_zero():
            self.model.eval()
            try:
                with self.accelerator.autocast():
                    figures = [measure(self.objective.encoder)]
            except NotFiniteError as error:
                step = self.state.global_step
                raise UserError(f"step {step}: embeddings are not finite any more; {self._advice()}") from error
        metrics = {"eval_measure": broadcast_object_list(figures)[0]}
        self.log(metrics)
        logger.info("step %d: %s %.4f", self.state.global_step, name, metrics["eval_measure"])
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _advice(self) -> str:
        return (
            "lower --learning-rate or give --no-bf16 ([finetune] of a recipe), with --restart; the checkpoints in "
            f"{self.args.output_dir} are from before"
        )

    def _check_weights(self) -> None:
        for name, parameter in trained_parameters(self.objective):
            if not torch.isfinite(parameter).all():
                step = self.state.global_step
                raise UserError(f"step {step}: the weights are not finite any more ({name}); {self._advice()}")

    def _prepare_inputs(self, inputs: dict) -> dict:
        return inputs  # texts; the objective moves what it makes of them

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        self._check_weights()
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: parameter.detach().contiguous() for name, parameter in trained_parameters(self.objective)}
        save_file(tensors, folder / WEIGHTS_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        load_trained(self.objective, Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        """Leave it to the caller, who takes the best weights also of a job that was stopped after its last step."""


def training_arguments(
    folder: Path, settings: TrainingSettings, device: torch.device, steps: int, *, begins: bool, watched: bool
) -> TrainingArguments:
    """Return the settings in transformers' words.

    Args:
        folder: The job's, for checkpoints.
        settings: See ``finetune.resolved_training``.
        device: Where the model is.
        steps: Of the optimiser.
        begins: Whether no step was done yet.
        watched: Whether something is measured.
    """
    every = settings.eval_steps or max(1, steps // 20)
    on_cpu = device.type == "cpu"
    # Not in the job's folder, which goes when the model is there.
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", f"{folder.with_suffix('')}.tensorboard")
    return TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=settings.batch_size // PartialState().num_processes,
        gradient_accumulation_steps=settings.accumulation,
        max_steps=steps,
        train_sampling_strategy="sequential",
        learning_rate=settings.learning_rate,
        lr_scheduler_type={"constant": "constant_with_warmup"}.get(settings.schedule, settings.schedule),
        warmup_steps=int(settings.warmup * steps),
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        bf16=settings.bf16,
        use_cpu=on_cpu,
        seed=settings.seed,
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
        report_to=list(settings.log_to) or "none",
        disable_tqdm=not sys.stderr.isatty(),
    )


def trained_parameters(objective: Objective) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that are trained, with their names."""
    return ((name, parameter) for name, parameter in objective.named_parameters() if parameter.requires_grad)


@torch.no_grad()
def load_trained(objective: Objective, checkpoint: Path) -> None:
    """Take the parameters that are trained from a checkpoint.

    Raises:
        ValueError: It is damaged, or of another model.
    """
    tensors = read_weights(checkpoint)
    parameters = dict(trained_parameters(objective))
    if tensors.keys() != parameters.keys():
        unmatched = sorted(tensors.keys() ^ parameters.keys())
        raise UserError(f"{checkpoint}: is of another model; {unmatched[0]} is only in one of the two")
    for name, parameter in parameters.items():
        parameter.copy_(tensors[name])


def read_weights(checkpoint: Path) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint.

    Raises:
        ValueError: They are damaged or not there.
    """
    try:
        return load_file(checkpoint / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{checkpoint}: its weights cannot be read ({error})") from error


def last_whole_checkpoint(folder: Path) -> Path | None:
    """Return the checkpoint to continue from: the latest whose state parses and whose weights load; None without any.

    The state is written last, so that a checkpoint with it is whole; transformers takes the highest number as it is.
    """
    numbered = sorted(
        (path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: -int(path.name.removeprefix("checkpoint-")),
    )
    for checkpoint in numbered:
        try:
            read_json(checkpoint / STATE_FILE)
            read_weights(checkpoint)
        except (OSError, ValueError) as error:
            logger.warning("%s is not whole, as of a job stopped while it wrote it, and is passed over", checkpoint)
            logger.debug("%s", error)
            continue
        return checkpoint
    return None


def stopped_early(checkpoint: Path, patience: int) -> TrainerState | None:
    """Return the state of a checkpoint at which ``EarlyStoppingCallback`` ended the training; None of any other.

    transformers forgets that it was to stop when it continues, and would train on to the next measurement.
    """
    state = TrainerState.load_from_json(str(checkpoint / STATE_FILE))
    attributes = state.stateful_callbacks.get("EarlyStoppingCallback", {}).get("attributes", {})
    return state if attributes.get("early_stopping_patience_counter", 0) >= patience else None


def plain_log(state: TrainerState) -> list[dict]:
    """Return what was logged; what transformers calls an epoch is the share of the whole run here."""
    names = {"epoch": "share_of_run", "eval_measure": "measure"}
    return [
        {names.get(name, name): value for name, value in entry.items() if name != "total_flos"}
        for entry in state.log_history
    ]


class _Progress(ProgressCallback):
    """The progress bar with the last figures beside it, instead of a line for each of them."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict | None = None,
        **kwargs: object,
    ) -> None:
        if self.training_bar is not None and "loss" in (logs or {}):
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")


class _Log(TrainerCallback):
    """Keeps a JSONL file with all that was logged, also before a stop."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object) -> None:
        if state.is_world_process_zero:
            with whole_file(self.path) as file:
                file.writelines(json.dumps(entry) + "\n" for entry in plain_log(state))
