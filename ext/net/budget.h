// The node's limit on bytes in flight: request bodies being received, queued or run, and answers not yet sent.
//
// Threads    Budget: any. LocalBudget: one I/O thread, which takes credit from the Budget in chunks, so that the shared
//            counter is touched once per some thousand small requests.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <utility>

namespace tidegate {

class Budget {
 public:
  explicit Budget(int64_t limit_bytes) : limit_(limit_bytes), free_(limit_bytes) {}

  // All or nothing.
  bool Take(int64_t bytes) {
    int64_t free = free_.load(std::memory_order_relaxed);
    while (free >= bytes) {
      if (free_.compare_exchange_weak(free, free - bytes, std::memory_order_relaxed)) return true;
    }
    return false;
  }
  // Takes even what is not there: answers exist already, so they are charged and new requests wait.
  void Force(int64_t bytes) { free_.fetch_sub(bytes, std::memory_order_relaxed); }
  void Return(int64_t bytes) { free_.fetch_add(bytes, std::memory_order_relaxed); }
  int64_t free_bytes() const { return free_.load(std::memory_order_relaxed); }
  int64_t limit_bytes() const { return limit_; }

 private:
  const int64_t limit_;
  std::atomic<int64_t> free_;
};

class LocalBudget {
 public:
  explicit LocalBudget(Budget& shared) : shared_(shared) {}
  ~LocalBudget() { shared_.Return(credit_); }
  LocalBudget(const LocalBudget&) = delete;
  LocalBudget& operator=(const LocalBudget&) = delete;

  bool Take(int64_t bytes) {
    if (credit_ < bytes) {
      const int64_t missing = bytes - credit_;
      if (const int64_t chunk = std::max(missing, kChunk); shared_.Take(chunk)) {
        credit_ += chunk;
      } else if (shared_.Take(missing)) {
        credit_ += missing;
      } else {
        return false;
      }
    }
    credit_ -= bytes;
    return true;
  }
  void Force(int64_t bytes) {
    credit_ -= bytes;
    if (credit_ < 0) {
      shared_.Force(-credit_);
      credit_ = 0;
    }
  }
  // Less than a quarter is left: whoever holds bytes without getting on is in the others' way.
  bool low() const { return shared_.free_bytes() + credit_ < shared_.limit_bytes() / 4; }
  void Return(int64_t bytes) {
    credit_ += bytes;
    if (credit_ > 2 * kChunk) {
      shared_.Return(credit_ - kChunk);
      credit_ = kChunk;
    }
  }

 private:
  static constexpr int64_t kChunk = 1 << 20;
  Budget& shared_;
  int64_t credit_ = 0;
};

// Bytes of a Budget that leave their I/O thread: given back by whoever holds them last, on any thread.
class BudgetHold {
 public:
  BudgetHold() = default;
  BudgetHold(Budget& budget, int64_t bytes) : budget_(&budget), bytes_(bytes) {}
  BudgetHold(BudgetHold&& other) noexcept : budget_(std::exchange(other.budget_, nullptr)), bytes_(other.bytes_) {}
  BudgetHold& operator=(BudgetHold&& other) noexcept {
    std::swap(budget_, other.budget_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~BudgetHold() {
    if (budget_) budget_->Return(bytes_);
  }

 private:
  Budget* budget_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace tidegate
