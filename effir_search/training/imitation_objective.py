"""Learning without labels: a batch of texts, and a teacher that is imitated, to a loss."""

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from effir_search.encoding.encoder import Encoder, vectors
from effir_search.encoding.same_space import Space, learned_spaces, scaled_alike
from effir_search.errors import UserError
from effir_search.settings import LossSettings
from effir_search.training.gathering import gathered
from effir_search.training.losses import (
    embedding_loss,
    score_matrix_loss,
    token_loss,
)
from effir_search.training.objective import Objective
from effir_search.training.plain_texts import PlainText, encode_texts


class ImitationObjective(Objective):
    """Match a teacher's embeddings of any texts and its score matrix over the batch; no labels are needed.

    Embeddings are compared as a search does: by direction where the similarity is the cosine, else with their lengths,
    in units of the root mean square of the teacher's. A teacher with embeddings of another length is matched in its
    score matrix alone. One that reads the same tokens (``read_differently``) can be matched token by token, too, and
    then runs on the encoder's own batches.

    Args:
        encoder: The student.
        settings: See ``LossSettings``.
        teacher: What is imitated.
        alone: See ``Objective``.
    """

    def __init__(self, encoder: Encoder, settings: LossSettings, teacher: Encoder, *, alone: bool = False) -> None:
        super().__init__(encoder, settings, alone=alone)
        self.teacher = teacher
        self.by_token = bool(settings.token_weight) and read_differently(teacher, encoder) is None

    def spaces(self) -> list[Space]:
        """Return the teacher's space and those it shares, if its embeddings are what was matched, lengths included."""
        teacher, student = self.teacher, self.encoder
        if teacher.dimension != student.dimension or not scaled_alike(teacher.config, student.config):
            return []
        return learned_spaces(teacher, max(self.settings.dimensions, default=student.dimension))

    def check(self, dataset: Sequence[PlainText], batch_size: int) -> None:
        """Raise ValueError if nothing can be learned: a teacher of another dimension is matched in its scores alone."""
        if self.teacher.dimension == self.encoder.dimension:
            return
        sizes = f"{self.teacher.dimension} and {self.encoder.dimension}"
        reason = f"embeddings of teacher and encoder have {sizes} components"
        if not self.settings.score_weight:
            raise UserError(f"--score-weight 0: {reason}, so that score matrices are all that can be matched")
        if min(batch_size, len(dataset)) == 1:
            raise UserError(
                f"a batch of 1 text: {reason}, so that the similarities of a batch's texts are all that can be "
                "matched; give a larger --batch-size, or more texts"
            )

    def forward(self, texts: Sequence[str], queries: Sequence[bool]) -> dict[str, Tensor]:
        """Return the loss of a batch and its terms, each a scalar.

        Args:
            texts: Any texts.
            queries: Of each, whether it is a query; the others are documents.
        """
        config = self.encoder.config
        kinds = np.asarray(queries, dtype=bool)
        rows = [np.flatnonzero(kinds), np.flatnonzero(~kinds)]
        prompts = [config.query_prompt, config.document_prompt]
        if config.query_prompt == config.document_prompt:  # then all may share forward passes
            rows, prompts = [np.arange(len(texts))], prompts[:1]
        forward = self._embed_both if self.by_token else self._embed
        parts = [
            self._in_chunks([texts[row] for row in kind_rows], prompt, forward)
            for kind_rows, prompt in zip(rows, prompts, strict=True)
            if len(kind_rows)
        ]
        places = torch.from_numpy(np.argsort(np.concatenate(rows)))
        student, *teacher = (torch.cat(tensors)[places] for tensors in zip(*parts, strict=True))
        if not teacher:
            with torch.autocast(student.device.type, enabled=False):
                teacher = [torch.from_numpy(encode_texts(self.teacher, texts, queries)).to(student.device)]
        with torch.autocast(student.device.type, enabled=False):  # as in RetrievalObjective
            return self._loss(student, *teacher)

    def _embed_both(self, batch: dict[str, Tensor], prompt_length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return the embeddings, the teacher's, and of each text how far its tokens' states are from the teacher's.

        The teacher's states are as large as the encoder's, and under ``cached`` are made twice rather than kept.
        """
        mask = batch["attention_mask"]
        states = self.encoder.model(**batch).last_hidden_state.float()
        with torch.no_grad(), torch.autocast(self.encoder.device.type, enabled=False):
            teacher_states = self.teacher.model(**batch).last_hidden_state.float()
        student, teacher = (
            vectors(hidden_states, mask, encoder.config, head=encoder.head, prompt_length=prompt_length)
            for hidden_states, encoder in ((states, self.encoder), (teacher_states, self.teacher))
        )
        return student, teacher, token_loss(states, teacher_states, mask)

    def _loss(self, student: Tensor, teacher: Tensor, away: Tensor | None = None) -> dict[str, Tensor]:
        sizes = self._sizes(len(student))
        student_all, teacher_all = gathered(student, sizes), gathered(teacher, sizes)
        if compares_directions(self.teacher, self.encoder):
            teacher, teacher_all = F.normalize(teacher, dim=-1), F.normalize(teacher_all, dim=-1)
        unit = teacher_all.square().sum(dim=-1).mean().sqrt()
        teacher, teacher_all = teacher / unit, teacher_all / unit
        if self.encoder.config.similarity == "dot":
            student, student_all = student / unit, student_all / unit
        terms: dict[str, list[Tensor]] = {"embedding": [], "scores": []}
        same_size = teacher.shape[1] == student.shape[1]
        targets = self.leading(teacher) if same_size else itertools.repeat(None)
        for part, part_all, target in zip(self.leading(student), self.leading(student_all), targets, strict=same_size):
            if target is not None:
                terms["embedding"].append(embedding_loss(part, target))
            terms["scores"].append(score_matrix_loss(part, part_all, teacher, teacher_all))
        means = {name: torch.stack(values).mean() for name, values in terms.items() if values}
        loss = means.get("embedding", 0) + self.settings.score_weight * means["scores"]
        if away is not None:
            means["tokens"] = away.mean()
            loss = loss + self.settings.token_weight * means["tokens"]
        return {"loss": loss, **means}


def compares_directions(teacher: Encoder, encoder: Encoder) -> bool:
    """Return whether only the directions of a teacher's embeddings count for an encoder that imitates it."""
    return "cosine" in (teacher.config.similarity, encoder.config.similarity)


def read_differently(teacher: Encoder, encoder: Encoder) -> str | None:
    """Return the first thing by which two encoders make unlike states of a text's tokens; None if there is none."""
    if teacher.model.config.hidden_size != encoder.model.config.hidden_size:
        return "hidden size"
    if teacher.tokenizer.get_vocab() != encoder.tokenizer.get_vocab():
        return "vocabulary"
    if teacher.tokenizer("")["input_ids"] != encoder.tokenizer("")["input_ids"]:
        return "special tokens"
    names = ("query_prompt", "document_prompt", "include_prompt", "max_length")
    return next((name for name in names if getattr(teacher.config, name) != getattr(encoder.config, name)), None)
