"""The best tokens of each row straight from the vocabulary's product, whose logits are never written.

Problem: at 256 rows the logits of 50,000 tokens are 51 MB, written once and read twice, which takes longer than the
product. Method: a launch multiplies and keeps of each tile of TILE tokens its largest logit and the sum of exponentials
(as head.py's `tile_stats`). The k best tokens lie in the k tiles with the largest of those, so a second launch makes
these tiles again, k * TILE logits of each row, and a third picks from them. The same integers give the same logits:
exact, with nothing to check. Tokens that rules.py bans by their class count in the sum alone. Rules that look back and
sampling need every logit and take `int8_matmul`. Rejected: the best two of each
tile with a check that they suffice (a tile more in the program, a third kernel on a bad day).

Shape suffixes: M rows, N tokens, K width, T tiles, W bytes of a packed row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.head import LARGEST_K, log_sum_exp, pick_best, top_tokens_reference
from dqbart_kernels.gpu.products import (
    EIGHT_BITS,
    FIELD,
    Tiles,
    Weight,
    int8_matmul_reference,
    multiply,
    scale_columns,
    shared_memory,
    uses_asm,
)
from dqbart_kernels.gpu.rules import Rules, banned, forced_token

TILE = 128


@triton.jit
def _logits(
    a_ptr, a_scale, w_ptr, w_scale_ptr, bias_ptr, m, n, M, N, K, W,
    BITS: tl.constexpr, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, SWAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """fp32 [BM, BN] as `int8_matmul` makes them; minus infinity past the last token."""
    acc = multiply(a_ptr, w_ptr, m, n.to(tl.int64), 0, tl.cdiv(W, BW), M, N, K, W, K, BITS, BM, BN, BW, SWAP, ASM,
                   EIGHT_BITS)  # fmt: skip
    x = scale_columns((acc >> FIELD).to(tl.float32) * a_scale[:, None], w_scale_ptr, bias_ptr, n, N)
    return tl.where((n < N)[None, :], x, float("-inf"))


@triton.jit
def _vocabulary_stats(
    a_ptr, a_scale_ptr,  # int8 [M, K], fp32 [M]
    w_ptr, w_scale_ptr, bias_ptr,  # uint8 [N, W], fp32 [N], fp32 [N] or None
    peak_ptr, sum_ptr,  # fp32 [M, T]
    best_ptr,  # fp32 [M, T], or None: the largest that is not banned
    class_ptr, numbers_ptr, step_ptr,  # of rules.py, or None
    M, N, K, W, T,
    BITS: tl.constexpr, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, SWAP: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    m, n = tl.program_id(1) * BM + tl.arange(0, BM), tile * BN + tl.arange(0, BN)
    a_scale = tl.load(a_scale_ptr + m, mask=m < M, other=0)
    x = _logits(a_ptr, a_scale, w_ptr, w_scale_ptr, bias_ptr, m, n, M, N, K, W, BITS, FIELD, BM, BN, BW, SWAP, ASM)
    peak = tl.max(x, 1)
    below = x - tl.where(peak > float("-inf"), peak, 0.0)[:, None]
    share = tl.where(below == below, tl.exp(below), 0.0)
    # in units of 2**-40, as integers: the order of fp32 sums changes with BM, and so with how many rows there are
    sums = tl.sum((share * 1099511627776.0).to(tl.int64), 1).to(tl.float32) * 9.094947017729282e-13
    sums += tl.sum(tl.where(below != below, below, 0.0), 1)
    tl.store(peak_ptr + m * T + tile, peak, mask=m < M)
    tl.store(sum_ptr + m * T + tile, sums, mask=m < M)
    if class_ptr is not None:
        out = banned(class_ptr, numbers_ptr, tl.load(step_ptr) + 1, n, N)
        best = tl.max(tl.where(out[None, :], float("-inf"), x), 1)
        tl.store(best_ptr + m * T + tile, best, mask=m < M)


@triton.jit
def _best_tiles(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, bias_ptr, best_ptr, class_ptr, numbers_ptr, step_ptr,  # as above
    logits_ptr,  # fp32 [M, k, TILE]
    tile_ptr,  # int32 [M, k]
    M, N, K, W, T,
    BITS: tl.constexpr, FIELD: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, BT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    row, place = tl.program_id(0), tl.program_id(1)
    tile = tl.arange(0, BT)
    peaks = tl.load(best_ptr + row * T + tile, mask=tile < T, other=float("-inf"))
    left, chosen = tl.where(tile < T, tile, 2147483647), 0
    for _ in range(0, place + 1):
        best = tl.max(tl.where(left < 2147483647, peaks, float("-inf")), 0)
        chosen = tl.min(tl.where(peaks == best, left, 2147483647), 0)
        left = tl.where(tile == chosen, 2147483647, left)
    chosen = tl.minimum(chosen, T)  # the one after the last holds nothing
    m, n = row + tl.arange(0, 1), chosen * BN + tl.arange(0, BN)
    a_scale = tl.load(a_scale_ptr + m)
    x = _logits(a_ptr, a_scale, w_ptr, w_scale_ptr, bias_ptr, m, n, M, N, K, W, BITS, FIELD, 1, BN, BW, False, ASM)
    if class_ptr is not None:
        out = banned(class_ptr, numbers_ptr, tl.load(step_ptr) + 1, n, N)
        x = tl.where(out[None, :], float("-inf"), x)
    at = row * tl.num_programs(1) + place
    tl.store(logits_ptr + at * BN + tl.arange(0, BN)[None, :], x)
    tl.store(tile_ptr + at, chosen)


@triton.jit
def _pick(
    logits_ptr, tile_ptr, peak_ptr, sum_ptr,  # as above
    value_ptr, token_ptr,  # fp32, int32 [M, k]
    numbers_ptr, step_ptr,  # as above
    N, T, k, NORMALIZE: tl.constexpr, TILES: tl.constexpr, BT: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    top, log_sum = log_sum_exp(peak_ptr, sum_ptr, row, T, BT)
    place, column = tl.arange(0, TILES), tl.arange(0, BN)
    tile = tl.load(tile_ptr + row * k + place, mask=place < k, other=T)
    token = tile[:, None] * BN + column[None, :]
    inside = token < N
    x = tl.load(logits_ptr + (row * k + place)[:, None] * BN + column[None, :], mask=inside, other=float("-inf"))
    if numbers_ptr is not None:  # a forced token is certain
        forced = forced_token(numbers_ptr, tl.load(step_ptr) + 1)
        x = tl.where((forced >= 0) & (x > float("-inf")), 0.0, x)
        top = tl.where(forced >= 0, 0.0, top)
        log_sum = tl.where((forced >= 0) & (log_sum == log_sum), 0.0, log_sum)
    pick_best(x, token, inside, top, log_sum, value_ptr + row * k, token_ptr + row * k, N, k, NORMALIZE)


def best_tokens(
    a_MK: Tensor, a_scale_M: Tensor, weight: Weight, bias_N: Tensor | None, k: int, normalize: bool = False,
    rules: Rules | None = None, step: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The k largest logits fp32 [M, k] of int8 rows against the packed vocabulary, best first, and their tokens int32.

    `normalize`: their logarithms of the softmax instead. `rules`: what they say of classes and forced tokens holds,
    after as many steps as `step`, int32 [1], says; those that look back are `apply_rules`'. A row with a NaN gives NaN.
    Raises `ValueError` for k out of range, rows that don't fit and rules that look back.
    """
    if rules is not None and (rules.looks_back or step is None):
        raise ValueError(f"rules with looks_back {rules.looks_back}, step {step}: expected False and int32 [1]")
    m, n = _check(a_MK, a_scale_M, weight, bias_N, k)
    w, tiles, device = weight.packed_NW.shape[1], triton.cdiv(n, TILE), a_MK.device
    peaks, sums = (torch.empty((m, tiles), dtype=torch.float32, device=device) for _ in range(2))
    logits = torch.empty((m, k, TILE), dtype=torch.float32, device=device)
    chosen, tokens = (torch.empty((m, k), dtype=torch.int32, device=device) for _ in range(2))
    values = torch.empty((m, k), dtype=torch.float32, device=device)
    if m:
        bm, wide = 16 if m <= 16 else 64, triton.next_power_of_2(tiles)
        cut = Tiles(bm, TILE, 64, 1, swap=m > 16, warps=4, stages=3).within(shared_memory(device), weight.bits)
        packed = a_MK, a_scale_M, weight.packed_NW, weight.scale_N, bias_N
        how = dict(BITS=weight.bits, FIELD=FIELD[weight.bits], BN=TILE, BW=64, ASM=uses_asm(device))
        best = peaks if rules is None else torch.empty_like(peaks)
        classes = (None, None, None) if rules is None else (rules.class_V, rules.numbers, step)
        _vocabulary_stats[(tiles, triton.cdiv(m, bm))](
            *packed, peaks, sums, best, *classes, m, n, weight.k, w, tiles, BM=bm, SWAP=cut.swap, num_warps=4,
            num_stages=cut.stages, enable_fp_fusion=False, **how,
        )  # fmt: skip
        _best_tiles[(m, k)](
            *packed, best, *classes, logits, chosen, m, n, weight.k, w, tiles, BT=wide, num_warps=4, num_stages=3,
            enable_fp_fusion=False, **how,
        )  # fmt: skip
        _pick[(m,)](
            logits, chosen, peaks, sums, values, tokens, *classes[1:], n, tiles, k, NORMALIZE=normalize,
            TILES=triton.next_power_of_2(k), BT=wide, BN=TILE, num_warps=8,
        )  # fmt: skip
    return values, tokens


def best_tokens_reference(
    a_MK: Tensor, a_scale_M: Tensor, weight: Weight, bias_N: Tensor | None, k: int, normalize: bool = False
) -> tuple[Tensor, Tensor]:
    """The same in torch, with all logits."""
    _check(a_MK, a_scale_M, weight, bias_N, k)
    return top_tokens_reference(int8_matmul_reference(a_MK, a_scale_M, weight, bias_N), k, normalize)


def _check(a_MK: Tensor, a_scale_M: Tensor, weight: Weight, bias_N: Tensor | None, k: int) -> tuple[int, int]:
    m, n = len(a_MK), weight.n
    if not 1 <= k <= min(n, LARGEST_K):
        raise ValueError(f"k {k}: expected 1 to {min(n, LARGEST_K)}")
    for name, tensor, dtype, shape in (
        ("rows", a_MK, torch.int8, (m, weight.k)), ("their scales", a_scale_M, torch.float32, (m,)),
        ("bias", bias_N, torch.float32, (n,)),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected contiguous {dtype} {list(shape)}")
    return m, n
