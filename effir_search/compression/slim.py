"""A model whose MLPs have fewer units, those that a retrieval loss needs least cut out for good: ``effir slim``."""

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from effir_search.encoding.config import own_config
from effir_search.encoding.devices import computes_in_bf16
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.job import job_folder
from effir_search.files.whole import refuse_existing
from effir_search.model.arithmetic import facts, format_facts
from effir_search.model.checkpoint import lasting_name, resolve_model, weights_sha256
from effir_search.model.layers import mlp_widths
from effir_search.model.sentence_files import prunable_config, read_sentence_files
from effir_search.model.surgery import prune
from effir_search.pruning.choose_units import choose_units
from effir_search.pruning.gates import GatesFile
from effir_search.pruning.prune import load_prunable
from effir_search.pruning.unit_scores import UNIT_CRITERIA
from effir_search.settings import DataSettings, EncoderOptions, LossSettings, WidthSettings
from effir_search.training.data import (
    DATA,
    PreparedData,
    ShuffledSequence,
    checkpoint_activations,
    hashes,
    keep_activations,
    load,
    objective_of,
    prepare,
    resolved_losses,
    sampled_texts,
    teacher_beside,
    teacher_reading,
)
from effir_search.training.plain_texts import PlainText, encode_texts

# Criteria that run nothing and so need no texts.
WITHOUT_TEXTS = ("magnitude", "random")
# Criteria that score by what the loss is.
OF_LOSS = ("gates", "taylor")
# In the folder of a job that was stopped.
GATES = "gates.safetensors"
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

    They run through a ``ShuffledSequence`` of the data. Data that do not fill one batch are a batch.
    """

    def __init__(self, loaded: PreparedData, *, size: int, number: int, seed: int) -> None:
        self.collate, self.number, self.size = loaded.collate, number, min(size, len(loaded.dataset))
        self.items = ShuffledSequence(loaded.dataset, self.number * self.size, seed)

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[dict[str, object]]:
        """Yield what the objective takes."""
        for start in range(0, len(self.items), self.size):
            yield self.collate([self.items[row] for row in range(start, start + self.size)])


def slim_encoder(
    encoder_name: str,
    output: Path,
    data: DataSettings | None,
    settings: WidthSettings,
    losses: LossSettings,
    options: EncoderOptions = DEFAULT_OPTIONS,
    *,
    restart: bool = False,
    prepared: Path | None = None,
    teacher_options: EncoderOptions | None = None,
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
        data: What the loss is measured on; its ``dev`` is not used. The criteria in ``WITHOUT_TEXTS`` can do without:
            only the cosine is measured on it then.
        settings: How units are scored, and how many are cut: a share above 0, see ``choose_units.choose_units``.
        losses: What the loss is.
        options: Of the encoder. ``max_length`` is the length that is read for this; the saved model keeps its own. It
            keeps what the options say of pooling, prompts, EOS and normalisation.
        restart: Discard what a stopped job left.
        prepared: The folder of ``data.prepare`` with the data; None = ``OUTPUT.slimming``.
        teacher_options: Of the teacher, if it is a bi-encoder; None = as ``data.teacher_reading``.

    Raises:
        ValueError: Nothing to cut, no texts, bad data, a loss that is not finite or at its minimum, a model that cannot
            be pruned, or data other than those of the job that was stopped.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    encoder = _loaded(encoder_name, data, settings.criterion, options)
    before, widths_before, saved_dtype = facts(encoder.model), _widths(encoder), encoder.dtype
    check_cut(widths_before, settings)
    bf16 = computes_in_bf16(encoder.device) if settings.bf16 is None else settings.bf16
    settings = replace(settings, bf16=bf16)
    if not (bf16 and saved_dtype == torch.bfloat16):
        encoder = encoder.with_model(encoder.model.to(torch.float32))  # no value changes, then or on the way back
    folder = output.with_name(f"{output.name}.slimming")
    if data is None:
        cosine = _cut(encoder, None, settings, losses)
        _save(encoder, saved_dtype, output)
    else:
        if teacher_options is None:
            teacher_options = teacher_reading(data, encoder, options)
        # What is kept for a job after a stop is the data and the gates, which have settings of their own.
        with job_folder(folder, {}, restart=restart, keep=(DATA,)):
            files = hashes(data)
            place = prepared or folder
            scored = losses.distill_over == "candidates"
            teaching = {"files": files, "restart": restart, "teacher_options": teacher_options, "scored": scored}
            prepare(place, data, settings.seed, options.device, **teaching)
            source = TextSource(data, load(place, data, settings.seed), files, teacher_options, folder)
            cosine = _cut(encoder, source, settings, losses)
            _save(encoder, saved_dtype, output)
        shutil.rmtree(folder)
    return SlimmingResult(widths_before, _widths(encoder), before, facts(encoder.model), cosine)


def _loaded(encoder_name: str, data: DataSettings | None, criterion: str, options: EncoderOptions) -> Encoder:
    """Return the encoder, whose units the criterion can tell apart by the data."""
    if data is None and criterion not in WITHOUT_TEXTS:
        raise UserError(
            f"--criterion {criterion} scores units on texts: give --train with examples, or --texts and --teacher"
        )
    prunable_config(encoder_name, stock_architecture=options.stock_architecture)
    encoder = load_prunable(encoder_name, options)
    if criterion == "taylor" and data is not None and _is_its_own_teacher(encoder, data):
        raise UserError(
            "--criterion taylor: the teacher is the encoder itself, so the loss is at its minimum and tells no unit "
            "from another; give labels, another teacher or another criterion"
        )
    return encoder


class TextSource(NamedTuple):
    """What units are scored on.

    Attributes:
        data: Its settings.
        loaded: The prepared data.
        files: Their ``hashes``.
        teacher_options: Of the teacher, if it is a bi-encoder.
        folder: The job's, for what it continues from.
    """

    data: DataSettings
    loaded: PreparedData
    files: dict[str, str]
    teacher_options: EncoderOptions
    folder: Path


def _cut(encoder: Encoder, source: TextSource | None, settings: WidthSettings, losses: LossSettings) -> float | None:
    """Cut the units that matter least out of the model; return ``SlimmingResult.cosine``."""
    sample = sampled_texts(source.loaded, SAMPLE, settings.seed) if source else None
    reference = _embeddings(encoder, sample) if sample else None
    if settings.criterion in WITHOUT_TEXTS:
        scored_by = {"seed": settings.seed} if settings.criterion == "random" else {}
        scores = UNIT_CRITERIA[settings.criterion](encoder.model, **scored_by)
    else:
        scores, scored_by = _scores(encoder, source, settings, losses)
    masks = choose_units(scores, settings.narrow, floor=settings.floor, multiple=settings.multiple)
    record = {"model_sha256": encoder.weights_sha256, "criterion": settings.criterion, "settings": scored_by}
    record |= {"narrow": settings.narrow, "floor": settings.floor, "multiple": settings.multiple}
    record |= {"widths_before": {str(layer_idx): width for layer_idx, width in _widths(encoder).items()}}
    prune(encoder.model, units=masks, record=record | ({"data": _data_record(source.data)} if source else {}))
    if reference is None:
        return None
    return float(F.cosine_similarity(reference, _embeddings(encoder, sample), dim=-1).mean())


def _scores(
    encoder: Encoder, source: TextSource, settings: WidthSettings, losses: LossSettings
) -> tuple[dict[int, Tensor], dict[str, object]]:
    """Return the scores of all units by layer, and the settings that they depend on."""
    teacher = teacher_beside(source.data, losses, encoder, source.teacher_options)
    losses = resolved_losses(losses, source.data, encoder, teacher)
    objective = objective_of(encoder, losses, teacher, bf16=bool(settings.bf16), alone=True)
    if settings.criterion in OF_LOSS:
        objective.check(source.loaded.dataset, settings.batch_size)

    def loss(batch: Mapping[str, object]) -> Tensor:
        with torch.autocast(encoder.device.type, dtype=torch.bfloat16, enabled=bool(settings.bf16)):
            return objective(**batch)["loss"]

    one_pass = max(1, len(source.loaded.dataset) // settings.batch_size)
    learns = settings.criterion == "gates"
    number = settings.steps if learns else min(settings.steps, one_pass)
    batches = Batches(source.loaded, size=settings.batch_size, number=number, seed=settings.seed)
    adam = {"learning_rate": settings.learning_rate, "penalty": settings.penalty} if learns else {}
    scored_by = adam | {"steps": number, "batch_size": settings.batch_size, "bf16": settings.bf16}
    scored_by |= {"seed": settings.seed, "losses": asdict(losses), "max_length": encoder.config.max_length}
    own_options = dict(adam)
    if learns:
        gates_settings = scored_by | {"model_sha256": encoder.weights_sha256, "files": source.files}
        gates_file = GatesFile(source.folder / GATES, gates_settings | {"encoder": asdict(encoder.config)})
        own_options |= {"steps": number, "checkpoint": gates_file}
    with _checkpointing(encoder, settings.gradient_checkpointing):
        scores = UNIT_CRITERIA[settings.criterion](encoder.model, batches, loss, **own_options)
    _check_scores(scores)
    return scores, scored_by


@contextmanager
def _checkpointing(encoder: Encoder, asked: bool) -> Iterator[None]:
    """Inside the block, save memory if it is asked for; an error of too little of it says what to do."""
    if asked:
        checkpoint_activations(encoder.model)
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise UserError(
            "out of GPU memory while units are scored; give --grad-cache and a lower --batch-tokens, and for large "
            "models --gradient-checkpointing ([slim] of a recipe)"
        ) from error
    finally:
        if asked:
            keep_activations(encoder.model.eval())


def _check_scores(scores: Mapping[int, Tensor]) -> None:
    every = torch.cat(list(scores.values()))
    if len(every) > 1 and every.min() == every.max():
        raise UserError(
            f"every unit has the same score, {every[0]:g}: the loss tells none from another; give negatives, more "
            "texts a batch or another teacher"
        )


def _save(encoder: Encoder, dtype: torch.dtype, output: Path) -> None:
    """Save a model in a dtype, with its own length of a text."""
    own = own_config(encoder.files, encoder.model, encoder.tokenizer)
    encoder.with_model(encoder.model.to(dtype)).with_config(max_length=own.max_length).save(output)


def describe_slimming(result: SlimmingResult, output: Path) -> str:
    """Return what ``slim_encoder`` did: widths and sizes before and after."""
    rows = [("layer", "units", "left", "")]
    for layer_idx, width in result.widths_before.items():
        width_after = result.widths_after[layer_idx]
        rows.append((str(layer_idx), f"{width:,}", f"{width_after:,}", f"{width_after / width:.1%}"))
    columns = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.rjust, row, columns)).rstrip() for row in rows]
    lines += ["", format_facts(result.before, result.after, names=("before", "after")), ""]
    if result.cosine is not None:
        lines.append(f"mean cosine of the embeddings to those before: {result.cosine:.4f}")
    return "\n".join([*lines, f"-> {output}"])


def check_cut(widths: Mapping[int, int], settings: WidthSettings) -> None:
    """Raise before any scoring what would be wrong after it.

    Args:
        widths: Units by layer.
        settings: How many of them are cut.

    Raises:
        ValueError: Nothing would be cut, or the floors leave less to cut.
    """
    scores = {layer_idx: torch.zeros(width) for layer_idx, width in widths.items()}
    choose_units(scores, settings.narrow, floor=settings.floor, multiple=settings.multiple)
    total = sum(widths.values())
    if round(settings.narrow * total) == 0:
        raise UserError(
            f"--narrow {settings.narrow:g} of {total} units is none, so nothing would be cut; 0.3 is the paper's"
        )


def _is_its_own_teacher(encoder: Encoder, data: DataSettings) -> bool:
    if data.train:
        return False
    teacher = read_sentence_files(resolve_model(data.teacher))
    return weights_sha256(teacher.folder, teacher.weight_folders) == encoder.weights_sha256


def _embeddings(encoder: Encoder, sample: list[PlainText]) -> Tensor:
    """Return ``(texts, dimension)`` float64 on the CPU."""
    texts, queries = zip(*sample, strict=True)
    return torch.from_numpy(encode_texts(encoder, texts, queries)).double()


def _widths(encoder: Encoder) -> dict[int, int]:
    return {layer_idx: width for layer_idx, width in enumerate(mlp_widths(encoder.model)) if width}


def _data_record(data: DataSettings) -> dict[str, object]:
    """Return which data it was, in JSON types; of files and folders their own names, without where they lay."""
    single = {name: getattr(data, name) for name in ("train", "corpus", "topics", "teacher", "reranker")}
    record = {name: lasting_name(value) for name, value in single.items() if value}
    record |= {
        name: list(map(lasting_name, getattr(data, name))) for name in ("texts", "queries") if getattr(data, name)
    }
    if data.train:
        return record | {"split": data.split, "negatives": data.negatives}
    return record | {"num_texts": data.num_texts}
