"""W{1,2,4,8}A8: int8 activations times packed weights on int8 matrix units, with what follows in the same launch.

    y[m, n] = residual[m, n] + act(sum_k a[m, k] w[n, k] * s_a[m] * s_w[n] + bias[n])

Problem: at few rows a product takes as long as its weights' bytes, at many as its operations, and decoding fields must
cost neither. Method: weights stay packed down to registers (decode.py), one dot a plane, exact int32 sums, scales at
the end in the contract's order of fp32 operations: the same floats as the CPU engine's. Few rows split K over programs,
whose int32 sums meet by atomics, exact in any order; the last to arrive finishes. From 17 rows on the operands are
swapped, so that decoded weights are the left one, which matrix units of sm_90 take from registers. Rejected: float
partial sums (not deterministic) and unpacking to int8 in memory (four times the bytes).

Shape suffixes: M rows, N output features, K input features, W bytes of a packed row.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dqbart_kernels.gpu import tuned
from dqbart_kernels.gpu.decode import BLOCK, GELU, GELU_TANH, NONE, activate, plane

ACTIVATIONS = {"none": NONE.value, "gelu": GELU.value, "gelu_new": GELU_TANH.value}
# What `multiply` takes for rows; the interpreter multiplies the bits of bf16, so there half precision is widened.
EIGHT_BITS, HALF, HALF_AS_FLOAT = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
FIELD = {8: 0, 4: 4, 2: 6, 1: 6}  # a decoded field is code * 2 ** this
_scratch: dict[torch.device, list[tuple[Tensor, Tensor]]] = {}


@dataclass(frozen=True)
class Weight:
    """A packed matrix [N, K]: planar32 bytes and one positive scale per row."""

    packed_NW: Tensor  # uint8
    scale_N: Tensor  # fp32
    bits: int
    k: int

    @property
    def n(self) -> int:
        return len(self.packed_NW)


@dataclass(frozen=True)
class Tiles:
    """How one launch is cut: rows, columns and packed bytes of a tile, programs along K, which operand is left."""

    bm: int
    bn: int
    bw: int
    splits: int
    swap: bool
    warps: int
    stages: int

    def stage_bytes(self, bits: int) -> int:
        """Shared memory of one stage: packed weights, and the activations of all their planes."""
        return self.bw * (self.bn + self.bm * (8 // bits))

    def within(self, shared: int, bits: int) -> "Tiles":
        """The same with as many of its stages as fit into `shared` bytes."""
        return replace(self, stages=max(1, min(self.stages, shared // self.stage_bytes(bits))))


@triton.jit
def multiply(
    a_ptr, w_ptr, m, n, first, last, M, N, K, W, lda,
    BITS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, SWAP: tl.constexpr, ASM: tl.constexpr,
    KIND: tl.constexpr,
):  # fmt: skip
    """Sums [BM, BN] of rows m times packed columns n, over tiles `first` to `last` of BW bytes: int32 of int8 rows,
    fp32 of half-precision ones. Fields keep their power of two."""
    PLANES: tl.constexpr = 8 // BITS
    byte = tl.arange(0, BW)
    first_k = byte // BLOCK * (BLOCK * PLANES) + byte % BLOCK  # of plane 0
    rows_ptr = a_ptr + m.to(tl.int64)[:, None] * lda  # many rows pass 2 GB
    acc = tl.zeros((BN, BM) if SWAP else (BM, BN), tl.int32 if KIND == EIGHT_BITS else tl.float32)
    for step in range(first, last):
        at = step * BW + byte
        packed = tl.load(w_ptr + n[:, None] * W + at[None, :], mask=(n < N)[:, None] & (at < W)[None, :], other=0)
        for i in tl.static_range(PLANES):
            codes = plane(packed, i, BITS, ASM)
            k = step * (BW * PLANES) + first_k + i * BLOCK
            a = tl.load(rows_ptr + k[None, :], mask=(m < M)[:, None] & (k < K)[None, :], other=0)
            if KIND == HALF:
                codes = codes.to(tl.float32).to(a_ptr.dtype.element_ty)
            elif KIND == HALF_AS_FLOAT:
                codes, a = codes.to(tl.float32), a.to(tl.float32)
            if SWAP:
                acc = tl.dot(codes, tl.trans(a), acc, out_dtype=acc.dtype)
            else:
                acc = tl.dot(a, tl.trans(codes), acc, out_dtype=acc.dtype)
    if SWAP:
        acc = tl.trans(acc)
    return acc


@triton.jit
def scale_columns(y, w_scale_ptr, bias_ptr, n, N):
    """Times the weight's scales, plus the bias if there is one."""
    y = y * tl.load(w_scale_ptr + n, mask=n < N, other=0)[None, :]
    if bias_ptr is not None:
        y = y + tl.load(bias_ptr + n, mask=n < N, other=0)[None, :]
    return y


@triton.jit
def store_result(y, residual_ptr, y_ptr, at, inside, ACTIVATION: tl.constexpr):
    """The activation, plus the residual if there is one."""
    y = activate(y, ACTIVATION)
    if residual_ptr is not None:
        y = tl.load(residual_ptr + at, mask=inside, other=0).to(tl.float32) + y
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _int8_matmul(
    a_ptr,  # int8 [M, lda]
    a_scale_ptr,  # fp32 [M]
    w_ptr,  # uint8 [N, W]
    w_scale_ptr,  # fp32 [N]
    bias_ptr,  # fp32 [N], or None
    residual_ptr,  # [M, ldy], or None
    y_ptr,  # [M, ldy]; int32 with INTEGERS
    sums_ptr,  # int32 [M, N] of zeros, left as zeros; where SPLITS > 1
    arrived_ptr,  # int32 [tiles] of zeros, left as zeros; where SPLITS > 1
    M, N, K, W, lda, ldy,
    BITS: tl.constexpr, FIELD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr,
    SPLITS: tl.constexpr, SWAP: tl.constexpr, ACTIVATION: tl.constexpr, INTEGERS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    columns = tl.cdiv(N, BN)
    m = tile // columns * BM + tl.arange(0, BM)
    n = tile % columns * BN + tl.arange(0, BN)
    steps = tl.cdiv(tl.cdiv(W, BW), SPLITS)
    acc = multiply(a_ptr, w_ptr, m, n, split * steps, tl.minimum((split + 1) * steps, tl.cdiv(W, BW)), M, N, K, W, lda,
                   BITS, BM, BN, BW, SWAP, ASM, EIGHT_BITS)  # fmt: skip
    if SPLITS == 1:
        _finish(
            acc, a_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, m, n, M, N, ldy, FIELD, ACTIVATION, INTEGERS
        )
    else:
        sums = sums_ptr + m[:, None] * N + n[None, :]
        inside = (m < M)[:, None] & (n < N)[None, :]
        tl.atomic_add(sums, acc, mask=inside, sem="relaxed")
        tl.debug_barrier()  # all of this program's sums before its arrival
        if tl.atomic_add(arrived_ptr + tile, 1, sem="acq_rel") == SPLITS - 1:
            acc = tl.load(sums, mask=inside, other=0, cache_modifier=".cg")
            tl.debug_barrier()  # threads may store what others load
            tl.store(sums, tl.zeros_like(acc), mask=inside)
            tl.store(arrived_ptr + tile, 0)
            _finish(acc, a_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, m, n, M, N, ldy, FIELD, ACTIVATION,
                    INTEGERS)  # fmt: skip


@triton.jit
def _finish(
    acc_MN, a_scale_ptr, w_scale_ptr, bias_ptr, residual_ptr, y_ptr, m, n, M, N, ldy,
    FIELD: tl.constexpr, ACTIVATION: tl.constexpr, INTEGERS: tl.constexpr,
):  # fmt: skip
    exact = acc_MN >> FIELD
    inside = (m < M)[:, None] & (n < N)[None, :]
    at = m.to(tl.int64)[:, None] * ldy + n[None, :]
    if INTEGERS:
        tl.store(y_ptr + at, exact, mask=inside)
    else:
        y = exact.to(tl.float32) * tl.load(a_scale_ptr + m, mask=m < M, other=0)[:, None]
        store_result(scale_columns(y, w_scale_ptr, bias_ptr, n, N), residual_ptr, y_ptr, at, inside, ACTIVATION)


def choose_tiles(m: int, n: int, w: int, bits: int, processors: int, shared: int = 1 << 30) -> Tiles:
    """A heuristic, for sizes that no tuned table has: enough programs to fill the chip, by smaller tiles and K split
    where there are few; as many stages as fit into `shared` bytes.
    """
    return _roomy_tiles(m, n, w, bits, processors).within(shared, bits)


def _roomy_tiles(m: int, n: int, w: int, bits: int, processors: int) -> Tiles:
    if m <= 16:
        bn, bw = 16, 128 if w % 128 == 0 else 64
        programs, steps = triton.cdiv(n, bn), triton.cdiv(w, bw)
        splits = max(1, min(steps, 2 * processors // max(1, programs)))
        return Tiles(16, bn, bw, splits, swap=False, warps=2, stages=4)
    if m > 128 and triton.cdiv(m, 128) * triton.cdiv(n, 128) >= processors:
        return Tiles(128, 128, 128 if bits == 8 else 64, 1, swap=True, warps=8, stages=3)
    bm = max(16, min(64, triton.next_power_of_2(m)))
    programs, steps = triton.cdiv(m, bm) * triton.cdiv(n, 64), triton.cdiv(w, 64)
    return Tiles(bm, 64, 64, max(1, min(steps, processors // programs)), swap=True, warps=4, stages=4)


def int8_matmul(
    a_MK: Tensor,
    a_scale_M: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
    tiles: Tiles | None = None,
) -> Tensor:
    """y [M, N] of int8 activations [M, K] with one scale per row; `out_dtype=torch.int32` gives the bare sums.

    Raises `ValueError` for shapes, types or devices that don't fit together.
    """
    m, k = _check(a_MK, a_scale_M, weight, bias_N, residual_MN, activation)
    n, w = weight.packed_NW.shape
    device = a_MK.device
    y_MN = torch.empty((m, n), dtype=out_dtype, device=device)
    if m == 0 or n == 0:
        return y_MN
    tiles = tiles or tuned.find(_gpu_name(device), "int8_matmul", Tiles, n, k, weight.bits, m)
    tiles = tiles or choose_tiles(m, n, w, weight.bits, _processors(device), shared_memory(device))
    count = triton.cdiv(m, tiles.bm) * triton.cdiv(n, tiles.bn)
    sums, arrived = _zeros(device, m * n, count) if tiles.splits > 1 else (None, None)
    _int8_matmul[(count, tiles.splits)](
        a_MK, a_scale_M, weight.packed_NW, weight.scale_N, bias_N, residual_MN, y_MN, sums, arrived,
        m, n, k, w, a_MK.stride(0), n,
        BITS=weight.bits, FIELD=FIELD[weight.bits], BM=tiles.bm, BN=tiles.bn, BW=tiles.bw, SPLITS=tiles.splits,
        SWAP=tiles.swap, ACTIVATION=ACTIVATIONS[activation], INTEGERS=out_dtype == torch.int32, ASM=uses_asm(device),
        num_warps=tiles.warps, num_stages=tiles.stages, enable_fp_fusion=False,
    )  # fmt: skip
    return y_MN


def int8_matmul_reference(
    a_MK: Tensor,
    a_scale_M: Tensor,
    weight: Weight,
    bias_N: Tensor | None = None,
    residual_MN: Tensor | None = None,
    activation: str = "none",
    out_dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The same in torch, sums exact in float64."""
    _check(a_MK, a_scale_M, weight, bias_N, residual_MN, activation)
    exact = a_MK.double() @ unpack(weight).double().T
    if out_dtype == torch.int32:
        return exact.int()
    y = exact.float() * a_scale_M[:, None] * weight.scale_N
    y = y if bias_N is None else y + bias_N
    if activation != "none":
        y = torch.nn.functional.gelu(y.double(), approximate="none" if activation == "gelu" else "tanh").float()
    return (y if residual_MN is None else residual_MN.float() + y).to(out_dtype)


def quotient(x: Tensor, number: float) -> Tensor:
    """x / number, rounded once, as kernels divide: on GPUs torch multiplies by the reciprocal of a Python number."""
    return x / torch.full_like(x, number)


def unpack(weight: Weight) -> Tensor:
    """int8 codes [N, K] of planar32 bytes."""
    b, (n, w) = weight.bits, weight.packed_NW.shape
    shifts = torch.arange(8 - b, -1, -b, dtype=torch.uint8, device=weight.packed_NW.device)
    planes = weight.packed_NW.view(n, w // 32, 1, 32) << shifts.view(1, 1, -1, 1)
    codes = planes.view(torch.int8).reshape(n, w * 8 // b)[:, : weight.k] >> (8 - b)
    return codes * 2 + 1 if b == 1 else codes


def _check(
    a_MK: Tensor, a_scale_M: Tensor, weight: Weight, bias_N: Any, residual_MN: Any, activation: str
) -> tuple[int, int]:
    n, w = weight.packed_NW.shape
    if weight.bits not in FIELD:
        raise ValueError(f"bits {weight.bits!r}: expected one of {', '.join(map(str, FIELD))}")
    if w != -(-weight.k * weight.bits // 256) * 32:
        raise ValueError(f"packed rows of {w} bytes: not those of {weight.k} codes of {weight.bits} bits")
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation {activation!r}: expected one of {', '.join(ACTIVATIONS)}")
    m = len(a_MK)
    wanted = [
        ("activations", a_MK, torch.int8, (m, weight.k)), ("their scales", a_scale_M, torch.float32, (m,)),
        ("packed weight", weight.packed_NW, torch.uint8, (n, w)), ("residual", residual_MN, None, (m, n)),
        ("weight scales", weight.scale_N, torch.float32, (n,)), ("bias", bias_N, torch.float32, (n,)),
    ]  # fmt: skip
    for name, tensor, dtype, shape in wanted:
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape or (dtype is not None and tensor.dtype != dtype):
            raise ValueError(f"{name} {tensor.dtype} {list(tensor.shape)}: expected {dtype or 'floats'} {list(shape)}")
        if tensor.device != a_MK.device:
            raise ValueError(f"{name} on {tensor.device}, activations on {a_MK.device}: expected one device")
        if tensor.stride(-1) != 1 or (tensor is not a_MK and not tensor.is_contiguous()):
            raise ValueError(f"{name} with strides {tensor.stride()}: expected contiguous rows")
    return m, weight.k


def _gpu_name(device: torch.device) -> str | None:
    return torch.cuda.get_device_properties(device).name if device.type == "cuda" else None


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def shared_memory(device: torch.device) -> int:
    """Bytes that one program may have."""
    if device.type != "cuda":
        return 1 << 30
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", properties.shared_memory_per_block))  # HIP has one


def uses_asm(device: torch.device) -> bool:
    """PTX runs on NVIDIA alone; the interpreter, on CPU tensors, runs none."""
    return device.type == "cuda" and torch.version.cuda is not None


def _zeros(device: torch.device, sums: int, tiles: int) -> tuple[Tensor, Tensor]:
    """Scratch that every launch leaves as zeros, so it is never cleared. One per device: what runs there takes turns
    (`graphs.turn`)."""
    known = _scratch.setdefault(device, [])
    if not known or known[-1][0].numel() < sums or known[-1][1].numel() < tiles:
        sizes = (triton.next_power_of_2(max(1 << 20, sums)), triton.next_power_of_2(max(1 << 14, tiles)))
        # Earlier, smaller ones stay: captured graphs write to them.
        known.append(tuple(torch.zeros(size, dtype=torch.int32, device=device) for size in sizes))  # type: ignore[arg-type]
    return known[-1]
