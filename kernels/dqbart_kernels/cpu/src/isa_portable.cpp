// Plain C++, for every processor and as the reference of the others.
#include "kernels.h"

namespace dq::portable {

struct Simd {
  static constexpr int kParts = 4, kChains = 1, kDoubles = 2, kOffset8 = 0;
  template <int bits>
  static constexpr int kRows = 2;
  template <int bits>
  static constexpr int kPeriod = 1 << 20;
  struct Bytes {
    uint8_t byte[16];
  };
  struct Wide {
    int32_t column[4];
  };
  struct Quad {
    int8_t k[4];
  };
  template <int bits>
  using Weight = Bytes;

  static Bytes load(const uint8_t* p) {
    Bytes raw;
    __builtin_memcpy(&raw, p, 16);
    return raw;
  }
  static Wide zero() { return {}; }
  static Quad broadcast(const int8_t* p) { return {{p[0], p[1], p[2], p[3]}}; }
  template <int bits>
  static Bytes field(Bytes raw, int i) {
    if constexpr (bits < 8)
      for (uint8_t& byte : raw.byte) byte = byte >> (i * bits) & ((1 << bits) - 1);
    return raw;
  }
  template <int bits>
  static Weight<bits> prepare(Bytes code) {
    return code;
  }
  template <int bits>
  static Wide dot(Wide sum, Weight<bits> w, Quad a) {
    for (int j = 0; j < 16; ++j) sum.column[j / 4] += static_cast<int8_t>(w.byte[j]) * a.k[j % 4];
    return sum;
  }
  template <int bits>
  static Wide widen(Wide wide, Wide sum) {
    for (int j = 0; j < 4; ++j) wide.column[j] += sum.column[j];
    return wide;
  }
#include "pairs.inc"
  struct Pairs {
    int16_t even[4], odd[4];
  };
  struct Values {
    Pairs part[4];
  };
  struct Twin {
    int16_t even, odd;
  };
  static Values pairs(const int8_t* even, const int8_t* odd) {
    Values values;
    for (int j = 0; j < 16; ++j) values.part[j / 4].even[j % 4] = even[j], values.part[j / 4].odd[j % 4] = odd[j];
    return values;
  }
  static Twin twin(const int16_t* p) { return {p[0], p[1]}; }
  static Wide dot_pairs(Wide sum, const Pairs& values, Twin twin) {
    for (int j = 0; j < 4; ++j) sum.column[j] += values.even[j] * twin.even + values.odd[j] * twin.odd;
    return sum;
  }
  static void store(int32_t* p, Wide wide) { __builtin_memcpy(p, wide.column, 16); }
};

#include "kernels.inc"

}  // namespace dq::portable

const dq::Kernels dq::kPortable = dq::portable::table("portable");
