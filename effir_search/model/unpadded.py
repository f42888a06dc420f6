"""Texts one behind the other in a forward pass, without padding, by torch's attention for texts of any length.

It is used on GPUs in 16-bit arithmetic, where padded tokens cost as much as real ones. On other processors the same
forward pass attends text by text: slow, but it shows that nothing else differs from padded texts.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from effir_search.model.families import is_prunable

UNPADDED_ATTENTION = "effir_unpadded"
# Attentions with a bias by distance, or with scores that are capped, which torch's for texts of any length lacks.
NEED_PADDING = ("mpnet", "gemma2")
# Types of numbers that a GPU's attention for texts of any length has.
HALVES = (torch.bfloat16, torch.float16)


def can_unpad(model: PreTrainedModel) -> bool:
    """Whether the family of a model is known to compute texts one behind the other as it computes them padded."""
    config = getattr(model.config, "base_config", model.config)
    return is_prunable(config) and config.model_type not in NEED_PADDING


def joined(batch: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """Return a padded batch with its real tokens one behind the other.

    Args:
        batch: Tensors ``(texts, longest)`` with ``attention_mask``, padded on the right; on the CPU, where to count
            tokens stops no queue.
        model: Says from which number on it counts positions.

    Returns:
        ``attention_mask`` as it was; ``places`` ``(tokens,)``, where in the flattened mask each token was;
        ``starts`` ``(texts + 1,)`` int32, the first token of each text and the number of all; ``position_ids`` and
        whatever else was there, ``(1, tokens)``.
    """
    mask = batch["attention_mask"]
    lengths = mask.sum(dim=1)
    places = mask.flatten().nonzero().squeeze(1)
    tokens = {name: tensor.flatten()[places][None] for name, tensor in batch.items() if name != "attention_mask"}
    positions = torch.arange(mask.shape[1]).expand_as(mask).flatten()[places] + _first_position(model)
    starts = F.pad(lengths.cumsum(0), (1, 0)).int()
    return tokens | {"position_ids": positions[None], "starts": starts, "places": places, "attention_mask": mask}


def _first_position(model: PreTrainedModel) -> int:
    """Return the number of a text's first position: RoBERTa and its kin begin behind that of their padding."""
    embeddings = getattr(getattr(model, "model", model), "embeddings", None)
    table = getattr(embeddings, "position_embeddings", None)
    return table.padding_idx + 1 if getattr(table, "padding_idx", None) is not None else 0


def states_of(model: PreTrainedModel, batch: Mapping[str, Tensor]) -> Tensor:
    """Return the last hidden states of ``joined`` texts as if they had been padded: ``(texts, longest, hidden_size)``.

    Where padding would be, states are 0.
    """
    mask, places, starts = batch["attention_mask"], batch["places"], batch["starts"]
    tokens = {name: batch[name] for name in batch.keys() - {"attention_mask", "places", "starts"}}
    longest = mask.shape[1]
    limits = {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": longest, "max_length_k": longest}
    with _unpadded(model):
        states = model(**tokens, **limits).last_hidden_state[0]
    padded = states.new_zeros(mask.numel(), states.shape[1])
    return padded.index_copy_(0, places, states).view(*mask.shape, -1)


def unpadded_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **_options: object,
) -> tuple[Tensor, None]:
    """Return what transformers' "sdpa" attention returns for padded texts, for texts one behind the other.

    Args:
        module: The attention it is called by.
        query: ``(1, heads, tokens, head_dim)``.
        key: ``(1, key_heads, tokens, head_dim)``.
        value: As ``key``.
        attention_mask: None: that texts do not see each other is what ``cu_seq_lens_q`` says.
        cu_seq_lens_q: ``(texts + 1,)`` int32, the first token of each text and the number of all.
        max_length_q: Tokens of the longest text.
        scaling: Of the products; None = 1 / sqrt(head_dim).
        sliding_window: A token sees those less than so many places away; None = all.
        is_causal: Whether it sees none behind itself; None = as the module says.

    Returns:
        ``(1, tokens, heads, head_dim)``, and None for the attention's weights.
    """
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    before = -1 if sliding_window is None else sliding_window - 1
    window = (before, 0 if causal else before)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    attend = _by_torch if query.is_cuda else _text_by_text
    parts = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]  # each (tokens, heads, head_dim)
    return attend(*parts, cu_seq_lens_q, max_length_q, scale, window)[None], None


def _by_torch(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: tuple[int, int]
) -> Tensor:
    grouped = query.shape[1] != key.shape[1]
    parts = (query.contiguous(), key.contiguous(), value.contiguous())
    return varlen_attn(*parts, starts, starts, longest, longest, scale=scale, window_size=window, enable_gqa=grouped)


def _text_by_text(
    query: Tensor, key: Tensor, value: Tensor, starts: Tensor, longest: int, scale: float, window: tuple[int, int]
) -> Tensor:
    """Return what ``_by_torch`` does, on any processor."""
    place = torch.arange(longest)
    distance = place - place[:, None]  # of a key from a query: behind it if positive
    before, behind = (longest if steps < 0 else steps for steps in window)
    seen = (distance >= -before) & (distance <= behind)
    attended = torch.empty_like(query)
    for start, end in zip(starts.tolist(), starts.tolist()[1:], strict=False):
        heads = (tensor[start:end].transpose(0, 1)[None] for tensor in (query, key, value))
        mask = seen[: end - start, : end - start]
        found = F.scaled_dot_product_attention(*heads, attn_mask=mask, scale=scale, enable_gqa=True)
        attended[start:end] = found[0].transpose(0, 1)
    return attended


@contextmanager
def _unpadded(model: PreTrainedModel) -> Iterator[None]:
    """Let a model attend by ``UNPADDED_ATTENTION`` for a while."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for config in configs.values():
        config._attn_implementation = UNPADDED_ATTENTION
    try:
        yield
    finally:
        for key, config in configs.items():
            config._attn_implementation = before[key]


def _no_mask(**_options: object) -> None:
    """Say that texts one behind the other need no mask: where each begins and ends is told apart from it."""


AttentionInterface.register(UNPADDED_ATTENTION, unpadded_attention)
AttentionMaskInterface.register(UNPADDED_ATTENTION, _no_mask)
