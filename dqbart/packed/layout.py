"""How integer codes become bytes: `planar32` in memory and on disk, `trits` on disk only.

planar32 keeps each row in blocks of 32 bytes. A code of b bits is a field in two's complement, and a byte holds
8/b of them, one of each *plane*. Bits [b*i, b*i+b) of byte j of a block hold code k = 32*i + j, so a block covers
256/b consecutive codes. For 2 bits:

    bit        7 6       5 4       3 2       1 0
    byte 0     k=96      k=64      k=32      k=0
    byte 1     k=97      k=65      k=33      k=1
    ...
    byte 31    k=127     k=95      k=63      k=31

Four bytes at a time are four consecutive codes of one plane, which is what dp4a, SIMD and tensor cores eat, and one
shift and one mask decode them: shifted to the top of its byte a field reads as code * 2^(8-b), signed, without a
zero point. One bit is a sign: 0 is +1, 1 is -1. Three-bit codes live in 4-bit fields. Rows are zero-padded to whole
blocks. (Rejected: offset binary, which needs a subtraction per weight, and fields side by side, which need a shuffle.)

trits keeps five ternary digits in a byte, (c0+1) + 3 (c1+1) + 9 (c2+1) + 27 (c3+1) + 81 (c4+1), so 1.6 bits each;
rows are padded with zero digits to whole bytes and with zero bytes to a multiple of four. Digits need divisions, so
it is expanded to planar32 when a model is loaded.

Both are stored as their int32 view [N, words]: never the shape [N, K] of a float weight, so that a reader who
doesn't know the format refuses the file (`words_per_row` raises for the one K where they would agree).
"""

import torch
from torch import Tensor
from torch.nn import functional as F

FIELD_BITS = {8: 8, 4: 4, 3: 4, 2: 2, 1: 1}
LARGEST = {8: 127, 4: 7, 3: 3, 2: 1, 1: 1}
LAYOUTS = ("planar32", "trits")
BLOCK = 32  # bytes
_POWERS = (1, 3, 9, 27, 81)


def words_per_row(columns: int, bits: int, layout: str = "planar32") -> int:
    """int32 words that one row of `columns` codes takes. Raises `ValueError` for what can't be stored."""
    _check(bits, layout)
    if columns < 1:
        raise ValueError(f"rows of {columns} codes: expected at least 1")
    if layout == "trits":
        words = -(-columns // 20)
    else:
        words = -(-columns * FIELD_BITS[bits] // 256) * (BLOCK // 4)
    if words == columns:
        raise ValueError(
            f"rows of {columns} codes in {layout} have the shape of a float weight, so other readers would take "
            "them for one: keep this module in float (skip)"
        )
    return words


def pack(codes_NK: Tensor, bits: int) -> Tensor:
    """int8 codes [N, K] to planar32 bytes, uint8 [N, 4 * words]. Raises `ValueError` for codes out of range."""
    _check_codes(codes_NK, bits)
    b = FIELD_BITS[bits]
    n, k = codes_NK.shape
    fields = (codes_NK < 0).to(torch.uint8) if b == 1 else codes_NK.view(torch.uint8) & (2**b - 1)
    blocks = words_per_row(k, bits) * 4 // BLOCK
    fields = F.pad(fields, (0, -k % (256 // b))).view(n, blocks, 8 // b, BLOCK)
    packed = fields[:, :, 0].clone()
    for plane in range(1, 8 // b):
        packed |= fields[:, :, plane] << (b * plane)
    return packed.view(n, blocks * BLOCK)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """planar32 bytes uint8 [N, 4 * words] to int8 codes [N, columns]; the exact inverse of `pack`.

    Decodes whatever it is given; `check` is what looks for padding and codes that `pack` never writes.
    """
    _check(bits, "planar32")
    b = FIELD_BITS[bits]
    n, size = packed.shape
    blocks = packed.view(n, size // BLOCK, 1, BLOCK)
    if b < 8:
        shifts = torch.arange(8 - b, -1, -b, dtype=torch.uint8, device=packed.device)
        blocks = blocks << shifts.view(1, 1, -1, 1)  # plane i now stands in the top bits
    codes = blocks.reshape(n, size * 8 // b)[:, :columns].view(torch.int8) >> (8 - b)  # keeps the sign
    return codes.mul_(2).add_(1) if b == 1 else codes


def pack_trits(codes_NK: Tensor) -> Tensor:
    """Ternary int8 codes [N, K] to uint8 [N, 4 * words], five per byte. Raises `ValueError` out of range."""
    _check_codes(codes_NK, 2)
    n, k = codes_NK.shape
    size = -(-k // 5)
    digits = F.pad((codes_NK + 1).view(torch.uint8), (0, 5 * size - k)).view(n, size, 5)
    packed = digits[:, :, 0].clone()
    for i in range(1, 5):
        packed += digits[:, :, i] * _POWERS[i]
    return F.pad(packed, (0, 4 * words_per_row(k, 2, "trits") - size))


def unpack_trits(packed: Tensor, columns: int) -> Tensor:
    """uint8 [N, 4 * words] to ternary int8 codes [N, columns]; the exact inverse of `pack_trits`."""
    table = torch.arange(256, device=packed.device)[:, None] // torch.tensor(_POWERS, device=packed.device) % 3 - 1
    size = -(-columns // 5)
    return table.to(torch.int8)[packed[:, :size].int()].view(-1, 5 * size)[:, :columns].contiguous()


def check(packed: Tensor, bits: int, columns: int, layout: str = "planar32", padding_only: bool = False) -> None:
    """Refuse bytes that `pack` or `pack_trits` can't have written: stray padding, codes or digits out of range.

    `padding_only` looks at the last block of a row alone. Raises `ValueError` naming the first row that is wrong,
    what was found and what was expected.
    """
    _check(bits, layout)
    expected = 4 * words_per_row(columns, bits, layout)
    if packed.dtype != torch.uint8 or packed.dim() != 2 or packed.shape[1] != expected:
        raise ValueError(f"{packed.dtype} {list(packed.shape)}: expected torch.uint8 [N, {expected}]")
    if layout == "trits":
        size = -(-columns // 5)
        _refuse(packed[:, size:] != 0, "non-zero padding bytes")
        last = unpack_trits(packed[:, size - 1 : size], 5)
        _refuse(last[:, 5 - (5 * size - columns) :] != -1, "non-zero padding digits")
        if not padding_only:
            _refuse(packed > 242, "a byte above 242, which is no five ternary digits")
        return
    per_block = 256 // FIELD_BITS[bits]
    last = unpack(packed[:, -BLOCK:].contiguous(), bits, per_block)
    _refuse(last[:, per_block - -columns % per_block :] != (1 if bits == 1 else 0), "non-zero padding bits")
    if bits > 1 and not padding_only:
        largest = LARGEST[bits]
        codes = unpack(packed, bits, columns)
        _refuse((codes > largest) | (codes < -largest), f"a code outside {-largest}..{largest}")


def as_words(packed: Tensor) -> Tensor:
    """The stored int32 view [N, words] of uint8 [N, 4 * words], sharing memory."""
    return packed.view(torch.int32)


def as_bytes(words: Tensor) -> Tensor:
    """The uint8 view [N, 4 * words] of int32 [N, words], sharing memory."""
    return words.view(torch.uint8)


def _check(bits: int, layout: str) -> None:
    if bits not in FIELD_BITS:
        raise ValueError(f"bits {bits!r}: expected one of {sorted(FIELD_BITS)}")
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r}: expected one of {', '.join(LAYOUTS)}")
    if layout == "trits" and bits != 2:
        raise ValueError(f"layout 'trits' with bits {bits!r}: only 2-bit (ternary) codes have trits")


def _check_codes(codes_NK: Tensor, bits: int) -> None:
    _check(bits, "planar32")
    if codes_NK.dtype != torch.int8 or codes_NK.dim() != 2:
        raise ValueError(f"codes {codes_NK.dtype} {list(codes_NK.shape)}: expected torch.int8 [N, K]")
    largest = LARGEST[bits]
    wrong = (codes_NK > largest) | (codes_NK < -largest)
    if bits == 1:
        wrong |= codes_NK == 0
    if wrong.any():
        allowed = "-1 and 1" if bits == 1 else f"{-largest}..{largest}"
        raise ValueError(f"code {int(codes_NK[wrong][0])} at {bits} bits: expected {allowed}")


def _refuse(wrong_N_: Tensor, what: str) -> None:
    if wrong_N_.any():
        row = int(wrong_N_.any(1).nonzero()[0])
        raise ValueError(f"row {row} holds {what}: the file is damaged or was not written by dqbart")
