"""What stands between products, a row at a time: LayerNorm and the int8 codes that the next product takes.

    h = LayerNorm(x)          in float64, rounded once, as in every engine (dqbart/quant/rounding.py)
    codes = round(h / s)      half to even, s = max |h| / 127

Problem: as launches of their own they cost more in waiting than in work. Method: one program holds a row in registers,
reads it once and writes both results. A row that is not finite gives a scale that is NaN or infinite, so that what is
made of it shows. Rejected: fp32 sums, whose last bit depends on their order.

Shape suffixes: M rows, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F


@triton.jit
def _norm_and_quantize(
    x_ptr,  # fp32 [M, D]
    weight_ptr, bias_ptr,  # fp32 [D], or None: no LayerNorm
    h_ptr,  # fp32 [M, D], or None: not wanted
    codes_ptr,  # int8 [M, D]
    scale_ptr,  # fp32 [M]
    D, eps, BD: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BD)
    inside = column < D
    h = tl.load(x_ptr + row + column, mask=inside, other=0)
    if weight_ptr is not None:
        mean = tl.sum(h.to(tl.float64), 0) / D
        centred = tl.where(inside, h.to(tl.float64) - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float64)
        bias = tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float64)
        h = (centred * inverse * weight + bias).to(tl.float32)
    if h_ptr is not None:
        tl.store(h_ptr + row + column, h, mask=inside)
    peak = tl.maximum(tl.max(tl.abs(h), 0), 1e-30)
    strange = tl.sum(h * 0.0, 0)  # 0, or NaN where something is not finite
    codes = (h * (tl.div_rn(1.0, peak) * 127.0) + 12582912.0) - 12582912.0
    tl.store(codes_ptr + row + column, codes.to(tl.int8), mask=inside)
    tl.store(scale_ptr + tl.program_id(0), tl.div_rn(peak, 127.0) + strange)


def norm_and_quantize(
    x_MD: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, eps: float = 1e-5, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """int8 codes [M, D], fp32 scales [M], and LayerNorm's result [M, D] if `keep`; no LayerNorm without `weight_D`.

    Raises `ValueError` for rows that are not contiguous fp32, or parameters that don't fit them.
    """
    m, d = _check(x_MD, weight_D, bias_D)
    h_MD = torch.empty_like(x_MD) if keep and weight_D is not None else None
    codes_MD = torch.empty((m, d), dtype=torch.int8, device=x_MD.device)
    scale_M = torch.empty(m, dtype=torch.float32, device=x_MD.device)
    if m:
        wide = triton.next_power_of_2(d)
        _norm_and_quantize[(m,)](
            x_MD, weight_D, bias_D, h_MD, codes_MD, scale_M, d, eps, BD=wide,
            num_warps=min(8, max(1, wide // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return codes_MD, scale_M, h_MD


def norm_and_quantize_reference(
    x_MD: Tensor, weight_D: Tensor | None = None, bias_D: Tensor | None = None, eps: float = 1e-5, keep: bool = True
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The same in torch."""
    m, d = _check(x_MD, weight_D, bias_D)
    h_MD = x_MD
    if weight_D is not None and bias_D is not None:
        h_MD = F.layer_norm(x_MD.double(), (d,), weight_D.double(), bias_D.double(), eps).float()
    peak = h_MD.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    codes = (h_MD * (peak.reciprocal() * 127)).round()
    return codes.to(torch.int8), (peak / 127)[:, 0], h_MD if keep and weight_D is not None else None


def _check(x_MD: Tensor, weight_D: Tensor | None, bias_D: Tensor | None) -> tuple[int, int]:
    if x_MD.dim() != 2 or x_MD.dtype != torch.float32 or not x_MD.is_contiguous() or not x_MD.shape[1]:
        raise ValueError(
            f"rows {x_MD.dtype} {list(x_MD.shape)}, strides {x_MD.stride()}: expected contiguous fp32 [M, D]"
        )
    m, d = x_MD.shape
    if (weight_D is None) != (bias_D is None):
        raise ValueError("LayerNorm needs weight and bias, or neither")
    for name, tensor in (("weight", weight_D), ("bias", bias_D)):
        if tensor is not None and (
            tensor.shape != (d,) or tensor.dtype != torch.float32 or tensor.device != x_MD.device
        ):
            raise ValueError(
                f"{name} {tensor.dtype} {list(tensor.shape)} on {tensor.device}: expected fp32 [{d}] beside the rows"
            )
    return m, d
