"""pyterrier-dr: an encoder as its bi-encoder, for FlexIndex, re-ranking and vector feedback."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from pyterrier_dr import BiEncoder

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.settings import EncoderOptions


class EffirBiEncoder(BiEncoder):
    """An encoder of this package as a ``pyterrier_dr.BiEncoder``.

    The inner product of its vectors is the model's similarity: they have length 1 where that is the cosine.

    Attributes:
        encoder: What encodes.
    """

    def __init__(
        self,
        model: Encoder | str | Path,
        options: EncoderOptions = DEFAULT_OPTIONS,
        *,
        text_field: str = "text",
        verbose: bool = False,
    ) -> None:
        """Take an encoder, or load one.

        Args:
            model: An encoder, or its folder or hub name.
            options: How it is loaded, if it is not there yet.
            text_field: The column of a document's text. ``effir index`` reads title and text, joined by a space.
            verbose: Show progress.

        Raises:
            ValueError: The folder is not a model this project can run, or an option does not fit it.
            OSError: A file cannot be read.
        """
        super().__init__(text_field=text_field, verbose=verbose)
        self.encoder = model if isinstance(model, Encoder) else Encoder.from_pretrained(model, options).pack()
        self.model_name = self.encoder.name

    def encode_queries(self, texts: Iterable[str], batch_size: int | None = None) -> np.ndarray:
        """Return ``(queries, dimension)`` float32; how many share a forward pass is the encoder's own matter."""
        return scale(self.encoder.encode_queries(list(texts)), self.encoder.config)

    def encode_queries_torch(self, texts: Iterable[str], batch_size: int | None = None) -> torch.Tensor:
        """Return the same as a tensor, without gradients."""
        return torch.from_numpy(self.encode_queries(texts))

    def encode_docs(self, texts: Iterable[str], batch_size: int | None = None) -> np.ndarray:
        """Return ``(documents, dimension)`` float32, likewise."""
        return scale(self.encoder.encode_documents(list(texts)), self.encoder.config)

    def __repr__(self) -> str:
        return f"EffirBiEncoder({self.encoder.name!r})"
