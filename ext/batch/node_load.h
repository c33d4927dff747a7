// Whether somebody else on this node could use the core that a held batch leaves free: the `other_work` of policy.h.
//
// Threads    Any.
// Lock       mutex_, rank kNodeLoad: taken when a queue is made or ends, and by a queue that may hold a batch open
//            (max_queue_delay_microseconds), never by others. A queue publishes its length in an atomic of its own, so
//            that the request path writes no line that two versions share.
// Lifetime   Process() lives as long as the process. A queue leaves before its atomic goes.
#pragma once

#include <sched.h>
#include <time.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "util/clock.h"
#include "util/ranked_mutex.h"

namespace tidegate {

class NodeLoad {
 public:
  // measure_cpu: whether busy cores count as other work. False leaves the queues alone to decide, as simulation needs.
  explicit NodeLoad(bool measure_cpu) : measure_cpu_(measure_cpu) {}
  NodeLoad(const NodeLoad&) = delete;
  NodeLoad& operator=(const NodeLoad&) = delete;

  static NodeLoad& Process() {
    static NodeLoad node(/*measure_cpu=*/true);
    return node;
  }

  void Join(const std::atomic<uint64_t>* waiting) {
    RankedLock lock(mutex_);
    queues_.push_back(waiting);
  }
  void Leave(const std::atomic<uint64_t>* waiting) {
    RankedLock lock(mutex_);
    std::erase(queues_, waiting);
  }

  // Another queue is not empty, or the process kept over 70 % of its cores busy in the last second or more.
  bool OtherWork(const std::atomic<uint64_t>* self, int64_t now_ns) {
    RankedLock lock(mutex_);
    for (const std::atomic<uint64_t>* waiting : queues_) {
      if (waiting != self && waiting->load(std::memory_order_relaxed) > 0) return true;
    }
    return measure_cpu_ && CpuBusy(now_ns);
  }

 private:
  bool CpuBusy(int64_t now_ns) {
    if (now_ns - measured_ns_ < 1'000'000'000) return cpu_busy_;
    timespec ts;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &ts);
    const int64_t cpu_ns = ts.tv_sec * INT64_C(1'000'000'000) + ts.tv_nsec;
    cpu_set_t allowed;
    CPU_ZERO(&allowed);
    const int cores = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? std::max(CPU_COUNT(&allowed), 1) : 1;
    // The first look has nothing to compare with: not busy.
    cpu_busy_ = measured_ns_ > 0 &&
                static_cast<double>(cpu_ns - cpu_ns_) > 0.7 * cores * static_cast<double>(now_ns - measured_ns_);
    measured_ns_ = now_ns;
    cpu_ns_ = cpu_ns;
    return cpu_busy_;
  }

  const bool measure_cpu_;
  RankedMutex<LockRank::kNodeLoad> mutex_;
  std::vector<const std::atomic<uint64_t>*> queues_;  // guarded by mutex_, as all below
  int64_t measured_ns_ = 0;
  int64_t cpu_ns_ = 0;
  bool cpu_busy_ = false;
};

}  // namespace tidegate
