// Greedy search, sampling and beam search over Passes, with the order of operations of transformers' generate.
#pragma once
#include <cstdint>
#include <vector>

#include "options.h"
#include "passes.h"

namespace dq {

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
