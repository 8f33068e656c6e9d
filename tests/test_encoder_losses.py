"""Losses of the encoder methods, MiniLM's, TinyBERT's and DistilBERT's: by hand, invariants, padding, gradients."""

import math

import pytest
import torch
from torch import Tensor

from dqbart.distill import losses

S, T = torch.tensor([[1.0, 2, 3]]), torch.tensor([[1.0, 0, 2]])


def value(loss: Tensor) -> float:
    assert loss.shape == () and loss.dtype == torch.float32
    return float(loss.detach())


def test_goldens() -> None:
    assert value(losses.soft_cross_entropy(S, T)) == pytest.approx(0.987093, abs=1e-6)
    assert value(losses.soft_cross_entropy(S, T)) / 3 == pytest.approx(0.329031, abs=1e-6)  # released: mean of classes
    assert value(losses.soft_cross_entropy(T, T)) == pytest.approx(0.832396, abs=1e-6)  # the teacher's entropy
    assert value(losses.soft_cross_entropy(S.repeat(3, 1), T.repeat(3, 1))) == pytest.approx(0.987093, abs=1e-6)
    eye, tall, ones = torch.eye(2)[None], torch.tensor([[[1.0], [0]]]), torch.ones(1, 2, dtype=torch.bool)
    assert value(losses.relation_kl(tall, eye, ones, 1)) == pytest.approx(0.033976, abs=1e-6)
    student, teacher = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 1], [2, 2]]])
    assert value(losses.hidden_cosine(student, teacher, ones)) == pytest.approx(1 - 1 / math.sqrt(2), abs=1e-6)
    aligned, crossed = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[2.0, 0], [3, 0]]])
    assert value(losses.hidden_cosine(aligned, crossed, ones)) == pytest.approx(0.5, abs=1e-6)  # 0 and 1


@pytest.mark.parametrize("heads", [1, 2, 6])
def test_equal_models_give_zero_and_rotations_change_nothing(heads: int) -> None:
    """Relations see angles within a relation head: an orthogonal matrix on each one is invisible."""
    torch.manual_seed(heads)
    x, y, mask = torch.randn(2, 5, 12), torch.randn(2, 5, 12), torch.ones(2, 5, dtype=torch.bool)
    assert abs(value(losses.relation_kl(x, x, mask, heads))) < 1e-6
    q, k = torch.randn(2, heads, 5, 4), torch.randn(2, heads, 5, 4)
    assert abs(value(losses.attention_kl((q, k), (q, k), mask))) < 1e-6
    assert abs(value(losses.hidden_cosine(x, 3 * x, mask))) < 1e-6
    rotation = torch.block_diag(*(torch.linalg.qr(torch.randn(12 // heads, 12 // heads))[0] for _ in range(heads)))
    before = value(losses.relation_kl(y, x, mask, heads))
    assert before > 0.01
    assert value(losses.relation_kl(y @ rotation, x, mask, heads)) == pytest.approx(before, rel=1e-4)
    assert value(losses.relation_kl(y, x @ rotation, mask, heads)) == pytest.approx(before, rel=1e-4)


def test_relations_by_the_definition() -> None:
    """Other widths and head counts than the teacher's; the teacher leads."""
    torch.manual_seed(0)
    student, teacher, mask = torch.randn(1, 4, 6), torch.randn(1, 4, 10), torch.ones(1, 4, dtype=torch.bool)
    total = 0.0
    for head in range(2):
        ours, theirs = student[0, :, head * 3 : head * 3 + 3], teacher[0, :, head * 5 : head * 5 + 5]
        p, q = (theirs @ theirs.T / 5**0.5).softmax(1), (ours @ ours.T / 3**0.5).softmax(1)
        total += float((p * (p / q).log()).sum())
    assert value(losses.relation_kl(student, teacher, mask, 2)) == pytest.approx(total / (2 * 4), rel=1e-5)
    q_s, k_s, q_t, k_t = (torch.randn(1, 2, 4, d) for d in (3, 3, 5, 5))
    p, q = (q_t @ k_t.mT / 5**0.5).softmax(-1), (q_s @ k_s.mT / 3**0.5).softmax(-1)
    want = float((p * (p / q).log()).sum()) / (2 * 4)
    assert value(losses.attention_kl((q_s, k_s), (q_t, k_t), mask)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("garbage", [0.0, 1e4, -3.0])
def test_padding_and_batch_mates_change_nothing(garbage: float) -> None:
    """A long and a short example: the mean of what each gives alone, whatever stands in the padding."""
    torch.manual_seed(1)
    x, y, mask = (
        torch.randn(2, 5, 8),
        torch.randn(2, 5, 12),
        torch.tensor([[True] * 5, [True, True, False, False, False]]),
    )
    q, k, q_t, k_t = (torch.randn(2, 4, 5, d) for d in (2, 2, 3, 3))
    for z in (x, y):
        z[~mask] = garbage
    for z in (q, k, q_t, k_t):
        z.transpose(1, 2)[~mask] = garbage

    def both(i: slice, length: int) -> tuple[float, float]:
        ones = torch.ones(1, length, dtype=torch.bool)
        cut = [z[i, :, :length] for z in (q, k, q_t, k_t)]
        return (
            value(losses.relation_kl(x[i, :length], y[i, :length], ones, 4)),
            value(losses.attention_kl((cut[0], cut[1]), (cut[2], cut[3]), ones)),
        )

    alone = [both(slice(0, 1), 5), both(slice(1, 2), 2)]
    assert value(losses.relation_kl(x, y, mask, 4)) == pytest.approx((alone[0][0] + alone[1][0]) / 2, rel=1e-5)
    assert value(losses.attention_kl((q, k), (q_t, k_t), mask)) == pytest.approx(
        (alone[0][1] + alone[1][1]) / 2, rel=1e-5
    )
    wide = y[..., :8]
    want = value(losses.hidden_cosine(x[mask][None], wide[mask][None], torch.ones(1, 7, dtype=torch.bool)))
    assert value(losses.hidden_cosine(x, wide, mask)) == pytest.approx(want, rel=1e-5)


def test_gradients_of_real_positions_only() -> None:
    torch.manual_seed(2)
    mask = torch.tensor([[True, True, True, False]])
    teacher = torch.randn(1, 4, 6)
    x = torch.randn(1, 4, 4, requires_grad=True)
    losses.relation_kl(x, teacher, mask, 2).backward()
    assert x.grad is not None and bool(x.grad[mask].abs().min() > 0) and not x.grad[~mask].any()
    step = 1e-2 * x.grad / x.grad.norm()
    with torch.no_grad():
        slope = losses.relation_kl(x + step, teacher, mask, 2) - losses.relation_kl(x - step, teacher, mask, 2)
    assert float(slope) == pytest.approx(2 * 1e-2 * float(x.grad.norm()), rel=1e-2)
    empty = torch.zeros(1, 4, dtype=torch.bool)
    assert value(losses.relation_kl(x, teacher, empty, 2)) == 0


def test_what_does_not_fit_is_refused() -> None:
    x, mask = torch.randn(1, 3, 12), torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(
        ValueError, match=r"5 relation heads don't divide the student's width 12: expected such as \[1, 2, 3"
    ):
        losses.relation_kl(x, x, mask, 5)
    with pytest.raises(ValueError, match="don't divide the teacher's width 10"):
        losses.relation_kl(x, x[..., :10], mask, 4)
    q, other = torch.randn(1, 2, 3, 4), torch.randn(1, 3, 3, 4)
    with pytest.raises(ValueError, match="student with 2 heads, teacher with 3: .* relations .* don't"):
        losses.attention_kl((q, q), (other, other), mask)


def test_sentences_of_another_width_keep_their_angles() -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 8)
    assert value(losses.sentence_gap(x, 3 * x)) == pytest.approx(0, abs=1e-6)
    assert value(losses.sentence_gap(x, -x)) == pytest.approx(2, abs=1e-6)
    wide = torch.linalg.qr(torch.randn(12, 12))[0][:8]  # 8 orthogonal directions of 12: no angle changes
    assert value(losses.sentence_gap(x, x @ wide)) == pytest.approx(0, abs=1e-6)
    pair = torch.tensor([[1.0, 0], [0, 1]]), torch.tensor([[1.0, 0, 0], [1, 0, 0]])
    assert value(losses.sentence_gap(*pair)) == pytest.approx(0.5)  # two of four cosines are off by one
