#include "infer/codec.h"

#include <algorithm>
#include <bit>
#include <limits>

#include "infer/contents.h"
#include "infer/parameters.h"
#include "infer/protobuf.h"
#include "infer/refusal.h"

namespace tidegate {
namespace {

using namespace protobuf;

static_assert(std::endian::native == std::endian::little, "tensors travel little-endian and are copied as they are");

// -- the message ------------------------------------------------------------------------------------------------------

void AppendDim(uint64_t dim, ParsedInput* input) {
  if (input->shape.rank < kMaxRank) {
    input->shape.d[input->shape.rank++] = static_cast<int64_t>(dim);
  } else {
    input->shape_too_long = true;
  }
}

Fault ParseInput(std::string_view message, int depth, ParsedInput* out, ParameterFault* parameter_fault) {
  out->message = message;
  out->name = {};
  out->datatype = {};
  out->shape.rank = 0;
  out->shape_too_long = out->has_contents = out->uses_shared_memory = false;
  TensorParameters parameters;
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    uint64_t number = 0;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->name)) return "the name of an input is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &out->datatype);
        if (!at) return kBadLength;
        if (!IsUtf8(out->datatype)) return "the datatype of an input is not UTF-8";
        break;
      case 0x1a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        for (Cursor dim = Begin(bytes); dim < End(bytes);) {
          dim = ReadVarint(dim, End(bytes), &number);
          if (!dim) return kBadPacked;
          AppendDim(number, out);
        }
        break;
      case 0x18:
        at = ReadVarint(at, end, &number);
        if (!at) return kBadVarint;
        AppendDim(number, out);
        break;
      case 0x22:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = parameters.Add(bytes, depth - 1)) return fault;
        break;
      case 0x2a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = VisitContents(bytes, depth - 1, CheckRun)) return fault;
        out->has_contents = true;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  out->uses_shared_memory = parameters.uses_shared_memory();
  parameters.JudgeInput(out->name, parameter_fault);
  return nullptr;
}

Fault ParseOutput(std::string_view message, int depth, ParsedOutput* out, ParameterFault* parameter_fault) {
  TensorParameters parameters;
  Cursor at = Begin(message);
  const Cursor end = End(message);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->name)) return "the name of an output is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = parameters.Add(bytes, depth - 1)) return fault;
        break;
      default:
        at = SkipValue(at, end, tag, depth);
        if (!at) return kBadUnknown;
    }
  }
  out->uses_shared_memory = parameters.uses_shared_memory();
  out->uses_classification = parameters.has_classification();
  parameters.JudgeOutput(out->name, parameter_fault);
  return nullptr;
}

Fault ParseMessage(std::string_view body, ParsedRequest* out, RequestParameters* parameters,
                   ParameterFault* parameter_fault) {
  Cursor at = Begin(body);
  const Cursor end = End(body);
  while (at < end) {
    uint32_t tag = 0;
    at = ReadTag(at, end, &tag);
    if (!at) return kBadTag;
    std::string_view bytes;
    switch (tag) {
      case 0x0a:
        at = ReadDelimited(at, end, &out->model_name);
        if (!at) return kBadLength;
        if (!IsUtf8(out->model_name)) return "model_name is not UTF-8";
        break;
      case 0x12:
        at = ReadDelimited(at, end, &out->model_version);
        if (!at) return kBadLength;
        if (!IsUtf8(out->model_version)) return "model_version is not UTF-8";
        break;
      case 0x1a:
        at = ReadDelimited(at, end, &out->id);
        if (!at) return kBadLength;
        if (!IsUtf8(out->id)) return "id is not UTF-8";
        break;
      case 0x22:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (Fault fault = parameters->Add(bytes, kMaxDepth - 1)) return fault;
        break;
      case 0x2a: {
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        // One beyond the limit is read into the last place: it has to be valid and is not needed.
        const size_t index = std::min(out->n_inputs, kMostParsedInputs - 1);
        if (index == out->inputs.size()) out->inputs.emplace_back();
        ++out->n_inputs;
        if (Fault fault = ParseInput(bytes, kMaxDepth - 1, &out->inputs[index], parameter_fault)) return fault;
        break;
      }
      case 0x32: {
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        ParsedOutput output;
        if (Fault fault = ParseOutput(bytes, kMaxDepth - 1, &output, parameter_fault)) return fault;
        if (out->outputs.size() < kMostParsedOutputs) out->outputs.push_back(output);
        break;
      }
      case 0x3a:
        at = ReadDelimited(at, end, &bytes);
        if (!at) return kBadLength;
        if (out->n_raw++ < kMostParsedInputs) out->raw.push_back(bytes);
        break;
      default:
        at = SkipValue(at, end, tag, kMaxDepth);
        if (!at) return kBadUnknown;
    }
  }
  return nullptr;
}

[[gnu::cold]] Status RefuseParameter(std::string_view model, const ParameterFault& fault) {
  std::string message = "model " + Quoted(model);
  if (fault.side) message += std::string(", ") + fault.side + " " + Quoted(fault.tensor);
  message += ": parameter " + Quoted(fault.parameter) + " must be " + fault.expectation;
  return Status::Error(Reason::kInvalidTensor, std::move(message));
}

// -- the answer -------------------------------------------------------------------------------------------------------

constexpr size_t kPrefixBytes = 5;
constexpr size_t kMaxMessageBytes = std::numeric_limits<int32_t>::max();

inline std::byte* PutPrefix(std::byte* to, size_t length) {
  to = PutByte(to, 0);  // not compressed
  for (int shift = 24; shift >= 0; shift -= 8) to = PutByte(to, static_cast<uint8_t>(length >> shift));
  return to;
}

// parameters { key: "triton_final_response" value { bool_param: true } }, tag and length included.
constexpr std::string_view kFinalResponse = "\x22\x1b\x0a\x15triton_final_response\x12\x02\x08\x01";
static_assert(kFinalResponse.size() == 29);

// What one request gets of one output.
struct Slice {
  const std::byte* data;
  size_t bytes;
  size_t shape_bytes;  // packed
  size_t meta_bytes;   // InferOutputTensor without tag and length
};

}  // namespace

void ParsedRequest::Reset() {
  model_name = model_version = id = sticky_key = {};
  n_inputs = n_raw = 0;
  outputs.clear();
  raw.clear();
  priority = 0;
  timeout_us = 0;
  empty_final_response = in_sequence = false;
}

Status ParseInferRequest(std::string_view body, ParsedRequest* out) {
  out->Reset();
  RequestParameters parameters;
  ParameterFault parameter_fault;
  if (Fault fault = ParseMessage(body, out, &parameters, &parameter_fault)) [[unlikely]] {
    return Status::Error(Reason::kMalformedMessage, std::string("the message is not a ModelInferRequest: ") + fault);
  }
  if (parameters.any()) parameters.Judge(body, out, &parameter_fault);
  if (parameter_fault.expectation) [[unlikely]] {
    return RefuseParameter(out->model_name, parameter_fault);
  }
  return Status::Ok();
}

Status CheckOutputs(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t rows) {
  const auto refuse = [&](const std::string& what) {
    return Status::Error(Reason::kModelOutputInvalid, "model " + Quoted(spec.name) + what);
  };
  if (outputs.size() != spec.outputs.size()) [[unlikely]] {
    return refuse(": it gave " + std::to_string(outputs.size()) + " outputs; expected " +
                  std::to_string(spec.outputs.size()));
  }
  const bool batches = spec.max_batch_size > 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    const TensorSpec& tensor = spec.outputs[i];
    const OutputView& output = outputs[i];
    bool fits = output.type == tensor.type && output.dims.rank == tensor.dims.rank;
    for (int k = 0; fits && k < tensor.dims.rank; ++k) {
      const int64_t want = k == 0 && batches ? static_cast<int64_t>(rows) : tensor.dims.d[k];
      fits = want == -1 ? output.dims.d[k] >= 0 : output.dims.d[k] == want;
    }
    const auto which = [&] { return ", output " + Quoted(tensor.name) + ": "; };
    if (!fits) [[unlikely]] {
      return refuse(which() + "the model gave " + std::string(WireName(output.type)) + " " + ShapeText(output.dims) +
                    "; expected " + TypeText(tensor) +
                    (batches ? " with " + std::to_string(rows) + " rows" : std::string()));
    }
    int64_t count = 0;
    size_t bytes = 0;
    bool is_whole = ElementCount(output.dims.span(), &count);
    if (output.type == DataType::kBytes) {
      const auto offsets = output.element_offsets;
      is_whole = is_whole && offsets.size() == static_cast<size_t>(count) + 1 && offsets.front() == 0 &&
                 offsets.back() == output.bytes && std::is_sorted(offsets.begin(), offsets.end());
    } else {
      is_whole = is_whole && !__builtin_mul_overflow(static_cast<size_t>(count), ElementBytes(output.type), &bytes) &&
                 bytes == output.bytes;
    }
    if (!is_whole || (output.bytes > 0 && output.data == nullptr)) [[unlikely]] {
      return refuse(which() + "the model gave " + std::to_string(output.bytes) + " bytes; expected the elements of " +
                    std::string(WireName(output.type)) + " " + ShapeText(output.dims));
    }
  }
  return Status::Ok();
}

void EncodeInferResponse(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t first_row,
                         Request* request) {
  const bool batches = spec.max_batch_size > 0;
  const uint64_t wanted = request->outputs_wanted;
  const auto dim = [&](const OutputView& output, int k) {
    return static_cast<uint64_t>(k == 0 && batches ? request->rows : output.dims.d[k]);
  };

  // What goes in, and how large it is.
  Slice slices[kMaxOutputs];
  size_t response = StringBytes(spec.name) + StringBytes(spec.version) + StringBytes(request->id);
  if (request->in_stream) response += kFinalResponse.size();
  size_t head = response;  // what stands before the raw contents
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const auto i = static_cast<size_t>(std::countr_zero(left));
    const OutputView& output = outputs[i];
    Slice& slice = slices[i];
    slice.data = output.data;
    slice.bytes = output.bytes;
    if (batches) {
      const auto total = static_cast<size_t>(output.dims.d[0]);
      if (output.type == DataType::kBytes) {
        const size_t per_row = (output.element_offsets.size() - 1) / total;
        const size_t begin = output.element_offsets[first_row * per_row];
        slice.data += begin;
        slice.bytes = output.element_offsets[(first_row + request->rows) * per_row] - begin;
      } else {
        const size_t per_row = output.bytes / total;
        slice.data += first_row * per_row;
        slice.bytes = request->rows * per_row;
      }
    }
    slice.shape_bytes = 0;
    for (int k = 0; k < output.dims.rank; ++k) slice.shape_bytes += VarintBytes(dim(output, k));
    slice.meta_bytes = StringBytes(spec.outputs[i].name) + StringBytes(WireName(output.type)) +
                       (slice.shape_bytes ? DelimitedBytes(slice.shape_bytes) : 0);
    head += DelimitedBytes(slice.meta_bytes);
    response += DelimitedBytes(slice.meta_bytes) + DelimitedBytes(slice.bytes);
  }
  const size_t message = request->in_stream ? DelimitedBytes(response) : response;
  std::vector<std::byte>& reply = request->reply;
  reply.clear();
  if (message > kMaxMessageBytes) [[unlikely]] {
    request->status = Status::Error(Reason::kModelOutputInvalid,
                                    "model " + Quoted(spec.name) + ": the answer has " + std::to_string(message) +
                                        " bytes; expected less than the 2 GiB of a message");
    return;
  }

  // Room for all of it at once; the raw contents are then appended, which writes each byte of them once, where a resize
  // would fill them with zeros first.
  head += kPrefixBytes + message - response;
  reply.reserve(kPrefixBytes + message);
  reply.resize(head);
  std::byte* to = PutPrefix(reply.data(), message);
  if (request->in_stream) {
    to = PutByte(to, 0x12);
    to = PutVarint(to, response);
  }
  to = PutString(to, 0x0a, spec.name);
  to = PutString(to, 0x12, spec.version);
  to = PutString(to, 0x1a, request->id);
  if (request->in_stream) to = PutBytes(to, kFinalResponse.data(), kFinalResponse.size());
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const auto i = static_cast<size_t>(std::countr_zero(left));
    const OutputView& output = outputs[i];
    to = PutByte(to, 0x2a);
    to = PutVarint(to, slices[i].meta_bytes);
    to = PutString(to, 0x0a, spec.outputs[i].name);
    to = PutString(to, 0x12, WireName(output.type));
    if (output.dims.rank == 0) continue;
    to = PutByte(to, 0x1a);
    to = PutVarint(to, slices[i].shape_bytes);
    for (int k = 0; k < output.dims.rank; ++k) to = PutVarint(to, dim(output, k));
  }
  for (uint64_t left = wanted; left != 0; left &= left - 1) {
    const Slice& slice = slices[std::countr_zero(left)];
    std::byte tag_and_length[11];
    std::byte* const end = PutVarint(PutByte(tag_and_length, 0x32), slice.bytes);
    reply.insert(reply.end(), tag_and_length, end);
    reply.insert(reply.end(), slice.data, slice.data + slice.bytes);
  }
}

void EncodeStreamError(std::string_view model_name, std::string_view model_version, std::string_view id,
                       std::string_view message, std::vector<std::byte>* reply) {
  const size_t response =
      StringBytes(model_name) + StringBytes(model_version) + StringBytes(id) + kFinalResponse.size();
  const size_t whole = StringBytes(message) + DelimitedBytes(response);
  reply->resize(kPrefixBytes + whole);
  std::byte* to = PutPrefix(reply->data(), whole);
  to = PutString(to, 0x0a, message);
  if (!IsUtf8(message)) {
    for (std::byte* at = to - message.size(); at < to; ++at) {
      if (static_cast<uint8_t>(*at) >= 0x80) *at = std::byte{'?'};
    }
  }
  to = PutByte(to, 0x12);
  to = PutVarint(to, response);
  to = PutString(to, 0x0a, model_name);
  to = PutString(to, 0x12, model_version);
  to = PutString(to, 0x1a, id);
  PutBytes(to, kFinalResponse.data(), kFinalResponse.size());
}

size_t GatherInput(std::span<Request* const> requests, size_t index, std::byte* to) {
  std::byte* const begin = to;
  for (const Request* request : requests) {
    const InputView& input = request->inputs[index];
    to = PutBytes(to, input.data, input.bytes);
  }
  return static_cast<size_t>(to - begin);
}

}  // namespace tidegate
