"""The product and the quantization of one instruction set, by themselves: for tests and benchmarks."""

import ctypes

import numpy as np

from dqbart_kernels.cpu import F32, I8, I32, U8, _check, _load, _pointer
from dqbart_kernels.sizes import ACTIVATIONS

ALIGN = 64  # bytes that rows of int8 activations are padded to


def pack(planar: U8, shape: tuple[int, int], bits: int) -> U8:
    """planar32 bytes [N, row bytes] of a weight [N, K] to the panels that the kernels read."""
    n, k = shape
    row_bytes = -(-k * bits // 256) * 32
    out = np.empty(_load().dq_packed_bytes(n, k, bits), np.uint8)
    _check(
        _load().dq_pack(
            _pointer(planar, np.uint8, (n, row_bytes)), ctypes.c_int64(row_bytes), n, k, bits, _pointer(out, np.uint8)
        )
    )
    return out


def quantize(isa: str, x_MK: F32) -> tuple[I8, F32, I32]:
    """Codes [M, K padded to 64], scales [M] and sums of codes [M]. Raises `ValueError` for NaN or infinity."""
    m, k = x_MK.shape
    lda = -(-k // ALIGN) * ALIGN
    codes, scale, total = np.empty((m, lda), np.int8), np.empty(m, np.float32), np.empty(m, np.int32)
    _check(
        _load().dq_quantize(
            isa.encode(), _pointer(x_MK, np.float32), m, k, _pointer(codes, np.int8), lda, _pointer(scale, np.float32),
            _pointer(total, np.int32),
        )
    )  # fmt: skip
    return codes, scale, total


class Product:
    """y [M, N] = codes of activations [M, K] times weights; buffers are kept, so `run` only multiplies.

    `packed`: what `pack` gives for a weight [N, K]; N is the length of its scales. `y_MN`: where to write (own memory).
    """

    def __init__(
        self, isa: str, packed: U8, bits: int, w_scale_N: F32, a_MK: I8, a_scale_M: F32, threads: int = 1,
        y_MN: F32 | None = None,
    ) -> None:  # fmt: skip
        self.isa, self.bits = isa.encode(), bits
        self.n = len(w_scale_N)
        self.m, self.k = a_MK.shape
        self.lda = -(-self.k // ALIGN) * ALIGN
        self.packed = packed
        if packed.size != _load().dq_packed_bytes(self.n, self.k, bits):
            raise ValueError(f"{packed.size} packed bytes: not those of a weight {[self.n, self.k]} at {bits} bits")
        self.a = a_MK
        if self.k < self.lda:
            self.a = np.pad(a_MK, ((0, 0), (0, self.lda - self.k)))
        self.total = self.a.sum(1, dtype=np.int32)
        self.w_scale, self.a_scale = np.ascontiguousarray(w_scale_N), np.ascontiguousarray(a_scale_M)
        self.y = np.empty((self.m, self.n), np.float32) if y_MN is None else y_MN
        self.threads = threads

    def run(self, activation: str | None = None, integers: bool = False) -> F32 | I32:
        """`activation`: a name in `ACTIVATIONS`. `integers`: the int32 accumulators [M, N] instead."""
        exact = np.empty((self.m, self.n), np.int32) if integers else None
        _check(
            _load().dq_product(
                self.isa, self.threads, self.n, self.k, self.bits, _pointer(self.packed, np.uint8),
                _pointer(self.w_scale, np.float32, (self.n,)), self.m, _pointer(self.a, np.int8), self.lda,
                _pointer(self.a_scale, np.float32, (self.m,)), _pointer(self.total, np.int32),
                ACTIVATIONS[activation] if activation else 0, _pointer(self.y, np.float32, (self.m, self.n)),
                _pointer(exact, np.int32) if exact is not None else ctypes.c_void_p(),
            )
        )  # fmt: skip
        return self.y if exact is None else exact
