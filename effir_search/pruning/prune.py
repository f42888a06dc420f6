"""A model without its least important attentions, MLPs or blocks: ``effir prune``."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from effir_search.encoding.batching import Tokens
from effir_search.encoding.config import checked_max_length
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.files.reading import read_json
from effir_search.files.whole import refuse_existing
from effir_search.model.arithmetic import facts, format_facts, planned
from effir_search.model.checkpoint import dtype_name, hub_revision, lasting_name
from effir_search.model.layers import PartKind
from effir_search.model.sentence_files import prunable_config
from effir_search.model.surgery import prune
from effir_search.pruning.calibration import NUM_TEXTS, sample_texts
from effir_search.pruning.importance import CRITERIA, RankedPart, announce, drift, num_passes

logger = logging.getLogger(__name__)

# What parts of a kind are called, in the order in which kinds are dropped: the largest first.
NAMES: dict[PartKind, str] = {"block": "blocks", "mlp": "MLPs", "attention": "attentions"}


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
    calibration_length: int | None = None,
    analysis: Path | None = None,
    **options: object,
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
        criterion: A key of ``importance.CRITERIA``.
        sources: Texts to measure importance on, see ``calibration.read_texts``; needed for ``numbers``.
        size: How many of them.
        seed: Of the sample.
        calibration_length: Tokens of a text that importance is measured on; None = as many as the model reads. The
            saved model keeps its own.
        analysis: Folder of an analysis. If it measured this criterion on this model as it is, and on the same texts,
            its scores are used instead of the same ones measured again.
        options: As ``Encoder.from_pretrained`` takes them; None = its default. The saved model keeps what they say of
            pooling, prompts, EOS and normalisation.

    Raises:
        ValueError: Nothing to drop, more than there is, no texts, or a model that cannot be pruned.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    if both := sorted(numbers.keys() & layers.keys()):
        raise UserError(f"--drop-{both[0]} and --drop-{both[0]}-layers: give a number or the layers, not both")
    if not any(numbers.values()) and not any(layers.values()):
        raise UserError("nothing to drop: give --drop-mlp N or --drop-mlp-layers 3,5, or the same for other parts")
    if any(numbers.values()) and not sources:
        raise UserError("--texts is needed to find the parts that matter least; --drop-mlp-layers needs none")
    prunable_config(encoder_name, stock_architecture=bool(options.get("stock_architecture")))
    calibration = sample_texts(sources, size=size, seed=seed) if sources else None
    given = {name: value for name, value in options.items() if value is not None}
    encoder = Encoder.from_pretrained(encoder_name, dtype="saved", **given)
    base = {"base_model": lasting_name(encoder_name), "base_revision": hub_revision(encoder.files.transformer_folder)}
    encoder.model = prune(encoder.model, **base)  # nothing is dropped yet
    before = facts(encoder.model)
    reference = tokens = None
    if calibration is not None:
        own = encoder.config
        length = checked_max_length(calibration_length or own.max_length, encoder.model, encoder.tokenizer)
        encoder.config = replace(own, max_length=length)
        tokens = encoder.tokenize(calibration.texts, prompt=own.document_prompt)
        encoder.config = own
        reference = encoder.encode_tokens(tokens).embeddings

    record = {"model_sha256": encoder.weights_sha256}
    dropped: dict[PartKind, list[RankedPart]] = {}
    if any(layers.values()):
        prune(encoder.model, **layers, record=record)
        dropped |= {kind: [RankedPart(i, np.nan) for i in sorted(set(of_kind))] for kind, of_kind in layers.items()}
    planned(encoder.model.config, **{f"drop_{kind}": number for kind, number in numbers.items()})  # raises if it cannot
    record |= {"criterion": criterion}
    for kind in NAMES:
        if number := numbers.get(kind, 0):
            told = calibration.record(length)
            # Of what it lacks now no analysis of the model says anything.
            known = _analyzed(analysis, encoder, told, kind, number, criterion) if analysis and not dropped else None
            order = known or _measured(encoder, tokens, kind, number, criterion)
            chosen, scores = order[:number], {str(layer_idx): score for layer_idx, score in sorted(order)}
            measured = {"scores": scores, "calibration": told}
            prune(encoder.model, **{kind: [part.layer_idx for part in chosen]}, record=record | measured)
            dropped[kind] = chosen
    cosine = 1 - drift(encoder, tokens, reference) if reference is not None else None
    encoder.save(output)
    return PruningResult(dropped, before, facts(encoder.model), cosine)


def _measured(encoder: Encoder, tokens: Tokens, kind: PartKind, number: int, criterion: str) -> list[RankedPart]:
    """Return the parts of a kind in the order of dropping, at least those that are to go."""
    announce(encoder, tokens, {criterion: num_passes(encoder.model, criterion, [kind], number)})
    return CRITERIA[criterion](encoder, tokens, [kind], number if criterion == "greedy" else None)[kind]


def _analyzed(
    analysis: Path, encoder: Encoder, calibration: dict, kind: PartKind, number: int, criterion: str
) -> list[RankedPart] | None:
    """Return what ``_measured`` would, out of the folder of an analysis; None where it is of anything else."""
    file = analysis / "analysis.json"
    told = read_json(file)
    here = {
        "model_sha256": encoder.weights_sha256,
        "dtype": dtype_name(encoder.dtype),
        "encoder": asdict(replace(encoder.config, max_length=calibration["max_length"])),
        "calibration": calibration | {"tokens": told.get("calibration", {}).get("tokens")},
    }
    other = [name for name in here if told.get(name) != here[name]]
    order = [RankedPart(*part) for part in told.get("order", {}).get(criterion, {}).get(kind, [])]
    if other or len(order) < number:
        lacks = f"is of another {other[0]}" if other else f"does not order {number} {NAMES[kind]} by {criterion}"
        logger.info("%s %s, so importance is measured", file, lacks)
        return None
    return order[:number] if criterion == "greedy" else order


def describe_pruned(pruned: PruningResult, output: Path) -> str:
    """Return what ``prune_encoder`` did: parts and their scores, sizes before and after."""
    lines = []
    for kind, parts in pruned.dropped.items():
        told = ", ".join(str(i) if np.isnan(score) else f"{i} ({score:.4f})" for i, score in parts)
        lines.append(f"{NAMES[kind]} dropped: {told}")
    lines += ["", format_facts(pruned.before, pruned.after, names=("before", "after")), ""]
    if pruned.cosine is not None:
        lines.append(f"mean cosine of the embeddings to those before: {pruned.cosine:.4f}")
    return "\n".join([*lines, f"-> {output}"])
