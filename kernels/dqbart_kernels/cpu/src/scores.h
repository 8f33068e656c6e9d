// From hidden states to candidates: the vocabulary product, what the processors do to it, and sampling.
//
// Logits are made 512 columns at a time and reduced there to the best candidates and, for beams, the log-sum-exp: a row
// of 50,265 floats is never written unless a token is sampled from it.
#pragma once
#include "options.h"
#include "passes.h"

namespace dq {

struct Candidate {
  float score;
  int32_t token;
};

// What the processors do to one row of scores at one step.
struct Rules {
  int32_t forced = -1;             // only this token, with score 0
  std::vector<int32_t> banned;     // sorted
  std::vector<int32_t> penalized;  // sorted; repetition penalty
};

// The rules for a hypothesis of these tokens, the start token included, in transformers' order.
Rules make_rules(const Options& options, const Lists& lists, const std::vector<int32_t>& tokens);

// The best candidates of every row. `normalize`: log-probabilities instead of logits.
class Head {
 public:
  Head(Passes& passes, int keep) : passes_(passes), keep_(keep) {}

  std::vector<std::vector<Candidate>> best(const std::vector<Rules>& rules, float penalty, bool normalize);
  // All logits of all rows, after the rules: what sampling needs.
  void scores(const std::vector<Rules>& rules, float penalty, std::vector<float>& out);

 private:
  Passes& passes_;
  const int keep_;
};

// One token from softmax(x / temperature), cut to the top_k largest, then to the smallest set that holds top_p. `state`
// is that of the random stream.
int32_t sample(const float* x, int n, const Options& options, uint64_t& state);

}  // namespace dq
