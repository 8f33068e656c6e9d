#include "passes.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <stdexcept>

namespace dq {

constexpr int kRowBlock = 256;  // rows of activations that stay in the second cache while panels pass
constexpr int kScoreRows = 24;  // queries whose scores are held at a time
constexpr int kSerialRows = 4;  // fewer rows are normalised and quantized faster than threads wake

static int round_up(int x, int to) { return (x + to - 1) / to * to; }

static void refuse_overflow() {
  throw std::overflow_error("cannot quantize NaN or infinite values: the model or its input has overflowed");
}

template <class Rows>
static void by_rows(Pool& pool, int m, const Rows& rows) {
  const int block = m <= kSerialRows ? m : std::max(1, std::min(16, m / pool.threads()));
  pool.run((m + block - 1) / block, [&](int i) { rows(i * block, std::min(block, m - i * block)); });
}

void Quantized::reserve(int rows, int k) {
  m = rows;
  lda = round_up(k, kAlign);
  codes.reserve(static_cast<size_t>(m) * lda);
  scale.reserve(m);
  sum.reserve(m);
}

void Passes::quantize(const float* x, int m, int k, Quantized& out) {
  out.reserve(m, k);
  std::atomic<bool> finite{true};
  by_rows(pool, m, [&](int row, int rows) {
    if (!model.kernels.quantize(x + static_cast<int64_t>(row) * k, k, rows, k, out.codes_of(row), out.lda,
                                out.scale.get() + row, out.sum.get() + row))
      finite = false;
  });
  if (!finite) refuse_overflow();
}

void Passes::norm(const Norm& norm, const float* x, int m, float* y) {
  const int d = static_cast<int>(norm.weight.size());
  by_rows(pool, m, [&](int row, int rows) {
    const int64_t at = static_cast<int64_t>(row) * d;
    model.kernels.layer_norm(x + at, rows, d, norm.weight.data(), norm.bias.data(), model.config.eps, y + at);
  });
}

void Passes::norm_and_quantize(const Norm& norm, const float* x, int m, float* y, Quantized& out) {
  const int d = static_cast<int>(norm.weight.size());
  out.reserve(m, d);
  std::atomic<bool> finite{true};
  by_rows(pool, m, [&](int first, int rows) {
    for (int row = first; row < first + rows; ++row) {
      const int64_t at = static_cast<int64_t>(row) * d;
      model.kernels.layer_norm(x + at, 1, d, norm.weight.data(), norm.bias.data(), model.config.eps, y + at);
      if (!model.kernels.quantize(y + at, d, 1, d, out.codes_of(row), out.lda, out.scale.get() + row,
                                  out.sum.get() + row))
        finite = false;
    }
  });
  if (!finite) refuse_overflow();
}

void Passes::linear(const Linear& linear, const Quantized& x, float* y, int activation, const float* residual) {
  const Packed w = linear.packed();
  const int panels = (w.n + kColumns - 1) / kColumns;
  const int row_blocks = (x.m + kRowBlock - 1) / kRowBlock;
  const int pieces = std::min(panels, std::max(1, 4 * pool.threads() / row_blocks));
  pool.run(row_blocks * pieces, [&](int i) {
    const int row = i / pieces * kRowBlock, piece = i % pieces;
    const int64_t at = static_cast<int64_t>(row) * w.n;
    const Epilogue end = {linear.bias.data(), residual ? residual + at : nullptr, activation};
    model.kernels.product(w, x.rows(row, std::min(kRowBlock, x.m - row)), panels * piece / pieces,
                          panels * (piece + 1) / pieces, y + at, w.n, end, nullptr);
  });
}

void Passes::linear_by_head(const Linear& linear, const Quantized& x, float* y) {
  const int hd = model.head_d(), panels = hd / kColumns, heads = linear.n / hd;
  if (hd % kColumns) return this->linear(linear, x, y, kNone, nullptr);
  const Packed w = linear.packed();
  const int row_blocks = (x.m + kRowBlock - 1) / kRowBlock;
  pool.run(row_blocks * heads, [&](int i) {
    const int row = i / heads * kRowBlock, head = i % heads;
    float* out = y + (static_cast<int64_t>(head) * x.m + row) * hd - head * hd;  // product() writes at its own column
    model.kernels.product(w, x.rows(row, std::min(kRowBlock, x.m - row)), head * panels, (head + 1) * panels, out, hd,
                          {linear.bias.data(), nullptr, kNone}, nullptr);
  });
}

Passes::HeadRows Passes::head_rows(const float* y, int m, int projections, int which, int head, int first) const {
  const int hd = model.head_d(), block = which * model.config.heads + head;
  const int64_t width = static_cast<int64_t>(projections) * model.config.d;
  if (hd % kColumns) return {y + first * width + block * hd, width};
  return {y + (static_cast<int64_t>(block) * m + first) * hd, hd};
}

void Passes::embed(const Stack& stack, const int32_t* tokens, const int32_t* types, const int32_t* positions, int m,
                   float* h) {
  const int d = model.config.embedding_d;
  float* x = model.config.embedding_map ? wide_.reserve(static_cast<size_t>(m) * d) : h;
  by_rows(pool, m, [&](int first, int rows) {
    for (int row = first; row < first + rows; ++row) {
      float* out = x + static_cast<int64_t>(row) * d;
      model.embed(tokens[row], out);
      if (!stack.token_types.empty()) {
        const float* type = stack.token_types.data() + static_cast<int64_t>(types ? types[row] : 0) * d;
        for (int j = 0; j < d; ++j) out[j] += type[j];
      }
      const float* position = stack.positions.data() + static_cast<int64_t>(positions[row]) * d;
      for (int j = 0; j < d; ++j) out[j] += position[j];
    }
  });
  if (model.config.embedding_norm) norm(stack.embedding_norm, x, m, x);
  if (model.config.embedding_map) {
    quantize(x, m, d, input_);
    linear(stack.embedding_map, input_, h, kNone, nullptr);
  }
  if (!model.config.pre_norm) quantize(h, m, model.config.d, input_);
}

void Passes::start_block(const Norm& norm, const float* h, int m) {
  if (model.config.pre_norm) norm_and_quantize(norm, h, m, normed_.get(), input_);
}

void Passes::end_block(const Norm& norm, float* h, int m) {
  if (!model.config.pre_norm) norm_and_quantize(norm, h, m, h, input_);
}

// h += fc2(gelu(fc1(h))).
void Passes::feed_forward(const Layer& layer, float* h, int m) {
  start_block(layer.norm, h, m);
  float* wide = wide_.reserve(static_cast<size_t>(m) * layer.fc1.n);
  linear(layer.fc1, input_, wide, model.config.activation, nullptr);
  quantize(wide, m, layer.fc1.n, input_);
  linear(layer.fc2, input_, h, kNone, h);
  end_block(layer.norm, h, m);
}

void Passes::encode(const int32_t* tokens, const int32_t* types, const int32_t* starts, int items,
                    std::vector<Source>* sources, float* hidden) {
  const Config& c = model.config;
  const int m = starts[items], d = c.d;
  float* h = hidden_.reserve(static_cast<size_t>(m) * d);
  normed_.reserve(static_cast<size_t>(m) * d);
  float* qkv = qkv_.reserve(static_cast<size_t>(m) * 3 * d);
  float* mixed = mixed_.reserve(static_cast<size_t>(m) * d);
  int32_t* positions = positions_.reserve(m);
  for (int i = 0; i < items; ++i)
    for (int j = starts[i]; j < starts[i + 1]; ++j) positions[j] = j - starts[i] + c.position_offset;
  embed(model.encoder, tokens, types, positions, m, h);
  for (int step = 0; step < c.encoder_steps; ++step) {
    const Layer& layer = model.encoder.layers[static_cast<int64_t>(step) * c.encoder_layers / c.encoder_steps];
    start_block(layer.self.norm, h, m);
    linear_by_head(layer.self.qkv, input_, qkv);
    pool.run(items * c.heads, [&](int i) {
      const int item = i / c.heads;
      attend_source(qkv, m, starts[item], starts[item + 1] - starts[item], i % c.heads, mixed);
    });
    quantize(mixed, m, d, input_);
    linear(layer.self.out, input_, h, kNone, h);
    end_block(layer.self.norm, h, m);
    feed_forward(layer, h, m);
  }
  if (c.pre_norm) norm_and_quantize(model.encoder.final_norm, h, m, h, input_);
  if (hidden) std::memcpy(hidden, h, sizeof(float) * m * d);
  if (!sources) return;

  sources->resize(items);
  for (int i = 0; i < items; ++i) {
    Source& source = (*sources)[i];
    source.length = starts[i + 1] - starts[i];
    const size_t places = static_cast<size_t>(c.decoder_layers) * c.heads;
    source.k.reserve(places * round_up(source.length, kColumns) * model.head_bytes());
    source.v.reserve(places * source.length * model.head_bytes());
    source.k_scale.reserve(places * source.length);
    source.v_scale.reserve(places * source.length);
  }
  for (int l = 0; l < c.decoder_layers; ++l) {
    linear_by_head(model.decoder.layers[l].cross.kv, input_, qkv);
    pool.run(items * c.heads, [&](int i) {
      const int item = i / c.heads;
      fill_source(qkv, m, starts[item], l, i % c.heads, (*sources)[item]);
    });
  }
}

// Codes [keys, bytes] to panels of 16 keys: what product() takes as 8-bit weights.
static void pack_keys(const int8_t* codes, int keys, int bytes, uint8_t* panels) {
  std::memset(panels, 0, static_cast<size_t>(round_up(keys, kColumns)) * bytes);
  for (int key = 0; key < keys; ++key) {
    uint8_t* panel = panels + static_cast<size_t>(key / kColumns) * kColumns * bytes + key % kColumns * kPanelRows;
    for (int i = 0; i < bytes; i += kPanelRows)
      std::memcpy(panel + i * kColumns, codes + static_cast<size_t>(key) * bytes + i, kPanelRows);
  }
}

void Passes::attend_source(const float* qkv, int m, int first, int length, int head, float* out) const {
  const Kernels& kernels = model.kernels;
  const int d = model.config.d, hd = model.head_d(), bytes = model.head_bytes();
  const size_t codes_size = static_cast<size_t>(length) * bytes;
  Buffer<int8_t> codes;
  Buffer<uint8_t> panels;
  Buffer<float> floats;
  Buffer<int16_t> weights;
  Buffer<int32_t> sums;
  int8_t* q = codes.reserve(3 * codes_size + kAlign);
  int8_t *k = q + codes_size, *v = k + codes_size;
  const int width = round_up(length, kColumns);
  float* q_scale = floats.reserve(3 * length + kScoreRows * (width + bytes));
  float *k_scale = q_scale + length, *v_scale = k_scale + length, *scores = v_scale + length;
  float* mixture = scores + kScoreRows * width;
  double factor[kScoreRows];
  weights.reserve(static_cast<size_t>(kScoreRows) * width);
  int32_t* sum = sums.reserve(length);
  const auto rows = [&](int which) { return head_rows(qkv, m, 3, which, head, first); };
  bool finite = kernels.quantize(rows(1).at, rows(1).stride, length, hd, k, bytes, k_scale, sum);
  finite &= kernels.quantize(rows(2).at, rows(2).stride, length, hd, v, bytes, v_scale, sum);
  finite &= kernels.quantize(rows(0).at, rows(0).stride, length, hd, q, bytes, q_scale, sum);
  if (!finite)
    for (int i = 0; i < length; ++i) q_scale[i] = NAN;  // seen when the mixture is quantized
  pack_keys(k, length, bytes, panels.reserve(static_cast<size_t>(width) * bytes));
  const Packed keys = {length, bytes, 8, panels.get(), k_scale};
  for (int row = 0; row < length; row += kScoreRows) {
    const int rows = std::min(kScoreRows, length - row);
    const Rows queries = {q + static_cast<size_t>(row) * bytes, q_scale + row, sum + row, rows, bytes};
    kernels.product(keys, queries, 0, width / kColumns, scores, width, {}, nullptr);
    for (int i = 0; i < rows; ++i)
      factor[i] = kernels.weigh(scores + i * width, v_scale, length, model.scaling(), weights.get() + i * width);
    kernels.mix(weights.get(), width, factor, rows, v, bytes, length, bytes, mixture, bytes);
    for (int i = 0; i < rows; ++i)
      std::memcpy(out + static_cast<int64_t>(first + row + i) * d + head * hd, mixture + i * bytes, sizeof(float) * hd);
  }
}

void Passes::fill_source(const float* kv, int m, int first, int layer, int head, Source& source) const {
  const int hd = model.head_d(), bytes = model.head_bytes(), n = source.length;
  const size_t place = static_cast<size_t>(layer) * model.config.heads + head;
  Buffer<int8_t> codes;
  Buffer<int32_t> sum;
  float* k_scale = source.k_scale.get() + place * n;
  const HeadRows keys = head_rows(kv, m, 2, 0, head, first), values = head_rows(kv, m, 2, 1, head, first);
  bool finite = model.kernels.quantize(keys.at, keys.stride, n, hd, codes.reserve(static_cast<size_t>(n) * bytes),
                                       bytes, k_scale, sum.reserve(n));
  pack_keys(codes.get(), n, bytes, source.k.get() + place * round_up(n, kColumns) * bytes);
  finite &= model.kernels.quantize(values.at, values.stride, n, hd, source.v.get() + place * n * bytes, bytes,
                                   source.v_scale.get() + place * n, sum.get());
  if (!finite) std::fill(k_scale, k_scale + n, NAN);
}

void Passes::start_decoding(int max_rows, int max_length) {
  const Config& c = model.config;
  max_rows_ = max_rows;
  max_length_ = max_length;
  const size_t places = static_cast<size_t>(max_rows) * max_length * c.heads;
  cache_k_.resize(c.decoder_layers);
  cache_v_.resize(c.decoder_layers);
  cache_k_scale_.resize(c.decoder_layers);
  cache_v_scale_.resize(c.decoder_layers);
  for (int l = 0; l < c.decoder_layers; ++l) {
    cache_k_[l].reserve(places * model.head_bytes());
    cache_v_[l].reserve(places * model.head_bytes());
    cache_k_scale_[l].reserve(places);
    cache_v_scale_[l].reserve(places);
  }
  const size_t rows = max_rows;
  hidden_.reserve(rows * c.d);
  normed_.reserve(rows * c.d);
  qkv_.reserve(rows * 3 * c.d);
  mixed_.reserve(rows * c.d);
  positions_.reserve(rows);
  query_.reserve(rows * c.heads * model.head_bytes() + kAlign);
  query_scale_.reserve(rows * c.heads);
  query_sum_.reserve(rows * c.heads);
}

void Passes::decode(const std::vector<Row>& rows, int t, const std::vector<std::vector<int32_t>>& history,
                    const std::vector<Source>& sources) {
  const Config& c = model.config;
  const int m = static_cast<int>(rows.size()), d = c.d;
  float *h = hidden_.get(), *qkv = qkv_.get(), *mixed = mixed_.get();
  longest_ = t + 1;
  std::vector<int32_t> tokens(m);
  std::vector<int> firsts;  // first row of each source
  for (int i = 0; i < m; ++i) {
    tokens[i] = rows[i].token;
    positions_.get()[i] = t + c.position_offset;
    longest_ = std::max(longest_, sources[rows[i].source].length);
    if (i == 0 || rows[i].source != rows[i - 1].source) firsts.push_back(i);
  }
  firsts.push_back(m);
  const int groups = static_cast<int>(firsts.size()) - 1;
  scores_.reserve(static_cast<size_t>(m) * c.heads * (2 * round_up(longest_, kColumns) + model.head_bytes()));
  weights_.reserve(static_cast<size_t>(m) * c.heads * round_up(longest_, kColumns));
  embed(model.decoder, tokens.data(), nullptr, positions_.get(), m, h);
  for (int l = 0; l < c.decoder_layers; ++l) {
    const Layer& layer = model.decoder.layers[l];
    start_block(layer.self.norm, h, m);
    linear(layer.self.qkv, input_, qkv, kNone, nullptr);
    pool.run(m * c.heads, [&](int i) { attend_self(qkv, l, t, i / c.heads, i % c.heads, history[i / c.heads]); });
    quantize(mixed, m, d, input_);
    linear(layer.self.out, input_, h, kNone, h);
    end_block(layer.self.norm, h, m);

    start_block(layer.cross.norm, h, m);
    linear(layer.cross.qkv, input_, qkv, kNone, nullptr);
    pool.run(groups * c.heads, [&](int i) {
      const int first = firsts[i / c.heads];
      attend_cross(l, i % c.heads, first, firsts[i / c.heads + 1] - first, sources[rows[first].source]);
    });
    quantize(mixed, m, d, input_);
    linear(layer.cross.out, input_, h, kNone, h);
    end_block(layer.cross.norm, h, m);
    feed_forward(layer, h, m);
  }
  if (c.pre_norm) norm_and_quantize(model.decoder.final_norm, h, m, h, input_);
}

void Passes::attend_self(float* qkv, int layer, int t, int row, int head, const std::vector<int32_t>& history) {
  const int d = model.config.d, hd = model.head_d(), bytes = model.head_bytes(), heads = model.config.heads;
  const size_t place = static_cast<size_t>(t) * max_rows_ + row;
  const size_t first = static_cast<size_t>(head) * max_length_ * max_rows_;  // of this head's places
  int8_t *k = cache_k_[layer].get() + first * bytes, *v = cache_v_[layer].get() + first * bytes;
  float *k_scale = cache_k_scale_[layer].get() + first, *v_scale = cache_v_scale_[layer].get() + first;
  const float* at = qkv + static_cast<int64_t>(row) * 3 * d + head * hd;
  int8_t* q = query_.get() + (static_cast<int64_t>(row) * heads + head) * bytes;
  float q_scale;
  int32_t sum;
  bool finite = model.kernels.quantize(at, hd, 1, hd, q, bytes, &q_scale, &sum);
  finite &= model.kernels.quantize(at + d, hd, 1, hd, k + place * bytes, bytes, k_scale + place, &sum);
  finite &= model.kernels.quantize(at + 2 * d, hd, 1, hd, v + place * bytes, bytes, v_scale + place, &sum);
  const int width = round_up(longest_, kColumns);
  const int64_t scratch = static_cast<int64_t>(row) * heads + head;
  float* scores = scores_.get() + scratch * (2 * width + bytes);
  float* mixture = scores + 2 * width;
  model.kernels.attend(q, finite ? q_scale : NAN, k, k_scale, v, v_scale, history.data(), t + 1, bytes, model.scaling(),
                       scores, weights_.get() + scratch * width, mixture);
  std::memcpy(mixed_.get() + static_cast<int64_t>(row) * d + head * hd, mixture, sizeof(float) * hd);
}

void Passes::attend_cross(int layer, int head, int first_row, int rows, const Source& source) {
  const Kernels& kernels = model.kernels;
  const int d = model.config.d, hd = model.head_d(), bytes = model.head_bytes(), heads = model.config.heads;
  const int n = source.length, width = round_up(n, kColumns);
  const size_t place = static_cast<size_t>(layer) * heads + head,
               at = static_cast<size_t>(first_row) * heads + head * rows;
  int8_t* q = query_.get() + at * bytes;
  float* q_scale = query_scale_.get() + at;
  int32_t* sum = query_sum_.get() + at;
  if (!kernels.quantize(qkv_.get() + static_cast<int64_t>(first_row) * d + head * hd, d, rows, hd, q, bytes, q_scale,
                        sum))
    std::fill(q_scale, q_scale + rows, NAN);
  float* scores = scores_.get() + at * (2 * round_up(longest_, kColumns) + bytes);
  float* mixture = scores + static_cast<int64_t>(rows) * width;
  int16_t* weights = weights_.get() + at * round_up(longest_, kColumns);
  const Packed keys = {n, bytes, 8, source.k.get() + place * width * bytes, source.k_scale.get() + place * n};
  kernels.product(keys, {q, q_scale, sum, rows, bytes}, 0, width / kColumns, scores, width, {}, nullptr);
  for (int row = 0; row < rows; row += kScoreRows) {
    const int some = std::min(kScoreRows, rows - row);
    double factor[kScoreRows];
    for (int i = 0; i < some; ++i)
      factor[i] = kernels.weigh(scores + static_cast<int64_t>(row + i) * width, source.v_scale.get() + place * n, n,
                                model.scaling(), weights + i * width);
    kernels.mix(weights, width, factor, some, source.v.get() + place * n * bytes, bytes, n, bytes,
                mixture + static_cast<int64_t>(row) * bytes, bytes);
  }
  for (int i = 0; i < rows; ++i)
    std::memcpy(mixed_.get() + static_cast<int64_t>(first_row + i) * d + head * hd, mixture + i * bytes,
                sizeof(float) * hd);
}

void Passes::head(int first_panel, int last_panel, float* out, int64_t ldo) const {
  // product() writes at the panel's own columns; shift the base so that the first panel lands at out[0].
  const Epilogue end = {model.config.head_bias ? model.head_bias.data() : nullptr, nullptr, kNone};
  model.kernels.product(model.vocabulary.packed(), input_.rows(0, input_.m), first_panel, last_panel,
                        out - static_cast<int64_t>(first_panel) * kColumns, ldo, end, nullptr);
}

}  // namespace dq
