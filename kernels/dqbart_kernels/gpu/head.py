"""The best tokens of each row of scores, best first, and their log-probabilities.

Problem: beam search wants 2 * beams of 50,000 to 250,000 numbers, and `torch.topk` and `logsumexp` read them several
times. Method: one launch gives every tile of a row its largest score and its sum; the k best tokens lie in the k tiles
with the largest of those, so a second launch reads only these, k * TILE numbers. Exact, and equal scores come with the
lower token first, as an argmax would. Rejected: the best two of each tile with a check that they suffice
(one launch less on a good day, a third kernel on a bad one).

Shape suffixes: M rows, V tokens, T tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 512
LARGEST_K = 64
Stats = tuple[Tensor, Tensor]  # fp32 [M, T]: the largest score of a tile, and the sum of exp(score - largest)


@triton.jit
def _tile_stats(
    scores_ptr,  # fp32 [M, V]
    peak_ptr, sum_ptr,  # fp32 [M, T]
    V, T, TILE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(scores_ptr + row * V + token, mask=token < V, other=float("-inf"))
    peak = tl.max(x, 0)
    tl.store(peak_ptr + row * T + tile, peak)
    # A tile that is all minus infinity adds nothing; minus infinity minus itself would be NaN.
    sums = tl.where(peak > float("-inf"), tl.sum(tl.exp(x - peak), 0), 0.0)
    tl.store(sum_ptr + row * T + tile, sums + tl.sum(tl.where(x != x, x, 0.0), 0))


@triton.jit
def log_sum_exp(peak_ptr, sum_ptr, row, T, BT: tl.constexpr):
    """The largest score of a row, and the log of the sum of exp(score - largest): NaN where a score is."""
    tile = tl.arange(0, BT)
    peaks = tl.load(peak_ptr + row * T + tile, mask=tile < T, other=float("-inf"))
    sums = tl.load(sum_ptr + row * T + tile, mask=tile < T, other=0)
    top = tl.max(peaks, 0)
    return top, tl.log(tl.sum(tl.where(sums != 0, sums * tl.exp(peaks - top), 0.0), 0))


@triton.jit
def pick_best(x, token, inside, top, log_sum, value_ptr, token_ptr, V, K, NORMALIZE: tl.constexpr):
    """Write the K best of a block of scores in order, equal ones by their tokens, and what `log_sum_exp` says of it."""
    strange = tl.where(log_sum != log_sum, log_sum, 0.0)  # 0, or NaN
    waiting = tl.where(inside, token, 2147483647)
    for i in range(0, K):
        best = tl.max(tl.max(tl.where(waiting < 2147483647, x, float("-inf")), 1), 0)
        first = tl.min(tl.min(tl.where(x == best, waiting, 2147483647), 1), 0)
        value = best
        if NORMALIZE:
            value = tl.where(best > float("-inf"), (best - top) - log_sum, best)
        tl.store(value_ptr + i, value + strange)
        tl.store(token_ptr + i, tl.minimum(first, V - 1))
        waiting = tl.where(token == first, 2147483647, waiting)


@triton.jit
def _top_tokens(
    scores_ptr,  # fp32 [M, V]
    peak_ptr, sum_ptr,  # fp32 [M, T]
    value_ptr,  # fp32 [M, K]
    token_ptr,  # int32 [M, K]
    V, T, K, NORMALIZE: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BT)
    peaks = tl.load(peak_ptr + row * T + tile, mask=tile < T, other=float("-inf"))
    top, log_sum = log_sum_exp(peak_ptr, sum_ptr, row, T, BT)
    place = tl.arange(0, TILES)
    chosen = tl.zeros((TILES,), tl.int32)
    left = tl.where(tile < T, tile, 2147483647)  # tiles not yet chosen
    for i in range(0, tl.minimum(K, T)):
        best = tl.max(tl.where(left < 2147483647, peaks, float("-inf")), 0)
        first = tl.min(tl.where(peaks == best, left, 2147483647), 0)
        chosen = tl.where(place == i, tl.minimum(first, T), chosen)  # where nothing is a number, the one after the last
        left = tl.where(tile == first, 2147483647, left)
    token = chosen[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (place < tl.minimum(K, T))[:, None] & (token < V)
    x = tl.load(scores_ptr + row * V + token, mask=inside, other=float("-inf"))
    pick_best(x, token, inside, top, log_sum, value_ptr + row * K, token_ptr + row * K, V, K, NORMALIZE)


def tile_stats(scores_MV: Tensor) -> Stats:
    """Largest score and sum of exponentials of every tile of contiguous fp32 rows. Raises `ValueError` otherwise."""
    if scores_MV.dim() != 2 or scores_MV.dtype != torch.float32 or not scores_MV.is_contiguous():
        raise ValueError(f"scores {scores_MV.dtype} {list(scores_MV.shape)}: expected contiguous fp32 [M, V]")
    m, v = scores_MV.shape
    tiles = triton.cdiv(v, TILE)
    peaks, sums = (torch.empty((m, tiles), dtype=torch.float32, device=scores_MV.device) for _ in range(2))
    if m:
        _tile_stats[(tiles, m)](scores_MV, peaks, sums, v, tiles, TILE=TILE, num_warps=4)
    return peaks, sums


def top_tokens(scores_MV: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """The k largest scores fp32 [M, k], best first, and their tokens int32 [M, k].

    `normalize`: their logarithms of the softmax instead. A row with a NaN gives NaN. Raises `ValueError` for what is
    not contiguous fp32 [M, V], or k out of range.
    """
    _check(scores_MV, k)
    (m, v), device = scores_MV.shape, scores_MV.device
    peaks, sums = tile_stats(scores_MV)
    values = torch.empty((m, k), dtype=torch.float32, device=device)
    tokens = torch.empty((m, k), dtype=torch.int32, device=device)
    if m:
        _top_tokens[(m,)](
            scores_MV, peaks, sums, values, tokens, v, peaks.shape[1], k, NORMALIZE=normalize,
            TILES=triton.next_power_of_2(k), BT=triton.next_power_of_2(peaks.shape[1]), TILE=TILE, num_warps=8,
        )  # fmt: skip
    return values, tokens


def top_tokens_reference(scores_MV: Tensor, k: int, normalize: bool = False) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    _check(scores_MV, k)
    values, tokens = scores_MV.sort(dim=1, descending=True, stable=True)
    if normalize:
        # a row where nothing may come stays as it is
        values = torch.where(values == -torch.inf, values, values.double().log_softmax(1).float())
    return values[:, :k].contiguous(), tokens[:, :k].int()


def _check(scores_MV: Tensor, k: int) -> None:
    if scores_MV.dim() != 2 or not 1 <= k <= min(scores_MV.shape[1], LARGEST_K):
        raise ValueError(f"k {k} of scores {list(scores_MV.shape)}: expected 1 to {LARGEST_K}, of as many tokens")
