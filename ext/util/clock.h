// Time. Decisions take `now_ns` as an argument; only shells read this clock.
#pragma once

#include <time.h>

#include <cstdint>
#include <limits>

namespace tidegate {

inline constexpr int64_t kNever = std::numeric_limits<int64_t>::max();

// Monotonic nanoseconds.
inline int64_t NowNs() {
  timespec ts;
  clock_gettime(CLOCK_MONOTONIC, &ts);
  return ts.tv_sec * INT64_C(1'000'000'000) + ts.tv_nsec;
}

// Wall clock milliseconds since the epoch, for what operators read (last_inference, logs).
inline int64_t WallMs() {
  timespec ts;
  clock_gettime(CLOCK_REALTIME, &ts);
  return ts.tv_sec * INT64_C(1000) + ts.tv_nsec / 1'000'000;
}

}  // namespace tidegate
