// Counters of one version: a shard per writing thread, summed when somebody asks.
//
// Threads    Each shard has one writer (an I/O thread, or an executor); any thread may read. Writes are a relaxed load
// and
//            store, never a locked instruction.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdint>
#include <vector>

#include "util/reason.h"

namespace tidegate {

class Counter {
 public:
  void Add(uint64_t n) { value_.store(value_.load(std::memory_order_relaxed) + n, std::memory_order_relaxed); }
  void Set(uint64_t n) { value_.store(n, std::memory_order_relaxed); }
  uint64_t value() const { return value_.load(std::memory_order_relaxed); }

 private:
  std::atomic<uint64_t> value_{0};
};

// Round bounds that an operator would choose; a request usually takes 100 us to 100 ms.
inline constexpr std::array<int64_t, 17> kDurationBoundsNs = {
    50'000,      100'000,       250'000,       500'000,       1'000'000,     2'500'000,
    5'000'000,   10'000'000,    25'000'000,    50'000'000,    100'000'000,   250'000'000,
    500'000'000, 1'000'000'000, 2'500'000'000, 5'000'000'000, 10'000'000'000};
inline constexpr std::array<int64_t, 11> kRowsBounds = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024};

template <size_t kBounds>
class HistogramShard {
 public:
  void Observe(const std::array<int64_t, kBounds>& bounds, int64_t value) {
    const auto at = std::lower_bound(bounds.begin(), bounds.end(), value) - bounds.begin();
    counts[static_cast<size_t>(at)].Add(1);
    sum.Add(static_cast<uint64_t>(std::max<int64_t>(value, 0)));
  }
  std::array<Counter, kBounds + 1> counts;
  Counter sum;
};

// What an I/O thread counts for a version when a request has its final outcome.
struct alignas(64) IoShard {
  Counter accepted;   // handed to the queue
  Counter finalized;  // of those: came back and were dealt with
  Counter success;
  Counter success_ns;
  Counter fail;
  Counter fail_ns;
  Counter queue;
  Counter queue_ns;
  Counter compute_input_ns;
  Counter compute_infer_ns;
  Counter compute_output_ns;
  std::array<Counter, kReasonCount> reasons;  // failures by reason
  HistogramShard<kDurationBoundsNs.size()> request_duration;
  HistogramShard<kDurationBoundsNs.size()> queue_duration;
};

struct BatchCounters {
  Counter count;
  Counter input_ns;
  Counter infer_ns;
  Counter output_ns;
};

// What an executor counts.
struct alignas(64) ExecutorShard {
  explicit ExecutorShard(uint32_t max_rows) : batches(max_rows + 1) {}
  Counter executions;
  Counter rows;
  Counter last_inference_ms;  // wall clock
  Counter bytes_gathered;
  Counter bisections;
  std::vector<BatchCounters> batches;  // by rows
  HistogramShard<kRowsBounds.size()> batch_rows;
};

}  // namespace tidegate
