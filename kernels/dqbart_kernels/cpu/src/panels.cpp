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
template <int bits>
static bool put(const uint8_t* planar, int k, uint8_t* panel) {
  constexpr int planes = 8 / bits;
  constexpr uint32_t ones = 0x01010101u, mask = ones * ((1u << bits) - 1);
  // Two's complement plus qmax is offset binary; one bit: a set bit means -1.
  constexpr uint32_t offset = ones * (bits == 4 ? 7 : 1);
  const int quads = (k + kPanelRows - 1) / kPanelRows;
  uint32_t wrong = 0;
  for (int first = 0; first < quads; first += planes, panel += 64) {
    uint32_t fields = 0;
    for (int field = 0; field < planes && first + field < quads; ++field) {
      const int quad = first + field;
      uint32_t word;
      std::memcpy(&word, planar + quad / (8 * planes) * 32 + quad % 8 * kPanelRows, 4);
      if constexpr (bits == 8) {
        const uint32_t other = word ^ 0x80808080u;  // a zero byte is a -128
        wrong |= (other - ones) & ~other & 0x80808080u;
      } else {
        word = word >> (bits * (quad / 8 % planes)) & mask;
        word = bits == 1 ? word ^ mask : (word + offset) & mask;  // no carries: fields are less than a byte
        if (bits == 2) wrong |= word & word >> 1 & ones;
        if (bits == 4) wrong |= (word + ones) & 0x10101010u;
      }
      fields |= word << (bits * field);
    }
    std::memcpy(panel, &fields, 4);
  }
  return !wrong;
}

bool put_column(const uint8_t* planar, int column, int k, int bits, uint8_t* panels) {
  uint8_t* panel = first_byte(panels, column, k, bits);
  switch (bits) {
    case 1: return put<1>(planar, k, panel);
    case 2: return put<2>(planar, k, panel);
    case 4: return put<4>(planar, k, panel);
    default: return put<8>(planar, k, panel);
  }
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
