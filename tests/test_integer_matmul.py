"""Every path of the exact int8 product against int64, at values and shapes chosen to break it."""

import copy
import pickle
import warnings

import pytest
import torch
from dqbart_kernels import integer_matmul
from dqbart_kernels.integer_matmul import best_path, float_matmul, int_matmul, int_matmul_reference, prepare_weight
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

CPU = torch.device("cpu")
PATHS = ["fbgemm", "int_mm", "fp32"] if best_path(CPU) == "fbgemm" else ["int_mm", "fp32"]

# what one operand may hold: constant extremes, alternating signs, one outlier per pair, noise
FILLS = {
    "max": lambda shape, top: torch.full(shape, top),
    "min": lambda shape, top: torch.full(shape, -top),
    "alternating": lambda shape, top: top * (1 - 2 * (torch.arange(shape[1]) % 2)).expand(shape),
    "outlier": lambda shape, top: top * (torch.arange(shape[1]) % 2 == 0).expand(shape),
    "noise": lambda shape, top: torch.randint(-top, top + 1, shape),
}


def exact(a_MK: Tensor, w_NK: Tensor) -> Tensor:
    return (a_MK.to(torch.int64) @ w_NK.to(torch.int64).T).float()


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("top", [1, 7, 64, 65, 127])
@pytest.mark.parametrize("fill", FILLS)
def test_worst_cases_are_exact(path: str, top: int, fill: str) -> None:
    torch.manual_seed(0)
    for k in (33, 1025, 5000):
        w = FILLS[fill]((9, k), top).to(torch.int8)
        operand = prepare_weight(w, path)
        for m, a_fill in ((1, "max"), (3, "min"), (37, "noise"), (2, "alternating")):
            a = FILLS[a_fill]((m, k), 127).to(torch.int8)
            assert torch.equal(int_matmul(a, operand), exact(a, w)), (k, m, a_fill)


@pytest.mark.parametrize("path", PATHS)
@given(
    m=st.integers(0, 40), n=st.integers(1, 40), k=st.integers(1, 300), top=st.integers(1, 128), seed=st.integers(0, 9)
)
@settings(max_examples=40, deadline=None)
def test_any_shape_is_exact(path: str, m: int, n: int, k: int, top: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    w = torch.randint(-top, top, (n, k), generator=generator, dtype=torch.int8)
    a = torch.randint(-128, 128, (m, k), generator=generator, dtype=torch.int8)
    operand = prepare_weight(w, path)
    assert torch.equal(operand.matmul(a), exact(a, w))
    assert torch.equal(operand.matmul(a.float()), exact(a, w))
    assert torch.equal(operand.codes(), w)


def test_results_above_2_to_24_round_once() -> None:
    """Sums like 2^24 + 1 have no fp32; every path must give the nearest one, ties to even."""
    k = 1041
    w = torch.full((4, k), 127, dtype=torch.int8)
    a = torch.full((3, k), 127, dtype=torch.int8)
    a[1, 0], a[2, :2] = 126, torch.tensor([125, 1])
    assert int(int_matmul_reference(a, w).max()) > 1 << 24
    for path in PATHS:
        assert torch.equal(prepare_weight(w, path).matmul(a), int_matmul_reference(a, w).float())
    torch.manual_seed(0)
    w, a = (torch.randint(120, 128, (n, 5203)).to(torch.int8) for n in (20, 20))
    for path in PATHS:
        assert torch.equal(prepare_weight(w, path).matmul(a), exact(a, w))


def test_reference_is_int32() -> None:
    a, w = torch.tensor([[127, -128]], dtype=torch.int8), torch.tensor([[-128, -128]], dtype=torch.int8)
    assert int_matmul_reference(a, w).tolist() == [[-128 * 127 + 128 * 128]]
    assert int_matmul_reference(a, w).dtype == torch.int32


@pytest.mark.parametrize("k", [1, 768, 1024, 1025, 3072])
def test_training_product_is_exact(k: int) -> None:
    torch.manual_seed(k)
    for fill in FILLS:
        w = FILLS[fill]((11, k), 127).to(torch.int8)
        a = FILLS["max"]((5, k), 127).to(torch.int8)
        assert torch.equal(float_matmul(a.float(), w), exact(a, w))


@pytest.mark.parametrize("path", PATHS)
def test_result_is_fresh_and_contiguous(path: str) -> None:
    w = torch.ones(3, 5, dtype=torch.int8)
    a = torch.ones(2, 5)
    operand = prepare_weight(w, path)
    operand.matmul(a).mul_(7)  # callers scale in place
    result = operand.matmul(a)
    assert result.is_contiguous() and result.dtype == torch.float32 and (result == 5).all()
    strided = torch.arange(10.0).view(5, 2).T
    assert torch.equal(operand.matmul(strided), exact(strided, w))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (1, 1)])
def test_empty_operands(path: str, shape: tuple[int, int]) -> None:
    operand = prepare_weight(torch.zeros(shape, dtype=torch.int8), path)
    assert operand.matmul(torch.zeros(2, shape[1])).tolist() == [[0.0] * shape[0]] * 2


@pytest.mark.parametrize("path", PATHS)
def test_survives_copy_and_pickle(path: str) -> None:
    w = torch.randint(-127, 128, (6, 2100), dtype=torch.int8)
    w[0] = 127
    a = torch.randint(-127, 128, (2, 2100), dtype=torch.int8)
    operand = prepare_weight(w, path)
    for again in (copy.deepcopy(operand), copy.copy(operand), pickle.loads(pickle.dumps(operand))):
        assert torch.equal(again.matmul(a), exact(a, w))


def test_8_bit_codes_are_split_only_where_the_operator_saturates(monkeypatch: pytest.MonkeyPatch) -> None:
    if "fbgemm" not in PATHS:
        pytest.skip("fbgemm does not run on this processor")
    w = torch.full((2, 8), 127, dtype=torch.int8)
    monkeypatch.setattr(integer_matmul, "_saturates", lambda: True)
    assert prepare_weight(w, "fbgemm").split
    assert not prepare_weight(w // 2, "fbgemm").split
    monkeypatch.setattr(integer_matmul, "_saturates", lambda: False)
    assert not prepare_weight(w, "fbgemm").split


def test_a_path_that_multiplies_wrongly_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integer_matmul, "_fbgemm_multiply", lambda a, packed: torch.zeros(3, 9))
    integer_matmul._works.cache_clear()
    try:
        assert best_path(CPU) == "fp32"
    finally:
        integer_matmul._works.cache_clear()


def test_the_global_engine_is_left_alone_and_nothing_warns() -> None:
    before = torch.backends.quantized.engine
    try:
        for engine in torch.backends.quantized.supported_engines:
            torch.backends.quantized.engine = engine
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                prepare_weight(torch.ones(2, 2, dtype=torch.int8)).matmul(torch.ones(1, 2))
            assert torch.backends.quantized.engine == engine
    finally:
        torch.backends.quantized.engine = before


def test_errors_quote_what_came() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 3\]: expected torch.int8 \[N, K\]"):
        prepare_weight(torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"activations \[1, 4\]: expected \[M, 3\]"):
        prepare_weight(torch.ones(2, 3, dtype=torch.int8)).matmul(torch.ones(1, 4))
