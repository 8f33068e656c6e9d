"""The GPU's attention, interpreted where there is no GPU: the contract's bits, whatever the padding."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu import attention as attention_kernels  # noqa: E402
from dqbart_kernels.gpu import history as history_kernels  # noqa: E402
from dqbart_kernels.gpu.attention import (  # noqa: E402
    attend,
    attend_reference,
    quantize_heads,
    quantize_heads_reference,
)
from dqbart_kernels.gpu.history import Cache, attend_history  # noqa: E402

from dqbart.quant.attention import AttentionNumerics, attention  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter, for rows beyond the last
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class _Module(torch.nn.Module):
    attention_numerics = AttentionNumerics("integer", 16)


def by_the_torch_engine(q: Any, k: Any, v: Any, heads: int, scaling: float) -> Any:
    """q, k, v fp32 [1, rows, H D]: the packed model's own attention."""
    split = [x.reshape(1, x.shape[1], heads, -1).transpose(1, 2) for x in (q, k, v)]
    with torch.no_grad():
        return attention(_Module().eval(), *split, None, scaling)[0].reshape(1, q.shape[1], -1)


@pytest.mark.parametrize("heads, width", [(1, 8), (3, 64), (2, 80)])
@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("sharp", [0.3, 6.0])
@pytest.mark.parametrize("at_once", [8192, 0])
def test_attention_is_the_torch_engine_s_to_the_last_bit(
    heads: int, width: int, rows: int, sharp: float, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sources of different lengths in one batch, beside the same sources alone."""
    monkeypatch.setattr(attention_kernels, "AT_ONCE", at_once)
    torch.manual_seed(rows)
    lengths, n = [1, 130, 64], heads * width
    q = torch.randn(3, rows, n).to(DEVICE) * sharp
    kv = torch.randn(3, 130, 2 * n).to(DEVICE)
    keys, values = quantize_heads(kv, heads, width), quantize_heads(kv[:, :, n:], heads, width, transposed=True)
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = attend(q, keys, values, length, width**-0.5)
    for i, many in enumerate(lengths):
        want = by_the_torch_engine(q[i : i + 1], kv[i : i + 1, :many, :n], kv[i : i + 1, :many, n:], heads, width**-0.5)
        assert torch.equal(found[i : i + 1], want)
    near = attend_reference(q, keys, values, length, width**-0.5)
    torch.testing.assert_close(found, near, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("heads, width, steps, at_once", [(2, 16, 5, 128), (1, 64, 40, 128), (1, 16, 37, 16)])
def test_decoding_reads_the_history_of_each_hypothesis(
    heads: int, width: int, steps: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beams that jump between rows: against attention over the keys and values that each one really wrote."""
    monkeypatch.setattr(history_kernels, "AT_ONCE", at_once)
    torch.manual_seed(steps)
    rows, n = 3, heads * width
    cache = Cache.of(steps + 2, rows, heads, width, DEVICE)
    cache.k.fill_(99)  # whatever is read by mistake shows
    cache.v_scale.fill_(7.0)
    history = torch.zeros((rows, steps + 2), dtype=torch.int32, device=DEVICE)
    written: list[list[Any]] = [[] for _ in range(rows)]  # k and v of each hypothesis so far
    for t in range(steps):
        qkv = torch.randn(rows, 3 * n).to(DEVICE) * 2
        step = torch.tensor([t], dtype=torch.int32, device=DEVICE)
        found = attend_history(qkv, cache, history, step, width**-0.5)
        for row in range(rows):
            written[row] = [*written[row], (qkv[row, n : 2 * n], qkv[row, 2 * n :])]
            if t < 5 or t > steps - 3:
                k, v = (torch.stack(part)[None] for part in zip(*written[row], strict=True))
                want = by_the_torch_engine(qkv[row, :n][None, None], k, v, heads, width**-0.5)
                assert torch.equal(found[row : row + 1], want[0])
        parents = torch.randint(0, rows, (rows,)).to(DEVICE)
        history[:, t] = torch.arange(rows, dtype=torch.int32, device=DEVICE)
        history = history[parents].contiguous()
        written = [written[parent] for parent in parents.tolist()]


def test_heads_are_quantized_as_the_contract_says() -> None:
    x = torch.randn(2, 21, 3 * 16 + 5).to(DEVICE)
    x[0, 3] = 0
    for transposed in (False, True):
        pairs = zip(quantize_heads(x, 3, 16, transposed), quantize_heads_reference(x, 3, 16, transposed), strict=True)
        assert all(torch.equal(found, want) for found, want in pairs)


def test_what_is_not_finite_shows() -> None:
    x, length = torch.randn(1, 5, 32).to(DEVICE), torch.tensor([5], dtype=torch.int32, device=DEVICE)
    for broken in range(3):
        parts = [x.clone(), x.clone(), x.clone()]
        parts[broken][0, 2, 3] = torch.nan
        values = quantize_heads(parts[2], 1, 32, transposed=True)
        found = attend(parts[0], quantize_heads(parts[1], 1, 32), values, length, 1.0)
        assert found[0, 2].isnan().any()


def test_what_does_not_fit_is_refused() -> None:
    x, length = torch.randn(2, 5, 32).to(DEVICE), torch.tensor([5, 5], dtype=torch.int32, device=DEVICE)
    keys, values = quantize_heads(x, 2, 16), quantize_heads(x, 2, 16, transposed=True)
    other = quantize_heads(x[:, :4].contiguous(), 2, 16, transposed=True)
    assert attend(x[:, :0], keys, values, length, 1.0).shape == (2, 0, 32)
    for arguments, words in (
        ((x.half(), keys, values, length), r"queries torch.float16 \[2, 5, 32\]: expected fp32 \[B, S, 32 or more\]"),
        ((x[:, :4], keys, values, length), "queries with strides .*: expected rows one after the other"),
        ((x, keys, other, length), r"values torch.int8 \[2, 2, 16, 4\]: expected contiguous int8 \[2, 2, 16, 5\]"),
        ((x, keys, keys, length), r"values torch.int8 \[2, 2, 5, 16\]: expected contiguous int8 \[2, 2, 16, 5\]"),
        ((x, keys, (values[0], other[1]), length), r"scales of values .*: expected contiguous fp32 \[2, 2, 5\]"),
        ((x, keys, values, length.long()), r"lengths torch.int64 \[2\]: expected 2 sources and int32 \[2\]"),
    ):
        with pytest.raises(ValueError, match=words):
            attend(*arguments, 1.0)
