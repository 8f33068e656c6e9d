"""The quantizers against published goldens, a plain reference in float64, and values chosen to break them."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dqbart.quant import quantizers
from dqbart.quant.quantizers import QMAX, PaperQuantizer, Quantizer

BITS = sorted(QMAX)
W = torch.tensor([[1, -0.2, 0.4, -0.9], [0.05, -0.1, 0.3, 0]])


def reference(x: Tensor, bits: int) -> Tensor:
    """Row quantization in float64, written from the formulas."""
    x = x.double()
    if bits == 1:
        return torch.where(x >= 0, 1.0, -1.0) * x.abs().mean(-1, keepdim=True)
    if bits == 2:
        kept = x.abs() > 0.7 * x.abs().mean(-1, keepdim=True)
        alpha = (x.abs() * kept).sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(1)
        return alpha * x.sign() * kept
    peak = x.abs().amax(-1, keepdim=True)
    scale = torch.where(peak > 0, peak / QMAX[bits], 1.0)
    return (x / scale).round() * scale


def close(found: Tensor, expected: list[float] | list[list[float]]) -> None:
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=1e-6)


# Goldens: made by executing the authors' quantizers.


def test_twn_goldens() -> None:
    close(Quantizer(2).dequantize(W[:1]), [[0.95, 0, 0, -0.95]])  # 0.4 is below the threshold 0.4375
    close(Quantizer(2).dequantize(W), [[0.95, 0, 0, -0.95], [0, -0.2, 0.2, 0]])
    tensor = Quantizer(2, "tensor")
    close(tensor.dequantize(W), [[0.65, 0, 0.65, -0.65], [0, 0, 0.65, 0]])
    close(PaperQuantizer(2, "tensor").dequantize(W), [[0.65, 0, 0.65, -0.65], [0, 0, 0.65, 0]])
    codes, scale = tensor.quantize(W)
    assert scale.shape == (1, 1) and codes.dtype == torch.int8 and codes.unique().tolist() == [-1, 0, 1]


def test_the_twn_threshold_itself_is_dropped() -> None:
    met = 0
    for other in torch.linspace(1, 2, 50):
        x = torch.stack([other * 0, other])
        for _ in range(60):  # to where x[0] = 0.7 mean|x|, to the last bit
            x[0] = 0.7 * x.mean()
        if x[0] == 0.7 * x.mean():
            met += 1
            assert Quantizer(2).quantize(x)[0].tolist() == [0, 1] and Quantizer(2).quantize(-x)[0].tolist() == [0, -1]
    assert met > 10


def test_symmetric_goldens() -> None:
    x = torch.tensor([3, -1, 0.3, 0.013])
    for granularity in ("row", "tensor"):
        close(PaperQuantizer(8, granularity).dequantize(x), [2.5, -1.003937, 0.295276, 0.019685])
    close(Quantizer(4).dequantize(W[:1]), [[1, -0.142857, 0.428571, -0.857143]])
    close(Quantizer(8).dequantize(x), [3, -0.9921260, 0.3070866, 0.0236220])  # ours does not clip


def test_binary_golden() -> None:
    codes, scale = Quantizer(1).quantize(W)
    close(scale, [[0.625], [0.1125]])
    assert codes.tolist() == [[1, -1, 1, -1], [1, -1, 1, 1]]  # zero is 1: one bit has no third value


def test_straight_through_golden() -> None:
    x = torch.tensor([3, 2.5, 2.4, -2.5, -3, 0.1], requires_grad=True)
    PaperQuantizer(8, "tensor").fake(x).backward(torch.full((6,), 2.0))
    assert x.grad is not None and x.grad.tolist() == [0, 0, 2, 0, 0, 2]
    for bits in BITS:  # without clip the gradient passes as it is, whatever the values
        x.grad = None
        upstream = torch.randn(6)
        Quantizer(bits).fake(x).backward(upstream)
        assert torch.equal(x.grad, upstream)  # type: ignore[arg-type]


def test_batch_leak_is_the_papers_and_not_ours() -> None:
    alone, mate = torch.tensor([[0.05, 0.2]]), torch.tensor([[0.05, 0.2], [2.5, 0]])
    paper, ours = PaperQuantizer(8, "tensor"), Quantizer(8)
    close(paper.dequantize(alone), [[0.050394, 0.2]])
    close(paper.dequantize(mate)[:1], [[0.059055, 0.196850]])
    assert torch.equal(ours.dequantize(alone), ours.dequantize(mate)[:1])


@pytest.mark.parametrize(("bits", "levels"), [(8, 255), (4, 15), (3, 7), (2, 3), (1, 2)])
def test_levels(bits: int, levels: int) -> None:
    x = torch.cat([torch.linspace(-1, 1, 4001), torch.randn(4000)])
    codes = Quantizer(bits).quantize(x)[0]
    assert len(codes[:4001].unique() if bits > 2 else codes.unique()) <= levels
    assert len(Quantizer(bits).quantize(x[:4001])[0].unique()) == levels
    assert int(codes.abs().max()) == QMAX[bits]


# Properties.


@pytest.mark.parametrize("bits", BITS)
@given(rows=st.integers(1, 9), width=st.integers(1, 70), power=st.integers(-20, 20), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_any_matrix_matches_the_reference(bits: int, rows: int, width: int, power: int, seed: int) -> None:
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 2.0**power
    x[:, ::7] = 0
    found = Quantizer(bits).dequantize(x).double()
    error = (found - reference(x, bits)).abs() / x.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    # A value within rounding of a boundary may fall on either side; then it is one step away, and rare.
    assert error.median() < 1e-6 and (error > 1e-5).float().mean() <= 0.05
    codes, scale = Quantizer(bits).quantize(x)
    assert torch.equal(codes.float() * scale, Quantizer(bits).dequantize(x))
    assert codes.shape == x.shape and scale.shape == (rows, 1) and scale.dtype == torch.float32


@pytest.mark.parametrize("bits", BITS)
def test_half_way_goes_to_even(bits: int) -> None:
    if bits in (1, 2):
        return
    top = QMAX[bits]
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, top])
    assert Quantizer(bits).quantize(x)[0].tolist() == [0, 2, 2, 0, -2, -2, top]


def test_twn_is_idempotent_and_scales() -> None:
    torch.manual_seed(0)
    x, quantizer = torch.randn(50, 64), Quantizer(2)
    once = quantizer.dequantize(x)
    assert torch.equal(quantizer.quantize(once)[0], quantizer.quantize(x)[0])
    torch.testing.assert_close(quantizer.dequantize(once), once)
    assert max(len(row.unique()) for row in once) <= 3
    for bits in BITS:
        codes, scale = Quantizer(bits).quantize(x)
        for factor in (2.0**-10, 2.0**15):  # a power of two changes no rounding
            scaled = Quantizer(bits).quantize(x * factor)
            assert torch.equal(scaled[0], codes) and torch.equal(scaled[1], scale * factor)
        if bits > 1:  # -x turns every code, but binary has no symmetric zero
            assert torch.equal(Quantizer(bits).quantize(-x)[0], -codes)


@pytest.mark.parametrize("bits", BITS)
def test_rows_do_not_see_each_other(bits: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(40, 96) * torch.logspace(-3, 3, 40).unsqueeze(1)
    picked = torch.tensor([3, 3, 39, 0, 17])
    codes, scale = Quantizer(bits).quantize(x)
    some_codes, some_scale = Quantizer(bits).quantize(x[picked])
    assert torch.equal(some_codes, codes[picked]) and torch.equal(some_scale, scale[picked])
    assert torch.equal(Quantizer(bits).dequantize(x.view(2, 4, 5, 96)), Quantizer(bits).dequantize(x).view(2, 4, 5, 96))
    strided = torch.stack([x, x], -1)[..., 0]
    assert torch.equal(Quantizer(bits).quantize(strided)[0], codes)


@pytest.mark.parametrize("quantizer", [Quantizer(b) for b in BITS] + [PaperQuantizer(8), PaperQuantizer(2)], ids=repr)
def test_chunks_change_nothing(quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(37, 24)
    whole = quantizer.quantize_float(x)
    for elements in (1, 24, 24 * 5, 24 * 36, 24 * 37, 10**9):
        monkeypatch.setattr(quantizers, "CHUNK_ELEMENTS", elements)
        codes, scale = quantizer.quantize(x)
        assert codes.dtype == torch.int8 and torch.equal(codes.float(), whole[0]) and torch.equal(scale, whole[1])
    monkeypatch.setattr(quantizers, "CHUNK_ELEMENTS", 24)
    whole_tensor = replace(quantizer, granularity="tensor")  # one scale: not to be cut
    assert torch.equal(whole_tensor.quantize(x)[1], whole_tensor.quantize_float(x)[1])


# Degenerate input.


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("kind", [Quantizer, PaperQuantizer])
@pytest.mark.parametrize("bits", BITS)
def test_zero_rows_give_zeros(bits: int, kind: type[Quantizer], granularity: str) -> None:
    x = torch.zeros(3, 8)
    quantizer = kind(bits, granularity)  # type: ignore[arg-type]
    codes, scale = quantizer.quantize(x)
    assert scale.isfinite().all() and (scale >= 0).all()
    assert torch.equal(quantizer.dequantize(x), x) and torch.equal(quantizer.fake(x), x)
    assert torch.equal(codes.float() * scale, x)
    if granularity == "row":
        x[1] = torch.randn(8)
        assert torch.equal(quantizer.dequantize(x)[::2], torch.zeros(2, 8)) and quantizer.dequantize(x)[1].any()


@pytest.mark.parametrize("bits", BITS)
def test_one_element_rows_come_back(bits: int) -> None:
    x = torch.tensor([[5.0], [-0.25], [0], [1e-20], [-1e20]])
    torch.testing.assert_close(Quantizer(bits).dequantize(x), x)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0), (2, 0, 3), (0, 0)])
def test_empty_input(bits: int, shape: tuple[int, ...]) -> None:
    for quantizer in (Quantizer(bits), Quantizer(bits, "tensor"), PaperQuantizer(bits), PaperQuantizer(bits, "tensor")):
        codes, scale = quantizer.quantize(torch.empty(shape))
        assert codes.shape == shape and codes.dtype == torch.int8
        assert scale.shape == ((*shape[:-1], 1) if quantizer.granularity == "row" else (1,) * len(shape))
        assert quantizer.fake(torch.empty(shape)).shape == shape


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("magnitude", [1e38, 3e38, 1e30, 1e-20, 1e-29, 1e-31, 1e-38, 1e-45])
def test_huge_and_tiny_magnitudes(bits: int, magnitude: float) -> None:
    x = torch.tensor([[1.0, -1.0, 0.9, 0.0], [0.45, 0.45, -1.0, 1.0]]) * magnitude
    before = x.clone()
    codes, scale = Quantizer(bits).quantize(x)
    values = Quantizer(bits).dequantize(x)
    assert torch.equal(x, before)
    assert scale.isfinite().all() and (scale >= 0).all() and values.isfinite().all()
    if magnitude >= 1e-29:
        assert values[0, 0] > 0 > values[0, 1] and (values.abs().amax(1) >= 0.4 * x.abs().amax(1)).all()
        normal = Quantizer(bits).dequantize(x / magnitude)
        torch.testing.assert_close(values / magnitude, normal, rtol=1e-4, atol=1e-4)
    else:  # too small for a scale: nearly or wholly zero, and never larger than 1e-30
        assert values.abs().max() <= 1e-30
    wide = torch.full((1, 3000), 3e38)  # the plain sum of a row overflows
    torch.testing.assert_close(Quantizer(bits).dequantize(wide), wide)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", BITS)
def test_other_float_types_are_computed_in_fp32(bits: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    x = (torch.randn(6, 40) * 100).to(dtype)
    codes, scale = Quantizer(bits).quantize(x)
    assert scale.dtype == torch.float32 and torch.equal(codes, Quantizer(bits).quantize(x.float())[0])
    faked = Quantizer(bits).fake(x)
    assert faked.dtype == dtype and torch.equal(faked, (codes.float() * scale).to(dtype))
    assert Quantizer(bits).fake(torch.full((2, 3000), 60000.0, dtype=dtype)).isfinite().all()  # fp16 sums overflow
    x.requires_grad_(True)
    Quantizer(bits).fake(x).sum().backward()
    assert x.grad is not None and x.grad.dtype == dtype


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_input_raises(bits: int, bad: float) -> None:
    x = torch.randn(5, 16)
    x[3, 7] = bad
    for quantizer in (Quantizer(bits), Quantizer(bits, "tensor"), PaperQuantizer(bits), PaperQuantizer(bits, "tensor")):
        with pytest.raises(ValueError, match="cannot quantize NaN or infinite values: the model or its input has"):
            quantizer.quantize(x)
        with pytest.raises(ValueError, match="cannot quantize NaN or infinite values"):
            quantizer.fake(x)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_only_floats_are_taken(dtype: torch.dtype) -> None:
    for call in (Quantizer(8).quantize, Quantizer(8).quantize_float, Quantizer(8).fake, PaperQuantizer(2).dequantize):
        with pytest.raises(ValueError, match=f"cannot quantize a {dtype} tensor: expected a floating-point one"):
            call(torch.ones(2, 2, dtype=dtype))


def test_wrong_settings() -> None:
    with pytest.raises(ValueError, match=r"quantizer bits 5: expected one of \[1, 2, 3, 4, 8\]"):
        Quantizer(5)
    with pytest.raises(ValueError, match="quantizer bits 32: "):
        PaperQuantizer(32)
    with pytest.raises(ValueError, match="quantizer granularity 'column': expected 'row' or 'tensor'"):
        Quantizer(8, "column")  # type: ignore[arg-type]


def test_paper_division_is_the_authors() -> None:
    torch.manual_seed(3)
    x = torch.randn(300, 50) * 2
    clipped = x.clamp(-2.5, 2.5)
    s = 127 / clipped.abs().max()
    assert torch.equal(PaperQuantizer(8, "tensor").dequantize(x), (clipped * s).round() / s)
    s = 127 / clipped.abs().amax(-1, keepdim=True)
    assert torch.equal(PaperQuantizer(8).dequantize(x), (clipped * s).round() / s)
