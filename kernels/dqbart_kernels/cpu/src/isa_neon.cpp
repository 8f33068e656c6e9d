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
  struct Values {
    int16x4x2_t part[4];  // of the even and the odd key
  };
  static Values pairs(const int8_t* even, const int8_t* odd) {
    const int8x16_t a = vld1q_s8(even), b = vld1q_s8(odd);
    const int16x8_t a0 = vmovl_s8(vget_low_s8(a)), a1 = vmovl_high_s8(a);
    const int16x8_t b0 = vmovl_s8(vget_low_s8(b)), b1 = vmovl_high_s8(b);
    return {{{{vget_low_s16(a0), vget_low_s16(b0)}},
             {{vget_high_s16(a0), vget_high_s16(b0)}},
             {{vget_low_s16(a1), vget_low_s16(b1)}},
             {{vget_high_s16(a1), vget_high_s16(b1)}}}};
  }
  static int16x4_t twin(const int16_t* p) {
    int32_t two;
    __builtin_memcpy(&two, p, 4);
    return vreinterpret_s16_s32(vdup_n_s32(two));
  }
  static Wide dot_pairs(Wide sum, int16x4x2_t values, int16x4_t twin) {
    return vmlal_lane_s16(vmlal_lane_s16(sum, values.val[0], twin, 0), values.val[1], twin, 1);
  }
  static void store(int32_t* p, Wide wide) { vst1q_s32(p, wide); }
};

#include "kernels.inc"

}  // namespace dq::neon

const dq::Kernels dq::kNeon = dq::neon::table("neon-dot");
