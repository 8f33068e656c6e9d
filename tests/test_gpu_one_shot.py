"""LayerNorm, codes and product in one launch: the bits of one after the other. Interpreted where there is no GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.one_shot import one_shot_matmul, one_shot_matmul_reference  # noqa: E402
from dqbart_kernels.gpu.products import int8_matmul  # noqa: E402
from dqbart_kernels.gpu.rows import norm_and_quantize  # noqa: E402
from test_gpu_products import DEVICE, random_case  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (1, 17, 40), (3, 50, 257), (4, 24, 768), (8, 20, 100)])
@pytest.mark.parametrize("with_norm", [False, True])
def test_the_same_bits_as_in_two_launches(bits: int, m: int, n: int, k: int, with_norm: bool) -> None:
    _, _, weight, _ = random_case(m, n, k, bits, seed=m)
    x = (torch.randn(m, k) * 3).to(DEVICE)
    x[m // 2] = 0
    norm = (torch.randn(k).to(DEVICE), torch.randn(k).to(DEVICE)) if with_norm else None
    bias, residual = torch.randn(n).to(DEVICE), torch.randn(m, n).to(DEVICE)
    found, h = one_shot_matmul(x, weight, bias, norm, residual, "gelu", keep=True)
    weight_K, bias_K = norm or (None, None)
    codes, scale, want_h = norm_and_quantize(x, weight_K, bias_K)
    assert torch.equal(found, int8_matmul(codes, scale, weight, bias, residual, "gelu"))
    assert (h is None and want_h is None) if norm is None else torch.equal(h, want_h)  # type: ignore[arg-type]
    bare, none = one_shot_matmul(x, weight, norm=norm)
    assert none is None and torch.equal(bare, int8_matmul(codes, scale, weight))
    slow, _ = one_shot_matmul_reference(x, weight, bias, norm, residual, "gelu")
    torch.testing.assert_close(found, slow, rtol=1e-5, atol=1e-5)


def test_a_row_that_is_not_finite_shows_and_touches_no_other() -> None:
    _, _, weight, _ = random_case(3, 20, 96, 2)
    x = torch.ones(3, 96, device=DEVICE)
    for value in (torch.nan, torch.inf):
        x[1, 5] = value
        for norm in (None, (torch.ones(96, device=DEVICE), torch.zeros(96, device=DEVICE))):
            y, _ = one_shot_matmul(x, weight, norm=norm)
            assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()


def test_what_does_not_fit_is_refused() -> None:
    _, _, weight, _ = random_case(3, 20, 64, 2)
    x = torch.ones(3, 64, device=DEVICE)
    assert one_shot_matmul(x[:0], weight)[0].shape == (0, 20)
    cases: list[tuple[dict[str, Any], str]] = [
        (
            dict(x_MK=torch.ones(9, 64, device=DEVICE)),
            "9 rows of 64, 2 bits: too many; norm_and_quantize and int8_matmul take more",
        ),
        (dict(x_MK=x.half()), r"rows torch.float16 \[3, 64\]: expected contiguous fp32 \[3, 64\]"),
        (dict(norm=(x[0], x[0, :3])), r"LayerNorm's bias torch.float32 \[3\]: expected contiguous fp32 \[64\]"),
        (dict(residual_MN=x), r"residual torch.float32 \[3, 64\]: expected contiguous fp32 \[3, 20\]"),
        (dict(activation="relu"), "activation 'relu': expected one of none, gelu, gelu_new"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            one_shot_matmul(**({"x_MK": x, "weight": weight} | change))
