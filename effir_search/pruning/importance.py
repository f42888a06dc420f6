"""How much each attention, MLP and block of a model matters, and in which order they can be dropped."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from effir_search.encoder import Encoder, Tokens
from effir_search.model.layers import KINDS, Kind, layers_of, left_out, parts_of, watched


class Dropped(NamedTuple):
    """A part in the order of dropping: its layer, 0-based in the base model, and the score it has its place by."""

    layer_idx: int
    score: float


# Takes an encoder, tokens of texts, kinds of parts, and how many of each are wanted (None = all); returns for each
# kind the parts in the order of dropping, the least important first. The encoder is left as it is.
Criterion = Callable[[Encoder, Tokens, Iterable[Kind], int | None], dict[Kind, list[Dropped]]]


@torch.inference_mode()
def importance(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[Kind, Tensor]:
    """Return how far each part of a model turns its input: ``1 - cos(x, y)``, the mean over all real tokens.

    x is what enters the part, y what leaves it with the residual added, so that 0 is a part that changes nothing and 1
    one whose output is orthogonal to its input. In post-norm families y is ``LN(x + F(x))``, in others ``x + F(x)``,
    with F after its own norm in Gemma. One forward pass a batch serves all kinds and layers; no state is kept.

    Args:
        model: A base model as AutoModel loads it, or an ``EffirModel``.
        batches: Each has ``input_ids`` and ``attention_mask``, ``(batch, seq)``, 1 = real token, on the model's device.

    Returns:
        For each kind ``(num_hidden_layers,)`` float64 on the CPU; NaN where a layer has no such part.

    Raises:
        ValueError: No real token, or a family that cannot be pruned.

    Source: EffiR (arXiv 2512.20612), importance of a sub-layer.
    """
    parts = [(kind, layer_idx, part) for kind in KINDS for layer_idx, part in parts_of(model, kind).items()]
    turned = {kind: torch.full((len(layers_of(model)),), torch.nan, dtype=torch.float64) for kind in KINDS}
    for kind, layer_idx, _part in parts:
        turned[kind][layer_idx] = 0
    turned = {kind: sums.to(model.device) for kind, sums in turned.items()}
    num_tokens = 0
    for tokens in batches:
        real = tokens["attention_mask"].double()  # (batch, seq)

        def add(kind: Kind, layer_idx: int, x: Tensor, y: Tensor, real: Tensor = real) -> None:
            cosine = F.cosine_similarity(x.float(), y.float(), dim=-1)  # (batch, seq)
            turned[kind][layer_idx] += ((1 - cosine) * real).sum()

        with watched(parts, add):
            model(**tokens)
        num_tokens += int(real.sum())
    if num_tokens == 0:
        raise ValueError("importance needs texts with at least one token, got none")
    return {kind: (sums / num_tokens).cpu() for kind, sums in turned.items()}


def drift(encoder: Encoder, tokens: Tokens, reference: np.ndarray) -> float:
    """Return ``1 - cos`` between the texts' embeddings now and the given ones, the mean over texts.

    Args:
        encoder: Whose parts may be left out at the moment.
        tokens: From its ``tokenize``.
        reference: ``(texts, dimension)``, the embeddings of the same texts before.
    """
    embeddings = encoder.encode_tokens(tokens).embeddings
    a, b = (torch.from_numpy(vectors).double() for vectors in (embeddings, reference))
    # A text without a token has the zero vector in both.
    return float((1 - F.cosine_similarity(a, b, dim=-1))[b.any(dim=1)].mean())


def by_cosine(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[Kind], number: int | None = None
) -> dict[Kind, list[Dropped]]:
    """Order parts by ``importance``, EffiR's criterion: one forward pass for all."""
    batches = tqdm(list(encoder.batches(tokens)), desc="cosine", unit=" batches", disable=None)
    scores = importance(encoder.model, (batch for _, batch in batches))
    return {kind: _ascending(dict(enumerate(scores[kind].tolist())))[:number] for kind in kinds}


def by_embedding(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[Kind], number: int | None = None
) -> dict[Kind, list[Dropped]]:
    """Order parts by the ``drift`` of the final embedding when one alone is left out: a forward pass for each part."""
    parts = {kind: list(parts_of(encoder.model, kind)) for kind in kinds}
    reference = encoder.encode_tokens(tokens).embeddings
    scores: dict[Kind, dict[int, float]] = {kind: {} for kind in parts}
    with tqdm(total=sum(map(len, parts.values())), desc="embedding", unit=" parts", disable=None) as progress:
        for kind, layers in parts.items():
            for layer_idx in layers:
                with left_out(encoder.model, kind, layer_idx):
                    scores[kind][layer_idx] = drift(encoder, tokens, reference)
                progress.update()
    return {kind: _ascending(of_kind)[:number] for kind, of_kind in scores.items()}


def greedily(
    encoder: Encoder, tokens: Tokens, kinds: Iterable[Kind], number: int | None = None
) -> dict[Kind, list[Dropped]]:
    """Leave out, one after the other, the part without which the embedding drifts least from the full model's.

    The score of a part is the drift with it and all before it left out. Each kind starts from the model as it is. For N
    of L parts that takes ``N * L - N * (N - 1) / 2`` forward passes.
    """
    reference = encoder.encode_tokens(tokens).embeddings
    parts = {kind: list(parts_of(encoder.model, kind)) for kind in kinds}
    rounds = {kind: len(left) if number is None else min(number, len(left)) for kind, left in parts.items()}
    total = sum(sum(range(len(parts[kind]) - n + 1, len(parts[kind]) + 1)) for kind, n in rounds.items())
    order: dict[Kind, list[Dropped]] = {kind: [] for kind in parts}
    with tqdm(total=total, desc="greedy", unit=" parts", disable=None) as progress:
        for kind, left in parts.items():
            with ExitStack() as out:
                for _ in range(rounds[kind]):
                    scores = {}
                    for layer_idx in left:
                        with left_out(encoder.model, kind, layer_idx):
                            scores[layer_idx] = drift(encoder, tokens, reference)
                        progress.update()
                    order[kind].append(_ascending(scores)[0])
                    left.remove(order[kind][-1].layer_idx)
                    out.enter_context(left_out(encoder.model, kind, order[kind][-1].layer_idx))
    return order


CRITERIA: dict[str, Criterion] = {"cosine": by_cosine, "embedding": by_embedding, "greedy": greedily}


def _ascending(scores: Mapping[int, float]) -> list[Dropped]:
    """Lowest first, of equal ones the later layer; layers without the part (NaN) are left out."""
    there = [Dropped(layer_idx, score) for layer_idx, score in scores.items() if score == score]
    return sorted(there, key=lambda part: (part.score, -part.layer_idx))
