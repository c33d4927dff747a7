# The codec for tests, and server.settings values -> ModelSpec for every binding that needs one.

from libc.stdint cimport int64_t, uint8_t, uint32_t
from libc.string cimport memcpy
from libcpp.memory cimport make_unique, unique_ptr
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from codec cimport (
    CheckInferRequest,
    CheckOutputs,
    EncodeInferResponse,
    EncodeStreamError,
    GatherInput,
    ParsedInput,
    ParsedOutput,
    ParsedRequest,
    ParseInferRequest,
    c_byte,
    c_InputView,
    c_OffsetSpan,
    c_OutputSpan,
    c_OutputView,
    c_Request,
    c_RequestSpan,
    kMostParsedInputs,
)
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


# -- for tests --------------------------------------------------------------------------------------------------------

# One for all calls, as an I/O thread has one: what a message leaves behind must not show in the next.
cdef ParsedRequest _parsed


cdef string_view to_view(bytes text):
    return string_view(<const char*>text, len(text))


cdef object from_view(string_view text):
    return text.data()[: text.size()]


cdef object from_bytes(const c_byte* data, size_t size):
    return (<const char*>data)[:size]


cdef object from_dims(const Dims& dims):
    return tuple([dims.d[i] for i in range(dims.rank)])


cdef int parse_and_check(bytes body, const ModelSpec& spec, c_Request* request) except -1:
    """Makes a checked request of `body`, which it keeps a copy of."""
    request.body.resize(len(body))
    memcpy(request.body.data(), <const char*>body, len(body))
    check(ParseInferRequest(string_view(<const char*>request.body.data(), request.body.size()), &_parsed))
    check(CheckInferRequest(_parsed, spec, request))
    return 0


def parse_infer_request(bytes body) -> dict:
    """What ParseInferRequest sees in a serialized ModelInferRequest; texts are bytes. Raises NativeError."""
    check(ParseInferRequest(to_view(body), &_parsed))
    inputs = []
    outputs = []
    cdef ParsedInput* tensor
    for i in range(min(_parsed.n_inputs, kMostParsedInputs)):
        tensor = &_parsed.inputs[i]
        inputs.append({
            "name": from_view(tensor.name),
            "datatype": from_view(tensor.datatype),
            "shape": from_dims(tensor.shape),
            "shape_too_long": tensor.shape_too_long,
            "has_contents": tensor.has_contents,
            "uses_shared_memory": tensor.uses_shared_memory,
        })
    cdef ParsedOutput output
    for output in _parsed.outputs:
        outputs.append({
            "name": from_view(output.name),
            "uses_shared_memory": output.uses_shared_memory,
            "uses_classification": output.uses_classification,
        })
    return {
        "model_name": from_view(_parsed.model_name),
        "model_version": from_view(_parsed.model_version),
        "id": from_view(_parsed.id),
        "sticky_key": from_view(_parsed.sticky_key),
        "inputs": inputs,
        "n_inputs": _parsed.n_inputs,
        "outputs": outputs,
        "raw": [from_view(raw) for raw in _parsed.raw],
        "n_raw": _parsed.n_raw,
        "priority": _parsed.priority,
        "timeout_us": _parsed.timeout_us,
        "empty_final_response": _parsed.empty_final_response,
        "in_sequence": _parsed.in_sequence,
    }


def check_infer_request(bytes body, settings) -> dict:
    """What a queue would get of `body` for a model with these ModelSettings. Raises NativeError."""
    cdef ModelSpec spec
    to_model_spec(settings, &spec)
    cdef unique_ptr[c_Request] owner = make_unique[c_Request]()
    cdef c_Request* request = owner.get()
    parse_and_check(body, spec, request)
    cdef c_InputView view
    inputs = []
    for view in request.inputs:
        inputs.append((from_dims(view.dims), from_bytes(view.data, view.bytes)))
    return {
        "id": from_view(request.id),
        "inputs": inputs,
        "outputs_wanted": request.outputs_wanted,
        "rows": request.rows,
        "priority": request.priority,
        "timeout_us": request.timeout_us,
        "shape_key": request.shape_key,
        "empty_final_response": request.empty_final_response,
    }


def encode_infer_response(bytes body, settings, outputs, uint32_t batch_rows, uint32_t first_row, bint in_stream):
    """The gRPC message that answers `body`, which stood at `first_row` of a batch of `batch_rows`.

    `outputs`: per output of the model (ONNX type number, dims of the batch, data) or, for BYTES, (number, dims, list of
    elements). Raises NativeError when the body or the outputs are refused.
    """
    cdef ModelSpec spec
    to_model_spec(settings, &spec)
    cdef unique_ptr[c_Request] owner = make_unique[c_Request]()
    cdef c_Request* request = owner.get()
    parse_and_check(body, spec, request)
    request.in_stream = in_stream
    kept = []  # what the views point into
    cdef vector[c_OutputView] views
    cdef vector[vector[size_t]] offsets
    cdef c_OutputView view
    cdef size_t at
    cdef bytes data
    offsets.resize(len(outputs))
    for i, (number, dims, content) in enumerate(outputs):
        view.type = <DataType><int>number
        to_dims(dims, f"output {i}", &view.dims)
        view.element_offsets = c_OffsetSpan()
        if isinstance(content, bytes):
            data = content
        else:
            at = 0
            for element in content:
                offsets[i].push_back(at)
                at += 4 + len(element)
            offsets[i].push_back(at)
            data = b"".join([len(element).to_bytes(4, "little") + element for element in content])
            view.element_offsets = c_OffsetSpan(offsets[i].data(), offsets[i].size())
        kept.append(data)
        view.data = <const c_byte*><const char*>data
        view.bytes = len(data)
        views.push_back(view)
    check(CheckOutputs(spec, c_OutputSpan(views.data(), views.size()), batch_rows))
    EncodeInferResponse(spec, c_OutputSpan(views.data(), views.size()), first_row, request)
    check(request.status)
    return from_bytes(request.reply.data(), request.reply.size())


def encode_stream_error(bytes model_name, bytes model_version, bytes request_id, bytes message) -> bytes:
    """The gRPC message with an in-band error of ModelStreamInfer."""
    cdef vector[c_byte] reply
    EncodeStreamError(to_view(model_name), to_view(model_version), to_view(request_id), to_view(message), &reply)
    return from_bytes(reply.data(), reply.size())


def gather_input(bodies, settings, size_t index) -> bytes:
    """Input `index` of several checked requests, one after another."""
    cdef ModelSpec spec
    to_model_spec(settings, &spec)
    cdef vector[unique_ptr[c_Request]] owners
    cdef vector[c_Request*] requests
    cdef size_t size = 0
    owners.resize(len(bodies))
    for i, body in enumerate(bodies):
        owners[i].reset(new c_Request())
        requests.push_back(owners[i].get())
        parse_and_check(body, spec, requests[i])
        size += requests[i].inputs[index].bytes
    cdef vector[c_byte] to
    to.resize(size)
    cdef size_t written = GatherInput(c_RequestSpan(requests.data(), requests.size()), index, to.data())
    return from_bytes(to.data(), written)
