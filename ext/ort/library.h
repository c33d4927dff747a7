// ONNX Runtime's shared library and the process's one environment, opened once and never closed.
//
// Threads    Open: any, one at a time (it locks). Everything else: any, after a successful Open; constant from then on.
// Owner      The process. Sessions end after main's statics on some paths (an interpreter that exits with a model
//            loaded), so neither the environment nor the library is ever released.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "ort/abi.h"
#include "util/status.h"

namespace tidegate::ort {

// REQUIRES: Library::Open has succeeded, here and below.
const Api& api();

class Library {
 public:
  // Opens the library at `path` and makes the environment, whose log goes to util/log.h. The same path again is a
  // no-op, another path is refused: two runtimes in one process would each have their own threads and arenas. With
  // record_calls every call through the table is counted, for the test that no declared slot goes unexercised.
  static Status Open(const std::string& path, bool record_calls = false);

  // Null before a successful Open.
  static const Library* Get();

  OrtEnv* env() const { return env_; }
  const std::string& version() const { return version_; }
  const std::vector<std::string>& providers() const { return providers_; }
  OrtAllocator* allocator() const { return allocator_; }  // of the heap; for names and strings
  const OrtMemoryInfo* cpu_memory() const { return cpu_memory_; }

  // Calls through slot `number` so far; 0 when they are not recorded.
  static uint64_t calls(int number);

 private:
  Status Load(const std::string& path, bool record_calls);

  std::string path_;
  std::string version_;
  std::vector<std::string> providers_;
  OrtEnv* env_ = nullptr;
  OrtAllocator* allocator_ = nullptr;
  const OrtMemoryInfo* cpu_memory_ = nullptr;
};

// Makes a Status of what a call returned and releases it. The message has passed CleanMessage.
Status ToStatus(OrtStatus* status, Reason reason);

// The runtime's message as a client may read it: one line, at most kMaxMessage bytes, valid text, no path and no source
// location. Names of graph nodes, which often begin with a slash, stay. `folders` are cut out wherever they stand in
// front of a file's name: blanks in a folder's name hide where a path ends.
inline constexpr size_t kMaxMessage = 512;
std::string CleanMessage(std::string_view message, const std::vector<std::string>& folders = {});

// One owner per handle.
template <auto kMember>
struct Releaser {
  template <typename T>
  void operator()(T* handle) const {
    (api().*kMember)(handle);
  }
};
using SessionHandle = std::unique_ptr<OrtSession, Releaser<&Api::ReleaseSession>>;
using SessionOptionsHandle = std::unique_ptr<OrtSessionOptions, Releaser<&Api::ReleaseSessionOptions>>;
using RunOptionsHandle = std::unique_ptr<OrtRunOptions, Releaser<&Api::ReleaseRunOptions>>;
using ValueHandle = std::unique_ptr<OrtValue, Releaser<&Api::ReleaseValue>>;
using BindingHandle = std::unique_ptr<OrtIoBinding, Releaser<&Api::ReleaseIoBinding>>;
using MemoryInfoHandle = std::unique_ptr<OrtMemoryInfo, Releaser<&Api::ReleaseMemoryInfo>>;
using AllocatorHandle = std::unique_ptr<OrtAllocator, Releaser<&Api::ReleaseAllocator>>;
using TypeInfoHandle = std::unique_ptr<OrtTypeInfo, Releaser<&Api::ReleaseTypeInfo>>;
using TensorInfoHandle = std::unique_ptr<OrtTensorInfo, Releaser<&Api::ReleaseTensorTypeAndShapeInfo>>;
using MetadataHandle = std::unique_ptr<OrtModelMetadata, Releaser<&Api::ReleaseModelMetadata>>;
using CudaOptionsHandle = std::unique_ptr<OrtCudaOptions, Releaser<&Api::ReleaseCudaOptions>>;
using TensorRtOptionsHandle = std::unique_ptr<OrtTensorRtOptions, Releaser<&Api::ReleaseTensorRtOptions>>;

// For functions that return Status: ends them when a call of the table fails.
#define TIDEGATE_ORT_TRY(call, reason)                                               \
  do {                                                                               \
    if (::tidegate::ort::OrtStatus* tried = (call); tried != nullptr) [[unlikely]] { \
      return ::tidegate::ort::ToStatus(tried, reason);                               \
    }                                                                                \
  } while (false)

}  // namespace tidegate::ort
