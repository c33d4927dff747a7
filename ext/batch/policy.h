// When and with whom a batch starts: pure arithmetic on a view of the queue and `now`. No clock, no lock, no memory.
//
// Strategy: work-conserving. A free instance takes what is there, up to the cap. Near a deadline the batch shrinks, but
// not below the knee of the throughput curve: from there on it is cheaper to fail one request than to run everybody in
// small, inefficient batches (the drop rule that decides goodput above saturation). Holding a batch open for company
// happens only where an operator asked for it (max_queue_delay_microseconds).
//
// While others are being refused for lack of time or room, every row that a batch could have had and has not is lost
// for good, and whoever is dropped makes room for one who would have been refused: then a batch does not shrink at all.
//
// What counts as in time: a request that has half of its time left is given the typical run time, later it must be safe
// by the 99th percentile. The tail alone would be a trap: on a busy machine one run in fifty may be stalled past any
// deadline, and a rule that knows only the tail would then refuse the 49 that can be served.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <span>

#include "util/clock.h"

namespace tidegate {

// What the wire takes after a run: encoding, the hand-over to the I/O thread, the kernel.
inline constexpr int64_t kSlackNs = 50'000;

// Runs of one shape that must have been measured before a prediction may refuse or drop anything.
inline constexpr uint32_t kTrustedRuns = 50;

// Far enough from all times that a difference cannot overflow.
inline constexpr int64_t kLongAgo = INT64_MIN / 2;

// Prediction::n is at most this: sizes 1, 2, 4 .. 2^31 and the largest batch.
inline constexpr int kMaxSizes = 33;

constexpr int64_t SaturatingAdd(int64_t a, int64_t b) {
  int64_t sum = 0;
  if (!__builtin_add_overflow(a, b, &sum)) return sum;
  return b > 0 ? kNever : INT64_MIN;
}

constexpr int64_t SaturatingMul(int64_t a, int64_t b) {
  int64_t product = 0;
  if (!__builtin_mul_overflow(a, b, &product)) return product;
  return (a > 0) == (b > 0) ? kNever : INT64_MIN;
}

// Run time by rows, as far as it is known. A plain value; predictor.h makes it.
struct Prediction {
  int n = 0;                                // sizes in use
  std::array<uint32_t, kMaxSizes> sizes{};  // 1, 2, 4 .. largest batch, ascending
  std::array<int64_t, kMaxSizes> l50_ns{};  // typical run time
  std::array<int64_t, kMaxSizes> l99_ns{};  // run time that 99 of 100 runs keep
  int64_t beta_ns = 0;                      // what a run costs before its first row
  uint32_t knee = 1;                        // least rows that reach 0.9 of the best throughput
  uint32_t cap = 1;                         // most rows to put into a batch
  bool trusted = false;                     // kTrustedRuns have been measured

  constexpr int64_t L50(uint32_t rows) const { return At(l50_ns, rows); }
  constexpr int64_t L99(uint32_t rows) const { return At(l99_ns, rows); }

 private:
  // Linear between the sizes; 0 rows take no time.
  constexpr int64_t At(const std::array<int64_t, kMaxSizes>& times, uint32_t rows) const {
    if (rows == 0 || n <= 0) return 0;
    const int hi = std::min(static_cast<int>(std::bit_width(rows - 1)), n - 1);
    const auto h = static_cast<size_t>(hi);
    if (rows >= sizes[h] || hi == 0) return times[h];
    const auto span = static_cast<int64_t>(sizes[h] - sizes[h - 1]);
    return times[h - 1] + (times[h] - times[h - 1]) * static_cast<int64_t>(rows - sizes[h - 1]) / span;
  }
};

// A prediction that knows nothing: sizes up to max_rows, no times, no limits but max_rows.
constexpr Prediction UnknownPrediction(uint32_t max_rows) {
  Prediction unknown;
  for (uint64_t size = 1; size < max_rows; size *= 2) {
    unknown.sizes[static_cast<size_t>(unknown.n++)] = static_cast<uint32_t>(size);
  }
  unknown.sizes[static_cast<size_t>(unknown.n++)] = max_rows;
  unknown.knee = unknown.cap = max_rows;
  return unknown;
}

// ---- order
// ------------------------------------------------------------------------------------------------------------

// A level keeps two lists: what waits in its turn and, behind it, what DELAY has set back. List 2 * level + delayed.
// The rank orders lists, lowest first. Every `aging_ns` in a list lifts a request one level, so that the lowest level
// is served at last however much arrives above it (aging_ns 0: strict order, the lowest may starve).
constexpr uint32_t Rank(uint32_t list, int64_t in_list_since_ns, int64_t aging_ns, int64_t now_ns) {
  if (aging_ns <= 0 || now_ns <= in_list_since_ns) return list;
  const uint64_t lifts = static_cast<uint64_t>(now_ns - in_list_since_ns) / static_cast<uint64_t>(aging_ns);
  return lifts >= list ? 0 : list - std::min<uint32_t>(list, static_cast<uint32_t>(lifts) * 2);
}

// ---- plan
// -------------------------------------------------------------------------------------------------------------

struct PlanLimits {
  int64_t max_delay_ns = 0;     // longest hold for company; 0: never hold
  uint32_t preferred_rows = 0;  // the least preferred batch size; reaching it ends a hold; 0: none
};

struct Candidate {
  uint32_t rows = 0;
  int64_t due_ns = kNever;  // when the answer is too late
  int64_t half_ns = 0;      // when half of its time has passed: from then on the tail of the run time counts
};

struct PlanView {
  // The requests that would share the next batch, in the order of service: none cancelled or expired, all of one shape,
  // together at most the cap (a head larger than the cap stands alone).
  std::span<const Candidate> candidates;
  bool all_waiting = true;  // nothing else waits, so company could only come from outside
  bool draining = false;    // nothing new will come
  int64_t head_arrived_ns = 0;
  int64_t start_by_ns = kNever;        // the first queue timeout among them: a hold ends before it
  int64_t last_start_ns = 0;           // when a batch of this shape last started
  int64_t last_refusal_ns = kLongAgo;  // when one of it was last refused or dropped for lack of time or room
  int64_t expected_gap_ns = kNever;    // to the next arrival
  bool other_work = false;             // somebody else on this node could use the core
};

enum class Action : uint8_t { kIdle, kDrop, kHold, kDispatch };

struct Decision {
  Action action = Action::kIdle;
  uint32_t count = 0;         // kDispatch: how many candidates, from the first
  uint32_t index = 0;         // kDrop: which candidate
  bool probe = false;         // kDispatch: against the prediction, to find out whether it still holds
  int64_t until_ns = kNever;  // kHold: ask again then; always in the future
};

// A prediction that forbids all work can never be proved wrong. So when nothing of a shape has run for this long, its
// head runs whatever the prediction says: at most a tenth of an instance that would otherwise stand still. The same
// time after the last refusal an overload counts as over.
constexpr int64_t PauseNs(int64_t l99_ns) { return std::max<int64_t>(10'000'000, SaturatingMul(10, l99_ns)); }

// The deadlines of some candidates, as far as a batch of them must heed them.
struct Dues {
  int64_t typical_ns = kNever;  // the first of those with half of their time left
  int64_t tail_ns = kNever;     // the first of the others

  constexpr void Add(const Candidate& candidate, int64_t now_ns) {
    int64_t& due_ns = now_ns < candidate.half_ns ? typical_ns : tail_ns;
    due_ns = std::min(due_ns, candidate.due_ns);
  }
  constexpr int64_t First() const { return std::min(typical_ns, tail_ns); }
  // Whether a run of `rows` that starts now ends in time for all of them.
  constexpr bool Allow(const Prediction& prediction, uint32_t rows, int64_t now_ns) const {
    return SaturatingAdd(now_ns, prediction.L50(rows) + kSlackNs) <= typical_ns &&
           SaturatingAdd(now_ns, prediction.L99(rows) + kSlackNs) <= tail_ns;
  }
};

constexpr Dues DuesOf(const Candidate& candidate, int64_t now_ns) {
  Dues dues;
  dues.Add(candidate, now_ns);
  return dues;
}

// Same arguments, same answer. An instance is free. kIdle only without candidates; a kDrop makes the caller fail that
// one request and ask again; a kHold lies in the future and never lets a candidate become late.
constexpr Decision Plan(const PlanLimits& limits, const Prediction& prediction, const PlanView& view, int64_t now_ns) {
  const std::span<const Candidate> all = view.candidates;
  const auto count = static_cast<uint32_t>(all.size());
  if (count == 0) return {};
  uint32_t rows = 0;
  Dues dues;
  for (const Candidate& candidate : all) {
    rows += candidate.rows;
    dues.Add(candidate, now_ns);
  }

  if (prediction.trusted && !dues.Allow(prediction, rows, now_ns)) {
    // The shortest batch that is worth running: up to the knee, in whole requests; all of it in an overload.
    const bool overload = now_ns - view.last_refusal_ns < PauseNs(prediction.L99(prediction.cap));
    const uint32_t worth = overload ? rows : std::min(rows, prediction.knee);
    uint32_t least = 0;
    uint32_t least_rows = 0;
    Dues least_dues;
    while (least < count && (least == 0 || least_rows < worth)) {
      least_rows += all[least].rows;
      least_dues.Add(all[least], now_ns);
      ++least;
    }
    if (!least_dues.Allow(prediction, least_rows, now_ns)) {
      if (now_ns - view.last_start_ns >= PauseNs(prediction.L99(all[0].rows)) &&
          !DuesOf(all[0], now_ns).Allow(prediction, all[0].rows, now_ns)) {
        return {.action = Action::kDispatch, .count = 1, .probe = true};
      }
      uint32_t late = 0;
      while (DuesOf(all[late], now_ns).Allow(prediction, least_rows, now_ns)) ++late;
      return {.action = Action::kDrop, .index = late};
    }
    // It is: and as much of the rest as keeps everybody in time.
    uint32_t taken = least;
    uint32_t run_rows = least_rows;
    for (; taken < count; ++taken) {
      run_rows += all[taken].rows;
      least_dues.Add(all[taken], now_ns);
      if (!least_dues.Allow(prediction, run_rows, now_ns)) break;
    }
    return {.action = Action::kDispatch, .count = taken};
  }

  // Everybody fits in time. Is company worth waiting for?
  const uint32_t full = limits.preferred_rows > 0 ? std::min(limits.preferred_rows, prediction.cap) : prediction.cap;
  if (limits.max_delay_ns > 0 && !view.draining && view.all_waiting && rows < full) {
    // As long as run times are unknown the operator's word counts alone. Once they are known, a hold must pay: below
    // the knee, and either another arrival costs less than the fixed part of a run that it saves, or others use the
    // core.
    const bool pays = !prediction.trusted ||
                      (rows < prediction.knee && (view.other_work || view.expected_gap_ns < prediction.beta_ns));
    int64_t until_ns = std::min(SaturatingAdd(view.head_arrived_ns, limits.max_delay_ns), view.start_by_ns);
    if (dues.First() != kNever) {
      // By the tail for all: while the batch is held, half of their time may pass.
      const int64_t run_ns = std::max(prediction.L99(rows), prediction.L99(rows + 1));
      until_ns = std::min(until_ns, dues.First() - run_ns - kSlackNs);
    }
    if (pays && now_ns < until_ns) return {.action = Action::kHold, .until_ns = until_ns};
  }
  return {.action = Action::kDispatch, .count = count};
}

// The rule at work: knee 2, cap 4, l99 = 100 us + 10 us a row; a head that is too late for a batch of two is dropped.
namespace policy_example {
constexpr Prediction Example() {
  Prediction prediction = UnknownPrediction(4);
  prediction.l50_ns = prediction.l99_ns = {110'000, 120'000, 140'000};
  prediction.knee = 2;
  prediction.trusted = true;
  return prediction;
}
inline constexpr std::array<Candidate, 2> kLateHead = {{{1, 160'000}, {1, 300'000}}};
static_assert(Example().L99(3) == 130'000);
static_assert(Plan({}, Example(), {.candidates = kLateHead}, 0).action == Action::kDrop);
static_assert(Plan({}, Example(), {.candidates = std::span(kLateHead).last(1)}, 0).action == Action::kDispatch);
static_assert(Plan({.max_delay_ns = 9}, UnknownPrediction(4), {.candidates = kLateHead}, 0).until_ns == 9);
}  // namespace policy_example

}  // namespace tidegate
