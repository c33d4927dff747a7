// How a publisher knows that no I/O thread can still see what it took away.
//
// Each I/O thread is either running a round (odd count) or waiting for events (even count). It loads shared pointers
// only while it runs and keeps none across a wait. So whoever has unpublished a pointer may free what it pointed to
// once every thread has been seen waiting, or has finished the round it was in.
#pragma once

#include <time.h>

#include <atomic>
#include <cstdint>

namespace tidegate {

class Quiescence {
 public:
  // The thread itself. Sequentially consistent, so that the publisher's store to a pointer and its look at the count
  // cannot both miss the thread's count and its load of that pointer.
  void BeginRound() { count_.fetch_add(1, std::memory_order_seq_cst); }
  void EndRound() { count_.fetch_add(1, std::memory_order_seq_cst); }
  bool waiting() const { return (count_.load(std::memory_order_seq_cst) & 1) == 0; }

  // Any other thread: returns when the round under way at the call, if any, is over. Rounds are short (no blocking call
  // in them), so this polls rather than burden each round with a wake-up.
  void Synchronize() const {
    const uint64_t seen = count_.load(std::memory_order_seq_cst);
    if ((seen & 1) == 0) return;
    const timespec pause{0, 50'000};
    while (count_.load(std::memory_order_seq_cst) == seen) nanosleep(&pause, nullptr);
  }

 private:
  std::atomic<uint64_t> count_{0};
};

}  // namespace tidegate
