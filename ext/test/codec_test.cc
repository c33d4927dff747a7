// What Python cannot see of the codec: allocations, the capacity that is kept, answers too large to make.
#include "infer/codec.h"

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <vector>

#include "infer/protobuf.h"
#include "test/check.h"

namespace {
size_t allocations = 0;
}  // namespace

// Counted, otherwise as usual. Not inlined, or the compiler takes them for mismatched.
[[gnu::noinline]] void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size == 0 ? 1 : size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace tidegate {
namespace {

constexpr size_t kKeepBytes = 1 << 20;

std::string Varint(uint64_t value) {
  std::string text;
  for (; value >= 0x80; value >>= 7) text += static_cast<char>(value | 0x80);
  return text + static_cast<char>(value);
}

std::string Field(int number, std::string_view content) {
  return Varint(number << 3 | 2) + Varint(content.size()) + std::string(content);
}

std::string Input(std::string_view name, std::string_view datatype, std::vector<uint64_t> shape,
                  std::string_view more = {}) {
  std::string packed;
  for (const uint64_t dim : shape) packed += Varint(dim);
  return Field(5, Field(1, name) + Field(2, datatype) + Field(3, packed) + std::string(more));
}

std::string Raw(size_t bytes) { return Field(7, std::string(bytes, '\1')); }

std::string IntParameter(std::string_view name, uint64_t value) {
  return Field(4, Field(1, name) + Field(2, "\x10" + Varint(value)));
}

TensorSpec MakeTensor(std::string name, DataType type, std::vector<int64_t> sizes) {
  Dims dims;
  for (const int64_t size : sizes) dims.d[dims.rank++] = size;
  return {std::move(name), type, dims, dims};
}

ModelSpec MakeModel(std::vector<TensorSpec> inputs, std::vector<TensorSpec> outputs, uint32_t max_batch_size = 64) {
  ModelSpec spec{"model", "1.0.0", max_batch_size, std::move(inputs), std::move(outputs), false};
  for (const TensorSpec& input : spec.inputs) {
    for (int k = max_batch_size > 0 ? 1 : 0; k < input.dims.rank; ++k) spec.has_free_dims |= input.dims.d[k] == -1;
  }
  return spec;
}

// One request as an I/O thread and an executor treat it, with the buffers of the last one.
void Serve(const std::string& body, const ModelSpec& spec, std::span<const OutputView> outputs, ParsedRequest* parsed,
           Request* request) {
  request->Reset(kKeepBytes);
  const auto* bytes = reinterpret_cast<const std::byte*>(body.data());
  request->body.assign(bytes, bytes + body.size());
  CHECK(ParseInferRequest({reinterpret_cast<const char*>(request->body.data()), body.size()}, parsed).ok());
  const Status status = CheckInferRequest(*parsed, spec, request);
  CHECK_EQ(status.message, "");
  CHECK(CheckOutputs(spec, outputs, 4).ok());
  EncodeInferResponse(spec, outputs, 1, request);
  CHECK(!request->reply.empty());
}

// As an executor shows it: `rows` rows of zeros.
OutputView Zeros(const TensorSpec& tensor, std::vector<int64_t> sizes, const std::vector<std::byte>& zeros,
                 std::span<const size_t> offsets = {}) {
  OutputView view;
  view.type = tensor.type;
  for (const int64_t size : sizes) view.dims.d[view.dims.rank++] = size;
  int64_t count = 0;
  CHECK(ElementCount(view.dims.span(), &count));
  view.bytes = offsets.empty() ? static_cast<size_t>(count) * ElementBytes(tensor.type) : offsets.back();
  view.data = zeros.data();
  view.element_offsets = offsets;
  CHECK(view.bytes <= zeros.size());
  return view;
}

struct Traffic {
  ModelSpec spec;
  std::vector<std::string> bodies;
  std::vector<OutputView> outputs;  // of a batch of 4 rows
};

// Requests of every form, whose second round must find all memory in place.
void RequireNoAllocation(const Traffic& traffic) {
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  const auto serve_all = [&] {
    for (const std::string& body : traffic.bodies) Serve(body, traffic.spec, traffic.outputs, &parsed, request.get());
  };
  serve_all();
  const size_t before = allocations;
  for (int i = 0; i < 100; ++i) serve_all();
  CHECK_EQ(allocations - before, 0u);
}

TIDEGATE_TEST(allocations_are_counted) {
  const size_t before = allocations;
  std::make_unique<int>(1).reset();
  CHECK(allocations > before);
}

TIDEGATE_TEST(a_raw_request_allocates_nothing_in_steady_state) {
  const std::vector<std::byte> zeros(4096);
  Traffic traffic;
  traffic.spec = MakeModel({MakeTensor("x", DataType::kFp32, {-1, 16}), MakeTensor("mask", DataType::kBool, {-1, -1})},
                           {MakeTensor("y", DataType::kFp32, {-1, 16}), MakeTensor("label", DataType::kInt64, {-1})});
  const std::string x = Input("x", "FP32", {1, 16});
  const std::string mask = Input("mask", "BOOL", {1, 3});
  const std::string long_id(100, 'i');
  traffic.bodies = {
      Field(1, "model") + x + mask + Raw(64) + Raw(3),
      Field(1, "model") + Field(2, "^1.0") + Field(3, long_id) + Raw(3) + Raw(64) + mask + x +
          Field(6, Field(1, "label")),
      x + mask + Raw(64) + Raw(3) + IntParameter("priority", 1) + IntParameter("timeout", 5000) +
          IntParameter("sticky_key", ~uint64_t{0}) + IntParameter("sequence_id", 0) + IntParameter("mine", 7),
      Input("x", "FP32", {3, 16}) + Input("mask", "BOOL", {3, 5}) + Raw(192) + Raw(15),
  };
  traffic.outputs = {Zeros(traffic.spec.outputs[0], {4, 16}, zeros), Zeros(traffic.spec.outputs[1], {4}, zeros)};
  RequireNoAllocation(traffic);
}

TIDEGATE_TEST(typed_contents_and_strings_allocate_nothing_in_steady_state) {
  const std::vector<std::byte> zeros(4096);
  const std::vector<size_t> offsets = {0, 4, 8, 12, 16};
  Traffic traffic;
  traffic.spec = MakeModel({MakeTensor("x", DataType::kInt16, {-1, 2}), MakeTensor("words", DataType::kBytes, {-1, 1})},
                           {MakeTensor("text", DataType::kBytes, {-1, 1})});
  traffic.bodies = {
      Input("x", "INT16", {1, 2}, Field(5, Field(2, "\5\6"))) +
          Input("words", "BYTES", {1, 1}, Field(5, Field(8, std::string(300, 'w')))),
      Input("x", "INT16", {2, 2}) + Input("words", "BYTES", {2, 1}) + Raw(8) +
          Field(7, std::string("\1\0\0\0a\0\0\0\0", 9)),
      Input("words", "BYTES", {1, 1}, Field(5, Field(8, ""))) +
          Input("x", "INT16", {1, 2}, Field(5, "\x10\5") + Field(5, "\x10\6")),
  };
  traffic.outputs = {Zeros(traffic.spec.outputs[0], {4, 1}, zeros, offsets)};
  RequireNoAllocation(traffic);
}

TIDEGATE_TEST(an_answer_takes_one_allocation_at_most) {
  const std::vector<std::byte> zeros(1 << 16);
  const ModelSpec spec =
      MakeModel({MakeTensor("x", DataType::kFp32, {-1, 2})},
                {MakeTensor("a", DataType::kFp32, {-1, 1000}), MakeTensor("b", DataType::kInt8, {-1, 9})});
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  const std::vector<OutputView> outputs = {Zeros(spec.outputs[0], {4, 1000}, zeros),
                                           Zeros(spec.outputs[1], {4, 9}, zeros)};
  Serve(Input("x", "FP32", {2, 2}) + Raw(16), spec, outputs, &parsed, request.get());
  for (const bool in_stream : {false, true}) {
    std::vector<std::byte>().swap(request->reply);
    request->in_stream = in_stream;
    const size_t before = allocations;
    EncodeInferResponse(spec, outputs, 1, request.get());
    CHECK_EQ(allocations - before, 1u);
  }
  std::vector<std::byte>().swap(request->reply);
  const size_t before = allocations;
  EncodeStreamError("model", "1.0.0", "id", "a message of some length, as they have", &request->reply);
  CHECK_EQ(allocations - before, 1u);
}

TIDEGATE_TEST(views_point_into_the_body_and_typed_contents_into_the_scratch) {
  const ModelSpec spec =
      MakeModel({MakeTensor("x", DataType::kUint8, {-1, 3}), MakeTensor("y", DataType::kUint8, {-1, 2})},
                {MakeTensor("y", DataType::kUint8, {-1, 2})});
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  const auto check = [&](const std::string& body) {
    const auto* bytes = reinterpret_cast<const std::byte*>(body.data());
    request->Reset(kKeepBytes);
    request->body.assign(bytes, bytes + body.size());
    CHECK(ParseInferRequest({reinterpret_cast<const char*>(request->body.data()), body.size()}, &parsed).ok());
    CHECK_EQ(CheckInferRequest(parsed, spec, request.get()).message, "");
  };
  check(Field(3, "id") + Input("x", "UINT8", {1, 3}) + Input("y", "UINT8", {1, 2}) + Field(7, "abc") + Field(7, "de"));
  CHECK(request->inputs[0].data == request->body.data() + request->body.size() - 7);
  CHECK(request->inputs[1].data == request->body.data() + request->body.size() - 2);
  CHECK(reinterpret_cast<const std::byte*>(request->id.data()) == request->body.data() + 2);
  CHECK(request->scratch.empty());
  check(Input("x", "UINT8", {1, 3}, Field(5, Field(4, "abc"))) + Input("y", "UINT8", {1, 2}, Field(5, Field(4, "de"))));
  CHECK_EQ(request->scratch.size(), 5u);
  CHECK(request->inputs[0].data == request->scratch.data());
  CHECK(request->inputs[1].data == request->scratch.data() + 3);
  CHECK_EQ(std::string_view(reinterpret_cast<const char*>(request->scratch.data()), 5), "abcde");
}

TIDEGATE_TEST(what_no_model_can_have_is_counted_and_not_kept) {
  std::string body;
  for (int i = 0; i < 100'000; ++i) body += std::string("\x2a\0\x32\0\x3a\0", 6);
  ParsedRequest parsed;
  CHECK(ParseInferRequest(body, &parsed).ok());
  CHECK_EQ(parsed.n_inputs, 100'000u);
  CHECK_EQ(parsed.n_raw, 100'000u);
  CHECK_EQ(parsed.inputs.size(), kMostParsedInputs);
  CHECK_EQ(parsed.outputs.size(), kMostParsedOutputs);
  CHECK_EQ(parsed.raw.size(), kMostParsedInputs);
  auto request = std::make_unique<Request>();
  const ModelSpec spec = MakeModel({MakeTensor("x", DataType::kFp32, {-1})}, {MakeTensor("y", DataType::kFp32, {-1})});
  CHECK(CheckInferRequest(parsed, spec, request.get()).reason == Reason::kInvalidTensor);
}

TIDEGATE_TEST(a_model_with_the_most_inputs_and_outputs_is_served) {
  std::vector<TensorSpec> tensors;
  std::string body;
  for (size_t i = 0; i < kMaxInputs; ++i) {
    tensors.push_back(MakeTensor("t" + std::to_string(i), DataType::kInt8, {-1}));
    body +=
        Input("t" + std::to_string(kMaxInputs - 1 - i), "INT8", {1}) + Field(7, std::string(1, static_cast<char>(i)));
  }
  const ModelSpec spec = MakeModel(tensors, tensors);
  const std::vector<std::byte> zeros(64);
  std::vector<OutputView> outputs;
  for (const TensorSpec& tensor : tensors) outputs.push_back(Zeros(tensor, {4}, zeros));
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  Serve(body, spec, outputs, &parsed, request.get());
  CHECK_EQ(request->outputs_wanted, ~uint64_t{0});
  for (size_t i = 0; i < kMaxInputs; ++i) {
    CHECK_EQ(static_cast<size_t>(*request->inputs[i].data), kMaxInputs - 1 - i);
  }
  // One more is one too many, whatever its name.
  const std::string more = body + Input("t0", "INT8", {1}) + Raw(1);
  CHECK(ParseInferRequest(more, &parsed).ok());
  CHECK_EQ(CheckInferRequest(parsed, spec, request.get()).message,
           "model 'model', input 't0': it is given twice; expected once");
}

TIDEGATE_TEST(an_answer_beyond_two_gib_is_refused_without_being_made) {
  const ModelSpec spec =
      MakeModel({MakeTensor("x", DataType::kInt8, {-1, 1})}, {MakeTensor("y", DataType::kInt8, {-1, -1})});
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  const std::string body = Input("x", "INT8", {1, 1}) + Raw(1);
  CHECK(ParseInferRequest(body, &parsed).ok());
  CHECK(CheckInferRequest(parsed, spec, request.get()).ok());
  OutputView output;
  const std::byte never_read{};
  output.type = DataType::kInt8;
  output.dims = spec.outputs[0].dims;
  output.dims.d[0] = 1;
  output.dims.d[1] = static_cast<int64_t>(output.bytes = size_t{1} << 31);
  output.data = &never_read;
  CHECK(CheckOutputs(spec, {&output, 1}, 1).ok());
  EncodeInferResponse(spec, {&output, 1}, 0, request.get());
  CHECK(request->status.reason == Reason::kModelOutputInvalid);
  CHECK(request->reply.empty());
}

TIDEGATE_TEST(a_varint_has_the_size_that_is_computed) {
  std::byte buffer[16];
  for (int bits = 0; bits < 64; ++bits) {
    for (const uint64_t value : {uint64_t{1} << bits, (uint64_t{1} << bits) - 1, ~uint64_t{0} >> bits}) {
      const std::byte* end = protobuf::PutVarint(buffer, value);
      CHECK_EQ(static_cast<size_t>(end - buffer), protobuf::VarintBytes(value));
      uint64_t read = 0;
      const auto* begin = reinterpret_cast<protobuf::Cursor>(buffer);
      CHECK(protobuf::ReadVarint(begin, begin + sizeof buffer, &read) == reinterpret_cast<protobuf::Cursor>(end));
      CHECK_EQ(read, value);
    }
  }
}

TIDEGATE_TEST(shapes_differ_in_their_key_and_rows_do_not) {
  const ModelSpec spec =
      MakeModel({MakeTensor("x", DataType::kInt8, {-1, -1, -1})}, {MakeTensor("y", DataType::kInt8, {-1})});
  ParsedRequest parsed;
  auto request = std::make_unique<Request>();
  const auto key = [&](uint64_t rows, uint64_t a, uint64_t b) {
    const std::string body = Input("x", "INT8", {rows, a, b}) + Raw(rows * a * b);
    CHECK(ParseInferRequest(body, &parsed).ok());
    CHECK(CheckInferRequest(parsed, spec, request.get()).ok());
    CHECK(request->shape_key != 0);
    return request->shape_key;
  };
  CHECK(key(1, 2, 3) == key(5, 2, 3));
  std::vector<uint64_t> keys;
  for (uint64_t a = 0; a < 40; ++a) {
    for (uint64_t b = 0; b < 40; ++b) keys.push_back(key(1, a, b));
  }
  std::sort(keys.begin(), keys.end());
  CHECK(std::adjacent_find(keys.begin(), keys.end()) == keys.end());
}

}  // namespace
}  // namespace tidegate

int main(int argc, char** argv) { return tidegate::test::RunAll(argc, argv); }
