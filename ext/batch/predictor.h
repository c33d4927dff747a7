// How long a batch of b rows will take: learned from the runs of one shape of one version. A pure value: observations
// with their time in, a Prediction out. No clock, no lock; it allocates when it is made and never after.
//
// Per size (1, 2, 4 .. largest batch) it keeps a moving average (l50) and the 99th percentile of the last 100 runs
// (l99). A run between two sizes counts for the upper one, scaled along the present curve. Sizes that have not been
// seen are assumed to be as fast as the seen ones allow: so they are tried, and then known. Knee, cap and beta are
// refitted once a second, and say nothing before the prediction is trusted.
//
// Two things keep one bad stretch (a page fault, a neighbour) from being believed for ever: a size that does not run
// while others do forgets the older half of its tail every second, and a probe (policy.h) that takes less than half the
// predicted time starts the whole curve anew.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

#include "batch/policy.h"

namespace tidegate {

class Predictor {
 public:
  // slo_ns: 99 of 100 answers should be ready within it, queue and run, which is about twice a run; 0: no such target
  // and the cap is max_rows.
  Predictor(uint32_t max_rows, int64_t slo_ns)
      : max_rows_(std::max<uint32_t>(max_rows, 1)), slo_ns_(slo_ns), prediction_(UnknownPrediction(max_rows_)) {
    cells_.resize(static_cast<size_t>(prediction_.n));
    cap_limit_ = max_rows_;
  }

  const Prediction& prediction() const { return prediction_; }
  uint64_t runs() const { return runs_; }
  // Times the cap gave way to a model that does not keep its predictions.
  uint64_t cap_cuts() const { return cap_cuts_; }
  // 0 where nothing was measured, unlike the prediction.
  int64_t MeasuredL50(int size) const { return Measured(size) ? prediction_.l50_ns[static_cast<size_t>(size)] : 0; }
  int64_t MeasuredL99(int size) const { return Measured(size) ? prediction_.l99_ns[static_cast<size_t>(size)] : 0; }

  // A batch of `rows` took run_ns and ended at now_ns. `probe`: it ran against the prediction.
  void Observe(uint32_t rows, int64_t run_ns, bool probe, int64_t now_ns) {
    rows = std::clamp<uint32_t>(rows, 1, max_rows_);
    run_ns = std::max<int64_t>(run_ns, 1);
    const int64_t expected_ns = prediction_.L50(rows);
    if (probe && run_ns < prediction_.L99(rows) / 2) Forget();
    const auto i = static_cast<size_t>(std::min(static_cast<int>(std::bit_width(rows - 1)), prediction_.n - 1));
    cells_[i].Add(ScaledTo(i, rows, run_ns));
    Judge(expected_ns, run_ns);
    ++runs_;
    Fill();
    if (runs_ < kTrustedRuns) return;
    // Often at first, when each run still says much.
    if (runs_ < next_fit_runs_ && now_ns - refit_ns_ < kRefitNs) return;
    if (runs_ >= next_fit_runs_) next_fit_runs_ = 2 * runs_;
    if (now_ns - refit_ns_ >= kRefitNs) Fade(now_ns);
    Fit();
    prediction_.trusted = true;
  }

  // As new, for another shape; keeps its memory.
  void Reset() {
    Forget();
    runs_ = 0;
    refit_ns_ = 0;
    faded_runs_ = 0;
    next_fit_runs_ = kTrustedRuns;
    cap_limit_ = max_rows_;
    judged_ = 0;
    wrong_ = 0;
    misses_.fill(false);
    prediction_ = UnknownPrediction(max_rows_);
  }

 private:
  static constexpr uint32_t kTail = 100;  // runs that the p99 looks back on
  // Half of them, so that a lone stall is not taken for the p99 once the older half is forgotten.
  static constexpr uint32_t kTwoLargest = kTail / 2;
  static constexpr int64_t kRefitNs = 1'000'000'000;
  static constexpr uint64_t kFadingRuns = 16;

  // The runs of one size.
  struct Cell {
    uint32_t n = 0;     // in the tail
    uint32_t next = 0;  // where the next one goes
    uint32_t average_n = 0;
    bool ran = false;  // since the last refit
    int64_t average_ns = 0;
    // The two largest of the tail: from kTwoLargest runs on the second is the p99, of fewer the first.
    int64_t first_ns = 0;
    int64_t second_ns = 0;
    std::array<int64_t, kTail> tail{};

    void Add(int64_t ns) {
      const int64_t evicted = n == kTail ? tail[next] : 0;
      tail[next] = ns;
      next = (next + 1) % kTail;
      if (n < kTail) ++n;
      if (evicted >= second_ns && evicted > 0) {
        Rank();
      } else {
        Offer(ns);
      }
      // A stall of a thousand times the usual is no news about the usual: it counts as four times.
      const int64_t tame = average_n >= 8 ? std::min(ns, SaturatingMul(4, average_ns)) : ns;
      average_n = std::min<uint32_t>(average_n + 1, 16);
      average_ns += (tame - average_ns) / static_cast<int64_t>(average_n);
      ran = true;
    }
    int64_t P99() const { return std::max(n >= kTwoLargest ? second_ns : first_ns, average_ns); }
    void ForgetOlderHalf() {
      // Kept: the newer n / 2. A single run is forgotten too, and with it the size.
      const uint32_t keep = n / 2;
      std::array<int64_t, kTail> newer{};
      for (uint32_t i = 0; i < keep; ++i) newer[i] = tail[(next + kTail - keep + i) % kTail];
      tail = newer;
      n = keep;
      next = keep % kTail;
      if (n == 0) average_n = 0;
      Rank();
    }

   private:
    void Offer(int64_t ns) {
      if (ns > first_ns) {
        second_ns = first_ns;
        first_ns = ns;
      } else if (ns > second_ns) {
        second_ns = ns;
      }
    }
    void Rank() {
      first_ns = second_ns = 0;
      for (uint32_t i = 0; i < n; ++i) Offer(tail[i]);
    }
  };

  bool Measured(int size) const { return cells_[static_cast<size_t>(size)].n > 0; }

  void Forget() {
    for (Cell& cell : cells_) cell = Cell();
    prediction_.beta_ns = 0;
  }

  // What a run of `rows` says about size i, the next one above it.
  int64_t ScaledTo(size_t i, uint32_t rows, int64_t run_ns) const {
    const uint32_t size = prediction_.sizes[i];
    if (rows == size) return run_ns;
    const auto run = static_cast<double>(run_ns);
    double scale = 1;
    if (cells_[i].n > 0) {
      scale =
          static_cast<double>(prediction_.l50_ns[i]) / static_cast<double>(std::max<int64_t>(prediction_.L50(rows), 1));
    } else {
      // Along the line from the next measured size below, if there is one.
      for (size_t below = i; below-- > 0;) {
        if (cells_[below].n == 0) continue;
        const double slope = (run - static_cast<double>(prediction_.l50_ns[below])) / (rows - prediction_.sizes[below]);
        scale = 1 + slope * (size - rows) / run;
        break;
      }
    }
    // More rows take no less time, and at most in proportion.
    return static_cast<int64_t>(run * std::clamp(scale, 1.0, static_cast<double>(size) / rows));
  }

  // Counts runs that were off by more than a quarter, among the last 100.
  void Judge(int64_t expected_ns, int64_t run_ns) {
    if (expected_ns <= 0 || runs_ < kTrustedRuns) return;
    const int64_t off_ns = expected_ns > run_ns ? expected_ns - run_ns : run_ns - expected_ns;
    bool& slot = misses_[judged_ % kTail];
    wrong_ -= slot;
    slot = off_ns > run_ns / 4;
    wrong_ += slot;
    ++judged_;
  }

  // Measured sizes as measured, the others from their measured neighbours.
  void Fill() {
    FillFrom([](const Cell& cell) { return cell.average_ns; }, &prediction_.l50_ns);
    FillFrom([](const Cell& cell) { return cell.P99(); }, &prediction_.l99_ns);
    for (size_t i = cells_.size(); i-- > 0;) {
      // More rows take no less time: where a larger size is known to be quicker, a stall stood for too much.
      if (i + 1 < cells_.size()) {
        prediction_.l50_ns[i] = std::min(prediction_.l50_ns[i], prediction_.l50_ns[i + 1]);
        prediction_.l99_ns[i] = std::min(prediction_.l99_ns[i], prediction_.l99_ns[i + 1]);
      }
      // Drawn on beyond the measured sizes, the two curves may cross.
      prediction_.l99_ns[i] = std::max(prediction_.l99_ns[i], prediction_.l50_ns[i]);
    }
  }

  template <typename Value>
  void FillFrom(Value value, std::array<int64_t, kMaxSizes>* times) const {
    int below = -1;         // the last measured size so far
    int before_below = -1;  // the one before it
    for (int i = 0; i < prediction_.n; ++i) {
      const auto u = static_cast<size_t>(i);
      if (cells_[u].n == 0) continue;
      (*times)[u] = value(cells_[u]);
      for (int gap = below + 1; gap < i; ++gap) {
        const double share = static_cast<double>(Size(gap)) / Size(i);
        if (below < 0) {
          // Between the fixed part, as far as it was ever known, and the measured size.
          const auto beta = static_cast<double>(std::min(prediction_.beta_ns, (*times)[u]));
          (*times)[static_cast<size_t>(gap)] =
              static_cast<int64_t>(beta + (static_cast<double>((*times)[u]) - beta) * share);
        } else {
          (*times)[static_cast<size_t>(gap)] = Line(*times, below, i, gap);
        }
      }
      before_below = below;
      below = i;
    }
    for (int gap = below + 1; gap < prediction_.n && below >= 0; ++gap) {
      const int64_t last_ns = (*times)[static_cast<size_t>(below)];
      (*times)[static_cast<size_t>(gap)] =
          before_below < 0 ? last_ns : std::max(last_ns, Line(*times, before_below, below, gap));
    }
  }

  double Size(int i) const { return static_cast<double>(prediction_.sizes[static_cast<size_t>(i)]); }

  int64_t Line(const std::array<int64_t, kMaxSizes>& times, int a, int b, int at) const {
    const auto from = static_cast<double>(times[static_cast<size_t>(a)]);
    const auto to = static_cast<double>(times[static_cast<size_t>(b)]);
    return static_cast<int64_t>(from + (to - from) * (Size(at) - Size(a)) / (Size(b) - Size(a)));
  }

  void Fade(int64_t now_ns) {
    refit_ns_ = now_ns;
    LimitCap();
    // Little traffic is no reason to forget: what is known of other sizes fades only while there is much to learn from.
    if (runs_ - faded_runs_ < kFadingRuns) return;
    for (Cell& cell : cells_) {
      if (!cell.ran && cell.n > 0) cell.ForgetOlderHalf();
      cell.ran = false;
    }
    faded_runs_ = runs_;
    Fill();
  }

  void Fit() {
    prediction_.beta_ns = FitBeta();
    prediction_.knee = FitKnee();
    prediction_.cap = slo_ns_ > 0 ? std::min(cap_limit_, FitCap()) : max_rows_;
    prediction_.knee = std::min(prediction_.knee, prediction_.cap);
  }

  // Least squares of l50 = beta + alpha * rows over the measured sizes; as before where they are too few to tell.
  int64_t FitBeta() const {
    double n = 0, sx = 0, sy = 0, sxx = 0, sxy = 0;
    for (int i = 0; i < prediction_.n; ++i) {
      if (!Measured(i)) continue;
      const double x = Size(i);
      const auto y = static_cast<double>(prediction_.l50_ns[static_cast<size_t>(i)]);
      // Relative errors count, so that the large batches do not drown the small ones where beta shows.
      const double w = 1.0 / (y * y);
      n += w, sx += w * x, sy += w * y, sxx += w * x * x, sxy += w * x * y;
    }
    const double determinant = n * sxx - sx * sx;
    if (determinant <= 1e-9 * n * sxx) return prediction_.beta_ns;
    const double alpha = std::max(0.0, (n * sxy - sx * sy) / determinant);
    return std::max<int64_t>(0, static_cast<int64_t>((sy - alpha * sx) / n));
  }

  // Between two sizes rows / l50 rises or falls throughout, so its maximum is at a size.
  uint32_t FitKnee() const {
    double best = 0;
    for (int i = 0; i < prediction_.n; ++i) best = std::max(best, Size(i) / Time(i));
    const auto good = [&](uint32_t rows) {
      return static_cast<double>(rows) / static_cast<double>(std::max<int64_t>(prediction_.L50(rows), 1)) >= 0.9 * best;
    };
    int i = 0;
    while (i + 1 < prediction_.n && !good(prediction_.sizes[static_cast<size_t>(i)])) ++i;
    if (i == 0) return 1;
    uint32_t bad_rows = prediction_.sizes[static_cast<size_t>(i - 1)];
    uint32_t good_rows = prediction_.sizes[static_cast<size_t>(i)];
    while (bad_rows + 1 < good_rows) {
      const uint32_t middle = bad_rows + (good_rows - bad_rows) / 2;
      (good(middle) ? good_rows : bad_rows) = middle;
    }
    return good_rows;
  }

  double Time(int i) const {
    return static_cast<double>(std::max<int64_t>(prediction_.l50_ns[static_cast<size_t>(i)], 1));
  }

  // The most rows with 2 * l99 <= slo: a request that just missed a batch waits for one run and then has its own. Where
  // not even one row keeps that, smaller batches would not help against the tail, and the typical run decides.
  uint32_t FitCap() const {
    const bool by_tail = SaturatingMul(2, prediction_.L99(1)) <= slo_ns_;
    const auto keeps = [&](uint32_t rows) {
      return SaturatingMul(2, by_tail ? prediction_.L99(rows) : prediction_.L50(rows)) <= slo_ns_;
    };
    for (int i = prediction_.n - 1; i >= 0; --i) {
      uint32_t rows = prediction_.sizes[static_cast<size_t>(i)];
      if (!keeps(rows)) continue;
      uint32_t beyond = i + 1 < prediction_.n ? prediction_.sizes[static_cast<size_t>(i + 1)] : rows + 1;
      while (rows + 1 < beyond) {
        const uint32_t middle = rows + (beyond - rows) / 2;
        (keeps(middle) ? rows : beyond) = middle;
      }
      return rows;
    }
    return 1;
  }

  // The safety net under the SLO: when more than one run in a hundred is off by over a quarter, l99 is not to be relied
  // on and the cap gives way by a tenth; it comes back step by step once the predictions hold.
  void LimitCap() {
    if (slo_ns_ <= 0 || judged_ < kTail) return;
    if (wrong_ > 1) {
      const uint32_t cut = std::max<uint32_t>(prediction_.knee, cap_limit_ - std::max<uint32_t>(cap_limit_ / 10, 1));
      if (cut < cap_limit_) {
        cap_limit_ = cut;
        ++cap_cuts_;
      }
    } else {
      cap_limit_ = std::min(max_rows_, cap_limit_ + std::max<uint32_t>(max_rows_ / 16, 1));
    }
  }

  uint32_t max_rows_;
  int64_t slo_ns_;
  Prediction prediction_;
  std::vector<Cell> cells_;
  uint64_t runs_ = 0;
  int64_t refit_ns_ = 0;
  uint64_t faded_runs_ = 0;
  uint64_t next_fit_runs_ = kTrustedRuns;
  uint32_t cap_limit_ = 1;
  uint64_t cap_cuts_ = 0;
  std::array<bool, kTail> misses_{};
  uint64_t judged_ = 0;
  uint32_t wrong_ = 0;
};

}  // namespace tidegate
