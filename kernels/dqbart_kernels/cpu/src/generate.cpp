#include "generate.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "scores.h"

namespace dq {

constexpr float kVeryLow = -1.0e9f;  // transformers' score of what must not be chosen

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
    running_.resize(1);  // all beams would say the same
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
    std::stable_sort(choices.begin(), choices.end(),
                     [](const Choice& a, const Choice& b) { return a.score > b.score; });
    if (static_cast<int>(choices.size()) > keep(o_, lists_)) choices.resize(keep(o_, lists_));

    const bool full = o_.early_stopping == kWhenFull && all_finished();
    const float divisor = divisor_of(length);
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
    const float possible = running_[0].score / divisor_of(made);
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
  float divisor_of(int length) const {
    return static_cast<float>(std::pow(static_cast<double>(length), o_.length_penalty));
  }
  bool all_finished() const {
    return std::all_of(is_finished_.begin(), is_finished_.end(), [](bool f) { return f; });
  }

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
