// libnghttp2 speaks of bytes and we of text.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

namespace tidegate {

inline std::string_view View(const uint8_t* data, size_t size) { return {reinterpret_cast<const char*>(data), size}; }

// The library takes names and values without const and leaves them alone.
inline uint8_t* Bytes(std::string_view text) { return reinterpret_cast<uint8_t*>(const_cast<char*>(text.data())); }

}  // namespace tidegate
