// ModelInferRequest bytes -> checked views; outputs -> ModelInferResponse bytes. No I/O, no locks.
//
// Field numbers and rules of the messages: the KServe v2 protocol with Triton's extensions (protos/grpc_service.proto).
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "infer/model_spec.h"
#include "infer/request.h"
#include "infer/tensor.h"
#include "util/status.h"

namespace tidegate {

// One InferInputTensor as it came. Views point into the message.
struct ParsedInput {
  std::string_view message;  // all of it: the contents are read from here, once they are known to be wanted
  std::string_view name;
  std::string_view datatype;
  Dims shape;
  bool shape_too_long = false;      // more than kMaxRank dimensions; `shape` holds the first ones
  bool has_contents = false;        // an InferTensorContents, possibly empty
  bool uses_shared_memory = false;  // any of the shared_memory_ parameters
};

struct ParsedOutput {
  std::string_view name;
  bool uses_shared_memory = false;
  bool uses_classification = false;
};

// What a message holds more of than any model may have is counted and not kept: two bytes of a message would otherwise
// become a hundred of memory.
inline constexpr size_t kMostParsedInputs = kMaxInputs + 1;
inline constexpr size_t kMostParsedOutputs = kMaxOutputs + 1;

// Reused from message to message: buffers keep their capacity, which the limits above bound.
struct ParsedRequest {
  std::string_view model_name;
  std::string_view model_version;
  std::string_view id;
  std::string_view sticky_key;  // string form; an integer key is formatted into sticky_scratch
  std::string sticky_scratch;
  std::vector<ParsedInput> inputs;    // the first min(n_inputs, kMostParsedInputs) are in use
  size_t n_inputs = 0;                // as sent
  std::vector<ParsedOutput> outputs;  // requested ones, the first kMostParsedOutputs; empty: all
  std::vector<std::string_view> raw;  // raw_input_contents, the first kMostParsedInputs
  size_t n_raw = 0;                   // as sent
  uint64_t priority = 0;
  int64_t timeout_us = 0;
  bool empty_final_response = false;
  bool in_sequence = false;  // a sequence_id that is neither 0 nor ""
  void Reset();
};

// Parses a serialized ModelInferRequest in place: the views of *out point into `body` (and sticky_scratch). Accepts
// exactly what the official protobuf parser accepts (order, repeats, packed or not, unknown fields, merged messages,
// UTF-8 in strings). kMalformedMessage when it is not a ModelInferRequest; kInvalidTensor for a parameter of the wrong
// kind or a reserved name. Allocates nothing once the vectors of *out are as large as the messages need.
Status ParseInferRequest(std::string_view body, ParsedRequest* out);

// Checks a parsed request against the model and fills request->{id, inputs, outputs_wanted, rows, priority, timeout_us,
// shape_key, empty_final_response, scratch}. Every refusal is kInvalidTensor and names model, tensor and expectation,
// in bounded length. (kNotSupported for shared memory, sequences and classification.)
//
// Decided here, where the protocol is silent: a BOOL given as raw bytes reaches the model as it is, any value but 0
// being true; a free dimension may be 0, the rows may not; a priority beyond 32 bits counts as the largest.
Status CheckInferRequest(const ParsedRequest& parsed, const ModelSpec& spec, Request* request);

// One output of a batch, owned by the instance that ran it and valid until its next run.
struct OutputView {
  DataType type = DataType::kInvalid;
  Dims dims;  // of the whole batch, in the wire's shape (after `reshape`), batch dimension included
  const std::byte* data = nullptr;
  size_t bytes = 0;
  // BYTES only: data is in wire form and element i begins at element_offsets[i]; one more entry holds `bytes`.
  std::span<const size_t> element_offsets;
};

// Whether the outputs of a batch of `rows` rows are as the model promises (count, type, rank, fixed dimensions, batch
// dimension). kModelOutputInvalid otherwise.
Status CheckOutputs(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t rows);

// Writes the answer to one request of a batch, rows [first_row, first_row + request.rows), as one gRPC message (5-byte
// prefix included) into request->reply, replacing it. `outputs` has passed CheckOutputs. With request.in_stream the
// message is a ModelStreamInferResponse whose infer_response carries triton_final_response = true. An answer beyond the
// 2 GiB of a protobuf message leaves no reply but request->status, kModelOutputInvalid.
void EncodeInferResponse(const ModelSpec& spec, std::span<const OutputView> outputs, uint32_t first_row,
                         Request* request);

// Writes an in-band error of ModelStreamInfer (5-byte prefix included) into *reply, replacing it: error_message, and an
// infer_response with the names, the id and triton_final_response = true. Bytes of `message` that are not UTF-8 become
// '?', since one of them would cost the client the whole stream.
void EncodeStreamError(std::string_view model_name, std::string_view model_version, std::string_view id,
                       std::string_view message, std::vector<std::byte>* reply);

// Copies input `index` of the requests one after another to `to` (numeric types). Returns the bytes written.
size_t GatherInput(std::span<Request* const> requests, size_t index, std::byte* to);

}  // namespace tidegate
