#include "ort/session.h"

#include <malloc.h>

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <filesystem>
#include <mutex>
#include <system_error>
#include <thread>

#include "util/scheduling.h"

namespace tidegate {

using ort::api;
using ort::Library;

namespace {

constexpr Reason kReason = Reason::kLoadFailed;

Status LoadFailed(std::string message) { return Status::Error(kReason, std::move(message)); }

std::string Join(const std::vector<std::string>& words) {
  std::string text;
  for (const std::string& word : words) text += (text.empty() ? "" : ", ") + word;
  return text;
}

// Keys and values as the runtime takes them; points into `entries`.
struct KeyValues {
  explicit KeyValues(const Entries& entries) {
    for (const auto& [key, value] : entries) {
      keys.push_back(key.c_str());
      values.push_back(value.c_str());
    }
  }
  std::vector<const char*> keys;
  std::vector<const char*> values;
};

bool HasKey(const Entries& entries, std::string_view key) {
  return std::any_of(entries.begin(), entries.end(), [&](const auto& entry) { return entry.first == key; });
}

Status AppendCuda(ort::OrtSessionOptions* options, const Entries& entries) {
  ort::OrtCudaOptions* raw = nullptr;
  TIDEGATE_ORT_TRY(api().CreateCudaOptions(&raw), kReason);
  const ort::CudaOptionsHandle cuda(raw);
  const KeyValues kv(entries);
  TIDEGATE_ORT_TRY(api().UpdateCudaOptions(cuda.get(), kv.keys.data(), kv.values.data(), kv.keys.size()), kReason);
  return ort::ToStatus(api().AppendCuda(options, cuda.get()), kReason);
}

Status AppendTensorRt(ort::OrtSessionOptions* options, const Entries& entries) {
  ort::OrtTensorRtOptions* raw = nullptr;
  TIDEGATE_ORT_TRY(api().CreateTensorRtOptions(&raw), kReason);
  const ort::TensorRtOptionsHandle tensor_rt(raw);
  const KeyValues kv(entries);
  TIDEGATE_ORT_TRY(api().UpdateTensorRtOptions(tensor_rt.get(), kv.keys.data(), kv.values.data(), kv.keys.size()),
                   kReason);
  return ort::ToStatus(api().AppendTensorRt(options, tensor_rt.get()), kReason);
}

// Providers without a function of their own go by a short name there: "XNNPACK" for XNNPACKExecutionProvider. One is
// spelled differently.
std::string ShortName(const std::string& name) {
  constexpr std::string_view kSuffix = "ExecutionProvider";
  if (name == "AzureExecutionProvider") return "AZURE";
  return name.ends_with(kSuffix) ? name.substr(0, name.size() - kSuffix.size()) : name;
}

}  // namespace

Status AppendProvider(ort::OrtSessionOptions* options, const std::string& name, const Entries& entries) {
  if (name == "CUDAExecutionProvider") return AppendCuda(options, entries);
  if (name == "TensorrtExecutionProvider") return AppendTensorRt(options, entries);
  const KeyValues kv(entries);
  return ort::ToStatus(
      api().AppendProvider(options, ShortName(name).c_str(), kv.keys.data(), kv.values.data(), kv.keys.size()),
      kReason);
}

Status TryProvider(const std::string& name, const Entries& entries) {
  ort::OrtSessionOptions* raw = nullptr;
  TIDEGATE_ORT_TRY(api().CreateSessionOptions(&raw), kReason);
  const ort::SessionOptionsHandle options(raw);
  return AppendProvider(options.get(), name, entries);
}

// Makes the threads of the runtime's pools for a session that is loaded at low priority.
//
// A thread inherits its maker's nice value and, without privileges, can never get a better one: pools made by the
// loading thread would compute at the lowest priority for as long as the model serves. So they are made by the thread
// that waits for the load, which is at normal priority.
class Session::PoolThreads {
 public:
  Status Install(ort::OrtSessionOptions* options) {
    TIDEGATE_ORT_TRY(api().SetCustomThreadOptions(options, this), kReason);
    TIDEGATE_ORT_TRY(api().SetCustomCreateThread(options, &PoolThreads::Create), kReason);
    return ort::ToStatus(api().SetCustomJoinThread(options, &PoolThreads::Join), kReason);
  }

  // The waiting thread: makes what is asked for until Done.
  void Serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return done_ || asked_; });
      if (!asked_) return;
      made_ = Make(body_, argument_);
      asked_ = false;
      answered_ = true;
      changed_.notify_all();
    }
  }

  // The loading thread, at its end.
  void Done() {
    std::lock_guard lock(mutex_);
    done_ = true;
    changed_.notify_all();
  }

 private:
  static std::thread* Make(ort::ThreadBody* body, void* argument) {
    try {
      return new std::thread(body, argument);
    } catch (const std::exception&) {
      return nullptr;  // The runtime turns this into the error of the load.
    }
  }

  static const ort::OrtThread* Create(void* self, ort::ThreadBody* body, void* argument) {
    auto* threads = static_cast<PoolThreads*>(self);
    std::unique_lock lock(threads->mutex_);
    if (threads->done_) return reinterpret_cast<const ort::OrtThread*>(Make(body, argument));
    // Several threads may ask at once; each waits its turn.
    threads->changed_.wait(lock, [&] { return !threads->asked_ && !threads->answered_; });
    threads->body_ = body;
    threads->argument_ = argument;
    threads->asked_ = true;
    threads->changed_.notify_all();
    threads->changed_.wait(lock, [&] { return threads->answered_; });
    threads->answered_ = false;
    threads->changed_.notify_all();
    return reinterpret_cast<const ort::OrtThread*>(threads->made_);
  }

  static void Join(const ort::OrtThread* handle) {
    auto* thread = reinterpret_cast<std::thread*>(const_cast<ort::OrtThread*>(handle));
    if (thread == nullptr) return;
    thread->join();
    delete thread;
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  // Guarded by mutex_.
  ort::ThreadBody* body_ = nullptr;
  void* argument_ = nullptr;
  bool asked_ = false;
  bool answered_ = false;
  bool done_ = false;
  std::thread* made_ = nullptr;
};

Session::Session(SessionSettings settings)
    : settings_(std::move(settings)), pool_threads_(std::make_unique<PoolThreads>()) {}

Session::~Session() {
  handle_.reset();
  // glibc keeps what was freed; without this a server that reloads a 90 MB model grows by half of it each time.
  malloc_trim(0);
}

Status Session::Create(const std::string& path, SessionSettings settings, std::shared_ptr<Session>* out) {
  if (Library::Get() == nullptr) return LoadFailed("ONNX Runtime is not open");
  std::shared_ptr<Session> session(new Session(std::move(settings)));
  Status status;
  std::thread loader;
  try {
    loader = std::thread([&] {
      TakeLowestPriority();
      try {
        status = session->Load(path);
      } catch (const std::exception& error) {
        status = LoadFailed(std::string("the model cannot be loaded: ") + error.what());
      }
      session->pool_threads_->Done();
    });
  } catch (const std::system_error& error) {
    return LoadFailed(std::string("no thread to load the model on: ") + error.what());
  }
  session->pool_threads_->Serve();
  loader.join();
  if (!status.ok()) return status;
  *out = std::move(session);
  return Status::Ok();
}

Status Session::Load(const std::string& path) {
  ort::OrtSessionOptions* raw_options = nullptr;
  TIDEGATE_ORT_TRY(api().CreateSessionOptions(&raw_options), kReason);
  const ort::SessionOptionsHandle options(raw_options);
  if (Status status = SetOptions(options.get()); !status.ok()) return status;
  if (Status status = AppendProviders(options.get()); !status.ok()) return status;
  if (Status status = pool_threads_->Install(options.get()); !status.ok()) return status;

  ort::OrtSession* raw = nullptr;
  if (ort::OrtStatus* failed = api().CreateSession(Library::Get()->env(), path.c_str(), options.get(), &raw)) {
    // The runtime names the file by its whole path, sometimes resolved; the caller knows which model it asked for.
    std::error_code unresolved;  // Then the path as given is all there is to cut out.
    const std::filesystem::path given(path);
    const std::filesystem::path resolved = std::filesystem::weakly_canonical(given, unresolved);
    const std::string message = ort::CleanMessage(api().GetErrorMessage(failed),
                                                  {given.parent_path().string(), resolved.parent_path().string()});
    api().ReleaseStatus(failed);
    return LoadFailed("ONNX Runtime refused the model: " + message);
  }
  handle_.reset(raw);
  return ReadTensors();
}

Status Session::SetOptions(ort::OrtSessionOptions* options) {
  if (settings_.intra_op_threads < 0 || settings_.inter_op_threads < 0) {
    return LoadFailed("thread counts are 0 (as many as the machine has cores) or more");
  }
  constexpr int kGraphLevels[] = {0, 1, 2, 3, 99};
  if (std::find(std::begin(kGraphLevels), std::end(kGraphLevels), settings_.graph_level) == std::end(kGraphLevels)) {
    return LoadFailed("graph optimisation level " + std::to_string(settings_.graph_level) +
                      " does not exist; levels are 0, 1, 2, 3 and 99");
  }
  TIDEGATE_ORT_TRY(api().SetIntraOpNumThreads(options, settings_.intra_op_threads), kReason);
  TIDEGATE_ORT_TRY(api().SetInterOpNumThreads(options, settings_.inter_op_threads), kReason);
  TIDEGATE_ORT_TRY(
      api().SetSessionExecutionMode(options, settings_.parallel_execution ? ort::kParallel : ort::kSequential),
      kReason);
  TIDEGATE_ORT_TRY(api().SetSessionGraphOptimizationLevel(options, settings_.graph_level), kReason);
  TIDEGATE_ORT_TRY(settings_.cpu_mem_arena ? api().EnableCpuMemArena(options) : api().DisableCpuMemArena(options),
                   kReason);
  TIDEGATE_ORT_TRY(settings_.mem_pattern ? api().EnableMemPattern(options) : api().DisableMemPattern(options), kReason);

  // Pool threads that spin between runs take the cores of the front end and of other models.
  for (const char* key : {"session.intra_op.allow_spinning", "session.inter_op.allow_spinning"}) {
    if (!HasKey(settings_.config_entries, key)) {
      TIDEGATE_ORT_TRY(api().AddSessionConfigEntry(options, key, "0"), kReason);
    }
  }
  for (const auto& [key, value] : settings_.config_entries) {
    TIDEGATE_ORT_TRY(api().AddSessionConfigEntry(options, key.c_str(), value.c_str()), kReason);
  }
  return Status::Ok();
}

Status Session::AppendProviders(ort::OrtSessionOptions* options) {
  const std::vector<std::string>& offered = Library::Get()->providers();
  for (const ProviderSettings& provider : settings_.providers) {
    if (std::find(offered.begin(), offered.end(), provider.name) == offered.end()) {
      return LoadFailed("execution provider '" + provider.name + "' is not in the installed ONNX Runtime " +
                        Library::Get()->version() + "; it offers " + Join(offered));
    }
    if (provider.name == "CPUExecutionProvider") {
      // Always there, always last; the options it knows are session settings.
      if (!provider.options.empty()) return LoadFailed("CPUExecutionProvider takes no options");
      continue;
    }
    const bool is_cuda = provider.name == "CUDAExecutionProvider" || provider.name == "TensorrtExecutionProvider";
    Entries entries = provider.options;
    if (is_cuda && settings_.device_id >= 0 && !HasKey(entries, "device_id")) {
      entries.emplace_back("device_id", std::to_string(settings_.device_id));
    }
    has_pinned_memory_ |= is_cuda && settings_.device_id >= 0;
    if (Status status = AppendProvider(options, provider.name, entries); !status.ok()) {
      return LoadFailed("execution provider '" + provider.name + "': " + status.message);
    }
  }
  return Status::Ok();
}

namespace {

Status ReadTensor(const ort::OrtTypeInfo* type, TensorInfo* info) {
  const ort::OrtTensorInfo* tensor = nullptr;
  TIDEGATE_ORT_TRY(api().CastTypeInfoToTensorInfo(type, &tensor), kReason);
  if (tensor == nullptr) return Status::Ok();  // a sequence, a map: elem_type stays 0
  TIDEGATE_ORT_TRY(api().GetTensorElementType(tensor, &info->elem_type), kReason);
  size_t rank = 0;
  TIDEGATE_ORT_TRY(api().GetDimensionsCount(tensor, &rank), kReason);
  info->dims.resize(rank);
  std::vector<const char*> symbols(rank, nullptr);
  TIDEGATE_ORT_TRY(api().GetDimensions(tensor, info->dims.data(), rank), kReason);
  TIDEGATE_ORT_TRY(api().GetSymbolicDimensions(tensor, symbols.data(), rank), kReason);
  for (const char* symbol : symbols) info->symbols.emplace_back(symbol ? symbol : "");
  return Status::Ok();
}

template <typename CountFn, typename NameFn, typename TypeFn>
Status ReadSide(ort::OrtSession* session, CountFn count, NameFn name, TypeFn type, std::vector<TensorInfo>* infos) {
  ort::OrtAllocator* allocator = Library::Get()->allocator();
  size_t n = 0;
  TIDEGATE_ORT_TRY(count(session, &n), kReason);
  for (size_t i = 0; i < n; ++i) {
    TensorInfo info;
    char* text = nullptr;
    TIDEGATE_ORT_TRY(name(session, i, allocator, &text), kReason);
    info.name = text;
    TIDEGATE_ORT_TRY(api().AllocatorFree(allocator, text), kReason);
    ort::OrtTypeInfo* raw = nullptr;
    TIDEGATE_ORT_TRY(type(session, i, &raw), kReason);
    const ort::TypeInfoHandle handle(raw);
    if (Status status = ReadTensor(handle.get(), &info); !status.ok()) return status;
    infos->push_back(std::move(info));
  }
  return Status::Ok();
}

}  // namespace

Status Session::ReadTensors() {
  if (Status status = ReadSide(handle(), api().SessionGetInputCount, api().SessionGetInputName,
                               api().SessionGetInputTypeInfo, &inputs_);
      !status.ok()) {
    return status;
  }
  return ReadSide(handle(), api().SessionGetOutputCount, api().SessionGetOutputName, api().SessionGetOutputTypeInfo,
                  &outputs_);
}

std::optional<std::string> Session::CustomMetadata(const std::string& key) const {
  ort::OrtAllocator* allocator = Library::Get()->allocator();
  ort::OrtModelMetadata* raw = nullptr;
  if (ort::OrtStatus* failed = api().SessionGetModelMetadata(handle(), &raw)) {
    api().ReleaseStatus(failed);
    return std::nullopt;
  }
  const ort::MetadataHandle metadata(raw);
  char* value = nullptr;
  if (ort::OrtStatus* failed =
          api().ModelMetadataLookupCustomMetadataMap(metadata.get(), allocator, key.c_str(), &value)) {
    api().ReleaseStatus(failed);
    return std::nullopt;
  }
  if (value == nullptr) return std::nullopt;
  std::string found = value;
  if (ort::OrtStatus* failed = api().AllocatorFree(allocator, value)) api().ReleaseStatus(failed);
  return found;
}

std::string ShowDims(std::span<const int64_t> dims) {
  std::string text = "[";
  for (int64_t dim : dims) text += (text.size() == 1 ? "" : ",") + std::to_string(dim);
  return text + "]";
}

namespace {

std::string TypeName(int elem_type) {
  if (elem_type == 0) return "not a tensor";
  const std::string_view name = WireName(static_cast<DataType>(elem_type));
  return name.empty() ? "ONNX element type " + std::to_string(elem_type) : std::string(name);
}

const TensorInfo* Find(const std::vector<TensorInfo>& infos, const std::string& name) {
  const auto found =
      std::find_if(infos.begin(), infos.end(), [&](const TensorInfo& info) { return info.name == name; });
  return found == infos.end() ? nullptr : &*found;
}

// The product of the fixed dimensions, which a reshape must keep.
bool FixedCount(const Dims& dims, int64_t* count) {
  Dims fixed;
  for (int64_t dim : dims.span()) {
    if (dim >= 0) fixed.d[fixed.rank++] = dim;
  }
  return ElementCount(fixed.span(), count);
}

// What is wrong with one tensor of the configuration; "" when nothing is.
std::string TensorFault(const TensorSpec& spec, const TensorInfo& info, bool batches) {
  if (static_cast<int>(spec.type) != info.elem_type) {
    return "is configured as " + TypeName(static_cast<int>(spec.type)) + " but the model has " +
           TypeName(info.elem_type);
  }
  if (WireName(spec.type).empty()) return "has " + TypeName(info.elem_type) + ", which cannot be served";

  const std::span<const int64_t> dims = spec.model_dims.span();
  const auto configured = [&] {
    return "is configured as " + ShowDims(dims) + " but the model has " + ShowDims(info.dims);
  };
  // No dimensions in the model's file: the shape may be anything, runs will tell.
  if (!info.dims.empty()) {
    if (dims.size() != info.dims.size()) return configured() + ": ranks differ";
    for (size_t i = 0; i < dims.size(); ++i) {
      if (info.dims[i] >= 0 && dims[i] != info.dims[i]) {
        if (batches && i == 0) {
          return configured() + ": the first dimension is fixed, so the model cannot batch; set max_batch_size to 0";
        }
        return configured();
      }
    }
  }
  if (batches) {
    for (const Dims* shape : {&spec.dims, &spec.model_dims}) {
      if (shape->rank == 0 || shape->d[0] != -1) {
        return "is configured as " + ShowDims(shape->span()) + ": the batch dimension -1 must come first";
      }
    }
  }
  const auto n_free = [](const Dims& shape) { return std::count(shape.span().begin(), shape.span().end(), -1); };
  int64_t wire_count = 0;
  int64_t model_count = 0;
  if (n_free(spec.dims) != n_free(spec.model_dims) || !FixedCount(spec.dims, &wire_count) ||
      !FixedCount(spec.model_dims, &model_count) || wire_count != model_count) {
    return "is reshaped from " + ShowDims(spec.dims.span()) + " to " + ShowDims(dims) +
           ": both need as many free dimensions and as many elements";
  }
  return "";
}

void CheckSide(const char* side, const std::vector<TensorSpec>& specs, const std::vector<TensorInfo>& infos,
               bool batches, std::vector<std::string>* faults) {
  for (const TensorSpec& spec : specs) {
    const std::string what = std::string(side) + " '" + spec.name + "' ";
    const TensorInfo* info = Find(infos, spec.name);
    if (info == nullptr) {
      std::vector<std::string> names;
      for (const TensorInfo& known : infos) names.push_back("'" + known.name + "'");
      faults->push_back(what + "is not in the model, which has " + Join(names));
    } else if (std::string fault = TensorFault(spec, *info, batches); !fault.empty()) {
      faults->push_back(what + fault);
    }
    if (std::count_if(specs.begin(), specs.end(), [&](const TensorSpec& other) { return other.name == spec.name; }) >
        1) {
      faults->push_back(what + "is configured twice");
    }
  }
}

}  // namespace

Status CheckSpec(const Session& session, const ModelSpec& spec) {
  const bool batches = spec.max_batch_size > 0;
  std::vector<std::string> faults;
  CheckSide("input", spec.inputs, session.inputs(), batches, &faults);
  CheckSide("output", spec.outputs, session.outputs(), batches, &faults);
  for (const TensorInfo& info : session.inputs()) {
    const bool configured = std::any_of(spec.inputs.begin(), spec.inputs.end(),
                                        [&](const TensorSpec& input) { return input.name == info.name; });
    if (!configured) faults.push_back("input '" + info.name + "' of the model is not configured");
  }
  if (spec.outputs.empty()) faults.push_back("no output is configured");
  if (spec.inputs.size() > kMaxInputs) faults.push_back("more than " + std::to_string(kMaxInputs) + " inputs");
  if (spec.outputs.size() > kMaxOutputs) faults.push_back("more than " + std::to_string(kMaxOutputs) + " outputs");
  if (faults.empty()) return Status::Ok();
  std::string message;
  for (const std::string& fault : faults) message += (message.empty() ? "" : "; ") + fault;
  return LoadFailed(std::move(message));
}

}  // namespace tidegate
