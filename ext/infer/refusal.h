// The words of a refusal. Whatever a client sent, its message stays short.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "infer/model_spec.h"
#include "infer/tensor.h"

namespace tidegate {

// A client's text inside a message: cut at a character's border, so that no message grows with what was sent.
inline std::string Quoted(std::string_view text) {
  constexpr size_t kMost = 64;
  if (text.size() <= kMost) return "'" + std::string(text) + "'";
  size_t length = kMost;
  while (length > 0 && (static_cast<uint8_t>(text[length]) & 0xc0) == 0x80) --length;
  return "'" + std::string(text.substr(0, length)) + "...'";
}

inline std::string ShapeText(const Dims& dims, bool is_cut = false) {
  std::string text = "[";
  for (int i = 0; i < dims.rank; ++i) text += (i ? "," : "") + std::to_string(dims.d[i]);
  return text + (is_cut ? ",...]" : "]");
}

inline std::string TypeText(const TensorSpec& tensor) {
  return std::string(WireName(tensor.type)) + " " + ShapeText(tensor.dims);
}

// The names of a side, as many as help.
inline std::string NamesText(const std::vector<TensorSpec>& tensors) {
  constexpr size_t kMost = 8;
  std::string text;
  for (size_t i = 0; i < tensors.size() && i < kMost; ++i) text += (i ? ", " : "") + Quoted(tensors[i].name);
  if (tensors.size() > kMost) text += " and " + std::to_string(tensors.size() - kMost) + " more";
  return text.empty() ? "none" : text;
}

}  // namespace tidegate
