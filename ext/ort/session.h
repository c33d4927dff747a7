// One ONNX Runtime session: a model, loaded and optimised for one device.
//
// Threads    Create: any; it works on a thread of its own at the lowest priority, so that a load takes only what
// serving
//            leaves. Everything else: any, constant after Create. Runs on one session may overlap (the runtime's
//            promise).
// Owner      shared_ptr: the instances that run it and the Python object that made it. The last one to go frees the
// model
//            and gives the heap back to the system; that takes milliseconds, so it is never an I/O or executor thread.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "infer/model_spec.h"
#include "ort/library.h"
#include "util/live.h"
#include "util/status.h"

namespace tidegate {

using Entries = std::vector<std::pair<std::string, std::string>>;

struct ProviderSettings {
  std::string name;  // e.g. CUDAExecutionProvider
  Entries options;
};

// server/settings.py says what each means.
struct SessionSettings {
  std::vector<ProviderSettings> providers;  // in order of preference; the CPU provider is always last
  int device_id = -1;                       // -1: CPU
  int intra_op_threads = 1;                 // 0: as wide as the machine
  int inter_op_threads = 1;
  bool parallel_execution = false;
  int graph_level = 99;
  bool cpu_mem_arena = true;
  bool mem_pattern = true;
  Entries config_entries;
  Entries run_config_entries;
  bool pinned_input = true;
  bool pinned_output = true;
};

// One input or output as the runtime reports it. No dimensions: a scalar, or a shape that is not known before a run
// (the runtime does not tell these apart).
struct TensorInfo {
  std::string name;
  int elem_type = 0;                 // ONNX TensorProto.DataType; 0: not a tensor
  std::vector<int64_t> dims;         // -1: free
  std::vector<std::string> symbols;  // per dimension, "" where it has no name
};

class Session {
 public:
  // kLoadFailed with the reason, which names the file but not where it lies.
  static Status Create(const std::string& path, SessionSettings settings, std::shared_ptr<Session>* out);

  ~Session();
  Session(const Session&) = delete;
  Session& operator=(const Session&) = delete;

  const SessionSettings& settings() const { return settings_; }
  const std::vector<TensorInfo>& inputs() const { return inputs_; }
  const std::vector<TensorInfo>& outputs() const { return outputs_; }
  std::optional<std::string> CustomMetadata(const std::string& key) const;

  // Whether a run happens on a device with memory of its own, so that inputs are copied when they are bound.
  bool on_device() const { return settings_.device_id >= 0; }
  // Whether page-locked host memory is to be had: CUDA's providers have it.
  bool has_pinned_memory() const { return has_pinned_memory_; }
  ort::OrtSession* handle() const { return handle_.get(); }

 private:
  class PoolThreads;

  explicit Session(SessionSettings settings);
  Status Load(const std::string& path);
  Status SetOptions(ort::OrtSessionOptions* options);
  Status AppendProviders(ort::OrtSessionOptions* options);
  Status ReadTensors();

  const SessionSettings settings_;
  bool has_pinned_memory_ = false;
  std::vector<TensorInfo> inputs_;
  std::vector<TensorInfo> outputs_;
  std::unique_ptr<PoolThreads> pool_threads_;  // outlives handle_, which joins them
  ort::SessionHandle handle_;
  LiveCounted<LiveKind::kSession> live_;
};

// Adds one provider to session options: what Session does, and how a configuration is tried out without a model.
Status AppendProvider(ort::OrtSessionOptions* options, const std::string& name, const Entries& entries);

// Whether the library accepts this provider and its options here (its libraries and its device are found).
Status TryProvider(const std::string& name, const Entries& entries);

// A shape for a person to read: "[-1,3]".
std::string ShowDims(std::span<const int64_t> dims);

// Names every difference between what a configuration promises and what the model has. kLoadFailed, or ok.
Status CheckSpec(const Session& session, const ModelSpec& spec);

}  // namespace tidegate
