# The codec for tests, and server.settings values -> ModelSpec for every binding that needs one.

from libc.stdint cimport int64_t, uint8_t, uint32_t

from model_spec cimport DataType, Dims, ModelSpec, TensorSpec, kMaxInputs, kMaxOutputs, kMaxRank


cdef int to_dims(object dims, object tensor, Dims* out) except -1:
    """A tuple of sizes, -1 for a free one. `tensor` is its name, for the message."""
    if len(dims) > kMaxRank:
        raise NativeError("LOAD_FAILED", f"tensor '{tensor}' has {len(dims)} dimensions; at most {kMaxRank} are served")
    cdef size_t i = 0
    cdef int64_t size
    for dim in dims:
        size = dim
        if size < -1:
            raise NativeError("LOAD_FAILED", f"tensor '{tensor}' has a dimension {size}; only -1 means a free one")
        out.d[i] = size
        i += 1
    out.rank = <uint8_t>i
    return 0


cdef int to_tensor_spec(object settings, TensorSpec* out) except -1:
    """server.settings.TensorSettings -> TensorSpec."""
    name = settings.name
    out.name = name.encode()
    out.type = <DataType><int>settings.datatype.value
    to_dims(settings.dims, name, &out.dims)
    to_dims(settings.model_dims, name, &out.model_dims)
    return 0


cdef int to_model_spec(object settings, ModelSpec* out) except -1:
    """server.settings.ModelSettings -> ModelSpec. NativeError LOAD_FAILED for what the core cannot hold.

    Reads `name`, `version`, `max_batch_size`, `inputs` and `outputs`, nothing else.
    """
    if len(settings.inputs) > kMaxInputs or len(settings.outputs) > kMaxOutputs or not settings.outputs:
        raise NativeError(
            "LOAD_FAILED",
            f"model '{settings.name}' has {len(settings.inputs)} inputs and {len(settings.outputs)} outputs; "
            f"at most {kMaxInputs} inputs and 1 to {kMaxOutputs} outputs are served",
        )
    cdef TensorSpec tensor
    cdef bint batches = settings.max_batch_size > 0
    out.name = settings.name.encode()
    out.version = settings.version.encode()
    out.max_batch_size = <uint32_t>settings.max_batch_size
    out.inputs.clear()
    out.outputs.clear()
    out.has_free_dims = False
    for one in settings.inputs:
        to_tensor_spec(one, &tensor)
        out.inputs.push_back(tensor)
        if -1 in one.dims[1 if batches else 0:]:
            out.has_free_dims = True
    for one in settings.outputs:
        to_tensor_spec(one, &tensor)
        out.outputs.push_back(tensor)
    for one in (*settings.inputs, *settings.outputs):
        if batches and (not one.dims or one.dims[0] != -1 or not one.model_dims or one.model_dims[0] != -1):
            raise NativeError("LOAD_FAILED", f"tensor '{one.name}' of a model that batches must begin with -1")
    return 0
