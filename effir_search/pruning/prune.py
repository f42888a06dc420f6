"""A model without its least important attentions, MLPs or blocks: ``effir prune``."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from effir_search.encoder import Encoder, checked_max_length
from effir_search.files import refuse_existing
from effir_search.model.arithmetic import facts, format_facts, planned
from effir_search.model.checkpoint import hub_revision, lasting_name
from effir_search.model.layers import Kind
from effir_search.model.sentence_files import prunable_config
from effir_search.model.surgery import prune
from effir_search.pruning.calibration import NUM_TEXTS, sample_texts
from effir_search.pruning.importance import CRITERIA, Dropped, drift

logger = logging.getLogger(__name__)

# What parts of a kind are called, in the order in which kinds are dropped: the largest first.
NAMES: dict[Kind, str] = {"block": "blocks", "mlp": "MLPs", "attention": "attentions"}


class Pruned(NamedTuple):
    """What was done.

    Attributes:
        dropped: For each kind the parts in the order of dropping; the score of one that was named is NaN.
        before: ``arithmetic.facts`` of the model as it was.
        after: Of the model as it is.
        cosine: Between the embeddings of the calibration texts before and after, the mean; None without texts.
    """

    dropped: dict[Kind, list[Dropped]]
    before: dict[str, int]
    after: dict[str, int]
    cosine: float | None


def prune_encoder(
    encoder_name: str,
    output: Path,
    *,
    numbers: Mapping[Kind, int],
    layers: Mapping[Kind, Sequence[int]],
    criterion: str = "cosine",
    sources: Sequence[str] = (),
    size: int = NUM_TEXTS,
    seed: int = 0,
    calibration_length: int | None = None,
    **options: object,
) -> Pruned:
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
        calibration_length: Tokens of a text that importance is measured on; None = as many as the model reads.
        options: As ``Encoder.from_pretrained`` takes them; None = its default.

    Raises:
        ValueError: Nothing to drop, more than there is, no texts, or a model that cannot be pruned.
        OSError: The folder exists, or a file cannot be read or written.
    """
    refuse_existing(output, replaces=())
    if both := sorted(numbers.keys() & layers.keys()):
        raise ValueError(f"--drop-{both[0]} and --drop-{both[0]}-layers: give a number or the layers, not both")
    if not any(numbers.values()) and not any(layers.values()):
        raise ValueError("nothing to drop: give --drop-mlp N or --drop-mlp-layers 3,5, or the same for other parts")
    if any(numbers.values()) and not sources:
        raise ValueError("--texts is needed to find the parts that matter least; --drop-mlp-layers needs none")
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
        logger.info("measuring by %s on %d texts", criterion, len(calibration.texts))
        tokens = encoder.tokenize(calibration.texts, prompt=own.document_prompt)
        encoder.config = own
        reference = encoder.encode_tokens(tokens).embeddings

    record = {"model_sha256": encoder.weights_sha256}
    dropped: dict[Kind, list[Dropped]] = {}
    if any(layers.values()):
        prune(encoder.model, **layers, record=record)
        dropped |= {kind: [Dropped(i, np.nan) for i in sorted(set(of_kind))] for kind, of_kind in layers.items()}
    planned(encoder.model.config, **{f"drop_{kind}": number for kind, number in numbers.items()})  # raises if it cannot
    record |= {"criterion": criterion}
    for kind in NAMES:
        if number := numbers.get(kind, 0):
            chosen, scores = _least_important(encoder, tokens, kind, number, criterion)
            measured = {"scores": scores, "calibration": calibration.record(length)}
            prune(encoder.model, **{kind: [part.layer_idx for part in chosen]}, record=record | measured)
            dropped[kind] = chosen
    cosine = 1 - drift(encoder, tokens, reference) if reference is not None else None
    encoder.save(output)
    return Pruned(dropped, before, facts(encoder.model), cosine)


def _least_important(
    encoder: Encoder, tokens: object, kind: Kind, number: int, criterion: str
) -> tuple[list[Dropped], dict[str, float]]:
    """Return the parts to drop, and the scores that were measured, by layer."""
    order = CRITERIA[criterion](encoder, tokens, [kind], number if criterion == "greedy" else None)[kind]
    return order[:number], {str(layer_idx): score for layer_idx, score in sorted(order)}


def describe_pruned(pruned: Pruned, output: Path) -> str:
    """Return what ``prune_encoder`` did: parts and their scores, sizes before and after."""
    lines = []
    for kind, parts in pruned.dropped.items():
        told = ", ".join(str(i) if np.isnan(score) else f"{i} ({score:.4f})" for i, score in parts)
        lines.append(f"{NAMES[kind]} dropped: {told}")
    lines += ["", format_facts(pruned.before, pruned.after, names=("before", "after")), ""]
    if pruned.cosine is not None:
        lines.append(f"mean cosine of the embeddings to those before: {pruned.cosine:.4f}")
    return "\n".join([*lines, f"-> {output}"])
