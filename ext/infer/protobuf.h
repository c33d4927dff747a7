// The wire format of protobuf, as far as the codec needs it: fields read from bytes in place, fields written to bytes.
//
// Reading    A function takes where to read and where the message ends, and returns where the value ends, or nullptr
// when
//            it does not end in time. It accepts what the official parsers accept: numbers and lengths of up to ten
//            bytes, however few would do; tags of up to five.
// Writing    A function writes at `to` and returns where it stopped. The ...Bytes functions say how much that will be.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string_view>

namespace tidegate::protobuf {

using Cursor = const uint8_t*;

inline Cursor Begin(std::string_view bytes) { return reinterpret_cast<Cursor>(bytes.data()); }
inline Cursor End(std::string_view bytes) { return Begin(bytes) + bytes.size(); }

enum WireType : uint32_t { kVarint = 0, kFixed64 = 1, kDelimited = 2, kStartGroup = 3, kEndGroup = 4, kFixed32 = 5 };

// Messages and groups together may be nested this deep, as in the official parsers.
inline constexpr int kMaxDepth = 100;

// Why a message is refused, for people; nullptr: it is not.
using Fault = const char*;

inline constexpr Fault kBadTag = "a field has no valid tag";
inline constexpr Fault kBadVarint = "a number does not end";
inline constexpr Fault kBadLength = "a field is longer than what is left";
inline constexpr Fault kBadUnknown = "an unknown field is broken or nested too deep";
inline constexpr Fault kBadPacked = "a packed field ends inside a value";

// -- reading ----------------------------------------------------------------------------------------------------------

// The same as without Long, for what has more than one byte or is not there.
Cursor ReadLongVarint(Cursor at, Cursor end, uint64_t* value);
Cursor ReadLongTag(Cursor at, Cursor end, uint32_t* tag);

inline Cursor ReadVarint(Cursor at, Cursor end, uint64_t* value) {
  if (at < end && *at < 0x80) [[likely]] {
    *value = *at;
    return at + 1;
  }
  return ReadLongVarint(at, end, value);
}

// REQUIRES: at < end. Field number 0 is let through: it is no field of ours, and SkipValue refuses it.
inline Cursor ReadTag(Cursor at, Cursor end, uint32_t* tag) {
  if (*at < 0x80) [[likely]] {
    *tag = *at;
    return at + 1;
  }
  return ReadLongTag(at, end, tag);
}

inline Cursor ReadDelimited(Cursor at, Cursor end, std::string_view* bytes) {
  uint64_t length = 0;
  at = ReadVarint(at, end, &length);
  if (!at || length > static_cast<size_t>(end - at)) return nullptr;
  *bytes = {reinterpret_cast<const char*>(at), static_cast<size_t>(length)};
  return at + length;
}

// Passes over the value of a field that is not ours. `depth`, at most kMaxDepth: how many groups may be open in it.
Cursor SkipValue(Cursor at, Cursor end, uint32_t tag, int depth);

bool IsUtf8Slow(std::string_view text);

// proto3's condition on a `string`. Mostly it is ASCII, which is seen eight bytes at a time.
inline bool IsUtf8(std::string_view text) {
  constexpr uint64_t kHighBits = 0x8080808080808080;
  const char* at = text.data();
  size_t left = text.size();
  uint64_t seen = 0;
  for (; left >= 8; at += 8, left -= 8) {
    uint64_t word;
    std::memcpy(&word, at, 8);
    seen |= word;
  }
  for (; left > 0; ++at, --left) seen |= static_cast<uint8_t>(*at);
  return (seen & kHighBits) == 0 || IsUtf8Slow(text);
}

// -- writing ----------------------------------------------------------------------------------------------------------

constexpr size_t VarintBytes(uint64_t value) { return (static_cast<size_t>(std::bit_width(value | 1)) + 6) / 7; }

// A field with a one-byte tag.
constexpr size_t DelimitedBytes(size_t length) { return 1 + VarintBytes(length) + length; }

// A string field; the empty string is left out, as proto3 wants it.
constexpr size_t StringBytes(std::string_view text) { return text.empty() ? 0 : DelimitedBytes(text.size()); }

inline std::byte* PutByte(std::byte* to, uint8_t byte) {
  *to = std::byte{byte};
  return to + 1;
}

inline std::byte* PutVarint(std::byte* to, uint64_t value) {
  while (value >= 0x80) {
    to = PutByte(to, static_cast<uint8_t>(value | 0x80));
    value >>= 7;
  }
  return PutByte(to, static_cast<uint8_t>(value));
}

inline std::byte* PutBytes(std::byte* to, const void* from, size_t length) {
  if (length > 0) std::memcpy(to, from, length);
  return to + length;
}

inline std::byte* PutString(std::byte* to, uint8_t tag, std::string_view text) {
  if (text.empty()) return to;
  to = PutByte(to, tag);
  to = PutVarint(to, text.size());
  return PutBytes(to, text.data(), text.size());
}

}  // namespace tidegate::protobuf
