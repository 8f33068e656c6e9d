"""The GPU's row kernels, interpreted where there is no GPU."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.rows import norm_and_quantize, norm_and_quantize_reference  # noqa: E402

from dqbart.quant.quantizers import Quantizer  # noqa: E402
from dqbart.quant.rounding import RoundedOnceLayerNorm, round_once  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("d", [1, 7, 64, 100, 768, 1025])
@pytest.mark.parametrize("with_norm", [False, True])
def test_rows_are_the_contract_s_to_the_last_bit(d: int, with_norm: bool) -> None:
    torch.manual_seed(d)
    norm = torch.nn.LayerNorm(d)
    norm.weight.data.normal_()
    norm.bias.data.normal_()
    round_once(norm)
    assert isinstance(norm, RoundedOnceLayerNorm)
    x = torch.randn(5, d) * 3
    x[1] = 0
    x[2] *= 1e-35
    x[3] = torch.arange(d) + 0.5  # ties, half to even
    parts = (norm.weight.detach().to(DEVICE), norm.bias.detach().to(DEVICE)) if with_norm else (None, None)
    codes, scale, h = norm_and_quantize(x.to(DEVICE), *parts)
    with torch.no_grad():
        want = norm(x) if with_norm else x
    want_codes, want_scale = Quantizer(8).quantize_float(want)
    assert torch.equal(codes.cpu().float(), want_codes) and torch.equal(scale.cpu(), want_scale[:, 0])
    assert h is None if not with_norm else torch.equal(h.cpu(), want)
    assert norm_and_quantize(x.to(DEVICE), *parts, keep=False)[2] is None
    again = norm_and_quantize_reference(x.to(DEVICE), *parts)
    assert torch.equal(again[0], codes) and torch.equal(again[1], scale)


def test_what_is_not_finite_shows() -> None:
    for value in (torch.nan, torch.inf, -torch.inf):
        x = torch.ones(3, 40, device=DEVICE)
        x[1, 7] = value
        scale = norm_and_quantize(x)[1]
        assert scale.isfinite().tolist() == [True, False, True]
        scale = norm_and_quantize(x, torch.ones(40, device=DEVICE), torch.zeros(40, device=DEVICE))[1]
        assert scale.isfinite().tolist() == [True, False, True]


def test_nothing_and_what_does_not_fit() -> None:
    assert [t.shape for t in norm_and_quantize(torch.ones(0, 8, device=DEVICE))[:2]] == [(0, 8), (0,)]
    x = torch.ones(2, 8, device=DEVICE)
    for arguments, words in (
        ((x.half(),), r"rows torch.float16 \[2, 8\], strides \(8, 1\): expected contiguous fp32 \[M, D\]"),
        ((x.T,), "expected contiguous fp32"),
        ((x[0],), "expected contiguous fp32"),
        ((x, x[0]), "LayerNorm needs weight and bias, or neither"),
        ((x, x[0], x[0, :3]), r"bias torch.float32 \[3\] on .*: expected fp32 \[8\] beside the rows"),
    ):
        with pytest.raises(ValueError, match=words):
            norm_and_quantize(*arguments)
