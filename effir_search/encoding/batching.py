"""Tokenized texts, and which of them share a forward pass."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

# Parameters from which on a model is large.
LARGE = 1_000_000_000


class Tokens(NamedTuple):
    """Tokenized texts, not yet padded; ``token_type_ids`` is None where the tokenizer or the model has none."""

    texts: Sequence[str]
    input_ids: list[list[int]]
    token_type_ids: list[list[int]] | None
    prompt_length: int
    num_truncated: int

    def of(self, rows: np.ndarray) -> "Tokens":
        """Return those of some texts."""
        return self._replace(
            texts=[self.texts[row] for row in rows],
            input_ids=[self.input_ids[row] for row in rows],
            token_type_ids=None if self.token_type_ids is None else [self.token_type_ids[row] for row in rows],
        )

    def batch(self, rows: np.ndarray, pad_token_id: int) -> dict[str, Tensor]:
        """Return these rows padded on the right, where no position shifts: each tensor is ``(rows, longest)``."""
        longest = max(len(self.input_ids[row]) for row in rows)
        arrays = {
            "input_ids": np.full((len(rows), longest), pad_token_id),
            "attention_mask": np.zeros((len(rows), longest), dtype=np.int64),
        }
        if self.token_type_ids is not None:
            arrays["token_type_ids"] = np.zeros((len(rows), longest), dtype=np.int64)
        for place, row in enumerate(rows):
            length = len(self.input_ids[row])
            arrays["input_ids"][place, :length] = self.input_ids[row]
            arrays["attention_mask"][place, :length] = 1
            if self.token_type_ids is not None:
                arrays["token_type_ids"][place, :length] = self.token_type_ids[row]
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[np.ndarray]:
    """Yield row numbers, longest texts first, so that rows times longest row stays within ``batch_tokens``.

    Rows of length 0 are in no batch. A row longer than the budget is a batch of its own.
    """
    order = np.argsort(-np.asarray(lengths), kind="stable")
    order = order[: np.count_nonzero(lengths)]
    start = 0
    while start < len(order):
        size = max(1, batch_tokens // lengths[order[start]])
        yield order[start : start + size]
        start += size


def default_batch_tokens(model: PreTrainedModel) -> int:
    """Return the budget of a forward pass: what keeps the processor busy and, on a CPU, stays in its caches.

    The smaller it is, the less padding short texts need. A large model fills a GPU with few tokens.
    """
    if model.device.type != "cuda":
        return 2048
    return 8192 if model.num_parameters() >= LARGE else 32768
