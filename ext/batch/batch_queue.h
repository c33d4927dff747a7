// The one structure of the request path that I/O threads and executors share: what waits for one version.
//
// Threads    Push, Remove: any I/O thread. Take, Finished: the executor threads of this version. Close: the thread that
//            retires the version. View: any.
// Owner      A request belongs to the queue from a successful Push until Take or Remove hands it out.
// Lock       mutex_, rank kBatchQueue. Never held while calling out (no encode, no run, no log).
// Invariants see DESIGN.md, section "Batching".
#pragma once

#include <condition_variable>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "batch/settings.h"
#include "infer/request.h"

namespace tidegate {

// What Take hands out. The vectors keep their capacity between calls.
struct Batch {
  std::vector<Request*> requests;  // to run as one batch; may be empty when only `dropped` is not
  uint32_t rows = 0;
  std::vector<Request*> dropped;   // expired, hopeless or cancelled: status is set, never run; to be handed back
};

struct QueueView {
  uint64_t waiting = 0;       // requests
  uint64_t waiting_rows = 0;
  uint64_t running_rows = 0;
  uint32_t knee = 0;
  uint32_t cap = 0;
  std::vector<int64_t> l50_ns;  // predicted run time by batch size 1, 2, 4 .. max_batch_rows; 0: not measured yet
  std::vector<int64_t> l99_ns;
};

class BatchQueue {
 public:
  explicit BatchQueue(const BatchSettings& settings);
  ~BatchQueue();
  BatchQueue(const BatchQueue&) = delete;
  BatchQueue& operator=(const BatchQueue&) = delete;

  // Takes in what one epoll round brought: one lock, at most one wake-up per batch that can start. A request that is not
  // accepted is left in *refused with its status set (kQueueFull, kTooLate, kDeadlinePassed, kInvalidTensor for a
  // priority out of range, kNodeDraining/kVersionNotReady when closed); *arrivals is empty afterwards.
  // Sets request->due_ns to the earliest of its due_ns (grpc-timeout), `timeout` and the policy's default.
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

  // The batch of `instance` ended after run_ns. ok = false leaves the run-time model alone.
  void Finished(uint32_t instance, uint32_t rows, int64_t run_ns, bool ok, int64_t now_ns);

  // With preserve_ordering: hands a finished request over and fills *ready with those that may leave now, in arrival
  // order; otherwise *ready gets just this one.
  void Release(Request* request, std::vector<Request*>* ready);

  // No more requests are taken; Take drains what waits and then returns false.
  void Close();

  QueueView View() const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace tidegate
