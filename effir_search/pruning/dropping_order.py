"""In which order the parts of a model are dropped, by which criterion."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedModel

from effir_search.encoding.batching import Tokens, batches_by_length
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.model.layers import PART_KINDS, PartKind, layers_of, left_out, parts_of
from effir_search.pruning.drift import drifts
from effir_search.pruning.importance import NO_TOKEN, importance

logger = logging.getLogger(__name__)

# Passes over the texts from which on it is said how long they take.
MANY = 5


class RankedPart(NamedTuple):
    """A part in the order of dropping: its layer, 0-based in the base model, and the score it has its place by."""

    layer_idx: int
    score: float


# Takes an encoder, tokens of texts, kinds of parts, and how many of each are wanted (None = all); returns for each
# kind the parts in the order of dropping, the least important first. The encoder is left as it is.
Criterion = Callable[[Encoder, Tokens, Iterable[PartKind], int | None], dict[PartKind, list[RankedPart]]]


def num_passes(
    model: PreTrainedModel, name: str, kinds: Iterable[PartKind] = PART_KINDS, number: int | None = None
) -> int:
    """Return about how many passes over the texts a criterion takes; one that begins at a later layer is a share of it.

    Args:
        model: A base model as AutoModel loads it, or an ``EffirModel``.
        name: A key of ``CRITERIA``.
        kinds: As a criterion takes them.
        number: Likewise.
    """
    if name == "cosine":
        return 1
    # The reference, and of embedding the pass whose states are kept.
    num_layers, total = len(layers_of(model)), 2 if name == "embedding" else 1
    for parts in (parts_of(model, kind) for kind in kinds):
        shares = [1 - layer_idx / num_layers for layer_idx in parts]
        if name == "embedding":
            total += sum(shares)
        elif shares:
            rounds = _rounds(len(shares), number)
            total += rounds + sum(len(shares) - done for done in range(rounds)) * np.mean(shares)
    return round(total)


def announce(encoder: Encoder, tokens: Tokens, passes: Mapping[str, int]) -> None:
    """Log how many passes over the texts there will be, for what, and about how long they take, if they are many.

    Args:
        encoder: What they are passes of; the time is that of its first batch, which is run for it.
        tokens: The texts, from its ``tokenize``.
        passes: By what they are for.

    Raises:
        ValueError: No token.
    """
    plan = ", ".join(f"{name} {number} pass{'es' * (number != 1)}" for name, number in passes.items())
    lengths = [len(ids) for ids in tokens.input_ids]
    batches = list(batches_by_length(lengths, encoder.batch_tokens))
    if not batches:
        raise UserError(NO_TOKEN)
    total = sum(passes.values())
    if total >= MANY:
        _ = encoder.dimension  # the first pass of all takes longer
        start = time.perf_counter()
        encoder.encode_tokens(tokens.of(batches[0]))
        seconds = time.perf_counter() - start
        padded = [len(rows) * lengths[rows[0]] for rows in batches]
        seconds *= sum(padded) / padded[0] * total
        plan += f"; about {seconds:.0f} s in all" if seconds < 120 else f"; about {seconds / 60:.0f} min in all"
    cut = f" ({tokens.num_truncated} of them cut)" if tokens.num_truncated else ""
    logger.info("measuring on %d texts%s: %s", len(tokens.texts), cut, plan)
    if (repeated := len(tokens.texts) - len(set(map(tuple, tokens.input_ids)))) > 0:
        logger.warning("%d of these texts have the tokens of another one, so they tell nothing new", repeated)


def by_cosine(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[PartKind], number: int | None = None
) -> dict[PartKind, list[RankedPart]]:
    """Order parts by ``importance``, EffiR's criterion: one forward pass for all."""
    batches = tqdm(list(encoder.batches(tokens)), desc="cosine", unit=" batches", disable=None)
    scores = importance(encoder.model, (batch for _, batch in batches))
    return {kind: _ascending(dict(enumerate(scores[kind].tolist())))[:number] for kind in kinds}


def by_embedding(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[PartKind], number: int | None = None
) -> dict[PartKind, list[RankedPart]]:
    """Order parts by the ``drift`` of the final embedding when one alone is left out; see ``drifts`` for the memory."""
    parts = {kind: list(parts_of(encoder.model, kind)) for kind in kinds}
    plans = [[(kind, layer_idx)] for kind, layers in parts.items() for layer_idx in layers]
    reference = encoder.encode_tokens(tokens).embeddings
    with _progress("embedding", len(plans), tokens) as progress:
        scores = iter(drifts(encoder, tokens, plans, reference, done=progress.update))
    return {
        kind: _ascending({layer_idx: next(scores) for layer_idx in layers})[:number] for kind, layers in parts.items()
    }


def greedily(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[PartKind], number: int | None = None
) -> dict[PartKind, list[RankedPart]]:
    """Leave out, one after the other, the part without which the embedding drifts least from the full model's.

    The score of a part is the drift with it and all before it left out. Each kind starts from the model as it is. N of
    L parts are found by ``N * L - N * (N - 1) / 2`` drifts; see ``drifts`` for their memory.
    """
    reference = encoder.encode_tokens(tokens).embeddings
    parts = {kind: list(parts_of(encoder.model, kind)) for kind in kinds}
    rounds = {kind: _rounds(len(layers), number) for kind, layers in parts.items()}
    total = sum(len(parts[kind]) - done for kind, n in rounds.items() for done in range(n))
    order: dict[PartKind, list[RankedPart]] = {kind: [] for kind in parts}
    with _progress("greedy", total, tokens) as progress:
        for kind, remaining in parts.items():
            with ExitStack() as dropped:
                for _ in range(rounds[kind]):
                    plans = [[(kind, layer_idx)] for layer_idx in remaining]
                    scores = drifts(encoder, tokens, plans, reference, done=progress.update)
                    first = _ascending(dict(zip(remaining, scores, strict=True)))[0]
                    order[kind].append(first)
                    remaining.remove(first.layer_idx)
                    dropped.enter_context(left_out(encoder.model, kind, first.layer_idx))
    return order


CRITERIA: dict[str, Criterion] = {"cosine": by_cosine, "embedding": by_embedding, "greedy": greedily}


def _ascending(scores: Mapping[int, float]) -> list[RankedPart]:
    """Lowest first, of equal ones the later layer; layers without the part (NaN) are left out."""
    parts = [RankedPart(layer_idx, score) for layer_idx, score in scores.items() if score == score]
    return sorted(parts, key=lambda part: (part.score, -part.layer_idx))


def _rounds(num_parts: int, number: int | None) -> int:
    return num_parts if number is None else min(number, num_parts)


def _progress(name: str, num_plans: int, tokens: Tokens) -> tqdm:
    """Return a bar for the texts of so many plans; those without a token are in no pass."""
    return tqdm(total=num_plans * sum(map(bool, tokens.input_ids)), desc=name, unit=" texts", disable=None)
