// Intel's intrinsics in portable C, for processors that lack them: SIMDe, and the few that it lacks.
#pragma once
#define SIMDE_ENABLE_NATIVE_ALIASES
#include <simde/x86/avx512.h>
#include <simde/x86/fma.h>

#include <cmath>
#include <cstring>

template <class To, class From, int count, class Lane, class OtherLane, class Convert>
static To by_lane(From from, Convert convert) {
  Lane in[count];
  OtherLane out[count];
  std::memcpy(in, &from, sizeof in);
  for (int i = 0; i < count; ++i) out[i] = convert(in[i]);
  To to;
  std::memcpy(&to, out, sizeof out);
  return to;
}

static inline __m512d _mm512_cvtps_pd(__m256 x) {
  return by_lane<__m512d, __m256, 8, float, double>(x, [](float v) { return static_cast<double>(v); });
}
static inline __m256 _mm512_cvtpd_ps(__m512d x) {
  return by_lane<__m256, __m512d, 8, double, float>(x, [](double v) { return static_cast<float>(v); });
}
static inline __m512i _mm512_cvtps_epi32(__m512 x) {
  return by_lane<__m512i, __m512, 16, float, int32_t>(x,
                                                      [](float v) { return static_cast<int32_t>(std::nearbyint(v)); });
}
static inline __m128i _mm512_cvtepi32_epi8(__m512i x) {
  return by_lane<__m128i, __m512i, 16, int32_t, int8_t>(x, [](int32_t v) { return static_cast<int8_t>(v); });
}
#define _mm256_dpbusd_avx_epi32 simde_mm256_dpbusd_epi32
#define _mm256_dpwssd_avx_epi32 simde_mm256_dpwssd_epi32
