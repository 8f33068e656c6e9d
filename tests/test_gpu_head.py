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
    values, tokens, lse = top_tokens(logits, k)
    want = top_tokens_reference(logits, k)
    assert torch.equal(values, want[0])
    finite = values > -torch.inf
    assert torch.equal(tokens[finite], want[1][finite])
    torch.testing.assert_close(lse, want[2], rtol=1e-6, atol=1e-5)


def test_no_rows_and_what_does_not_fit() -> None:
    x = torch.zeros(2, 9, device=DEVICE)
    assert top_tokens(x[:0], 2)[0].shape == (0, 2)
    for logits, k, words in (
        (x, 0, "k 0: expected 1 to 9"),
        (x, 10, "k 10: expected 1 to 9"),
        (x.half(), 2, r"logits torch.float16 \[2, 9\]: expected contiguous fp32 \[M, V\]"),
        (x.T, 1, "expected contiguous fp32"),
    ):
        with pytest.raises(ValueError, match=words):
            top_tokens(logits, k)
