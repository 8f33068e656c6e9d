// ARM with the dot-product extension: sdot multiplies 16 signed codes by 16 signed activations.
#include <arm_neon.h>

#include "kernels.h"

namespace dq::neon {

struct Simd {
  static constexpr int kParts = 4, kChains = 8, kDoubles = 2, kOffset8 = 0;
  template <int bits>
  static constexpr int kRows = 5;
  template <int bits>
  static constexpr int kPeriod = 1 << 20;
  using Bytes = uint8x16_t;
  using Wide = int32x4_t;
  using Quad = int8x16_t;
  template <int bits>
  using Weight = int8x16_t;

  static Bytes load(const uint8_t* p) { return vld1q_u8(p); }
  static Wide zero() { return vdupq_n_s32(0); }
  static Quad broadcast(const int8_t* p) {
    int32_t quad;
    __builtin_memcpy(&quad, p, 4);
    return vreinterpretq_s8_s32(vdupq_n_s32(quad));
  }
  template <int bits>
  static Bytes field(Bytes raw, int i) {
    if constexpr (bits == 8) return raw;
    return vandq_u8(vshlq_u8(raw, vdupq_n_s8(static_cast<int8_t>(-i * bits))), vdupq_n_u8((1 << bits) - 1));
  }
  template <int bits>
  static Weight<bits> prepare(Bytes code) {
    return vreinterpretq_s8_u8(code);
  }
  template <int bits>
  static Wide dot(Wide sum, Weight<bits> w, Quad a) {
    return vdotq_s32(sum, w, a);
  }
  template <int bits>
  static Wide widen(Wide wide, Wide sum) {
    return vaddq_s32(wide, sum);
  }
#include "pairs.inc"
  static float64x2_t fma(float64x2_t a, float64x2_t b, float64x2_t c) { return vfmaq_f64(c, a, b); }
  static void store(int32_t* p, Wide wide) { vst1q_s32(p, wide); }
};

#include "kernels.inc"

}  // namespace dq::neon

const dq::Kernels dq::kNeon = dq::neon::table("neon-dot");
