"""The byte layouts: known bytes, exact inverses on ragged rows, and refusal of what was never written."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dqbart.packed.layout import (
    FIELD_BITS,
    LARGEST,
    as_bytes,
    as_words,
    check,
    pack,
    pack_trits,
    unpack,
    unpack_trits,
    words_per_row,
)

BITS = sorted(FIELD_BITS)


def random_codes(n: int, k: int, bits: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-LARGEST[bits], LARGEST[bits] + 1, (n, k), generator=generator, dtype=torch.int8)
    return torch.where(codes == 0, 1, codes).to(torch.int8) if bits == 1 else codes


def slow_byte(codes: torch.Tensor, bits: int, block: int, j: int) -> int:
    """Byte j of a block, straight from the diagram."""
    b, byte = FIELD_BITS[bits], 0
    for plane in range(8 // b):
        k = block * (256 // b) + 32 * plane + j
        if k < codes.numel():
            code = int(codes[k])
            byte |= (int(code < 0) if b == 1 else code & (2**b - 1)) << (b * plane)
    return byte


@pytest.mark.parametrize("bits", BITS)
def test_bytes_follow_the_diagram(bits: int) -> None:
    codes = random_codes(1, 300, bits)
    packed = pack(codes, bits)
    for index, byte in enumerate(packed[0].tolist()):
        assert byte == slow_byte(codes[0], bits, index // 32, index % 32)


def test_golden_bytes() -> None:
    two = torch.zeros(1, 128, dtype=torch.int8)
    two[0, 0], two[0, 32], two[0, 64], two[0, 127] = 1, -1, 1, -1
    assert pack(two, 2)[0, 0] == 0b00_01_11_01 and pack(two, 2)[0, 31] == 0b11_00_00_00
    one = torch.ones(1, 256, dtype=torch.int8)
    one[0, 32 * 7] = -1
    assert pack(one, 1)[0].tolist() == [128] + [0] * 31
    trits = torch.tensor([[1, 1, 1, 1, 1, -1, 0, 1]], dtype=torch.int8)
    assert pack_trits(trits)[0].tolist() == [242, 0 + 3 + 18, 0, 0]


@given(n=st.integers(0, 5), k=st.integers(9, 700), bits=st.sampled_from(BITS), seed=st.integers(0, 99))
@settings(max_examples=120, deadline=None)
def test_unpack_inverts_pack(n: int, k: int, bits: int, seed: int) -> None:
    codes = random_codes(n, k, bits, seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8 and packed.shape == (n, 4 * words_per_row(k, bits))
    assert torch.equal(unpack(packed, bits, k), codes)
    assert torch.equal(unpack(as_bytes(as_words(packed)), bits, k), codes)
    check(packed, bits, k)
    if bits == 2:
        packed = pack_trits(codes)
        assert packed.shape == (n, 4 * words_per_row(k, 2, "trits"))
        assert torch.equal(unpack_trits(packed, k), codes)
        check(packed, 2, k, "trits")


def test_fields_decode_left_justified() -> None:
    """Shift a plane to the top and mask: code * 2^(8-b), what the native kernels rely on."""
    for bits, b in ((4, 4), (2, 2)):
        codes = random_codes(2, 256, bits)
        planes = codes.view(2, -1, 8 // b, 32)
        packed = pack(codes, bits).view(2, -1, 32)
        for plane in range(8 // b):
            top = (packed << (8 - b - b * plane)) & (256 - 2 ** (8 - b))
            assert torch.equal(top.view(torch.int8).int(), planes[:, :, plane].int() << (8 - b))


@pytest.mark.parametrize("bits", [8, 4, 2, 1])
def test_words_share_memory_and_never_look_like_floats(bits: int) -> None:
    packed = pack(random_codes(3, 300, bits), bits)
    assert as_words(packed).data_ptr() == packed.data_ptr() and as_words(packed).dtype == torch.int32
    for k in list(range(1, 8)) + list(range(9, 600)):
        assert words_per_row(k, bits) != k
    with pytest.raises(ValueError, match="rows of 8 codes in planar32 have the shape of a float weight"):
        words_per_row(8, bits)


@pytest.mark.parametrize(("bits", "code"), [(8, -128), (4, 8), (4, -8), (3, 4), (2, 2), (2, -2), (1, 0), (1, 2)])
def test_pack_refuses_codes_out_of_range(bits: int, code: int) -> None:
    codes = torch.ones(2, 40, dtype=torch.int8)
    codes[1, 39] = code
    with pytest.raises(ValueError, match=f"code {code} at {bits} bits: expected "):
        pack(codes, bits)
    if bits == 2:
        with pytest.raises(ValueError, match=f"code {code} at 2 bits: expected -1..1"):
            pack_trits(codes)


def test_pack_refuses_wrong_types() -> None:
    with pytest.raises(ValueError, match=r"torch.float32 \[2, 40\]: expected torch.int8 \[N, K\]"):
        pack(torch.ones(2, 40), 2)
    with pytest.raises(ValueError, match=r"torch.int8 \[40\]: expected torch.int8 \[N, K\]"):
        pack_trits(torch.ones(40, dtype=torch.int8))
    with pytest.raises(ValueError, match=r"bits 5: expected one of \[1, 2, 3, 4, 8\]"):
        pack(torch.ones(2, 40, dtype=torch.int8), 5)
    with pytest.raises(ValueError, match="layout 'trits' with bits 4"):
        words_per_row(40, 4, "trits")
    with pytest.raises(ValueError, match="layout 'rows': expected one of planar32, trits"):
        words_per_row(40, 4, "rows")


@pytest.mark.parametrize("bits", BITS)
def test_check_finds_every_padding_bit(bits: int) -> None:
    k = 33
    packed = pack(random_codes(2, k, bits), bits)
    b = FIELD_BITS[bits]
    for code in range(k, 256 // b):
        plane, j = code // 32, code % 32
        for bit in range(b):
            bad = packed.clone()
            bad[1, j] |= 1 << (b * plane + bit)
            with pytest.raises(ValueError, match="row 1 holds non-zero padding bits"):
                check(bad, bits, k)


def test_check_finds_codes_that_are_never_written() -> None:
    for bits, byte in ((8, 0x80), (4, 0x08), (3, 0x04), (2, 0x02)):
        packed = pack(torch.zeros(3, 256, dtype=torch.int8), bits)
        packed[2, 5] = byte
        with pytest.raises(ValueError, match="row 2 holds a code outside"):
            check(packed, bits, 256)


def test_check_of_trits() -> None:
    packed = pack_trits(random_codes(3, 22, 2))  # 5 bytes, 3 digits and 3 bytes of padding
    for position, value, words in (
        (0, 243, "a byte above 242"),
        (7, 1, "non-zero padding bytes"),
        (4, int(packed[1, 4]) + 9, "non-zero padding digits"),
    ):
        bad = packed.clone()
        bad[1, position] = value
        with pytest.raises(ValueError, match=f"row 1 holds {words}"):
            check(bad, 2, 22, "trits")
    with pytest.raises(ValueError, match=r"\[3, 4\]: expected torch.uint8 \[N, 8\]"):
        check(packed[:, :4], 2, 22, "trits")
