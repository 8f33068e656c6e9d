"""The GPU products: on a GPU as they are, elsewhere in Triton's interpreter (conftest.py sets it up)."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.products import (  # noqa: E402
    Tiles,
    Weight,
    choose_tiles,
    int8_matmul,
    int8_matmul_reference,
    unpack,
)

from dqbart.packed import layout  # noqa: E402
from dqbart.quant import rounding  # noqa: E402

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGEST = {8: 127, 4: 7, 2: 1, 1: 1}


def weight_of(codes_NK: torch.Tensor, bits: int) -> Weight:
    scale = torch.rand(len(codes_NK)) * 0.02 + 0.001
    return Weight(layout.pack(codes_NK, bits).to(DEVICE), scale.to(DEVICE), bits, codes_NK.shape[1])


def random_case(m: int, n: int, k: int, bits: int, seed: int = 0) -> tuple[Any, Any, Weight, torch.Tensor]:
    torch.manual_seed(seed)
    largest = LARGEST[bits]
    codes = torch.randint(-largest, largest + 1, (n, k), dtype=torch.int8)
    codes = codes.sign() * 2 + 1 if bits == 1 else codes
    codes = codes.clamp(-largest, largest)
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8)
    a[:1], codes[:1] = 127, largest
    return a.to(DEVICE), (torch.rand(m) * 0.02 + 0.001).to(DEVICE), weight_of(codes, bits), codes


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize(
    ("m", "n", "k"), [(1, 1, 1), (1, 17, 40), (3, 50, 257), (16, 33, 768), (17, 70, 100), (65, 40, 300), (130, 20, 64)]
)
def test_sums_are_exact_for_every_shape(bits: int, m: int, n: int, k: int) -> None:
    a, scale, weight, codes = random_case(m, n, k, bits)
    assert torch.equal(unpack(weight).cpu(), codes)
    want = (a.cpu().long() @ codes.long().T).int()
    assert torch.equal(int8_matmul(a, scale, weight, out_dtype=torch.int32).cpu(), want)
    assert torch.equal(int8_matmul_reference(a, scale, weight, out_dtype=torch.int32).cpu(), want)


@pytest.mark.parametrize("bits", [8, 2])
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("splits", [1, 2, 3, 7])
def test_any_cut_gives_the_same_bits(bits: int, swap: bool, splits: int) -> None:
    """Also twice in a row: the scratch of split sums is left as zeros."""
    a, scale, weight, _ = random_case(5, 40, 700, bits)
    tiles = Tiles(16, 16, 64, splits, swap, warps=2, stages=2)
    want = int8_matmul_reference(a, scale, weight)
    for _ in range(2):
        assert torch.equal(int8_matmul(a, scale, weight, tiles=tiles), want)


@pytest.mark.parametrize("activation", ["none", "gelu", "gelu_new"])
@pytest.mark.parametrize("m", [4, 20])
def test_what_follows_is_the_contract_s_to_the_last_bit(activation: str, m: int) -> None:
    a, scale, weight, _ = random_case(m, 48, 96, 4)
    bias, residual = torch.randn(48).to(DEVICE), torch.randn(m, 48).to(DEVICE)
    act = {"none": lambda x: x, "gelu": rounding.gelu, "gelu_new": rounding.gelu_tanh}[activation]
    exact = int8_matmul_reference(a, scale, weight, out_dtype=torch.int32)
    want = residual + act(exact.float() * scale[:, None] * weight.scale_N + bias)
    assert torch.equal(int8_matmul(a, scale, weight, bias, residual, activation), want)
    reference = int8_matmul_reference(a, scale, weight, bias, residual, activation)
    torch.testing.assert_close(reference, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_results_are_rounded_once(dtype: torch.dtype) -> None:
    a, scale, weight, _ = random_case(4, 20, 64, 2)
    residual = torch.randn(4, 20).to(DEVICE, dtype)
    found = int8_matmul(a, scale, weight, residual_MN=residual, out_dtype=dtype)
    want = int8_matmul_reference(a, scale, weight, residual_MN=residual, out_dtype=dtype)
    truncates = DEVICE == "cpu" and dtype == torch.bfloat16  # the interpreter does
    torch.testing.assert_close(found, want, rtol=2**-7 if truncates else 0.0, atol=0.0)


def test_rows_with_a_stride_and_nothing_at_all() -> None:
    a, scale, weight, _ = random_case(6, 20, 64, 2)
    wide = torch.full((6, 80), 99, dtype=torch.int8, device=DEVICE)
    wide[:, :64] = a
    assert torch.equal(int8_matmul(wide[:, :64], scale, weight), int8_matmul_reference(a, scale, weight))
    assert int8_matmul(a[:0], scale[:0], weight).shape == (0, 20)


def test_few_rows_fill_the_chip() -> None:
    for n, k in ((768, 768), (3072, 768), (768, 3072), (50265, 768), (250027, 1024)):
        for bits in (8, 4, 2, 1):
            w = layout.words_per_row(k, bits) * 4
            tiles = choose_tiles(4, n, w, bits, 132)
            programs = -(-n // tiles.bn) * tiles.splits
            assert programs >= 132 or tiles.splits == -(-w // tiles.bw)


def test_what_does_not_fit_is_refused() -> None:
    a, scale, weight, _ = random_case(4, 20, 64, 2)
    for change, words in (
        (dict(a_MK=a[:, :60]), r"activations torch.int8 \[4, 60\]: expected torch.int8 \[4, 64\]"),
        (dict(a_MK=a.float()), r"activations torch.float32 \[4, 64\]: expected torch.int8"),
        (dict(a_scale_M=scale[:3]), r"their scales torch.float32 \[3\]: expected torch.float32 \[4\]"),
        (dict(bias_N=scale), r"bias torch.float32 \[4\]: expected torch.float32 \[20\]"),
        (dict(residual_MN=a), r"residual torch.int8 \[4, 64\]: expected floats \[4, 20\]"),
        (dict(activation="relu"), "activation 'relu': expected one of none, gelu, gelu_new"),
        (dict(a_MK=a.T.contiguous().T), "activations with strides"),
    ):
        with pytest.raises(ValueError, match=words):
            int8_matmul(**(dict(a_MK=a, a_scale_M=scale, weight=weight) | change))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="packed rows of 32 bytes: not those of 200 codes of 2 bits"):
        int8_matmul(a, scale, Weight(weight.packed_NW, weight.scale_N, 2, 200))
    with pytest.raises(ValueError, match="bits 3: expected one of 8, 4, 2, 1"):
        int8_matmul(a, scale, Weight(weight.packed_NW, weight.scale_N, 3, 64))
