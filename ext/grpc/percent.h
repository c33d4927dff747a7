// grpc-message: UTF-8 of which the bytes outside 0x20-0x7E, and '%' itself, travel as %XX.
#pragma once

#include <algorithm>
#include <string>
#include <string_view>

#include "util/utf8.h"

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

// At most the first `most` bytes of `text`, cut between characters, with what is no character replaced: clients refuse
// or garble a message that is not UTF-8.
inline std::string GrpcMessage(std::string_view text, size_t most) {
  std::string clean;
  clean.reserve(std::min(text.size(), most));
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
    const std::string_view character = length > 0 ? text.substr(0, length) : kReplacementCharacter;
    if (clean.size() + character.size() > most) break;
    clean += character;
    text.remove_prefix(std::max<size_t>(length, 1));
  }
  return PercentEncode(clean);
}

}  // namespace tidegate
