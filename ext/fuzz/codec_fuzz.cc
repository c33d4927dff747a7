// Bytes from a client through the codec: parse, check against models of several kinds, encode the answer.
//
// The entry point is libFuzzer's. Built with TIDEGATE_LIBFUZZER (clang, -fsanitize=fuzzer) that is all; otherwise the
// program has its own main, for compilers without libFuzzer and for replaying what was found:
//
//     codec_fuzz FILE|FOLDER ...            runs each file once
//     codec_fuzz --runs N [--seed S]        runs N mutations of the messages below, the same ones for the same seed
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "infer/codec.h"

namespace tidegate {
namespace {

void Require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "broken: %s\n", what);
  std::abort();
}

Dims MakeDims(std::initializer_list<int64_t> sizes) {
  Dims dims;
  for (const int64_t size : sizes) dims.d[dims.rank++] = size;
  return dims;
}

TensorSpec MakeTensor(std::string name, DataType type, std::initializer_list<int64_t> sizes) {
  return {std::move(name), type, MakeDims(sizes), MakeDims(sizes)};
}

ModelSpec MakeModel(std::string name, uint32_t max_batch_size, bool has_free_dims, std::vector<TensorSpec> inputs) {
  return {std::move(name), "1.2.3", max_batch_size, inputs, inputs, has_free_dims};
}

const std::vector<ModelSpec>& Models() {
  static const std::vector<ModelSpec> models = {
      MakeModel("identity", 64, false, {MakeTensor("x", DataType::kFp32, {-1, 4})}),
      MakeModel("words", 8, true, {MakeTensor("x", DataType::kBytes, {-1, -1})}),
      MakeModel("free", 4, true,
                {MakeTensor("x", DataType::kInt64, {-1, -1, 2}), MakeTensor("y", DataType::kUint8, {-1, -1})}),
      MakeModel("single", 0, true, {MakeTensor("x", DataType::kBool, {-1, 2})}),
      MakeModel("scalar", 0, false, {MakeTensor("x", DataType::kFp64, {})}),
      MakeModel("small", 3, false,
                {MakeTensor("x", DataType::kInt8, {-1, 1}), MakeTensor("y", DataType::kInt16, {-1, 1}),
                 MakeTensor("z", DataType::kUint16, {-1, 1}), MakeTensor("h", DataType::kFp16, {-1, 1})}),
      MakeModel("wide", 2, false,
                {MakeTensor("x", DataType::kInt32, {-1, 2}), MakeTensor("y", DataType::kUint32, {-1, 2}),
                 MakeTensor("z", DataType::kUint64, {-1, 2})}),
  };
  return models;
}

// Every byte of a view lies in one of the two buffers that it may point into.
void RequireInside(const Request& request, const InputView& view) {
  const auto within = [&](const std::vector<std::byte>& buffer) {
    return view.data >= buffer.data() && view.data + view.bytes <= buffer.data() + buffer.size();
  };
  Require(view.bytes == 0 || within(request.body) || within(request.scratch), "a view outside the request");
}

// An answer that echoes the inputs of a batch in which the request stands behind one row of zeros.
void Encode(const ModelSpec& spec, Request* request) {
  const bool batches = spec.max_batch_size > 0;
  const uint32_t before = batches ? 1 : 0;
  std::vector<std::vector<std::byte>> data(spec.inputs.size());
  std::vector<std::vector<size_t>> offsets(spec.inputs.size());
  std::vector<OutputView> outputs(spec.inputs.size());
  for (size_t i = 0; i < outputs.size(); ++i) {
    const InputView& input = request->inputs[i];
    OutputView& output = outputs[i];
    output.type = spec.outputs[i].type;
    output.dims = input.dims;
    int64_t count = 0;
    Require(ElementCount(input.dims.span(), &count), "a shape without a size");
    const auto per_row = static_cast<size_t>(count) / request->rows;
    if (batches) output.dims.d[0] += before;
    if (output.type == DataType::kBytes) {
      for (size_t k = 0; k < before * per_row * 4; ++k) data[i].push_back(std::byte{0});
    } else {
      data[i].resize(before * per_row * ElementBytes(output.type));
    }
    data[i].insert(data[i].end(), input.data, input.data + input.bytes);
    if (output.type == DataType::kBytes) {
      size_t at = 0;
      while (at < data[i].size()) {
        offsets[i].push_back(at);
        uint32_t length = 0;
        Require(data[i].size() - at >= sizeof length, "a string without a length");
        std::memcpy(&length, data[i].data() + at, sizeof length);
        at += sizeof length + length;
      }
      Require(at == data[i].size(), "a string past its tensor");
      offsets[i].push_back(at);
    }
    output.data = data[i].data();
    output.bytes = data[i].size();
    output.element_offsets = offsets[i];
  }
  Require(CheckOutputs(spec, outputs, request->rows + before).ok(), "an echo is refused");
  for (const bool in_stream : {false, true}) {
    request->in_stream = in_stream;
    EncodeInferResponse(spec, outputs, before, request);
    Require(request->status.ok(), "an answer that is too large");
    const auto* prefix = reinterpret_cast<const uint8_t*>(request->reply.data());
    const size_t length = size_t{prefix[1]} << 24 | prefix[2] << 16 | prefix[3] << 8 | prefix[4];
    Require(prefix[0] == 0 && length + 5 == request->reply.size(), "a prefix that lies");
    if (in_stream) continue;
    // The raw contents end the message, in the order of the outputs.
    size_t end = request->reply.size();
    for (size_t i = outputs.size(); i-- > 0;) {
      if (!(request->outputs_wanted >> i & 1)) continue;
      const InputView& input = request->inputs[i];
      Require(end >= input.bytes && (input.bytes == 0 || std::memcmp(request->reply.data() + end - input.bytes,
                                                                     input.data, input.bytes) == 0),
              "an answer that is not the echo");
      end -= input.bytes + 1;                                          // and the tag
      for (size_t left = input.bytes; left > 0x7f; left >>= 7) --end;  // and the length
      --end;
    }
  }
}

void Check(const ParsedRequest& parsed, const ModelSpec& spec, Request* request) {
  request->scratch.clear();
  request->inputs.clear();
  request->status = {};
  const Status status = CheckInferRequest(parsed, spec, request);
  if (!status.ok()) {
    Require(status.reason == Reason::kInvalidTensor || status.reason == Reason::kNotSupported, "an odd refusal");
    Require(!status.message.empty() && status.message.size() < 1500, "a refusal of odd length");
    return;
  }
  Require(request->inputs.size() == spec.inputs.size() && request->outputs_wanted != 0,
          "inputs or outputs are missing");
  Require(request->rows >= 1 && request->rows <= std::max(spec.max_batch_size, 1u), "rows beyond the limit");
  Require((request->shape_key != 0) == spec.has_free_dims, "a shape key that lies");
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    const InputView& view = request->inputs[i];
    RequireInside(*request, view);
    int64_t count = 0;
    Require(view.dims.rank == spec.inputs[i].dims.rank && ElementCount(view.dims.span(), &count),
            "a shape let through");
    Require(spec.inputs[i].type == DataType::kBytes ||
                view.bytes == static_cast<size_t>(count) * ElementBytes(spec.inputs[i].type),
            "a byte count let through");
  }
  // What a batch does with it.
  size_t bytes = 0;
  for (const InputView& view : request->inputs) bytes = std::max(bytes, view.bytes);
  std::vector<std::byte> gathered(bytes);
  Request* const one[] = {request};
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    Require(GatherInput(one, i, gathered.data()) == request->inputs[i].bytes, "a gather that stops early");
  }
  Encode(spec, request);
}

}  // namespace
}  // namespace tidegate

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace tidegate;
  static ParsedRequest parsed;  // as an I/O thread has one
  static auto request = std::make_unique<Request>();
  // Exactly as large as the message: a read beyond it is seen.
  request->body = std::vector<std::byte>(size);
  if (size > 0) std::memcpy(request->body.data(), data, size);
  const std::string_view body(reinterpret_cast<const char*>(request->body.data()), size);
  const Status status = ParseInferRequest(body, &parsed);
  if (!status.ok()) {
    Require(status.reason == Reason::kMalformedMessage || status.reason == Reason::kInvalidTensor, "an odd refusal");
    Require(!status.message.empty() && status.message.size() < 500, "a refusal of odd length");
    EncodeStreamError(parsed.model_name, parsed.model_version, parsed.id, status.message, &request->reply);
    return 0;
  }
  Require(parsed.inputs.size() <= kMostParsedInputs && parsed.outputs.size() <= kMostParsedOutputs &&
              parsed.raw.size() <= kMostParsedInputs,
          "more is kept than any model has");
  for (const ModelSpec& spec : Models()) Check(parsed, spec, request.get());
  return 0;
}

#ifndef TIDEGATE_LIBFUZZER

#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>

namespace {

std::string Varint(uint64_t value) {
  std::string text;
  for (; value >= 0x80; value >>= 7) text += static_cast<char>(value | 0x80);
  return text + static_cast<char>(value);
}

std::string Field(int number, std::string_view content) {
  return Varint(number << 3 | 2) + Varint(content.size()) + std::string(content);
}

std::string Number(int number, uint64_t value) { return Varint(number << 3) + Varint(value); }

std::string Packed(int number, std::initializer_list<uint64_t> values) {
  std::string run;
  for (const uint64_t value : values) run += Varint(value);
  return Field(number, run);
}

std::string Input(std::string_view name, std::string_view datatype, std::initializer_list<uint64_t> shape,
                  std::string_view more = {}) {
  return Field(5, Field(1, name) + Field(2, datatype) + Packed(3, shape) + std::string(more));
}

std::string Parameter(int number, std::string_view name, std::string_view value) {
  return Field(number, Field(1, name) + Field(2, value));
}

// One of everything that a message may hold.
std::vector<std::string> Corpus() {
  const std::string zeros(256, '\0');
  const auto raw = [&](size_t bytes) { return Field(7, std::string_view(zeros).substr(0, bytes)); };
  std::vector<std::string> corpus;
  corpus.push_back(Field(1, "identity") + Input("x", "FP32", {1, 4}) + raw(16));
  corpus.push_back(Field(1, "identity") + Field(2, "^1.2") + Field(3, "id-7") + raw(48) + Input("x", "FP32", {3, 4}) +
                   Field(6, Field(1, "x")));
  corpus.push_back(Input("x", "FP32", {1, 4}, Field(5, Field(6, std::string_view(zeros).substr(0, 16)))));
  corpus.push_back(
      Input("x", "FP32", {1, 4},
            Field(5, "\x35" + zeros.substr(0, 4)) + Field(5, Field(6, std::string_view(zeros).substr(0, 12)))));
  corpus.push_back(Input("x", "BYTES", {1, 2}) + Field(7, std::string("\3\0\0\0abc\0\0\0\0", 11)));
  corpus.push_back(Input("x", "BYTES", {2, 1}, Field(5, Field(8, "abc") + Field(8, ""))));
  corpus.push_back(Input("y", "UINT8", {1, 3}) + Input("x", "INT64", {1, 2, 2}) + raw(3) + raw(32));
  corpus.push_back(Input("x", "INT64", {1, 1, 2}, Field(5, Packed(3, {1, ~uint64_t{0}}))) +
                   Input("y", "UINT8", {1, 2}, Field(5, Packed(4, {0, 255}))));
  corpus.push_back(Input("x", "BOOL", {2, 2}, Field(5, Number(1, 1) + Packed(1, {0, 1, 2}))));
  corpus.push_back(Input("x", "FP64", {}) + raw(8));
  corpus.push_back(Input("x", "INT8", {1, 1}) + Input("y", "INT16", {1, 1}) + Input("z", "UINT16", {1, 1}) +
                   Input("h", "FP16", {1, 1}) + raw(1) + raw(2) + raw(2) + raw(2));
  corpus.push_back(Input("x", "INT32", {1, 2}, Field(5, Packed(2, {5, 0xfffffffffffffff0}))) +
                   Input("y", "UINT32", {1, 2}, Field(5, Number(4, 1) + Number(4, 0xffffffff))) +
                   Input("z", "UINT64", {1, 2}, Field(5, Packed(5, {1, ~uint64_t{0}}))));
  corpus.push_back(corpus[0] + Parameter(4, "priority", Number(5, 2)) + Parameter(4, "timeout", Number(2, 1000)) +
                   Parameter(4, "sticky_key", Number(2, 77)) + Parameter(4, "sequence_id", Number(2, 0)) +
                   Parameter(4, "sequence_start", Number(1, 1)) +
                   Parameter(4, "triton_enable_empty_final_response", Number(1, 1)));
  corpus.push_back(corpus[0] + Parameter(4, "mine", Field(3, "text")) +
                   Parameter(4, "ratio", "\x21" + zeros.substr(0, 8)) + Parameter(4, "mine", {}) +
                   Parameter(4, "triton_secret", Number(1, 1)));
  corpus.push_back(Input(
      "x", "FP32", {1, 4},
      Parameter(4, "shared_memory_region", Field(3, "r")) + Parameter(4, "shared_memory_byte_size", Number(2, 16))));
  corpus.push_back(corpus[0] + Field(6, Field(1, "x") + Parameter(2, "classification", Number(2, 3))));
  corpus.push_back("\x7b\x0a\x01" + std::string("a\x7c", 2) + corpus[0] + "\xfd\x01" + zeros.substr(0, 4));
  const auto small = [&](uint64_t x, uint64_t y, uint64_t z) {
    return Input("x", "INT8", {1, 1}, Field(5, Packed(2, {x}))) +
           Input("y", "INT16", {1, 1}, Field(5, Packed(2, {y}))) +
           Input("z", "UINT16", {1, 1}, Field(5, Packed(4, {z}))) + Input("h", "FP16", {1, 1});
  };
  corpus.push_back(small(127, 1, 1));
  corpus.push_back(small(128, 1, 1));
  corpus.push_back(small(1, 0xffffffffffff8000, 1));
  corpus.push_back(small(1, 0x8000, 0x10000));
  corpus.push_back(Input("x", "INT64", {1, 0, 2}) + Input("y", "UINT8", {1, 0}) + raw(0) + raw(0));
  corpus.push_back(Input("x", "BYTES", {1, 0}));
  corpus.push_back(Input("x", "BOOL", {uint64_t{1} << 62, 2}) + raw(1));
  corpus.push_back(Input("x", "BYTES", {1, ~uint64_t{0}}) + raw(4));
  corpus.push_back(corpus[0] + Parameter(4, "sticky_key", Field(3, "user-9")) +
                   Parameter(4, "sequence_id", Field(3, "s")));
  corpus.push_back("");
  return corpus;
}

class Mutator {
 public:
  Mutator(std::vector<std::string> corpus, uint64_t seed) : corpus_(std::move(corpus)), random_(seed) {}

  std::string Next() {
    std::string text = Any();
    // Messages one behind the other are one merged message, so this alone reaches much.
    while (Below(4) == 0) text += Any();
    for (size_t n = Below(6); n > 0; --n) Mutate(&text);
    return text;
  }

 private:
  size_t Below(size_t limit) { return limit == 0 ? 0 : random_() % limit; }
  const std::string& Any() { return corpus_[Below(corpus_.size())]; }

  void Mutate(std::string* text) {
    static constexpr unsigned char kTelling[] = {0x00, 0x01, 0x02, 0x04, 0x08, 0x0a, 0x12, 0x1a, 0x22, 0x2a, 0x32,
                                                 0x3a, 0x42, 0x7b, 0x7c, 0x7f, 0x80, 0xc0, 0xed, 0xf4, 0xff};
    const auto any_byte = [&] {
      return static_cast<char>(Below(2) == 0 ? random_() : kTelling[Below(std::size(kTelling))]);
    };
    const size_t at = Below(text->size() + 1);
    const size_t length = Below(std::min<size_t>(text->size() - at, 24) + 1);
    switch (Below(9)) {
      case 0:
        if (at < text->size()) (*text)[at] = static_cast<char>((*text)[at] ^ (1 << Below(8)));
        break;
      case 1:
        if (at < text->size()) (*text)[at] = any_byte();
        break;
      case 2: text->insert(at, 1, any_byte()); break;
      case 3: text->erase(at, length); break;
      case 4: text->insert(at, text->substr(at, length)); break;
      case 5: text->resize(at); break;
      case 6: {
        const std::string& other = Any();
        const size_t from = Below(other.size() + 1);
        text->insert(at, other, from, Below(other.size() - from + 1));
        break;
      }
      case 7: text->insert(at, Varint(random_() >> Below(64))); break;
      case 8:  // one more or one less: what lengths and sizes are sensitive to
        if (at < text->size()) (*text)[at] = static_cast<char>((*text)[at] + (Below(2) == 0 ? 1 : -1));
        break;
    }
  }

  const std::vector<std::string> corpus_;
  std::mt19937_64 random_;
};

void Run(const std::string& text) {
  LLVMFuzzerTestOneInput(reinterpret_cast<const uint8_t*>(text.data()), text.size());
}

size_t RunFile(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) {
    std::fprintf(stderr, "cannot read %s\n", path.c_str());
    std::exit(1);
  }
  Run({std::istreambuf_iterator<char>(file), {}});
  return 1;
}

}  // namespace

int main(int argc, char** argv) {
  size_t runs = 0;
  uint64_t seed = 1;
  size_t done = 0;
  for (int i = 1; i < argc; ++i) {
    const std::string_view argument = argv[i];
    if (argument == "--runs" && i + 1 < argc) {
      runs = std::strtoull(argv[++i], nullptr, 10);
    } else if (argument == "--seed" && i + 1 < argc) {
      seed = std::strtoull(argv[++i], nullptr, 10);
    } else if (std::filesystem::is_directory(argument)) {
      for (const auto& entry : std::filesystem::recursive_directory_iterator(argument)) {
        if (entry.is_regular_file()) done += RunFile(entry.path());
      }
    } else {
      done += RunFile(argument);
    }
  }
  const std::vector<std::string> corpus = Corpus();
  if (runs > 0) {
    for (const std::string& text : corpus) Run(text);
    done += corpus.size();
  }
  Mutator mutator(corpus, seed);
  for (size_t i = 0; i < runs; ++i, ++done) Run(mutator.Next());
  if (done == 0) {
    std::fprintf(stderr, "usage: codec_fuzz [--runs N] [--seed S] [FILE|FOLDER ...]\n");
    return 2;
  }
  std::printf("%zu inputs\n", done);
  return 0;
}

#endif
