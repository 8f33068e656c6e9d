"""What stands between products, a row at a time: embedding, LayerNorm and the int8 codes that the next product takes.

    x = table[id] * s[id] * embed_scale + type + position
    h = LayerNorm(x)          in float64, rounded once, as in every engine (dqbart/quant/rounding.py)
    codes = round(h / s)      half to even, s = max |h| / 127

Problem: as launches of their own they cost more in waiting than in work. Method: one program holds a row in registers,
reads it once and writes all results. A row that is not finite gives a scale that is NaN or infinite, so that what is
made of it shows. Rejected: fp32 sums, whose last bit depends on their order.

Shape suffixes: M rows, D width, V tokens, W bytes of a packed row, P positions, T token types.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from dqbart_kernels.gpu.decode import BLOCK, quantize_rows
from dqbart_kernels.gpu.products import Weight, quotient, unpack


@triton.jit
def _norm_and_quantize(
    x_ptr,  # fp32 [M, D]
    weight_ptr, bias_ptr,  # fp32 [D], or None: no LayerNorm
    h_ptr,  # fp32 [M, D], or None: not wanted
    codes_ptr,  # int8 [M, D]
    scale_ptr,  # fp32 [M]
    D, eps, BD: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BD)
    x = tl.load(x_ptr + tl.program_id(0).to(tl.int64) * D + column, mask=column < D, other=0)
    _finish_row(x, weight_ptr, bias_ptr, h_ptr, codes_ptr, scale_ptr, D, eps, BD)


@triton.jit
def _embed(
    id_ptr,  # int32 [M], or [T, M] with step
    type_ptr,  # int32 [M], or None: all are 0
    step_ptr,  # int32 [1]: the row of ids that is read, and the position of all of it; or None: s at row b S + s
    packed_ptr,  # uint8 [V, W]
    token_scale_ptr,  # fp32 [V]
    types_ptr,  # fp32 [T, D], or None
    positions_ptr,  # fp32 [P, D]
    weight_ptr, bias_ptr, h_ptr, codes_ptr, scale_ptr,  # as above
    M, S, W, D, first, embed_scale, eps, BITS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    column = tl.arange(0, BD)
    inside = column < D
    row = tl.program_id(0)
    if step_ptr is not None:
        position = tl.load(step_ptr)
        token = tl.load(id_ptr + position * M + row).to(tl.int64)
    else:
        position = row % S
        token = tl.load(id_ptr + row).to(tl.int64)
    byte = column // (BLOCK * PLANES) * BLOCK + column % BLOCK
    packed = tl.load(packed_ptr + token * W + byte, mask=inside, other=0)
    top = (packed.to(tl.int32) << (24 + 8 - BITS * (column // BLOCK % PLANES + 1))) >> (32 - BITS)
    if BITS == 1:
        top = top * 2 + 1
    x = top.to(tl.float32) * tl.load(token_scale_ptr + token) * embed_scale
    if types_ptr is not None:
        kind = 0
        if type_ptr is not None:
            kind = tl.load(type_ptr + row)
        x = x + tl.load(types_ptr + kind * D + column, mask=inside, other=0)
    x = x + tl.load(positions_ptr + (first + position) * D + column, mask=inside, other=0)
    _finish_row(tl.where(inside, x, 0.0), weight_ptr, bias_ptr, h_ptr, codes_ptr, scale_ptr, D, eps, BD)


@triton.jit
def _finish_row(x, weight_ptr, bias_ptr, h_ptr, codes_ptr, scale_ptr, D, eps, BD: tl.constexpr):
    """LayerNorm where there is one; x has zeros from D on."""
    row = tl.program_id(0).to(tl.int64) * D
    column = tl.arange(0, BD)
    inside = column < D
    h = x
    if weight_ptr is not None:
        mean = tl.sum(h.to(tl.float64), 0) / D
        centred = tl.where(inside, h.to(tl.float64) - mean, 0.0)
        inverse = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
        weight = tl.load(weight_ptr + column, mask=inside, other=0).to(tl.float64)
        bias = tl.load(bias_ptr + column, mask=inside, other=0).to(tl.float64)
        h = (centred * inverse * weight + bias).to(tl.float32)
    if h_ptr is not None:
        tl.store(h_ptr + row + column, h, mask=inside)
    if codes_ptr is not None:
        codes, scale = quantize_rows(h[None, :])
        tl.store(codes_ptr + row + column[None, :], codes, mask=inside[None, :])
        tl.store(scale_ptr + tl.program_id(0) + tl.arange(0, 1), scale)


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
    return codes.to(torch.int8), quotient(peak, 127)[:, 0], h_MD if keep and weight_D is not None else None


def embed(
    ids: Tensor,
    table: Weight,
    positions_PD: Tensor,
    first: int = 0,
    step: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    token_types: tuple[Tensor, Tensor | None] | None = None,
    embed_scale: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """h fp32 [M, D] of int32 token ids, its int8 codes [M, D] and scales [M].

    `ids`: [B, S], M = B S, a token's position is its column; or with `step`, int32 [1], [T, M], of which row `step` is
    read, and `step` is the position. Positions count from row `first` of their table. `norm`: LayerNorm's weight and
    bias. `token_types`: their table [T, D] and int32 [B, S], or None for zeros. Indices are the caller's to check: out
    of range they read what lies beside the table. Raises `ValueError` for wrong types and shapes.
    """
    d = _check_embedding(ids, table, positions_PD, step, norm, token_types)
    m, s = (ids.shape[1], 1) if step is not None else (ids.numel(), ids.shape[1])
    h_MD = torch.empty((m, d), dtype=torch.float32, device=ids.device)
    codes_MD = torch.empty((m, d), dtype=torch.int8, device=ids.device)
    scale_M = torch.empty(m, dtype=torch.float32, device=ids.device)
    types_TD, types = token_types or (None, None)
    if m:
        wide = triton.next_power_of_2(d)
        _embed[(m,)](
            ids, types, step, table.packed_NW, table.scale_N, types_TD, positions_PD, *(norm or (None, None)),
            h_MD, codes_MD, scale_M, m, s, table.packed_NW.shape[1], d, first, embed_scale, eps, BITS=table.bits,
            BD=wide, num_warps=min(8, max(1, wide // 256)), enable_fp_fusion=False,
        )  # fmt: skip
    return h_MD, codes_MD, scale_M


def embed_reference(
    ids: Tensor,
    table: Weight,
    positions_PD: Tensor,
    first: int = 0,
    step: Tensor | None = None,
    norm: tuple[Tensor, Tensor] | None = None,
    token_types: tuple[Tensor, Tensor | None] | None = None,
    embed_scale: float = 1.0,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The same in torch."""
    _check_embedding(ids, table, positions_PD, step, norm, token_types)
    if step is not None:
        ids_M, position_M = ids[int(step)].long(), step.long().expand(ids.shape[1])
    else:
        ids_M, position_M = ids.reshape(-1).long(), torch.arange(ids.shape[1], device=ids.device).repeat(len(ids))
    x_MD = unpack(table)[ids_M].float() * table.scale_N[ids_M][:, None] * embed_scale
    if token_types is not None:
        types = torch.zeros_like(ids_M) if token_types[1] is None else token_types[1].reshape(-1).long()
        x_MD = x_MD + token_types[0][types]
    x_MD = x_MD + positions_PD[first + position_M]
    weight_D, bias_D = norm or (None, None)
    codes_MD, scale_M, h_MD = norm_and_quantize_reference(x_MD, weight_D, bias_D, eps)
    return x_MD if h_MD is None else h_MD, codes_MD, scale_M


def _check_embedding(
    ids: Tensor,
    table: Weight,
    positions_PD: Tensor,
    step: Tensor | None,
    norm: tuple[Tensor, Tensor] | None,
    token_types: tuple[Tensor, Tensor | None] | None,
) -> int:
    d = table.k
    if ids.dim() != 2:
        raise ValueError(f"ids {ids.dtype} {list(ids.shape)}: expected two dimensions")
    wanted = [("ids", ids, torch.int32, list(ids.shape)), ("step", step, torch.int32, [1])]
    wanted += [("positions", positions_PD, torch.float32, [len(positions_PD), d])]
    if norm is not None:
        wanted += [("LayerNorm's weight", norm[0], torch.float32, [d]), ("its bias", norm[1], torch.float32, [d])]
    if token_types is not None:
        types_TD, types = token_types
        wanted += [("token types", types_TD, torch.float32, [len(types_TD), d])]
        wanted += [("types of tokens", types, torch.int32, list(ids.shape))]
    for name, tensor, dtype, shape in wanted:
        if tensor is None:
            continue
        if tensor.dtype != dtype or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected contiguous {dtype} {shape}")
        if tensor.device != table.packed_NW.device:
            raise ValueError(f"{name} on {tensor.device}, the table on {table.packed_NW.device}: expected one device")
    return d


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
