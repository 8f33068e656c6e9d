// AVX2 without VNNI: vpmaddubsw, whose 16-bit sums must not overflow. Two products of a 2-bit code (0..2) and an
// activation stay below 508, so 64 of them fit before they are widened; 4 bits (0..14): 8; 1 bit: 128. Eight bits
// multiply |w| by a with w's sign: 2 * 127 * 127 fits just once.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avx2 {

struct Simd {
  static constexpr int kParts = 2, kRows = 6, kChains = 2, kDoubles = 4, kOffset8 = 0;
  template <int bits>
  static constexpr int kPeriod = bits == 1 ? 128 : bits == 2 ? 64 : bits == 4 ? 8 : 1 << 20;
  using Bytes = __m256i;
  using Wide = __m256i;
  using Quad = __m256i;
  template <int bits>
  struct Weight {
    __m256i code, size;
  };

  static Bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static Wide zero() { return _mm256_setzero_si256(); }
  static Quad broadcast(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm256_set1_epi32(quad);
  }
  template <int bits>
  static Bytes field(Bytes raw, int i) {
    if constexpr (bits == 8) return raw;
    return _mm256_and_si256(_mm256_srli_epi16(raw, i * bits), _mm256_set1_epi8((1 << bits) - 1));
  }
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
  // Keeps the compiler from collecting all products before the first sum, which spills every accumulator.
  static void pin(Wide& sum) { asm volatile("" : "+x"(sum)); }
  static __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
  static void store(int32_t* p, Wide wide) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), wide); }
};

#include "kernels.inc"

}  // namespace dq::avx2

const dq::Kernels dq::kAvx2 = dq::avx2::table("avx2");
