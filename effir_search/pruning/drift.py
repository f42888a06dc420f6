"""How far a model's embeddings move when parts of it are left out."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from effir_search.encoding.batching import Tokens, batches_by_length
from effir_search.encoding.encoder import Encoder
from effir_search.errors import UserError
from effir_search.model.layers import PartKind, left_out, recorded, replayed
from effir_search.pruning.importance import NO_TOKEN


def drift(encoder: Encoder, tokens: Tokens, reference: np.ndarray) -> float:
    """Return ``1 - cos`` between the texts' embeddings now and the given ones, the mean over texts.

    Args:
        encoder: Whose parts may be left out at the moment.
        tokens: From its ``tokenize``.
        reference: ``(texts, dimension)``, the embeddings of the same texts before.
    """
    return _mean(_turned(encoder.encode_tokens(tokens).embeddings, reference), reference)


@torch.inference_mode()
def drifts(
    encoder: Encoder,
    tokens: Tokens,
    plans: Sequence[Sequence[tuple[PartKind, int]]],
    reference: np.ndarray,
    *,
    done: Callable[[int], object] = lambda _rows: None,
) -> list[float]:
    """Return the ``drift`` for each of several plans of what to leave out, the same as a whole pass gives, bit for bit.

    One batch after the other goes through the model once, and what each layer returns is kept while the batch goes
    through the layers from the first one of each plan on. So at most the states of one batch at every layer are kept:
    layers * padded tokens of a batch * hidden size. At the usual ``batch_tokens`` these are 142 MB for 30 layers of 576
    on a CPU in float32, and 2.1 GB for Mistral-7B on a GPU in bfloat16.

    Args:
        encoder: Whose parts may be left out at the moment.
        tokens: From its ``tokenize``.
        plans: Each the parts to leave out besides, at least one.
        reference: ``(texts, dimension)``, the embeddings that the drift is from.
        done: Called after each part of the work with its number of texts; over all, plans * texts with tokens.
    """
    turned = torch.zeros(len(plans), len(tokens.texts), dtype=torch.float64)
    for rows in batches_by_length([len(ids) for ids in tokens.input_ids], encoder.batch_tokens):
        batch = tokens.of(rows)
        with recorded(encoder.model) as outputs:
            encoder.encode_tokens(batch)
        for number, plan in enumerate(plans):
            with ExitStack() as changed:
                changed.enter_context(replayed(encoder.model, outputs, min(layer_idx for _kind, layer_idx in plan)))
                for part in plan:
                    changed.enter_context(left_out(encoder.model, *part))
                turned[number, rows] = _turned(encoder.encode_tokens(batch).embeddings, reference[rows])
            done(len(rows))
    return [_mean(row, reference) for row in turned]


def _turned(embeddings: np.ndarray, reference: np.ndarray) -> Tensor:
    """Return ``1 - cos`` of each row, ``(texts,)`` float64."""
    a, b = (torch.from_numpy(vectors).double() for vectors in (embeddings, reference))
    return 1 - F.cosine_similarity(a, b, dim=-1)


def _mean(turned: Tensor, reference: np.ndarray) -> float:
    """Return the mean over the texts with a token; one without any has the zero vector, whatever is left out."""
    has_token = torch.from_numpy(reference.any(axis=1))
    if not has_token.any():
        raise UserError(NO_TOKEN)
    return float(turned[has_token].mean())
