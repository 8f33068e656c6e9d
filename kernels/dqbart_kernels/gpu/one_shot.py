"""LayerNorm, int8 codes and the packed product of a few rows in one launch: `rows.norm_and_quantize`, then
`products.int8_matmul`, to the same bits.

Problem: at one source a decode step is a chain of launches that wait for each other, and each costs more than its work.
Method: every program does the row work again for all rows, which are a few KiB in the second-level cache, with all of K
in registers (one dot a plane), and then its own columns of the weight; its weight's bytes are asked for first. Worth it
up to 8 rows: beyond, the repeated work costs more than the launch it saves. Rejected: row work inside a loop over K,
where Triton repeats it in every step (7,218 instructions instead of 1,288).

Shape suffixes: M rows, N output features, K input features, W bytes of a packed row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.decode import BLOCK, plane
from dqbart_kernels.gpu.products import (
    ACTIVATIONS,
    FIELD,
    Weight,
    int8_matmul_reference,
    scale_columns,
    store_result,
    uses_asm,
)
from dqbart_kernels.gpu.rows import norm_and_quantize_reference

MOST_ROWS = 8


def fits(m: int, weight: Weight, normed: bool) -> bool:
    """Whether so many rows of this width stay in registers (as compiled for sm_90, without a spill). Not on AMD, where
    few rows get no matrix instruction."""
    wide = weight.k <= 1024 or (not normed and weight.bits <= 2 and weight.k <= 4096)
    return m <= MOST_ROWS and wide and torch.version.hip is None


@triton.jit
def _place(PLANE: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr):
    """Which k plane PLANE of each byte of a packed row holds."""
    byte = tl.arange(0, BW)
    return byte // BLOCK * (BLOCK * (8 // BITS)) + PLANE * BLOCK + byte % BLOCK


@triton.jit
def _row(x_ptr, m, M, K, PLANE: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr):
    """fp32 [BM, BW] of the rows, zeros outside, and what is inside."""
    k = _place(PLANE, BITS, BW)
    inside = (m < M)[:, None] & (k < K)[None, :]
    return tl.load(x_ptr + m[:, None] * K + k[None, :], mask=inside, other=0), inside


@triton.jit
def _normed(
    x_ptr, weight_ptr, bias_ptr, mean, inverse, m, M, K, PLANE: tl.constexpr, BITS: tl.constexpr, BW: tl.constexpr
):
    """The same rows after LayerNorm, if there is one."""
    x, inside = _row(x_ptr, m, M, K, PLANE, BITS, BW)
    if weight_ptr is not None:
        k = _place(PLANE, BITS, BW)
        weight = tl.load(weight_ptr + k, mask=k < K, other=0).to(tl.float64)
        bias = tl.load(bias_ptr + k, mask=k < K, other=0).to(tl.float64)
        centred = x.to(tl.float64) - mean[:, None]
        x = tl.where(inside, (centred * inverse[:, None] * weight[None, :] + bias[None, :]).to(tl.float32), 0.0)
    return x


@triton.jit
def _one_shot_matmul(
    x_ptr,  # fp32 [M, K]
    weight_ptr, bias_ptr,  # fp32 [K], or None: no LayerNorm
    h_ptr,  # fp32 [M, K], or None: not wanted
    w_ptr,  # uint8 [N, W]
    w_scale_ptr, w_bias_ptr,  # fp32 [N]; the bias may be None
    residual_ptr,  # fp32 [M, N], or None
    y_ptr,  # fp32 [M, N]
    M, N, K, W, eps,
    BITS: tl.constexpr, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    ACTIVATION: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    n, m, byte = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BM), tl.arange(0, BW)
    packed = tl.load(w_ptr + n[:, None] * W + byte[None, :], mask=(n < N)[:, None] & (byte < W)[None, :], other=0)
    mean, inverse = tl.zeros((BM,), tl.float64), tl.zeros((BM,), tl.float64)
    # each plane adds to the same places, and these are summed once: every sum has warps wait for each other
    if weight_ptr is not None:
        parts = tl.zeros((BM, BW), tl.float64)
        for i in tl.static_range(PLANES):
            x, _ = _row(x_ptr, m, M, K, i, BITS, BW)
            parts += x.to(tl.float64)
        mean = tl.sum(parts, 1) / K
        parts = tl.zeros((BM, BW), tl.float64)
        for i in tl.static_range(PLANES):
            x, inside = _row(x_ptr, m, M, K, i, BITS, BW)
            centred = tl.where(inside, x.to(tl.float64) - mean[:, None], 0.0)
            parts += centred * centred
        inverse = 1.0 / tl.sqrt(tl.sum(parts, 1) / K + eps)
    peaks, stranges = tl.full((BM, BW), 1e-30, tl.float32), tl.zeros((BM, BW), tl.float32)
    for i in tl.static_range(PLANES):
        h = _normed(x_ptr, weight_ptr, bias_ptr, mean, inverse, m, M, K, i, BITS, BW)
        peaks = tl.maximum(peaks, tl.abs(h))
        stranges += h * 0.0  # 0, or NaN
        if h_ptr is not None:
            k = _place(i, BITS, BW)
            ours = m < tl.where(tl.program_id(0) == 0, M, 0)
            tl.store(h_ptr + m[:, None] * K + k[None, :], h, mask=ours[:, None] & (k < K)[None, :])
    peak, strange = tl.max(peaks, 1), tl.sum(stranges, 1)
    to_codes = tl.div_rn(1.0, peak) * 127.0
    acc = tl.zeros((BM, BN), tl.int32)
    for i in tl.static_range(PLANES):
        h = _normed(x_ptr, weight_ptr, bias_ptr, mean, inverse, m, M, K, i, BITS, BW)
        codes = ((h * to_codes[:, None] + 12582912.0) - 12582912.0).to(tl.int8)
        acc = tl.dot(codes, tl.trans(plane(packed, i, BITS, ASM)), acc, out_dtype=tl.int32)
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m[:, None] * N + n[None, :]
    y = (acc >> FIELD).to(tl.float32) * (tl.div_rn(peak, 127.0) + strange)[:, None]
    store_result(scale_columns(y, w_scale_ptr, w_bias_ptr, n, N), residual_ptr, y_ptr, at, inside, ACTIVATION)


def one_shot_matmul(
    x_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """y fp32 [M, N] of fp32 rows [M, K] that `fits`, and with `keep` LayerNorm's result [M, K].

    `norm`: LayerNorm's weight and bias. Raises `ValueError` for what doesn't fit, by itself or together.
    """
    m, k, n = _check(x_MK, weight, bias_N, norm, residual_MN, activation)
    y_MN = torch.empty((m, n), dtype=torch.float32, device=x_MK.device)
    h_MK = torch.empty_like(x_MK) if keep and norm is not None else None
    if m and n:
        w = weight.packed_NW.shape[1]
        bn, bw = 8 if n <= 1024 else 16, triton.next_power_of_2(w)
        _one_shot_matmul[(triton.cdiv(n, bn),)](
            x_MK, *(norm or (None, None)), h_MK, weight.packed_NW, weight.scale_N, bias_N, residual_MN, y_MN,
            m, n, k, w, eps, BITS=weight.bits, FIELD=FIELD[weight.bits], BM=max(4, triton.next_power_of_2(m)), BN=bn,
            BW=bw, ACTIVATION=ACTIVATIONS[activation], ASM=uses_asm(x_MK.device), num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return y_MN, h_MK


def one_shot_matmul_reference(
    x_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
    eps: float = 1e-5,
    keep: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The same in torch, in two steps."""
    _check(x_MK, weight, bias_N, norm, residual_MN, activation)
    weight_K, bias_K = norm or (None, None)
    codes, scale, h_MK = norm_and_quantize_reference(x_MK, weight_K, bias_K, eps, keep)
    return int8_matmul_reference(codes, scale, weight, bias_N, residual_MN, activation), h_MK


def _check(
    x_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    residual_MN: Tensor | None,
    activation: str,
) -> tuple[int, int, int]:
    m, n, k = len(x_MK), weight.n, weight.k
    if not fits(m, weight, norm is not None):
        raise ValueError(f"{m} rows of {k}, {weight.bits} bits: too many; norm_and_quantize and int8_matmul take more")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    weight_K, bias_K = norm or (None, None)
    wanted = [
        ("rows", x_MK, (m, k)), ("bias", bias_N, (n,)), ("residual", residual_MN, (m, n)),
        ("LayerNorm's weight", weight_K, (k,)), ("LayerNorm's bias", bias_K, (k,)),
    ]  # fmt: skip
    for name, tensor, shape in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != torch.float32 or not tensor.is_contiguous():
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected contiguous fp32 {list(shape)}")
        if tensor.device != weight.packed_NW.device:
            raise ValueError(f"{name} on {tensor.device}, the weight on {weight.packed_NW.device}: expected one device")
    return m, k, n
