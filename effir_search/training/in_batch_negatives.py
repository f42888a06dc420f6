"""Which documents of a batch are negatives of which query."""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from effir_search.errors import UserError
from effir_search.settings import LossSettings
from effir_search.text.examples import Example, document_key


def check_examples(examples: Sequence[Example], batch_size: int, settings: LossSettings) -> None:
    """Raise what training would end with unnoticed: a loss of 0 in every batch, whatever the model.

    Args:
        examples: What is learned from; they are read as far as one is found that something can be learned from.
        batch_size: Examples whose documents are each other's negatives.
        settings: Of the losses.

    Raises:
        ValueError: No query can meet a document that is none of its positives, and none has scores to learn.
    """
    over_batch = settings.distill_over == "batch"
    positives: set[int] = set()
    # Once more from the first one, whose query may not know the positive of a later one.
    for example in itertools.chain(examples, examples):
        own = own_keys(example)
        others = {document_key(text) for text in example.negatives} - {document_key(example.positive)}
        if others and settings.distillation_weight and (over_batch or example.scores is not None):
            return
        if batch_size > 1:
            positives.add(document_key(example.positive))
        if over_batch and len(positives) > 1:
            return
        if settings.contrastive_weight and (others | positives).difference(own):
            return
    if not settings.contrastive_weight and not over_batch:
        raise UserError(
            "--contrastive-weight 0: no example has a teacher's scores of hard negatives, which are all that could be "
            "learned; give --teacher and negatives, or --distill-over batch"
        )
    alone = min(batch_size, len(examples)) == 1
    what = "a batch of 1 example" if alone else f"{len(examples)} examples that share their positives"
    raise UserError(
        f"{what} without hard negatives: no query meets a document to be told from its positive, so nothing can be "
        "learned; give more examples, a larger --batch-size or negatives (effir mine makes them)"
    )


def no_negatives(examples: Sequence[Example], keys: Tensor) -> Tensor:
    """Return which documents of a batch are no negatives of which query, ``(queries, documents)`` bool.

    That is a document with the text of one of the query's known positives, or its own; and one that occurs before.

    Args:
        examples: With the queries.
        keys: ``(documents,)`` int64, the ``document_key`` of each document of the batch, on whatever device it is.
    """
    known = [torch.tensor(own_keys(example), device=keys.device) for example in examples]
    return torch.stack([torch.isin(keys, query_keys) for query_keys in known]) | repeated_keys(keys)


def own_keys(example: Example) -> list[int]:
    """Return the keys of texts that are no negatives of an example's query: its positives, and itself."""
    return [*example.known, document_key(example.query)]


def repeated_keys(keys: Tensor) -> Tensor:
    """Return which keys occur before, ``(keys,)`` bool: documents that another device has, too, count once."""
    first = (keys.unsqueeze(0) == keys.unsqueeze(1)).int().argmax(dim=1)
    return first < torch.arange(len(keys), device=keys.device)
