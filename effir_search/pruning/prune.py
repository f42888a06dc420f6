"""A model without its least important attentions, MLPs or blocks: ``effir prune``."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from effir_search.encoding.config import checked_max_length
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing
from effir_search.model.arithmetic import facts, format_facts, planned
from effir_search.model.checkpoint import dtype_name, hub_revision, lasting_name
from effir_search.model.layers import PartKind
from effir_search.model.sentence_files import prunable_config
from effir_search.model.surgery import prune
from effir_search.pruning.calibration import Calibration, sample_texts
from effir_search.pruning.drift import drift
from effir_search.pruning.dropping_order import CRITERIA, RankedPart, announce, num_passes
from effir_search.settings import NUM_TEXTS, EncoderOptions

logger = logging.getLogger(__name__)

# What parts of a kind are called, in the order in which kinds are dropped: the largest first.
NAMES: dict[PartKind, str] = {"block": "blocks", "mlp": "MLPs", "attention": "attentions"}


def counted(kind: PartKind, number: int) -> str:
    """Return so many parts of a kind in words: "1 block", "2 MLPs"."""
    return f"{number} {NAMES[kind].removesuffix('s') if number == 1 else NAMES[kind]}"


class PruningResult(NamedTuple):
    """What was done.

    Attributes:
        dropped: For each kind the parts in the order of dropping; the score of one that was named is NaN.
        before: ``arithmetic.facts`` of the model as it was.
        after: Of the model as it is.
        cosine: Between the embeddings of the calibration texts before and after, the mean; None without texts.
    """

    dropped: dict[PartKind, list[RankedPart]]
    before: dict[str, int]
    after: dict[str, int]
    cosine: float | None


def prune_encoder(
    encoder_name: str,
    output: Path,
    *,
    numbers: Mapping[PartKind, int],
    layers: Mapping[PartKind, Sequence[int]],
    criterion: str = "cosine",
    sources: Sequence[str] = (),
    size: int = NUM_TEXTS,
    seed: int = 0,
    analysis: Path | None = None,
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> PruningResult:
    """Drop parts of a model and save what is left as a model folder: ``effir prune``.

    Weights keep their dtype. A model that was pruned before is pruned further; layers have the numbers of the base
    model throughout.

    Args:
        encoder_name: Model folder or hub name.
        output: The new folder.
        numbers: How many parts of each kind to drop, the least important first. Blocks go first, then MLPs, then
            attentions, and the importance of each kind is measured on what the one before has left, drifts against
            the embeddings of that.
        layers: Layers whose parts to drop, 0-based in the base model, for kinds that are not in ``numbers``.
        criterion: A key of ``dropping_order.CRITERIA``.
        sources: Texts to measure importance on, see ``calibration.sample_texts``; needed for ``numbers``.
        size: How many of them.
        seed: Of the sample.
        analysis: Folder of an analysis. If it measured this criterion on this model as it is, and on the same texts,
            its scores are used instead of the same ones measured again.
        options: Of the encoder. ``max_length`` is the length that importance is measured on; the saved model keeps its
            own. It keeps what the options say of pooling, prompts, EOS and normalisation.

    Raises:
        ValueError: Nothing to drop, more than there is, no texts, or a model that cannot be pruned.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    _check_request(numbers, layers, sources)
    prunable_config(encoder_name, stock_architecture=options.stock_architecture)
    calibration = sample_texts(sources, size=size, seed=seed) if sources else None
    encoder = load_prunable(encoder_name, replace(options, max_length=None))
    before = facts(encoder.model)
    measurement = Measurement(encoder, calibration, criterion, options.max_length) if calibration else None
    dropped = _drop_layers(encoder, layers)
    planned(encoder.model.config, **{f"drop_{kind}": number for kind, number in numbers.items()})  # raises if it cannot
    for kind in NAMES:
        if number := numbers.get(kind, 0):
            # Of a model that lacks parts already, the analysis says nothing.
            order = measurement.order(kind, number, analysis=None if dropped else analysis)
            dropped[kind] = order[:number]
            record = {"scores": {str(layer_idx): score for layer_idx, score in sorted(order)}}
            record = {"model_sha256": encoder.weights_sha256, "criterion": criterion} | record
            record |= {"calibration": measurement.record}
            prune(encoder.model, **{kind: [part.layer_idx for part in dropped[kind]]}, record=record)
    cosine = measurement.cosine() if measurement else None
    encoder.save(output)
    return PruningResult(dropped, before, facts(encoder.model), cosine)


def _check_request(
    numbers: Mapping[PartKind, int], layers: Mapping[PartKind, Sequence[int]], sources: Sequence[str]
) -> None:
    if both := sorted(numbers.keys() & layers.keys()):
        raise UserError(f"--drop-{both[0]} and --drop-{both[0]}-layers: give a number or the layers, not both")
    if not any(numbers.values()) and not any(layers.values()):
        raise UserError("nothing to drop: give --drop-mlp N or --drop-mlp-layers 3,5, or the same for other parts")
    if any(numbers.values()) and not sources:
        raise UserError("--texts is needed to find the parts that matter least; --drop-mlp-layers needs none")


def load_prunable(encoder_name: str, options: EncoderOptions) -> Encoder:
    """Return an encoder with an ``EffirModel`` that nothing is dropped from yet; a dtype of None is the weights'.

    Raises:
        ValueError: A model that cannot be pruned, or options that do not fit it.
        OSError: A file cannot be read.
    """
    encoder = Encoder.from_pretrained(encoder_name, options.with_defaults(dtype="saved"))
    revision = hub_revision(encoder.files.transformer_folder)
    return encoder.with_model(prune(encoder.model, base_model=lasting_name(encoder_name), base_revision=revision))


def _drop_layers(encoder: Encoder, layers: Mapping[PartKind, Sequence[int]]) -> dict[PartKind, list[RankedPart]]:
    """Drop the parts of the layers that are named, and return them."""
    if not any(layers.values()):
        return {}
    prune(encoder.model, **layers, record={"model_sha256": encoder.weights_sha256})
    return {kind: [RankedPart(i, np.nan) for i in sorted(set(chosen))] for kind, chosen in layers.items()}


class Measurement:
    """How much the parts of an encoder matter to its embeddings of some texts, as it is at the time.

    Args:
        encoder: As it is before anything is dropped.
        calibration: The texts.
        criterion: A key of ``dropping_order.CRITERIA``.
        max_length: Tokens of a text that are read; None = as many as the encoder reads.

    Attributes:
        record: What is written down of the texts, see ``Calibration.record``.

    Raises:
        ValueError: A length that the model cannot read.
    """

    def __init__(self, encoder: Encoder, calibration: Calibration, criterion: str, max_length: int | None) -> None:
        self.encoder, self.criterion = encoder, criterion
        length = checked_max_length(max_length or encoder.config.max_length, encoder.model, encoder.tokenizer)
        self.config = replace(encoder.config, max_length=length)
        self.record = calibration.record(length)
        reading = encoder.with_config(max_length=length)
        self.tokens = reading.tokenize(calibration.texts, prompt=encoder.config.document_prompt)
        self.reference = encoder.encode_tokens(self.tokens).embeddings

    def order(self, kind: PartKind, number: int, *, analysis: Path | None) -> list[RankedPart]:
        """Return the parts of a kind in the order of dropping, at least as many as are to go.

        They are taken from the folder of an analysis, if it is of the same, or measured.
        """
        if analysis and (known := self._order_of_analysis(analysis / "analysis.json", kind, number)):
            return known
        announce(self.encoder, self.tokens, {self.criterion: self._num_passes(kind, number)})
        limit = number if self.criterion == "greedy" else None
        return CRITERIA[self.criterion](self.encoder, self.tokens, [kind], limit)[kind]

    def _num_passes(self, kind: PartKind, number: int) -> int:
        return num_passes(self.encoder.model, self.criterion, [kind], number)

    def _order_of_analysis(self, file: Path, kind: PartKind, number: int) -> list[RankedPart] | None:
        """Return what would be measured, out of an analysis; None where it is of anything else."""
        analysis = read_json(file)
        expected = {
            "model_sha256": self.encoder.weights_sha256,
            "dtype": dtype_name(self.encoder.dtype),
            "encoder": asdict(self.config),
            "calibration": self.record | {"tokens": analysis.get("calibration", {}).get("tokens")},
        }
        different = [name for name in expected if analysis.get(name) != expected[name]]
        order = [RankedPart(*part) for part in analysis.get("order", {}).get(self.criterion, {}).get(kind, [])]
        if different or len(order) < number:
            lack = f"does not order {counted(kind, number)} by {self.criterion}"
            reason = f"is of another {different[0]}" if different else lack
            logger.info("%s %s, so importance is measured", file, reason)
            return None
        return order[:number] if self.criterion == "greedy" else order

    def cosine(self) -> float:
        """Return the mean cosine of the texts' embeddings now to those before anything was dropped."""
        return 1 - drift(self.encoder, self.tokens, self.reference)


def describe_pruning(result: PruningResult, output: Path) -> str:
    """Return what ``prune_encoder`` did: parts and their scores, sizes before and after."""
    lines = []
    for kind, parts in result.dropped.items():
        names = ", ".join(str(i) if np.isnan(score) else f"{i} ({score:.4f})" for i, score in parts)
        lines.append(f"{NAMES[kind]} dropped: {names}")
    lines += ["", format_facts(result.before, result.after, names=("before", "after")), ""]
    if result.cosine is not None:
        lines.append(f"mean cosine of the embeddings to those before: {result.cosine:.4f}")
    return "\n".join([*lines, f"-> {output}"])
