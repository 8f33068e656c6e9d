// Codes to panels. Byte j of a 64-byte block belongs to column j / 4 and to k = j % 4 of each of its 8 / bits fields;
// field f covers k = 16 / ... in order, so that one shift and one mask decode 64 weights for all rows of a batch.
#include <cstring>

#include "kernels.h"

namespace dq {

static int blocks_of(int k, int bits) {
  const int per_block = kPanelRows * 8 / bits;
  return (k + per_block - 1) / per_block;
}

size_t packed_bytes(int n, int k, int bits) {
  const size_t panels = (n + kColumns - 1) / kColumns;
  return panels * blocks_of(k, bits) * 64;
}

void pack(const int8_t* codes, int n, int k, int bits, uint8_t* out) {
  const int fields = 8 / bits, blocks = blocks_of(k, bits);
  const int offset = bits == 4 ? 7 : 1;
  std::memset(out, 0, packed_bytes(n, k, bits));
  for (int column = 0; column < n; ++column) {
    const int8_t* row = codes + static_cast<size_t>(column) * k;
    uint8_t* panel = out + static_cast<size_t>(column / kColumns) * blocks * 64 + column % kColumns * kPanelRows;
    for (int i = 0; i < k; ++i) {
      const int quad = i / kPanelRows;
      uint8_t* byte = panel + static_cast<size_t>(quad / fields) * 64 + i % kPanelRows;
      if (bits == 8) {
        *byte = static_cast<uint8_t>(row[i]);
      } else {
        const int field = bits == 1 ? row[i] > 0 : row[i] + offset;
        *byte = static_cast<uint8_t>(*byte | field << quad % fields * bits);
      }
    }
  }
}

}  // namespace dq
