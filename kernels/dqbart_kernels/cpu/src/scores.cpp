#include "scores.h"

#include <algorithm>
#include <cmath>
#include <limits>

namespace dq {

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();
constexpr int kChunk = 32;  // panels of the vocabulary at a time: the logits stay in the first caches

// Best first; equal scores: the lower token, as an argmax over the row would.
static bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

class Top {
 public:
  explicit Top(int size) : size_(size) { items_.reserve(size + 1); }
  float threshold() const { return static_cast<int>(items_.size()) < size_ ? kMinusInfinity : items_.back().score; }
  void add(Candidate candidate) {
    if (static_cast<int>(items_.size()) == size_ && !better(candidate, items_.back())) return;
    items_.insert(std::upper_bound(items_.begin(), items_.end(), candidate, better), candidate);
    if (static_cast<int>(items_.size()) > size_) items_.pop_back();
  }
  const std::vector<Candidate>& items() const { return items_; }

 private:
  int size_;
  std::vector<Candidate> items_;
};

static void sort_unique(std::vector<int32_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

Rules make_rules(const Options& o, const Lists& lists, const std::vector<int32_t>& tokens) {
  Rules rules;
  const int length = static_cast<int>(tokens.size());
  if (o.forced_bos_token >= 0 && length == 1) rules.forced = o.forced_bos_token;
  if (o.forced_eos_token >= 0 && length == o.max_length - 1) rules.forced = o.forced_eos_token;
  if (rules.forced >= 0) return rules;
  if (o.repetition_penalty != 1.0f) {
    rules.penalized = tokens;
    sort_unique(rules.penalized);
  }
  std::vector<int32_t>& banned = rules.banned;
  banned = lists.suppress;
  if (length == o.begin_suppress_at)
    banned.insert(banned.end(), lists.begin_suppress.begin(), lists.begin_suppress.end());
  const int n = o.no_repeat_ngram_size;
  if (n > 0 && length + 1 >= n)
    for (int i = 0; i + n <= length; ++i)
      if (std::equal(tokens.begin() + i, tokens.begin() + i + n - 1, tokens.end() - (n - 1)))
        banned.push_back(tokens[i + n - 1]);
  for (const auto& word : lists.bad_words) {
    const int before = static_cast<int>(word.size()) - 1;
    if (before <= length && std::equal(word.begin(), word.end() - 1, tokens.end() - before))
      banned.push_back(word.back());
  }
  if (length < o.min_length) banned.insert(banned.end(), lists.eos.begin(), lists.eos.end());
  sort_unique(banned);
  return rules;
}

static float penalize(float score, float penalty) { return score < 0 ? score * penalty : score / penalty; }

std::vector<std::vector<Candidate>> Head::best(const std::vector<Rules>& rules, float penalty, bool normalize) {
  const int rows = static_cast<int>(rules.size());
  std::vector<std::vector<Candidate>> found(rows);
  if (std::all_of(rules.begin(), rules.end(), [](const Rules& r) { return r.forced >= 0; })) {
    for (int i = 0; i < rows; ++i) found[i] = {{0.0f, rules[i].forced}};
    return found;
  }
  const int panels = passes_.head_panels(), vocabulary = passes_.model.config.vocabulary;
  const int tasks = std::min((panels + kChunk - 1) / kChunk, 3 * passes_.pool.threads());
  struct Part {
    float peak = kMinusInfinity;
    double sum = 0;
    std::vector<Candidate> best, penalized;
  };
  std::vector<Part> parts(static_cast<size_t>(tasks) * rows);
  passes_.pool.run(tasks, [&](int task) {
    const int first = static_cast<int64_t>(panels) * task / tasks,
              last = static_cast<int64_t>(panels) * (task + 1) / tasks;
    Buffer<float> buffer;
    constexpr int width = kChunk * kColumns;
    float* logits = buffer.reserve(static_cast<size_t>(rows) * width);
    std::vector<Top> tops(rows, Top(keep_));
    for (int panel = first; panel < last; panel += kChunk) {
      const int stop = std::min(last, panel + kChunk), base = panel * kColumns;
      const int count = std::min(stop * kColumns, vocabulary) - base;
      passes_.head(panel, stop, logits, width);
      for (int row = 0; row < rows; ++row) {
        if (rules[row].forced >= 0) continue;
        Part& part = parts[static_cast<size_t>(task) * rows + row];
        Top& top = tops[row];
        float* x = logits + static_cast<int64_t>(row) * width;
        const float peak = passes_.model.kernels.largest(x, count);
        if (normalize) {
          if (peak > part.peak) {
            part.sum *= std::exp(static_cast<double>(part.peak) - peak);
            part.peak = peak;
          }
          part.sum += passes_.model.kernels.exp_sum(x, count, part.peak);
        }
        const auto each = [&](const std::vector<int32_t>& tokens, auto&& act) {
          for (auto it = std::lower_bound(tokens.begin(), tokens.end(), base); it != tokens.end() && *it < base + count;
               ++it)
            act(*it);
        };
        each(rules[row].penalized, [&](int32_t token) {
          if (!std::binary_search(rules[row].banned.begin(), rules[row].banned.end(), token))
            part.penalized.push_back({x[token - base], token});
          x[token - base] = kMinusInfinity;
        });
        each(rules[row].banned, [&](int32_t token) { x[token - base] = kMinusInfinity; });
        float threshold = top.threshold();
        if (peak < threshold) continue;
        for (int i = 0; i < count; i += kColumns) {  // mostly nothing: look at 16 at a time
          const int to = std::min(count, i + kColumns);
          float most = x[i];
          for (int j = i + 1; j < to; ++j) most = x[j] > most ? x[j] : most;
          if (most == kMinusInfinity || most < threshold) continue;
          for (int j = i; j < to; ++j)
            if (x[j] > kMinusInfinity && x[j] >= threshold) {
              top.add({x[j], base + j});
              threshold = top.threshold();
            }
        }
      }
    }
    for (int row = 0; row < rows; ++row) parts[static_cast<size_t>(task) * rows + row].best = tops[row].items();
  });
  for (int row = 0; row < rows; ++row) {
    if (rules[row].forced >= 0) {
      found[row] = {{0.0f, rules[row].forced}};
      continue;
    }
    float peak = kMinusInfinity;
    double sum = 0;
    for (int task = 0; task < tasks; ++task) peak = std::max(peak, parts[static_cast<size_t>(task) * rows + row].peak);
    if (normalize)
      for (int task = 0; task < tasks; ++task) {
        const Part& part = parts[static_cast<size_t>(task) * rows + row];
        sum += part.sum * std::exp(static_cast<double>(part.peak) - peak);
      }
    const float log_sum = static_cast<float>(std::log(sum));
    const auto score = [&](float logit) { return normalize ? logit - peak - log_sum : logit; };
    Top top(keep_);
    for (int task = 0; task < tasks; ++task) {
      const Part& part = parts[static_cast<size_t>(task) * rows + row];
      for (const Candidate& c : part.best) top.add({score(c.score), c.token});
      for (const Candidate& c : part.penalized) top.add({penalize(score(c.score), penalty), c.token});
    }
    found[row] = top.items();
  }
  return found;
}

void Head::scores(const std::vector<Rules>& rules, float penalty, std::vector<float>& out) {
  const int rows = static_cast<int>(rules.size()), panels = passes_.head_panels();
  const int vocabulary = passes_.model.config.vocabulary;
  out.resize(static_cast<size_t>(rows) * vocabulary);
  const int tasks = std::min((panels + kChunk - 1) / kChunk, 3 * passes_.pool.threads());
  passes_.pool.run(tasks, [&](int task) {
    passes_.head(static_cast<int64_t>(panels) * task / tasks, static_cast<int64_t>(panels) * (task + 1) / tasks,
                 out.data() + static_cast<int64_t>(panels) * task / tasks * kColumns, vocabulary);
  });
  for (int row = 0; row < rows; ++row) {
    float* x = out.data() + static_cast<int64_t>(row) * vocabulary;
    for (int32_t token : rules[row].penalized) x[token] = penalize(x[token], penalty);
    for (int32_t token : rules[row].banned) x[token] = kMinusInfinity;
    if (rules[row].forced >= 0) {
      std::fill(x, x + vocabulary, kMinusInfinity);
      x[rules[row].forced] = 0;
    }
  }
}

// SplitMix64: one stream per sequence, so that a sample does not depend on its batch.
static double uniform(uint64_t& state) {
  uint64_t z = state += 0x9e3779b97f4a7c15ull;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ z >> 27) * 0x94d049bb133111ebull;
  return static_cast<double>((z ^ z >> 31) >> 11) * 0x1.0p-53;
}

int32_t sample(const float* x, int n, const Options& o, uint64_t& state) {
  std::vector<Candidate> kept;
  for (int i = 0; i < n; ++i)
    if (x[i] > kMinusInfinity) kept.push_back({x[i] / o.temperature, i});
  if (kept.empty()) throw std::invalid_argument("every token is suppressed: nothing is left to sample");
  const bool cut_k = o.top_k > 0 && o.top_k < static_cast<int>(kept.size());
  if (cut_k) {
    std::nth_element(kept.begin(), kept.begin() + (o.top_k - 1), kept.end(), better);
    const float least = kept[o.top_k - 1].score;  // ties stay, as in transformers
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return c.score < least; }),
               kept.end());
  }
  std::sort(kept.begin(), kept.end(), better);
  const float peak = kept.front().score;
  std::vector<double> weight(kept.size());
  double total = 0;
  for (size_t i = 0; i < kept.size(); ++i) total += weight[i] = std::exp(static_cast<double>(kept[i].score) - peak);
  size_t count = kept.size();
  if (o.top_p < 1.0f) {
    double mass = 0;
    size_t i = 0;
    do mass += weight[i++];
    while (i < count && mass < o.top_p * total);
    count = i;
    total = mass;
  }
  double left = uniform(state) * total;
  for (size_t i = 0; i + 1 < count; ++i)
    if ((left -= weight[i]) < 0) return kept[i].token;
  return kept[count - 1].token;
}

}  // namespace dq
