// What an executor thread needs of a runtime: gather some requests, run them, show the outputs.
//
// Threads    One executor thread uses an instance at a time; nobody else touches it.
// Lifetime   Owned by its Version. outputs() is valid until the next Run or the end of the instance.
#pragma once

#include <cstdint>
#include <span>

#include "infer/codec.h"
#include "infer/request.h"
#include "util/status.h"

namespace tidegate {

struct RunTimes {
  int64_t input_done_ns = 0;  // inputs gathered and bound
  int64_t infer_done_ns = 0;  // the runtime returned, or failed
};

class Instance {
 public:
  virtual ~Instance() = default;

  // Runs the requests as one batch. They share all non-batch dimensions; `rows` is their sum (1 for a model without
  // batch dimension). Any failure is kModelRaised or kModelOutputInvalid: the requests were checked before. Fills
  // *times in either case. Does not touch anything of a request but its inputs.
  virtual Status Run(std::span<Request* const> requests, uint32_t rows, RunTimes* times) = 0;

  // One view per ModelSpec::outputs, in that order.
  virtual std::span<const OutputView> outputs() const = 0;

  // Bytes of buffers that this instance holds.
  virtual size_t memory_bytes() const = 0;

  // Asks a Run in progress on another thread to end soon with an error (a drain that timed out). Thread-safe.
  virtual void Terminate() = 0;
};

}  // namespace tidegate
