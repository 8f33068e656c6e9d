"""The loss of attention maps that are never made, interpreted where there is no GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.attention_mse import attention_mse, attention_mse_reference  # noqa: E402

from dqbart.distill import losses  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
Pair = tuple[Tensor, Tensor]


def made(b: int, h: int, queries: int, keys: int, d: int, e: int, seed: int = 0) -> tuple[Pair, Pair]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [(queries, d), (keys, d), (queries, e), (keys, e)]
    # as projections give them: [B, L, H, D] in memory
    q, k, r, s = (torch.randn(b, n, h, w, generator=generator).to(DEVICE).transpose(1, 2) * 2 for n, w in sizes)
    return (q, k), (r, s)


def mask_of(lengths: list[int], size: int) -> Tensor:
    return torch.arange(size, device=DEVICE) < torch.tensor(lengths, device=DEVICE)[:, None]


def loss_and_gradients(
    function: object, student: Pair, teacher: Pair, *more: object, double: bool = False
) -> list[Tensor]:
    convert = (lambda x: x.detach().double()) if double else (lambda x: x.detach().clone())
    q, k = (convert(x).requires_grad_() for x in student)
    loss = function((q, k), tuple(convert(x) for x in teacher), *more)  # type: ignore[operator]
    (loss * 3).backward()
    assert q.grad is not None and k.grad is not None
    return [loss.detach(), q.grad, k.grad]


# batch, heads, queries, keys, student's and teacher's width, real queries, real keys, causal
CASES = {
    "one of everything": (1, 1, 1, 1, 1, 1, [1], [1], False),
    "odd": (2, 3, 7, 13, 5, 8, [7, 2], [13, 1], False),
    "two tiles": (1, 2, 67, 70, 16, 24, [66], [65], False),
    "causal": (2, 2, 9, 9, 8, 8, [9, 4], [9, 4], True),
    "causal tiles": (1, 1, 130, 130, 8, 16, [129], [129], True),
    "no query": (2, 1, 5, 6, 8, 8, [0, 0], [6, 6], False),
    "an empty example": (2, 2, 5, 6, 8, 8, [5, 0], [6, 0], False),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_loss_and_gradients_in_double(case: tuple) -> None:
    *sizes, queries, keys, causal = case
    student, teacher = made(*sizes)
    more = (mask_of(queries, sizes[2]), mask_of(keys, sizes[3]), sizes[4] ** -0.5, 0.3, causal)
    found = loss_and_gradients(attention_mse, student, teacher, *more)
    want = loss_and_gradients(attention_mse_reference, student, teacher, *more, double=True)
    for a, b in zip(found, want, strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a.double(), b, rtol=2e-4, atol=float(b.abs().max()) * 1e-5)
    assert found[1].stride() == student[0].stride() or min(sizes) == 1
    assert bool(want[0] > 0) == (sum(queries) > 0 and sizes[3] > 1)


def test_the_reference_is_the_loss_of_maps() -> None:
    """losses.attention_mse of softmaxes with additive masks, which is what students are trained with."""
    for causal in (False, True):
        student, teacher = made(2, 3, 6, 6, 8, 4)
        real = mask_of([6, 4], 6)
        hidden = ~real[:, None, None, :].expand(2, 1, 6, 6)
        if causal:
            hidden = hidden | torch.ones(6, 6, dtype=torch.bool, device=DEVICE).triu(1)
        maps = [
            (q @ k.mT * s).masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
            for (q, k), s in ((student, 0.4), (teacher, 0.5))
        ]
        want = losses.attention_mse(maps[0], maps[1], real, real)
        torch.testing.assert_close(attention_mse_reference(student, teacher, real, real, 0.4, 0.5, causal), want)


def test_holes_in_masks_and_garbage_behind_them() -> None:
    student, teacher = made(1, 2, 6, 9, 8, 8)
    query_mask = torch.tensor([[True, False, True, True, False, True]], device=DEVICE)
    key_mask = torch.tensor([[False, True, True, False, True, True, True, False, True]], device=DEVICE)
    more = (query_mask, key_mask, 0.3, 0.3)
    want = loss_and_gradients(attention_mse_reference, student, teacher, *more)
    for q, k in (student, teacher):
        q[:, :, ~query_mask[0]], k[:, :, ~key_mask[0]] = torch.nan, torch.inf
    found = loss_and_gradients(attention_mse, student, teacher, *more)
    for a, b in zip(found, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-7)
    assert not found[1][:, :, ~query_mask[0]].any() and not found[2][:, :, ~key_mask[0]].any()


def test_extremes_and_twins() -> None:
    student, teacher = made(1, 2, 5, 70, 8, 8)
    real = mask_of([5], 5), mask_of([70], 70)
    assert attention_mse(student, student, *real, 0.3, 0.3) == 0
    large = tuple(x * 1e3 for x in student)  # one-hot rows
    found = loss_and_gradients(attention_mse, large, teacher, *real, 0.3, 0.3)
    want = loss_and_gradients(attention_mse_reference, large, teacher, *real, 0.3, 0.3, double=True)
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-4, atol=0)
    assert all(x.isfinite().all() for x in found)
    for model in (student, teacher):
        q = model[0].clone()
        q[0, 1, 2, 3] = torch.nan
        pair = (q, model[1])
        assert attention_mse(*((pair, teacher) if model is student else (student, pair)), *real, 0.3, 0.3).isnan()
    with torch.no_grad():
        assert not attention_mse(student, teacher, *real, 0.3, 0.3).requires_grad
    only_k = student[0], student[1].clone().requires_grad_()
    attention_mse(only_k, teacher, *real, 0.3, 0.3).backward()
    assert only_k[1].grad is not None and student[0].grad is None


# The interpreter multiplies the bits of bf16, not what they stand for.
@pytest.mark.parametrize("dtype", [torch.float16] + [torch.bfloat16] * torch.cuda.is_available())
def test_half_precision(dtype: torch.dtype) -> None:
    student, teacher = ((q.to(dtype), k.to(dtype)) for q, k in made(1, 2, 9, 20, 8, 8))
    more = (mask_of([9], 9), mask_of([20], 20), 0.3, 0.3)
    found = loss_and_gradients(attention_mse, student, teacher, *more)
    want = loss_and_gradients(attention_mse_reference, student, teacher, *more, double=True)
    assert found[0].dtype == torch.float32 and found[1].dtype == found[2].dtype == dtype
    torch.testing.assert_close(found[0].double(), want[0], rtol=1e-4, atol=0)
    for a, b in zip(found[1:], want[1:], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=0.03, atol=float(b.abs().max()) * 0.02)


def test_refusals() -> None:
    student, teacher = made(2, 3, 4, 5, 8, 6)
    real = mask_of([4, 4], 4), mask_of([5, 5], 5)
    wide = torch.zeros(2, 3, 4, 257, device=DEVICE), torch.zeros(2, 3, 5, 257, device=DEVICE)
    for arguments, words in (
        (
            (student, (teacher[0][:, :2], teacher[1][:, :2]), *real),
            r"teacher's queries \[2, 2, 4, 6\]: expected \[2, 3, 4",
        ),
        ((student, (teacher[0], student[1]), *real), r"teacher's keys \[2, 3, 5, 8\]: expected \[2, 3, 5, up to 256"),
        ((wide, teacher, *real), r"student's queries \[2, 3, 4, 257\]: expected"),
        (((student[0][0], student[1]), teacher, *real), r"student's queries \[3, 4, 8\]: expected"),
        (((student[0], student[1].half()), teacher, *real), "student's keys torch.float16: expected fp32"),
        ((student, teacher, real[0].int(), real[1]), r"mask of queries torch.int32 \[2, 4\]: expected bool \[2, 4\]"),
        ((student, teacher, real[0], real[0]), r"mask of keys torch.bool \[2, 4\]: expected bool \[2, 5\]"),
    ):
        with pytest.raises(ValueError, match=words):
            attention_mse(*arguments, 0.3, 0.3)
    with pytest.raises(ValueError, match="causal attention of 4 queries to 5 keys: expected as many"):
        attention_mse(student, teacher, *real, 0.3, 0.3, True)
    assert attention_mse(*made(0, 3, 4, 5, 8, 6), real[0][:0], real[1][:0], 0.3, 0.3) == 0
