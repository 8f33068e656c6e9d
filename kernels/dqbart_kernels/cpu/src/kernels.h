// What one instruction set offers. Every isa_*.cpp compiles kernels.inc with its own flags and fills one table.
#pragma once
#include <cstddef>
#include <cstdint>
#include <initializer_list>

#include "panels.h"

namespace dq {

constexpr int kAlign = 64;  // bytes; rows of int8 activations are padded with zeros to it

// A weight matrix [n, k] in panels (panels.h).
struct Packed {
  int32_t n, k, bits;
  const uint8_t* data;
  const float* scale;  // [n]
};

enum Activation : int32_t { kNone = 0, kGelu = 1, kGeluTanh = 2 };

// What follows a product, per output: act(acc * s_a * s_w + bias) + residual. Pointers may be null.
struct Epilogue {
  const float* bias;      // [n]
  const float* residual;  // [m, ldy]
  int32_t activation;
};

// int8 activations of m rows: codes [m, lda], one scale and one sum of codes per row.
struct Rows {
  const int8_t* codes;
  const float* scale;
  const int32_t* sum;
  int32_t m, lda;
};

struct Kernels {
  const char* name;
  // y[m, n] for the panels [first, last) of w; y has ldy floats a row. With acc, only its integers: acc[m, n].
  void (*product)(const Packed& w, const Rows& a, int first, int last, float* y, int64_t ldy, const Epilogue& end,
                  int32_t* acc);
  // codes[m, lda] = round_half_even(x * (1 / max|x| * 127)), zero-padded; false where a row is not finite.
  bool (*quantize)(const float* x, int64_t ldx, int m, int k, int8_t* codes, int64_t lda, float* scale, int32_t* sum);
  // y = (x - mean) / sqrt(var + eps) * weight + bias; x and y may be the same.
  void (*layer_norm)(const float* x, int m, int k, const float* weight, const float* bias, float eps, float* y);
  // Softmax in fixed point. weights[j] = 15-bit code of exp(scores[j] * scaling - peak) * scale[j] over n keys; returns
  // the factor for mix(), NaN where the scores are. `scores` are used up; both have room for n rounded up to 16.
  double (*weigh)(float* scores, const float* scale, int n, float scaling, int16_t* weights);
  // out[m, d] = factor[m] * sum over keys of weights[m, key] * codes[key, d]; d a multiple of 16.
  void (*mix)(const int16_t* weights, int64_t ldw, const double* factor, int m, const int8_t* codes, int64_t stride,
              int keys, int d, float* out, int64_t ldo);
  // Scores and mixture of one query over the rows `at` of a cache [places, d]; d a multiple of 16. scratch: twice, and
  // weights: once keys rounded up to 16.
  void (*attend)(const int8_t* q, float q_scale, const int8_t* k, const float* k_scale, const int8_t* v,
                 const float* v_scale, const int32_t* at, int keys, int d, float scaling, float* scratch,
                 int16_t* weights, float* out);
  float (*largest)(const float* x, int n);
  double (*exp_sum)(const float* x, int n, float peak);  // sum of exp(x - peak)
};

extern const Kernels kPortable, kAvx2, kAvxVnni, kAvx512, kNeon;

}  // namespace dq
