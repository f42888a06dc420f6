"""How much each attention, MLP and block turns what goes through it."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from effir_search.errors import UserError
from effir_search.model.layers import PART_KINDS, PartKind, layers_of, parts_of, watched

NO_TOKEN = "importance needs texts with at least one token, got none"


@torch.inference_mode()
def importance(model: PreTrainedModel, batches: Iterable[Mapping[str, Tensor]]) -> dict[PartKind, Tensor]:
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
        ValueError: No real token, states that are not finite, or a family that cannot be pruned.

    Source: EffiR (arXiv 2512.20612), importance of a sub-layer.
    """
    parts = [(kind, layer_idx, part) for kind in PART_KINDS for layer_idx, part in parts_of(model, kind).items()]
    turned = {kind: torch.full((len(layers_of(model)),), torch.nan, dtype=torch.float64) for kind in PART_KINDS}
    for kind, layer_idx, _part in parts:
        turned[kind][layer_idx] = 0
    turned = {kind: sums.to(model.device) for kind, sums in turned.items()}
    num_tokens = 0
    for tokens in batches:
        real = tokens["attention_mask"].bool()  # (batch, seq)

        def add(kind: PartKind, layer_idx: int, x: Tensor, y: Tensor, real: Tensor = real) -> None:
            cosine = F.cosine_similarity(x.float(), y.float(), dim=-1)  # (batch, seq)
            # Padding may hold anything, a NaN too: it is left out, not multiplied by 0.
            turned[kind][layer_idx] += torch.where(real, (1 - cosine).double(), 0.0).sum()

        with watched(parts, add):
            model(**tokens)
        num_tokens += int(real.sum())
    if num_tokens == 0:
        raise UserError(NO_TOKEN)
    for kind, layer_idx, _part in sorted(parts, key=lambda part: part[1]):
        if not turned[kind][layer_idx].isfinite():
            raise UserError(f"layer {layer_idx}: what enters or leaves its {kind} is not finite in {model.dtype}")
    return {kind: (sums / num_tokens).cpu() for kind, sums in turned.items()}
