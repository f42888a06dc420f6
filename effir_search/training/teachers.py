"""Teachers: what scores how well a document answers a query, for mining and distillation."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import DEFAULT_OPTIONS, Encoder
from effir_search.errors import UserError
from effir_search.model.checkpoint import named_errors, resolve_model
from effir_search.model.sentence_files import check_stock_encoder
from effir_search.settings import EncoderOptions
from effir_search.text.examples import Pair, Scorer, checked_scores

if TYPE_CHECKING:
    from sentence_transformers import CrossEncoder

# Pairs whose vectors are laid side by side at once.
SLICE = 8192


def load_teacher(
    teacher: str | Path | None = None,
    reranker: str | Path | None = None,
    options: EncoderOptions = DEFAULT_OPTIONS,
) -> Scorer:
    """Return what scores ``(query, document)`` pairs: a bi-encoder or a cross-encoder.

    Args:
        teacher: Bi-encoder, folder or hub name.
        reranker: Cross-encoder, folder or hub name.
        options: How a bi-encoder is loaded and run; of a cross-encoder ``device`` and ``stock_architecture``.

    Raises:
        ValueError: Not just one of the two, or a model that cannot be one.
        OSError: A file cannot be read.
    """
    if (teacher is None) == (reranker is None):
        raise UserError("give one teacher: either --teacher, a bi-encoder, or --reranker, a cross-encoder")
    if teacher is not None:
        return functools.partial(bi_encoder_scores, Encoder.from_pretrained(teacher, options).pack())
    model = load_cross_encoder(reranker, device=options.device, stock_architecture=options.stock_architecture)
    return functools.partial(cross_encoder_scores, model)


def bi_encoder_scores(encoder: Encoder, pairs: Sequence[Pair]) -> list[float]:
    """Return the model's similarity of each query and document, as a search would score them.

    Each distinct text is encoded once, with its prompt.

    Args:
        encoder: The teacher.
        pairs: Of query and document.

    Raises:
        ValueError: As ``Encoder.encode``.
    """
    queries = {query: row for row, query in enumerate(dict.fromkeys(query for query, _ in pairs))}
    documents = {text: row for row, text in enumerate(dict.fromkeys(text for _, text in pairs))}
    query_embeddings = scale(encoder.encode_queries(list(queries)), encoder.config)  # (queries, dimension)
    document_embeddings = scale(encoder.encode_documents(list(documents)), encoder.config)  # (documents, dimension)
    query_rows = [queries[query] for query, _ in pairs]
    document_rows = [documents[text] for _, text in pairs]
    scores: list[float] = []
    for start in range(0, len(pairs), SLICE):
        part = slice(start, start + SLICE)
        products = np.einsum("ij,ij->i", query_embeddings[query_rows[part]], document_embeddings[document_rows[part]])
        scores += products.tolist()
    return scores


def load_cross_encoder(name: str | Path, *, device: str = "auto", stock_architecture: bool = False) -> "CrossEncoder":
    """Load a sentence-transformers or Hugging Face cross-encoder; nothing in its folder is executed.

    Args:
        name: Folder or hub name.
        device: "cpu", "cuda", "cuda:1"; "auto" takes a GPU if there is one.
        stock_architecture: As for ``Encoder.from_pretrained``.

    Raises:
        ValueError: sentence-transformers is not installed, the folder is no cross-encoder, or one with code of its own.
        OSError: A file cannot be read.
    """
    try:
        from sentence_transformers import CrossEncoder
    except ImportError as error:
        raise UserError("cross-encoders need sentence-transformers: pip install 'effir_search[train]'") from error
    check_stock_encoder(name, stock_architecture=stock_architecture)
    folder = resolve_model(name)
    with named_errors(folder):
        model = CrossEncoder(
            str(folder), device=None if device == "auto" else device, local_files_only=True, trust_remote_code=False
        )
    classes = (model.model.config.architectures or [""]) if model.model is not None else [""]
    # Of any other class transformers would load the weights and draw those of the scoring layer at random.
    if not classes[0].endswith(("ForSequenceClassification", "ForCausalLM")) and len(model) == 1:
        raise UserError(f"{name}: its weights are those of a {classes[0] or 'model'} without a layer that scores pairs")
    return model


def cross_encoder_scores(model: "CrossEncoder", pairs: Sequence[Pair], *, batch_size: int = 32) -> list[float]:
    """Return the logit that a cross-encoder gives each query and document, without an activation.

    Args:
        model: The teacher.
        pairs: Of query and document.
        batch_size: Pairs in a forward pass.

    Raises:
        ValueError: A model with more than one label, or a score that is not finite.
    """
    if model.num_labels != 1:
        raise UserError(f"a cross-encoder with {model.num_labels} labels gives no score; one with 1 label is needed")
    if not pairs:
        return []
    scores = model.predict(
        [list(pair) for pair in pairs],
        batch_size=batch_size,
        activation_fn=torch.nn.Identity(),
        show_progress_bar=False,
    )
    return list(checked_scores(scores.tolist(), len(pairs)))
