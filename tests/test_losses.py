"""Each loss against numbers worked out by hand, and against padding."""

import math

import pytest
import torch
from torch import Tensor

from dqbart.distill import losses

S = torch.tensor([[[1.0, 2, 3]]])  # student logits [1, 1, 3]
T = torch.tensor([[[1.0, 0, 2]]])
ONE = torch.ones(1, 1, dtype=torch.bool)


def value(loss: Tensor) -> float:
    assert loss.shape == () and loss.dtype == torch.float32
    return float(loss.detach())


def test_goldens() -> None:
    assert value(losses.logits_kl(S, T, ONE)) == pytest.approx(0.154698, abs=1e-6)
    assert value(losses.logits_kl(S, T, ONE, 2.0)) == pytest.approx(0.241745, abs=1e-6)
    assert value(losses.logits_mse(S, T, ONE)) == pytest.approx(1.666667, abs=1e-6)
    assert value(losses.paper_mse(S, T)) == pytest.approx(1.666667, abs=1e-6)
    assert value(losses.hidden_mse(S, T, ONE)) == pytest.approx(1.666667, abs=1e-6)
    four = S.expand(4, 1, 3), T.expand(4, 1, 3)
    assert value(losses.paper_last_hidden(*four)) == pytest.approx(4 * 1.666667, abs=1e-5)
    # cross-entropy of class 2 under softmax([1, 2, 3])
    expected = math.log(math.e + math.e**2 + math.e**3) - 3
    assert value(losses.task_loss(S, torch.tensor([[2]]))) == pytest.approx(expected, abs=1e-6)
    smooth = 0.7 * expected + 0.3 * (expected + 1)  # the mean over classes is 1 higher
    assert value(losses.task_loss(S, torch.tensor([[2]]), 0.3)) == pytest.approx(smooth, abs=1e-6)


def test_kl_is_not_symmetric() -> None:
    """The teacher leads: KL(teacher || student)."""
    p, q = T[0, 0].softmax(0), S[0, 0].softmax(0)
    assert value(losses.logits_kl(S, T, ONE)) == pytest.approx(float((p * (p / q).log()).sum()), abs=1e-6)
    assert value(losses.logits_kl(T, S, ONE)) == pytest.approx(float((q * (q / p).log()).sum()), abs=1e-6)


def test_attention_by_hand() -> None:
    student = torch.tensor([[[[0.5, 0.5], [1.0, 0.0]], [[0.0, 1.0], [0.25, 0.75]]]])  # B1 H2 Q2 K2
    teacher = torch.zeros_like(student)
    yes, half = torch.tensor([[True, True]]), torch.tensor([[True, False]])
    squares = student.square()
    assert value(losses.attention_mse(student, teacher, yes, yes)) == pytest.approx(float(squares.mean()))
    assert value(losses.attention_mse(student, teacher, half, yes)) == pytest.approx(float(squares[:, :, 0].mean()))
    assert value(losses.attention_mse(student, teacher, half, half)) == pytest.approx(float(squares[:, :, 0, 0].mean()))
    assert value(losses.attention_mse(student, teacher, yes, half)) == pytest.approx(float(squares[..., 0].mean()))


@pytest.mark.parametrize("garbage", [0.0, 1e4, -3.0])
def test_padding_changes_nothing(garbage: float) -> None:
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    labels = torch.where(mask, torch.tensor([[1, 4, 0], [3, 0, 0]]), -100)
    picked = student[mask].unsqueeze(0), teacher[mask].unsqueeze(0), torch.ones(1, 4, dtype=torch.bool)
    wide = [torch.nn.functional.pad(x, (0, 0, 0, 4), value=garbage) for x in (student, teacher)]
    wide_mask = torch.nn.functional.pad(mask, (0, 4))
    for loss in (losses.logits_kl, losses.logits_mse, losses.hidden_mse):
        expected = value(loss(*picked))
        assert value(loss(student, teacher, mask)) == pytest.approx(expected, rel=1e-5)
        wide[0][0, -1] = 1e5  # whatever stands in the padding
        assert value(loss(wide[0], wide[1], wide_mask)) == pytest.approx(expected, rel=1e-5)
    expected = value(losses.task_loss(student, labels, 0.1))
    wide_labels = torch.nn.functional.pad(labels, (0, 4), value=-100)
    assert value(losses.task_loss(wide[0], wide_labels, 0.1)) == pytest.approx(expected, rel=1e-5)
    maps = torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3)
    expected = value(losses.attention_mse(*maps, mask, mask))
    wide_maps = [torch.nn.functional.pad(x, (0, 2, 0, 4), value=garbage) for x in maps]
    assert value(losses.attention_mse(*wide_maps, wide_mask, wide_mask[:, :5])) == pytest.approx(expected, rel=1e-5)


def test_the_same_twice_is_the_same() -> None:
    torch.manual_seed(1)
    student, teacher = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    for loss in (losses.logits_kl, losses.logits_mse, losses.hidden_mse):
        twice = loss(student.repeat(2, 1, 1), teacher.repeat(2, 1, 1), mask.repeat(2, 1))
        assert value(twice) == pytest.approx(value(loss(student, teacher, mask)), rel=1e-6)
        assert value(loss(student, student, mask)) == 0
    maps = torch.rand(2, 2, 3, 3), torch.rand(2, 2, 3, 3)
    assert value(
        losses.attention_mse(
            maps[0].repeat(2, 1, 1, 1), maps[1].repeat(2, 1, 1, 1), mask.repeat(2, 1), mask.repeat(2, 1)
        )
    ) == pytest.approx(value(losses.attention_mse(*maps, mask, mask)), rel=1e-6)


def test_nothing_but_padding_is_zero_and_not_nan() -> None:
    none = torch.zeros(1, 1, dtype=torch.bool)
    for loss in (losses.logits_kl, losses.logits_mse, losses.hidden_mse):
        student = S.clone().requires_grad_(True)
        result = loss(student, T, none)
        result.backward()
        assert value(result) == 0 and student.grad is not None and not student.grad.any()
    assert value(losses.attention_mse(torch.rand(1, 2, 1, 1), torch.rand(1, 2, 1, 1), none, none)) == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32(dtype: torch.dtype) -> None:
    student, teacher = torch.full((4, 100, 50), 60.0, dtype=dtype), torch.zeros(4, 100, 50, dtype=dtype)
    mask = torch.ones(4, 100, dtype=torch.bool)
    assert value(losses.logits_mse(student, teacher, mask)) == pytest.approx(3600)
    assert value(losses.hidden_mse(student, teacher, mask)) == pytest.approx(3600)
    assert value(losses.paper_mse(student, teacher)) == pytest.approx(3600)
    assert value(losses.logits_kl(student, teacher, mask)) == pytest.approx(0, abs=1e-5)
    labels = torch.zeros(4, 100, dtype=torch.long)
    assert value(losses.task_loss(student, labels)) == pytest.approx(math.log(50), rel=1e-5)


def test_kl_survives_extreme_logits() -> None:
    student = torch.tensor([[[1e4, -1e4, 0.0]]], requires_grad=True)
    loss = losses.logits_kl(student, torch.tensor([[[-1e4, 1e4, 0.0]]]), ONE)
    loss.backward()
    assert value(loss.detach()) == pytest.approx(2e4) and student.grad is not None and student.grad.isfinite().all()
