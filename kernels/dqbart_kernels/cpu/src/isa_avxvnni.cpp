// AVX-VNNI: vpdpbusd on 256 bits, for processors without AVX-512.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avxvnni {

struct Simd {
  static constexpr int kParts = 2, kRows = 5, kChains = 8, kDoubles = 4, kOffset8 = 128;
  template <int bits>
  static constexpr int kPeriod = 1 << 20;
  using Bytes = __m256i;
  using Wide = __m256i;
  using Quad = __m256i;
  template <int bits>
  using Weight = __m256i;

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
  static void pin(Wide& sum) { asm volatile("" : "+x"(sum)); }
  static __m256d fma(__m256d a, __m256d b, __m256d c) { return _mm256_fmadd_pd(a, b, c); }
  static void store(int32_t* p, Wide wide) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), wide); }
};

#include "kernels.inc"

}  // namespace dq::avxvnni

const dq::Kernels dq::kAvxVnni = dq::avxvnni::table("avx-vnni");
