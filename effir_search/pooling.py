"""From one state per token to one vector per text."""

import torch
from torch import Tensor


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
    """Return the mean state of the real tokens of each row; shapes as in cls_pool."""
    mask = attention_mask.unsqueeze(-1).to(hidden_states.dtype)  # (batch, seq, 1)
    # A row without any token to pool (a prompt alone, the prompt left out) gives zeros, as in sentence-transformers.
    return (hidden_states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1e-9)


POOLERS = {"cls": cls_pool, "last": last_pool, "mean": mean_pool}


def without_prompt(attention_mask: Tensor, prompt_length: int) -> Tensor:
    """Return the mask with the first ``prompt_length`` real tokens of each row set to 0, for pooling the rest."""
    return attention_mask * (attention_mask.cumsum(dim=1) > prompt_length)
