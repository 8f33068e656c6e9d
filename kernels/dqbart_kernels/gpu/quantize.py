"""Fake quantization for training: rows of weights or activations to codes and scales, or to codes times scales.

    8, 4, 3 bits   codes = round(x * (1 / max |x| * qmax)), scale = max |x| / qmax
    2 bits         codes = sign(x) where |x| > 0.7 mean |x|, scale = the mean of |x| over those
    1 bit          codes = 1 where x >= 0, else -1, scale = mean |x|

Problem: as a chain of torch operators (dqbart/quant/quantizers.py, which defines these schemes) a matrix is read and
written five to fifteen times. Method: a program holds whole rows in registers, reads them once and writes the result.
Symmetric codes and scales are the definition's to the last bit. Means are summed in float64, so that their order and
huge values make no difference: scales are within 1e-6 of torch's fp32 sums, and a ternary code differs only where |x|
is as near to the threshold as that. Rejected: fp32 sums in an order of ours, which would be as far from torch's.

Shape suffixes: M rows, K width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.decode import quantize_rows
from dqbart_kernels.gpu.products import quotient

LONGEST = 8192  # a row must fit in one program's registers
QMAX = {8: 127, 4: 7, 3: 3, 2: 1, 1: 1}


@triton.jit
def _quantize(
    x_ptr,  # fp32, fp16 or bf16 [M, K]
    codes_ptr,  # int8 [M, K], or None: not wanted
    values_ptr,  # [M, K] of x's type, or None: codes times scales
    scale_ptr,  # fp32 [M]
    M, K, clip, BITS: tl.constexpr, QMAX: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    column = tl.arange(0, BK)
    inside = (row < M)[:, None] & (column < K)[None, :]
    place = row[:, None] * K + column[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0).to(tl.float32)
    strange = tl.sum(x * 0.0, 1)  # 0, or NaN: minimum, maximum and comparisons would hide it
    if clip is not None:
        x = tl.minimum(tl.maximum(x, -clip), clip)
    if BITS > 2:
        codes, scale = quantize_rows(x, QMAX)
    else:
        magnitude = tl.abs(x).to(tl.float64)
        scale = (tl.sum(magnitude, 1) / K).to(tl.float32)
        codes = tl.where(x >= 0, 1.0, -1.0).to(tl.int8)
        if BITS == 2:
            kept = tl.abs(x) > tl.maximum(scale * 0.7, 1e-30)[:, None]
            count = tl.maximum(tl.sum(kept.to(tl.int32), 1), 1).to(tl.float64)
            scale = tl.maximum((tl.sum(tl.where(kept, magnitude, 0.0), 1) / count).to(tl.float32), 1e-30)
            codes = tl.where(kept, codes, 0)
    scale += strange
    tl.store(scale_ptr + row, scale, mask=row < M)
    if codes_ptr is not None:
        tl.store(codes_ptr + place, codes.to(tl.int8), mask=inside)
    if values_ptr is not None:
        tl.store(values_ptr + place, codes.to(tl.float32) * scale[:, None], mask=inside)


@triton.jit
def _straight_through(
    grad_ptr,  # any float [N]
    x_ptr,  # any float [N]
    out_ptr,  # [N] of grad's type
    N, clip, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + i, mask=i < N, other=0)
    x = tl.load(x_ptr + i, mask=i < N, other=0).to(tl.float32)
    tl.store(out_ptr + i, grad * (tl.abs(x) < clip).to(grad.dtype), mask=i < N)


def quantize(x: Tensor, bits: int, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """int8 codes `[..., K]` and fp32 scales `[..., 1]` of rows `[..., K]`, clamped to [-clip, clip] before.

    The scale of a row that is not finite is not finite. Raises `ValueError` for other types, bits, or K > 8192.
    """
    x = _rows_in_memory(x, bits)
    codes = torch.empty_like(x, dtype=torch.int8)
    return codes, _launch(x, codes, None, bits, clip)


def fake(x: Tensor, bits: int, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """What `x` becomes, codes times scales, in its type and layout; and the scales as `quantize` gives them."""
    x = _rows_in_memory(x, bits)
    values = torch.empty_like(x)
    return values, _launch(x, None, values, bits, clip)


def straight_through(grad: Tensor, x: Tensor, clip: float) -> Tensor:
    """The gradient inside the clip: grad where |x| < clip, else 0. Raises `ValueError` for shapes that differ."""
    if grad.shape != x.shape or grad.device != x.device:
        raise ValueError(
            f"gradient {list(grad.shape)} on {grad.device}: expected {list(x.shape)} on {x.device}, as the input"
        )
    grad, x = grad.contiguous(), x.contiguous()
    out = torch.empty_like(grad)
    if grad.numel():
        _straight_through[(triton.cdiv(grad.numel(), 1024),)](grad, x, out, grad.numel(), clip, BLOCK=1024, num_warps=4)
    return out


def quantize_reference(x: Tensor, bits: int, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """The same in torch, means in float64."""
    _check(x, bits)
    x = x.float()
    strange = (x * 0).sum(-1, keepdim=True)
    if clip is not None:
        x = x.clamp(-clip, clip)
    magnitude = x.abs()
    if bits > 2:
        peak = magnitude.amax(-1, keepdim=True).clamp_min(1e-30)
        return (x * (peak.reciprocal() * QMAX[bits])).round().to(torch.int8), quotient(peak, QMAX[bits]) + strange
    scale = magnitude.double().mean(-1, keepdim=True).float()
    codes = (x >= 0).to(torch.int8) * 2 - 1
    if bits == 2:
        kept = magnitude > (scale * 0.7).clamp_min(1e-30)
        total = (magnitude.double() * kept).sum(-1, keepdim=True)
        scale = (total / kept.sum(-1, keepdim=True).clamp_min(1)).float().clamp_min(1e-30)
        codes = codes * kept
    return codes, scale + strange


def fake_reference(x: Tensor, bits: int, clip: float | None = None) -> tuple[Tensor, Tensor]:
    """The same in torch."""
    codes, scale = quantize_reference(x, bits, clip)
    return (codes * scale).to(x.dtype), scale


def straight_through_reference(grad: Tensor, x: Tensor, clip: float) -> Tensor:
    """The same in torch."""
    return grad * (x.abs() < clip)


def _launch(x: Tensor, codes: Tensor | None, values: Tensor | None, bits: int, clip: float | None) -> Tensor:
    """The scales `[..., 1]`, which lie in memory as the rows do."""
    k = x.shape[-1]
    scale = torch.empty_like(x[..., :1], dtype=torch.float32)
    m = scale.numel()
    if m:
        wide = triton.next_power_of_2(k)
        bm = max(1, 2048 // wide)
        _quantize[(triton.cdiv(m, bm),)](
            x, codes, values, scale, m, k, clip, BITS=bits, QMAX=float(QMAX[bits]), BM=bm, BK=wide,
            num_warps=min(16, max(4, wide // 512)), enable_fp_fusion=False,
        )  # fmt: skip
    return scale


def _rows_in_memory(x: Tensor, bits: int) -> Tensor:
    """`x`, copied only if its rows are not one after the other in some order: heads of a projection are."""
    _check(x, bits)
    return x if x.stride(-1) == 1 and torch.empty_like(x, dtype=torch.bool).stride() == x.stride() else x.contiguous()


def _check(x: Tensor, bits: int) -> None:
    if bits not in QMAX:
        raise ValueError(f"bits {bits!r}: expected one of {sorted(QMAX)}")
    if x.dim() < 1 or x.itemsize not in (2, 4) or not x.is_floating_point() or not 1 <= x.shape[-1] <= LONGEST:
        raise ValueError(f"rows {x.dtype} {list(x.shape)}: expected fp32, fp16 or bf16 [..., K], K from 1 to {LONGEST}")
