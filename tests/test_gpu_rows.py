"""The GPU's row kernels, interpreted where there is no GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.products import Weight  # noqa: E402
from dqbart_kernels.gpu.rows import (  # noqa: E402
    embed,
    embed_reference,
    norm_and_quantize,
    norm_and_quantize_reference,
)

from dqbart.packed import layout  # noqa: E402
from dqbart.quant.quantizers import Quantizer  # noqa: E402
from dqbart.quant.rounding import RoundedOnceLayerNorm, round_once  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
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


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # the interpreter says what we test
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


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("d", [48, 768])
@pytest.mark.parametrize("whole", [False, True])
def test_embedding(bits: int, d: int, whole: bool) -> None:
    """Against the reference and, without norm and types, against scaled codes plus positions."""
    torch.manual_seed(bits)
    largest = {8: 127, 4: 7, 2: 1, 1: 1}[bits]
    codes = torch.randint(-largest, largest + 1, (30, d), dtype=torch.int8)
    codes = codes.ge(0).to(torch.int8) * 2 - 1 if bits == 1 else codes
    table = Weight(layout.pack(codes, bits).to(DEVICE), torch.rand(30).to(DEVICE) + 0.1, bits, d)
    ids = torch.tensor([[0, 29], [7, 7]], dtype=torch.int32, device=DEVICE)
    kinds = torch.tensor([[0, 1], [1, 0]], dtype=torch.int32, device=DEVICE)
    positions, step = torch.randn(9, d).to(DEVICE), torch.tensor([1], dtype=torch.int32, device=DEVICE)
    norm, types = (torch.randn(d).to(DEVICE), torch.randn(d).to(DEVICE)), torch.randn(2, d).to(DEVICE)
    if whole:
        for of_types in ((types, kinds), (types, None)):
            more: dict[str, Any] = dict(first=2, norm=norm, token_types=of_types, embed_scale=27.7)
            found, want = embed(ids, table, positions, **more), embed_reference(ids, table, positions, **more)
            assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        return
    floats = codes.float() * table.scale_N.cpu()[:, None]
    by_hand = torch.stack([floats[0], floats[29], floats[7], floats[7]])
    assert torch.equal(embed(ids, table, positions)[0].cpu(), by_hand + positions.cpu()[[0, 1, 0, 1]])
    one_step = embed(ids, table, positions, 3, step)
    assert torch.equal(one_step[0].cpu(), floats[[7, 7]] + positions.cpu()[4])
    assert all(
        torch.equal(a, b) for a, b in zip(one_step, embed_reference(ids, table, positions, 3, step), strict=True)
    )


def test_embedding_refuses() -> None:
    table = Weight(layout.pack(torch.ones(3, 40, dtype=torch.int8), 2).to(DEVICE), torch.ones(3, device=DEVICE), 2, 40)
    ids, positions = torch.zeros(1, 2, dtype=torch.int32, device=DEVICE), torch.zeros(4, 40, device=DEVICE)
    assert embed(ids[:, :0], table, positions)[0].shape == (0, 40)
    with pytest.raises(ValueError, match=r"ids torch.int64 \[1, 2\]: expected contiguous torch.int32 \[1, 2\]"):
        embed(ids.long(), table, positions)
    with pytest.raises(ValueError, match=r"ids torch.int32 \[2\]: expected two dimensions"):
        embed(ids[0], table, positions)
    with pytest.raises(
        ValueError, match=r"positions torch.float32 \[4, 39\]: expected contiguous torch.float32 \[4, 40\]"
    ):
        embed(ids, table, positions[:, :39])
