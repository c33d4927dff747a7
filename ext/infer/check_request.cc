// CheckInferRequest of infer/codec.h.
#include <sys/random.h>

#include <algorithm>
#include <bit>
#include <limits>

#include "infer/codec.h"
#include "infer/contents.h"
#include "infer/protobuf.h"
#include "infer/refusal.h"
#include "util/dcheck.h"

namespace tidegate {
namespace {

using namespace protobuf;

[[gnu::cold]] Status RefuseModel(const ModelSpec& spec, const std::string& what) {
  return Status::Error(Reason::kInvalidTensor, "model " + Quoted(spec.name) + ": " + what);
}

[[gnu::cold]] Status RefuseInput(const ModelSpec& spec, const TensorSpec& input, const std::string& what) {
  return Status::Error(Reason::kInvalidTensor,
                       "model " + Quoted(spec.name) + ", input " + Quoted(input.name) + ": " + what);
}

[[gnu::cold]] Status Unsupported(const ModelSpec& spec, const std::string& what) {
  return Status::Error(Reason::kNotSupported, "model " + Quoted(spec.name) + what);
}

// A batch holds at most this many elements of one tensor, so that no product of sizes overflows further down whatever
// an element costs there.
constexpr int64_t kMaxElements = std::numeric_limits<int64_t>::max() / 64;

// Where `name` is in `tensors`; tensors.size() when it is not. Clients mostly keep the model's order: `guess` first.
inline size_t Find(const std::vector<TensorSpec>& tensors, std::string_view name, size_t guess) {
  if (guess < tensors.size() && tensors[guess].name == name) return guess;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (tensors[i].name == name) return i;
  }
  return tensors.size();
}

// The parsed input of each input of the model. False with *status when one is missing, unknown or there twice.
bool MatchInputs(const ParsedRequest& parsed, const ModelSpec& spec, uint8_t (&of_spec)[kMaxInputs], Status* status) {
  const size_t n_parsed = std::min(parsed.n_inputs, kMostParsedInputs);
  uint64_t seen = 0;
  for (size_t j = 0; j < n_parsed; ++j) {
    const std::string_view name = parsed.inputs[j].name;
    const size_t i = Find(spec.inputs, name, j);
    if (i == spec.inputs.size()) [[unlikely]] {
      *status = RefuseModel(spec, "input " + Quoted(name) + " is not known; expected " + NamesText(spec.inputs));
      return false;
    }
    if (seen >> i & 1) [[unlikely]] {
      *status = RefuseInput(spec, spec.inputs[i], "it is given twice; expected once");
      return false;
    }
    seen |= uint64_t{1} << i;
    of_spec[i] = static_cast<uint8_t>(j);
    if (parsed.inputs[j].uses_shared_memory) [[unlikely]] {
      *status = Unsupported(
          spec, ", input " + Quoted(name) + ": shared memory is not supported; send the tensor in the message");
      return false;
    }
  }
  if (n_parsed != spec.inputs.size()) [[unlikely]] {
    const auto missing = static_cast<size_t>(std::countr_one(seen));
    *status = RefuseInput(spec, spec.inputs[missing], "it is missing; expected " + TypeText(spec.inputs[missing]));
    return false;
  }
  return true;
}

// All raw or none: one entry for each input, and no typed contents beside them.
bool CheckRawCount(const ParsedRequest& parsed, const ModelSpec& spec, const uint8_t (&of_spec)[kMaxInputs],
                   Status* status) {
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    if (!parsed.inputs[of_spec[i]].has_contents) continue;
    *status = RefuseInput(spec, spec.inputs[i], "it has contents beside raw_input_contents; expected one of the two");
    return false;
  }
  if (parsed.n_raw == parsed.n_inputs) return true;
  *status = RefuseModel(spec, "there are " + std::to_string(parsed.n_raw) + " raw_input_contents for " +
                                  std::to_string(parsed.n_inputs) + " inputs; expected one for each of " +
                                  NamesText(spec.inputs));
  return false;
}

// Why the shape of an input does not fit, once it is known that it does not.
[[gnu::cold]] Status RefuseShape(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input) {
  const std::string shape = "its shape is " + ShapeText(input.shape, input.shape_too_long);
  const std::string expected = "expected " + ShapeText(tensor.dims);
  if (input.shape_too_long || input.shape.rank != tensor.dims.rank) {
    return RefuseInput(spec, tensor, shape + "; " + expected + ", " + std::to_string(tensor.dims.rank) + " dimensions");
  }
  const auto dims = input.shape.span();
  if (std::any_of(dims.begin(), dims.end(), [](int64_t dim) { return dim < 0; })) {
    return RefuseInput(spec, tensor, shape + "; " + expected + " with a size for each -1");
  }
  return RefuseInput(spec, tensor, shape + "; " + expected + (spec.max_batch_size > 0 ? " with the rows first" : ""));
}

// Rank, dimensions, rows and element count. *rows is 0 until the first input has said how many there are.
bool CheckShape(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, uint32_t* rows,
                int64_t* count, Status* status) {
  const Dims& want = tensor.dims;
  const Dims& have = input.shape;
  bool fits = have.rank == want.rank && !input.shape_too_long;
  bool empty = false;
  bool overflows = false;
  int64_t per_row = 1;
  const int first = spec.max_batch_size > 0 ? 1 : 0;
  if (fits) [[likely]] {
    for (int k = first; k < want.rank; ++k) {
      const int64_t dim = have.d[k];
      fits &= dim >= 0 && (dim == want.d[k] || want.d[k] == -1);
      empty |= dim == 0;
      overflows |= dim > 0 && __builtin_mul_overflow(per_row, dim, &per_row);
    }
    if (first == 1) fits &= have.d[0] >= 0;
  }
  if (!fits) [[unlikely]] {
    *status = RefuseShape(spec, tensor, input);
    return false;
  }
  int64_t most = 0;
  if (overflows || __builtin_mul_overflow(per_row, std::max<int64_t>(spec.max_batch_size, 1), &most) ||
      most > kMaxElements) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "its shape " + ShapeText(have) + " is too large to count; expected " + TypeText(tensor));
    return false;
  }
  uint32_t here = 1;
  if (first == 1) {
    if (have.d[0] == 0 || have.d[0] > static_cast<int64_t>(spec.max_batch_size)) [[unlikely]] {
      *status = RefuseInput(spec, tensor,
                            "its shape " + ShapeText(have) + " has " + std::to_string(have.d[0]) +
                                " rows; expected 1 to " + std::to_string(spec.max_batch_size));
      return false;
    }
    here = static_cast<uint32_t>(have.d[0]);
  }
  if (*rows == 0) *rows = here;
  if (*rows != here) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "it has " + std::to_string(here) + " rows where input " + Quoted(spec.inputs[0].name) +
                              " has " + std::to_string(*rows) + "; expected as many in each input");
    return false;
  }
  *count = empty ? 0 : per_row * here;
  return true;
}

// BYTES: `count` strings, each behind its length, and nothing else.
bool CheckStrings(const ModelSpec& spec, const TensorSpec& tensor, std::string_view raw, const Dims& dims,
                  int64_t count, Status* status) {
  constexpr size_t kPrefix = sizeof(uint32_t);
  const char* at = raw.data();
  size_t left = raw.size();
  int64_t n = 0;
  for (; left > 0 && n < count; ++n) {
    uint32_t length = 0;
    if (left >= kPrefix) std::memcpy(&length, at, kPrefix);
    if (left < kPrefix || length > left - kPrefix) [[unlikely]] {
      const std::string which = "string " + std::to_string(n);
      *status = RefuseInput(
          spec, tensor,
          left < kPrefix
              ? which + " has " + std::to_string(left) + " bytes; expected a length of 4 bytes before each string"
              : which + " is said to have " + std::to_string(length) + " bytes; expected at most the " +
                    std::to_string(left - kPrefix) + " that are left");
      return false;
    }
    at += kPrefix + length;
    left -= kPrefix + length;
  }
  if (n != count || left != 0) [[unlikely]] {
    *status =
        RefuseInput(spec, tensor,
                    (left != 0 ? std::to_string(left) + " bytes are left over after " : "it has ") + std::to_string(n) +
                        " strings; expected " + std::to_string(count) + " for BYTES " + ShapeText(dims));
    return false;
  }
  return true;
}

bool CheckRaw(const ModelSpec& spec, const TensorSpec& tensor, std::string_view raw, const Dims& dims, int64_t count,
              Status* status) {
  if (tensor.type == DataType::kBytes) return CheckStrings(spec, tensor, raw, dims, count, status);
  const size_t bytes = static_cast<size_t>(count) * ElementBytes(tensor.type);
  if (raw.size() == bytes) return true;
  *status = RefuseInput(spec, tensor,
                        "it has " + std::to_string(raw.size()) + " bytes; expected " + std::to_string(bytes) + " for " +
                            std::string(WireName(tensor.type)) + " " + ShapeText(dims));
  return false;
}

// Each InferTensorContents of a parsed input, which is known to be well-formed.
template <typename Visit>
Fault VisitInputContents(const ParsedInput& input, Visit&& visit) {
  Cursor at = Begin(input.message);
  const Cursor end = End(input.message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (tag != 0x2a) {
      at = SkipValue(at, end, tag, kMaxDepth);
      continue;
    }
    std::string_view contents;
    at = ReadDelimited(at, end, &contents);
    if (Fault fault = VisitContents(contents, kMaxDepth, visit)) return fault;
  }
  return nullptr;
}

// First pass: the contents are the right field and as many values as the shape says. *bytes: how many their raw form
// has.
bool MeasureContents(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, int64_t count,
                     size_t* bytes, Status* status) {
  const ContentsField want = ContentsOf(tensor.type);
  ContentsField other = kNoContents;
  size_t values = 0;
  size_t string_bytes = 0;
  VisitInputContents(input, [&](ContentsField field, std::string_view run) -> Fault {
    const size_t more = ValuesIn(field, run);
    if (field != want) {
      if (more > 0) other = field;
      return nullptr;
    }
    values += more;
    if (field == kBytesContents) string_bytes += sizeof(uint32_t) + run.size();
    return nullptr;
  });
  if (other != kNoContents) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "it has " + std::string(kContentsNames[other]) + "; expected " +
                              std::string(kContentsNames[want]) + " for " + std::string(WireName(tensor.type)));
    return false;
  }
  if (values != static_cast<uint64_t>(count)) [[unlikely]] {
    *status = RefuseInput(spec, tensor,
                          "it has " + std::to_string(values) + " values; expected " + std::to_string(count) + " for " +
                              std::string(WireName(tensor.type)) + " " + ShapeText(input.shape) + ", raw" +
                              (want == kNoContents ? "" : " or in " + std::string(kContentsNames[want])));
    return false;
  }
  *bytes = tensor.type == DataType::kBytes ? string_bytes : values * ElementBytes(tensor.type);
  return true;
}

// Second pass: writes the raw form to `to`, which MeasureContents has measured.
bool ConvertContents(const ModelSpec& spec, const TensorSpec& tensor, const ParsedInput& input, std::byte* to,
                     Status* status) {
  const ContentsField want = ContentsOf(tensor.type);
  const std::byte* const begin = to;
  int64_t value = 0;
  const Fault fault = VisitInputContents(input, [&](ContentsField field, std::string_view run) -> Fault {
    if (field != want) return nullptr;
    return PutRun(tensor.type, run, &to, &value) ? nullptr : "out of range";
  });
  if (!fault) return true;
  const auto element = static_cast<size_t>(to - begin) / ElementBytes(tensor.type);
  *status = RefuseInput(spec, tensor,
                        "element " + std::to_string(element) + " is " + std::to_string(value) + "; expected what " +
                            std::string(WireName(tensor.type)) + " can hold");
  return false;
}

// The inputs that come as typed contents, as raw form in request->scratch. `of_spec` as in MatchInputs; the element
// counts are in inputs[i].bytes and are replaced. Two passes, so that the views do not move.
bool ConvertInputs(const ParsedRequest& parsed, const ModelSpec& spec, const uint8_t (&of_spec)[kMaxInputs],
                   Request* request, Status* status) {
  size_t total = 0;
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    InputView& view = request->inputs[i];
    if (!MeasureContents(spec, spec.inputs[i], parsed.inputs[of_spec[i]], static_cast<int64_t>(view.bytes), &view.bytes,
                         status)) {
      return false;
    }
    total += view.bytes;
  }
  request->scratch.resize(total);
  std::byte* to = request->scratch.data();
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    InputView& view = request->inputs[i];
    view.data = to;
    if (view.bytes > 0 && !ConvertContents(spec, spec.inputs[i], parsed.inputs[of_spec[i]], to, status)) return false;
    to += view.bytes;
  }
  return true;
}

bool CheckRequestedOutputs(const ParsedRequest& parsed, const ModelSpec& spec, uint64_t* wanted, Status* status) {
  uint64_t mask = 0;
  for (size_t j = 0; j < parsed.outputs.size(); ++j) {
    const ParsedOutput& output = parsed.outputs[j];
    const size_t i = Find(spec.outputs, output.name, j);
    if (i == spec.outputs.size()) [[unlikely]] {
      *status =
          RefuseModel(spec, "output " + Quoted(output.name) + " is not known; expected " + NamesText(spec.outputs));
      return false;
    }
    if (mask >> i & 1) [[unlikely]] {
      *status = RefuseModel(spec, "output " + Quoted(output.name) + " is requested twice; expected once");
      return false;
    }
    if (output.uses_shared_memory || output.uses_classification) [[unlikely]] {
      *status = Unsupported(
          spec, ", output " + Quoted(output.name) +
                    (output.uses_shared_memory ? ": shared memory is not supported; leave its parameters out"
                                               : ": classification is not supported; leave the parameter out"));
      return false;
    }
    mask |= uint64_t{1} << i;
  }
  *wanted = mask;
  return true;
}

// Keys of the shape hash, new in each process: a client cannot prepare shapes that collide.
struct ShapeSecret {
  uint64_t a = 0x9e3779b97f4a7c15;
  uint64_t b = 0xd1b54a32d192ed03;
  ShapeSecret() {
    uint64_t random[2];
    if (getrandom(random, sizeof random, GRND_NONBLOCK) != sizeof random) return;
    a ^= random[0];
    b ^= random[1];
  }
};
const ShapeSecret kShapeSecret;

inline uint64_t Mix(uint64_t hash, uint64_t value) {
  // The full product keeps every bit of both sides in play; its halves are folded.
  const auto product = static_cast<unsigned __int128>(hash ^ value) * (kShapeSecret.b | 1);
  return (static_cast<uint64_t>(product) ^ static_cast<uint64_t>(product >> 64)) + kShapeSecret.a;
}

// Requests with the same key may share a batch. Different shapes have the same key once in 2^64 pairs; whoever runs a
// batch compares the dimensions themselves before it, so that a collision costs a bisection and never mixes shapes.
uint64_t ShapeKey(const ModelSpec& spec, const Request& request) {
  uint64_t hash = kShapeSecret.a;
  const int first = spec.max_batch_size > 0 ? 1 : 0;
  for (const InputView& input : request.inputs) {
    for (int k = first; k < input.dims.rank; ++k) hash = Mix(hash, static_cast<uint64_t>(input.dims.d[k]));
  }
  hash = Mix(hash, request.inputs.size());
  return hash != 0 ? hash : 1;
}

}  // namespace

Status CheckInferRequest(const ParsedRequest& parsed, const ModelSpec& spec, Request* request) {
  Status status;
  if (parsed.in_sequence) [[unlikely]] {
    return Unsupported(spec, ": parameter 'sequence_id' names a sequence; sequences are not supported, leave it out");
  }
  uint8_t of_spec[kMaxInputs];
  if (!MatchInputs(parsed, spec, of_spec, &status)) [[unlikely]] {
    return status;
  }
  const bool is_raw = parsed.n_raw > 0;
  if (is_raw && !CheckRawCount(parsed, spec, of_spec, &status)) [[unlikely]] {
    return status;
  }

  request->inputs.resize(spec.inputs.size());
  uint32_t rows = 0;
  for (size_t i = 0; i < spec.inputs.size(); ++i) {
    const TensorSpec& tensor = spec.inputs[i];
    const ParsedInput& input = parsed.inputs[of_spec[i]];
    InputView& view = request->inputs[i];
    if (input.datatype != WireName(tensor.type)) [[unlikely]] {
      return RefuseInput(spec, tensor, "its datatype is " + Quoted(input.datatype) + "; expected " + TypeText(tensor));
    }
    int64_t count = 0;
    if (!CheckShape(spec, tensor, input, &rows, &count, &status)) [[unlikely]] {
      return status;
    }
    view.dims = input.shape;
    view.bytes = static_cast<size_t>(count);  // until it is replaced: by the size of raw, or by ConvertInputs
    if (!is_raw) continue;
    const std::string_view raw = parsed.raw[of_spec[i]];
    if (!CheckRaw(spec, tensor, raw, input.shape, count, &status)) [[unlikely]] {
      return status;
    }
    view.data = reinterpret_cast<const std::byte*>(raw.data());
    view.bytes = raw.size();
  }
  if (!is_raw && !ConvertInputs(parsed, spec, of_spec, request, &status)) [[unlikely]] {
    return status;
  }

  TIDEGATE_DCHECK(!spec.outputs.empty() && spec.outputs.size() <= kMaxOutputs, "a served model has 1 to 64 outputs");
  request->outputs_wanted = ~uint64_t{0} >> (kMaxOutputs - spec.outputs.size());
  if (!parsed.outputs.empty() && !CheckRequestedOutputs(parsed, spec, &request->outputs_wanted, &status)) [[unlikely]] {
    return status;
  }
  request->id = parsed.id;
  request->rows = std::max(rows, 1u);  // a model without inputs has nothing to count
  request->priority = static_cast<uint32_t>(std::min<uint64_t>(parsed.priority, std::numeric_limits<uint32_t>::max()));
  request->timeout_us = parsed.timeout_us;
  request->empty_final_response = parsed.empty_final_response;
  request->shape_key = spec.has_free_dims ? ShapeKey(spec, *request) : 0;
  return status;
}

}  // namespace tidegate
