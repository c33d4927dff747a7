// The one structure of the request path that I/O threads and executors share: what waits for one version.
//
// Threads    Push, Remove: any I/O thread. Take, Finished: the executor threads of this version. Close: the thread that
//            retires the version. View: any.
// Owner      A request belongs to the queue from a successful Push until Take or Remove hands it out.
// Lock       mutex_, rank kBatchQueue. Never held while calling out (no encode, no run, no log).
// Invariants see DESIGN.md, section "Batching".
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "batch/node_load.h"
#include "batch/settings.h"
#include "infer/request.h"
#include "util/ranked_mutex.h"

namespace tidegate {

// What Take hands out. The vectors keep their capacity between calls.
struct Batch {
  std::vector<Request*> requests;  // to run as one batch; may be empty when only `dropped` is not
  uint32_t rows = 0;
  std::vector<Request*> dropped;  // expired, hopeless or cancelled: status is set, never run; to be handed back

  bool empty() const { return requests.empty() && dropped.empty(); }
  void Clear() {
    requests.clear();
    rows = 0;
    dropped.clear();
  }
};

struct QueueView {
  uint64_t waiting = 0;  // requests
  uint64_t waiting_rows = 0;
  uint64_t running_rows = 0;
  // Of the shape that ran last; a model without free dimensions has no other.
  uint32_t knee = 0;
  uint32_t cap = 0;
  std::vector<int64_t> l50_ns;  // predicted run time by batch size 1, 2, 4 .. max_batch_rows; 0: not measured yet
  std::vector<int64_t> l99_ns;
};

class BatchQueue {
 public:
  explicit BatchQueue(const BatchSettings& settings, NodeLoad& node = NodeLoad::Process());
  ~BatchQueue();
  BatchQueue(const BatchQueue&) = delete;
  BatchQueue& operator=(const BatchQueue&) = delete;

  // Sets request->due_ns (given: grpc-timeout) and queue_due_ns from its `timeout`, its level's policy and when it
  // arrived. Returns when it leaves the queue unrun if it still waits then (kNever: never): whoever pushes it sees to
  // that with a timer and Remove, since Take looks only when an instance is free. Once, before Push.
  int64_t SetDeadlines(Request* request) const;

  // Takes in what one epoll round brought: one lock, at most one wake-up per batch that can start. A request that is
  // not accepted is left in *refused with its status set (kQueueFull, kTooLate, kDeadlinePassed, kCancelled,
  // kInvalidTensor for a priority out of range or rows out of bounds, kVersionNotReady when closed); *arrivals is empty
  // afterwards. REQUIRES: SetDeadlines(each).
  void Push(RequestList* arrivals, RequestList* refused, int64_t now_ns);

  // Takes a waiting request back (cancelled or expired). False: it is not waiting any more. With preserve_ordering its
  // going may let finished later ones leave: they are appended to *ready, to be handed to their outboxes.
  bool Remove(Request* request, std::vector<Request*>* ready);

  // Waits until the policy says run (or something must be dropped) and hands it out. `instance` < settings.instances
  // says who asks. False: closed and empty, the caller ends.
  bool Take(uint32_t instance, Batch* batch);

  // The same without waiting, at a given time: for tests and simulation. Returns the time at which asking again makes
  // sense (kNever: after the next Push), or now_ns when *batch was filled.
  int64_t TryTake(uint32_t instance, int64_t now_ns, Batch* batch);

  // The batch of `instance` ended after run_ns. ok = false leaves the run-time model alone. Before its next Take.
  void Finished(uint32_t instance, uint32_t rows, int64_t run_ns, bool ok, int64_t now_ns);

  // With preserve_ordering: hands a finished (or dropped) request over and appends to *ready those that may leave now,
  // in arrival order; otherwise *ready gets just this one.
  void Release(Request* request, std::vector<Request*>* ready);

  // Order is lost if two threads that were told what may leave post it in another order than they were told. So with
  // preserve_ordering a Turn is held from before Release or Remove until *ready is in its outboxes. Costs nothing
  // without.
  class Turn {
   public:
    explicit Turn(BatchQueue& queue) {
      if (queue.ordered_) lock_.emplace(queue.turn_mutex_);
    }

   private:
    std::optional<RankedLock<LockRank::kAnswerOrder>> lock_;
  };

  // No more requests are taken; Take drains what waits and then returns false.
  void Close();

  QueueView View() const;

 private:
  struct Impl;

  const bool ordered_;
  RankedMutex<LockRank::kAnswerOrder> turn_mutex_;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidegate
