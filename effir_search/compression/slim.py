"""A model whose MLPs have fewer units, those that a retrieval loss needs least cut out for good: ``effir slim``."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effir_search.encoding.config import own_config
from effir_search.encoding.devices import computes_in_bf16
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder
from effir_search.files.whole import refuse_existing
from effir_search.model.arithmetic import facts, format_facts
from effir_search.model.checkpoint import hub_revision, lasting_name, resolve_model, weights_sha256
from effir_search.model.layers import mlp_widths
from effir_search.model.sentence_files import prunable_config, read_sentence_files
from effir_search.model.surgery import prune
from effir_search.pruning.gates import GatesFile
from effir_search.pruning.units import UNIT_CRITERIA, choose_units
from effir_search.settings import DataSettings, LossSettings, ScoringSettings
from effir_search.training.data import (
    DATA,
    Loaded,
    Shuffled,
    checkpoint_activations,
    hashes,
    imitated,
    keep_activations,
    load,
    objective_of,
    prepare,
    resolved,
    sampled_texts,
    teacher_reading,
)
from effir_search.training.unlabelled import PlainText, encode_texts

# Criteria that run nothing and so need no texts.
WITHOUT_TEXTS = ("magnitude", "random")
# Criteria that score by what the loss is.
OF_LOSS = ("gates", "taylor")
# In the folder of a job that was stopped.
GATES_FILE = "gates.safetensors"
# Texts, or examples, whose embeddings before and after are compared.
SAMPLE = 256


class SlimmingResult(NamedTuple):
    """What was done.

    Attributes:
        widths_before: Units by layer, those without MLP left out; layers have the numbers of the base model.
        widths_after: The same of the model as it is.
        before: ``arithmetic.facts`` of the model as it was.
        after: Of the model as it is.
        cosine: Between the embeddings of a sample of the texts before and after, the mean; None without texts.
    """

    widths_before: dict[int, int]
    widths_after: dict[int, int]
    before: dict[str, int]
    after: dict[str, int]
    cosine: float | None


class Batches:
    """Batches of prepared data, read when they are due; the same for the same seed, each time they are gone through.

    They run through ``Shuffled`` data. Data that do not fill one batch are a batch.
    """

    def __init__(self, loaded: Loaded, *, size: int, number: int, seed: int) -> None:
        self.collate, self.number, self.size = loaded.collate, number, min(size, len(loaded.dataset))
        self.items = Shuffled(loaded.dataset, self.number * self.size, seed)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, object]]:
        """Yield what the objective takes."""
        for start in range(0, len(self.items), self.size):
            yield self.collate([self.items[row] for row in range(start, start + self.size)])


def slim_encoder(
    encoder_name: str,
    output: Path,
    narrow: float,
    data: DataSettings | None,
    *,
    scoring: ScoringSettings,
    losses: LossSettings,
    floor: float = 0.05,
    multiple: int = 1,
    max_length: int | None = None,
    device: str = "auto",
    batch_tokens: int | None = None,
    restart: bool = False,
    prepared: Path | None = None,
    teacher_options: Mapping[str, object] | None = None,
    stock_architecture: bool = False,
    **text_options: object,
) -> SlimmingResult:
    """Cut the units of a model's MLPs that matter least and save what is left as a model folder: ``effir slim``.

    A model that was pruned before is pruned further. No weight is changed, and weights keep their dtype; to fine-tune
    the model is the next step.

    Prepared data, with the teacher's scores of examples, are in ``OUTPUT.slimming`` until the model is written, and the
    state of gates that are learned. After a stop the same call goes on from there; one with another criterion or share
    uses the data again.

    Args:
        encoder_name: Model folder or hub name, pruned or not.
        output: The new folder.
        narrow: Share of all units left to cut, 0 < narrow < 1; see ``units.choose_units``.
        data: What the loss is measured on; its ``dev`` is not used. The criteria in ``WITHOUT_TEXTS`` can do without:
            only the cosine is measured on it then.
        scoring: How units are scored.
        losses: What the loss is.
        floor: Share of each layer's own units that stays in any case.
        multiple: Of which widths are to be multiples.
        max_length: Tokens of a text that are read for this; the saved model keeps its own.
        device: As ``Encoder.from_pretrained`` takes it.
        batch_tokens: Padded tokens of a forward pass; None = by device.
        restart: Discard what a stopped job left.
        prepared: The folder of ``data.prepare`` with the data; None = ``OUTPUT.slimming``.
        teacher_options: As text_options, of the teacher, if it is a bi-encoder; None = as ``data.teacher_reading``.
        stock_architecture: As ``Encoder.from_pretrained`` takes it, of all models.
        text_options: Pooling, prompts, normalisation as ``Encoder.from_pretrained`` takes them, which the saved model
            keeps.

    Raises:
        ValueError: Nothing to cut, no texts, bad data, a loss that is not finite or at its minimum, a model that cannot
            be pruned, or data other than those of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    criterion, seed = scoring.criterion, scoring.seed
    if data is None and criterion not in WITHOUT_TEXTS:
        raise UserError(
            f"--criterion {criterion} scores units on texts: give --train with examples, or --texts and --teacher"
        )
    stock = {"stock_architecture": True} if stock_architecture else {}
    prunable_config(encoder_name, **stock)
    machine = {"device": device, "batch_tokens": batch_tokens} | stock
    given = {name: value for name, value in text_options.items() if value is not None}
    encoder = Encoder.from_pretrained(encoder_name, dtype="saved", max_length=max_length, **machine, **given)
    if criterion == "taylor" and data is not None and _is_its_own_teacher(encoder, data):
        raise UserError(
            "--criterion taylor: the teacher is the encoder itself, so the loss is at its minimum and tells no unit "
            "from another; give labels, another teacher or another criterion"
        )
    base = {"base_model": lasting_name(encoder_name), "base_revision": hub_revision(encoder.files.transformer_folder)}
    encoder.model = prune(encoder.model, **base)  # nothing is cut yet
    before, widths = facts(encoder.model), _widths(encoder)
    check_cut(widths, narrow, floor=floor, multiple=multiple)

    if teacher_options is None and data is not None:
        teacher_options = teacher_reading(data, encoder)
    bf16 = computes_in_bf16(encoder.device) if scoring.bf16 is None else scoring.bf16
    scoring, saved = replace(scoring, bf16=bf16), encoder.dtype
    if not (bf16 and saved == torch.bfloat16):
        _convert(encoder, torch.float32)  # no value changes, then or on the way back
    folder = output.with_name(f"{output.name}.slimming")
    # What is kept for a job after a stop is the data and the gates, which have settings of their own.
    with job_folder(folder, {}, restart=restart, keep=(DATA,)) if data is not None else nullcontext():
        files = hashes(data) if data is not None else {}
        loaded = sample = reference = cosine = None
        if data is not None:
            reading = {"teacher_options": {**teacher_options, **stock}}
            prepare(prepared or folder, data, seed, device, files=files, restart=restart, **reading)
            loaded = load(prepared or folder, data, seed)
            sample = sampled_texts(loaded, SAMPLE, seed)
            reference = _embeddings(encoder, sample)
        teacher = None
        if data is not None and criterion not in WITHOUT_TEXTS:
            teacher = imitated(data, encoder, device, **teacher_options, **stock)
            losses = resolved(losses, data, encoder, teacher)
        scores, settings = _scored(encoder, loaded, teacher, scoring, losses, folder / GATES_FILE, files)
        masks = choose_units(scores, narrow, floor=floor, multiple=multiple)
        record = {"model_sha256": encoder.weights_sha256, "criterion": criterion, "settings": settings}
        record |= {"narrow": narrow, "floor": floor, "multiple": multiple, "widths_before": _keyed(widths)}
        prune(encoder.model, units=masks, record=record | ({"data": _named(data)} if data is not None else {}))
        if reference is not None:
            cosine = float(F.cosine_similarity(reference, _embeddings(encoder, sample), dim=-1).mean())
        _convert(encoder, saved)
        own = own_config(encoder.files, encoder.model, encoder.tokenizer)
        encoder.config = replace(encoder.config, max_length=own.max_length)
        encoder.save(output)
    if data is not None:
        shutil.rmtree(folder)
    return SlimmingResult(widths, _widths(encoder), before, facts(encoder.model), cosine)


def _scored(
    encoder: Encoder,
    loaded: Loaded | None,
    teacher: Encoder | None,
    scoring: ScoringSettings,
    losses: LossSettings,
    gates_file: Path,
    files: dict[str, str],
) -> tuple[dict[int, Tensor], dict[str, object]]:
    """Return the scores of all units by layer, and the settings that they depend on; losses are resolved.

    ``gates_file`` has the gates of a job that was stopped, if they were begun; ``files`` are the hashes of the data.
    """
    criterion = UNIT_CRITERIA[scoring.criterion]
    if scoring.criterion in WITHOUT_TEXTS:
        settings = {"seed": scoring.seed} if scoring.criterion == "random" else {}
        return criterion(encoder.model, **settings), settings
    learns = scoring.criterion == "gates"
    one_pass = max(1, len(loaded.dataset) // scoring.batch_size)
    number = scoring.steps if learns else min(scoring.steps, one_pass)
    own = {name: getattr(scoring, name) for name in ("learning_rate", "penalty")} if learns else {}
    objective = objective_of(encoder, losses, teacher, bf16=bool(scoring.bf16), alone=True)
    if scoring.criterion in OF_LOSS:
        objective.check(loaded.dataset, scoring.batch_size)

    def loss(batch: Mapping[str, object]) -> Tensor:
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bool(scoring.bf16)):
            return objective(**batch)["loss"]

    told = {"steps": number, "batch_size": scoring.batch_size, "bf16": scoring.bf16, "seed": scoring.seed}
    settings = own | told | {"losses": asdict(losses), "max_length": encoder.config.max_length}
    options = {}
    if learns:
        known = settings | {"model_sha256": encoder.weights_sha256, "files": files, "encoder": asdict(encoder.config)}
        options = {"steps": number, "checkpoint": GatesFile(gates_file, known)}
    batches = Batches(loaded, size=scoring.batch_size, number=number, seed=scoring.seed)
    if scoring.gradient_checkpointing:
        checkpoint_activations(encoder.model)
    try:
        scores = criterion(encoder.model, batches, loss, **own, **options)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory while units are scored; give --grad-cache and a lower --batch-tokens, and for large "
            "models --gradient-checkpointing ([slim] of a recipe)"
        ) from error
    finally:
        if scoring.gradient_checkpointing:
            keep_activations(encoder.model.eval())
    every = torch.cat(list(scores.values()))
    if len(every) > 1 and every.min() == every.max():
        raise UserError(
            f"every unit has the same score, {every[0]:g}: the loss tells none from another; give negatives, more "
            "texts a batch or another teacher"
        )
    return scores, settings


def describe_slimmed(slimmed: SlimmingResult, output: Path) -> str:
    """Return what ``slim_encoder`` did: widths and sizes before and after."""
    rows = [("layer", "units", "left", "")]
    for layer_idx, width in slimmed.widths_before.items():
        left = slimmed.widths_after[layer_idx]
        rows.append((str(layer_idx), f"{width:,}", f"{left:,}", f"{left / width:.1%}"))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, columns)).rstrip() for row in rows]
    lines += ["", format_facts(slimmed.before, slimmed.after, names=("before", "after")), ""]
    if slimmed.cosine is not None:
        lines.append(f"mean cosine of the embeddings to those before: {slimmed.cosine:.4f}")
    return "\n".join([*lines, f"-> {output}"])


def check_cut(widths: Mapping[int, int], narrow: float, *, floor: float, multiple: int) -> None:
    """Raise before any scoring what would be wrong after it.

    Args:
        widths: Units by layer.
        narrow: See ``units.choose_units``.
        floor: Likewise.
        multiple: Likewise.

    Raises:
        ValueError: Nothing would be cut, or the floors leave less to cut.
    """
    choose_units(
        {layer_idx: torch.zeros(width) for layer_idx, width in widths.items()}, narrow, floor=floor, multiple=multiple
    )
    total = sum(widths.values())
    if round(narrow * total) == 0:
        raise UserError(f"--narrow {narrow:g} of {total} units is none, so nothing would be cut; 0.3 is the paper's")


def _is_its_own_teacher(encoder: Encoder, data: DataSettings) -> bool:
    if data.train:
        return False
    teacher = read_sentence_files(resolve_model(data.teacher))
    return weights_sha256(teacher.folder, teacher.weight_folders) == encoder.weights_sha256


def _convert(encoder: Encoder, dtype: torch.dtype) -> None:
    encoder.model.to(dtype)
    encoder.dtype = dtype


def _embeddings(encoder: Encoder, sample: list[PlainText]) -> Tensor:
    """Return ``(texts, dimension)`` float64 on the CPU."""
    texts, queries = zip(*sample, strict=True)
    return torch.from_numpy(encode_texts(encoder, texts, queries)).double()


def _widths(encoder: Encoder) -> dict[int, int]:
    return {layer_idx: width for layer_idx, width in enumerate(mlp_widths(encoder.model)) if width}


def _keyed(widths: Mapping[int, int]) -> dict[str, int]:
    return {str(layer_idx): width for layer_idx, width in widths.items()}


def _named(data: DataSettings) -> dict[str, object]:
    """Return which data it was, in JSON types; of files and folders their own names, without where they lay."""
    one = {name: getattr(data, name) for name in ("train", "corpus", "topics", "teacher", "reranker")}
    named = {name: lasting_name(value) for name, value in one.items() if value}
    named |= {
        name: list(map(lasting_name, getattr(data, name))) for name in ("texts", "queries") if getattr(data, name)
    }
    if data.train:
        return named | {"split": data.split, "negatives": data.negatives}
    return named | {"num_texts": data.num_texts}
