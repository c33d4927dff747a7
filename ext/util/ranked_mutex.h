// A std::mutex that knows its place in LockRank. In debug builds every lock is checked against those that the thread
// holds already; otherwise it is a std::mutex and nothing else.
//
// RankedLock is the way to hold it. It gives out the std::unique_lock for condition variables: a thread that waits
// there still counts as holding the rank, which harms nobody since it takes no other lock while it sleeps.
#pragma once

#include <mutex>

#include "util/dcheck.h"
#include "util/lock_rank.h"

namespace tidegate {

#if TIDEGATE_DCHECKS
namespace lock_internal {
// The ranks this thread holds, lowest first. Eight is twice as deep as any path of ours nests.
struct HeldRanks {
  LockRank ranks[8];
  int n = 0;

  void Push(LockRank rank) {
    TIDEGATE_DCHECK(n == 0 || ranks[n - 1] < rank, "locks are taken in the order of LockRank");
    TIDEGATE_DCHECK(n < 8, "a thread holds few locks");
    ranks[n++] = rank;
  }
  void Pop(LockRank rank) {
    TIDEGATE_DCHECK(n > 0 && ranks[n - 1] == rank, "the lock taken last is released first");
    --n;
  }
};
inline thread_local HeldRanks held;
}  // namespace lock_internal
#endif

template <LockRank kRank>
class RankedMutex {
 public:
  RankedMutex() = default;
  RankedMutex(const RankedMutex&) = delete;
  RankedMutex& operator=(const RankedMutex&) = delete;

 private:
  template <LockRank>
  friend class RankedLock;
  std::mutex mutex_;
};

template <LockRank kRank>
class RankedLock {
 public:
  // The rank is checked before the lock is taken: a wrong order is reported even where it happens not to block.
  explicit RankedLock(RankedMutex<kRank>& mutex) : lock_(mutex.mutex_, std::defer_lock) { Lock(); }
  ~RankedLock() {
    if (lock_.owns_lock()) Unlock();
  }
  RankedLock(const RankedLock&) = delete;
  RankedLock& operator=(const RankedLock&) = delete;

  void Lock() {
#if TIDEGATE_DCHECKS
    lock_internal::held.Push(kRank);
#endif
    lock_.lock();
  }
  void Unlock() {
    lock_.unlock();
#if TIDEGATE_DCHECKS
    lock_internal::held.Pop(kRank);
#endif
  }
  std::unique_lock<std::mutex>& native() { return lock_; }

 private:
  std::unique_lock<std::mutex> lock_;
};

template <LockRank kRank>
RankedLock(RankedMutex<kRank>&) -> RankedLock<kRank>;

}  // namespace tidegate
