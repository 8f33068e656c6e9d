"""The best tokens on a GPU, interpreted where there is none."""

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: pip install triton")

from dqbart_kernels.gpu.head import top_tokens, top_tokens_reference  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of the interpreter: minus infinity less itself
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("v, k", [(1, 1), (7, 7), (512, 8), (513, 3), (5000, 12), (50265, 8)])
@pytest.mark.parametrize("kind", ["random", "ties", "one tile", "banned"])
def test_the_best_tokens_are_found_with_ties_in_order(v: int, k: int, kind: str) -> None:
    torch.manual_seed(v)
    logits = torch.randn(3, v) * 4
    if kind == "ties":
        logits = logits.round()
    if kind == "one tile":  # all of the best lie side by side
        logits[:, v // 2 : v // 2 + k] += 100
    if kind == "banned" and v > 2 * k:
        logits[torch.rand(3, v) < 0.5] = -torch.inf
        logits[1, : v - k] = -torch.inf  # whole tiles
    logits = logits.to(DEVICE)
    values, tokens = top_tokens(logits, k)
    want = top_tokens_reference(logits, k)
    assert torch.equal(values, want[0])
    finite = values > -torch.inf
    assert torch.equal(tokens[finite], want[1][finite])
    values, again = top_tokens(logits, k, normalize=True)
    assert torch.equal(again, tokens)
    torch.testing.assert_close(values, top_tokens_reference(logits, k, normalize=True)[0], rtol=1e-6, atol=1e-5)


def test_what_is_not_a_number_shows() -> None:
    scores = torch.zeros(3, 600, device=DEVICE)
    scores[1, 599] = torch.nan
    scores[2] = -torch.inf
    for normalize in (False, True):
        values, tokens = top_tokens(scores, 2, normalize)
        assert values.isnan().all(1).tolist() == [False, True, False] and (values[2] == -torch.inf).all()
        assert ((tokens >= 0) & (tokens < 600)).all()
    around = torch.zeros(3, 5000, device=DEVICE)
    around[1] = torch.nan  # all of a row: what lies before it is not looked at
    values, tokens = top_tokens(around, 2)
    assert values[1].isnan().all() and (tokens[1] == 4999).all()


def test_no_rows_and_what_does_not_fit() -> None:
    x = torch.zeros(2, 9, device=DEVICE)
    assert top_tokens(x[:0], 2)[0].shape == (0, 2)
    for scores, k, words in (
        (x, 0, r"k 0 of scores \[2, 9\]: expected 1 to 64, of as many tokens"),
        (x, 10, "k 10 of scores"),
        (x.half(), 2, r"scores torch.float16 \[2, 9\]: expected contiguous fp32 \[M, V\]"),
        (x.T, 1, "expected contiguous fp32"),
    ):
        with pytest.raises(ValueError, match=words):
            top_tokens(scores, k)
