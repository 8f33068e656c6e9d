#include "generate.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>

namespace dq {

constexpr float kNone_ = -std::numeric_limits<float>::infinity();
constexpr float kVeryLow = -1.0e9f;  // transformers' score of what must not be chosen
constexpr int kChunk = 32;           // panels of the vocabulary at a time: the logits stay in the first caches

struct Candidate {
  float score;
  int32_t token;
};

// Best first; equal scores: the lower token, as an argmax over the row would.
static bool better(const Candidate& a, const Candidate& b) {
  return a.score > b.score || (a.score == b.score && a.token < b.token);
}

class Top {
 public:
  explicit Top(int size) : size_(size) { items_.reserve(size + 1); }
  float threshold() const { return static_cast<int>(items_.size()) < size_ ? kNone_ : items_.back().score; }
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

// What the processors do to one row of scores at one step.
struct Rules {
  int32_t forced = -1;             // only this token, with score 0
  std::vector<int32_t> banned;     // sorted
  std::vector<int32_t> penalized;  // sorted; repetition penalty
};

static void sort_unique(std::vector<int32_t>& values) {
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
}

static Rules make_rules(const Options& o, const Lists& lists, const std::vector<int32_t>& tokens) {
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
  if (length < o.min_length || length - 1 < o.min_new_tokens)
    banned.insert(banned.end(), lists.eos.begin(), lists.eos.end());
  sort_unique(banned);
  return rules;
}

// The best candidates of every row. `normalize`: log-probabilities instead of logits.
class Head {
 public:
  Head(Passes& passes, int keep) : passes_(passes), keep_(keep) {}

  std::vector<std::vector<Candidate>> best(const std::vector<Rules>& rules, float penalty, bool normalize);
  // All logits of all rows, after the rules: what sampling needs.
  void scores(const std::vector<Rules>& rules, float penalty, std::vector<float>& out);

 private:
  static float penalize(float score, float penalty) { return score < 0 ? score * penalty : score / penalty; }

  Passes& passes_;
  const int keep_;
};

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
    float peak = kNone_;
    double sum = 0;
    std::vector<Candidate> best, penalized;
  };
  std::vector<Part> parts(static_cast<size_t>(tasks) * rows);
  passes_.pool.run(tasks, [&](int task) {
    const int first = static_cast<int64_t>(panels) * task / tasks, last = static_cast<int64_t>(panels) * (task + 1) / tasks;
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
        float peak = x[0];
        for (int i = 1; i < count; ++i) peak = x[i] > peak ? x[i] : peak;
        if (normalize) {
          if (peak > part.peak) {
            part.sum *= std::exp(static_cast<double>(part.peak) - peak);
            part.peak = peak;
          }
          part.sum += passes_.model.kernels.exp_sum(x, count, part.peak);
        }
        const auto each = [&](const std::vector<int32_t>& tokens, auto&& act) {
          for (auto it = std::lower_bound(tokens.begin(), tokens.end(), base); it != tokens.end() && *it < base + count; ++it)
            act(*it);
        };
        each(rules[row].penalized, [&](int32_t token) {
          if (!std::binary_search(rules[row].banned.begin(), rules[row].banned.end(), token))
            part.penalized.push_back({x[token - base], token});
          x[token - base] = kNone_;
        });
        each(rules[row].banned, [&](int32_t token) { x[token - base] = kNone_; });
        float threshold = top.threshold();
        if (peak < threshold) continue;
        for (int i = 0; i < count; i += kColumns) {  // mostly nothing: look at 16 at a time
          const int to = std::min(count, i + kColumns);
          float most = x[i];
          for (int j = i + 1; j < to; ++j) most = x[j] > most ? x[j] : most;
          if (most == kNone_ || most < threshold) continue;
          for (int j = i; j < to; ++j)
            if (x[j] > kNone_ && x[j] >= threshold) {
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
    float peak = kNone_;
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
    for (int32_t token : rules[row].banned) x[token] = kNone_;
    if (rules[row].forced >= 0) {
      std::fill(x, x + vocabulary, kNone_);
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

// One token from softmax(x / temperature) cut to the top_k largest, then to the smallest set that holds top_p.
static int32_t sample(const float* x, int n, const Options& o, uint64_t& state) {
  std::vector<Candidate> kept;
  for (int i = 0; i < n; ++i)
    if (x[i] > kNone_) kept.push_back({x[i] / o.temperature, i});
  const bool cut_k = o.top_k > 0 && o.top_k < static_cast<int>(kept.size());
  if (cut_k) {
    std::nth_element(kept.begin(), kept.begin() + (o.top_k - 1), kept.end(), better);
    const float least = kept[o.top_k - 1].score;  // ties stay, as in transformers
    kept.erase(std::remove_if(kept.begin(), kept.end(), [&](const Candidate& c) { return c.score < least; }), kept.end());
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
    do mass += weight[i++]; while (i < count && mass < o.top_p * total);
    count = i;
    total = mass;
  }
  double left = uniform(state) * total;
  for (size_t i = 0; i + 1 < count; ++i)
    if ((left -= weight[i]) < 0) return kept[i].token;
  return kept[count - 1].token;
}

static bool is_in(const std::vector<int32_t>& values, int32_t x) {
  return std::find(values.begin(), values.end(), x) != values.end();
}

struct Sequence {
  std::vector<int32_t> tokens, places;
  float score = 0;
};

static bool generate_single(Passes& passes, const Options& o, const Lists& lists, const std::vector<Source>& sources,
                            OnToken on_token, std::vector<Output>& outputs) {
  const int copies = o.num_return_sequences, total = static_cast<int>(sources.size()) * copies;
  const int vocabulary = passes.model.config.vocabulary;
  std::vector<Sequence> sequences(total);
  std::vector<uint64_t> random(total);
  std::vector<int> active(total);
  std::iota(active.begin(), active.end(), 0);
  for (int i = 0; i < total; ++i) {
    sequences[i].tokens = {o.start_token};
    random[i] = o.seed + 0xd1342543de82ef95ull * (i + 1);
  }
  Head head(passes, 1);
  std::vector<float> scores;
  passes.start_decoding(total, o.max_length);
  bool wanted = true;
  for (int t = 0; wanted && !active.empty() && t + 1 < o.max_length; ++t) {
    std::vector<Row> rows;
    std::vector<std::vector<int32_t>> history;
    std::vector<Rules> rules;
    for (size_t i = 0; i < active.size(); ++i) {
      Sequence& s = sequences[active[i]];
      s.places.push_back(t * total + static_cast<int>(i));
      rows.push_back({active[i] / copies, s.tokens.back()});
      history.push_back(s.places);
      rules.push_back(make_rules(o, lists, s.tokens));
    }
    passes.decode(rows, t, history, sources);
    std::vector<int32_t> chosen(active.size());
    if (o.do_sample) {
      head.scores(rules, o.repetition_penalty, scores);
      for (size_t i = 0; i < active.size(); ++i)
        chosen[i] = sample(scores.data() + i * vocabulary, vocabulary, o, random[active[i]]);
    } else {
      const auto best = head.best(rules, o.repetition_penalty, false);
      for (size_t i = 0; i < active.size(); ++i) chosen[i] = best[i].empty() ? 0 : best[i].front().token;
    }
    std::vector<int> next;
    for (size_t i = 0; i < active.size(); ++i) {
      sequences[active[i]].tokens.push_back(chosen[i]);
      if (on_token && on_token(active[i], chosen[i])) wanted = false;
      if (!is_in(lists.eos, chosen[i])) next.push_back(active[i]);
    }
    active = next;
  }
  for (Sequence& s : sequences) outputs.push_back({std::move(s.tokens), 0.0f});
  return wanted;
}

// transformers' vectorised beam search, for one source.
class Beams {
 public:
  Beams(const Options& options, const Lists& lists) : o_(options), lists_(lists) {
    running_.resize(1);  // the others would start at -1e9 and lose to every continuation of the first
    running_[0].tokens = {o_.start_token};
    finished_.assign(o_.num_beams, {{}, {}, kVeryLow});
    is_finished_.assign(o_.num_beams, false);
  }

  static int keep(const Options& o, const Lists& lists) {
    return std::max<int>(2, 1 + static_cast<int>(lists.eos.size())) * o.num_beams;
  }
  bool done() const { return done_; }
  std::vector<Sequence>& running() { return running_; }

  // best[i]: candidates of running()[i], log-probabilities after the rules.
  void advance(const std::vector<Candidate>* best) {
    struct Choice {
      float score;
      int beam;
      int32_t token;
      bool stops;
    };
    std::vector<Choice> choices;
    const int length = static_cast<int>(running_[0].tokens.size());  // before this token
    for (size_t b = 0; b < running_.size(); ++b)
      for (const Candidate& c : best[b])
        choices.push_back({c.score + running_[b].score, static_cast<int>(b), c.token,
                           length + 1 >= o_.max_length || is_in(lists_.eos, c.token)});
    std::stable_sort(choices.begin(), choices.end(), [](const Choice& a, const Choice& b) { return a.score > b.score; });
    if (static_cast<int>(choices.size()) > keep(o_, lists_)) choices.resize(keep(o_, lists_));

    const bool full = o_.early_stopping == kWhenFull && all_finished();
    const float divisor = static_cast<float>(std::pow(static_cast<double>(length), static_cast<double>(o_.length_penalty)));
    for (size_t i = 0; i < choices.size() && static_cast<int>(i) < o_.num_beams; ++i) {
      const Choice& c = choices[i];
      if (!c.stops || full || !improvable_) continue;
      const float score = c.score / divisor;
      // Into the best num_beams, behind equals.
      size_t place = 0;
      while (place < finished_.size() && finished_[place].score >= score) ++place;
      if (place == finished_.size()) continue;
      Sequence sequence = running_[c.beam];
      sequence.tokens.push_back(c.token);
      sequence.score = score;
      finished_.insert(finished_.begin() + place, std::move(sequence));
      is_finished_.insert(is_finished_.begin() + place, true);
      finished_.pop_back();
      is_finished_.pop_back();
    }

    std::vector<Sequence> next;
    bool all_stop = true;
    for (const Choice& c : choices) {
      all_stop &= c.stops;
      if (c.stops || static_cast<int>(next.size()) == o_.num_beams) continue;
      Sequence sequence = running_[c.beam];
      sequence.tokens.push_back(c.token);
      sequence.score = c.score;
      next.push_back(std::move(sequence));
    }
    running_ = std::move(next);
    if (all_stop || running_.empty()) {
      done_ = true;
      return;
    }
    const int made = o_.early_stopping == kNever && o_.length_penalty > 0 ? o_.max_length - 1 : length;
    const float possible = running_[0].score / static_cast<float>(std::pow(static_cast<double>(made), static_cast<double>(o_.length_penalty)));
    const float worst = finished_.back().score;
    bool any = false;  // torch.where per beam: an unfinished one counts as -1e9
    for (bool finished : is_finished_) any |= possible > (finished ? worst : kVeryLow);
    improvable_ = improvable_ && any;
    done_ = !improvable_ || (o_.early_stopping == kWhenFull && all_finished());
  }

  void take(std::vector<Output>& outputs) {
    for (int i = 0; i < o_.num_return_sequences; ++i) {
      if (finished_[i].tokens.empty()) finished_[i].tokens = {o_.start_token};
      outputs.push_back({std::move(finished_[i].tokens), finished_[i].score});
    }
  }

 private:
  bool all_finished() const { return std::all_of(is_finished_.begin(), is_finished_.end(), [](bool f) { return f; }); }

  const Options& o_;
  const Lists& lists_;
  std::vector<Sequence> running_, finished_;
  std::vector<bool> is_finished_;
  bool improvable_ = true, done_ = false;
};

static void generate_beams(Passes& passes, const Options& o, const Lists& lists, const std::vector<Source>& sources,
                           std::vector<Output>& outputs) {
  const int items = static_cast<int>(sources.size()), total = items * o.num_beams;
  std::vector<Beams> beams(items, Beams(o, lists));
  Head head(passes, Beams::keep(o, lists));
  passes.start_decoding(total, o.max_length);
  for (int t = 0; t + 1 < o.max_length; ++t) {
    std::vector<Row> rows;
    std::vector<std::vector<int32_t>> history;
    std::vector<Rules> rules;
    std::vector<int> active;
    for (int i = 0; i < items; ++i) {
      if (beams[i].done()) continue;
      active.push_back(i);
      for (Sequence& s : beams[i].running()) {
        s.places.push_back(t * total + static_cast<int>(rows.size()));
        rows.push_back({i, s.tokens.back()});
        history.push_back(s.places);
        rules.push_back(make_rules(o, lists, s.tokens));
      }
    }
    if (active.empty()) break;
    passes.decode(rows, t, history, sources);
    const auto best = head.best(rules, o.repetition_penalty, true);
    size_t row = 0;
    for (int i : active) {
      const size_t count = beams[i].running().size();
      beams[i].advance(best.data() + row);
      row += count;
    }
  }
  for (Beams& b : beams) b.take(outputs);
}

bool generate(Passes& passes, const Options& options, const Lists& lists, const std::vector<Source>& sources,
              OnToken on_token, std::vector<Output>& outputs) {
  outputs.clear();
  if (options.num_beams == 1) return generate_single(passes, options, lists, sources, on_token, outputs);
  generate_beams(passes, options, lists, sources, outputs);
  return true;
}

}  // namespace dq
