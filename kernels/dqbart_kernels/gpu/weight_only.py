"""W{1,2,4,8}A16: fp16 or bf16 activations times packed weights, for models whose activations are not quantized.

    y[m, n] = residual[m, n] + act(sum_k a[m, k] w[n, k] * s_w[n] + bias[n])

Problem: unpacked to half precision a weight takes 2 to 16 times its bytes, and at few rows that time. Method: fields
become int8 in registers as in products.py and are exact in half precision, power of two included; sums in fp32, the
scale at the end. K is not split: sums of floats would depend on the order of arrival.

Shape suffixes: M rows, N output features, K input features, W bytes of a packed row.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu.decode import BLOCK, activate, plane
from dqbart_kernels.gpu.products import ACTIVATIONS, FIELD, Weight, unpack, uses_asm

DTYPES = (torch.float16, torch.bfloat16)


@triton.jit
def _weight_only_matmul(
    a_ptr,  # fp16 or bf16 [M, K]
    w_ptr,  # uint8 [N, W]
    w_scale_ptr,  # fp32 [N]
    bias_ptr,  # fp32 [N], or None
    residual_ptr,  # as y, or None
    y_ptr,  # [M, N], as a
    M, N, K, W,
    BITS: tl.constexpr, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    SWAP: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    PLANES: tl.constexpr = 8 // BITS
    columns = tl.cdiv(N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    byte = tl.arange(0, BW)
    first_k = byte // BLOCK * (BLOCK * PLANES) + byte % BLOCK  # of plane 0
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.float32)
    for step in range(0, tl.cdiv(W, BW)):
        at = step * BW + byte
        packed = tl.load(w_ptr + n[:, None] * W + at[None, :], mask=(n < N)[:, None] & (at < W)[None, :], other=0)
        for i in tl.static_range(PLANES):
            codes = plane(packed, i, BITS, ASM).to(tl.float32)
            k = step * (BW * PLANES) + first_k + i * BLOCK
            a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
            if WIDE:
                a = a.to(tl.float32)
            else:
                codes = codes.to(a_ptr.dtype.element_ty)
            if SWAP:
                acc = tl.dot(codes, tl.trans(a), acc)
            else:
                acc = tl.dot(a, tl.trans(codes), acc)
    if SWAP:
        acc = tl.trans(acc)
    inside = (m < M)[:, None] & (n < N)[None, :]
    place = m[:, None] * N + n[None, :]
    y = acc * (tl.load(w_scale_ptr + n, mask=n < N, other=0) * (1.0 / (1 << FIELD)))[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < N, other=0)[None, :]
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        y = tl.load(residual_ptr + place, mask=inside, other=0).to(tl.float32) + y
    tl.store(y_ptr + place, y.to(y_ptr.dtype.element_ty), mask=inside)


def weight_only_matmul(
    a_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """y [M, N] of fp16 or bf16 activations [M, K], in their type; `bias_N` fp32, `residual_MN` like y.

    Raises `ValueError` for shapes, types or devices that don't fit together.
    """
    m, n = _check(a_MK, weight, bias_N, residual_MN, activation)
    y_MN = torch.empty((m, n), dtype=a_MK.dtype, device=a_MK.device)
    if m and n:
        bm, bn, warps = (16, 16, 2) if m <= 16 else (32, 64, 4) if m <= 64 else (128, 128, 8)
        _weight_only_matmul[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
            a_MK, weight.packed_NW, weight.scale_N, bias_N, residual_MN, y_MN, m, n, weight.k,
            weight.packed_NW.shape[1], BITS=weight.bits, FIELD=FIELD[weight.bits], BM=bm, BN=bn, BW=64,
            SWAP=m > 16, ACTIVATION=ACTIVATIONS[activation], ASM=uses_asm(a_MK.device),
            WIDE=a_MK.device.type == "cpu",  # the interpreter multiplies the bits of bf16
            num_warps=warps, num_stages=3,
        )  # fmt: skip
    return y_MN


def weight_only_matmul_reference(
    a_MK: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
) -> Tensor:
    """The same in torch, in float64, rounded once."""
    _check(a_MK, weight, bias_N, residual_MN, activation)
    y = a_MK.double() @ unpack(weight).double().T * weight.scale_N.double()
    y = y if bias_N is None else y + bias_N.double()
    if activation != "none":
        y = torch.nn.functional.gelu(y, approximate="none" if activation == "gelu" else "tanh")
    return (y if residual_MN is None else residual_MN.double() + y).to(a_MK.dtype)


def _check(
    a_MK: Tensor, weight: Weight, bias_N: Tensor | None, residual_MN: Tensor | None, activation: str
) -> tuple[int, int]:
    m, n = len(a_MK), weight.n
    if a_MK.dtype not in DTYPES:
        raise ValueError(f"activations {a_MK.dtype}: expected {' or '.join(map(str, DTYPES))}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    for name, tensor, dtype, shape in (
        ("activations", a_MK, a_MK.dtype, (m, weight.k)), ("bias", bias_N, torch.float32, (n,)),
        ("residual", residual_MN, a_MK.dtype, (m, n)), ("weight scales", weight.scale_N, torch.float32, (n,)),
    ):  # fmt: skip
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected contiguous {dtype} {list(shape)}")
        if tensor.device != weight.packed_NW.device:
            raise ValueError(f"{name} on {tensor.device}, the weight on {weight.packed_NW.device}: expected one device")
    return m, n
