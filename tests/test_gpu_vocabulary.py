"""The best tokens from the vocabulary's product, against all logits. Interpreted where there is no GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.head import tile_stats, top_tokens  # noqa: E402
from dqbart_kernels.gpu.products import Weight, int8_matmul  # noqa: E402
from dqbart_kernels.gpu.rules import Rules, apply_rules  # noqa: E402
from dqbart_kernels.gpu.vocabulary import best_tokens, best_tokens_reference  # noqa: E402
from test_gpu_products import DEVICE, random_case  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
@pytest.mark.parametrize(("m", "n", "d", "k"), [(1, 1, 32, 1), (3, 128, 40, 8), (4, 700, 70, 7), (18, 150, 64, 3)])
def test_as_from_all_logits(bits: int, m: int, n: int, d: int, k: int) -> None:
    """Logits of few values, so that most are equal to others, within a tile and across tiles."""
    a, _, weight, _ = random_case(m, n, d, bits)
    ones = torch.ones(m, device=DEVICE)
    coarse = Weight(weight.packed_NW, torch.full((n,), 1e-3, device=DEVICE), bits, d)
    bias = torch.randint(0, 2, (n,), device=DEVICE).float()
    for scale, matrix in ((ones * 1e-4, coarse), (torch.rand(m, device=DEVICE) * 0.01, weight)):
        logits = int8_matmul(a, scale, matrix, bias)
        for normalize in (False, True):
            found = best_tokens(a, scale, matrix, bias, k, normalize)
            want = top_tokens(logits, k, normalize)
            assert torch.equal(found[1], want[1])
            torch.testing.assert_close(found[0], want[0], rtol=0 if not normalize else 1e-6, atol=1e-6 * normalize)
            slow = best_tokens_reference(a, scale, matrix, bias, k, normalize)
            assert torch.equal(found[1], slow[1])
            torch.testing.assert_close(found[0], slow[0], rtol=1e-5, atol=1e-5)


RULES: list[dict[str, Any]] = [
    {"suppress": range(128, 260)},  # a whole tile, and more
    {"min_length": 4, "eos": [5, 140]}, {"begin_suppress": [0, 1, 699], "forced_bos_token": 300},
    {"forced_eos_token": 150, "suppress": [150]}, {"suppress": range(699)},
]  # fmt: skip


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: " ".join(rules))
@pytest.mark.parametrize("length", [1, 2, 3, 4, 9])
def test_rules_as_on_written_logits(rules: dict[str, Any], length: int) -> None:
    """Banned tokens are heavy, and would be first; they count in the sum all the same."""
    m, n, k = 5, 700, 6
    a, scale, weight, _ = random_case(m, n, 70, 2)
    bias = torch.zeros(n, device=DEVICE)
    bias[[*rules.get("suppress", []), *rules.get("eos", [])]] = 50
    asked = Rules.of(n, DEVICE, max_length=10, **rules)
    step = torch.tensor([length - 1], dtype=torch.int32, device=DEVICE)
    for normalize in (False, True):
        scores = int8_matmul(a, scale, weight, bias)
        assert asked is not None
        apply_rules(scores, tile_stats(scores), asked, step, torch.zeros(m, 12), step, normalize)
        want = top_tokens(scores, k)
        found = best_tokens(a, scale, weight, bias, k, normalize, asked, step)
        assert torch.equal(found[1], want[1])
        torch.testing.assert_close(found[0], want[0], rtol=1e-6 * normalize, atol=1e-5 * normalize)
    if asked.numbers[2] >= 0 and length == 1 or asked.numbers[3] >= 0 and length == 9:
        assert (found[0][:, 0] == 0).all() and (found[0][:, 1:] == -torch.inf).all()
    scale[1] = torch.nan
    values, _ = best_tokens(a, scale, weight, bias, k, True, asked, step)
    assert values.isnan().any(1).tolist() == [False, True, False, False, False]


@pytest.mark.parametrize("others", [1, 13, 60])
def test_other_rows_change_no_score(others: int) -> None:
    """Beyond 16 rows tiles are cut and summed otherwise."""
    a, scale, weight, _ = random_case(4 + others, 1000, 70, 2)
    few = best_tokens(a[:4].contiguous(), scale[:4].contiguous(), weight, None, 8, True)
    many = best_tokens(a, scale, weight, None, 8, True)
    assert torch.equal(few[0], many[0][:4]) and torch.equal(few[1], many[1][:4])


def test_rules_that_look_back_are_refused() -> None:
    a, scale, weight, _ = random_case(2, 300, 64, 2)
    asked = Rules.of(300, DEVICE, max_length=10, repetition_penalty=1.2)
    step = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="rules with looks_back True"):
        best_tokens(a, scale, weight, None, 3, False, asked, step)


def test_minus_infinity_and_what_is_not_a_number() -> None:
    """Tokens that a bias forbids never come while others are left; a row that is not finite shows."""
    a, scale, weight, _ = random_case(2, 300, 64, 2)
    bias = torch.full((300,), -torch.inf, device=DEVICE)
    bias[[5, 290]] = 0
    values, tokens = best_tokens(a, scale, weight, bias, 3, normalize=True)
    assert {5, 290} == set(tokens[0, :2].tolist()) and values[:, :2].isfinite().all() and (values[:, 2] < -1e30).all()
    scale[1] = torch.nan
    values, tokens = best_tokens(a, scale, weight, None, 3)
    assert values.isnan().all(1).tolist() == [False, True] and ((tokens >= 0) & (tokens < 300)).all()


def test_what_does_not_fit_is_refused() -> None:
    a, scale, weight, _ = random_case(2, 300, 64, 2)
    assert best_tokens(a[:0], scale[:0], weight, None, 3)[0].shape == (0, 3)
    cases: list[tuple[dict[str, Any], str]] = [
        (dict(k=0), "k 0: expected 1 to 64"),
        (dict(k=65), "k 65: expected 1 to 64"),
        (dict(a_MK=a.float()), r"rows torch.float32 \[2, 64\]: expected contiguous torch.int8 \[2, 64\]"),
        (dict(bias_N=scale), r"bias torch.float32 \[2\]: expected contiguous torch.float32 \[300\]"),
    ]
    for change, words in cases:
        with pytest.raises(ValueError, match=words):
            best_tokens(**(dict(a_MK=a, a_scale_M=scale, weight=weight, bias_N=None, k=3) | change))
