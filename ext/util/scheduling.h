// What the operating system is told about a thread: who may be late and who may not.
//
// Threads    Each speaks for itself only.
#pragma once

#include <sys/resource.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>

namespace tidegate {

// The thread gives way to everything else, for as long as it lives: an unprivileged thread cannot take it back. Loads
// and warm-ups run like this, each on a thread of its own.
inline void TakeLowestPriority() { setpriority(PRIO_PROCESS, static_cast<id_t>(syscall(SYS_gettid)), 19); }

// How long a thread wants to run at a time. A thread that wakes up takes the core from one that asked for longer slices
// (or for none: some 3 ms), instead of waiting for the end of that slice. Its share of the core stays the same.
// I/O before executors, and both before Python and loads, which ask for nothing.
inline constexpr uint64_t kIoSliceNs = 100'000;  // the least the kernel takes
inline constexpr uint64_t kExecutorSliceNs = 400'000;

// Since Linux 6.12; older kernels leave the thread as it is, which costs latency beside other work and nothing else.
inline void AskForSlices(uint64_t slice_ns) {
  // sched_attr of linux/sched/types.h, whose headers not every libc has.
  struct {
    uint32_t size;
    uint32_t policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime_ns;
    uint64_t deadline_ns;
    uint64_t period_ns;
  } attributes{};
  static_assert(sizeof attributes == 48);  // SCHED_ATTR_SIZE_VER0
  if (syscall(SYS_sched_getattr, 0, &attributes, sizeof attributes, 0) != 0) return;
  attributes.size = sizeof attributes;
  attributes.runtime_ns = slice_ns;
  syscall(SYS_sched_setattr, 0, &attributes, 0);
}

}  // namespace tidegate
