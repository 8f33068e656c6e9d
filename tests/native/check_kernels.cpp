// Does an instruction set compute what the portable one does, to the last bit? For sets that the machine at hand does
// not have: cross-compiled and emulated. Prints what differs; exit code 1 if something does.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels.h"

using namespace dq;

static std::mt19937 generator(1);
static int wrong = 0;

static int below(int n) { return static_cast<int>(generator() % n); }
static float real() { return static_cast<float>(below(2'000'001) - 1'000'000) / 250'000; }

template <class T>
static void compare(const char* what, const std::vector<T>& a, const std::vector<T>& b) {
  if (std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0) return;
  size_t i = 0;
  while (std::memcmp(&a[i], &b[i], sizeof(T)) == 0) ++i;
  std::printf("%s: [%zu] is %.17g, portable %.17g\n", what, i, static_cast<double>(a[i]), static_cast<double>(b[i]));
  ++wrong;
}

static std::vector<float> floats(size_t count) {
  std::vector<float> x(count);
  for (float& v : x) v = real();
  return x;
}

// Codes of n columns as panels, from random planar32 bytes without the codes that weights never hold.
static std::vector<uint8_t> panels(int n, int k, int bits) {
  std::vector<uint8_t> out(packed_bytes(n, k, bits)), planar((k * bits + 255) / 256 * 32);
  for (int column = 0; column < n; ++column) do
      for (uint8_t& byte : planar) {
        byte = below(8) ? static_cast<uint8_t>(generator()) : bits == 8 ? 0x7f : 0x55 & (0xff >> (bits == 4));
        if (bits == 2) byte &= ~((byte >> 1 & ~byte & 0x55) << 1);
        if (bits == 4)
          for (int shift : {0, 4})
            if ((byte >> shift & 15) == 8) byte ^= 1 << shift;
        if (bits == 8 && byte == 0x80) byte = 0x81;
      }
    while (!put_column(planar.data(), column, k, bits, out.data()));
  return out;
}

static void check_product(const Kernels& ours, int n, int k, int m, int bits, bool largest) {
  const std::vector<uint8_t> data = panels(n, k, bits);
  const int lda = (k + kAlign - 1) / kAlign * kAlign, count = (n + kColumns - 1) / kColumns;
  std::vector<int8_t> codes(static_cast<size_t>(m) * lda);
  std::vector<int32_t> sums(m);
  for (int row = 0; row < m; ++row)
    for (int i = 0; i < k; ++i) {
      const int code = largest ? (row % 2 ? 127 : -127) : below(255) - 127;
      codes[static_cast<size_t>(row) * lda + i] = static_cast<int8_t>(code);
      sums[row] += code;
    }
  const auto w_scale = floats(n), scale = floats(m), bias = floats(n), residual = floats(static_cast<size_t>(m) * n);
  const Packed w = {n, k, bits, data.data(), w_scale.data()};
  const Rows a = {codes.data(), scale.data(), sums.data(), m, lda};
  char what[80];
  std::snprintf(what, sizeof what, "product n %d k %d m %d bits %d", n, k, m, bits);
  for (int activation : {kNone, kGelu, kGeluTanh}) {
    std::vector<float> y[2];
    std::vector<int32_t> integers[2];
    for (int i = 0; i < 2; ++i) {
      const Kernels& kernels = i ? kPortable : ours;
      y[i].resize(static_cast<size_t>(m) * n);
      integers[i].resize(y[i].size());
      kernels.product(w, a, 0, count, y[i].data(), n, {bias.data(), residual.data(), activation}, nullptr);
      kernels.product(w, a, 0, count, nullptr, n, {}, integers[i].data());
    }
    compare(what, y[0], y[1]);
    compare(what, integers[0], integers[1]);
  }
}

static void check_rows(const Kernels& ours, int m, int k) {
  const auto x = floats(static_cast<size_t>(m) * k), weight = floats(k), bias = floats(k);
  const int lda = (k + kAlign - 1) / kAlign * kAlign;
  std::vector<int8_t> codes[2];
  std::vector<float> scale[2], normed[2];
  std::vector<int32_t> sums[2];
  std::vector<double> rest[2];
  std::vector<int16_t> weights[2];
  const auto v_scale = floats(k);
  for (int i = 0; i < 2; ++i) {
    const Kernels& kernels = i ? kPortable : ours;
    codes[i].resize(static_cast<size_t>(m) * lda);
    scale[i].resize(m);
    sums[i].resize(m);
    normed[i].resize(x.size());
    weights[i].resize(x.size() + 16);
    kernels.quantize(x.data(), k, m, k, codes[i].data(), lda, scale[i].data(), sums[i].data());
    kernels.layer_norm(x.data(), m, k, weight.data(), bias.data(), 1e-5f, normed[i].data());
    for (int row = 0; row < m; ++row) {
      const float* at = x.data() + static_cast<size_t>(row) * k;
      std::vector<float> scores(at, at + k);
      scores.resize(k + 16);
      std::vector<float> scale = v_scale;
      for (float& s : scale) s = std::fabs(s) + 1e-3f;
      rest[i].push_back(kernels.largest(at, k));
      rest[i].push_back(kernels.weigh(scores.data(), scale.data(), k, row ? 0.125f : 20.0f,
                                      weights[i].data() + static_cast<size_t>(row) * k));
    }
  }
  compare("quantize", codes[0], codes[1]);
  compare("scale", scale[0], scale[1]);
  compare("sum", sums[0], sums[1]);
  compare("layer_norm", normed[0], normed[1]);
  compare("weigh", weights[0], weights[1]);
  compare("largest and factor", rest[0], rest[1]);
}

static void check_attention(const Kernels& ours, int m, int keys, int d) {
  std::vector<int8_t> k(static_cast<size_t>(keys) * d), v(k.size()), q(d);
  for (auto* codes : {&k, &v, &q})
    for (int8_t& code : *codes) code = static_cast<int8_t>(below(255) - 127);
  auto k_scale = floats(keys), v_scale = floats(keys);
  for (float& s : v_scale) s = std::fabs(s) + 1e-3f;
  std::vector<int16_t> weights(static_cast<size_t>(m) * (keys + 1));
  for (int16_t& w : weights) w = static_cast<int16_t>(below(8) ? below(127 * 257 + 1) : 127 * 257);
  for (int row = 0; row < m; ++row) weights[row * (keys + 1) + keys] = 0;
  std::vector<double> factor(m);
  for (double& f : factor) f = std::fabs(real()) + 1e-3;
  std::vector<int32_t> at(keys);
  for (int32_t& place : at) place = below(keys);
  std::vector<float> mixed[2], attended[2];
  for (int i = 0; i < 2; ++i) {
    const Kernels& kernels = i ? kPortable : ours;
    std::vector<float> scratch(2 * keys + 32);
    std::vector<int16_t> codes(keys + 16);
    mixed[i].resize(static_cast<size_t>(m) * d);
    kernels.mix(weights.data(), keys + 1, factor.data(), m, v.data(), d, keys, d, mixed[i].data(), d);
    attended[i].resize(d);
    kernels.attend(q.data(), 0.01f, k.data(), k_scale.data(), v.data(), v_scale.data(), at.data(), keys, d, 0.125f,
                   scratch.data(), codes.data(), attended[i].data());
  }
  compare("mix", mixed[0], mixed[1]);
  compare("attend", attended[0], attended[1]);
}

int main() {
  const Kernels& ours = DQ_CHECK;
  for (int bits : {1, 2, 4, 8}) {
    for (int m = 1; m <= 18; ++m) check_product(ours, 1 + below(50), 1 + below(300), m, bits, false);
    check_product(ours, 17, 3072, 9, bits, true);
    check_product(ours, 16, 64, 40, bits, true);
  }
  for (int k : {1, 3, 7, 8, 15, 16, 33, 64, 100, 769}) check_rows(ours, 5, k);
  for (int d : {16, 64, 80})
    for (int m : {1, 4, 6, 7, 24})
      for (int keys : {1, 5, 130, 512, 1537}) check_attention(ours, m, keys, d);
  std::printf("%s: %d differences from portable\n", ours.name, wrong);
  return wrong != 0;
}
