#include "infer/contents.h"

#include <algorithm>
#include <cstring>

namespace tidegate {

using namespace protobuf;

Fault CheckRun(ContentsField field, std::string_view run) {
  switch (field) {
    case kFp32Contents: return run.size() % 4 == 0 ? nullptr : kBadPacked;
    case kFp64Contents: return run.size() % 8 == 0 ? nullptr : kBadPacked;
    case kBytesContents: return nullptr;
    default: break;
  }
  uint64_t value = 0;
  for (Cursor at = Begin(run); at < End(run);) {
    at = ReadVarint(at, End(run), &value);
    if (!at) return kBadPacked;
  }
  return nullptr;
}

size_t ValuesIn(ContentsField field, std::string_view run) {
  switch (field) {
    case kFp32Contents: return run.size() / 4;
    case kFp64Contents: return run.size() / 8;
    case kBytesContents: return 1;
    // Each number ends with its one byte below 0x80.
    default: return static_cast<size_t>(std::count_if(run.begin(), run.end(), [](char c) { return c >= 0; }));
  }
}

namespace {

// Writes a run of numbers as elements of type To, read as the field's type From. False when one does not fit; *value.
template <typename From, typename To>
bool PutNumbers(std::string_view run, std::byte** to, int64_t* value) {
  for (Cursor at = Begin(run); at < End(run);) {
    uint64_t number = 0;
    at = ReadVarint(at, End(run), &number);
    const From from = static_cast<From>(number);
    const To element = static_cast<To>(from);
    if (static_cast<From>(element) != from) [[unlikely]] {
      *value = static_cast<int64_t>(from);
      return false;
    }
    std::memcpy(*to, &element, sizeof element);
    *to += sizeof element;
  }
  return true;
}

}  // namespace

bool PutRun(DataType type, std::string_view run, std::byte** to, int64_t* value) {
  switch (type) {
    case DataType::kBool: return PutNumbers<bool, bool>(run, to, value);
    case DataType::kInt8: return PutNumbers<int32_t, int8_t>(run, to, value);
    case DataType::kInt16: return PutNumbers<int32_t, int16_t>(run, to, value);
    case DataType::kInt32: return PutNumbers<int32_t, int32_t>(run, to, value);
    case DataType::kInt64: return PutNumbers<int64_t, int64_t>(run, to, value);
    case DataType::kUint8: return PutNumbers<uint32_t, uint8_t>(run, to, value);
    case DataType::kUint16: return PutNumbers<uint32_t, uint16_t>(run, to, value);
    case DataType::kUint32: return PutNumbers<uint32_t, uint32_t>(run, to, value);
    case DataType::kUint64: return PutNumbers<uint64_t, uint64_t>(run, to, value);
    case DataType::kBytes: {
      const auto length = static_cast<uint32_t>(run.size());
      std::memcpy(*to, &length, sizeof length);
      *to += sizeof length;
      [[fallthrough]];
    }
    case DataType::kFp32:
    case DataType::kFp64:
      if (!run.empty()) std::memcpy(*to, run.data(), run.size());
      *to += run.size();
      return true;
    case DataType::kFp16:
    case DataType::kBf16:
    case DataType::kInvalid: return true;
  }
  return true;
}

}  // namespace tidegate
