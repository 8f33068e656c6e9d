// Greedy search, sampling and beam search over Passes, with the order of operations of transformers' generate.
#pragma once
#include <cstdint>
#include <vector>

#include "passes.h"

namespace dq {

enum EarlyStopping : int32_t { kHeuristic = 0, kWhenFull = 1, kNever = 2 };

struct Options {
  int32_t num_beams, num_return_sequences, max_length, min_length, min_new_tokens;  // lengths count the start token
  int32_t no_repeat_ngram_size, early_stopping, do_sample, top_k;
  int32_t start_token, forced_bos_token, forced_eos_token;  // forced: -1 for none
  int32_t begin_suppress_at;                                // length at which begin_suppress_tokens holds
  float length_penalty, repetition_penalty, temperature, top_p;
  uint64_t seed;
};

struct Lists {
  std::vector<int32_t> eos, suppress, begin_suppress;
  std::vector<std::vector<int32_t>> bad_words;
};

struct Output {
  std::vector<int32_t> tokens;  // from the start token on, as far as the sequence goes
  float score;                  // beam search: transformers' sequences_scores; else 0
};

// Called for every token of greedy search and sampling as it is chosen; true asks to stop.
using OnToken = bool (*)(int32_t sequence, int32_t token);

// outputs[item * num_return_sequences + i]. Returns false if it was stopped by on_token.
bool generate(Passes& passes, const Options& options, const Lists& lists, const std::vector<Source>& sources,
              OnToken on_token, std::vector<Output>& outputs);

}  // namespace dq
