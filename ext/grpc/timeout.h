// grpc-timeout: 1 to 8 digits and a unit (H M S m u n), as in the gRPC over HTTP/2 specification.
#pragma once

#include <cstdint>
#include <string_view>

namespace tidegate {

// Nanoseconds, or -1 when the text is not a timeout. At most 99,999,999 hours, which fits in 64 bits (3.6e20 would not:
// hours and minutes are capped at about 146 years, beyond any use).
constexpr int64_t ParseGrpcTimeout(std::string_view text) {
  if (text.size() < 2 || text.size() > 9) return -1;
  int64_t value = 0;
  for (char c : text.substr(0, text.size() - 1)) {
    if (c < '0' || c > '9') return -1;
    value = value * 10 + (c - '0');
  }
  int64_t unit_ns = 0;
  switch (text.back()) {
    case 'H': unit_ns = 3'600'000'000'000; break;
    case 'M': unit_ns = 60'000'000'000; break;
    case 'S': unit_ns = 1'000'000'000; break;
    case 'm': unit_ns = 1'000'000; break;
    case 'u': unit_ns = 1'000; break;
    case 'n': unit_ns = 1; break;
    default: return -1;
  }
  constexpr int64_t kMost = INT64_C(4'600'000'000'000'000'000);
  return value > kMost / unit_ns ? kMost : value * unit_ns;
}

static_assert(ParseGrpcTimeout("1n") == 1);
static_assert(ParseGrpcTimeout("20m") == 20'000'000);
static_assert(ParseGrpcTimeout("0S") == 0);
static_assert(ParseGrpcTimeout("99999999H") > 0);
static_assert(ParseGrpcTimeout("123456789S") == -1);
static_assert(ParseGrpcTimeout("1x") == -1 && ParseGrpcTimeout("-1S") == -1 && ParseGrpcTimeout("") == -1);

}  // namespace tidegate
