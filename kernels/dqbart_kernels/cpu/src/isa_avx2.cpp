// AVX2 without VNNI: vpmaddubsw, whose 16-bit sums must not overflow. Two products of a 2-bit code (0..2) and an
// activation stay below 508, so 64 of them fit before they are widened; 4 bits (0..14): 8; 1 bit: 128. Eight bits
// multiply |w| by a with w's sign: 2 * 127 * 127 fits just once.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avx2 {

#include "avx256.inc"

struct Simd : Avx256 {
  static constexpr int kChains = 2, kOffset8 = 0;
  template <int bits>
  static constexpr int kRows = bits == 8 ? 4 : 6;  // sums, weights and a quad fill the 16 registers
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
  // Written out: GCC would collect all products before the first sum, which spills, or copy every sum before adding.
  template <int bits>
  static __m256i dot(__m256i acc, Weight<bits> w, Quad a) {
    __m256i product;
    if constexpr (bits == 8)
      asm("vpsignb %3, %4, %1\n\tvpmaddubsw %1, %2, %1\n\tvpmaddwd %5, %1, %1\n\tvpaddd %1, %0, %0"
          : "+x"(acc), "=&x"(product)
          : "x"(w.size), "x"(w.code), "x"(a), "x"(_mm256_set1_epi16(1)));
    else
      asm("vpmaddubsw %3, %2, %1\n\tvpaddw %1, %0, %0" : "+x"(acc), "=&x"(product) : "x"(w.code), "x"(a));
    return acc;
  }
  template <int bits>
  static Wide widen(Wide wide, __m256i narrow) {
    if constexpr (bits == 8) return _mm256_add_epi32(wide, narrow);
    return _mm256_add_epi32(wide, _mm256_madd_epi16(narrow, _mm256_set1_epi16(1)));
  }
  static Wide dot_pairs(Wide sum, __m256i values, __m256i twin) {
    __m256i product;
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sum), "=&x"(product) : "x"(values), "x"(twin));
    return sum;
  }
};

#include "kernels.inc"

}  // namespace dq::avx2

const dq::Kernels dq::kAvx2 = dq::avx2::table("avx2");
