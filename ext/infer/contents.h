// Typed contents (InferTensorContents): reading them, and turning them into the raw form.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string_view>

#include "infer/protobuf.h"
#include "infer/tensor.h"

namespace tidegate {

// The fields of InferTensorContents by number.
enum ContentsField : uint8_t {
  kNoContents = 0,
  kBoolContents = 1,
  kIntContents = 2,
  kInt64Contents = 3,
  kUintContents = 4,
  kUint64Contents = 5,
  kFp32Contents = 6,
  kFp64Contents = 7,
  kBytesContents = 8,
};
inline constexpr std::string_view kContentsNames[] = {"raw_input_contents", "bool_contents", "int_contents",
                                                      "int64_contents",     "uint_contents", "uint64_contents",
                                                      "fp32_contents",      "fp64_contents", "bytes_contents"};

// The field that holds elements of a type; kNoContents: there is none, they travel raw only.
constexpr ContentsField ContentsOf(DataType type) {
  switch (type) {
    case DataType::kBool: return kBoolContents;
    case DataType::kInt8:
    case DataType::kInt16:
    case DataType::kInt32: return kIntContents;
    case DataType::kInt64: return kInt64Contents;
    case DataType::kUint8:
    case DataType::kUint16:
    case DataType::kUint32: return kUintContents;
    case DataType::kUint64: return kUint64Contents;
    case DataType::kFp32: return kFp32Contents;
    case DataType::kFp64: return kFp64Contents;
    case DataType::kBytes: return kBytesContents;
    case DataType::kFp16:
    case DataType::kBf16:
    case DataType::kInvalid: return kNoContents;
  }
  return kNoContents;
}

constexpr protobuf::WireType ElementWireType(uint32_t field) {
  return field == kFp32Contents ? protobuf::kFixed32 : field == kFp64Contents ? protobuf::kFixed64 : protobuf::kVarint;
}

// Reads one InferTensorContents and shows its values as runs: (field, bytes of one or more values in a row, packed
// form). For bytes_contents a run is the one value. Stops when `visit` returns a fault, and returns it.
template <typename Visit>
protobuf::Fault VisitContents(std::string_view message, int depth, Visit&& visit) {
  using namespace protobuf;
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    const uint32_t field = tag >> 3;
    const uint32_t wire_type = tag & 7;
    const bool is_ours = field >= kBoolContents && field <= kBytesContents;
    if (is_ours && wire_type == kDelimited) {
      std::string_view run;
      at = ReadDelimited(at, end, &run);
      if (!at) return kBadLength;
      if (Fault fault = visit(static_cast<ContentsField>(field), run)) return fault;
    } else if (is_ours && field != kBytesContents && wire_type == ElementWireType(field)) {
      const Cursor value = at;
      at = SkipValue(at, end, tag, depth);
      if (!at) return kBadVarint;
      const std::string_view run(reinterpret_cast<const char*>(value), static_cast<size_t>(at - value));
      if (Fault fault = visit(static_cast<ContentsField>(field), run)) return fault;
    } else {
      at = SkipValue(at, end, tag, depth);
      if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

// Whether a run is made of whole values.
protobuf::Fault CheckRun(ContentsField field, std::string_view run);

// How many values a run has that CheckRun let through.
size_t ValuesIn(ContentsField field, std::string_view run);

// Writes the values of a run of ContentsOf(type) in raw form and moves *to behind them. False when one is not in the
// range of the type: it is *value then, and *to is where it would have been.
bool PutRun(DataType type, std::string_view run, std::byte** to, int64_t* value);

}  // namespace tidegate
