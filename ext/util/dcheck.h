// TIDEGATE_DCHECK(condition, "what must hold"): an invariant, checked in debug builds (no NDEBUG, or TIDEGATE_DEBUG
// set) and free in others. It ends the process: a broken invariant of the request path has no honest answer.
#pragma once

#if !defined(NDEBUG) || defined(TIDEGATE_DEBUG)
#define TIDEGATE_DCHECKS 1
#include <cstdio>
#include <cstdlib>
#define TIDEGATE_DCHECK(condition, what)                                                        \
  do {                                                                                          \
    if (!(condition)) {                                                                         \
      std::fprintf(stderr, "broken invariant: %s (%s, line %d)\n", what, #condition, __LINE__); \
      std::abort();                                                                             \
    }                                                                                           \
  } while (false)
#else
#define TIDEGATE_DCHECKS 0
#define TIDEGATE_DCHECK(condition, what) \
  do {                                   \
  } while (false)
#endif
