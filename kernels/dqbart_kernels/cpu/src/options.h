// What generate is asked for. Options has the layout of `_Options` in cpu/__init__.py.
#pragma once
#include <cstdint>
#include <vector>

namespace dq {

enum EarlyStopping : int32_t { kHeuristic = 0, kWhenFull = 1, kNever = 2 };

struct Options {
  int32_t num_beams, num_return_sequences, max_length, min_length;  // lengths count the start token
  int32_t no_repeat_ngram_size, early_stopping, do_sample, top_k;
  int32_t start_token, forced_bos_token, forced_eos_token;  // forced: -1 for none
  int32_t begin_suppress_at;                                // length at which begin_suppress_tokens holds
  float repetition_penalty, temperature, top_p;
  double length_penalty;  // as transformers, which raises lengths to it in Python
  uint64_t seed;
};

struct Lists {
  std::vector<int32_t> eos, suppress, begin_suppress;
  std::vector<std::vector<int32_t>> bad_words;
};

}  // namespace dq
