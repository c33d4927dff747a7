// ModelInferRequest written and ModelInferResponse read by other code than the server's, for tests. UINT8 tensors only.
#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "test/check.h"

namespace tidegate::test {

namespace wire_internal {

inline void PutVarint(std::string* to, uint64_t value) {
  while (value >= 0x80) {
    to->push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  to->push_back(static_cast<char>(value));
}

inline void PutField(std::string* to, uint32_t number, std::string_view bytes) {
  PutVarint(to, number << 3 | 2);
  PutVarint(to, bytes.size());
  to->append(bytes);
}

inline uint64_t GetVarint(std::string_view* from) {
  uint64_t value = 0;
  for (int shift = 0;; shift += 7) {
    CHECK(!from->empty() && shift < 64);
    const auto byte = static_cast<uint8_t>(from->front());
    from->remove_prefix(1);
    value |= uint64_t{byte & 0x7Fu} << shift;
    if (byte < 0x80) return value;
  }
}

// Calls field(number, bytes) for each length-delimited field; the messages read here hold few others, which are
// skipped.
template <typename Field>
void ForEachField(std::string_view message, Field&& field) {
  while (!message.empty()) {
    const uint64_t tag = GetVarint(&message);
    if ((tag & 7) == 0) {
      GetVarint(&message);
      continue;
    }
    CHECK_EQ(tag & 7, 2u);
    const uint64_t size = GetVarint(&message);
    CHECK(size <= message.size());
    field(static_cast<uint32_t>(tag >> 3), message.substr(0, size));
    message.remove_prefix(size);
  }
}

}  // namespace wire_internal

struct InferMessage {
  std::string model;
  std::string version;
  std::string id;
  std::vector<int64_t> shape;  // of the one tensor, "x" in requests and "y" in answers
  std::string data;
  uint64_t priority = 0;  // 0: not sent

  std::string Encode() const {
    using namespace wire_internal;
    std::string dims;
    for (int64_t dim : shape) PutVarint(&dims, static_cast<uint64_t>(dim));
    std::string tensor;
    PutField(&tensor, 1, "x");
    PutField(&tensor, 2, "UINT8");
    PutField(&tensor, 3, dims);
    std::string message;
    PutField(&message, 1, model);
    if (!version.empty()) PutField(&message, 2, version);
    if (!id.empty()) PutField(&message, 3, id);
    if (priority != 0) {
      std::string value;
      PutVarint(&value, 5 << 3);  // uint64_param
      PutVarint(&value, priority);
      std::string entry;
      PutField(&entry, 1, "priority");
      PutField(&entry, 2, value);
      PutField(&message, 4, entry);
    }
    PutField(&message, 5, tensor);
    PutField(&message, 7, data);
    return message;
  }
};

// One gRPC message: the flag, the length, the bytes.
inline std::string Framed(std::string_view message, bool compressed = false) {
  std::string framed(1, compressed ? '\1' : '\0');
  for (int shift = 24; shift >= 0; shift -= 8) framed.push_back(static_cast<char>(message.size() >> shift));
  return framed.append(message);
}

// A ModelInferResponse, or the inside of a ModelStreamInferResponse.
struct InferAnswer {
  std::string error_message;  // of a stream
  InferMessage message;
};

inline InferAnswer DecodeAnswer(std::string_view bytes) {
  using namespace wire_internal;
  InferAnswer answer;
  ForEachField(bytes, [&](uint32_t number, std::string_view value) {
    if (number == 1) answer.message.model = value;
    if (number == 2) answer.message.version = value;
    if (number == 3) answer.message.id = value;
    if (number == 6) answer.message.data = value;
    if (number != 5) return;
    ForEachField(value, [&](uint32_t inner, std::string_view part) {
      if (inner == 1) CHECK_EQ(part, "y");
      if (inner == 2) CHECK_EQ(part, "UINT8");
      if (inner != 3) return;
      while (!part.empty()) answer.message.shape.push_back(static_cast<int64_t>(GetVarint(&part)));
    });
  });
  return answer;
}

inline InferAnswer DecodeStreamAnswer(std::string_view bytes) {
  InferAnswer answer;
  std::string error;
  wire_internal::ForEachField(bytes, [&](uint32_t number, std::string_view value) {
    if (number == 1) error = value;
    if (number == 2) answer = DecodeAnswer(value);
  });
  answer.error_message = error;
  return answer;
}

}  // namespace tidegate::test
