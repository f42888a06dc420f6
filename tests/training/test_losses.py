import math

import pytest
import torch
from torch.nn import functional as F

from effir_search.training.losses import (
    contrastive_loss,
    distillation_loss,
    embedding_loss,
    score_matrix_loss,
    token_loss,
)


def test_the_contrastive_loss_is_the_cross_entropy_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.4]])
    found = contrastive_loss(scores, torch.tensor([0, 2]), temperature=0.5)
    # Scores over 0.5: 1.8, 0.2, 1.0 and 0.4, 0.6, 0.8; minus the positive's, plus the log of the sum of exponentials.
    first = -1.8 + math.log(math.exp(1.8) + math.exp(0.2) + math.exp(1.0))
    second = -0.8 + math.log(math.exp(0.4) + math.exp(0.6) + math.exp(0.8))
    assert found.item() == pytest.approx((first + second) / 2, rel=1e-6)


def test_what_is_left_out_is_no_negative():
    scores = torch.tensor([[0.9, 0.1, 0.5]])
    left_out = torch.tensor([[False, False, True]])
    found = contrastive_loss(scores, torch.tensor([0]), temperature=1.0, left_out=left_out)
    assert found.item() == pytest.approx(-0.9 + math.log(math.exp(0.9) + math.exp(0.1)), rel=1e-6)


def test_a_positive_stays_in_even_where_it_is_left_out():
    scores = torch.tensor([[0.9, 0.1]])
    found = contrastive_loss(scores, torch.tensor([0]), temperature=1.0, left_out=torch.tensor([[True, True]]))
    assert found.item() == 0


def test_the_distillation_loss_is_the_divergence_by_hand():
    # The teacher's softmax is (3/4, 1/4), the student's (1/2, 1/2).
    teacher = torch.tensor([[2 * math.log(3), 0.0]])
    student = torch.tensor([[0.7, 0.7]])
    found = distillation_loss(student, teacher, temperature=0.02, teacher_temperature=2.0)
    assert found.item() == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5), rel=1e-5)


def test_the_divergence_from_itself_is_zero_whatever_the_temperature():
    scores = torch.randn(4, 5)
    assert distillation_loss(scores * 3, scores, temperature=3.0, teacher_temperature=1.0).item() == pytest.approx(
        0, abs=1e-6
    )


def test_what_is_no_candidate_does_not_count_and_gets_no_gradient():
    torch.manual_seed(0)
    student, teacher = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    candidates = torch.tensor([[True, True, True, False], [True, False, False, False], [True, True, False, False]])
    found = distillation_loss(student, teacher, temperature=0.5, teacher_temperature=2.0, candidates=candidates)
    rows = [
        F.kl_div(F.log_softmax(s[m] / 0.5, -1), F.log_softmax(t[m] / 2.0, -1), reduction="sum", log_target=True)
        for s, t, m in zip(student, teacher, candidates, strict=True)
    ]
    torch.testing.assert_close(found, torch.stack(rows).mean())
    found.backward()
    assert student.grad.isfinite().all()
    assert (student.grad[~candidates] == 0).all()


def test_the_losses_of_imitation_by_hand():
    student = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    teacher = torch.tensor([[1.0, 0.0], [2.0, 0.0]])
    assert embedding_loss(student, teacher).item() == pytest.approx(((4 + 16) / 2 + 1 / 2) / 2)
    # The student's products are 25, 3, 3, 1, the teacher's 1, 2, 2, 4.
    assert score_matrix_loss(student, student, teacher, teacher).item() == pytest.approx((24**2 + 1 + 1 + 3**2) / 4)
    unit = student / torch.tensor([[5.0], [1.0]]), teacher / torch.tensor([[1.0], [2.0]])
    assert embedding_loss(*unit).item() == pytest.approx((0.4 + 0) / 2)  # cosines 0.6 and 1


def test_a_teacher_gets_no_gradient():
    teacher = torch.randn(2, 3, requires_grad=True)
    student = torch.randn(2, 3, requires_grad=True)
    (embedding_loss(student, teacher) + score_matrix_loss(student, student, teacher, teacher)).backward()
    assert teacher.grad is None


def test_token_loss_is_a_mean_over_real_tokens():
    teacher = torch.tensor([[[1.0, 0], [0, 1], [1, 0]], [[1, 0], [1, 0], [1, 0]]])
    student = torch.tensor([[[2.0, 0], [3, 0], [-1, 0]], [[1, 1], [0, 0], [0, 0]]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    # The first text's real tokens have cosines 1 and 0; the second's one token has 1 / sqrt(2).
    expected = torch.tensor([0.5, 1 - 2**-0.5])
    torch.testing.assert_close(token_loss(student, teacher, mask), expected)
