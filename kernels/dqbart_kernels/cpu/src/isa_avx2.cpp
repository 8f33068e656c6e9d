// AVX2 without VNNI: vpmaddubsw, whose 16-bit sums must not overflow. Two products of a 2-bit code (0..2) and an
// activation stay below 508, so 64 of them fit before they are widened; 4 bits (0..14): 8; 1 bit: 128. Eight bits
// multiply |w| by a with w's sign: 2 * 127 * 127 fits just once.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avx2 {

#include "avx256.inc"

struct Simd : Avx256 {
  static constexpr int kRows = 6, kChains = 2, kOffset8 = 0;
  template <int bits>
  static constexpr int kPeriod = bits == 1   ? 128
                                 : bits == 2 ? 64
                                 : bits == 4 ? 8
                                             : 1 << 20;
  template <int bits>
  struct Weight {
    __m256i code, size;
  };

  template <int bits>
  static Weight<bits> prepare(Bytes code) {
    return {code, bits == 8 ? _mm256_abs_epi8(code) : code};
  }
  template <int bits>
  static __m256i dot(__m256i acc, Weight<bits> w, Quad a) {
    if constexpr (bits == 8) {
      const __m256i pairs = _mm256_maddubs_epi16(w.size, _mm256_sign_epi8(a, w.code));
      return _mm256_add_epi32(acc, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
    }
    return _mm256_add_epi16(acc, _mm256_maddubs_epi16(w.code, a));
  }
  template <int bits>
  static Wide widen(Wide wide, __m256i narrow) {
    if constexpr (bits == 8) return _mm256_add_epi32(wide, narrow);
    return _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
  }
};

#include "kernels.inc"

}  // namespace dq::avx2

const dq::Kernels dq::kAvx2 = dq::avx2::table("avx2");
