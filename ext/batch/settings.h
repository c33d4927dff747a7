// How the requests of one version are batched: Triton's dynamic_batching, as plain values. Constant once built.
#pragma once

#include <cstdint>
#include <map>
#include <vector>

namespace tidegate {

enum class TimeoutAction : uint8_t { kReject = 0, kDelay = 1 };

struct QueuePolicy {
  TimeoutAction timeout_action = TimeoutAction::kReject;
  int64_t default_timeout_us = 0;  // longest wait in the queue; 0: none
  // With kDelay: `timeout` shortens that, and is not the caller's deadline.
  bool allow_timeout_override = false;
  uint32_t max_queue_size = 0;  // requests waiting at this level; 0: kDefaultMaxQueueSize
};

// Every queue ends: Triton's 0 is unbounded, ours is this. At 4,096 small requests a queue is ~2 MB and some 10 ms to
// 1 s of work for the models we know; more only makes answers late.
inline constexpr uint32_t kDefaultMaxQueueSize = 4096;

struct BatchSettings {
  // Requests of one call share batches only with dynamic batching; without it a batch is one request.
  bool dynamic_batching = true;
  uint32_t max_batch_rows = 1;  // rows; >= 1 (a model without batch dimension has 1)
  std::vector<uint32_t> preferred_batch_sizes;
  int64_t max_queue_delay_us = 0;
  bool preserve_ordering = false;
  uint32_t priority_levels = 0;  // 0: one level
  uint32_t default_priority_level = 0;
  QueuePolicy default_policy;
  std::map<uint32_t, QueuePolicy> level_policies;
  int64_t slo_us = 0;                   // parameters.tidegate_slo_us; 0: the cap is max_batch_rows
  int64_t priority_aging_us = 100'000;  // parameters.tidegate_priority_aging_us
  uint32_t instances = 1;
};

}  // namespace tidegate
