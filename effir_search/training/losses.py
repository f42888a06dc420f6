"""The losses of fine-tuning, as functions of embeddings and scores."""

import torch
from torch import Tensor
from torch.nn import functional as F


def contrastive_loss(
    scores: Tensor, positives: Tensor, *, temperature: float, left_out: Tensor | None = None
) -> Tensor:
    """Return InfoNCE: the cross-entropy of each query's positive among the documents, mean over queries, in nats.

    Source: van den Oord, Li, Vinyals, arXiv 1807.03748, equation 4; as in EffiR with one positive a query.

    Args:
        scores: ``(queries, documents)`` similarities.
        positives: ``(queries,)`` int64, the column of each query's positive.
        temperature: What scores are divided by, above 0.
        left_out: ``(queries, documents)`` bool, True = no negative of this query; a positive stays in whatever it says.
    """
    logits = scores / temperature
    if left_out is not None:
        own = torch.zeros_like(left_out).scatter_(1, positives.unsqueeze(1), True)
        logits = logits.masked_fill(left_out & ~own, -torch.inf)
    return F.cross_entropy(logits, positives)


def distillation_loss(
    student_scores: Tensor,
    teacher_scores: Tensor,
    *,
    temperature: float,
    teacher_temperature: float,
    candidates: Tensor | None = None,
) -> Tensor:
    """Return KL(teacher || student) over each query's own candidates, mean over queries, in nats.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531; EffiR distils a reranker's scores so.

    Args:
        student_scores: ``(queries, candidates)`` similarities.
        teacher_scores: ``(queries, candidates)``; no gradient flows into them.
        temperature: What the student's scores are divided by, above 0.
        teacher_temperature: What the teacher's are divided by, above 0.
        candidates: ``(queries, candidates)`` bool, True = a candidate, at least one a row; None = all are.
    """
    student, teacher = student_scores / temperature, teacher_scores.detach() / teacher_temperature
    if candidates is None:
        candidates = torch.ones_like(student, dtype=torch.bool)
    student = student.masked_fill(~candidates, -torch.inf).log_softmax(dim=-1)
    teacher = teacher.masked_fill(~candidates, -torch.inf).log_softmax(dim=-1)
    # 0 * (-inf - -inf) would be NaN, also in the gradient, so what is no candidate is left out before the product.
    difference = (teacher - student).masked_fill(~candidates, 0)
    return (teacher.exp() * difference).sum(dim=-1).mean()


def embedding_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Return half the squared distance of each text's two embeddings, mean over texts.

    Of embeddings of length 1 that is 1 - cosine. Both are ``(texts, dimension)``; no gradient flows into the teacher's.
    """
    return (student - teacher.detach()).square().sum(dim=-1).mean() / 2


def token_loss(student: Tensor, teacher: Tensor, attention_mask: Tensor) -> Tensor:
    """Return for each text 1 - cosine of each token's two states, the mean over its real tokens, ``(texts,)``.

    Source: Jiao et al. (TinyBERT), arXiv 1909.10351, matching of hidden states, with 1 - cosine as the distance.

    Args:
        student: ``(texts, seq, hidden_size)``.
        teacher: The same; no gradient flows into it.
        attention_mask: ``(texts, seq)``, 1 = real token; at least one in each row.
    """
    away = 1 - F.cosine_similarity(student, teacher.detach(), dim=-1)  # (texts, seq)
    return (away * attention_mask).sum(dim=1) / attention_mask.sum(dim=1)


def score_matrix_loss(student: Tensor, student_all: Tensor, teacher: Tensor, teacher_all: Tensor) -> Tensor:
    """Return the mean squared difference of two models' inner products between texts.

    Args:
        student: ``(texts, dimension)``.
        student_all: ``(all, dimension)``, what these texts are compared with: themselves, or those of all devices.
        teacher: ``(texts, teacher_dimension)``; no gradient flows into it.
        teacher_all: ``(all, teacher_dimension)``.
    """
    return F.mse_loss(student @ student_all.T, (teacher @ teacher_all.T).detach())
