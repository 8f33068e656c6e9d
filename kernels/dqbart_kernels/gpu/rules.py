"""What transformers' logits processors do to scores, on the device: tokens that may not come, and repetition penalty.

What the vocabulary's classes forbid at a length needs no launch of its own where the best tokens are found without
writing logits (vocabulary.py). Else one launch takes the logits of every row to scores (log-probabilities, for beams)
without them; where rules look back at what a hypothesis says, a second one changes those few tokens.
What depends on a request lies in device memory, not in the launches, so that a captured graph serves any request.
The order is transformers' (notes of `make_rules` in cpu/src/scores.cpp): a forced token comes before everything.

Shape suffixes: R hypotheses, V tokens, T steps, W bad words of several tokens, L their tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.head import TILE, Stats, log_sum_exp

NEVER, TOO_SHORT, AT_BEGINNING = tl.constexpr(1), tl.constexpr(2), tl.constexpr(4)  # bits of a token's class
# Places in `Rules.numbers`. Lengths count the start token.
SHORTEST, BEGINNING, FORCED_BOS, FORCED_EOS, MAX_LENGTH, NGRAM = (tl.constexpr(i) for i in range(6))


@dataclass(frozen=True)
class Rules:
    """A request's rules on the device; `of` reads them from what `generate` takes."""

    class_V: Tensor  # uint8
    numbers: Tensor  # int32 [6]
    penalty: Tensor  # fp32 [1]
    words_WL: Tensor  # int32: each from the left, then -1
    looks_back: bool

    @classmethod
    def of(
        cls,
        vocabulary: int,
        device: torch.device | str,
        *,
        max_length: int,
        eos: Sequence[int] = (),
        min_length: int = 0,
        no_repeat_ngram_size: int = 0,
        repetition_penalty: float = 1.0,
        forced_bos_token: int | None = None,
        forced_eos_token: int | None = None,
        bad_words: Sequence[Sequence[int]] = (),
        suppress: Sequence[int] = (),
        begin_suppress: Sequence[int] = (),
    ) -> "Rules | None":
        """None where nothing is asked. Raises `ValueError` for tokens out of range and empty bad words."""
        classes = torch.zeros(vocabulary, dtype=torch.uint8)
        words = [list(word) for word in bad_words]
        if not all(words):
            raise ValueError("an empty bad word")
        forced = [-1 if token is None else token for token in (forced_bos_token, forced_eos_token)]
        for token in (*eos, *suppress, *begin_suppress, *sum(words, []), *(max(0, token) for token in forced)):
            if not 0 <= token < vocabulary:
                raise ValueError(f"listed id {token}: expected 0 to {vocabulary - 1}")
        for tokens, bit in (
            ((*suppress, *(word[0] for word in words if len(word) == 1)), NEVER),
            (eos if min_length > 1 else (), TOO_SHORT),
            (begin_suppress, AT_BEGINNING),
        ):
            classes[list(tokens)] |= bit.value
        words = [word for word in words if len(word) > 1]
        looks_back = bool(words) or no_repeat_ngram_size > 0 or repetition_penalty != 1
        if not (looks_back or classes.any() or max(forced) >= 0):
            return None
        rows = torch.full((triton.next_power_of_2(max(1, len(words))), max(map(len, words), default=1)), -1)
        for row, word in zip(rows, words, strict=False):
            row[: len(word)] = torch.tensor(word)
        numbers = [min_length, 1 if forced_bos_token is None else 2, *forced, max_length, no_repeat_ngram_size]
        return cls(
            classes.to(device), torch.tensor(numbers, dtype=torch.int32, device=device),
            torch.tensor([repetition_penalty], dtype=torch.float32, device=device), rows.int().to(device), looks_back,
        )  # fmt: skip

    @property
    def shape(self) -> tuple[int, int, bool]:
        """What a captured graph is made for; the rest is data."""
        return (*self.words_WL.shape, self.looks_back)

    def copy_(self, other: "Rules") -> None:
        for name in ("class_V", "numbers", "penalty", "words_WL"):
            getattr(self, name).copy_(getattr(other, name))


@triton.jit
def forced_token(numbers_ptr, length):
    """The token that must come after `length` tokens, or -1."""
    forced = tl.where(length == 1, tl.load(numbers_ptr + FORCED_BOS), -1)
    last = tl.load(numbers_ptr + FORCED_EOS)
    return tl.where((length == tl.load(numbers_ptr + MAX_LENGTH) - 1) & (last >= 0), last, forced)


@triton.jit
def banned(class_ptr, numbers_ptr, length, token, V):
    """Which of these tokens may not come after `length` tokens."""
    kind = tl.load(class_ptr + token, mask=token < V, other=0).to(tl.int32)
    out = (kind & NEVER) != 0
    out |= ((kind & TOO_SHORT) != 0) & (length < tl.load(numbers_ptr + SHORTEST))
    out |= ((kind & AT_BEGINNING) != 0) & (length == tl.load(numbers_ptr + BEGINNING))
    forced = forced_token(numbers_ptr, length)
    return tl.where(forced >= 0, token != forced, out)


@triton.jit
def _apply_classes(
    scores_ptr,  # fp32 [R, V]: logits, and then scores
    peak_ptr, sum_ptr,  # fp32 [R, tiles], of the logits
    class_ptr,  # uint8 [V]
    numbers_ptr, step_ptr,
    V, T, NORMALIZE: tl.constexpr, BT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(1).to(tl.int64)
    token = tl.program_id(0) * TILE + tl.arange(0, TILE)
    x = tl.load(scores_ptr + row * V + token, mask=token < V, other=float("-inf"))
    if NORMALIZE:
        top, log_sum = log_sum_exp(peak_ptr, sum_ptr, row, T, BT)
        x = (x - top) - log_sum
    length = tl.load(step_ptr) + 1
    x = tl.where((forced_token(numbers_ptr, length) >= 0) & (x == x), 0.0, x)
    out = banned(class_ptr, numbers_ptr, length, token, V)
    tl.store(scores_ptr + row * V + token, tl.where(out, float("-inf"), x), mask=token < V)


@triton.jit
def _said(tokens_ptr, history_ptr, row, t, step, R, T, mask):
    """What hypothesis `row` says at steps t, -1 outside."""
    writer = tl.load(history_ptr + row * T + t, mask=mask & (t >= 0) & (t < step), other=0)
    return tl.load(tokens_ptr + t * R + tl.where(t < step, writer, row), mask=mask & (t >= 0) & (t <= step), other=-1)


@triton.jit
def _look_back(
    scores_ptr,  # fp32 [R, V]
    tokens_ptr, history_ptr,  # int32 [T + 1, R], [R, T]
    numbers_ptr, penalty_ptr, words_ptr, step_ptr,
    R, V, T, W, L, BT: tl.constexpr, BW: tl.constexpr,
):  # fmt: skip
    row, step = tl.program_id(0), tl.load(step_ptr)
    length = step + 1
    if forced_token(numbers_ptr, length) < 0:
        scores_ptr += row.to(tl.int64) * V
        t = tl.arange(0, BT)
        said = _said(tokens_ptr, history_ptr, row, t, step, R, T, t <= step)
        penalty = tl.load(penalty_ptr)
        x = tl.load(scores_ptr + said, mask=t <= step, other=0)
        x = tl.where(x < 0, x * penalty, tl.div_rn(x, penalty))
        tl.debug_barrier()  # a token said twice is read twice before it is written
        tl.store(scores_ptr + said, x, mask=t <= step)
        tl.debug_barrier()

        n = tl.load(numbers_ptr + NGRAM)
        repeats = (t + n <= length) & (t + n > t)  # n 0: none
        for i in range(0, n - 1):
            here = _said(tokens_ptr, history_ptr, row, t + i, step, R, T, repeats)
            repeats &= here == _said(
                tokens_ptr, history_ptr, row, tl.zeros_like(t) + length - n + 1 + i, step, R, T, repeats
            )
        token = _said(tokens_ptr, history_ptr, row, t + n - 1, step, R, T, repeats)
        tl.store(scores_ptr + token, float("-inf"), mask=repeats)

        w = tl.arange(0, BW)
        count = tl.zeros((BW,), tl.int32)
        for i in range(0, L):
            count += tl.load(words_ptr + w * L + i, mask=w < W, other=-1) >= 0
        complete = (count > 0) & (count - 1 <= length)
        for i in range(0, L):
            before = complete & (i < count - 1)
            here = _said(tokens_ptr, history_ptr, row, length - (count - 1) + i, step, R, T, before)
            complete &= (here == tl.load(words_ptr + w * L + i, mask=before, other=-1)) | (i >= count - 1)
        last = tl.load(words_ptr + w * L + count - 1, mask=complete, other=0)
        tl.store(scores_ptr + last, float("-inf"), mask=complete)


def apply_rules(
    scores_RV: Tensor, stats: Stats, rules: Rules, tokens_TR: Tensor, history_RT: Tensor, step: Tensor, normalize: bool
) -> None:
    """Turn logits, in place, into scores under the rules: log-probabilities with `normalize`."""
    (r, v), tiles, steps = scores_RV.shape, stats[0].shape[1], history_RT.shape[1]
    _apply_classes[(tiles, r)](
        scores_RV, *stats, rules.class_V, rules.numbers, step, v, tiles, NORMALIZE=normalize,
        BT=triton.next_power_of_2(tiles), TILE=TILE, num_warps=4,
    )  # fmt: skip
    if rules.looks_back:
        w, width = rules.words_WL.shape
        _look_back[(r,)](
            scores_RV, tokens_TR, history_RT, rules.numbers, rules.penalty, rules.words_WL, step, r, v, steps, w,
            width, BT=triton.next_power_of_2(steps + 1), BW=w, num_warps=4,
        )  # fmt: skip
