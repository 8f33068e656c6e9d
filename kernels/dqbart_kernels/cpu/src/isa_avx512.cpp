// AVX-512 with VNNI: vpdpbusd multiplies 64 unsigned codes by 64 signed activations and adds into 16 columns.
#include <immintrin.h>

#include "kernels.h"

namespace dq::avx512 {

struct Simd {
  static constexpr int kParts = 1, kChains = 4, kDoubles = 8, kOffset8 = 128;
  template <int bits>
  static constexpr int kRows = 8;
  template <int bits>
  static constexpr int kPeriod = 1 << 20;
  using Bytes = __m512i;
  using Wide = __m512i;
  using Quad = __m512i;
  template <int bits>
  using Weight = __m512i;

  static Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static Wide zero() { return _mm512_setzero_si512(); }
  static Quad broadcast(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return _mm512_set1_epi32(quad);
  }
  template <int bits>
  static Bytes field(Bytes raw, int i) {
    if constexpr (bits == 8) return raw;
    return _mm512_and_si512(_mm512_srli_epi16(raw, i * bits), _mm512_set1_epi8((1 << bits) - 1));
  }
  template <int bits>
  static Weight<bits> prepare(Bytes code) {
    return bits == 8 ? _mm512_xor_si512(code, _mm512_set1_epi8(-128)) : code;
  }
  template <int bits>
  static Wide dot(Wide sum, Weight<bits> w, Quad a) {
    return _mm512_dpbusd_epi32(sum, w, a);
  }
  template <int bits>
  static Wide widen(Wide wide, Wide sum) {
    return _mm512_add_epi32(wide, sum);
  }
  static __m512d to_doubles(__m256 x) { return _mm512_cvtps_pd(x); }
  static __m256 to_floats(__m512d x) { return _mm512_cvtpd_ps(x); }
  static __m512i round(__m512 x, int8_t* to) {
    const __m512i integers = _mm512_cvtps_epi32(x);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(integers));
    return integers;
  }
  static void round(__m512 x, int16_t* to) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtsepi32_epi16(_mm512_cvtps_epi32(x)));
  }
  struct Values {
    __m512i part[1];
  };
  static Values pairs(const int8_t* even, const int8_t* odd) {
    const __m128i a = _mm_loadu_si128(reinterpret_cast<const __m128i*>(even));
    const __m128i b = _mm_loadu_si128(reinterpret_cast<const __m128i*>(odd));
    return {{_mm512_cvtepi8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b)))}};
  }
  static __m512i twin(const int16_t* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return _mm512_set1_epi32(two);
  }
  static Wide dot_pairs(Wide sum, __m512i values, __m512i twin) { return _mm512_dpwssd_epi32(sum, values, twin); }
  static void store(int32_t* p, Wide wide) { _mm512_storeu_si512(p, wide); }
};

#include "kernels.inc"

}  // namespace dq::avx512

const dq::Kernels dq::kAvx512 = dq::avx512::table("avx512-vnni");
