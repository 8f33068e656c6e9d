"""The best tokens of each row of logits, and the log of the sum of their exponentials.

Problem: beam search wants 2 * beams of 50,000 to 250,000 numbers, and `torch.topk` and `logsumexp` read them several
times. Method: one launch gives every tile of a row its largest logit and its sum; the k best tokens lie in the k tiles
with the largest of those, so a second launch reads only these, k * TILE numbers. Exact, and equal logits come with the
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


@triton.jit
def _tile_stats(
    logits_ptr,  # fp32 [M, V]
    peak_ptr, sum_ptr,  # fp32 [M, T]: largest logit of a tile, and sum of exp(logit - largest)
    V, T, TILE: tl.constexpr,
):  # fmt: skip
    tile, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token = tile * TILE + tl.arange(0, TILE)
    x = tl.load(logits_ptr + row * V + token, mask=token < V, other=float("-inf"))
    peak = tl.max(x, 0)
    tl.store(peak_ptr + row * T + tile, peak)
    # A tile that is all minus infinity adds nothing; minus infinity minus itself would be NaN.
    tl.store(sum_ptr + row * T + tile, tl.where(peak > float("-inf"), tl.sum(tl.exp(x - peak), 0), 0.0))


@triton.jit
def _top_tokens(
    logits_ptr,  # fp32 [M, V]
    peak_ptr, sum_ptr,  # fp32 [M, T]
    value_ptr,  # fp32 [M, K]
    token_ptr,  # int64 [M, K]
    lse_ptr,  # fp32 [M]
    V, T, K, TILES: tl.constexpr, BT: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    tile = tl.arange(0, BT)
    peaks = tl.load(peak_ptr + row * T + tile, mask=tile < T, other=float("-inf"))
    sums = tl.load(sum_ptr + row * T + tile, mask=tile < T, other=0)
    top = tl.max(peaks, 0)
    tl.store(lse_ptr + row, top + tl.log(tl.sum(tl.where(sums > 0, sums * tl.exp(peaks - top), 0.0), 0)))

    place = tl.arange(0, TILES)
    chosen = tl.zeros((TILES,), tl.int32)
    left = tl.where(tile < T, tile, 2147483647)  # tiles not yet chosen
    for i in range(0, tl.minimum(K, T)):
        best = tl.max(tl.where(left < 2147483647, peaks, float("-inf")), 0)
        first = tl.min(tl.where(peaks == best, left, 2147483647), 0)
        chosen = tl.where(place == i, first, chosen)
        left = tl.where(tile == first, 2147483647, left)
    token = chosen[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = (place < tl.minimum(K, T))[:, None] & (token < V)
    x = tl.load(logits_ptr + row * V + token, mask=inside, other=float("-inf"))
    waiting = tl.where(inside, token, 2147483647)
    for i in range(0, K):
        best = tl.max(tl.max(tl.where(waiting < 2147483647, x, float("-inf")), 1), 0)
        first = tl.min(tl.min(tl.where(x == best, waiting, 2147483647), 1), 0)
        tl.store(value_ptr + row * K + i, best)
        tl.store(token_ptr + row * K + i, first.to(tl.int64))
        waiting = tl.where(token == first, 2147483647, waiting)


def top_tokens(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The k largest logits fp32 [M, k], best first, their tokens int64 [M, k], and log sum exp fp32 [M].

    Raises `ValueError` for what is not contiguous fp32 [M, V], or k out of range.
    """
    m, v = _check(logits_MV, k)
    tiles, device = triton.cdiv(v, TILE), logits_MV.device
    peaks, sums = (torch.empty((m, tiles), dtype=torch.float32, device=device) for _ in range(2))
    values = torch.empty((m, k), dtype=torch.float32, device=device)
    tokens = torch.empty((m, k), dtype=torch.int64, device=device)
    lse = torch.empty(m, dtype=torch.float32, device=device)
    if m:
        _tile_stats[(tiles, m)](logits_MV, peaks, sums, v, tiles, TILE=TILE, num_warps=4)
        _top_tokens[(m,)](
            logits_MV, peaks, sums, values, tokens, lse, v, tiles, k, TILES=triton.next_power_of_2(k),
            BT=triton.next_power_of_2(tiles), TILE=TILE, num_warps=8,
        )  # fmt: skip
    return values, tokens, lse


def top_tokens_reference(logits_MV: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch."""
    _check(logits_MV, k)
    values, tokens = logits_MV.sort(dim=1, descending=True, stable=True)
    return values[:, :k].contiguous(), tokens[:, :k].contiguous(), logits_MV.double().logsumexp(1).float()


def _check(logits_MV: Tensor, k: int) -> tuple[int, int]:
    if logits_MV.dim() != 2 or logits_MV.dtype != torch.float32 or not logits_MV.is_contiguous():
        raise ValueError(f"logits {logits_MV.dtype} {list(logits_MV.shape)}: expected contiguous fp32 [M, V]")
    m, v = logits_MV.shape
    if not 1 <= k <= min(v, LARGEST_K):
        raise ValueError(f"k {k}: expected 1 to {min(v, LARGEST_K)}")
    return m, v
