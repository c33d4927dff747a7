// Tensor types, shapes and their byte counts, with every overflow checked.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string_view>

namespace tidegate {

// Numbers are ONNX's TensorProto.DataType, which ONNX Runtime's element types share for these.
enum class DataType : uint8_t {
  kInvalid = 0,
  kFp32 = 1,
  kUint8 = 2,
  kInt8 = 3,
  kUint16 = 4,
  kInt16 = 5,
  kInt32 = 6,
  kInt64 = 7,
  kBytes = 8,
  kBool = 9,
  kFp16 = 10,
  kFp64 = 11,
  kUint32 = 12,
  kUint64 = 13,
  kBf16 = 16,
};

// Bytes of one element; 0 for BYTES, whose elements carry their own length, and for kInvalid.
constexpr size_t ElementBytes(DataType type) {
  switch (type) {
    case DataType::kUint8:
    case DataType::kInt8:
    case DataType::kBool: return 1;
    case DataType::kUint16:
    case DataType::kInt16:
    case DataType::kFp16:
    case DataType::kBf16: return 2;
    case DataType::kFp32:
    case DataType::kInt32:
    case DataType::kUint32: return 4;
    case DataType::kInt64:
    case DataType::kUint64:
    case DataType::kFp64: return 8;
    case DataType::kBytes:
    case DataType::kInvalid: return 0;
  }
  return 0;
}

// The name used by the Open Inference Protocol ("FP32", "BYTES"); "" for kInvalid.
constexpr std::string_view WireName(DataType type) {
  switch (type) {
    case DataType::kFp32: return "FP32";
    case DataType::kUint8: return "UINT8";
    case DataType::kInt8: return "INT8";
    case DataType::kUint16: return "UINT16";
    case DataType::kInt16: return "INT16";
    case DataType::kInt32: return "INT32";
    case DataType::kInt64: return "INT64";
    case DataType::kBytes: return "BYTES";
    case DataType::kBool: return "BOOL";
    case DataType::kFp16: return "FP16";
    case DataType::kFp64: return "FP64";
    case DataType::kUint32: return "UINT32";
    case DataType::kUint64: return "UINT64";
    case DataType::kBf16: return "BF16";
    case DataType::kInvalid: return "";
  }
  return "";
}

// The most dimensions a tensor may have here. Eight holds every model we know of; a model with more is refused at load.
inline constexpr int kMaxRank = 8;

struct Dims {
  uint8_t rank = 0;
  std::array<int64_t, kMaxRank> d{};

  std::span<const int64_t> span() const { return {d.data(), rank}; }
  bool operator==(const Dims& other) const {
    return rank == other.rank && std::memcmp(d.data(), other.d.data(), rank * sizeof(int64_t)) == 0;
  }
};

// The product of the dimensions from `first` on. False on a negative dimension or when it does not fit in int64.
constexpr bool ElementCount(std::span<const int64_t> dims, int64_t* count) {
  int64_t product = 1;
  bool zero = false;
  for (int64_t dim : dims) {
    if (dim < 0) return false;
    if (dim == 0) {
      zero = true;
      continue;
    }
    if (__builtin_mul_overflow(product, dim, &product)) return false;
  }
  *count = zero ? 0 : product;
  return true;
}

}  // namespace tidegate
