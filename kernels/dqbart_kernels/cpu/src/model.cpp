#include "model.h"

#include <cstring>
#include <stdexcept>

namespace dq {

Model::Model(const Config& c, const Kernels& kernels) : config(c), kernels(kernels) {
  expect("shared", vocabulary, c.vocabulary, c.embedding_d);
  if (c.head_bias) expect("final_logits_bias", head_bias, c.vocabulary);
  encoder.layers.resize(c.encoder_layers);
  decoder.layers.resize(c.decoder_layers);
  for (const bool is_decoder : {false, true}) {
    Stack& stack = is_decoder ? decoder : encoder;
    const std::string top = is_decoder ? "decoder." : "encoder.";
    const int positions = is_decoder ? c.decoder_positions : c.encoder_positions;
    const int ffn = is_decoder ? c.decoder_ffn : c.encoder_ffn;
    if (is_decoder && c.decoder_layers == 0) break;
    expect(top + "embed_positions.weight", stack.positions, static_cast<size_t>(positions) * c.embedding_d);
    if (c.token_types)
      expect(top + "token_types.weight", stack.token_types, static_cast<size_t>(c.token_types) * c.embedding_d);
    if (c.embedding_norm) expect(top + "layernorm_embedding", stack.embedding_norm, c.embedding_d);
    if (c.embedding_map) expect(top + "embedding_map", stack.embedding_map, c.d, c.embedding_d);
    if (c.pre_norm) expect(top + "layer_norm", stack.final_norm, c.d);
    for (size_t i = 0; i < stack.layers.size(); ++i) {
      Layer& layer = stack.layers[i];
      const std::string name = top + "layers." + std::to_string(i) + ".";
      for (const char* of : {"q_proj", "k_proj", "v_proj"}) expect(name + "self_attn." + of, layer.self.qkv, c.d, c.d);
      expect(name + "self_attn.out_proj", layer.self.out, c.d, c.d);
      expect(name + "self_attn_layer_norm", layer.self.norm, c.d);
      if (is_decoder) {
        expect(name + "encoder_attn.q_proj", layer.cross.qkv, c.d, c.d);
        for (const char* of : {"k_proj", "v_proj"}) expect(name + "encoder_attn." + of, layer.cross.kv, c.d, c.d);
        expect(name + "encoder_attn.out_proj", layer.cross.out, c.d, c.d);
        expect(name + "encoder_attn_layer_norm", layer.cross.norm, c.d);
      }
      expect(name + "fc1", layer.fc1, ffn, c.d);
      expect(name + "fc2", layer.fc2, c.d, ffn);
      expect(name + "final_layer_norm", layer.norm, c.d);
    }
  }
}

void Model::expect(const std::string& name, Linear& linear, int n, int k) {
  parts_[name] = {&linear, linear.n, n, k};
  linear.n += n;
  linear.k = k;
}

void Model::expect(const std::string& name, std::vector<float>& values, size_t count) {
  vectors_[name] = {&values, count};
}

void Model::expect(const std::string& name, Norm& norm, int width) {
  expect(name + ".weight", norm.weight, width);
  expect(name + ".bias", norm.bias, width);
}

void Model::set_matrix(const std::string& name, int bits, int n, int k, const uint8_t* planar, const float* scale,
                       const float* bias) {
  const auto found = parts_.find(name);
  if (found == parts_.end()) throw std::invalid_argument(name + ": no such matrix in this model, or it was set before");
  const Part part = found->second;
  Linear& linear = *part.linear;
  if (n != part.n || k != part.k)
    throw std::invalid_argument(name + ": shape [" + std::to_string(n) + ", " + std::to_string(k) + "], expected [" +
                                std::to_string(part.n) + ", " + std::to_string(part.k) + "]");
  if (bits != 1 && bits != 2 && bits != 4 && bits != 8)
    throw std::invalid_argument(name + ": " + std::to_string(bits) + " bits, expected 1, 2, 4 or 8");
  if (linear.bits == 0) {
    linear.bits = bits;
    const size_t bytes = packed_bytes(linear.n, k, bits);
    std::memset(linear.codes.reserve(bytes), 0, bytes);
    linear.scale.assign(linear.n, 0.0f);
    linear.bias.assign(linear.n, 0.0f);
  }
  if (linear.bits != bits)
    throw std::invalid_argument(name + ": " + std::to_string(bits) + " bits, but the projection beside it has " +
                                std::to_string(linear.bits));
  const size_t row_bytes = static_cast<size_t>((k * bits + 255) / 256) * 32;
  for (int i = 0; i < n; ++i) {
    if (!put_column(planar + i * row_bytes, part.first + i, k, bits, linear.codes.get()))
      throw std::invalid_argument(name + ": row " + std::to_string(i) + " has a code that " + std::to_string(bits) +
                                  "-bit weights never hold; the file is damaged");
  }
  std::memcpy(linear.scale.data() + part.first, scale, sizeof(float) * n);
  if (bias) std::memcpy(linear.bias.data() + part.first, bias, sizeof(float) * n);
  parts_.erase(found);
}

void Model::set_vector(const std::string& name, const float* values, int64_t count) {
  const auto found = vectors_.find(name);
  if (found == vectors_.end())
    throw std::invalid_argument(name + ": no such vector in this model, or it was set before");
  auto& [target, expected] = found->second;
  if (count < 0 || static_cast<size_t>(count) != expected)
    throw std::invalid_argument(name + ": " + std::to_string(count) + " values, expected " + std::to_string(expected));
  target->assign(values, values + count);
  vectors_.erase(found);
}

void Model::finish() {
  if (!parts_.empty()) throw std::invalid_argument(parts_.begin()->first + ": missing");
  if (!vectors_.empty()) throw std::invalid_argument(vectors_.begin()->first + ": missing");
}

void Model::embed(int32_t token, float* x) const {
  get_column(vocabulary.codes.get(), token, vocabulary.k, vocabulary.bits, vocabulary.scale[token], config.embed_scale,
             x);
}

}  // namespace dq
