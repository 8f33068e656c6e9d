"""The choice of the next tokens on the device: transformers' beam search, a program per source, and single rows.

Problem: a host that looks at every step's candidates waits for the device, and the device for the host. Method: all
state lies in device memory, a step's last launch moves it on, and the host only asks now and then how many still run.
Hypotheses are never copied: a step writes what each row reads next and which row that goes on from; a finished
hypothesis is (step, row, last token), and its text is read backwards along the parents once, at the end. What does move
is the history that self-attention reads, 4 bytes a step.

Scores and their order are those of transformers' `_beam_search` (5.x), of each source by itself: it stops when it is
done, whatever its batch does. Equal scores: the earlier beam, then the lower token.

Shape suffixes: B sources, N beams, R = B N rows, T steps, K candidates of a row. Lengths count the start token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

EARLY_STOPPING = {False: 0, True: 1, "never": 2}
MAX_LENGTH, EARLY, ENDS = (tl.constexpr(i) for i in range(3))  # places in `Search.numbers`; the end tokens follow
VERY_LOW = tl.constexpr(-1.0e9)  # transformers' score of what is not there
NONE = tl.constexpr(2147483647)


@dataclass(frozen=True)
class Search:
    """A search under way. `numbers` and `divisor_T` are the request's; the kernels move everything else on."""

    numbers: Tensor  # int32
    divisor_T: Tensor  # fp32 [T + 1]: tokens ** length_penalty, for that many tokens after the start
    score_R: Tensor  # fp32: of what each row says so far
    parents_TR: Tensor  # int32 [T + 1, R]: the row of the step before that a row goes on from
    ended_score_BN: Tensor  # fp32: finished hypotheses of each source, best first
    ended_BN: Tensor  # int32 [3, B, N]: their last step or -1, the row there, the token after it
    improvable_B: Tensor  # int32: whether a running hypothesis may still enter them
    done_B: Tensor  # int32
    running: Tensor  # int32 [1]: how many are not done
    arrived: Tensor  # int32 [1]: zero between launches
    strange: Tensor  # int32 [1]: not 0 once a score was not a number

    @classmethod
    def of(cls, sources: int, beams: int, steps: int, ends: int, device: torch.device | str) -> "Search":
        """Room for `steps` steps and `ends` end tokens. Without beams a source is a row."""

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        rows = sources * beams
        shapes = (steps + 1,), (rows,), (sources, beams)
        divisor, score, ended = (torch.zeros(shape, dtype=torch.float32, device=device) for shape in shapes)
        return cls(
            ints(2 + ends), divisor, score, ints(steps + 1, rows), ended, ints(3, sources, beams), ints(sources),
            ints(sources), ints(1), ints(1), ints(1),
        )  # fmt: skip

    def start(
        self,
        sources: int,
        max_length: int,
        eos: Sequence[int],
        early_stopping: bool | str = False,
        length_penalty: float = 1.0,
    ) -> None:
        """The first `sources` run; the others, which fill up a graph, are done from the start."""
        b, beams = self.ended_score_BN.shape
        early = EARLY_STOPPING[early_stopping]
        # "never" hopes for the longest text, unless length costs; then it is as False
        numbers = [max_length, 0 if early == 2 and length_penalty <= 0 else early, *eos]
        numbers += [-1] * (len(self.numbers) - len(numbers))
        self.numbers.copy_(torch.tensor(numbers, dtype=torch.int32))
        tokens = np.maximum(1, np.arange(len(self.divisor_T), dtype=np.float64))
        self.divisor_T.copy_(torch.from_numpy((tokens**length_penalty).astype(np.float32)))
        # all rows of a source say the same: the first one goes on
        self.score_R.view(b, beams).copy_(torch.tensor([0.0] + [-torch.inf] * (beams - 1)))
        self.ended_score_BN.fill_(VERY_LOW.value)
        self.ended_BN.fill_(-1)
        self.improvable_B.fill_(1)
        self.done_B.copy_((torch.arange(b) >= sources).int())
        self.running.fill_(sources)
        self.arrived.zero_()
        self.strange.zero_()


@triton.jit
def _ends(tokens, numbers_ptr, E):
    """1 where a token is an end token."""
    found = tl.zeros_like(tokens)
    for i in range(0, E):
        found = tl.where(tokens == tl.load(numbers_ptr + ENDS + i), 1, found)
    return found


@triton.jit
def _advance_beams(
    value_ptr, candidate_ptr,  # fp32, int32 [R, K]: log-probabilities, and their tokens
    tokens_ptr, parents_ptr,  # int32 [T + 1, R]
    history_ptr,  # int32 [R, T]
    score_ptr, numbers_ptr, divisor_ptr, ended_score_ptr, ended_ptr, improvable_ptr, done_ptr, running_ptr,
    arrived_ptr, strange_ptr, step_ptr,
    B, N, K, T, E, KEEP, BC: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    b = tl.program_id(0)
    step = tl.load(step_ptr)
    said = step + 1  # tokens after the start, with this one
    alive, improvable = tl.load(done_ptr + b) == 0, tl.load(improvable_ptr + b) != 0
    early, max_length = tl.load(numbers_ptr + EARLY), tl.load(numbers_ptr + MAX_LENGTH)

    # The best KEEP of the source's N K candidates, in order.
    c, i, n = tl.arange(0, BC), tl.arange(0, BK), tl.arange(0, BN)
    value_ptr, candidate_ptr, own = value_ptr + b * N * K, candidate_ptr + b * N * K, b * N + n
    inside, is_beam = c < N * K, n < N
    x = tl.load(value_ptr + c, mask=inside, other=float("-inf"))
    x = x + tl.load(score_ptr + b * N + c // K, mask=inside, other=0)
    if alive & (tl.max((x != x).to(tl.int32), 0) > 0):
        tl.store(strange_ptr, 1)
    waiting = tl.where(x > float("-inf"), c, NONE)
    order = tl.full((BK,), NONE, tl.int32)
    for place in range(0, KEEP):
        best = tl.max(tl.where(waiting < NONE, x, float("-inf")), 0)
        first = tl.min(tl.where(x == best, waiting, NONE), 0)
        order = tl.where(i == place, first, order)
        waiting = tl.where(c == first, NONE, waiting)
    found = order < NONE
    at = tl.where(found, order, 0)
    row = b * N + at // K
    score = tl.load(value_ptr + at, mask=found, other=0) + tl.load(score_ptr + row, mask=found, other=0)
    token = tl.load(candidate_ptr + at, mask=found, other=0)
    stops = tl.where(said + 1 >= max_length, 1, _ends(token, numbers_ptr, E))

    # The first N that go on are the next beams.
    goes_on = tl.where(found, 1 - stops, 0)
    rank = tl.where(goes_on == 1, tl.cumsum(goes_on, 0) - 1, BN)
    chosen = rank[None, :] == n[:, None]
    filled = tl.sum(chosen.to(tl.int32), 1) > 0
    parent = tl.where(filled, tl.sum(tl.where(chosen, row[None, :], 0), 1), own)
    next_token = tl.sum(tl.where(chosen, token[None, :], 0), 1)
    next_score = tl.where(filled, tl.sum(tl.where(chosen, score[None, :], 0.0), 1), float("-inf"))

    # Those that stop among the best N are merged into the finished ones: behind equals, the last ones out.
    ended_score = tl.load(ended_score_ptr + own, mask=is_beam, other=VERY_LOW)
    ended_step = tl.load(ended_ptr + own, mask=is_beam, other=-1)
    ended_row = tl.load(ended_ptr + B * N + own, mask=is_beam, other=-1)
    ended_token = tl.load(ended_ptr + 2 * B * N + own, mask=is_beam, other=-1)
    full = (early == 1) & (tl.sum((is_beam & (ended_step >= 0)).to(tl.int32), 0) == N)
    enters = tl.where(found & (i < N), stops, 0)
    enters = tl.where(improvable & (full == 0), enters, 0)
    final = tl.div_rn(score, tl.load(divisor_ptr + said))
    ahead = is_beam[:, None] & (ended_score[:, None] >= final[None, :])
    into = tl.cumsum(enters, 0) - 1 + tl.sum(ahead.to(tl.int32), 0)
    new = (into[None, :] == n[:, None]) & (enters[None, :] == 1)
    behind = (final[None, :] > ended_score[:, None]) & (enters[None, :] == 1)
    moved = (n + tl.sum(behind.to(tl.int32), 1))[None, :] == n[:, None]
    ended_score = tl.sum(tl.where(moved, ended_score[None, :], 0.0), 1) + tl.sum(tl.where(new, final[None, :], 0.0), 1)
    ended_step = tl.sum(tl.where(moved, ended_step[None, :], 0), 1) + tl.sum(tl.where(new, step, 0), 1)
    ended_row = tl.sum(tl.where(moved, ended_row[None, :], 0), 1) + tl.sum(tl.where(new, row[None, :], 0), 1)
    ended_token = tl.sum(tl.where(moved, ended_token[None, :], 0), 1) + tl.sum(tl.where(new, token[None, :], 0), 1)

    made = tl.where(early == 2, max_length - 1, said)
    possible = tl.div_rn(tl.max(tl.where(n == 0, next_score, float("-inf")), 0), tl.load(divisor_ptr + made))
    worst = tl.min(tl.where(is_beam, ended_score, float("inf")), 0)
    beaten = is_beam & (possible > tl.where(ended_step >= 0, worst, VERY_LOW))
    improvable = improvable & (tl.max(beaten.to(tl.int32), 0) > 0)
    full = (early == 1) & (tl.sum((is_beam & (ended_step >= 0)).to(tl.int32), 0) == N)
    done = (tl.sum(goes_on, 0) == 0) | (improvable == 0) | full
    tl.debug_barrier()  # everything of this step was read before it is overwritten
    if alive:
        tl.store(ended_score_ptr + own, ended_score, mask=is_beam)
        tl.store(ended_ptr + own, ended_step, mask=is_beam)
        tl.store(ended_ptr + B * N + own, ended_row, mask=is_beam)
        tl.store(ended_ptr + 2 * B * N + own, ended_token, mask=is_beam)
        tl.store(improvable_ptr + b, improvable.to(tl.int32))
        tl.store(done_ptr + b, done.to(tl.int32))
        if done:
            tl.atomic_add(running_ptr, -1)
    tl.store(score_ptr + own, next_score, mask=is_beam)
    tl.store(tokens_ptr + said * (B * N) + own, next_token, mask=is_beam)
    tl.store(parents_ptr + said * (B * N) + own, parent, mask=is_beam)
    for start in range(0, step, BT):
        t = start + tl.arange(0, BT)
        written = is_beam[:, None] & (t < step)[None, :]
        history = tl.load(history_ptr + parent[:, None] * T + t[None, :], mask=written, other=0)
        tl.debug_barrier()
        tl.store(history_ptr + own[:, None] * T + t[None, :], history, mask=written)
    tl.store(history_ptr + own * T + step, parent, mask=is_beam)
    tl.debug_barrier()
    if tl.atomic_add(arrived_ptr, 1) == B - 1:  # all have read the step
        tl.store(arrived_ptr, 0)
        tl.store(step_ptr, said)


@triton.jit
def _advance_rows(
    value_ptr, candidate_ptr,  # fp32, int32 [R, 1]
    tokens_ptr,  # int32 [T + 1, R]
    numbers_ptr, done_ptr, running_ptr, strange_ptr, step_ptr,
    R, E, BR: tl.constexpr,
):  # fmt: skip
    r, step = tl.arange(0, BR), tl.load(step_ptr)
    said = step + 1
    done = tl.load(done_ptr + r, mask=r < R, other=1) != 0
    x = tl.load(value_ptr + r, mask=r < R, other=0)
    if tl.max(((x != x) & (done == 0)).to(tl.int32), 0) > 0:
        tl.store(strange_ptr, 1)
    token = tl.load(candidate_ptr + r, mask=r < R, other=0)
    stops = tl.where(said + 1 >= tl.load(numbers_ptr + MAX_LENGTH), 1, _ends(token, numbers_ptr, E))
    done = done | (stops == 1)
    tl.debug_barrier()
    tl.store(tokens_ptr + said * R + r, token, mask=r < R)
    tl.store(done_ptr + r, done.to(tl.int32), mask=r < R)
    tl.store(running_ptr, tl.sum((done == 0).to(tl.int32), 0))
    tl.store(step_ptr, said)


def keep(beams: int, ends: int) -> int:
    """Candidates that transformers looks at for each source, and so needs of each row."""
    return max(2, 1 + ends) * beams


def advance_beams(
    search: Search, values_RK: Tensor, candidates_RK: Tensor, tokens_TR: Tensor, history_RT: Tensor, step: Tensor
) -> None:
    """Choose every source's next beams from the best tokens of its rows, and move `step` on."""
    (b, beams), k, steps = search.ended_score_BN.shape, values_RK.shape[1], history_RT.shape[1]
    ends = len(search.numbers) - 2
    _advance_beams[(b,)](
        values_RK, candidates_RK, tokens_TR, search.parents_TR, history_RT, search.score_R, search.numbers,
        search.divisor_T, search.ended_score_BN, search.ended_BN, search.improvable_B, search.done_B, search.running,
        search.arrived, search.strange, step, b, beams, k, steps, ends, keep(beams, ends),
        BC=triton.next_power_of_2(beams * k), BN=triton.next_power_of_2(beams),
        BK=triton.next_power_of_2(keep(beams, ends)), BT=64, num_warps=4,
    )  # fmt: skip


def advance_rows(search: Search, values_R1: Tensor, candidates_R1: Tensor, tokens_TR: Tensor, step: Tensor) -> None:
    """Take every row's token, and move `step` on."""
    r = len(search.done_B)
    _advance_rows[(1,)](
        values_R1, candidates_R1, tokens_TR, search.numbers, search.done_B, search.running, search.strange, step, r,
        len(search.numbers) - 2, BR=triton.next_power_of_2(r), num_warps=4,
    )  # fmt: skip


def written_beams(search: Search, tokens_TR: Tensor, sources: int, count: int) -> tuple[list[np.ndarray], np.ndarray]:
    """The best `count` texts of each source, from the start token on, and their scores."""
    tokens, parents = tokens_TR.cpu().numpy(), search.parents_TR.cpu().numpy()
    ended, scores = search.ended_BN.cpu().numpy(), search.ended_score_BN.cpu().numpy()
    last_N, row_N, token_N = np.array(ended[:, :sources, :count]).reshape(3, -1)  # a copy: rows move
    said_NT = np.full((len(last_N), len(tokens)), tokens[0, 0], np.int32)
    for t in range(last_N.max(), -1, -1):  # from each text's last step back, all texts at once
        there = np.flatnonzero(last_N >= t)
        said_NT[there, t] = tokens[t, row_N[there]]
        row_N[there] = parents[t, row_N[there]]
    texts = [
        np.append(said[: last + 1], token).astype(np.int32) if last >= 0 else said[:1]
        for said, last, token in zip(said_NT, last_N, token_N, strict=True)
    ]
    return texts, scores[:sources, :count].reshape(-1)


def written_rows(search: Search, tokens_TR: Tensor, count: int, steps: int) -> list[np.ndarray]:
    """What each of the first `count` rows said in `steps` steps, up to its first end token."""
    tokens = tokens_TR[: steps + 1, :count].cpu().numpy().T
    ends = np.isin(tokens[:, 1:], search.numbers[2:].cpu().numpy())
    return [row[: 2 + int(end.argmax())] if end.any() else row for row, end in zip(tokens, ends, strict=True)]
