// A model's weights, as Python hands them over once, and the two passes over them.
#pragma once
#include <cmath>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "pool.h"

namespace dq {

// Memory on a cache line's boundary; grows, never shrinks, keeps nothing.
template <class T>
class Buffer {
 public:
  T* reserve(size_t count) {
    if (count > count_) {
      data_.reset(static_cast<T*>(operator new(count * sizeof(T), std::align_val_t(kAlign))));
      count_ = count;
    }
    return data_.get();
  }
  T* get() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { operator delete(p, std::align_val_t(kAlign)); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_ = 0;
};

struct Config {
  int32_t d, heads, encoder_layers, decoder_layers, encoder_ffn, decoder_ffn, vocabulary;
  int32_t encoder_positions, decoder_positions, position_offset;
  int32_t pre_norm;  // before each block, and one after each stack (mBART)
  int32_t embedding_norm;
  int32_t head_bias;      // final_logits_bias is there
  int32_t embedding_d;    // width of the embeddings; d unless embedding_map
  int32_t embedding_map;  // a matrix [d, embedding_d] after them (ALBERT)
  int32_t encoder_steps;  // how often a layer runs; neighbours share one (ALBERT)
  int32_t activation;     // Activation of the feed-forward
  int32_t token_types;    // 0 without them
  float embed_scale, eps;
};

// Several projections of the same input lie in one matrix, one after the other.
struct Linear {
  int n = 0, k = 0, bits = 0;
  Buffer<uint8_t> codes;
  std::vector<float> scale, bias;
  Packed packed() const { return {n, k, bits, codes.get(), scale.data()}; }
};

struct Norm {
  std::vector<float> weight, bias;
};

struct Attention {
  Linear qkv;  // self: q, k, v; cross: q
  Linear kv;   // cross: k, v of the source
  Linear out;
  Norm norm;
};

struct Layer {
  Attention self, cross;
  Linear fc1, fc2;
  Norm norm;
};

struct Stack {
  std::vector<float> positions, token_types;  // [positions, embedding_d], [token_types, embedding_d]
  Linear embedding_map;
  Norm embedding_norm, final_norm;
  std::vector<Layer> layers;
};

class Model {
 public:
  Model(const Config& config, const Kernels& kernels);

  // Both throw std::invalid_argument, with the name and what was expected, for what doesn't fit.
  void set_matrix(const std::string& name, int bits, int n, int k, const uint8_t* planar, const float* scale,
                  const float* bias);
  void set_vector(const std::string& name, const float* values, int64_t count);
  void finish();  // throws unless everything was set

  // x[embedding_d] = row `token` of the vocabulary matrix, times embed_scale.
  void embed(int32_t token, float* x) const;

  const Config config;
  const Kernels& kernels;
  Linear vocabulary;
  std::vector<float> head_bias;
  Stack encoder, decoder;
  int head_d() const { return config.d / config.heads; }
  // What scores are multiplied by: 1 / sqrt(head width), rounded once.
  float scaling() const { return static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_d()))); }
  int head_bytes() const { return (head_d() + 15) / 16 * 16; }

 private:
  struct Part {
    Linear* linear;
    int first, n, k;
  };
  void expect(const std::string& name, Linear& linear, int n, int k);
  void expect(const std::string& name, std::vector<float>& values, size_t count);
  void expect(const std::string& name, Norm& norm, int width);

  std::map<std::string, Part> parts_;
  std::map<std::string, std::pair<std::vector<float>*, size_t>> vectors_;
};

}  // namespace dq
