// The parameters of a request and of its tensors: which names mean something, of what kind each must be.
//
// Parameters are maps: a name that comes again replaces what it said before. So they are collected while a message is
// read and judged at its end.
#pragma once

#include <cstdint>
#include <string_view>

#include "infer/codec.h"
#include "infer/protobuf.h"

namespace tidegate {

// One InferParameter. The text is a view into the message.
struct Parameter {
  enum class Member : uint8_t { kNone, kBool, kInt64, kString, kDouble, kUint64 };

  Member member;
  uint64_t number;  // bool, int64 (two's complement), uint64
  std::string_view text;

  int64_t integer() const { return static_cast<int64_t>(number); }
};

// A parameter that cannot be accepted, or (expectation == nullptr) none. The first one found is kept; its message is
// written when the model's name is known.
struct ParameterFault {
  const char* expectation = nullptr;
  const char* side = nullptr;  // "input", "output"; nullptr: a parameter of the request
  std::string_view tensor;
  std::string_view parameter;

  void Set(const char* expected, std::string_view name) {
    if (expectation) return;
    expectation = expected;
    parameter = name;
  }
};

class RequestParameters {
 public:
  // Reads one entry of the map.
  protobuf::Fault Add(std::string_view entry, int depth);

  // Whether there is anything to judge.
  bool any() const { return seen_ != 0 || any_without_value_ || any_reserved_; }

  // Fills the fields of *out that parameters decide. `body` is the whole message, which has been read.
  void Judge(std::string_view body, ParsedRequest* out, ParameterFault* fault) const;

 private:
  enum Name : uint8_t {
    kPriority,
    kTimeout,
    kStickyKey,
    kSequenceId,
    kSequenceStart,
    kSequenceEnd,
    kEmptyFinalResponse,
    kNames,  // how many
  };
  static constexpr std::string_view kTexts[kNames] = {
      "priority",
      "timeout",
      "sticky_key",
      "sequence_id",
      "sequence_start",
      "sequence_end",
      "triton_enable_empty_final_response",
  };

  const Parameter* given(Name name) const { return seen_ >> name & 1 ? &values_[name] : nullptr; }

  uint32_t seen_ = 0;  // bit: Name; the others' values are not initialised
  bool any_without_value_ = false;
  bool any_reserved_ = false;
  std::string_view reserved_;
  Parameter values_[kNames];
};

class TensorParameters {
 public:
  protobuf::Fault Add(std::string_view entry, int depth);

  bool uses_shared_memory() const { return seen_ & (1u << kRegion | 1u << kOffset | 1u << kByteSize); }
  bool has_classification() const { return seen_ >> kClassification & 1; }

  // On an input, `classification` is anybody's own parameter.
  void JudgeInput(std::string_view tensor, ParameterFault* fault) const {
    if (seen_ != 0) Judge("input", false, tensor, fault);
  }
  void JudgeOutput(std::string_view tensor, ParameterFault* fault) const {
    if (seen_ != 0) Judge("output", true, tensor, fault);
  }

 private:
  enum Name : uint8_t { kRegion, kOffset, kByteSize, kClassification, kNames };
  static constexpr std::string_view kTexts[kNames] = {"shared_memory_region", "shared_memory_offset",
                                                      "shared_memory_byte_size", "classification"};

  void Judge(const char* side, bool classifies, std::string_view tensor, ParameterFault* fault) const;

  uint32_t seen_ = 0;  // as above
  Parameter values_[kNames];
};

}  // namespace tidegate
