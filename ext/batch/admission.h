// Whether a request may join the queue: pure arithmetic, once per request, before it costs anything.
//
// A late answer is dearer than an early refusal: the client may go elsewhere, and the run is saved for one who can still
// be served. But a prediction may be wrong, so it refuses nobody whom an idle instance would take now, and nobody before
// it has seen kTrustedRuns runs of that shape.
#pragma once

#include <algorithm>
#include <cstdint>

#include "batch/policy.h"
#include "util/clock.h"
#include "util/reason.h"

namespace tidegate {

struct AdmissionView {
  uint64_t waiting = 0;           // requests of the same level
  uint64_t max_waiting = 0;       // of that level
  uint64_t rows_ahead = 0;        // that will be served before it
  uint64_t requests_ahead = 0;
  uint32_t instances = 1;
  uint32_t idle = 1;              // instances that run nothing
  int64_t soonest_free_ns = 0;    // when the first of the busy ones is predicted to end
  uint32_t max_rows = 1;
  bool batching = true;           // false: every request is a batch of its own
};

struct AdmissionRequest {
  uint32_t rows = 1;
  int64_t due_ns = kNever;
};

struct Admission {
  Reason reason = Reason::kOk;
  int64_t pushback_ns = -1;  // negative: a retry is not worth it
};

constexpr Admission Admit(const AdmissionView& view, const Prediction& prediction, const AdmissionRequest& request,
                          int64_t now_ns) {
  if (request.rows == 0 || request.rows > view.max_rows) return {Reason::kInvalidTensor};
  if (request.due_ns <= now_ns) return {Reason::kDeadlinePassed};
  if (view.waiting >= view.max_waiting) return {Reason::kQueueFull, prediction.L99(prediction.cap)};
  if (request.due_ns == kNever || !prediction.trusted) return {};

  const uint64_t cap = std::max<uint32_t>(prediction.cap, 1);
  if (view.idle > 0) {
    const uint64_t batches =
        view.batching ? (view.rows_ahead + request.rows + cap - 1) / cap : view.requests_ahead + 1;
    if (batches <= view.idle) return {};
  }
  int64_t work_ns = 0;  // of those ahead, spread over the instances
  int64_t own_ns = 0;   // of the batch it ends up in
  const auto k = static_cast<int64_t>(std::max<uint32_t>(view.instances, 1));
  if (view.batching) {
    const uint64_t full = (view.rows_ahead + request.rows) / cap;
    const auto rest = static_cast<uint32_t>((view.rows_ahead + request.rows) % cap);
    work_ns = SaturatingMul(static_cast<int64_t>(full), prediction.L99(static_cast<uint32_t>(cap))) / k;
    own_ns = prediction.L99(rest);
  } else {
    own_ns = prediction.L99(request.rows);
    work_ns = SaturatingMul(static_cast<int64_t>(view.requests_ahead), own_ns) / k;
  }
  const int64_t free_ns = view.idle > 0 ? now_ns : std::max(now_ns, view.soonest_free_ns);
  const int64_t eta_ns = SaturatingAdd(SaturatingAdd(free_ns, work_ns), own_ns + kSlackNs);
  if (eta_ns > request.due_ns) return {Reason::kTooLate, eta_ns - request.due_ns};
  return {};
}

// Whole milliseconds for grpc-retry-pushback-ms, rounded up: 0 would mean at once. A minute is as good as "later".
constexpr int32_t PushbackMs(int64_t pushback_ns) {
  if (pushback_ns < 0) return -1;
  return static_cast<int32_t>(std::clamp<int64_t>(pushback_ns / 1'000'000 + (pushback_ns % 1'000'000 != 0), 1, 60'000));
}

static_assert(Admit({.waiting = 4, .max_waiting = 4}, UnknownPrediction(1), {}, 0).reason == Reason::kQueueFull);
static_assert(Admit({.max_waiting = 4}, UnknownPrediction(1), {.due_ns = 0}, 0).reason == Reason::kDeadlinePassed);
static_assert(PushbackMs(1) == 1 && PushbackMs(1'000'001) == 2 && PushbackMs(-1) == -1);

}  // namespace tidegate
