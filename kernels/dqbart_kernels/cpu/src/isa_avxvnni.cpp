// AVX-VNNI: vpdpbusd on 256 bits, for processors without AVX-512.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avxvnni {

#include "avx256.inc"

struct Simd : Avx256 {
  static constexpr int kChains = 8, kOffset8 = 128;
  template <int bits>
  static constexpr int kRows = 5;
  template <int bits>
  static constexpr int kPeriod = 1 << 20;
  template <int bits>
  using Weight = __m256i;

  template <int bits>
  static Weight<bits> prepare(Bytes code) {
    return bits == 8 ? _mm256_xor_si256(code, _mm256_set1_epi8(-128)) : code;
  }
  template <int bits>
  static Wide dot(Wide sum, Weight<bits> w, Quad a) {
    return _mm256_dpbusd_avx_epi32(sum, w, a);
  }
  template <int bits>
  static Wide widen(Wide wide, Wide sum) {
    return _mm256_add_epi32(wide, sum);
  }
  static Wide dot_pairs(Wide sum, __m256i values, __m256i twin) { return _mm256_dpwssd_avx_epi32(sum, values, twin); }
};

#include "kernels.inc"

}  // namespace dq::avxvnni

const dq::Kernels dq::kAvxVnni = dq::avxvnni::table("avx-vnni");
