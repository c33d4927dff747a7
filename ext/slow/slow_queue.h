// The hand-over of RPCs that Python answers: (method, bytes) out, messages and an end back.
//
// Threads    Push: I/O threads. Pop: Python workers with the GIL released. SlowCall::Send/Finish: any.
// Owner      A SlowCall is shared by its stream and by Python; whoever lets go last frees it. It names its stream, so
// an
//            answer to a stream that is gone is dropped by the I/O thread.
// Lock       mutex_, rank kSlowQueue: never held while calling out.
// Bound      kMostWaiting events per lane; a full lane refuses the call (QUEUE_FULL). What a message holds of the
// node's
//            byte budget stays taken until Python has it.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "infer/request.h"
#include "net/budget.h"
#include "net/outbox.h"
#include "util/ranked_mutex.h"

namespace tidegate {

class SlowCall {
 public:
  SlowCall(std::shared_ptr<Outbox> home, StreamRef stream, std::string method, std::string peer,
           std::vector<std::pair<std::string, std::string>> metadata)
      : home_(std::move(home)),
        stream_(stream),
        method_(std::move(method)),
        peer_(std::move(peer)),
        metadata_(std::move(metadata)) {}

  const std::string& method() const { return method_; }
  const std::string& peer() const { return peer_; }
  const std::vector<std::pair<std::string, std::string>>& metadata() const { return metadata_; }

  void Cancel() { cancelled_.store(true, std::memory_order_release); }
  bool cancelled() const { return cancelled_.load(std::memory_order_acquire); }

  void Send(const char* data, size_t size);
  void Finish(int grpc_status, std::string message, std::vector<std::pair<std::string, std::string>> trailers);

 private:
  const std::shared_ptr<Outbox> home_;
  const StreamRef stream_;
  const std::string method_;
  const std::string peer_;
  const std::vector<std::pair<std::string, std::string>> metadata_;
  std::atomic<bool> cancelled_{false};
  std::atomic<bool> finished_{false};
};

struct SlowEvent {
  enum class Kind : uint8_t { kMessage, kHalfClose, kCancelled };
  std::shared_ptr<SlowCall> call;
  Kind kind = Kind::kMessage;
  std::vector<std::byte> payload;
  BudgetHold held;  // for the payload
};

class SlowQueue {
 public:
  // Enough for a burst of health checks from every sidecar of a cluster; more is an attack or a stuck handler.
  static constexpr size_t kMostWaiting = 4096;

  // False: full (never for kCancelled, of which a call that is known to Python has one).
  bool Push(SlowEvent event);
  // False at the timeout or once closed.
  bool Pop(double timeout_s, SlowEvent* event);
  void Close();

 private:
  RankedMutex<LockRank::kSlowQueue> mutex_;
  std::condition_variable arrived_;
  std::deque<SlowEvent> events_;
  bool closed_ = false;
};

}  // namespace tidegate
