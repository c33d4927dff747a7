// One executor's share of a session: buffers, bindings, and the run.
//
// A batch is gathered into buffers that were made for max_batch_size rows, and runs through a binding that was made for
// its row count (and its shapes) the first time these came. With fixed shapes a run therefore allocates nothing here:
// it copies the rows, calls the runtime and shows views of the output buffers.
//
// Three things cannot be fixed beforehand and are done per run: outputs whose shape depends on the data or on free
// dimensions are left to the runtime and read afterwards; BYTES tensors are objects of the runtime's and are converted;
// on a device with its own memory inputs are bound again, since binding is what copies them there.
#pragma once

#include <memory>

#include "batch/instance.h"
#include "infer/model_spec.h"
#include "ort/session.h"
#include "util/status.h"

namespace tidegate {

// Bounds of the cache of bindings, least recently used out first. 16 shapes: more at once means that shapes do not
// repeat, and then a cache is no help. 64 row counts each: the default max_batch_size.
inline constexpr size_t kMaxShapeBuckets = 16;
inline constexpr size_t kMaxBindingsPerBucket = 64;

// Checks the spec (CheckSpec) and makes an instance of it with its buffers. kLoadFailed, or ok. Any number of instances
// may share a session.
Status MakeOrtInstance(std::shared_ptr<Session> session, const ModelSpec& spec, std::unique_ptr<Instance>* out);

}  // namespace tidegate
