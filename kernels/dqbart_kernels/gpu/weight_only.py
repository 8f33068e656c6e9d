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

from dqbart_kernels.gpu.products import (
    ACTIVATIONS,
    FIELD,
    HALF,
    HALF_AS_FLOAT,
    Weight,
    multiply,
    scale_columns,
    store_result,
    unpack,
    uses_asm,
)

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
    SWAP: tl.constexpr, ACTIVATION: tl.constexpr, ASM: tl.constexpr, KIND: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BN)
    m = tl.program_id(0) // columns * BM + tl.arange(0, BM)
    n = tl.program_id(0) % columns * BN + tl.arange(0, BN)
    acc = multiply(a_ptr, w_ptr, m, n, 0, tl.cdiv(W, BW), M, N, K, W, K, BITS, BM, BN, BW, SWAP, ASM, KIND)
    y = scale_columns(acc * (1.0 / (1 << FIELD)), w_scale_ptr, bias_ptr, n, N)
    inside = (m < M)[:, None] & (n < N)[None, :]
    store_result(y, residual_ptr, y_ptr, m.to(tl.int64)[:, None] * N + n[None, :], inside, ACTIVATION)


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
            KIND=(HALF_AS_FLOAT if a_MK.device.type == "cpu" else HALF).value, num_warps=warps, num_stages=3,
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
