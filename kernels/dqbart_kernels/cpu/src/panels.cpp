#include "panels.h"

#include <cstring>

namespace dq {

size_t packed_bytes(int n, int k, int bits) {
  return static_cast<size_t>((n + kColumns - 1) / kColumns) * blocks_of(k, bits) * 64;
}

template <class Byte>
static Byte* first_byte(Byte* panels, int column, int k, int bits) {
  return panels + static_cast<size_t>(column / kColumns) * blocks_of(k, bits) * 64 + column % kColumns * kPanelRows;
}

// planar32: bits [b i, b i + b) of byte j of a 32-byte block hold, in two's complement, k = 32 i + j. Four bytes of a
// plane are one quad of k.
bool put_column(const uint8_t* planar, int column, int k, int bits, uint8_t* panels) {
  uint8_t* panel = first_byte(panels, column, k, bits);
  const int planes = 8 / bits, quads = (k + kPanelRows - 1) / kPanelRows;
  const uint32_t mask = 0x01010101u * ((1u << bits) - 1);
  // Two's complement plus qmax is offset binary; one bit: a set bit means -1.
  const uint32_t offset = 0x01010101u * (bits == 4 ? 7 : 1);
  uint32_t wrong = 0;
  for (int quad = 0; quad < quads; ++quad) {
    const int block = quad / (8 * planes), plane = quad / 8 % planes, byte = quad % 8 * kPanelRows;
    uint32_t word;
    std::memcpy(&word, planar + block * 32 + byte, 4);
    if (bits == 8) {
      std::memcpy(panel + static_cast<size_t>(quad) * 64, &word, 4);
      const uint32_t other = word ^ 0x80808080u;  // a zero byte is a -128
      wrong |= (other - 0x01010101u) & ~other & 0x80808080u;
      continue;
    }
    word = word >> (bits * plane) & mask;
    word = bits == 1 ? word ^ mask : (word + offset) & mask;  // no carries: fields are less than a byte
    if (bits == 2) wrong |= word & word >> 1 & 0x01010101u;
    if (bits == 4) wrong |= (word + 0x01010101u) & 0x10101010u;
    uint32_t fields;
    uint8_t* at = panel + static_cast<size_t>(quad / planes) * 64;
    std::memcpy(&fields, at, 4);
    fields |= word << (bits * (quad % planes));
    std::memcpy(at, &fields, 4);
  }
  return !wrong;
}

void get_column(const uint8_t* panels, int column, int k, int bits, float scale, float factor, float* x) {
  const uint8_t* panel = first_byte(panels, column, k, bits);
  const int planes = 8 / bits;
  for (int i = 0; i < k; ++i) {
    const int quad = i / kPanelRows;
    const uint8_t byte = panel[static_cast<size_t>(quad / planes) * 64 + i % kPanelRows];
    const int field = byte >> (bits * (quad % planes)) & ((1 << bits) - 1);
    const int code = bits == 8 ? static_cast<int8_t>(byte) : bits == 1 ? 2 * field - 1 : field - (bits == 4 ? 7 : 1);
    x[i] = static_cast<float>(code) * scale * factor;
  }
}

}  // namespace dq
