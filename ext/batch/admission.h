// Whether a request may join the queue: pure arithmetic, once per request, before it costs anything.
//
// A late answer is dearer than an early refusal: the client may go elsewhere, and the run is saved for one who can
// still be served. But a prediction may be wrong, so it refuses nobody whom an idle instance would take now, and nobody
// before it has seen kTrustedRuns runs of that shape.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "batch/policy.h"
#include "util/clock.h"
#include "util/reason.h"

namespace tidegate {

struct AdmissionView {
  uint64_t waiting = 0;              // requests of the same level
  uint64_t max_waiting = 0;          // of that level
  uint64_t rows_ahead = 0;           // of the same shape, that will be served before it
  uint64_t requests_ahead = 0;       // the same, counted in requests
  std::span<const int64_t> free_ns;  // when each instance is predicted to be free, soonest first; until now: idle
  int64_t gap_ns = kNever;           // between the rows of this shape that arrive
  uint32_t max_rows = 1;
  bool batching = true;  // false: every request is a batch of its own
};

struct AdmissionRequest {
  uint32_t rows = 1;
  int64_t due_ns = kNever;       // when the answer is too late
  int64_t half_ns = 0;           // when half of its time has passed; see policy.h
  int64_t start_by_ns = kNever;  // when it would be taken out of the queue unrun
};

struct Admission {
  Reason reason = Reason::kOk;
  int64_t pushback_ns = -1;  // negative: a retry is not worth it
};

// As long as run times are unknown: long enough not to be a hammer, short enough not to be noticed.
inline constexpr int64_t kUnknownPushbackNs = 10'000'000;

constexpr Admission Admit(const AdmissionView& view, const Prediction& prediction, const AdmissionRequest& request,
                          int64_t now_ns) {
  if (request.rows == 0 || request.rows > view.max_rows) return {Reason::kInvalidTensor};
  if (request.due_ns <= now_ns || request.start_by_ns <= now_ns) return {Reason::kDeadlinePassed};
  if (view.waiting >= view.max_waiting) {
    return {Reason::kQueueFull, prediction.trusted ? prediction.L99(prediction.cap) : kUnknownPushbackNs};
  }
  if (std::min(request.due_ns, request.start_by_ns) == kNever || !prediction.trusted) return {};

  // It waits for the batches before its own, which are full. Several runs in a row take their average, each.
  const uint64_t cap = view.batching ? std::max<uint32_t>(prediction.cap, 1) : request.rows;
  const uint64_t rows = view.batching ? view.rows_ahead + request.rows : (view.requests_ahead + 1) * cap;
  const uint64_t before = (rows - 1) / cap;
  const uint64_t k = view.free_ns.size();
  if (k == 0) return {};
  if (before < k && view.free_ns[before] <= now_ns) return {};
  const int64_t start_ns =
      SaturatingAdd(std::max(now_ns, view.free_ns[before % k]),
                    SaturatingMul(static_cast<int64_t>(before / k), prediction.L50(static_cast<uint32_t>(cap))));
  // Until its own starts, others join it: under load that makes the difference between a few rows and a full batch.
  uint64_t own_rows = rows - before * cap;
  if (view.batching) own_rows += static_cast<uint64_t>((start_ns - now_ns) / std::max<int64_t>(view.gap_ns, 1));
  const auto run_rows = std::max(static_cast<uint32_t>(std::min(own_rows, cap)), request.rows);
  const int64_t run_ns = start_ns < request.half_ns ? prediction.L50(run_rows) : prediction.L99(run_rows);
  const int64_t end_ns = SaturatingAdd(start_ns, run_ns + kSlackNs);
  if (start_ns <= request.start_by_ns && end_ns <= request.due_ns) return {};
  return {Reason::kTooLate,
          std::max(start_ns - std::min(request.start_by_ns, start_ns), end_ns - std::min(request.due_ns, end_ns))};
}

// Whole milliseconds for grpc-retry-pushback-ms, rounded up: 0 would mean at once. A minute is as good as "later".
constexpr int32_t PushbackMs(int64_t pushback_ns) {
  if (pushback_ns < 0) return -1;
  return static_cast<int32_t>(std::clamp<int64_t>(pushback_ns / 1'000'000 + (pushback_ns % 1'000'000 != 0), 1, 60'000));
}

static_assert(Admit({.waiting = 4, .max_waiting = 4, .free_ns = {}}, UnknownPrediction(1), {}, 0).reason ==
              Reason::kQueueFull);
static_assert(Admit({.max_waiting = 4, .free_ns = {}}, UnknownPrediction(1), {.due_ns = 0}, 0).reason ==
              Reason::kDeadlinePassed);
static_assert(PushbackMs(1) == 1 && PushbackMs(1'000'001) == 2 && PushbackMs(-1) == -1);

}  // namespace tidegate
