"""One step of decoder self-attention: every hypothesis over its own history, in the arithmetic of attention.py.

Problem: beams change places at every step, and moving their keys and values costs more than reading them. Method: what
a row wrote at a step stays where it is; a hypothesis is a list of rows, one a step, and keys are read through it. One
query a row leaves matrix units idle, so products are sums over D; the step's own key and value never leave registers.

Shape suffixes: R rows (hypotheses), T steps, H heads, D head width.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.attention import LARGEST, fixed, inverse_of
from dqbart_kernels.gpu.decode import exponential, quantize_rows

AT_ONCE = 128  # steps whose scores a program keeps in registers


@triton.jit
def _attend_history(
    qkv_ptr,  # fp32 [R, ldx]: q, k, v of this step, each [H, D]
    k_ptr, v_ptr,  # int8 [T, R, H, D]: what each row wrote at each step; this step's place is written here
    k_scale_ptr, v_scale_ptr,  # fp32 [T, R, H]
    history_ptr,  # int32 [R, T]: the row that wrote a hypothesis' token of an earlier step
    step_ptr,  # int32 [1]
    out_ptr,  # fp32 [R, H D]
    R, T, H, D, ldx, scaling, ONCE: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    r, h, step = tl.program_id(0), tl.program_id(1), tl.load(step_ptr)
    d = tl.arange(0, BD)
    x = qkv_ptr + r * ldx + (tl.arange(0, 4)[:, None] * H + h) * D + d[None, :]  # q, k, v and nothing
    codes, scale = quantize_rows(tl.load(x, mask=(tl.arange(0, 4) < 3)[:, None] & (d < D)[None, :], other=0))
    q, own_k, own_v = _row(codes, 0), _row(codes, 1), _row(codes, 2)
    q_scale, own_k_scale, own_v_scale = _item(scale, 0), _item(scale, 1), _item(scale, 2)
    k_ptr, v_ptr, k_scale_ptr, v_scale_ptr = k_ptr + h * D, v_ptr + h * D, k_scale_ptr + h, v_scale_ptr + h
    history_ptr += r * T
    place = (step * R + r).to(tl.int64) * H
    tl.store(k_ptr + place * D + d, own_k.to(tl.int8), mask=d < D)
    tl.store(v_ptr + place * D + d, own_v.to(tl.int8), mask=d < D)
    tl.store(k_scale_ptr + place, own_k_scale)
    tl.store(v_scale_ptr + place, own_v_scale)

    # As _attend; this step's own key is in registers, since what was just stored may not be seen yet.
    if ONCE:
        scores, at = _scores(
            q, q_scale, own_k, own_k_scale, k_ptr, k_scale_ptr, history_ptr, 0, step, R, H, D, scaling, BT, BD
        )
        e = exponential(scores - tl.max(scores, 0))
        total = tl.sum(fixed(e), 0)
        weights = _weights(e, own_v_scale, v_scale_ptr, at, 0, step, BT)
        top, strange = tl.max(weights, 0), tl.sum(weights * 0.0, 0)
        mixed = _mix(weights, inverse_of(top), own_v, v_ptr, at, 0, step, D, BT, BD)
    else:
        peak = tl.full((), float("-inf"), tl.float32)
        for start in range(0, step + 1, BT):
            scores, _ = _scores(
                q, q_scale, own_k, own_k_scale, k_ptr, k_scale_ptr, history_ptr, start, step, R, H, D, scaling, BT, BD
            )
            peak = tl.maximum(peak, tl.max(scores, 0))
        total, top, strange = tl.zeros((), tl.int64), tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        for start in range(0, step + 1, BT):
            scores, at = _scores(
                q, q_scale, own_k, own_k_scale, k_ptr, k_scale_ptr, history_ptr, start, step, R, H, D, scaling, BT, BD
            )
            e = exponential(scores - peak)
            total += tl.sum(fixed(e), 0)
            weights = _weights(e, own_v_scale, v_scale_ptr, at, start, step, BT)
            top = tl.maximum(top, tl.max(weights, 0))
            strange += tl.sum(weights * 0.0, 0)
        inverse = inverse_of(top)
        mixed = tl.zeros((BD,), tl.float64)
        for start in range(0, step + 1, BT):
            scores, at = _scores(
                q, q_scale, own_k, own_k_scale, k_ptr, k_scale_ptr, history_ptr, start, step, R, H, D, scaling, BT, BD
            )
            weights = _weights(exponential(scores - peak), own_v_scale, v_scale_ptr, at, start, step, BT)
            mixed += _mix(weights, inverse, own_v, v_ptr, at, start, step, D, BT, BD)
    factor = top.to(tl.float64) * (1073741824.0 / LARGEST) / total.to(tl.float64) + strange.to(tl.float64)
    tl.store(out_ptr + (r * H + h) * D + d, (mixed * factor).to(tl.float32), mask=d < D)


@triton.jit
def _row(codes, INDEX: tl.constexpr):
    """One of four rows of codes, as int32."""
    rows = tl.arange(0, 4)
    return tl.sum(tl.where((rows == INDEX)[:, None], codes.to(tl.int32), 0), 0)


@triton.jit
def _item(scale, INDEX: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, 4) == INDEX, scale, 0.0), 0)


@triton.jit
def _scores(
    q, q_scale, own_k, own_k_scale, k_ptr, k_scale_ptr, history_ptr, start, step, R, H, D, scaling,
    BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """fp32 [BT] of the steps from `start` on, minus infinity past this one; and their places in the cache."""
    key, d = start + tl.arange(0, BT), tl.arange(0, BD)
    wrote = tl.load(history_ptr + key, mask=key < step, other=0)
    at = (key * R + wrote).to(tl.int64) * H
    k = tl.load(k_ptr + at[:, None] * D + d[None, :], mask=(key < step)[:, None] & (d < D)[None, :], other=0)
    k = tl.where((key == step)[:, None], own_k[None, :], k.to(tl.int32))
    k_scale = tl.where(key == step, own_k_scale, tl.load(k_scale_ptr + at, mask=key < step, other=0))
    scores = tl.sum(k * q[None, :], 1).to(tl.float32) * q_scale * k_scale * scaling
    return tl.where(key <= step, scores, float("-inf")), at


@triton.jit
def _weights(e, own_v_scale, v_scale_ptr, at, start, step, BT: tl.constexpr):
    key = start + tl.arange(0, BT)
    return e * tl.where(key == step, own_v_scale, tl.load(v_scale_ptr + at, mask=key < step, other=0))


@triton.jit
def _mix(weights, inverse, own_v, v_ptr, at, start, step, D, BT: tl.constexpr, BD: tl.constexpr):
    """The mixture of these keys' values, float64 [BD] of whole numbers."""
    key, d = start + tl.arange(0, BT), tl.arange(0, BD)
    codes = ((weights * inverse + 12582912.0) - 12582912.0).to(tl.int32)
    v = tl.load(v_ptr + at[:, None] * D + d[None, :], mask=(key < step)[:, None] & (d < D)[None, :], other=0)
    v = tl.where((key == step)[:, None], own_v[None, :], v.to(tl.int32))
    return tl.sum(codes[:, None] * v, 0).to(tl.float64)  # up to 512 keys stay below 2^31


@dataclass(frozen=True)
class Cache:
    """Self-attention's keys and values: what each row wrote at each step."""

    k: Tensor  # int8 [T, R, H, D]
    v: Tensor
    k_scale: Tensor  # fp32 [T, R, H]
    v_scale: Tensor

    @classmethod
    def of(cls, steps: int, rows: int, heads: int, width: int, device: torch.device | str) -> "Cache":
        k, v = (torch.zeros((steps, rows, heads, width), dtype=torch.int8, device=device) for _ in range(2))
        scales = (torch.zeros((steps, rows, heads), dtype=torch.float32, device=device) for _ in range(2))
        return cls(k, v, *scales)


def attend_history(qkv_RN: Tensor, cache: Cache, history_RT: Tensor, step: Tensor, scaling: float) -> Tensor:
    """fp32 [R, H D]: one step of self-attention, which is written to the cache at `step` (int32 [1]) too.

    `history_RT[r, t]`: the row that wrote row r's token of step t, for t before `step`. A hypothesis moves between rows
    by copying its history, never its keys.
    """
    steps, rows, heads, width = cache.k.shape
    if qkv_RN.dim() != 2 or len(qkv_RN) != rows or qkv_RN.shape[1] != 3 * heads * width or qkv_RN.stride(1) != 1:
        raise ValueError(f"projection {list(qkv_RN.shape)}: expected [{rows}, {3 * heads * width}]")
    for name, tensor, shape in (("history", history_RT, [rows, steps]), ("step", step, [1])):
        if tensor.dtype != torch.int32 or list(tensor.shape) != shape or not tensor.is_contiguous():
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected contiguous int32 {shape}")
    out = torch.empty((rows, heads * width), dtype=torch.float32, device=qkv_RN.device)
    _attend_history[(rows, heads)](
        qkv_RN, cache.k, cache.v, cache.k_scale, cache.v_scale, history_RT, step, out, rows, steps, heads, width,
        qkv_RN.stride(0), scaling, ONCE=steps <= AT_ONCE, BT=min(AT_ONCE, triton.next_power_of_2(steps)),
        BD=triton.next_power_of_2(width), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return out
