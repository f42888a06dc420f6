"""What learns: an encoder with gradients, chunk by chunk, on every device; its losses are subclasses."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from effir_search.encoding.encoder import Encoder, embed
from effir_search.encoding.same_space import Space
from effir_search.errors import UserError
from effir_search.settings import LossSettings

# Takes a batch and the number of the prompt's tokens; returns tensors with a row for each text.
Forward = Callable[[dict[str, Tensor], int], tuple[Tensor, ...]]


class Objective(nn.Module):
    """An encoder with its loss. What is trained is the encoder's transformer, here under the name ``model``.

    On several devices each is given its own part of the batch. Embeddings are exchanged with their gradients, so that
    the mean of the devices' losses and gradients is that of the whole batch on one. With ``alone`` the other devices
    take no part, as where one computes a loss that all others wait for.
    """

    def __init__(self, encoder: Encoder, settings: LossSettings, *, alone: bool = False) -> None:
        super().__init__()
        self.encoder, self.settings, self.alone = encoder, settings, alone
        self.model = encoder.model
        if too_many := [size for size in settings.dimensions if not 0 < size <= encoder.dimension]:
            raise UserError(f"--matryoshka {too_many[0]}: embeddings have {encoder.dimension} components")

    def spaces(self) -> list[Space]:
        """Return whose vectors the encoder gives once it has learned: nobody's, where embeddings are not the target."""
        return []

    def embed_texts(self, texts: Sequence[str], prompt: str) -> Tensor:
        """Return ``(texts, dimension)`` float32 in the texts' order, as ``Encoder.encode`` would; gradients flow.

        Under ``cached`` only the embeddings are kept: torch's checkpointing repeats a chunk's forward pass, dropout
        included, when its gradient is due, and that is all that GradCache does.
        """
        return self._in_chunks(texts, prompt, self._embed)[0]

    def _embed(self, batch: dict[str, Tensor], prompt_length: int) -> tuple[Tensor, ...]:
        encoder = self.encoder
        return (embed(encoder.model, batch, encoder.config, head=encoder.head, prompt_length=prompt_length),)

    def _in_chunks(self, texts: Sequence[str], prompt: str, forward: Forward) -> tuple[Tensor, ...]:
        """Return what a forward pass gives, each ``(texts, ...)`` in the texts' order; see ``embed_texts``."""
        encoder = self.encoder
        tokens = encoder.tokenize(texts, prompt=prompt)
        if empty := [text for text, ids in zip(texts, tokens.input_ids, strict=True) if not ids]:
            raise UserError(f"the text {empty[0][:40]!r} has no token, so nothing can be learned from it")
        chunks, order = [], []
        for rows, batch in encoder.batches(tokens):
            if self.settings.cached and torch.is_grad_enabled():
                chunks.append(checkpoint(forward, batch, tokens.prompt_length, use_reentrant=False))
            else:
                chunks.append(forward(batch, tokens.prompt_length))
            order.append(rows)
        places = torch.from_numpy(np.argsort(np.concatenate(order))).to(encoder.device)
        return tuple(torch.cat(parts)[places] for parts in zip(*chunks, strict=True))

    def leading(self, embeddings: Tensor) -> list[Tensor]:
        """Return the embeddings at each of the dimensions, of length 1 where the model's similarity is the cosine."""
        parts = [embeddings[:, :size] for size in self.settings.dimensions] or [embeddings]
        cosine = self.encoder.config.similarity == "cosine"
        return [F.normalize(part, dim=-1) for part in parts] if cosine else parts

    def _sizes(self, rows: int) -> list[int]:
        """Return the numbers of rows of all processes that take part, this one's ``rows`` among them."""
        if self.alone or not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            return [rows]
        sizes: list[int | None] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, rows)
        return sizes
