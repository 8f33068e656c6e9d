"""The native products: exact integers in every instruction set, floats in the order that every engine keeps, and the
threads that they share.
"""

import os
import signal
import sys

import numpy as np
import pytest
import torch
from dqbart_kernels import cpu
from dqbart_kernels.cpu.products import Product, pack, quantize
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dqbart.packed import layout
from dqbart.quant import rounding
from dqbart.quant.quantizers import Quantizer

pytestmark = pytest.mark.skipif(cpu.reason() is not None, reason=str(cpu.reason()))
SETS = cpu.instruction_sets() if cpu.reason() is None else []
LARGEST = {1: 1, 2: 1, 4: 7, 8: 127}


def random_codes(rng: np.random.Generator, shape: tuple[int, int], bits: int) -> cpu.I8:
    top = LARGEST[bits]
    return (rng.choice([-1, 1], shape) if bits == 1 else rng.integers(-top, top + 1, shape)).astype(np.int8)


def product(
    isa: str, codes: cpu.I8, bits: int, a: cpu.I8, w_scale: cpu.F32 | None = None, a_scale: cpu.F32 | None = None,
    threads: int = 1, activation: str | None = None, integers: bool = False,
) -> cpu.F32 | cpu.I32:  # fmt: skip
    ones = np.ones(max(len(codes), len(a)), np.float32)
    w_scale, a_scale = (
        ones[: len(codes)] if w_scale is None else w_scale,
        ones[: len(a)] if a_scale is None else a_scale,
    )
    planar = layout.pack(torch.from_numpy(codes), bits).numpy()
    packed = pack(planar, (len(codes), codes.shape[1]), bits)
    return Product(isa, packed, bits, w_scale, a, a_scale, threads).run(activation, integers)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("n, k, m", [(1, 1, 1), (17, 3, 2), (16, 64, 6), (33, 100, 7), (50, 129, 13), (15, 4096, 5)])
def test_exact_integers(isa: str, bits: int, n: int, k: int, m: int) -> None:
    rng = np.random.default_rng(n + k + m)
    codes, a = random_codes(rng, (n, k), bits), rng.integers(-127, 128, (m, k)).astype(np.int8)
    got = product(isa, codes, bits, a, threads=2, integers=True)
    assert np.array_equal(got, a.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("sign", [-1, 1])
def test_extremes_do_not_saturate(isa: str, bits: int, sign: int) -> None:
    """All codes at their largest against all activations at theirs: where 16-bit sums would overflow first."""
    codes = np.full((31, 3072), LARGEST[bits], np.int8)
    codes[::2] *= -1
    a = np.full((9, 3072), sign * 127, np.int8)
    assert np.array_equal(product(isa, codes, bits, a, integers=True), a.astype(np.int64) @ codes.T.astype(np.int64))


@pytest.mark.parametrize("isa", SETS)
@given(
    n=st.integers(1, 70), k=st.integers(1, 400), m=st.integers(1, 40), bits=st.sampled_from([1, 2, 4, 8]),
    threads=st.integers(1, 3), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=40, deadline=None)
def test_any_shape(isa: str, n: int, k: int, m: int, bits: int, threads: int, seed: int) -> None:
    assume(k != 8)  # rows that planar32 refuses
    rng = np.random.default_rng(seed)
    codes, a = random_codes(rng, (n, k), bits), rng.integers(-127, 128, (m, k)).astype(np.int8)
    want = a.astype(np.int64) @ codes.T.astype(np.int64)
    assert np.array_equal(product(isa, codes, bits, a, threads=threads, integers=True), want)
    w_scale, a_scale = rng.random(n).astype(np.float32) + 0.5, rng.random(m).astype(np.float32)
    got = product(isa, codes, bits, a, threads=threads, w_scale=w_scale, a_scale=a_scale)
    assert np.array_equal(got, want.astype(np.float32) * a_scale[:, None] * w_scale)


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_new"])
def test_gelu(isa: str, activation: str) -> None:
    """Products whose values run through GELU's whole range; the formula in float64 is the reference."""
    from math import erf, pi, tanh

    def factor(v: float) -> float:
        return erf(v / 2**0.5) if activation == "gelu" else tanh((2 / pi) ** 0.5 * (v + 0.044715 * v**3))

    a = np.zeros((255, 64), np.int8)
    a[:, 0] = np.arange(-127, 128)
    codes = np.zeros((16, 64), np.int8)
    codes[:, 0] = 1
    scale = np.linspace(0.001, 0.2, 16, dtype=np.float32)
    x = a[:, :1].astype(np.float32) * scale
    want = np.array([[v * 0.5 * (1 + factor(v)) for v in row] for row in x.astype(np.float64)])
    got = product(isa, codes, 8, a, w_scale=scale, activation=activation)
    ours = (rounding.gelu if activation == "gelu" else rounding.gelu_tanh)(torch.from_numpy(x))
    assert np.array_equal(got, ours)  # the torch engine's, to the last bit
    assert np.abs(got - want).max() < 2e-6 and np.abs((got - want)[x > 0] / want[x > 0]).max() < 5e-7


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("k", [1, 7, 16, 33, 768, 4001])
def test_quantization_is_the_contract_s(isa: str, k: int) -> None:
    x = np.random.default_rng(k).standard_normal((5, k)).astype(np.float32)
    x[1] = 0
    x[2] *= 1e-35  # quantizes as zeros: 127 / max would overflow
    x[3, : k // 2] = np.round(x[3, : k // 2] * 4) / 4
    x[4, 0] = 127.0
    x[4, 1:] = np.round(x[4, 1:] * 10) + 0.5  # ties: half to even
    codes, scale, total = quantize(isa, x)
    peak = np.maximum(np.abs(x).max(1, keepdims=True), np.float32(1e-30))
    want = np.rint(x * (np.float32(1) / peak * np.float32(127)))
    assert np.array_equal(want, Quantizer(8).quantize_float(torch.from_numpy(x))[0])
    assert np.array_equal(codes[:, :k], want) and not codes[:, k:].any()
    assert np.array_equal(scale, (peak / np.float32(127))[:, 0]) and np.array_equal(total, want.sum(1))


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 15, 16, 36])
def test_non_finite_input_is_refused(isa: str, bad: float, where: int) -> None:
    x = np.ones((3, 37), np.float32)
    x[1, where] = bad
    with pytest.raises(ValueError, match="cannot quantize NaN or infinite"):
        quantize(isa, x)


@pytest.mark.parametrize("bits, byte", [(2, 0b10), (4, 0b1000), (8, 0x80)])
def test_the_most_negative_code_is_refused(bits: int, byte: int) -> None:
    """-2, -8 and -128: no quantizer writes them, and the bounds of the 16-bit sums are those of the others."""
    planar = np.zeros((3, 32), np.uint8)
    planar[1, 5] = byte
    with pytest.raises(ValueError, match="a code that these weights never hold"):
        pack(planar, (3, 32), bits)


def test_unknown_instruction_set_names_the_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(cpu.VARIABLE, "mmx")
    with pytest.raises(ValueError, match="DQBART_ISA 'mmx': expected one of .*portable"):
        cpu.chosen_instruction_set()
    monkeypatch.setenv(cpu.VARIABLE, "portable")
    assert cpu.chosen_instruction_set() == "portable"


def by_threads(threads: int) -> cpu.I32:
    rng = np.random.default_rng(0)
    codes, a = random_codes(rng, (300, 64), 2), random_codes(rng, (3, 64), 8)
    return product("", codes, 2, a, threads=threads, integers=True)


@pytest.mark.skipif(sys.platform != "linux", reason="counts threads in /proc")
def test_threads_are_kept_and_not_without_end() -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/task"))

    want = by_threads(1)
    assert np.array_equal(by_threads(5), want)
    before = count()
    for _ in range(20):
        assert np.array_equal(by_threads(5), want)
    assert count() == before
    for threads in range(6, 14):  # four pools are kept
        assert np.array_equal(by_threads(threads), want)
    assert count() <= before + sum(range(9, 13))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    want = by_threads(3)
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(60)  # rather than wait for threads that are not there
        os._exit(0 if all(np.array_equal(by_threads(n), want) for n in (3, 3, 4)) else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert np.array_equal(by_threads(3), want)
