// The one description of how weights lie in memory for the products.
//
// A panel holds 16 columns (output features); its 64-byte blocks hold 4 k of each in every field of 8 / bits to the
// byte: byte j of a block belongs to column j / 4 and to k = j % 4 of each field, and fields follow each other in k. So
// one shift and one mask decode 64 weights for all rows of a batch. Codes are offset binary (ternary w + 1, 4 bits w +
// 7, 1 bit: 1 for +1); 8 bits stay signed.
#pragma once
#include <cstddef>
#include <cstdint>

namespace dq {

constexpr int kColumns = 16;   // output columns of a panel
constexpr int kPanelRows = 4;  // consecutive k that one 32-bit lane multiplies

constexpr int blocks_of(int k, int bits) { return (k * bits + kPanelRows * 8 - 1) / (kPanelRows * 8); }
size_t packed_bytes(int n, int k, int bits);

// Writes `column` from its planar32 row (dqbart/packed/layout.py) into zeroed panels. Returns false where a code is the
// most negative one, which symmetric and ternary weights never hold: the kernels' sums are bounded for the others.
bool put_column(const uint8_t* planar, int column, int k, int bits, uint8_t* panels);
// x[k] = codes of `column` times scale times factor, in that order.
void get_column(const uint8_t* panels, int column, int k, int bits, float scale, float factor, float* x);

}  // namespace dq
