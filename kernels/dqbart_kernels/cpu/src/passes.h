// The encoder over a batch of sources and the decoder over one token of every hypothesis.
//
// Sources of a batch lie one after the other without padding, and attention sees one source at a time, so that what
// one gives can't depend on its batch. Cross-attention's keys and values are made once per source and read by all of
// its beams. The self-attention cache keeps what each row wrote at each step; a hypothesis is a list of such places,
// so that reordering beams copies a few integers.
#pragma once
#include "model.h"

namespace dq {

// int8 rows with one scale each.
struct Quantized {
  Buffer<int8_t> codes;
  Buffer<float> scale;
  Buffer<int32_t> sum;
  int m = 0, lda = 0;
  void reserve(int rows, int k);
  int8_t* codes_of(int row) { return codes.get() + static_cast<int64_t>(row) * lda; }
  Rows rows(int first, int count) const {
    return {codes.get() + static_cast<int64_t>(first) * lda, scale.get() + first, sum.get() + first, count, lda};
  }
};

// Keys and values of one source in every decoder layer and head.
struct Source {
  int length = 0;
  Buffer<uint8_t> k;               // [layers, heads, panels of 16 keys]
  Buffer<int8_t> v;                // [layers, heads, length, head_bytes]
  Buffer<float> k_scale, v_scale;  // [layers, heads, length]
};

// One row of the decoder: a hypothesis of a source.
struct Row {
  int source;
  int32_t token;
};

class Passes {
 public:
  Passes(const Model& model, Pool& pool) : model(model), pool(pool) {}

  // tokens of item i: [starts[i], starts[i + 1]). types: token types, or null for zeros. hidden: [tokens, d], or null.
  // Throws std::overflow_error.
  void encode(const int32_t* tokens, const int32_t* types, const int32_t* starts, int items,
              std::vector<Source>* sources, float* hidden);

  void start_decoding(int max_rows, int max_length);
  // Step `t` of all rows, up to what head() multiplies. Rows of one source must be neighbours.
  // history(row)[0..t): cache places of its earlier tokens; this step writes place t * max_rows + row.
  void decode(const std::vector<Row>& rows, int t, const std::vector<std::vector<int32_t>>& history,
              const std::vector<Source>& sources);
  // Logits of columns [first, first + count) for all rows: out[rows, ldo]. First and count multiples of 16 columns.
  void head(int first_panel, int last_panel, float* out, int64_t ldo) const;

  const Model& model;
  Pool& pool;
  int head_panels() const { return (model.config.vocabulary + kColumns - 1) / kColumns; }

 private:
  void quantize(const float* x, int m, int k, Quantized& out);
  void linear(const Linear& linear, const Quantized& x, float* y, int activation, const float* residual);
  // Several projections of a source, each head's rows together where heads are whole panels: attention reads one head
  // at a time, and rows of 256 bytes, kilobytes apart, are read at a third of the speed.
  void linear_by_head(const Linear& linear, const Quantized& x, float* y);
  struct HeadRows {
    const float* at;
    int64_t stride;
  };
  // Rows from `first` on of head `head` of projection `which`, in what linear_by_head wrote for m rows.
  HeadRows head_rows(const float* y, int m, int projections, int which, int head, int first) const;
  void norm(const Norm& norm, const float* x, int m, float* y);
  // The same, and while a row is in the first cache, its codes: what the next product takes.
  void norm_and_quantize(const Norm& norm, const float* x, int m, float* y, Quantized& out);
  // A block reads input_ and adds to h. Its norm comes before (mBART) or after (BART); either way input_ is made there.
  void start_block(const Norm& norm, const float* h, int m);
  void end_block(const Norm& norm, float* h, int m);
  void embed(const Stack& stack, const int32_t* tokens, const int32_t* types, const int32_t* positions, int m,
             float* x);
  void attend_source(const float* qkv, int m, int first, int length, int head, float* out) const;
  void feed_forward(const Layer& layer, float* h, int m);
  void fill_source(const float* kv, int m, int first, int layer, int head, Source& source) const;
  void attend_self(float* qkv, int layer, int t, int row, int head, const std::vector<int32_t>& history);
  void attend_cross(int layer, int head, int first_row, int rows, const Source& source);

  Quantized input_;
  Buffer<float> hidden_, normed_, qkv_, mixed_, wide_;
  Buffer<int32_t> positions_;
  int max_rows_ = 0, max_length_ = 0;
  std::vector<Buffer<int8_t>> cache_k_, cache_v_;  // per layer: [heads, max_length, max_rows, head_bytes]
  std::vector<Buffer<float>> cache_k_scale_, cache_v_scale_;
  Buffer<int8_t> query_;
  Buffer<float> query_scale_, scores_;
  Buffer<int16_t> weights_;
  Buffer<int32_t> query_sum_;
  int longest_ = 0;
};

}  // namespace dq
