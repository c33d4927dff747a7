// Percent-encoding of grpc-message: bytes outside 0x20-0x7E, and '%' itself, travel as %XX.
#pragma once

#include <string>
#include <string_view>

namespace tidegate {

inline std::string PercentEncode(std::string_view text) {
  constexpr char kHex[] = "0123456789ABCDEF";
  std::string out;
  out.reserve(text.size());
  for (unsigned char c : text) {
    if (c >= 0x20 && c <= 0x7E && c != '%') {
      out += static_cast<char>(c);
    } else {
      out += '%';
      out += kHex[c >> 4];
      out += kHex[c & 15];
    }
  }
  return out;
}

}  // namespace tidegate
