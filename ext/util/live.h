// How many native objects of each kind are alive: what leak checks compare before and after.
//
// Threads    Any. The counts are relaxed: each is exact once the threads that make and end objects have been joined or
//            are quiet, which is when a check looks.
#pragma once

#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tidegate {

enum class LiveKind : uint8_t { kSession, kInstance, kVersion, kRequest, kConnection };
inline constexpr std::array<std::string_view, 5> kLiveKindNames = {"session", "instance", "version", "request",
                                                                   "connection"};

namespace live_internal {
// A line each, so that counting requests on one thread does not slow connections on another.
struct alignas(64) Counter {
  std::atomic<int64_t> value{0};
};
inline std::array<Counter, kLiveKindNames.size()> counters;
}  // namespace live_internal

inline int64_t LiveCount(LiveKind kind) {
  return live_internal::counters[static_cast<size_t>(kind)].value.load(std::memory_order_relaxed);
}

// Counts the object it is a member or a base of, for as long as that lives. Costs no space as a base.
template <LiveKind kKind>
class LiveCounted {
 public:
  LiveCounted() { Add(1); }
  LiveCounted(const LiveCounted&) { Add(1); }
  LiveCounted& operator=(const LiveCounted&) = default;
  ~LiveCounted() { Add(-1); }

 private:
  static void Add(int64_t n) {
    live_internal::counters[static_cast<size_t>(kKind)].value.fetch_add(n, std::memory_order_relaxed);
  }
};

}  // namespace tidegate
