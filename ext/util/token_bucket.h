// A token bucket whose clock is an argument.
#pragma once

#include <algorithm>
#include <cstdint>

namespace tidegate {

class TokenBucket {
 public:
  // REQUIRES: 0 < per_second <= 1e9.
  constexpr TokenBucket(int64_t burst, int64_t per_second) : burst_(burst), per_second_(per_second), tokens_(burst) {}

  // Takes one token; false when there is none.
  constexpr bool Take(int64_t now_ns) {
    if (tokens_ < burst_) {
      // The time that has not made a whole token yet stays on the clock.
      const int64_t token_ns = INT64_C(1'000'000'000) / per_second_;
      const int64_t gained = (now_ns - filled_ns_) / token_ns;
      if (gained > 0) {
        tokens_ = std::min(burst_, tokens_ + gained);
        filled_ns_ += gained * token_ns;
      }
    } else {
      filled_ns_ = now_ns;
    }
    if (tokens_ == 0) return false;
    --tokens_;
    return true;
  }

 private:
  int64_t burst_;
  int64_t per_second_;
  int64_t tokens_;
  int64_t filled_ns_ = 0;
};

}  // namespace tidegate
