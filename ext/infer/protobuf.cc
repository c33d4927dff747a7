#include "infer/protobuf.h"

#include <limits>

#include "util/utf8.h"

namespace tidegate::protobuf {

Cursor ReadLongVarint(Cursor at, Cursor end, uint64_t* value) {
  uint64_t result = 0;
  for (int shift = 0; shift < 70 && at < end; shift += 7) {
    const uint8_t byte = *at++;
    result |= static_cast<uint64_t>(byte & 0x7f) << shift;  // The tenth byte has one bit of use; the rest is dropped.
    if (byte < 0x80) {
      *value = result;
      return at;
    }
  }
  return nullptr;
}

Cursor ReadLongTag(Cursor at, Cursor end, uint32_t* tag) {
  uint64_t value = 0;
  const Cursor after = ReadLongVarint(at, end, &value);
  if (!after || after - at > 5 || value > std::numeric_limits<uint32_t>::max()) return nullptr;
  *tag = static_cast<uint32_t>(value);
  return after;
}

Cursor SkipValue(Cursor at, Cursor end, uint32_t tag, int depth) {
  uint32_t open[kMaxDepth];  // field numbers: a group ends with its own
  int n_open = 0;
  for (;;) {
    if (tag >> 3 == 0) return nullptr;
    uint64_t number = 0;
    std::string_view bytes;
    switch (tag & 7) {
      case kVarint: at = ReadVarint(at, end, &number); break;
      case kFixed64: at = end - at < 8 ? nullptr : at + 8; break;
      case kDelimited: at = ReadDelimited(at, end, &bytes); break;
      case kStartGroup:
        if (n_open == depth) return nullptr;
        open[n_open++] = tag >> 3;
        break;
      case kEndGroup:
        if (n_open == 0 || open[--n_open] != tag >> 3) return nullptr;
        break;
      case kFixed32: at = end - at < 4 ? nullptr : at + 4; break;
      default: return nullptr;
    }
    if (!at || n_open == 0) return at;
    if (at == end) return nullptr;
    at = ReadTag(at, end, &tag);
    if (!at) return nullptr;
  }
}

bool IsUtf8Slow(std::string_view text) {
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
    if (length == 0) return false;
    text.remove_prefix(length);
  }
  return true;
}

}  // namespace tidegate::protobuf
