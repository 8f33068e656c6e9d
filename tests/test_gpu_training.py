"""The GPU's training kernels, interpreted where there is no GPU."""

import copy

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu import quantize as kernels  # noqa: E402
from test_objective import ALL, PAPER, batch_of, pair  # noqa: E402
from tiny_models import tiny_seq2seq, token_batch  # noqa: E402

from dqbart.quant import quantizers  # noqa: E402
from dqbart.quant.layers import prepare  # noqa: E402
from dqbart.quant.quantizers import QMAX, PaperQuantizer, Quantizer  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantizers, "FUSED", {"cuda", "cpu"})


def rows(m: int, k: int) -> Tensor:
    """Ordinary rows, and as many as fit of: zeros, tiny, huge, ties, one large value, negative zeros."""
    torch.manual_seed(m * k)
    x = torch.randn(m, k)
    strange = [
        torch.zeros(k), torch.randn(k) * 1e-36, torch.full((k,), 3e38), torch.arange(k) + 0.5,
        torch.eye(1, k)[0] * 1e4, -torch.zeros(k),
    ]  # fmt: skip
    for row, values in zip(range(1, m), strange, strict=False):
        x[row] = values
    return x


@pytest.mark.parametrize("bits", sorted(QMAX))
@pytest.mark.parametrize(("m", "k"), [(1, 1), (9, 1), (1, 7), (9, 64), (37, 65), (7, 768), (8, 1025), (2, 5000)])
def test_rows_are_the_quantizer_s(bits: int, m: int, k: int) -> None:
    x = rows(m, k)
    codes, scale = kernels.quantize(x.to(DEVICE), bits)
    want_codes, want_scale = Quantizer(bits).quantize(x)
    assert codes.dtype == torch.int8 and torch.equal(codes.cpu(), want_codes)
    if bits > 2:
        assert torch.equal(scale.cpu(), want_scale)
    else:  # sums of another order
        torch.testing.assert_close(scale.cpu(), want_scale, rtol=1e-6, atol=0)
    values, same = kernels.fake(x.to(DEVICE), bits)
    assert torch.equal(values.cpu(), codes.cpu() * scale.cpu()) and torch.equal(same, scale)
    again = kernels.quantize_reference(x.to(DEVICE), bits)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)
    assert torch.equal(kernels.fake_reference(x.to(DEVICE), bits)[0], values)


def test_the_ternary_threshold_is_dropped() -> None:
    """Dyadic rows: their sums are exact in any order, so the threshold is the same to the last bit."""
    other = torch.linspace(1, 2, 50)
    x = torch.stack([other * 0, other], 1)
    for _ in range(60):  # to where x[0] = 0.7 mean|x|
        x[:, 0] = 0.7 * x.mean(1)
    met = x[:, 0] == 0.7 * x.mean(1)
    assert met.sum() > 10
    for sign in (1, -1):
        assert torch.equal(kernels.quantize(sign * x.to(DEVICE), 2)[0].cpu(), Quantizer(2).quantize(sign * x)[0])


@pytest.mark.parametrize("bits", sorted(QMAX))
@pytest.mark.parametrize("clip", [None, 0.5])
def test_what_is_not_finite_shows(bits: int, clip: float | None) -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 40, device=DEVICE)
        x[1, 7] = value
        assert kernels.quantize(x, bits, clip)[1][:, 0].isfinite().tolist() == [True, False, True]
        assert kernels.fake_reference(x, bits, clip)[1][:, 0].isfinite().tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 2])
def test_layout_and_type_stay(dtype: torch.dtype, bits: int, fused: None) -> None:
    """Heads of a projection lie [B, L, H, D] in memory: no copy, and the result lies so too. Others are copied."""
    heads = torch.randn(2, 5, 3, 8, device=DEVICE).to(dtype).transpose(1, 2)
    for x in (heads, heads[:, :, ::2], heads[..., ::2], heads.expand(3, 2, 3, 5, 8), heads.mT, heads[0, 0, 0]):
        values, scale = kernels.fake(x, bits)
        want, want_scale = kernels.fake_reference(x, bits)
        # the interpreter cuts bf16 off where processors round
        torch.testing.assert_close(values, want, rtol=2**-7 if dtype == torch.bfloat16 else 0, atol=0)
        assert values.dtype == dtype and torch.equal(scale, want_scale) and scale.shape == (*x.shape[:-1], 1)
        assert values.shape == x.shape and torch.equal(kernels.quantize(x, bits)[0], Quantizer(bits).quantize(x)[0])
    assert kernels.fake(heads, bits)[0].stride() == heads.stride()


@pytest.mark.parametrize("bits", sorted(QMAX))
@pytest.mark.parametrize("clip", [None, 0.8])
def test_the_quantizer_fused_and_as_a_chain(bits: int, clip: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values, gradient and refusals do not depend on who computes them; paper arithmetic keeps its forward."""
    x, grad = torch.randn(6, 33), torch.randn(6, 33)
    x[0, :4] = torch.tensor([0.8, -0.8, 0.79999995, 5.0])  # at, and beside, the clip
    for quantizer in (Quantizer(bits, clip=clip), Quantizer(bits, "tensor", clip), PaperQuantizer(bits, "row", clip)):
        found = []
        for devices in (set(), {"cuda", "cpu"}):
            monkeypatch.setattr(quantizers, "FUSED", devices)
            leaf = x.to(DEVICE, copy=True).requires_grad_()
            values = quantizer.fake(leaf)
            values.backward(grad.to(DEVICE))
            assert leaf.grad is not None
            codes, scale = quantizer.quantize_float(leaf.detach())
            assert torch.equal(codes.to(torch.int8), quantizer.quantize(leaf.detach())[0])
            found.append((values.detach(), leaf.grad, codes, scale))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=0)
        if clip is not None:
            assert torch.equal(found[1][1], kernels.straight_through_reference(grad.to(DEVICE), x.to(DEVICE), clip))
        if DEVICE == "cpu":  # on a GPU it is an assertion of the device, which ends the process
            with pytest.raises(ValueError, match="cannot quantize NaN or infinite values"):
                quantizer.fake(torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match="cannot quantize a torch.int32 tensor"):
        Quantizer(bits).quantize(torch.ones(2, 3, dtype=torch.int32, device=DEVICE))
    for shape in ((0, 5), (3, 0)):
        assert Quantizer(bits).quantize(torch.ones(shape, device=DEVICE))[0].shape == shape


def test_refusals() -> None:
    x = torch.ones(2, 8, device=DEVICE)
    for arguments, words in (
        ((x.double(), 8), r"rows torch.float64 \[2, 8\]: expected fp32, fp16 or bf16 \[\.\.\., K\], K from 1 to 8192"),
        ((x.int(), 8), "rows torch.int32"),
        ((x[:, :0], 8), r"rows torch.float32 \[2, 0\]"),
        ((x.new_ones(1, 8193), 8), r"rows torch.float32 \[1, 8193\]"),
        ((x, 5), r"bits 5: expected one of \[1, 2, 3, 4, 8\]"),
    ):
        with pytest.raises(ValueError, match=words):
            kernels.quantize(*arguments)
    with pytest.raises(ValueError, match=r"gradient \[2, 7\] on .*: expected \[2, 8\]"):
        kernels.straight_through(x[:, :7], x, 1.0)
    assert kernels.quantize(x[:0], 8)[1].shape == (0, 1)


@pytest.mark.parametrize("bits", ["8-8-8", "4-4-8", "2-2-8", "1-1-8", "2-2-32"])
def test_a_training_step_with_and_without(bits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    student = prepare(tiny_seq2seq("bart", 1, 1), bits).to(DEVICE).train()
    batch = {name: tensor.to(DEVICE) for name, tensor in token_batch([6, 3]).items()}
    found = []
    for devices in (set(), {"cuda", "cpu"}):
        monkeypatch.setattr(quantizers, "FUSED", devices)
        model = copy.deepcopy(student)
        loss = model(**batch, labels=batch["input_ids"]).loss
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(found[0]) > 20
    # On a GPU the chain divides by 127 as torch does there, an ulp off, and then some code of a later layer differs.
    tolerance = 1e-4 if DEVICE == "cpu" else 0.05
    for a, b in zip(*found, strict=True):
        assert (a - b).norm() <= tolerance * b.norm() + 1e-6


@pytest.mark.parametrize("kind", ["bart", "mbart"])
@pytest.mark.parametrize("bits", [None, "2-2-8"])
def test_attention_losses_with_and_without_maps(kind: str, bits: str | None) -> None:
    student, teacher, objective = pair(ALL, "2-1", kind, bits, deep=(3, 2))
    student.to(DEVICE)
    teacher.to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in batch_of([8, 3, 5], [6, 2, 4]).items()}
    found = []
    for objective.mapless in (False, True):
        total, terms, _ = objective(student, teacher, batch)
        gradients = torch.autograd.grad(total, list(student.parameters()), allow_unused=True)
        found.append((total.detach(), {name: float(term.detach()) for name, term in terms.items()}, gradients))
    assert found[1][1] == pytest.approx(found[0][1], rel=1e-3, abs=1e-6)
    for a, b in zip(found[1][2], found[0][2], strict=True):
        assert a is b is None or (a - b).norm() <= 1e-3 * b.norm() + 1e-6
    paper = pair(PAPER, "2-1", deep=(3, 2))[2]
    paper.mapless = True
    assert not paper._is_mapless(batch, 4)
