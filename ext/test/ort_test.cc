// ONNX Runtime through ext/ort, without Python: every declared slot, who allocates, instances on many threads.
//
// Run from the repository's root: the library is that of the environment there, or TIDEGATE_ORT_LIBRARY.

#include <glob.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <new>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "ort/buffer.h"
#include "ort/instance.h"
#include "ort/library.h"
#include "ort/session.h"
#include "test/check.h"
#include "util/live.h"
#include "util/utf8.h"

// -- allocations of this thread, the runtime's included ---------------------------------------------------------------

// AddressSanitizer brings its own operators and does not share.
#ifndef __SANITIZE_ADDRESS__
namespace {
thread_local uint64_t n_allocations = 0;

void* Allocate(size_t size, size_t alignment) {
  ++n_allocations;
  const size_t rounded = (std::max<size_t>(size, 1) + alignment - 1) / alignment * alignment;
  void* memory = alignment <= alignof(std::max_align_t) ? std::malloc(rounded) : std::aligned_alloc(alignment, rounded);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
}  // namespace

// Not inlined: the compiler takes malloc and delete in one function for a mistake.
#define TIDEGATE_REPLACES [[gnu::noinline]]
TIDEGATE_REPLACES void* operator new(size_t size) { return Allocate(size, 1); }
TIDEGATE_REPLACES void* operator new[](size_t size) { return Allocate(size, 1); }
TIDEGATE_REPLACES void* operator new(size_t size, std::align_val_t align) { return Allocate(size, size_t(align)); }
TIDEGATE_REPLACES void* operator new[](size_t size, std::align_val_t align) { return Allocate(size, size_t(align)); }
TIDEGATE_REPLACES void operator delete(void* memory) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete[](void* memory) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete(void* memory, size_t) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete[](void* memory, size_t) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete(void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
TIDEGATE_REPLACES void operator delete[](void* memory, size_t, std::align_val_t) noexcept { std::free(memory); }
#endif

namespace tidegate {
namespace {

using ort::api;
using ort::Library;

void CheckOk(const Status& status) {
  if (!status.ok()) test::Fail(__FILE__, __LINE__, status.message);
}

// Takes what a call returned; ends the test when it failed.
void Must(ort::OrtStatus* status) { CheckOk(ort::ToStatus(status, Reason::kInternal)); }

// Takes what a call returned, which must be an error that says this.
void Refused(ort::OrtStatus* status, std::string_view says) {
  CHECK(status != nullptr);
  const std::string message = ort::ToStatus(status, Reason::kInternal).message;
  if (message.find(says) == std::string::npos) test::Fail(__FILE__, __LINE__, message);
}

void OpenLibrary() {
  const char* named = std::getenv("TIDEGATE_ORT_LIBRARY");
  std::string path = named ? named : "";
  if (path.empty()) {
    glob_t found;
    if (glob(".venv/lib/python3*/site-packages/onnxruntime/capi/libonnxruntime.so.1.*", 0, nullptr, &found) == 0) {
      path = found.gl_pathv[found.gl_pathc - 1];
      globfree(&found);
    }
  }
  if (path.empty()) test::Fail(__FILE__, __LINE__, "no ONNX Runtime: run from the root, or set TIDEGATE_ORT_LIBRARY");
  CheckOk(Library::Open(path, /*record_calls=*/true));
}

// -- models: the few fields of ONNX's messages that these need --------------------------------------------------------
// ------------------------------------------------------------

std::string Varint(uint64_t value) {
  std::string out;
  for (; value >= 0x80; value >>= 7) out += static_cast<char>(value | 0x80);
  return out + static_cast<char>(value);
}
std::string Number(int field, uint64_t value) { return Varint(field << 3) + Varint(value); }
std::string Bytes(int field, const std::string& value) { return Varint(field << 3 | 2) + Varint(value.size()) + value; }

// A dimension is a number, or a name where it begins with a letter.
std::string ValueInfo(const std::string& name, DataType type, const std::vector<std::string>& dims) {
  std::string shape;
  for (const std::string& dim : dims) {
    shape += Bytes(1, dim[0] <= '9' ? Number(1, std::stoull(dim)) : Bytes(2, dim));
  }
  return Bytes(1, name) + Bytes(2, Bytes(1, Number(1, static_cast<uint64_t>(type)) + Bytes(2, shape)));
}

std::string Node(const std::string& op, const std::vector<std::string>& inputs, const std::string& output) {
  std::string node;
  for (const std::string& input : inputs) node += Bytes(1, input);
  return node + Bytes(2, output) + Bytes(4, op);
}

struct Tensor {
  std::string name;
  DataType type;
  std::vector<std::string> dims;
};

std::string Model(const std::vector<std::string>& nodes, const std::vector<Tensor>& inputs,
                  const std::vector<Tensor>& outputs) {
  std::string graph;
  for (const std::string& node : nodes) graph += Bytes(1, node);
  graph += Bytes(2, "test");
  for (const Tensor& input : inputs) graph += Bytes(11, ValueInfo(input.name, input.type, input.dims));
  for (const Tensor& output : outputs) graph += Bytes(12, ValueInfo(output.name, output.type, output.dims));
  return Number(1, 8) + Bytes(7, graph) + Bytes(8, Number(2, 17)) + Bytes(14, Bytes(1, "author") + Bytes(2, "nobody"));
}

// A file that goes when the test ends.
struct File {
  explicit File(const std::string& content) {
    std::string name = std::filesystem::temp_directory_path() / "ort_test_XXXXXX";
    const int fd = mkstemp(name.data());
    CHECK(fd >= 0);
    close(fd);
    path = name;
    std::ofstream(path, std::ios::binary) << content;
  }
  ~File() { std::filesystem::remove(path); }
  std::string path;
};

std::shared_ptr<Session> Open(const std::string& model, SessionSettings settings = {}) {
  OpenLibrary();
  const File file(model);
  std::shared_ptr<Session> session;
  CheckOk(Session::Create(file.path, std::move(settings), &session));
  return session;
}

// What the session has is what the configuration promises; a name is a free dimension.
ModelSpec SpecOf(const Session& session, uint32_t max_batch_size) {
  ModelSpec spec{.name = "test", .version = "1", .max_batch_size = max_batch_size, .inputs = {}, .outputs = {}};
  const auto add = [](const TensorInfo& info, std::vector<TensorSpec>* specs) {
    TensorSpec one{.name = info.name, .type = static_cast<DataType>(info.elem_type), .dims = {}, .model_dims = {}};
    for (int64_t dim : info.dims) one.dims.d[one.dims.rank++] = dim;
    one.model_dims = one.dims;
    specs->push_back(one);
  };
  for (const TensorInfo& info : session.inputs()) {
    add(info, &spec.inputs);
    const size_t first = max_batch_size > 0 ? 1 : 0;
    spec.has_free_dims |= std::count(info.dims.begin() + first, info.dims.end(), -1) > 0;
  }
  for (const TensorInfo& info : session.outputs()) add(info, &spec.outputs);
  return spec;
}

std::unique_ptr<Instance> Make(const std::shared_ptr<Session>& session, uint32_t max_batch_size) {
  std::unique_ptr<Instance> instance;
  CheckOk(MakeOrtInstance(session, SpecOf(*session, max_batch_size), &instance));
  return instance;
}

// One request whose inputs own their bytes.
struct Given {
  template <typename T>
  void Add(std::vector<int64_t> dims, const std::vector<T>& values) {
    const auto* data = reinterpret_cast<const std::byte*>(values.data());
    bytes.emplace_back(data, data + values.size() * sizeof(T));
    InputView view{.data = bytes.back().data(), .bytes = bytes.back().size(), .dims = {}};
    for (int64_t dim : dims) view.dims.d[view.dims.rank++] = dim;
    request.inputs.push_back(view);
  }
  std::vector<std::vector<std::byte>> bytes;
  Request request;
};

Status Run(Instance* instance, std::vector<Given>& given, uint32_t rows) {
  std::vector<Request*> requests;
  for (Given& one : given) requests.push_back(&one.request);
  RunTimes times;
  return instance->Run(requests, rows, &times);
}

std::vector<float> Floats(const OutputView& view) {
  std::vector<float> values(view.bytes / sizeof(float));
  std::memcpy(values.data(), view.data, view.bytes);
  return values;
}

std::string Negation() {
  return Model({Node("Neg", {"x"}, "y")}, {{"x", DataType::kFp32, {"batch", "4"}}},
               {{"y", DataType::kFp32, {"batch", "4"}}});
}

std::string FreeNegation() {
  return Model({Node("Neg", {"x"}, "y")}, {{"x", DataType::kFp32, {"batch", "n"}}},
               {{"y", DataType::kFp32, {"batch", "n"}}});
}

std::string Echo() {
  return Model({Node("Identity", {"x"}, "y")}, {{"x", DataType::kBytes, {"batch", "2"}}},
               {{"y", DataType::kBytes, {"batch", "2"}}});
}

// -- buffers ----------------------------------------------------------------------------------------------------------
// --------------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(a_buffer_is_aligned_and_moves_only_to_grow) {
  Buffer buffer;
  bool moved = false;
  CheckOk(buffer.Reserve(0, &moved));
  CHECK(moved && buffer.data() != nullptr);
  for (size_t bytes : {1u, 63u, 64u, 65u, 1000u}) {
    moved = false;
    const size_t before = buffer.capacity();
    CheckOk(buffer.Reserve(bytes, &moved));
    CHECK_EQ(moved, bytes > before);
    CHECK(buffer.capacity() >= bytes);
    CHECK_EQ(reinterpret_cast<uintptr_t>(buffer.data()) % Buffer::kAlignment, 0u);
    std::memset(buffer.data(), 1, buffer.capacity());
  }
  moved = false;
  CheckOk(buffer.Reserve(10, &moved));
  CHECK(!moved);
  CheckOk(buffer.Grow(1100, &moved));
  CHECK_EQ(buffer.capacity(), 2048u);
}

TIDEGATE_TEST(a_buffer_that_cannot_be_says_so_and_is_empty) {
  Buffer buffer;
  bool moved = false;
  CheckOk(buffer.Reserve(100, &moved));
  for (size_t bytes : {SIZE_MAX, SIZE_MAX - 100, Buffer::kMost + 1}) {
    const Status status = buffer.Grow(bytes, &moved);
    CHECK(!status.ok());
    CHECK(status.message.find("no memory for a tensor buffer") == 0);
  }
  CheckOk(buffer.Reserve(100, &moved));
  std::memset(buffer.data(), 1, 100);
}

TIDEGATE_TEST(a_buffer_changes_hands_with_its_memory) {
  Buffer first;
  bool moved = false;
  CheckOk(first.Reserve(100, &moved));
  const std::byte* data = first.data();
  Buffer second(std::move(first));
  CHECK(second.data() == data && first.data() == nullptr && first.capacity() == 0);
  Buffer third;
  third = std::move(second);
  CHECK(third.data() == data && second.data() == nullptr);
}

// -- slots ------------------------------------------------------------------------------------------------------------
// ----------------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(options_of_a_session_are_taken_and_refused) {
  OpenLibrary();
  ort::OrtSessionOptions* raw = nullptr;
  Must(api().CreateSessionOptions(&raw));
  const ort::SessionOptionsHandle options(raw);
  Must(api().SetSessionExecutionMode(raw, ort::kParallel));
  Must(api().SetSessionExecutionMode(raw, ort::kSequential));
  Refused(api().SetSessionExecutionMode(raw, 7), "execution");
  Must(api().SetSessionGraphOptimizationLevel(raw, 1));
  Refused(api().SetSessionGraphOptimizationLevel(raw, 77), "graph_optimization_level");
  Must(api().EnableMemPattern(raw));
  Must(api().DisableMemPattern(raw));
  Must(api().EnableCpuMemArena(raw));
  Must(api().DisableCpuMemArena(raw));
  Must(api().SetIntraOpNumThreads(raw, 1));
  Must(api().SetInterOpNumThreads(raw, 1));
  Must(api().AddSessionConfigEntry(raw, "session.intra_op.allow_spinning", "0"));
  Refused(api().AddSessionConfigEntry(raw, "", "0"), "key");
  Refused(api().AppendProvider(raw, "NoSuch", nullptr, nullptr, 0), "NoSuch");
}

TIDEGATE_TEST(options_of_cuda_and_tensorrt_exist_or_are_refused) {
  OpenLibrary();
  ort::OrtSessionOptions* raw = nullptr;
  Must(api().CreateSessionOptions(&raw));
  const ort::SessionOptionsHandle options(raw);
  const std::vector<std::string>& offered = Library::Get()->providers();
  const char* key = "device_id";
  const char* value = "0";
  if (std::find(offered.begin(), offered.end(), "CUDAExecutionProvider") == offered.end()) {
    // Nothing can be made, and what is called without it is refused. Appending reads its options first.
    alignas(64) static std::byte blank[4096];
    ort::OrtCudaOptions* cuda = nullptr;
    Refused(api().CreateCudaOptions(&cuda), "CUDA");
    Refused(api().UpdateCudaOptions(cuda, &key, &value, 1), "CUDA");
    Refused(api().AppendCuda(raw, reinterpret_cast<ort::OrtCudaOptions*>(blank)), "");
    api().ReleaseCudaOptions(nullptr);
    ort::OrtTensorRtOptions* tensor_rt = nullptr;
    Refused(api().CreateTensorRtOptions(&tensor_rt), "TensorRT");
    Refused(api().UpdateTensorRtOptions(tensor_rt, &key, &value, 1), "TensorRT");
    Refused(api().AppendTensorRt(raw, reinterpret_cast<ort::OrtTensorRtOptions*>(blank)), "TensorRT");
    api().ReleaseTensorRtOptions(nullptr);
    return;
  }
  // A library with CUDA, on a machine with or without a device: what exists takes our options, and appending it fails
  // with a reason at worst.
  for (const char* name : {"CUDAExecutionProvider", "TensorrtExecutionProvider"}) {
    const Status status = TryProvider(name, {{"device_id", "0"}});
    CHECK(status.ok() || !status.message.empty());
  }
}

TIDEGATE_TEST(memory_of_a_sessions_allocator_is_usable) {
  const std::shared_ptr<Session> session = Open(Negation());
  ort::OrtMemoryInfo* raw_info = nullptr;
  Must(api().CreateMemoryInfo("Cpu", ort::kDeviceAllocator, 0, ort::kDefaultMemory, &raw_info));
  const ort::MemoryInfoHandle info(raw_info);
  Refused(api().CreateMemoryInfo("NoSuchMemory", 0, 0, 0, &raw_info), "not supported");
  // The name is known also where there is no such memory.
  ort::OrtMemoryInfo* pinned = nullptr;
  Must(api().CreateMemoryInfo("CudaPinned", ort::kDeviceAllocator, 0, ort::kCpuOutputMemory, &pinned));
  api().ReleaseMemoryInfo(pinned);
  ort::OrtAllocator* raw = nullptr;
  Must(api().CreateAllocator(session->handle(), info.get(), &raw));
  const ort::AllocatorHandle allocator(raw);
  // As pinned buffers are made: through an allocator.
  Buffer buffer(raw);
  bool moved = false;
  CheckOk(buffer.Grow(1000, &moved));
  std::memset(buffer.data(), 1, buffer.capacity());
  CheckOk(buffer.Grow(5000, &moved));
  CHECK_EQ(buffer.capacity(), 8192u);
}

TIDEGATE_TEST(a_model_tells_its_tensors_and_its_metadata) {
  const std::shared_ptr<Session> session =
      Open(Model({Node("Neg", {"x"}, "y")}, {{"x", DataType::kFp64, {"batch", "3", "n"}}},
                 {{"y", DataType::kFp64, {"batch", "3", "n"}}}));
  CHECK_EQ(session->inputs().size(), 1u);
  const TensorInfo& x = session->inputs()[0];
  CHECK_EQ(x.name, "x");
  CHECK_EQ(x.elem_type, 11);
  CHECK((x.dims == std::vector<int64_t>{-1, 3, -1}));
  CHECK((x.symbols == std::vector<std::string>{"batch", "", "n"}));
  CHECK_EQ(session->CustomMetadata("author").value_or(""), "nobody");
  CHECK(!session->CustomMetadata("missing").has_value());
}

TIDEGATE_TEST(a_batch_dimension_comes_first_in_both_shapes) {
  const std::shared_ptr<Session> session = Open(Negation());
  ModelSpec spec = SpecOf(*session, 8);
  CheckOk(CheckSpec(*session, spec));
  spec.inputs[0].dims.d[0] = 2;
  CHECK_EQ(CheckSpec(*session, spec).message,
           "input 'x' is configured as [2,4]: the batch dimension -1 must come first");
  spec = SpecOf(*session, 8);
  spec.inputs.push_back(spec.inputs[0]);
  CHECK(CheckSpec(*session, spec).message.find("input 'x' is configured twice") != std::string::npos);
}

// -- runs -------------------------------------------------------------------------------------------------------------
// -----------------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(rows_of_many_requests_come_back_in_order) {
  const auto instance = Make(Open(Negation()), 8);
  for (int repeat = 0; repeat < 3; ++repeat) {
    std::vector<Given> batch(3);
    batch[0].Add<float>({1, 4}, {1, 2, 3, 4});
    batch[1].Add<float>({2, 4}, {5, 6, 7, 8, 9, 10, 11, 12});
    batch[2].Add<float>({1, 4}, {13, 14, 15, 16});
    CheckOk(Run(instance.get(), batch, 4));
    CHECK_EQ(instance->outputs().size(), 1u);
    std::vector<float> expected;
    for (int i = 1; i <= 16; ++i) expected.push_back(static_cast<float>(-i));
    CHECK(Floats(instance->outputs()[0]) == expected);
  }
}

TIDEGATE_TEST(outputs_stay_until_the_next_run_and_no_longer) {
  const auto instance = Make(Open(FreeNegation()), 8);
  CHECK(instance->outputs().empty());
  std::vector<Given> batch(1);
  batch[0].Add<float>({1, 2}, {1, 2});
  CheckOk(Run(instance.get(), batch, 1));
  CHECK((Floats(instance->outputs()[0]) == std::vector<float>{-1, -2}));
  // What was asked has gone; the answer has not.
  batch.clear();
  CHECK((Floats(instance->outputs()[0]) == std::vector<float>{-1, -2}));
  CHECK_EQ(static_cast<int>(Run(instance.get(), batch, 1).reason), static_cast<int>(Reason::kInternal));
  CHECK(instance->outputs().empty());
}

TIDEGATE_TEST(times_of_a_run_are_in_order_also_when_it_fails) {
  const auto instance = Make(Open(Negation()), 8);
  std::vector<Given> batch(1);
  batch[0].Add<float>({1, 4}, {1, 2, 3, 4});
  Request* request = &batch[0].request;
  RunTimes times;
  const int64_t before = NowNs();
  CheckOk(instance->Run({&request, 1}, 1, &times));
  CHECK(before <= times.input_done_ns && times.input_done_ns <= times.infer_done_ns && times.infer_done_ns <= NowNs());
  times = {};
  CHECK(!instance->Run({&request, 1}, 2, &times).ok());
  CHECK(before <= times.input_done_ns && times.input_done_ns <= times.infer_done_ns && times.infer_done_ns <= NowNs());
}

#ifndef __SANITIZE_ADDRESS__
// Allocations of one run by us, when shapes are fixed and known.
uint64_t PerRun(const std::function<void()>& run) {
  for (int i = 0; i < 20; ++i) run();
  const uint64_t before = n_allocations;
  for (int i = 0; i < 100; ++i) run();
  return (n_allocations - before) / 100;
}

TIDEGATE_TEST(a_run_with_fixed_shapes_allocates_nothing_of_ours) {
  const std::shared_ptr<Session> session = Open(Negation());
  const auto instance = Make(session, 8);
  std::vector<Given> batch(8);
  std::vector<Request*> requests;
  for (Given& one : batch) {
    one.Add<float>({1, 4}, {1, 2, 3, 4});
    requests.push_back(&one.request);
  }
  RunTimes times;
  const uint64_t ours = PerRun([&] { CheckOk(instance->Run(requests, 8, &times)); });

  // The same by hand: what the runtime itself allocates.
  ort::OrtRunOptions* options = nullptr;
  Must(api().CreateRunOptions(&options));
  const ort::RunOptionsHandle owned_options(options);
  ort::OrtIoBinding* binding = nullptr;
  Must(api().CreateIoBinding(session->handle(), &binding));
  const ort::BindingHandle owned_binding(binding);
  alignas(64) float x[32] = {};
  alignas(64) float y[32] = {};
  const int64_t dims[] = {8, 4};
  ort::OrtValue* value = nullptr;
  Must(api().CreateTensorWithDataAsOrtValue(Library::Get()->cpu_memory(), x, sizeof x, dims, 2, 1, &value));
  const ort::ValueHandle input(value);
  Must(api().CreateTensorWithDataAsOrtValue(Library::Get()->cpu_memory(), y, sizeof y, dims, 2, 1, &value));
  const ort::ValueHandle output(value);
  Must(api().BindInput(binding, "x", input.get()));
  Must(api().BindOutput(binding, "y", output.get()));
  const uint64_t bare = PerRun([&] { Must(api().RunWithBinding(session->handle(), options, binding)); });
  CHECK(bare > 0);  // The counter sees the runtime.
  CHECK_EQ(ours, bare);
}
#endif

TIDEGATE_TEST(strings_come_back_with_every_byte) {
  const auto instance = Make(Open(Echo()), 4);
  const auto wire = [](const std::vector<std::string>& strings) {
    std::vector<char> bytes;
    for (const std::string& one : strings) {
      const auto length = static_cast<uint32_t>(one.size());
      const auto* prefix = reinterpret_cast<const char*>(&length);
      bytes.insert(bytes.end(), prefix, prefix + sizeof length);
      bytes.insert(bytes.end(), one.begin(), one.end());
    }
    return bytes;
  };
  std::mt19937 random(1);
  for (int repeat = 0; repeat < 200; ++repeat) {
    const uint32_t rows = 1 + random() % 4;
    std::vector<Given> batch(rows);
    std::vector<char> expected;
    for (Given& one : batch) {
      std::vector<std::string> strings(2);
      for (std::string& text : strings) {
        text.resize(random() % (repeat % 20 == 0 ? 50'000 : 40));
        for (char& c : text) c = static_cast<char>(random());
      }
      const std::vector<char> bytes = wire(strings);
      one.Add<char>({1, 2}, bytes);
      expected.insert(expected.end(), bytes.begin(), bytes.end());
    }
    CheckOk(Run(instance.get(), batch, rows));
    const OutputView& view = instance->outputs()[0];
    CHECK_EQ(view.bytes, expected.size());
    CHECK(std::memcmp(view.data, expected.data(), expected.size()) == 0);
    CHECK_EQ(view.element_offsets.size(), 2 * rows + 1);
    CHECK_EQ(view.element_offsets.back(), expected.size());
  }
}

TIDEGATE_TEST(instances_of_one_session_run_side_by_side) {
  const std::shared_ptr<Session> session = Open(FreeNegation());
  std::vector<std::thread> threads;
  std::atomic<int> n_good{0};
  for (int number = 0; number < 4; ++number) {
    threads.emplace_back([&, number] {
      const auto instance = Make(session, 8);
      std::mt19937 random(number);
      for (int repeat = 0; repeat < 200; ++repeat) {
        const auto width = static_cast<int64_t>(1 + random() % 20);
        std::vector<Given> batch(1 + random() % 8);
        for (Given& one : batch) one.Add<float>({1, width}, std::vector<float>(width, static_cast<float>(number)));
        CheckOk(Run(instance.get(), batch, static_cast<uint32_t>(batch.size())));
        const std::vector<float> expected(batch.size() * width, static_cast<float>(-number));
        if (Floats(instance->outputs()[0]) == expected) ++n_good;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK_EQ(n_good.load(), 800);
}

TIDEGATE_TEST(an_ended_instance_ends_for_good_and_alone) {
  const std::shared_ptr<Session> session = Open(Negation());
  const auto ended = Make(session, 8);
  const auto other = Make(session, 8);
  std::vector<Given> batch(1);
  batch[0].Add<float>({1, 4}, {1, 2, 3, 4});
  // While it runs, over and over, until the end is seen.
  std::thread runner([&] {
    while (Run(ended.get(), batch, 1).ok()) {
    }
  });
  ended->Terminate();
  runner.join();
  const Status status = Run(ended.get(), batch, 1);
  CHECK_EQ(static_cast<int>(status.reason), static_cast<int>(Reason::kModelRaised));
  CHECK(status.message.find("terminate") != std::string::npos);
  CheckOk(Run(other.get(), batch, 1));
}

// -- messages ---------------------------------------------------------------------------------------------------------
// -------------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(messages_are_short_valid_text_whatever_comes) {
  std::mt19937 random(2);
  const std::string alphabet = "ab /.:'\"(\n\xC3\xA9\xE2\x86\x92\xF0\x9F\x98\x80\xFF\x80node Name:'";
  for (int repeat = 0; repeat < 20'000; ++repeat) {
    std::string message(random() % 700, ' ');
    for (char& c : message) c = alphabet[random() % alphabet.size()];
    const std::string clean = ort::CleanMessage(message, {"/a b"});
    CHECK(clean.size() <= ort::kMaxMessage);
    for (std::string_view left = clean; !left.empty();) {
      const size_t length = Utf8Length(left);
      CHECK(length > 0 && left[0] != '\n');
      left.remove_prefix(length);
    }
  }
}

// -- at the end -------------------------------------------------------------------------------------------------------
// -----------------------------------------------------------------------------------------------------------

TIDEGATE_TEST(sessions_on_a_device_bind_and_wait_for_each_run) {
  // The CPU stands in for the device.
  const std::shared_ptr<Session> session =
      Open(FreeNegation(), {.providers = {},
                            .device_id = 0,
                            .intra_op_threads = 2,
                            .config_entries = {},
                            .run_config_entries = {{"disable_synchronize_execution_providers", "0"}}});
  const auto instance = Make(session, 8);
  for (float number : {1.0F, 2.0F, 3.0F}) {
    std::vector<Given> batch(2);
    for (Given& one : batch) one.Add<float>({1, 3}, {number, number, number});
    CheckOk(Run(instance.get(), batch, 2));
    CHECK((Floats(instance->outputs()[0]) == std::vector<float>(6, -number)));
  }
}

TIDEGATE_TEST(nothing_is_left_and_no_slot_was_idle) {
  CHECK_EQ(LiveCount(LiveKind::kSession), 0);
  CHECK_EQ(LiveCount(LiveKind::kInstance), 0);
  const std::vector<std::string>& offered = Library::Get()->providers();
  const bool has_cuda = std::find(offered.begin(), offered.end(), "CUDAExecutionProvider") != offered.end();
  for (const ort::SlotName& slot : ort::kSlots) {
    // Where there is CUDA, how far its options get is the machine's choice.
    const std::string_view name = slot.name;
    if (has_cuda && (name.find("Cuda") != name.npos || name.find("TensorRt") != name.npos)) continue;
    if (Library::calls(slot.number) == 0) test::Fail(__FILE__, __LINE__, "no call of " + std::string(name));
  }
}

}  // namespace
}  // namespace tidegate

int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
