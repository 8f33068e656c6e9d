"""Device functions that kernels share: packed fields to int8, and the contract's quantization, exp and GELU.

Codes lie as planar32: a row is blocks of 32 bytes, and bits [b i, b (i + 1)) of byte j in a block hold code 32 i + j of
it, in two's complement (1 bit: set means -1). Moving plane i to the top of its byte gives code * 2^(8 - b) as int8: no
zero point, and the power of two comes off the int32 sum exactly. Triton does arithmetic on bytes one by one; four at a
time in one 32-bit register take inline assembly, which neither the interpreter nor AMD runs: ASM chooses.

exp and GELU are those of dqbart/quant/rounding.py, to the last bit, if launched with enable_fp_fusion=False.
"""

import triton
import triton.language as tl

BLOCK = tl.constexpr(32)  # bytes
NONE, GELU, GELU_TANH = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)  # activations


@triton.constexpr_function
def _plane_asm(bits, plane):
    """PTX that moves one plane of four bytes to the top of each."""
    shift, mask = 8 - bits * (plane + 1), {4: "0xF0F0F0F0", 2: "0xC0C0C0C0", 1: "0x80808080"}[bits]
    last = "or.b32 $0, t, 0x40404040;" if bits == 1 else "mov.b32 $0, t;"
    return f"{{ .reg .b32 t; shl.b32 t, $1, {shift}; and.b32 t, t, {mask}; {last} }}"


@triton.jit
def plane(packed, PLANE: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """One plane of packed uint8 bytes, as int8: code * 2^(8 - BITS); 1 bit: code * 64."""
    if BITS == 8:
        top = packed
    elif ASM:
        top = tl.inline_asm_elementwise(_plane_asm(BITS, PLANE), "=r,r", [packed], dtype=tl.uint8, is_pure=True, pack=4)
    else:
        top = packed << (8 - BITS * (PLANE + 1))
        if BITS == 4:
            top = top & 0xF0
        elif BITS == 2:
            top = top & 0xC0
        else:
            top = (top & 0x80) | 0x40
    return top.to(tl.int8, bitcast=True)


@triton.jit
def exponential(x):
    """exp(x) for fp32 x <= 0; 0 below -40."""
    t = tl.where(x < -40.0, -40.0, x) * 1.44269504
    shifted = t + 12582912.0  # the low bits are the nearest integer
    f = t - (shifted - 12582912.0)
    p = f * 0.0013264736 + 0.009671517
    p = p * f + 0.055507336
    p = p * f + 0.24022242
    p = p * f + 0.693147
    p = p * f + 1.0
    power = (shifted.to(tl.int32, bitcast=True) << 23) + (127 << 23)
    return tl.where(x < -40.0, 0.0, p * power.to(tl.float32, bitcast=True))


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    """GELU of fp32 x, by erf or by tanh, or x itself."""
    if ACTIVATION == GELU:
        t = tl.abs(x) * 0.70710678
        v = tl.div_rn(1.0, t * 0.4 + 1.0)
        p = v * -0.19146356 + 0.66464686
        p = p * v + -0.27765062
        p = p * v + 0.36468792
        p = p * v + 0.22612326
        p = p * v + 0.21078034
        p = p * v + 0.0028757353
        tail = p * exponential(-(t * t))
        x = x * 0.5 * tl.where(x > 0, 2.0 - tail, tail)
    elif ACTIVATION == GELU_TANH:
        u = (x * x * x * 0.044715 + x) * 0.7978846
        e = exponential(tl.abs(u) * -2.0)
        x = tl.div_rn(tl.where(u > 0, x, x * e), e + 1.0)
    return x


@triton.jit
def quantize_rows(x, QMAX: tl.constexpr = 127.0):
    """int8 codes and scales of fp32 rows, half to even; the scale of a row that is not finite is not finite either."""
    peak = tl.maximum(tl.max(tl.abs(x), 1), 1e-30)
    codes = (x * (tl.div_rn(1.0, peak) * QMAX)[:, None] + 12582912.0) - 12582912.0
    strange = tl.sum(x * 0.0, 1)  # 0, or NaN
    return codes.to(tl.int8), tl.div_rn(peak, QMAX) + strange
