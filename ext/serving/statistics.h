// What the counters of one version add up to when somebody asks.
//
// Threads    Any, at any time until the version's owner lets it go: shards are written by relaxed stores, so a sum is
// of
//            one moment per counter, not one moment for all.
#pragma once

#include <array>
#include <cstdint>
#include <vector>

#include "serving/stats.h"
#include "util/reason.h"

namespace tidegate {

class Version;

struct HistogramTotals {
  template <size_t kBounds>
  explicit HistogramTotals(const std::array<int64_t, kBounds>& upper)
      : bounds(upper.begin(), upper.end()), counts(kBounds + 1) {}

  template <size_t kBounds>
  void Add(const HistogramShard<kBounds>& shard) {
    for (size_t i = 0; i <= kBounds; ++i) counts[i] += shard.counts[i].value();
    sum += shard.sum.value();
  }

  std::vector<int64_t> bounds;   // upper, inclusive; the last bucket has none
  std::vector<uint64_t> counts;  // per bucket, one more than bounds
  uint64_t sum = 0;
};

struct BatchTotals {
  uint32_t rows = 0;
  uint64_t count = 0;
  uint64_t input_ns = 0;
  uint64_t infer_ns = 0;
  uint64_t output_ns = 0;
};

struct VersionTotals {
  // Of requests.
  uint64_t success = 0;
  uint64_t success_ns = 0;
  uint64_t fail = 0;
  uint64_t fail_ns = 0;
  uint64_t queue = 0;
  uint64_t queue_ns = 0;
  uint64_t compute_input_ns = 0;
  uint64_t compute_infer_ns = 0;
  uint64_t compute_output_ns = 0;
  std::vector<uint64_t> reasons = std::vector<uint64_t>(kReasonCount);  // failures by Reason
  uint64_t waiting = 0;                                                 // in the queue now
  HistogramTotals request_duration{kDurationBoundsNs};
  HistogramTotals queue_duration{kDurationBoundsNs};
  // Of batches.
  uint64_t executions = 0;
  uint64_t rows = 0;
  uint64_t last_inference_ms = 0;  // wall clock; 0: never
  uint64_t bytes_gathered = 0;
  uint64_t bisections = 0;
  std::vector<BatchTotals> batches;  // those that have run, by rows
  HistogramTotals batch_rows{kRowsBounds};
};

VersionTotals Sum(const Version& version);

}  // namespace tidegate
