"""Learning from examples: a batch of queries with their documents to a loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from effir_search.encoding.config import scale
from effir_search.encoding.encoder import Encoder
from effir_search.settings import LossSettings
from effir_search.text.examples import Example, document_key
from effir_search.training.gathering import gathered, process_rank
from effir_search.training.in_batch_negatives import check_examples, no_negatives, repeated_keys
from effir_search.training.losses import (
    contrastive_loss,
    distillation_loss,
)
from effir_search.training.objective import Objective


class RetrievalObjective(Objective):
    """InfoNCE over positives and negatives of the batch, and KL from a teacher's scores.

    The scores are those of a query's own candidates, where examples have them; or, with a teacher that runs beside,
    its similarities of every query and every document of the batch, the query's positives among them.

    Args:
        encoder: The student.
        settings: See ``LossSettings``.
        teacher: A bi-encoder for ``distill_over`` "batch"; None = the examples' scores.
        alone: See ``Objective``.
    """

    def __init__(
        self, encoder: Encoder, settings: LossSettings, teacher: Encoder | None = None, *, alone: bool = False
    ) -> None:
        super().__init__(encoder, settings, alone=alone)
        self.teacher = teacher

    def check(self, dataset: Sequence[Example], batch_size: int) -> None:
        """Raise ValueError if nothing can be learned from batches of this size; see ``check_examples``."""
        check_examples(dataset, batch_size, self.settings)

    def forward(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """Return the loss of a batch and its terms, each a scalar.

        Every document of the batch, on whatever device, is a negative of every query, but for a document with
        the text of one of its known positives, or its own.
        """
        config = self.encoder.config
        texts = list(dict.fromkeys(text for example in examples for text in _candidates(example)))
        column = {text: number for number, text in enumerate(texts)}
        queries = self.embed_texts([example.query for example in examples], config.query_prompt)
        documents = self.embed_texts(texts, config.document_prompt)
        teacher = self._teacher_vectors([example.query for example in examples], texts)
        # Similarities are float32 whatever the encoder computes in: a temperature of 0.02 makes much of small errors.
        with torch.autocast(self.encoder.device.type, enabled=False):
            return self._loss(examples, queries, documents, column, teacher)

    def _teacher_vectors(self, queries: Sequence[str], documents: Sequence[str]) -> tuple[Tensor, Tensor] | None:
        """Return the teacher's vectors of both, whose inner products are its scores; None without one."""
        if self.teacher is None:
            return None
        device, config = self.encoder.device, self.teacher.config
        with torch.autocast(device.type, enabled=False):
            both = self.teacher.encode_queries(queries), self.teacher.encode_documents(documents)
        query_vectors, document_vectors = (torch.from_numpy(scale(vectors, config)).to(device) for vectors in both)
        return query_vectors, document_vectors

    def _loss(
        self,
        examples: Sequence[Example],
        queries: Tensor,
        documents: Tensor,
        column: dict[str, int],
        teacher: tuple[Tensor, Tensor] | None,
    ) -> dict[str, Tensor]:
        """Return the loss of embeddings; ``column`` tells which row of ``documents`` a text is."""
        device, texts = documents.device, list(column)
        keys = torch.tensor([document_key(text) for text in texts], device=device)
        sizes = self._sizes(len(texts))
        all_documents, all_keys = gathered(documents, sizes), gathered(keys, sizes)
        start = sum(sizes[: process_rank()]) if len(sizes) > 1 else 0
        positives = torch.tensor([column[example.positive] for example in examples], device=device) + start
        repeated = repeated_keys(all_keys)
        left_out = no_negatives(examples, all_keys)
        if teacher is None:
            own, candidates, teacher_scores = _own_candidates(examples, column, device)
            own = own + start
        else:
            teacher_scores = teacher[0] @ gathered(teacher[1], sizes).T  # (queries, documents)
            own = torch.arange(len(all_keys), device=device).expand_as(teacher_scores)
            candidates = (~repeated).expand_as(teacher_scores)

        terms: dict[str, list[Tensor]] = {"contrastive": [], "distillation": []}
        settings = self.settings
        for query_part, document_part in zip(self.leading(queries), self.leading(all_documents), strict=True):
            scores = query_part @ document_part.T  # (queries, documents)
            terms["contrastive"].append(
                contrastive_loss(scores, positives, temperature=settings.temperature, left_out=left_out)
            )
            if teacher_scores is not None:
                terms["distillation"].append(
                    distillation_loss(
                        scores.gather(1, own),
                        teacher_scores,
                        temperature=settings.temperature,
                        teacher_temperature=settings.teacher_temperature,
                        candidates=candidates,
                    )
                )
        means = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        loss = settings.contrastive_weight * means["contrastive"]
        loss = loss + settings.distillation_weight * means.get("distillation", 0)
        return {"loss": loss, **means}


def _candidates(example: Example) -> list[str]:
    return [example.positive, *example.negatives]


def _own_candidates(
    examples: Sequence[Example], column: dict[str, int], device: torch.device
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return for each query its candidates' columns, which of them are real, and the teacher's scores, if any.

    All are ``(queries, candidates)``; shorter rows are filled up. A query without scores has its positive alone, whose
    divergence is 0.
    """
    own = [_candidates(example) if example.scores is not None else [example.positive] for example in examples]
    longest = max(map(len, own))
    columns = torch.zeros(len(own), longest, dtype=torch.int64)
    scores = torch.zeros(len(own), longest)
    real = torch.zeros(len(own), longest, dtype=torch.bool)
    for row, (texts, example) in enumerate(zip(own, examples, strict=True)):
        columns[row, : len(texts)] = torch.tensor([column[text] for text in texts])
        real[row, : len(texts)] = True
        if example.scores is not None:
            scores[row, : len(texts)] = torch.tensor(example.scores)
    has_scores = any(example.scores is not None for example in examples)
    return columns.to(device), real.to(device), scores.to(device) if has_scores else None
