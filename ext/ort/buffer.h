// Host memory that tensors are staged in: aligned, growing, never moved while bound values point to it.
//
// Threads    One at a time: an instance's executor.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdlib>
#include <utility>

#include "ort/library.h"
#include "util/status.h"

namespace tidegate {

class Buffer {
 public:
  // A cache line, and the widest vector register.
  static constexpr size_t kAlignment = 64;
  // Half a TiB: no tensor of a request is that large, so more is a mistake in a shape.
  static constexpr size_t kMost = size_t{1} << 39;

  // `allocator` null: the heap. Otherwise page-locked memory, for instance; it must outlive the buffer.
  explicit Buffer(ort::OrtAllocator* allocator = nullptr) : allocator_(allocator) {}
  ~Buffer() { Free(); }
  Buffer(Buffer&& other) noexcept
      : allocator_(other.allocator_),
        data_(std::exchange(other.data_, nullptr)),
        capacity_(std::exchange(other.capacity_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(allocator_, other.allocator_);
    std::swap(data_, other.data_);
    std::swap(capacity_, other.capacity_);
    return *this;
  }

  std::byte* data() const { return data_; }
  size_t capacity() const { return capacity_; }

  // Makes room for `bytes` (never none: a tensor without elements still needs an address). The content is lost when the
  // capacity changes; then *moved is set.
  Status Reserve(size_t bytes, bool* moved) {
    if (bytes <= capacity_ && data_ != nullptr) return Status::Ok();
    if (bytes > kMost) return TooLarge(bytes);
    const size_t wanted = bytes <= kAlignment ? kAlignment : (bytes + kAlignment - 1) / kAlignment * kAlignment;
    Free();
    *moved = true;
    if (allocator_ == nullptr) {
      data_ = static_cast<std::byte*>(std::aligned_alloc(kAlignment, wanted));
    } else {
      void* memory = nullptr;
      TIDEGATE_ORT_TRY(ort::api().AllocatorAlloc(allocator_, wanted, &memory), Reason::kInternal);
      data_ = static_cast<std::byte*>(memory);
    }
    if (data_ == nullptr) return TooLarge(bytes);
    capacity_ = wanted;
    return Status::Ok();
  }

  // The same with room to spare, so that shapes that creep up do not move it each time.
  Status Grow(size_t bytes, bool* moved) {
    if (bytes <= capacity_ && data_ != nullptr) return Status::Ok();
    return Reserve(bytes > kMost ? bytes : std::bit_ceil(bytes), moved);
  }

 private:
  static Status TooLarge(size_t bytes) {
    return Status::Error(Reason::kInternal, "no memory for a tensor buffer of " + std::to_string(bytes) + " bytes");
  }

  void Free() {
    if (allocator_ == nullptr) {
      std::free(data_);
    } else if (data_ != nullptr) {
      if (ort::OrtStatus* failed = ort::api().AllocatorFree(allocator_, data_)) ort::api().ReleaseStatus(failed);
    }
    data_ = nullptr;
    capacity_ = 0;
  }

  ort::OrtAllocator* allocator_;
  std::byte* data_ = nullptr;
  size_t capacity_ = 0;
};

}  // namespace tidegate
