// What one version promises on the wire: the values that a request is checked against. Constant once built.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "infer/tensor.h"

namespace tidegate {

// Outputs are selected by a 64-bit mask; a model with more is refused at load.
inline constexpr size_t kMaxOutputs = 64;
inline constexpr size_t kMaxInputs = 64;

struct TensorSpec {
  std::string name;
  DataType type = DataType::kInvalid;
  // As on the wire, batch dimension (-1) first when the model batches; -1 is free.
  Dims dims;
  // As the runtime knows it, batch dimension first when the model batches. Differs from `dims` only where the
  // configuration gives a `reshape`; then the n-th free dimension of one is the n-th free dimension of the other.
  Dims model_dims;
};

struct ModelSpec {
  std::string name;
  std::string version;              // exactly as replies carry it
  uint32_t max_batch_size = 0;      // rows; 0: the model has no batch dimension and a batch is one request
  std::vector<TensorSpec> inputs;   // in the model's order
  std::vector<TensorSpec> outputs;  // in the model's order
  // Whether an input has a free dimension beside the batch dimension: only then do shapes decide who shares a batch.
  bool has_free_dims = false;
};

}  // namespace tidegate
