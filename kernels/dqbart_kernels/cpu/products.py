"""The product and the quantization of one instruction set, by themselves: for tests and benchmarks."""

import ctypes

import numpy as np

from dqbart_kernels.cpu import F32, I8, I32, U8, _check, _load, _pointer

ALIGN = 64  # bytes that rows of int8 activations are padded to


def pack(codes_NK: I8, bits: int) -> U8:
    """Codes to the panels that the kernels read."""
    n, k = codes_NK.shape
    out = np.empty(_load().dq_packed_bytes(n, k, bits), np.uint8)
    _load().dq_pack(_pointer(np.ascontiguousarray(codes_NK), np.int8), n, k, bits, _pointer(out, np.uint8))
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
    """y [M, N] = codes of activations times packed weights; buffers are kept, so that `run` only multiplies."""

    def __init__(self, isa: str, codes_NK: I8, bits: int, w_scale_N: F32, a_MK: I8, a_scale_M: F32) -> None:
        self.isa, self.bits = isa.encode(), bits
        self.n, self.k = codes_NK.shape
        self.m = len(a_MK)
        self.lda = -(-self.k // ALIGN) * ALIGN
        self.packed = pack(codes_NK, bits)
        self.a = np.zeros((self.m, self.lda), np.int8)
        self.a[:, : self.k] = a_MK
        self.total = self.a.sum(1, dtype=np.int32)
        self.w_scale, self.a_scale = np.ascontiguousarray(w_scale_N), np.ascontiguousarray(a_scale_M)
        self.y = np.empty((self.m, self.n), np.float32)

    def run(self, threads: int = 1, gelu: bool = False, integers: bool = False) -> F32 | I32:
        """`integers`: the int32 accumulators [M, N] instead."""
        exact = np.empty((self.m, self.n), np.int32) if integers else None
        _check(
            _load().dq_product(
                self.isa, threads, self.n, self.k, self.bits, _pointer(self.packed, np.uint8),
                _pointer(self.w_scale, np.float32, (self.n,)), self.m, _pointer(self.a, np.int8), self.lda,
                _pointer(self.a_scale, np.float32, (self.m,)), _pointer(self.total, np.int32), int(gelu),
                _pointer(self.y, np.float32), _pointer(exact, np.int32) if exact is not None else ctypes.c_void_p(),
            )
        )  # fmt: skip
        return self.y if exact is None else exact
