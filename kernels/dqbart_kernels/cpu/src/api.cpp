// The C interface that Python calls through ctypes. Nothing throws across it: a call that fails returns nonzero and
// dq_error() says why. Every index that reaches a table is checked here.
#include <algorithm>
#include <cstring>
#include <exception>
#include <stdexcept>
#include <string>

#include "dispatch.h"
#include "generate.h"

#define DQ_API extern "C" __attribute__((visibility("default")))

using namespace dq;

constexpr int kTokensAtOnce = 1024;  // of an encoder's batch: the activations between its products stay in cache

static thread_local std::string last_error;

template <class Body>
static int guarded(const Body& body) {
  try {
    body();
    return 0;
  } catch (const std::bad_alloc&) { last_error = "out of memory"; } catch (const std::exception& error) {
    last_error = error.what();
  }
  return 1;
}

static void require(bool holds, const std::string& otherwise) {
  if (!holds) throw std::invalid_argument(otherwise);
}

static const Kernels* find_kernels(const std::string& name) {
  for (const Kernels* kernels : usable_kernels())
    if (name.empty() || name == kernels->name) return kernels;
  std::string names;
  for (const Kernels* kernels : usable_kernels()) names += std::string(names.empty() ? "" : ", ") + kernels->name;
  throw std::invalid_argument("instruction set '" + name + "': expected one of " + names);
}

DQ_API const char* dq_error() { return last_error.c_str(); }

// Names that this processor can run, best first, separated by spaces.
DQ_API const char* dq_instruction_sets() {
  static const std::string names = [] {
    std::string all;
    for (const Kernels* kernels : usable_kernels()) all += std::string(all.empty() ? "" : " ") + kernels->name;
    return all;
  }();
  return names.c_str();
}

DQ_API Model* dq_model_new(const int32_t* ints, int int_count, const float* floats, const char* instruction_set) {
  Model* model = nullptr;
  guarded([&] {
    Config c = {};
    require(int_count * sizeof(int32_t) == offsetof(Config, embed_scale), "config: another number of sizes");
    std::memcpy(&c, ints, offsetof(Config, embed_scale));
    c.embed_scale = floats[0];
    c.eps = floats[1];
    for (int i = 0; i < 9; ++i) require(ints[i] >= 0 && ints[i] < 1 << 24, "config: a size is negative or too large");
    require(c.d > 0 && c.heads > 0 && c.d % c.heads == 0, "config: heads must divide the width");
    require(c.encoder_layers > 0 && c.decoder_layers >= 0 && c.vocabulary > 0, "config: no layers or no vocabulary");
    require(c.encoder_layers < 1024 && c.decoder_layers < 1024 && c.d < 1 << 15, "config: larger than any model");
    require(c.encoder_ffn > 0 && c.encoder_ffn <= 65536 && c.decoder_ffn <= 65536, "config: feed-forward too wide");
    require(c.position_offset >= 0 && c.position_offset < 1 << 16, "config: strange position offset");
    require(c.embedding_d > 0 && c.embedding_d < 1 << 15, "config: embeddings without or with too much width");
    require(c.embedding_map ? c.decoder_layers == 0 : c.embedding_d == c.d, "config: embeddings don't fit the layers");
    require(c.encoder_steps > 0 && c.encoder_steps < 1024, "config: encoder steps out of range");
    require(c.activation == kGelu || c.activation == kGeluTanh, "config: unknown activation");
    require(c.token_types >= 0 && c.token_types < 1 << 16, "config: strange number of token types");
    model = new Model(c, *find_kernels(instruction_set));
  });
  return model;
}

DQ_API void dq_model_free(Model* model) { delete model; }

DQ_API const char* dq_model_instruction_set(const Model* model) { return model->kernels.name; }

DQ_API int dq_set_matrix(Model* model, const char* name, int bits, int n, int k, const uint8_t* planar, int64_t bytes,
                         const float* scale, const float* bias) {
  return guarded([&] {
    require(n > 0 && k > 0 && bits > 0 && bits <= 8, std::string(name) + ": empty matrix");
    const int64_t expected = static_cast<int64_t>(n) * ((static_cast<int64_t>(k) * bits + 255) / 256) * 32;
    require(bytes == expected,
            std::string(name) + ": " + std::to_string(bytes) + " bytes of codes, expected " + std::to_string(expected));
    model->set_matrix(name, bits, n, k, planar, scale, bias);
  });
}

DQ_API int dq_set_vector(Model* model, const char* name, const float* values, int64_t count) {
  return guarded([&] { model->set_vector(name, values, count); });
}

DQ_API int dq_finish(Model* model) {
  return guarded([&] { model->finish(); });
}

static void check_tokens(const Model& model, const int32_t* tokens, int64_t count, const char* what) {
  for (int64_t i = 0; i < count; ++i)
    require(tokens[i] >= 0 && tokens[i] < model.config.vocabulary, std::string(what) + " id " +
                                                                       std::to_string(tokens[i]) + ": expected 0 to " +
                                                                       std::to_string(model.config.vocabulary - 1));
}

static void check_sources(const Model& model, const int32_t* tokens, const int32_t* starts, int items) {
  require(items > 0 && starts[0] == 0, "no sources");
  const int room = model.config.encoder_positions - model.config.position_offset;
  for (int i = 0; i < items; ++i) {
    const int64_t length = static_cast<int64_t>(starts[i + 1]) - starts[i];
    require(length > 0 && length <= room, "source " + std::to_string(i) + " has " + std::to_string(length) +
                                              " tokens: expected 1 to " + std::to_string(room));
  }
  check_tokens(model, tokens, starts[items], "source");
}

static void require_decoder(const Model& model) {
  require(model.config.decoder_layers > 0, "the model has no decoder");
}

// types: one per token, or null.
DQ_API int dq_encode(const Model* model, int threads, const int32_t* tokens, const int32_t* types,
                     const int32_t* starts, int items, float* hidden) {
  return guarded([&] {
    check_sources(*model, tokens, starts, items);
    for (int i = 0; types && i < starts[items]; ++i)
      require(types[i] >= 0 && types[i] < model->config.token_types, "token type " + std::to_string(types[i]) +
                                                                         ": expected less than " +
                                                                         std::to_string(model->config.token_types));
    const Lease pool(threads);
    Passes passes(*model, *pool);
    for (int first = 0, last; first < items; first = last) {
      std::vector<int32_t> group = {0};  // where its sources start
      for (last = first; last < items && (last == first || starts[last + 1] - starts[first] <= kTokensAtOnce); ++last)
        group.push_back(starts[last + 1] - starts[first]);
      passes.encode(tokens + starts[first], types ? types + starts[first] : nullptr, group.data(), last - first,
                    nullptr, hidden + static_cast<int64_t>(starts[first]) * model->config.d);
    }
  });
}

// Teacher forcing, one step at a time as in generation: logits[items, length, vocabulary].
DQ_API int dq_logits(const Model* model, int threads, const int32_t* tokens, const int32_t* starts, int items,
                     const int32_t* decoder_tokens, int length, float* logits) {
  return guarded([&] {
    require_decoder(*model);
    check_sources(*model, tokens, starts, items);
    require(length > 0 && length <= model->config.decoder_positions - model->config.position_offset,
            "decoder length " + std::to_string(length) + ": more than the model has positions");
    check_tokens(*model, decoder_tokens, static_cast<int64_t>(items) * length, "decoder");
    const Lease pool(threads);
    Passes passes(*model, *pool);
    std::vector<Source> sources;
    passes.encode(tokens, nullptr, starts, items, &sources, nullptr);
    passes.start_decoding(items, length);
    std::vector<std::vector<int32_t>> history(items);
    const int64_t vocabulary = model->config.vocabulary;
    for (int t = 0; t < length; ++t) {
      std::vector<Row> rows;
      for (int i = 0; i < items; ++i) {
        rows.push_back({i, decoder_tokens[static_cast<int64_t>(i) * length + t]});
        history[i].push_back(t * items + i);
      }
      passes.decode(rows, t, history, sources);
      passes.head(0, passes.head_panels(), logits + t * vocabulary, length * vocabulary);
    }
  });
}

// lists: lengths and values of eos, suppress, begin_suppress and each of the bad words, one after the other.
// tokens_out[items * num_return_sequences, max_length], lengths_out and scores_out one per sequence. *stopped: by
// on_token.
DQ_API int dq_generate(const Model* model, int threads, const int32_t* tokens, const int32_t* starts, int items,
                       const Options* options, const int32_t* lists, int list_count, OnToken on_token,
                       int32_t* tokens_out, int32_t* lengths_out, float* scores_out, int32_t* stopped) {
  return guarded([&] {
    const Options& o = *options;
    require_decoder(*model);
    check_sources(*model, tokens, starts, items);
    require(o.num_beams >= 1 && o.num_beams <= 1024, "num_beams out of range");
    require(o.num_return_sequences >= 1 && o.num_return_sequences <= (o.num_beams > 1 ? o.num_beams : 1024),
            "num_return_sequences out of range");
    const int room = model->config.decoder_positions - model->config.position_offset;
    require(o.max_length >= 2 && o.max_length - 1 <= room,
            "max_length " + std::to_string(o.max_length) + ": expected 2 to " + std::to_string(room + 1));
    check_tokens(*model, &o.start_token, 1, "decoder start");
    for (int32_t token : {o.forced_bos_token, o.forced_eos_token})
      if (token != -1) check_tokens(*model, &token, 1, "forced");
    Lists found;
    std::vector<std::vector<int32_t>> all;
    for (int at = 0; at < list_count;) {
      const int count = lists[at++];
      require(count >= 0 && count <= list_count - at, "lists of tokens are damaged");
      all.emplace_back(lists + at, lists + at + count);
      check_tokens(*model, all.back().data(), count, "listed");
      at += count;
    }
    require(all.size() >= 3, "lists of tokens are missing");
    found.eos = all[0];
    found.suppress = all[1];
    found.begin_suppress = all[2];
    for (size_t i = 3; i < all.size(); ++i) {
      require(!all[i].empty(), "an empty bad word");
      found.bad_words.push_back(all[i]);
    }
    const Lease pool(threads);
    Passes passes(*model, *pool);
    std::vector<Source> sources;
    passes.encode(tokens, nullptr, starts, items, &sources, nullptr);
    std::vector<Output> outputs;
    *stopped = !generate(passes, o, found, sources, on_token, outputs);
    for (size_t i = 0; i < outputs.size(); ++i) {
      lengths_out[i] = static_cast<int32_t>(outputs[i].tokens.size());
      scores_out[i] = outputs[i].score;
      std::memcpy(tokens_out + i * o.max_length, outputs[i].tokens.data(), sizeof(int32_t) * outputs[i].tokens.size());
    }
  });
}

// For tests and benchmarks of the product alone.
DQ_API int64_t dq_packed_bytes(int n, int k, int bits) { return static_cast<int64_t>(packed_bytes(n, k, bits)); }

// planar: planar32 bytes of n rows, `row_bytes` each.
DQ_API int dq_pack(const uint8_t* planar, int64_t row_bytes, int n, int k, int bits, uint8_t* out) {
  return guarded([&] {
    std::memset(out, 0, packed_bytes(n, k, bits));
    for (int i = 0; i < n; ++i)
      require(put_column(planar + i * row_bytes, i, k, bits, out), "a code that these weights never hold");
  });
}

DQ_API int dq_quantize(const char* instruction_set, const float* x, int m, int k, int8_t* codes, int lda, float* scale,
                       int32_t* sum) {
  return guarded([&] {
    require(find_kernels(instruction_set)->quantize(x, k, m, k, codes, lda, scale, sum),
            "cannot quantize NaN or infinite values");
  });
}

DQ_API int dq_product(const char* instruction_set, int threads, int n, int k, int bits, const uint8_t* data,
                      const float* w_scale, int m, const int8_t* codes, int lda, const float* scale, const int32_t* sum,
                      int activation, float* y, int32_t* integers) {
  return guarded([&] {
    const Kernels* kernels = find_kernels(instruction_set);
    const Packed w = {n, k, bits, data, w_scale};
    const int panels = (n + kColumns - 1) / kColumns, tasks = std::min(panels, 4 * threads);
    const Lease pool(threads);
    (*pool).run(tasks, [&](int i) {
      kernels->product(w, {codes, scale, sum, m, lda}, panels * i / tasks, panels * (i + 1) / tasks, y, n,
                       {nullptr, nullptr, activation}, integers);
    });
  });
}
