"""Packed weights under half-precision activations, interpreted where there is no GPU."""

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.weight_only import weight_only_matmul, weight_only_matmul_reference  # noqa: E402
from test_gpu_products import DEVICE, random_case  # noqa: E402
from tiny_models import tiny_seq2seq, token_batch  # noqa: E402

from dqbart.packed.checkpoint import load_packed, save_packed  # noqa: E402
from dqbart.packed.modules import _has_half_products  # noqa: E402
from dqbart.quant.layers import prepare  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (3, 50, 257), (17, 33, 768), (65, 40, 100)])
def test_against_float64(bits: int, dtype: torch.dtype, m: int, n: int, k: int) -> None:
    _, _, weight, _ = random_case(m, n, k, bits, seed=m)
    a = torch.randn(m, k).to(DEVICE, dtype)
    bias, residual = torch.randn(n).to(DEVICE), torch.randn(m, n).to(DEVICE, dtype)
    for arguments in ((), (bias, residual, "gelu")):
        found = weight_only_matmul(a, weight, *arguments).float()
        want = weight_only_matmul_reference(a, weight, *arguments).float()
        step = 2.0 ** (-7 if dtype == torch.bfloat16 else -10)  # the interpreter truncates bf16
        torch.testing.assert_close(found, want, rtol=step, atol=1e-3)


def test_what_does_not_fit_is_refused() -> None:
    _, _, weight, _ = random_case(3, 20, 64, 2)
    a = torch.ones(3, 64, device=DEVICE).half()
    assert weight_only_matmul(a[:0], weight).shape == (0, 20)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(a_MK=a.float()), "activations torch.float32: expected torch.float16 or torch.bfloat16"),
        (dict(a_MK=a[:, :60]), r"activations torch.float16 \[3, 60\]: expected contiguous torch.float16 \[3, 64\]"),
        (dict(bias_N=a[0, :20]), r"bias torch.float16 \[20\]: expected contiguous torch.float32 \[20\]"),
        (dict(residual_MN=a.float()), r"residual torch.float32 \[3, 64\]: expected contiguous torch.float16 \[3, 20\]"),
        (dict(activation="relu"), "activation 'relu': expected one of none, gelu, gelu_new"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            weight_only_matmul(**({"a_MK": a, "weight": weight} | change))


def test_packed_modules_use_it_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights of 4 bits under bf16: the words stay packed, and logits are those of the unpacked product."""
    folder = save_packed(prepare(tiny_seq2seq(encoder=1, decoder=1), "4-4-32"), tmp_path / "packed")
    batch = {name: x.to(DEVICE) for name, x in token_batch([5, 3]).items()}
    decoder = torch.tensor([[2, 7], [2, 9]], device=DEVICE)
    logits = []
    for usable in (False, True):
        monkeypatch.setattr("dqbart.packed.modules._has_half_products", lambda x, usable=usable: usable)
        model = load_packed(folder, DEVICE, dtype=torch.float16)
        with torch.no_grad():
            logits.append(model(**batch, decoder_input_ids=decoder).logits.float())
        assert all(m._operand is None for m in model.modules() if hasattr(m, "_operand")) == usable
    torch.testing.assert_close(logits[0], logits[1], rtol=0.02, atol=0.02)
    assert _has_half_products(torch.zeros(1, device=DEVICE).half()) == (DEVICE == "cuda")
