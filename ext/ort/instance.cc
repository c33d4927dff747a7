#include "ort/instance.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "ort/buffer.h"
#include "util/clock.h"
#include "util/live.h"

namespace tidegate {
namespace {

using ort::api;
using ort::Library;

// Bytes that the BYTES tensors of a cached binding, or of an output, may keep for reuse. Beyond it they go after the
// run: a cache of large requests' contents would have no bound worth the name.
constexpr size_t kKeptStringBytes = 64 << 10;

// What a string of the runtime takes without its content.
constexpr size_t kStringObjectBytes = 32;

// Up to this max_batch_size a binding is found by its row count in one step. A table of a byte per row count.
constexpr uint32_t kMaxIndexedRows = 4096;
static_assert(kMaxBindingsPerBucket <= std::numeric_limits<uint8_t>::max());

Status Raised(ort::OrtStatus* failed) { return ort::ToStatus(failed, Reason::kModelRaised); }

Status Bug(const std::string& what) { return Status::Error(Reason::kInternal, what); }

Status OutputInvalid(const TensorSpec& spec, const std::string& what) {
  return Status::Error(Reason::kModelOutputInvalid, "output '" + spec.name + "' " + what);
}

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

bool Fits(const Dims& spec, const Dims& actual) {
  if (spec.rank != actual.rank) return false;
  for (uint8_t i = 0; i < spec.rank; ++i) {
    if (spec.d[i] != -1 && spec.d[i] != actual.d[i]) return false;
  }
  return true;
}

// Whether two tensors may lie in one batch.
bool SameRows(const Dims& a, const Dims& b, bool batches) {
  const size_t first = batches ? 1 : 0;
  return a.rank == b.rank &&
         std::equal(a.d.begin() + first, a.d.begin() + std::max<size_t>(a.rank, first), b.d.begin() + first);
}

struct BoundInput {
  ort::ValueHandle value;   // BYTES: null until its strings come, and again once they were large
  Dims dims;                // as the runtime has them, for the whole batch
  size_t bytes = 0;         // 0 for BYTES
  size_t n_strings = 0;     // 0 for numeric types
  size_t string_bytes = 0;  // an upper bound of what the strings of `value` hold
};

// Made once per shapes and row count.
struct Entry {
  uint32_t rows = 0;
  uint64_t last_used = 0;
  ort::BindingHandle binding;
  bool has_inputs = false;  // the values of `inputs` are in the binding
  std::vector<BoundInput> inputs;
  std::vector<ort::ValueHandle> outputs;  // null where the runtime decides
  std::vector<OutputView> views;          // complete for prepared outputs, filled after each run for the others
};

struct Bucket {
  std::vector<Dims> shapes;  // of the inputs on the wire, the batch dimension as 0
  uint64_t last_used = 0;
  std::vector<std::unique_ptr<Entry>> entries;  // at most kMaxBindingsPerBucket, in no order
  // By row count, 1 + where it is in entries; 0: nowhere. Empty when max_batch_size is above kMaxIndexedRows.
  std::vector<uint8_t> index;

  Entry* Find(uint32_t rows) const {
    if (!index.empty()) return index[rows] == 0 ? nullptr : entries[index[rows] - 1].get();
    const auto at =
        std::find_if(entries.begin(), entries.end(), [&](const auto& entry) { return entry->rows == rows; });
    return at == entries.end() ? nullptr : at->get();
  }

  // Takes the place of the entry that was used least recently when there are too many.
  Entry* Put(std::unique_ptr<Entry> entry) {
    size_t at = entries.size();
    if (at < kMaxBindingsPerBucket) {
      entries.emplace_back();
    } else {
      at = std::min_element(entries.begin(), entries.end(),
                            [](const auto& a, const auto& b) { return a->last_used < b->last_used; }) -
           entries.begin();
      if (!index.empty()) index[entries[at]->rows] = 0;
    }
    if (!index.empty()) index[entry->rows] = static_cast<uint8_t>(at + 1);
    entries[at] = std::move(entry);
    return entries[at].get();
  }
};

// What a BYTES output is turned into, reused.
struct WireStrings {
  Buffer wire;                  // lengths and strings
  std::vector<size_t> offsets;  // of each element in wire, and the end
};

class OrtInstance final : public Instance {
 public:
  OrtInstance(std::shared_ptr<Session> session, const ModelSpec& spec) : session_(std::move(session)), spec_(spec) {}

  ~OrtInstance() override {
    // Before the session, which made them, and before the buffers, which they point to.
    run_outputs_.clear();
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

  Dims InputDims(size_t index, const Request& first, uint32_t rows) const;
  Status FindEntry(const Request& first, uint32_t rows, Entry** entry);
  Status MakeEntry(const Request& first, uint32_t rows, Entry* entry);
  Status MakeInput(size_t index, BoundInput* input);
  Status MakeOutput(size_t index, uint32_t rows, Entry* entry);
  Bucket* FindBucket(const Request& first);
  void DropBindings();

  Status CheckBatch(std::span<Request* const> requests, uint32_t rows) const;
  Status Gather(std::span<Request* const> requests, Entry* entry);
  Status GatherStrings(std::span<Request* const> requests, size_t index, BoundInput* input);
  Status BindInputs(Entry* entry);
  void DropInputs(Entry* entry);
  Status BindUnprepared(size_t index, Entry* entry);
  Status RenewUnprepared(Entry* entry);
  Status ReadUnprepared(Entry* entry);
  Status ReadOutput(size_t index, ort::OrtValue* value, OutputView* view);
  Status ReadStrings(const TensorSpec& spec, ort::OrtValue* value, size_t n_elements, WireStrings* strings,
                     OutputView* view);

  // -- constant after Prepare
  // ------------------------------------------------------------------------------------------
  const std::shared_ptr<Session> session_;
  const ModelSpec spec_;
  ort::MemoryInfoHandle pinned_memory_;
  ort::AllocatorHandle pinned_allocator_;
  const ort::OrtMemoryInfo* input_memory_ = nullptr;
  const ort::OrtMemoryInfo* output_memory_ = nullptr;
  ort::RunOptionsHandle run_options_;
  std::vector<size_t> numeric_inputs_;
  std::vector<size_t> string_inputs_;
  std::vector<bool> prepared_;  // per output: its shape is known before the run
  std::vector<size_t> unprepared_outputs_;

  // -- the executor's
  // --------------------------------------------------------------------------------------------------
  std::vector<Buffer> input_buffers_;
  std::vector<Buffer> output_buffers_;
  std::vector<Bucket> buckets_;
  std::vector<Dims> key_;
  uint64_t clock_ = 0;
  Entry* current_ = nullptr;
  std::vector<ort::ValueHandle> run_outputs_;  // of the last run, if the runtime made some of them
  std::vector<WireStrings> wire_strings_;      // per output
  LiveCounted<LiveKind::kInstance> live_;
};

// -- making it --------------------------------------------------------------------------------------------------------

// Whether the model fixes every dimension of this output, so that its buffer can be bound before the run. A batch
// dimension counts as fixed only if it is the inputs' own: a free first dimension by another name is a result
// ("found").
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
    TIDEGATE_ORT_TRY(
        api().CreateMemoryInfo("CudaPinned", ort::kDeviceAllocator, settings.device_id, ort::kCpuOutputMemory, &memory),
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
    prepared_.push_back(tensor.type != DataType::kBytes && HasKnownShape(*info, session_->inputs(), batches()));
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
    bytes += strings.wire.capacity() + strings.offsets.capacity() * sizeof(size_t);
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
    const auto oldest = std::min_element(buckets_.begin(), buckets_.end(),
                                         [](const Bucket& a, const Bucket& b) { return a.last_used < b.last_used; });
    buckets_.erase(oldest);
  }
  Bucket& bucket = buckets_.emplace_back();
  bucket.shapes = key_;
  const uint32_t most_rows = std::max(spec_.max_batch_size, 1u);
  if (most_rows <= kMaxIndexedRows) bucket.index.resize(most_rows + 1);
  return &bucket;
}

Dims OrtInstance::InputDims(size_t index, const Request& first, uint32_t rows) const {
  const TensorSpec& spec = spec_.inputs[index];
  Dims dims = Translate(spec.dims, spec.model_dims, first.inputs[index].dims);
  if (batches()) dims.d[0] = rows;
  return dims;
}

Status OrtInstance::FindEntry(const Request& first, uint32_t rows, Entry** entry) {
  ++clock_;
  Bucket* bucket = FindBucket(first);
  bucket->last_used = clock_;
  *entry = bucket->Find(rows);
  if (*entry != nullptr) {
    (*entry)->last_used = clock_;
    return Status::Ok();
  }

  // Buffers first: when one moves, every binding made so far points to memory that is gone.
  bool moved = false;
  for (size_t i : numeric_inputs_) {
    size_t bytes = 0;
    if (!BytesOf(spec_.inputs[i].type, InputDims(i, first, rows), &bytes)) {
      return Bug("input '" + spec_.inputs[i].name + "' is too large");
    }
    if (input_buffers_[i].capacity() >= bytes && input_buffers_[i].data() != nullptr) continue;
    DropBindings();
    if (Status status = input_buffers_[i].Grow(bytes, &moved); !status.ok()) return status;
  }
  if (moved) {
    bucket = FindBucket(first);
    bucket->last_used = clock_;
  }
  auto made = std::make_unique<Entry>();
  made->rows = rows;
  made->last_used = clock_;
  if (Status status = MakeEntry(first, rows, made.get()); !status.ok()) return status;
  *entry = bucket->Put(std::move(made));
  return Status::Ok();
}

Status OrtInstance::MakeEntry(const Request& first, uint32_t rows, Entry* entry) {
  ort::OrtIoBinding* binding = nullptr;
  TIDEGATE_ORT_TRY(api().CreateIoBinding(session_->handle(), &binding), Reason::kModelRaised);
  entry->binding.reset(binding);
  entry->inputs.resize(spec_.inputs.size());
  for (size_t i = 0; i < spec_.inputs.size(); ++i) {
    entry->inputs[i].dims = InputDims(i, first, rows);
    if (Status status = MakeInput(i, &entry->inputs[i]); !status.ok()) return status;
  }
  entry->outputs.resize(spec_.outputs.size());
  entry->views.resize(spec_.outputs.size());
  // In the spec's order: the runtime gives outputs back in the order in which they were first bound.
  for (size_t i = 0; i < spec_.outputs.size(); ++i) {
    Status status = prepared_[i] ? MakeOutput(i, rows, entry) : BindUnprepared(i, entry);
    if (!status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::MakeInput(size_t index, BoundInput* input) {
  const TensorSpec& spec = spec_.inputs[index];
  ort::OrtValue* value = nullptr;
  if (spec.type == DataType::kBytes) {
    int64_t n_strings = 0;
    if (!ElementCount(input->dims.span(), &n_strings)) return Bug("input '" + spec.name + "' is too large");
    TIDEGATE_ORT_TRY(api().CreateTensorAsOrtValue(Library::Get()->allocator(), input->dims.d.data(), input->dims.rank,
                                                  static_cast<int>(spec.type), &value),
                     Reason::kModelRaised);
    input->n_strings = static_cast<size_t>(n_strings);
    input->string_bytes = input->n_strings * kStringObjectBytes;
  } else {
    if (!BytesOf(spec.type, input->dims, &input->bytes)) return Bug("input '" + spec.name + "' is too large");
    TIDEGATE_ORT_TRY(api().CreateTensorWithDataAsOrtValue(input_memory_, input_buffers_[index].data(), input->bytes,
                                                          input->dims.d.data(), input->dims.rank,
                                                          static_cast<int>(spec.type), &value),
                     Reason::kModelRaised);
  }
  input->value.reset(value);
  return Status::Ok();
}

Status OrtInstance::MakeOutput(size_t index, uint32_t rows, Entry* entry) {
  const TensorSpec& spec = spec_.outputs[index];
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
  entry->views[index] = {.type = spec.type,
                         .dims = wire_dims,
                         .data = output_buffers_[index].data(),
                         .bytes = bytes,
                         .element_offsets = {}};
  return Raised(api().BindOutput(entry->binding.get(), spec.name.c_str(), value));
}

// -- the run ----------------------------------------------------------------------------------------------------------

Status OrtInstance::Run(std::span<Request* const> requests, uint32_t rows, RunTimes* times) {
  times->input_done_ns = times->infer_done_ns = 0;
  current_ = nullptr;
  run_outputs_.clear();
  const auto failed = [times](Status status) {
    times->infer_done_ns = NowNs();
    if (times->input_done_ns == 0) times->input_done_ns = times->infer_done_ns;
    return status;
  };

  if (Status status = CheckBatch(requests, rows); !status.ok()) return failed(std::move(status));
  Entry* entry = nullptr;
  if (Status status = FindEntry(*requests[0], rows, &entry); !status.ok()) return failed(std::move(status));
  if (Status status = Gather(requests, entry); !status.ok()) return failed(std::move(status));
  if (Status status = BindInputs(entry); !status.ok()) return failed(std::move(status));
  times->input_done_ns = NowNs();

  Status status = Raised(api().RunWithBinding(session_->handle(), run_options_.get(), entry->binding.get()));
  if (status.ok() && session_->on_device()) status = Raised(api().SynchronizeBoundOutputs(entry->binding.get()));
  times->infer_done_ns = NowNs();
  DropInputs(entry);
  if (!unprepared_outputs_.empty()) {
    if (status.ok()) status = ReadUnprepared(entry);
    if (Status renewed = RenewUnprepared(entry); status.ok()) status = std::move(renewed);
  }
  if (status.ok()) current_ = entry;
  return status;
}

// The requests were checked one by one; this is what stands between a mistake there, or two shapes with one hash, and
// memory that is not ours.
Status OrtInstance::CheckBatch(std::span<Request* const> requests, uint32_t rows) const {
  if (requests.empty() || rows == 0 || rows > std::max(spec_.max_batch_size, 1u)) {
    return Bug("a batch does not fit its model");
  }
  for (const Request* request : requests) {
    if (request->inputs.size() != spec_.inputs.size()) return Bug("a request does not fit its model");
  }
  if (!spec_.has_free_dims) return Status::Ok();
  for (const Request* request : requests.subspan(1)) {
    for (size_t i = 0; i < spec_.inputs.size(); ++i) {
      if (!SameRows(request->inputs[i].dims, requests[0]->inputs[i].dims, batches())) {
        return Bug("a batch mixes shapes of input '" + spec_.inputs[i].name + "'");
      }
    }
  }
  return Status::Ok();
}

Status OrtInstance::Gather(std::span<Request* const> requests, Entry* entry) {
  for (size_t i : numeric_inputs_) {
    size_t bytes = 0;
    for (const Request* request : requests) bytes += request->inputs[i].bytes;
    if (bytes != entry->inputs[i].bytes) return Bug("input '" + spec_.inputs[i].name + "' does not fill its batch");
    GatherInput(requests, i, input_buffers_[i].data());
  }
  for (size_t i : string_inputs_) {
    if (entry->inputs[i].value == nullptr) {
      if (Status status = MakeInput(i, &entry->inputs[i]); !status.ok()) return status;
    }
    if (Status status = GatherStrings(requests, i, &entry->inputs[i]); !status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::GatherStrings(std::span<Request* const> requests, size_t index, BoundInput* input) {
  const std::string& name = spec_.inputs[index].name;
  size_t element = 0;
  for (const Request* request : requests) {
    const std::byte* at = request->inputs[index].data;
    size_t left = request->inputs[index].bytes;
    while (left > 0) {
      uint32_t length = 0;
      if (left < sizeof length || element == input->n_strings)
        return Bug("input '" + name + "' does not fill its batch");
      std::memcpy(&length, at, sizeof length);
      at += sizeof length;
      left -= sizeof length;
      if (length > left) return Bug("input '" + name + "' has a string past its end");
      char* to = nullptr;
      TIDEGATE_ORT_TRY(api().GetResizedStringTensorElementBuffer(input->value.get(), element, length, &to),
                       Reason::kModelRaised);
      std::memcpy(to, at, length);
      at += length;
      left -= length;
      input->string_bytes += length;
      ++element;
    }
  }
  if (element != input->n_strings) return Bug("input '" + name + "' does not fill its batch");
  return Status::Ok();
}

Status OrtInstance::BindInputs(Entry* entry) {
  if (!entry->has_inputs) {
    for (size_t i = 0; i < spec_.inputs.size(); ++i) {
      TIDEGATE_ORT_TRY(
          api().BindInput(entry->binding.get(), spec_.inputs[i].name.c_str(), entry->inputs[i].value.get()),
          Reason::kModelRaised);
    }
    entry->has_inputs = true;
  }
  if (!session_->on_device()) return Status::Ok();
  return Raised(api().SynchronizeBoundInputs(entry->binding.get()));
}

// Takes out of the binding what must not stay there until its next run: on a device the copies of this run's rows,
// which binding makes; strings that have grown large.
void OrtInstance::DropInputs(Entry* entry) {
  bool is_stale = session_->on_device();
  for (size_t i : string_inputs_) {
    if (entry->inputs[i].string_bytes <= kKeptStringBytes) continue;
    entry->inputs[i].value.reset();
    is_stale = true;
  }
  if (!is_stale) return;
  api().ClearBoundInputs(entry->binding.get());
  entry->has_inputs = false;
}

// -- outputs that the runtime makes -----------------------------------------------------------------------------------

Status OrtInstance::BindUnprepared(size_t index, Entry* entry) {
  const TensorSpec& spec = spec_.outputs[index];
  const ort::OrtMemoryInfo* memory = spec.type == DataType::kBytes ? Library::Get()->cpu_memory() : output_memory_;
  return Raised(api().BindOutputToDevice(entry->binding.get(), spec.name.c_str(), memory));
}

// Takes the last run's outputs out of the binding: it would keep their memory until it is used again, and would then
// take them for buffers of the right shape.
Status OrtInstance::RenewUnprepared(Entry* entry) {
  for (size_t i : unprepared_outputs_) {
    if (Status status = BindUnprepared(i, entry); !status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::ReadUnprepared(Entry* entry) {
  ort::OrtAllocator* allocator = Library::Get()->allocator();
  ort::OrtValue** values = nullptr;
  size_t n_values = 0;
  TIDEGATE_ORT_TRY(api().GetBoundOutputValues(entry->binding.get(), allocator, &values, &n_values),
                   Reason::kModelRaised);
  for (size_t i = 0; i < n_values; ++i) run_outputs_.emplace_back(values[i]);
  TIDEGATE_ORT_TRY(api().AllocatorFree(allocator, values), Reason::kModelRaised);
  if (n_values != spec_.outputs.size()) return Bug("the runtime gave back another number of outputs than was bound");
  for (size_t i : unprepared_outputs_) {
    if (Status status = ReadOutput(i, run_outputs_[i].get(), &entry->views[i]); !status.ok()) return status;
  }
  return Status::Ok();
}

Status OrtInstance::ReadOutput(size_t index, ort::OrtValue* value, OutputView* view) {
  constexpr Reason kReason = Reason::kModelOutputInvalid;
  // An address for tensors without elements, which need not have one.
  static constexpr std::byte kNothing{};
  const TensorSpec& spec = spec_.outputs[index];
  *view = {.type = spec.type, .dims = {}, .data = &kNothing, .bytes = 0, .element_offsets = {}};

  ort::OrtTensorInfo* raw_info = nullptr;
  TIDEGATE_ORT_TRY(api().GetTensorTypeAndShape(value, &raw_info), kReason);
  const ort::TensorInfoHandle info(raw_info);
  int elem_type = 0;
  TIDEGATE_ORT_TRY(api().GetTensorElementType(info.get(), &elem_type), kReason);
  if (elem_type != static_cast<int>(spec.type)) {
    return OutputInvalid(spec, "came as ONNX element type " + std::to_string(elem_type) + " where " +
                                   std::string(WireName(spec.type)) + " was promised");
  }
  size_t rank = 0;
  TIDEGATE_ORT_TRY(api().GetDimensionsCount(info.get(), &rank), kReason);
  if (rank > kMaxRank) return OutputInvalid(spec, "came with " + std::to_string(rank) + " dimensions");
  Dims dims;
  dims.rank = static_cast<uint8_t>(rank);
  TIDEGATE_ORT_TRY(api().GetDimensions(info.get(), dims.d.data(), rank), kReason);
  // Whatever is read from here on is as long as these dimensions say, so they must be the promised ones.
  if (!Fits(spec.model_dims, dims)) {
    return OutputInvalid(
        spec, "came as " + ShowDims(dims.span()) + " where " + ShowDims(spec.model_dims.span()) + " was promised");
  }
  view->dims = Translate(spec.model_dims, spec.dims, dims);

  int64_t n_elements = 0;
  if (!ElementCount(dims.span(), &n_elements)) return OutputInvalid(spec, "is too large");
  if (spec.type == DataType::kBytes) {
    return ReadStrings(spec, value, static_cast<size_t>(n_elements), &wire_strings_[index], view);
  }
  if (n_elements == 0) return Status::Ok();
  void* data = nullptr;
  TIDEGATE_ORT_TRY(api().GetTensorMutableData(value, &data), kReason);
  view->data = static_cast<const std::byte*>(data);
  view->bytes = static_cast<size_t>(n_elements) * ElementBytes(spec.type);
  return Status::Ok();
}

Status OrtInstance::ReadStrings(const TensorSpec& spec, ort::OrtValue* value, size_t n_elements, WireStrings* strings,
                                OutputView* view) {
  constexpr Reason kReason = Reason::kModelOutputInvalid;
  size_t content_bytes = 0;
  if (n_elements > 0) TIDEGATE_ORT_TRY(api().GetStringTensorDataLength(value, &content_bytes), kReason);
  const size_t prefix_bytes = n_elements * sizeof(uint32_t);
  const size_t bytes = prefix_bytes + content_bytes;

  // A large answer once should not cost its memory for ever.
  if (strings->wire.capacity() > kKeptStringBytes && strings->wire.capacity() / 4 > bytes) *strings = WireStrings();
  bool moved = false;
  if (Status status = strings->wire.Grow(bytes, &moved); !status.ok()) return status;
  strings->offsets.resize(n_elements + 1);
  strings->offsets[n_elements] = bytes;
  std::byte* wire = strings->wire.data();
  if (n_elements > 0) {
    // All strings go to the end of the buffer, then each moves to its place behind its length: element i by the lengths
    // of those after it, so nothing is overwritten before it has moved.
    TIDEGATE_ORT_TRY(
        api().GetStringTensorContent(value, wire + prefix_bytes, content_bytes, strings->offsets.data(), n_elements),
        kReason);
  }
  for (size_t i = 0; i < n_elements; ++i) {
    const size_t begin = strings->offsets[i];
    const size_t end = i + 1 < n_elements ? strings->offsets[i + 1] : content_bytes;
    const size_t length = end - begin;
    if (length > std::numeric_limits<uint32_t>::max()) return OutputInvalid(spec, "has a string of 4 GiB or more");
    const auto prefix = static_cast<uint32_t>(length);
    strings->offsets[i] = begin + i * sizeof prefix;
    std::byte* to = wire + strings->offsets[i];
    std::memcpy(to, &prefix, sizeof prefix);
    std::memmove(to + sizeof prefix, wire + prefix_bytes + begin, length);
  }
  view->data = wire;
  view->bytes = bytes;
  view->element_offsets = strings->offsets;
  return Status::Ok();
}

}  // namespace

Status MakeOrtInstance(std::shared_ptr<Session> session, const ModelSpec& spec, std::unique_ptr<Instance>* out) {
  if (Status status = CheckSpec(*session, spec); !status.ok()) return status;
  auto instance = std::make_unique<OrtInstance>(std::move(session), spec);
  if (Status status = instance->Prepare(); !status.ok()) return status;
  *out = std::move(instance);
  return Status::Ok();
}

}  // namespace tidegate
