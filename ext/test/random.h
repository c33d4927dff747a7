// A small generator of random numbers for tests, so that a seed means the same everywhere (splitmix64).
#pragma once

#include <cstdint>

namespace tidegate::test {

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t Next() {
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  uint64_t Below(uint64_t end) { return Next() % end; }
  // Never when n is 0.
  bool OneIn(uint64_t n) { return n > 0 && Below(n) == 0; }

 private:
  uint64_t state_;
};

}  // namespace tidegate::test
