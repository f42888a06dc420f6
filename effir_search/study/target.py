"""The best model of a size, a speed or a quality: several plans that meet a target, and which learns best.

``effir compress --target`` makes a handful of plans, cuts the model by each, trains all of them briefly and the better
half twice as long, until one is left: successive halving (Jamieson and Talwalkar, arXiv 1502.07943). That one is then
compressed as ever, with the steps that are left, so that all of it learns in as many steps as a single model would.
"""

import json
import logging
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from effir_search.compression.compress import (
    compress,
    config_of,
    encoder_hash,
    job_settings,
    prepare_job,
    stages_of,
)
from effir_search.compression.stages import ANALYSIS, CALIBRATION_FILE, Job, analyze_parts, cut, fine_tune
from effir_search.encoding.devices import chosen_device, computes_in_bf16
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.evaluation.benchmark import Benchmark
from effir_search.files.job import job_folder
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing, whole_file
from effir_search.model.save import TRAINING_FILE
from effir_search.settings import CompressionSettings, EncoderOptions, PartKind
from effir_search.study.plan import Plan
from effir_search.study.speed import SpeedRecords
from effir_search.study.target_plans import Planner, Target, parse_target, words_of
from effir_search.text.corpus import document_text, read_corpus
from effir_search.training.data import DATA, hashes, load
from effir_search.training.dev import ndcg, read_dev_split

logger = logging.getLogger(__name__)

# Share of all training steps that go into finding the plan.
FINDING = 0.25

# Steps of the first brief training below which a candidate has hardly learned anything.
FEW = 5
# Sizes that are tried for a quality, as shares of the parameters outside the embeddings.
SIZES = tuple(share / 100 for share in range(20, 95, 5))

# Texts that speed is measured on.
SPEED_TEXTS = 128


class Candidate(NamedTuple):
    """A plan and what was found of it.

    Attributes:
        plan: What it loses.
        parameters: Those outside the embeddings that are left, as a share.
        speedup: In documents a second over the full model.
        figures: What was measured after each brief training, longer and longer; the last of those it took part in.
    """

    plan: Plan
    parameters: float
    speedup: float
    figures: list[float]


def compress_to_target(
    compression: CompressionSettings,
    output: Path,
    *,
    device: str = "auto",
    batch_tokens: int | None = None,
    restart: bool = False,
) -> tuple[Benchmark | None, str]:
    """Compress a model by the plan that learns best of those that meet its target; a stopped job goes on.

    ``OUTPUT.candidates`` gets what the plan is chosen by; the rest is ``compress``.

    Args:
        compression: The recipe, with a ``target`` and without numbers of parts and units to cut.
        output: The new folder.
        device: As ``Encoder.from_pretrained`` takes it.
        batch_tokens: Padded tokens of a forward pass; None = by device.
        restart: Discard what a stopped job left, but for data that was prepared from the same files.

    Returns:
        What was measured at the end, and the table of candidates, which is in the model card, too.

    Raises:
        ValueError: Bad data, a model that cannot be pruned, a target that no plan meets.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    target = parse_target(compression.target)
    check_target(compression, target)
    if (processes := PartialState(cpu=chosen_device(device).type == "cpu").num_processes) > 1:
        raise UserError(
            f"--target finds a plan in one process, and was started as {processes}: find it without a launcher, "
            f"and start that with the recipe.toml that is then in {output}"
        )
    machine = EncoderOptions(
        device=device, batch_tokens=batch_tokens, stock_architecture=compression.stock_architecture
    )
    plain = replace(compression, target=None, prune=replace(compression.prune, drop_mlp=0), output=None)
    folder = output.with_name(f"{output.name}.candidates")
    files = hashes(plain.data)
    settings = job_settings(plain, files, encoder_sha256=encoder_hash(plain.encoder)) | {"target": list(target)}
    with job_folder(folder, settings, restart=restart, keep=(DATA,)):
        search = _Search(plain, folder, machine, files)
        chosen, table = search.by_quality(target.value) if target.kind == "quality" else search.by_size(target)
        with whole_file(folder / "candidates.md") as file:
            file.write(table + "\n")
        trained = stages_of(search.trained) if search.trained else None
        if trained and trained.is_dir() and not stages_of(output).exists():
            trained.rename(stages_of(output))  # it is trained already, and only measured again
    measured = compress(
        chosen,
        output,
        device=device,
        batch_tokens=batch_tokens,
        restart=restart,
        analysis=folder / ANALYSIS.name,
        section=f"## Candidates for {compression.target}\n\n{table}\n",
    )
    return measured, table


def check_target(compression: CompressionSettings, target: Target) -> None:
    """Raise ValueError for a recipe that says itself what its target is to find, or lacks what that needs."""
    prune, default = compression.prune, type(compression.slim).narrow
    if prune.drop_mlp is not None or prune.drop_attention or prune.drop_block or compression.slim.narrow != default:
        raise UserError(
            f"--target {compression.target} finds what to drop and to narrow; leave out --drop-mlp, --drop-attention, "
            "--drop-block and --narrow"
        )
    if compression.native:
        raise UserError(f"--target {compression.target} tries shapes of every kind; leave out --native")
    if target.kind == "quality" and not compression.data.dev:
        raise UserError(
            f"--target {compression.target} is measured on a dev split: give --dev, a BEIR folder that is no test"
        )
    if compression.finetune.patience:
        raise UserError("--target gives each candidate as many steps as the others: leave out patience")


class _Search:
    """Finds the plan in a job's folder.

    Args:
        recipe: The recipe without a target.
        folder: Of the job.
        machine: Device, batches and architecture of every model.
        files: The ``hashes`` of the recipe's data.
    """

    def __init__(
        self, recipe: CompressionSettings, folder: Path, machine: EncoderOptions, files: dict[str, str]
    ) -> None:
        self.recipe, self.folder, self.machine = recipe, folder, machine
        self.job = Job(recipe, folder, machine)
        prepare_job(self.job, files, restart=True)
        self.steps = _steps(self.job)
        self.trained: Path | None = None
        config = config_of(recipe)
        texts = [document_text(document) for document in read_corpus(folder / CALIBRATION_FILE)][:SPEED_TEXTS]
        records = SpeedRecords(folder / "speeds", recipe.encoder, self.job.options(recipe.encoder), texts)
        dtype = "bf16" if computes_in_bf16(chosen_device(machine.device)) else "fp32"
        self.planner = Planner(
            config,
            bytes_a_parameter=(config.dtype or torch.float32).itemsize,
            speedup=lambda shape: records.of(shape, dtype).speedup,
        )

    def by_size(self, target: Target) -> tuple[CompressionSettings, str]:
        """Return the recipe of the plan that learns best, with the steps that are left, and the table."""
        plans = self.planner.plans(target)
        self._analyze(plans)
        rounds = max(1, math.ceil(math.log2(len(plans))))
        steps = max(1, round(FINDING * self.steps / (len(plans) * rounds)))
        if steps < FEW:
            logger.warning(
                "%d candidates learn for %d of %d steps before half of them go, which tells little; train longer",
                len(plans),
                steps,
                self.steps,
            )
        found = {
            plan: Candidate(plan, self.planner.share_left(plan), self.planner.speedup_of(plan), []) for plan in plans
        }
        left = plans
        spent = 0
        while len(left) > 1:
            for plan in left:
                logger.info("candidate %s: %d steps", words_of(plan), steps)
                found[plan].figures.append(self._figure(plan, steps))
                spent += steps
            left = sorted(left, key=lambda plan: -found[plan].figures[-1])[: math.ceil(len(left) / 2)]
            steps *= 2
        best = left[0]
        recipe = self._recipe(best)
        final = replace(recipe, finetune=replace(recipe.finetune, max_steps=max(1, self.steps - spent)))
        return final, _table(list(found.values()), best, spent, self.steps)

    def by_quality(self, share: float) -> tuple[CompressionSettings, str]:
        """Return the recipe of the smallest size whose best plan keeps a share of the quality, and the tables."""
        full = self._dev(Encoder.from_pretrained(self.recipe.encoder, self.job.options(self.recipe.encoder)))
        tables, kept_by_size = [], {}
        low, high = 0, len(SIZES)  # the first size that keeps enough; all of them may be too small
        best: CompressionSettings | None = None
        while low < high:
            middle = (low + high) // 2
            size = SIZES[middle]
            recipe, table = self.by_size(Target("parameters", size))
            figure = self._trained(recipe, self._size_folder(size))
            kept_by_size[size] = figure / full
            logger.info("%.0f%% of the parameters keep %.1f%% of nDCG@10 on dev", 100 * size, 100 * figure / full)
            tables.append(f"{size:.0%} of the parameters: {figure / full:.1%} kept\n\n{table}")
            if figure >= share * full:
                best, high = recipe, middle
                self.trained = self._size_folder(size)
            else:
                low = middle + 1
        if best is None:
            kept = max(kept_by_size.values())
            raise UserError(
                f"--target quality={share:g}: no size kept more than {kept:.1%}; give more steps or another"
            )
        return best, "\n\n".join(tables)

    def _size_folder(self, size: float) -> Path:
        return self.folder / f"size-{size:g}"

    def _analyze(self, plans: Sequence[Plan]) -> None:
        """Measure the order of dropping on the full model, as far as any plan needs it."""
        folder = self.folder / ANALYSIS.name
        numbers: dict[PartKind, int] = {}
        for plan in plans:
            first = next(iter(plan.drops), None)
            if first:
                numbers[first] = max(getattr(plan, first), numbers.get(first, 0))
        record = folder / "numbers.json"
        if folder.is_dir() and record.is_file() and read_json(record) == numbers:
            return
        shutil.rmtree(folder, ignore_errors=True)
        analyze_parts(self.job, folder, numbers)
        with whole_file(record) as file:
            file.write(json.dumps(numbers) + "\n")

    def _recipe(self, plan: Plan) -> CompressionSettings:
        recipe = self.recipe
        prune = replace(recipe.prune, **plan.numbers)
        slim = replace(recipe.slim, narrow=plan.narrow)
        if not plan.drops and slim.criterion == "taylor" and recipe.data.teacher == recipe.encoder:
            # Nothing is dropped, so the model is at no distance from itself.
            slim = replace(slim, criterion="activation")
        return replace(recipe, prune=prune, slim=slim)

    def _figure(self, plan: Plan, steps: int) -> float:
        """Return how good a plan's model is after so many steps."""
        recipe = self._recipe(plan)
        folder = self.folder / "plans" / plan.name
        folder.mkdir(parents=True, exist_ok=True)
        job = replace(self.job, recipe=recipe)
        model = cut(job, folder)
        output = folder / f"{steps}-steps"
        if not output.is_dir():
            brief = replace(recipe.finetune, max_steps=steps, eval_steps=steps)
            fine_tune(replace(job, recipe=replace(recipe, finetune=brief)), output, model=model)
            for weights in output.glob("*.safetensors"):  # a figure is all that is needed of it
                weights.unlink()
        return read_json(output / TRAINING_FILE)["result"]["best"]

    def _trained(self, recipe: CompressionSettings, folder: Path) -> float:
        """Return nDCG@10 on dev of a recipe's model, trained in full."""
        if not folder.is_dir():
            compress(
                replace(recipe, evaluate=type(recipe.evaluate)()),
                folder,
                device=self.machine.device,
                batch_tokens=self.machine.batch_tokens,
                analysis=self.folder / ANALYSIS.name,
            )
        return read_json(folder / TRAINING_FILE)["result"]["best"]

    def _dev(self, encoder: Encoder) -> float:
        data = self.recipe.data
        split = read_dev_split(
            Path(data.dev), data.dev_split, num_queries=data.dev_queries, num_documents=data.dev_documents
        )
        return ndcg(split, remove_query=data.dev_remove_query)[1](encoder)


def _steps(job: Job) -> int:
    """Return the steps of the recipe's training."""
    settings = job.recipe.finetune
    examples = len(load(job.folder, job.recipe.data, job.recipe.seed).dataset)
    steps = math.ceil(examples * settings.epochs / (settings.batch_size * settings.accumulation))
    return min(steps, settings.max_steps or steps)


def _table(candidates: Sequence[Candidate], best: Plan, spent: int, steps: int) -> str:
    """Return the candidates as a Markdown table, the best last figure first."""
    rounds = max(len(candidate.figures) for candidate in candidates)
    header = ["dropped", "parameters", "documents/s", *(f"round {number}" for number in range(1, rounds + 1))]
    ordered = sorted(candidates, key=lambda one: (one.plan == best, len(one.figures), one.figures[-1:]), reverse=True)
    rows = [
        [
            f"{words_of(candidate.plan)}{' (chosen)' if candidate.plan == best else ''}",
            f"{candidate.parameters:.1%}",
            f"{candidate.speedup:.2f}x",
            *(f"{figure:.4f}" for figure in candidate.figures),
            *[""] * (rounds - len(candidate.figures)),
        ]
        for candidate in ordered
    ]
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"{table}\n\nTraining steps: {spent:,} to find the plan, {steps - spent:,} for its model."
