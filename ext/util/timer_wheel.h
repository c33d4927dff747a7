// Deadlines of one thread: insert and remove in O(1) without allocation, expiry within a tick.
//
// Threads    The owning thread only.
// Owner      Nodes belong to their containing objects, which unlink themselves before they go.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "util/clock.h"

namespace tidegate {

struct TimerNode {
  int64_t due_ns = kNever;
  TimerNode* next = nullptr;
  TimerNode* prev = nullptr;
  bool linked() const { return next != nullptr; }
};

class TimerWheel {
 public:
  explicit TimerWheel(int64_t now_ns) : tick_(now_ns / kTickNs) {
    for (TimerNode& slot : slots_) slot.next = slot.prev = &slot;
  }

  bool empty() const { return size_ == 0; }

  void Insert(TimerNode* node, int64_t due_ns) {
    node->due_ns = due_ns;
    // Rounded up, and never into the tick that has just been swept: an entry is looked at once its time has come.
    const int64_t tick = std::max(due_ns / kTickNs + 1, tick_ + 1);
    TimerNode& slot = slots_[static_cast<size_t>(tick) % kSlots];
    node->prev = slot.prev;
    node->next = &slot;
    slot.prev->next = node;
    slot.prev = node;
    ++size_;
  }

  void Remove(TimerNode* node) {
    if (!node->linked()) return;
    node->prev->next = node->next;
    node->next->prev = node->prev;
    node->next = node->prev = nullptr;
    --size_;
  }

  // Unlinks every entry that is due and calls expire(node) for it; expire may insert and remove others.
  template <typename Expire>
  void Advance(int64_t now_ns, Expire&& expire) {
    const int64_t until = now_ns / kTickNs;
    if (size_ == 0) {
      tick_ = std::max(tick_, until);
      return;
    }
    // One turn visits every slot; a longer pause needs no second one.
    const int64_t from = std::max(tick_ + 1, until - static_cast<int64_t>(kSlots) + 1);
    for (int64_t tick = from; tick <= until; ++tick) {
      tick_ = tick;
      TimerNode& slot = slots_[static_cast<size_t>(tick) % kSlots];
      TimerNode due;
      due.next = due.prev = &due;
      for (TimerNode* node = slot.next; node != &slot;) {
        TimerNode* next = node->next;
        if (node->due_ns <= now_ns) {
          node->prev->next = node->next;
          node->next->prev = node->prev;
          node->prev = due.prev;
          node->next = &due;
          due.prev->next = node;
          due.prev = node;
        }
        node = next;
      }
      while (due.next != &due) {
        TimerNode* node = due.next;
        Remove(node);
        expire(node);
      }
    }
    tick_ = std::max(tick_, until);
  }

  // Nanoseconds until the next slot that holds something (it may hold a later turn's entries only).
  int64_t NextNs(int64_t now_ns) const {
    if (size_ == 0) return kNever;
    for (size_t i = 1; i <= kSlots; ++i) {
      const TimerNode& slot = slots_[(static_cast<size_t>(tick_) + i) % kSlots];
      if (slot.next != &slot) return std::max<int64_t>((tick_ + static_cast<int64_t>(i)) * kTickNs - now_ns, 0);
    }
    return kNever;
  }

 private:
  static constexpr int64_t kTickNs = 1'000'000;
  static constexpr size_t kSlots = 1024;
  std::array<TimerNode, kSlots> slots_;
  int64_t tick_;
  size_t size_ = 0;
};

}  // namespace tidegate
