#include "ort/instance.h"

#include <algorithm>
#include <cstring>
#include <optional>

#include "ort/buffer.h"
#include "util/clock.h"
#include "util/live.h"

namespace tidegate {
namespace {

using ort::api;
using ort::Library;

// Bytes of strings that a cached binding may keep for reuse. Beyond it the strings go after the run: a cache of large
// requests' contents would have no bound worth the name.
constexpr size_t kKeptStringBytes = 64 << 10;

Status Raised(ort::OrtStatus* failed) { return ort::ToStatus(failed, Reason::kModelRaised); }

Status Bug(const std::string& what) { return Status::Error(Reason::kInternal, what); }

// The n-th free dimension on the wire is the n-th free dimension of the model.
Dims Translate(const Dims& from_spec, const Dims& to_spec, const Dims& actual) {
  Dims to = to_spec;
  uint8_t at = 0;
  for (uint8_t i = 0; i < to.rank; ++i) {
    if (to.d[i] != -1) continue;
    while (at < from_spec.rank && from_spec.d[at] != -1) ++at;
    if (at == from_spec.rank) break;
    to.d[i] = actual.d[at++];
  }
  return to;
}

bool BytesOf(DataType type, const Dims& dims, size_t* bytes) {
  int64_t count = 0;
  return ElementCount(dims.span(), &count) &&
         !__builtin_mul_overflow(static_cast<size_t>(count), ElementBytes(type), bytes);
}

// Made once per shapes and row count.
struct Entry {
  uint32_t rows = 0;
  uint64_t last_used = 0;
  ort::BindingHandle binding;
  std::vector<ort::ValueHandle> inputs;
  std::vector<size_t> input_bytes;     // of the whole batch; 0 for BYTES
  std::vector<int64_t> input_strings;  // elements of the whole batch; 0 for numeric types
  std::vector<ort::ValueHandle> outputs;  // null where the runtime decides
  std::vector<OutputView> views;          // complete for prepared outputs, filled after each run for the others
};

struct Bucket {
  std::vector<Dims> shapes;  // of the inputs on the wire, the batch dimension as 0
  uint64_t last_used = 0;
  // Side by side for a quick search; entries[i].rows == rows[i].
  std::vector<uint32_t> rows;
  std::vector<std::unique_ptr<Entry>> entries;
};

// What a BYTES output is turned into, reused.
struct WireStrings {
  std::vector<char> content;    // all strings without lengths, as the runtime gives them
  std::vector<size_t> begins;   // of each in content
  std::vector<std::byte> wire;  // lengths and strings
  std::vector<size_t> offsets;  // of each in wire, and the end
};

class OrtInstance final : public Instance {
 public:
  OrtInstance(std::shared_ptr<Session> session, const ModelSpec& spec) : session_(std::move(session)), spec_(spec) {}

  ~OrtInstance() override {
    // Before the session, which made them, and before the buffers, which they point to.
    unprepared_.clear();
    buckets_.clear();
  }

  Status Prepare();
  Status Run(std::span<Request* const> requests, uint32_t rows, RunTimes* times) override;
  std::span<const OutputView> outputs() const override {
    return current_ ? std::span<const OutputView>(current_->views) : std::span<const OutputView>();
  }
  size_t memory_bytes() const override;
  void Terminate() override {
    // Stays set: a run that has not begun yet must end too.
    if (ort::OrtStatus* failed = api().RunOptionsSetTerminate(run_options_.get())) api().ReleaseStatus(failed);
  }

 private:
  bool batches() const { return spec_.max_batch_size > 0; }
  bool IsPrepared(size_t output) const { return prepared_[output]; }

  Status FindEntry(const Request& first, uint32_t rows, Entry** entry);
  Status MakeEntry(const Request& first, uint32_t rows, Entry* entry);
  Status MakeInput(size_t index, const Dims& dims, Entry* entry);
  Status MakeOutput(size_t index, uint32_t rows, Entry* entry);
  Bucket* FindBucket(const Request& first);
  void DropBindings();

  Status Gather(std::span<Request* const> requests, Entry* entry);
  Status GatherStrings(std::span<Request* const> requests, size_t index, Entry* entry);
  Status RenewBinding(Entry* entry);
  Status ReadUnprepared(Entry* entry);
  Status ReadOutput(size_t index, ort::OrtValue* value, OutputView* view);
  Status ReadStrings(ort::OrtValue* value, size_t n_elements, WireStrings* strings, OutputView* view);
  Status RenewStrings(Entry* entry);

  // -- constant after Prepare ------------------------------------------------------------------------------------------
  const std::shared_ptr<Session> session_;
  const ModelSpec spec_;
  ort::MemoryInfoHandle pinned_memory_;
  ort::AllocatorHandle pinned_allocator_;
  const ort::OrtMemoryInfo* input_memory_ = nullptr;
  const ort::OrtMemoryInfo* output_memory_ = nullptr;
  ort::RunOptionsHandle run_options_;
  std::vector<size_t> numeric_inputs_;
  std::vector<size_t> string_inputs_;
  std::vector<bool> prepared_;               // per output: its shape is known before the run
  std::vector<size_t> unprepared_outputs_;
  std::vector<size_t> output_row_bytes_;

  // -- the executor's --------------------------------------------------------------------------------------------------
  std::vector<Buffer> input_buffers_;
  std::vector<Buffer> output_buffers_;
  std::vector<Bucket> buckets_;
  std::vector<Dims> key_;
  uint64_t clock_ = 0;
  Entry* current_ = nullptr;
  std::vector<ort::ValueHandle> unprepared_;  // outputs of the last run that the runtime made
  std::vector<WireStrings> wire_strings_;     // per output
  LiveCounted<LiveKind::kInstance> live_;
};

// -- making it --------------------------------------------------------------------------------------------------------

// Whether the model fixes every dimension of this output, so that its buffer can be bound before the run. A batch
// dimension counts as fixed only if it is the inputs' own: a free first dimension by another name is a result ("found").
bool HasKnownShape(const TensorInfo& info, const std::vector<TensorInfo>& inputs, bool batches) {
  if (info.dims.empty()) return false;  // A scalar or an unknown shape: the runtime does not say which.
  for (size_t i = 0; i < info.dims.size(); ++i) {
    if (info.dims[i] >= 0) continue;
    if (!batches || i != 0) return false;
    const bool is_batch =
        info.symbols[0].empty() || std::any_of(inputs.begin(), inputs.end(), [&](const TensorInfo& input) {
          return !input.symbols.empty() && input.symbols[0] == info.symbols[0];
        });
    if (!is_batch) return false;
  }
  return true;
}

Status OrtInstance::Prepare() {
  constexpr Reason kReason = Reason::kLoadFailed;
  const SessionSettings& settings = session_->settings();

  input_memory_ = output_memory_ = Library::Get()->cpu_memory();
  if (session_->has_pinned_memory() && (settings.pinned_input || settings.pinned_output)) {
    ort::OrtMemoryInfo* memory = nullptr;
    TIDEGATE_ORT_TRY(api().CreateMemoryInfo("CudaPinned", ort::kDeviceAllocator, settings.device_id,
                                            ort::kCpuOutputMemory, &memory),
                     kReason);
    pinned_memory_.reset(memory);
    ort::OrtAllocator* allocator = nullptr;
    TIDEGATE_ORT_TRY(api().CreateAllocator(session_->handle(), memory, &allocator), kReason);
    pinned_allocator_.reset(allocator);
    if (settings.pinned_input) input_memory_ = memory;
    if (settings.pinned_output) output_memory_ = memory;
  }
  const auto allocator_for = [&](const ort::OrtMemoryInfo* memory) {
    return memory == pinned_memory_.get() ? pinned_allocator_.get() : nullptr;
  };

  ort::OrtRunOptions* run_options = nullptr;
  TIDEGATE_ORT_TRY(api().CreateRunOptions(&run_options), kReason);
  run_options_.reset(run_options);
  for (const auto& [key, value] : settings.run_config_entries) {
    TIDEGATE_ORT_TRY(api().AddRunConfigEntry(run_options, key.c_str(), value.c_str()), kReason);
  }

  const uint32_t most_rows = batches() ? spec_.max_batch_size : 1;
  const auto reserve = [&](const TensorSpec& tensor, Buffer* buffer) {
    Dims dims = tensor.model_dims;
    if (batches()) dims.d[0] = most_rows;
    size_t bytes = 0;
    bool moved = false;
    const bool is_free = std::count(dims.span().begin(), dims.span().end(), -1) > 0;
    if (is_free || tensor.type == DataType::kBytes) return Status::Ok();
    if (!BytesOf(tensor.type, dims, &bytes)) {
      return Status::Error(kReason, "tensor '" + tensor.name + "' is too large to have a buffer");
    }
    Status status = buffer->Reserve(bytes, &moved);
    if (!status.ok()) status.reason = kReason;
    return status;
  };
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    (spec_.inputs[i].type == DataType::kBytes ? string_inputs_ : numeric_inputs_).push_back(i);
    input_buffers_.emplace_back(allocator_for(input_memory_));
    if (Status status = reserve(spec_.inputs[i], &input_buffers_.back()); !status.ok()) return status;
  }
  for (size_t i = 0; i < spec_.outputs.size(); ++i) {
    const TensorSpec& tensor = spec_.outputs[i];
    const auto info = std::find_if(session_->outputs().begin(), session_->outputs().end(),
                                   [&](const TensorInfo& output) { return output.name == tensor.name; });
    prepared_.push_back(tensor.type != DataType::kBytes &&
                        HasKnownShape(*info, session_->inputs(), batches()));
    output_buffers_.emplace_back(allocator_for(output_memory_));
    if (!prepared_.back()) {
      unprepared_outputs_.push_back(i);
    } else if (Status status = reserve(tensor, &output_buffers_.back()); !status.ok()) {
      return status;
    }
  }
  wire_strings_.resize(spec_.outputs.size());
  return Status::Ok();
}

size_t OrtInstance::memory_bytes() const {
  size_t bytes = 0;
  for (const Buffer& buffer : input_buffers_) bytes += buffer.capacity();
  for (const Buffer& buffer : output_buffers_) bytes += buffer.capacity();
  for (const WireStrings& strings : wire_strings_) {
    bytes += strings.content.capacity() + strings.wire.capacity() +
             (strings.begins.capacity() + strings.offsets.capacity()) * sizeof(size_t);
  }
  return bytes;
}

// -- bindings ---------------------------------------------------------------------------------------------------------

void OrtInstance::DropBindings() {
  current_ = nullptr;
  buckets_.clear();
}

Bucket* OrtInstance::FindBucket(const Request& first) {
  key_.clear();
  if (spec_.has_free_dims) {
    for (const InputView& input : first.inputs) {
      key_.push_back(input.dims);
      if (batches()) key_.back().d[0] = 0;
    }
  }
  for (Bucket& bucket : buckets_) {
    if (bucket.shapes == key_) return &bucket;
  }
  if (buckets_.size() == kMaxShapeBuckets) {
    const auto oldest = std::min_element(buckets_.begin(), buckets_.end(), [](const Bucket& a, const Bucket& b) {
      return a.last_used < b.last_used;
    });
    buckets_.erase(oldest);
  }
  buckets_.push_back(Bucket{.shapes = key_, .last_used = 0, .rows = {}, .entries = {}});
  return &buckets_.back();
}

Status OrtInstance::FindEntry(const Request& first, uint32_t rows, Entry** entry) {
  ++clock_;
  Bucket* bucket = FindBucket(first);
  bucket->last_used = clock_;
  const auto at = std::find(bucket->rows.begin(), bucket->rows.end(), rows);
  if (at != bucket->rows.end()) {
    *entry = bucket->entries[at - bucket->rows.begin()].get();
    (*entry)->last_used = clock_;
    return Status::Ok();
  }

  // Buffers first: when one moves, every binding made so far points to memory that is gone.
  auto made = std::make_unique<Entry>();
  made->rows = rows;
  made->last_used = clock_;
  bool moved = false;
  for (size_t i : numeric_inputs_) {
    Dims dims = Translate(spec_.inputs[i].dims, spec_.inputs[i].model_dims, first.inputs[i].dims);
    if (batches()) dims.d[0] = rows;
    size_t bytes = 0;
    if (!BytesOf(spec_.inputs[i].type, dims, &bytes)) return Bug("input '" + spec_.inputs[i].name + "' is too large");
    if (input_buffers_[i].capacity() >= bytes && input_buffers_[i].data() != nullptr) continue;
    DropBindings();
    if (Status status = input_buffers_[i].Grow(bytes, &moved); !status.ok()) return status;
  }
  if (moved) {
    bucket = FindBucket(first);
    bucket->last_used = clock_;
  }
  if (Status status = MakeEntry(first, rows, made.get()); !status.ok()) return status;
  if (bucket->entries.size() == kMaxBindingsPerBucket) {
    const auto oldest = std::min_element(bucket->entries.begin(), bucket->entries.end(),
                                         [](const auto& a, const auto& b) { return a->last_used < b->last_used; });
    bucket->rows.erase(bucket->rows.begin() + (oldest - bucket->entries.begin()));
    bucket->entries.erase(oldest);
  }
  bucket->rows.push_back(rows);
  bucket->entries.push_back(std::move(made));
  *entry = bucket->entries.back().get();
  return Status::Ok();
}

Status OrtInstance::MakeEntry(const Request& first, uint32_t rows, Entry* entry) {
  ort::OrtIoBinding* binding = nullptr;
  TIDEGATE_ORT_TRY(api().CreateIoBinding(session_->handle(), &binding), Reason::kModelRaised);
  entry->binding.reset(binding);
  entry->inputs.resize(spec_.inputs.size());
  entry->input_bytes.assign(spec_.inputs.size(), 0);
  entry->input_strings.assign(spec_.inputs.size(), 0);
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    Dims dims = Translate(spec_.inputs[i].dims, spec_.inputs[i].model_dims, first.inputs[i].dims);
    if (batches()) dims.d[0] = rows;
    if (Status status = MakeInput(i, dims, entry); !status.ok()) return status;
  }
  entry->outputs.resize(spec_.outputs.size());
  entry->views.resize(spec_.outputs.size());
  for (size_t i = 0; i < spec_.outputs.size(); ++i) {
    if (Status status = MakeOutput(i, rows, entry); !status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::MakeInput(size_t index, const Dims& dims, Entry* entry) {
  const TensorSpec& spec = spec_.inputs[index];
  ort::OrtValue* value = nullptr;
  if (spec.type == DataType::kBytes) {
    if (!ElementCount(dims.span(), &entry->input_strings[index])) return Bug("input '" + spec.name + "' is too large");
    TIDEGATE_ORT_TRY(api().CreateTensorAsOrtValue(Library::Get()->allocator(), dims.d.data(), dims.rank,
                                                  static_cast<int>(spec.type), &value),
                     Reason::kModelRaised);
  } else {
    if (!BytesOf(spec.type, dims, &entry->input_bytes[index])) return Bug("input '" + spec.name + "' is too large");
    TIDEGATE_ORT_TRY(
        api().CreateTensorWithDataAsOrtValue(input_memory_, input_buffers_[index].data(), entry->input_bytes[index],
                                             dims.d.data(), dims.rank, static_cast<int>(spec.type), &value),
        Reason::kModelRaised);
  }
  entry->inputs[index].reset(value);
  return Raised(api().BindInput(entry->binding.get(), spec.name.c_str(), value));
}

Status OrtInstance::MakeOutput(size_t index, uint32_t rows, Entry* entry) {
  const TensorSpec& spec = spec_.outputs[index];
  entry->views[index].type = spec.type;
  if (!IsPrepared(index)) return Status::Ok();  // RenewBinding does it, before each run.
  Dims dims = spec.model_dims;
  Dims wire_dims = spec.dims;
  if (batches()) dims.d[0] = wire_dims.d[0] = rows;
  size_t bytes = 0;
  if (!BytesOf(spec.type, dims, &bytes)) return Bug("output '" + spec.name + "' is too large");
  ort::OrtValue* value = nullptr;
  TIDEGATE_ORT_TRY(api().CreateTensorWithDataAsOrtValue(output_memory_, output_buffers_[index].data(), bytes,
                                                        dims.d.data(), dims.rank, static_cast<int>(spec.type), &value),
                   Reason::kModelRaised);
  entry->outputs[index].reset(value);
  entry->views[index].dims = wire_dims;
  entry->views[index].data = output_buffers_[index].data();
  entry->views[index].bytes = bytes;
  return Raised(api().BindOutput(entry->binding.get(), spec.name.c_str(), value));
}

// -- the run ----------------------------------------------------------------------------------------------------------

Status OrtInstance::Run(std::span<Request* const> requests, uint32_t rows, RunTimes* times) {
  times->input_done_ns = times->infer_done_ns = 0;
  current_ = nullptr;
  unprepared_.clear();
  const auto failed = [times](Status status) {
    times->infer_done_ns = NowNs();
    if (times->input_done_ns == 0) times->input_done_ns = times->infer_done_ns;
    return status;
  };

  if (requests.empty() || rows == 0 || rows > std::max(spec_.max_batch_size, 1u) ||
      requests[0]->inputs.size() != spec_.inputs.size()) {
    return failed(Bug("a batch does not fit its model"));
  }
  Entry* entry = nullptr;
  if (Status status = FindEntry(*requests[0], rows, &entry); !status.ok()) return failed(std::move(status));
  if (Status status = Gather(requests, entry); !status.ok()) return failed(std::move(status));
  if (Status status = RenewBinding(entry); !status.ok()) return failed(std::move(status));
  times->input_done_ns = NowNs();

  Status status = Raised(api().RunWithBinding(session_->handle(), run_options_.get(), entry->binding.get()));
  if (status.ok() && session_->on_device()) status = Raised(api().SynchronizeBoundOutputs(entry->binding.get()));
  times->infer_done_ns = NowNs();
  if (!string_inputs_.empty()) {
    if (Status renewed = RenewStrings(entry); status.ok()) status = std::move(renewed);
  }
  if (status.ok() && !unprepared_outputs_.empty()) status = ReadUnprepared(entry);
  if (status.ok()) current_ = entry;
  return status;
}

Status OrtInstance::Gather(std::span<Request* const> requests, Entry* entry) {
  for (size_t i : numeric_inputs_) {
    // The requests were checked one by one; this is what stands between a mistake there and memory that is not ours.
    size_t bytes = 0;
    for (const Request* request : requests) bytes += request->inputs[i].bytes;
    if (bytes != entry->input_bytes[i]) return Bug("input '" + spec_.inputs[i].name + "' does not fill its batch");
    GatherInput(requests, i, input_buffers_[i].data());
  }
  for (size_t i : string_inputs_) {
    if (Status status = GatherStrings(requests, i, entry); !status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::GatherStrings(std::span<Request* const> requests, size_t index, Entry* entry) {
  const std::string& name = spec_.inputs[index].name;
  const auto n_elements = static_cast<size_t>(entry->input_strings[index]);
  size_t element = 0;
  for (const Request* request : requests) {
    const std::byte* at = request->inputs[index].data;
    size_t left = request->inputs[index].bytes;
    while (left > 0) {
      uint32_t length = 0;
      if (left < sizeof length || element == n_elements) return Bug("input '" + name + "' does not fill its batch");
      std::memcpy(&length, at, sizeof length);
      at += sizeof length;
      left -= sizeof length;
      if (length > left) return Bug("input '" + name + "' has a string past its end");
      char* to = nullptr;
      TIDEGATE_ORT_TRY(api().GetResizedStringTensorElementBuffer(entry->inputs[index].get(), element, length, &to),
                       Reason::kModelRaised);
      std::memcpy(to, at, length);
      at += length;
      left -= length;
      ++element;
    }
  }
  if (element != n_elements) return Bug("input '" + name + "' does not fill its batch");
  return Status::Ok();
}

// Replaces string values that grew large with empty ones, so that the cache of bindings stays small.
Status OrtInstance::RenewStrings(Entry* entry) {
  for (size_t i : string_inputs_) {
    size_t bytes = 0;
    TIDEGATE_ORT_TRY(api().GetStringTensorDataLength(entry->inputs[i].get(), &bytes), Reason::kModelRaised);
    if (bytes <= kKeptStringBytes) continue;
    for (int64_t element = 0; element < entry->input_strings[i]; ++element) {
    }
  }
  return Status::Ok();
}

Status OrtInstance::RenewBinding(Entry* entry) {
  if (session_->on_device()) {
    // Binding is what copies an input to the device; a binding kept from the last run holds the last run's rows.
    for (size_t i = 0; i < spec_.inputs.size(); ++i) {
      TIDEGATE_ORT_TRY(api().BindInput(entry->binding.get(), spec_.inputs[i].name.c_str(), entry->inputs[i].get()),
                       Reason::kModelRaised);
    }
    TIDEGATE_ORT_TRY(api().SynchronizeBoundInputs(entry->binding.get()), Reason::kModelRaised);
  }
  // The runtime takes a value left from the last run for a prepared buffer of that shape.
  for (size_t i : unprepared_outputs_) {
    const ort::OrtMemoryInfo* memory =
        spec_.outputs[i].type == DataType::kBytes ? Library::Get()->cpu_memory() : output_memory_;
    TIDEGATE_ORT_TRY(api().BindOutputToDevice(entry->binding.get(), spec_.outputs[i].name.c_str(), memory),
                     Reason::kModelRaised);
  }
  return Status::Ok();
}

}  // namespace
}  // namespace tidegate
