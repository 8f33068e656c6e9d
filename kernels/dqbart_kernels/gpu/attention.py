"""Attention on int8 keys and values with one scale per (token, head), in the contract's fixed point.

    score_j = (q . k_j) s_q s_k[j] scaling        e_j = exp(score_j - peak)
    c_j = round(e_j s_v[j] / top * 127 * 257)     top = max e_j s_v[j]
    out = sum_j c_j v_j * top / (127 * 257) / sum_j floor(e_j 2^30) 2^-30

Problem: sums over keys must come out the same for any batch, padding and cut (dqbart/quant/attention.py). Method: all
sums are of integers. c_j is two digits of base 256, each an int8, so the mixture runs on int8 matrix units too, twice.
`peak` and `top` are of the whole row: a few rows keep all their keys' scores in registers; many, or more keys, make
three passes, whose products are cheap beside their bytes and stay in cache. Values lie transposed, since matrix units
take 8-bit operands along K only. Rejected: one pass with a running maximum, whose codes would depend on the order of
keys.

Shape suffixes: B sources, R query rows of each, S keys, H heads, D head width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.decode import exponential, quantize_rows
from dqbart_kernels.gpu.products import quotient

LARGEST = tl.constexpr(127 * 257)
AT_ONCE = 8192  # scores that a program of few rows keeps in registers: of 8 rows and 1,024 keys
Heads = tuple[Tensor, Tensor]  # int8 codes [B, H, S, D], of values [B, H, D, S], and fp32 scales [B, H, S]


@triton.jit
def _quantize_heads(
    x_ptr,  # fp32 [B, S, ldx]: head h at h D
    codes_ptr,  # int8 [B, H, S, D], or [B, H, D, S]
    scale_ptr,  # fp32 [B, H, S]
    S, H, D, ldx, TRANSPOSED: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    s = tl.program_id(0) * BS + tl.arange(0, BS)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (s < S)[:, None] & (d < D)[None, :]
    codes, scale = quantize_rows(
        tl.load(x_ptr + (b * S + s)[:, None] * ldx + (h * D + d)[None, :], mask=inside, other=0)
    )
    place = (b * H + h) * S
    if TRANSPOSED:
        tl.store(codes_ptr + place * D + d[None, :] * S + s[:, None], codes, mask=inside)
    else:
        tl.store(codes_ptr + (place + s)[:, None] * D + d[None, :], codes, mask=inside)
    tl.store(scale_ptr + place + s, scale, mask=s < S)


@triton.jit
def _scores(q, q_scale, k_ptr, k_scale_ptr, start, length, D, scaling, BS: tl.constexpr, BD: tl.constexpr):
    """fp32 [BR, BS] of the keys from `start` on; minus infinity past the last."""
    key, d = start + tl.arange(0, BS), tl.arange(0, BD)
    k = tl.load(k_ptr + key[:, None] * D + d[None, :], mask=(key < length)[:, None] & (d < D)[None, :], other=0)
    dots = tl.dot(q, tl.trans(k), out_dtype=tl.int32).to(tl.float32)
    k_scale = tl.load(k_scale_ptr + key, mask=key < length, other=0)
    return tl.where((key < length)[None, :], dots * q_scale[:, None] * k_scale[None, :] * scaling, float("-inf"))


@triton.jit
def fixed(e):
    """The parts of a sum of exponentials as whole numbers of 2^-30, fp32 to int64."""
    return (e * 1073741824.0).to(tl.int32).to(tl.int64)


@triton.jit
def _weights(e, v_scale_ptr, start, length, BS: tl.constexpr):
    """What each key has of the mixture, before it is divided: its exponential times its value's scale."""
    key = start + tl.arange(0, BS)
    return e * tl.load(v_scale_ptr + key, mask=key < length, other=0)[None, :]


@triton.jit
def inverse_of(top):
    return tl.div_rn(1.0, tl.maximum(top, 1e-37)) * LARGEST  # rows beyond the last have no top


@triton.jit
def _mix(weights, inverse, v_ptr, high, low, start, S, length, D, BS: tl.constexpr, BD: tl.constexpr):
    """Both digits of the mixture, with these keys: int32 [BR, BD]."""
    key, d = start + tl.arange(0, BS), tl.arange(0, BD)
    codes = ((weights * inverse[:, None] + 12582912.0) - 12582912.0).to(tl.int32)
    first = (codes + 128) >> 8
    # not only up to `length`, a number that would have them loaded byte by byte: weights past it are 0
    v = tl.load(v_ptr + d[:, None] * S + key[None, :], mask=(d < D)[:, None] & (key < S)[None, :], other=0)
    high = tl.dot(first.to(tl.int8), tl.trans(v), high, out_dtype=tl.int32)
    low = tl.dot((codes - (first << 8)).to(tl.int8), tl.trans(v), low, out_dtype=tl.int32)
    return high, low


@triton.jit
def _attend(
    q_ptr,  # fp32 [B, R, ldq]: head h at h D
    k_ptr, k_scale_ptr,  # int8 [B, H, S, D], fp32 [B, H, S]
    v_ptr, v_scale_ptr,  # int8 [B, H, D, S], fp32 [B, H, S]
    length_ptr,  # int32 [B]: keys of each source
    out_ptr,  # fp32 [B, R, H D]
    R, S, H, D, ldq, scaling, ONCE: tl.constexpr, BR: tl.constexpr, BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    h, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (r < R)[:, None] & (d < D)[None, :]
    q, q_scale = quantize_rows(tl.load(q_ptr + (b * R + r)[:, None] * ldq + (h * D + d)[None, :], mask=inside, other=0))
    length = tl.load(length_ptr + b)
    place = (b * H + h) * S
    k_ptr, v_ptr = k_ptr + place * D, v_ptr + place * D
    k_scale_ptr, v_scale_ptr = k_scale_ptr + place, v_scale_ptr + place
    high, low = tl.zeros((BR, BD), tl.int32), tl.zeros((BR, BD), tl.int32)
    if ONCE:  # all keys in registers
        scores = _scores(q, q_scale, k_ptr, k_scale_ptr, 0, length, D, scaling, BS, BD)
        e = exponential(scores - tl.max(scores, 1)[:, None])
        total = tl.sum(fixed(e), 1)
        weights = _weights(e, v_scale_ptr, 0, length, BS)
        top, strange = tl.max(weights, 1), tl.sum(weights * 0.0, 1)  # strange: 0, or NaN where something is not finite
        high, low = _mix(weights, inverse_of(top), v_ptr, high, low, 0, S, length, D, BS, BD)
    else:
        peak = tl.full((BR,), float("-inf"), tl.float32)
        for start in range(0, length, BS):
            scores = _scores(q, q_scale, k_ptr, k_scale_ptr, start, length, D, scaling, BS, BD)
            peak = tl.maximum(peak, tl.max(scores, 1))
        total, top, strange = tl.zeros((BR,), tl.int64), tl.zeros((BR,), tl.float32), tl.zeros((BR,), tl.float32)
        for start in range(0, length, BS):
            scores = _scores(q, q_scale, k_ptr, k_scale_ptr, start, length, D, scaling, BS, BD)
            e = exponential(scores - peak[:, None])
            total += tl.sum(fixed(e), 1)
            weights = _weights(e, v_scale_ptr, start, length, BS)
            top = tl.maximum(top, tl.max(weights, 1))
            strange += tl.sum(weights * 0.0, 1)
        inverse = inverse_of(top)
        for start in range(0, length, BS):
            scores = _scores(q, q_scale, k_ptr, k_scale_ptr, start, length, D, scaling, BS, BD)
            weights = _weights(exponential(scores - peak[:, None]), v_scale_ptr, start, length, BS)
            high, low = _mix(weights, inverse, v_ptr, high, low, start, S, length, D, BS, BD)
    factor = top.to(tl.float64) * (1073741824.0 / LARGEST) / total.to(tl.float64)
    out = (high.to(tl.float64) * 256 + low.to(tl.float64)) * (factor + strange.to(tl.float64))[:, None]
    tl.store(out_ptr + ((b * R + r) * H + h)[:, None] * D + d[None, :], out.to(tl.float32), mask=inside)


def quantize_heads(x_BSN: Tensor, heads: int, width: int, transposed: bool = False) -> Heads:
    """Codes [B, H, S, D] and scales [B, H, S] of the first heads * width columns of fp32 rows [B, S, N]; `transposed`,
    as values are wanted: codes [B, H, D, S].
    """
    b, s, row = _check_rows("projection", x_BSN, heads, width)
    shape = (b, heads, width, s) if transposed else (b, heads, s, width)
    codes = torch.empty(shape, dtype=torch.int8, device=x_BSN.device)
    scale = torch.empty((b, heads, s), dtype=torch.float32, device=x_BSN.device)
    if b and s:
        bs = 32 if transposed else 16
        _quantize_heads[(triton.cdiv(s, bs), heads, b)](
            x_BSN, codes, scale, s, heads, width, row, TRANSPOSED=transposed, BS=bs, BD=_wide(width), num_warps=4,
            enable_fp_fusion=False,
        )  # fmt: skip
    return codes, scale


def attend(q_BRN: Tensor, keys: Heads, values: Heads, length_B: Tensor, scaling: float) -> Tensor:
    """fp32 [B, R, H D]: attention of R rows per source (its tokens, or its beams) over the first `length_B` keys, at
    least one; values are transposed. Raises `ValueError` for shapes and types that don't fit.
    """
    b, heads, s, width = keys[0].shape
    _, rows, row = _check_rows("queries", q_BRN, heads, width)
    _check_heads(q_BRN, keys, values, length_B)
    out = torch.empty((b, rows, heads * width), dtype=torch.float32, device=q_BRN.device)
    if b and rows:
        least = 8 if torch.version.hip is None else 16  # AMD's matrix units take 16 rows
        br = least if rows <= least else 16 if rows <= 16 else 64
        all_keys = max(32, triton.next_power_of_2(s))
        once = br <= 16 and br * all_keys <= AT_ONCE
        bs = all_keys if once else 256 if br <= 16 else 64
        _attend[(triton.cdiv(rows, br), heads, b)](
            q_BRN, *keys, *values, length_B, out, rows, s, heads, width, row, scaling, ONCE=once, BR=br,
            BS=bs, BD=_wide(width), num_warps=8 if bs > 128 else 4, enable_fp_fusion=False,
        )  # fmt: skip
    return out


def attend_reference(q_BRN: Tensor, keys: Heads, values: Heads, length_B: Tensor, scaling: float) -> Tensor:
    """The same function in float64, without fixed point: what `attend` is close to."""
    b, heads, s, width = keys[0].shape
    q, q_scale = quantize_heads_reference(q_BRN, heads, width)
    scores = (q.double() * q_scale[..., None]) @ (keys[0].double() * keys[1][..., None]).transpose(2, 3) * scaling
    outside = torch.arange(s, device=scores.device) >= length_B[:, None]
    weights = scores.masked_fill(outside[:, None, None], -torch.inf).softmax(-1)
    mixed = weights @ (values[0].double() * values[1][:, :, None]).transpose(2, 3)
    return mixed.transpose(1, 2).reshape(b, -1, heads * width).float()


def quantize_heads_reference(x_BSN: Tensor, heads: int, width: int, transposed: bool = False) -> Heads:
    """The same in torch."""
    b, s, _ = _check_rows("projection", x_BSN, heads, width)
    x = x_BSN[..., : heads * width].reshape(b, s, heads, width).transpose(1, 2)
    peak = x.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    codes = (x * (peak.reciprocal() * 127)).round().to(torch.int8)
    return codes.transpose(2, 3).contiguous() if transposed else codes, quotient(peak, 127)[..., 0]


def _wide(width: int) -> int:
    return max(32, triton.next_power_of_2(width))  # matrix units take 32 bytes at least


def _check_rows(name: str, x: Tensor, heads: int, width: int) -> tuple[int, int, int]:
    """Sources, rows of each, and the stride of a row."""
    if x.dim() != 3 or x.dtype != torch.float32 or x.stride(2) != 1 or x.shape[2] < heads * width:
        raise ValueError(f"{name} {x.dtype} {list(x.shape)}: expected fp32 [B, S, {heads * width} or more]")
    if x.shape[0] > 1 and x.shape[1] and x.stride(0) != x.shape[1] * x.stride(1):
        raise ValueError(f"{name} with strides {x.stride()}: expected rows one after the other")
    return x.shape[0], x.shape[1], x.stride(1)


def _check_heads(q_BRN: Tensor, keys: Heads, values: Heads, length_B: Tensor) -> None:
    shape = list(keys[0].shape)
    across = [*shape[:2], shape[3], shape[2]]
    for name, (codes, scale), wanted in (("keys", keys, shape), ("values", values, across)):
        if codes.dtype != torch.int8 or list(codes.shape) != wanted or not codes.is_contiguous():
            raise ValueError(f"{name} {codes.dtype} {list(codes.shape)}: expected contiguous int8 {wanted}")
        if scale.dtype != torch.float32 or list(scale.shape) != shape[:3] or not scale.is_contiguous():
            raise ValueError(
                f"scales of {name} {scale.dtype} {list(scale.shape)}: expected contiguous fp32 {shape[:3]}"
            )
    if len(q_BRN) != shape[0] or length_B.dtype != torch.int32 or list(length_B.shape) != shape[:1]:
        raise ValueError(
            f"queries of {len(q_BRN)} sources, lengths {length_B.dtype} {list(length_B.shape)}: expected {shape[0]} "
            f"sources and int32 [{shape[0]}]"
        )
