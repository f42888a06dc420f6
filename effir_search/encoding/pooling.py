"""From one state per token to one vector per text."""

import torch
from torch import Tensor

from effir_search.settings import pooling_modes


def cls_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the state of the first real token of each row, whichever side the padding is on.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``.
        attention_mask: ``(batch, seq)``, 1 = real token; at least one in each row.

    Returns:
        ``(batch, hidden_size)``.
    """
    first = attention_mask.argmax(dim=1)
    return hidden_states[torch.arange(len(first), device=first.device), first]


def last_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the state of the last real token of each row, whichever side the padding is on; shapes as in cls_pool."""
    last = attention_mask.size(1) - 1 - attention_mask.flip(1).argmax(dim=1)
    return hidden_states[torch.arange(len(last), device=last.device), last]


def mean_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean state of the real tokens of each row; shapes as in cls_pool.

    The mask may hold weights: the mean is then the weighted one.
    """
    total, weight = _sums(hidden_states, attention_mask)
    return total / weight


def mean_sqrt_len_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the sum of the real tokens' states over the square root of their number; shapes as in cls_pool."""
    total, weight = _sums(hidden_states, attention_mask)
    return total / weight.sqrt()


def max_pool(hidden_states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the highest value of each component among the real tokens of each row; shapes as in cls_pool."""
    real = attention_mask.unsqueeze(-1) > 0  # (batch, seq, 1)
    highest = hidden_states.masked_fill(~real, -torch.inf).amax(dim=1)
    return highest.masked_fill(~real.any(dim=1), 0.0)  # as the other poolers: without any token to pool, zeros


def _sums(hidden_states: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return of each row the weighted sum of its states, ``(batch, hidden_size)``, and that of its weights."""
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (batch, seq, 1)
    # A row without any token to pool (a prompt alone, the prompt left out) gives zeros, as in sentence-transformers.
    return (hidden_states * mask).sum(dim=1), mask.sum(dim=1).clamp(min=1e-9)


# Names that sentence-transformers has too, but for "last", which it calls lasttoken.
POOLERS = {
    "cls": cls_pool,
    "last": last_pool,
    "mean": mean_pool,
    "max": max_pool,
    "weightedmean": mean_pool,
    "mean_sqrt_len_tokens": mean_sqrt_len_pool,
}

# The poolers for which a token's weight is its place in the text, counted from 1.
BY_PLACE = ("weightedmean",)


def pool(hidden_states: Tensor, attention_mask: Tensor, pooling: str, *, prompt_length: int = 0) -> Tensor:
    """Return one vector per row.

    Args:
        hidden_states: ``(batch, seq, hidden_size)``.
        attention_mask: ``(batch, seq)``, 1 = real token; at least one in each row.
        pooling: See ``pooling_modes``; the vectors of several poolers are put one behind the other.
        prompt_length: So many leading real tokens are not pooled; they count in the places of the others.

    Returns:
        ``(batch, poolers * hidden_size)``.
    """
    places = attention_mask.cumsum(dim=1) * attention_mask
    pooled = attention_mask * (places > prompt_length) if prompt_length else attention_mask
    vectors = [
        POOLERS[mode](hidden_states, pooled * places if mode in BY_PLACE else pooled) for mode in pooling_modes(pooling)
    ]
    return vectors[0] if len(vectors) == 1 else torch.cat(vectors, dim=-1)
