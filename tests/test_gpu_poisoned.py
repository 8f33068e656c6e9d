"""Every GPU kernel writes all of its result and reads nothing else: memory that a launch is given holds NaN, or 0x55 in
every byte, and inputs are new each time. Against float64; small where the interpreter runs them, large on a GPU.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.attention import attend, attend_reference, quantize_heads  # noqa: E402
from dqbart_kernels.gpu.head import tile_stats, top_tokens  # noqa: E402
from dqbart_kernels.gpu.history import Cache, attend_history  # noqa: E402
from dqbart_kernels.gpu.one_shot import one_shot_matmul  # noqa: E402
from dqbart_kernels.gpu.products import Weight, int8_matmul, unpack  # noqa: E402
from dqbart_kernels.gpu.rows import embed, norm_and_quantize  # noqa: E402
from dqbart_kernels.gpu.vocabulary import best_tokens  # noqa: E402
from dqbart_kernels.gpu.weight_only import weight_only_matmul  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LARGE = DEVICE == "cuda"
SIZES = [(1, 768, 768), (64, 3072, 768), (1024, 1024, 4096), (4, 50265, 768)] if LARGE else [(3, 40, 200), (18, 70, 96)]


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `torch.empty` and `torch.empty_like` give."""

    def poison(make: Any) -> Any:
        def made(*arguments: Any, **options: Any) -> Any:
            found = make(*arguments, **options)
            return found.fill_(torch.nan) if found.is_floating_point() else found.fill_(0x55)

        return made

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(params=range(3 if LARGE else 1))
def fresh(request: pytest.FixtureRequest) -> Iterator[int]:
    """A seed that no run had before; a failure shows it."""
    seed = torch.seed() % 2**31
    torch.manual_seed(seed)
    print("seed", seed)
    yield seed


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(DEVICE)


def random_weight(n: int, k: int, bits: int) -> Weight:
    """Any bytes are codes."""
    packed = torch.randint(0, 256, (n, -(-k * bits // 256) * 32), dtype=torch.uint8)
    return Weight(packed.to(DEVICE), (torch.rand(n) * 0.02 + 0.001).to(DEVICE), bits, k)


@pytest.mark.parametrize(("m", "n", "k"), SIZES)
@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_products(m: int, n: int, k: int, bits: int, fresh: int) -> None:
    weight, scale = random_weight(n, k, bits), torch.rand(m).to(DEVICE) + 0.01
    a = torch.randint(-127, 128, (m, k), dtype=torch.int8).to(DEVICE)
    sums = a.double() @ unpack(weight).double().T
    assert torch.equal(int8_matmul(a, scale, weight, out_dtype=torch.int32).double(), sums)
    bias, residual = random(n), random(m, n)
    want = residual.double() + sums * scale[:, None].double() * weight.scale_N.double() + bias.double()
    for _ in range(2):  # the second finds the scratch as the first left it
        found = int8_matmul(a, scale, weight, bias, residual).double()
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-5 * float(want.abs().max()))


@pytest.mark.parametrize(("m", "d"), [(4096, 1024), (5, 768)] if LARGE else [(3, 100)])
def test_rows(m: int, d: int, fresh: int) -> None:
    x, weight, bias = random(m, d), random(d), random(d)
    codes, scale, h = norm_and_quantize(x, weight, bias)
    want = torch.nn.functional.layer_norm(x.double(), (d,), weight.double(), bias.double(), 1e-5)
    assert h is not None
    torch.testing.assert_close(h.double(), want, rtol=1e-6, atol=1e-6)
    error = (codes.double() * scale[:, None].double() - want).abs()
    assert bool((error <= scale[:, None].double() * 0.5001 + 1e-6).all())


@pytest.mark.parametrize("bits", [8, 2])
def test_embedding(bits: int, fresh: int) -> None:
    table, positions = random_weight(50, 96, bits), random(12, 96)
    ids = torch.randint(0, 50, (2, 9), dtype=torch.int32).to(DEVICE)
    h, codes, scale = embed(ids, table, positions, 2)
    want = (unpack(table).double() * table.scale_N[:, None].double())[ids.long()] + positions[2:11].double()
    torch.testing.assert_close(h.double(), want.view(18, 96), rtol=1e-6, atol=1e-5)
    assert bool(((codes.double() * scale[:, None] - h.double()).abs() <= scale[:, None] * 0.5001 + 1e-6).all())


def test_attention(fresh: int) -> None:
    b, r, s, heads, width = (8, 4, 1000, 12, 64) if LARGE else (2, 3, 70, 2, 32)
    length = torch.randint(1, s + 1, (b,), dtype=torch.int32).to(DEVICE)
    q, kv = random(b, r, heads * width), random(b, s, 2 * heads * width)
    keys = quantize_heads(kv, heads, width)
    values = quantize_heads(kv[..., heads * width :], heads, width, transposed=True)
    found = attend(q, keys, values, length, width**-0.5)
    torch.testing.assert_close(found, attend_reference(q, keys, values, length, width**-0.5), rtol=1e-4, atol=2e-4)


def test_attention_over_the_past(fresh: int) -> None:
    rows, heads, width, steps = (64, 12, 64, 40) if LARGE else (2, 2, 32, 5)
    cache = Cache.of(steps, rows, heads, width, DEVICE)
    cache.k.fill_(0x55), cache.v.fill_(0x55), cache.k_scale.fill_(torch.nan), cache.v_scale.fill_(torch.nan)
    history = torch.full((rows, steps), 0x55555555, dtype=torch.int32, device=DEVICE)
    past: list[torch.Tensor] = []
    for t in range(steps - 1):
        past.append(random(rows, 3 * heads * width))
        step = torch.tensor([t], dtype=torch.int32, device=DEVICE)
        found = attend_history(past[-1], cache, history, step, width**-0.5)
        history[:, t] = torch.arange(rows, dtype=torch.int32, device=DEVICE)
    q, k, v = torch.stack(past, 1).split(heads * width, -1)
    length = torch.full((rows,), len(past), dtype=torch.int32, device=DEVICE)
    keys = quantize_heads(k.contiguous(), heads, width)
    values = quantize_heads(v.contiguous(), heads, width, transposed=True)
    want = attend_reference(q[:, -1:].contiguous(), keys, values, length, width**-0.5)
    torch.testing.assert_close(found[:, None], want, rtol=1e-4, atol=2e-4)


def test_best_tokens(fresh: int) -> None:
    m, v, k = (256, 250027, 8) if LARGE else (2, 1300, 4)
    scores = random(m, v) * 4
    peaks, sums = tile_stats(scores)
    values, tokens = top_tokens(scores, k, normalize=True)
    want, places = scores.double().log_softmax(1).topk(k, 1)
    torch.testing.assert_close(values.double(), want, rtol=1e-5, atol=1e-4)
    assert torch.equal(scores.gather(1, tokens.long()), scores.gather(1, places))
    total = (peaks.double().exp() * sums.double()).sum(1).log()
    torch.testing.assert_close(total, scores.double().logsumexp(1), rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("bits", [8, 2])
def test_one_shot_and_weight_only(bits: int, fresh: int) -> None:
    m, n, k = (8, 3072, 1024) if LARGE else (3, 40, 100)
    weight, x, norm, residual = random_weight(n, k, bits), random(m, k), (random(k), random(k)), random(m, n)
    codes = unpack(weight).double() * weight.scale_N[:, None].double()
    y, h = one_shot_matmul(x, weight, norm=norm, residual_MN=residual, keep=True)
    assert h is not None
    scale = h.abs().amax(1, keepdim=True).double() / 127
    want = residual.double() + (h.double() / scale).round() * scale @ codes.T
    slack = float(scale.max() * codes.abs().max()) * 3  # of codes that meet a tie
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=slack)
    half = x.half()
    found = weight_only_matmul(half, weight, residual_MN=residual.half()).double()
    want = residual.half().double() + half.double() @ codes.T
    torch.testing.assert_close(found, want, rtol=2e-3, atol=2e-3 * float(want.abs().max()))


@pytest.mark.parametrize("bits", [8, 2])
def test_best_tokens_from_the_vocabulary(bits: int, fresh: int) -> None:
    m, n, k, d = (256, 50265, 8, 768) if LARGE else (3, 300, 4, 64)
    weight, scale = random_weight(n, d, bits), torch.rand(m).to(DEVICE) * 0.01 + 0.001
    a = torch.randint(-127, 128, (m, d), dtype=torch.int8).to(DEVICE)
    logits = a.double() @ unpack(weight).double().T * scale[:, None].double() * weight.scale_N.double()
    values, tokens = best_tokens(a, scale, weight, None, k, normalize=True)
    want = logits.log_softmax(1)
    torch.testing.assert_close(values.double(), want.topk(k, 1).values, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(want.gather(1, tokens.long()), values.double(), rtol=1e-5, atol=1e-4)
