# infer/codec.h, with what a test of it needs of infer/request.h
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from model_spec cimport DataType, Dims, ModelSpec
from status cimport Status


cdef extern from "<cstddef>" namespace "std" nogil:
    cdef cppclass c_byte "std::byte":
        pass


cdef extern from "infer/request.h" namespace "tidegate" nogil:
    cdef cppclass c_InputView "tidegate::InputView":
        const c_byte* data
        size_t bytes
        Dims dims

    cdef cppclass c_Request "tidegate::Request":
        vector[c_byte] body
        string_view id
        vector[c_InputView] inputs
        uint64_t outputs_wanted
        uint32_t rows
        uint32_t priority
        int64_t timeout_us
        uint64_t shape_key
        bool empty_final_response
        Status status
        vector[c_byte] reply
        bool in_stream


cdef extern from "infer/codec.h" namespace "tidegate" nogil:
    cdef cppclass ParsedInput:
        string_view name
        string_view datatype
        Dims shape
        bool shape_too_long
        bool has_contents
        bool uses_shared_memory

    cdef cppclass ParsedOutput:
        string_view name
        bool uses_shared_memory
        bool uses_classification

    const size_t kMostParsedInputs

    cdef cppclass ParsedRequest:
        string_view model_name
        string_view model_version
        string_view id
        string_view sticky_key
        vector[ParsedInput] inputs
        size_t n_inputs
        vector[ParsedOutput] outputs
        vector[string_view] raw
        size_t n_raw
        uint64_t priority
        int64_t timeout_us
        bool empty_final_response
        bool in_sequence

    Status ParseInferRequest(string_view body, ParsedRequest* out) except +
    Status CheckInferRequest(const ParsedRequest& parsed, const ModelSpec& spec, c_Request* request) except +

    cdef cppclass c_OffsetSpan "std::span<const size_t>":
        c_OffsetSpan()
        c_OffsetSpan(const size_t* data, size_t size)
        size_t size()
        const size_t& operator[](size_t index)

    cdef cppclass c_OutputView "tidegate::OutputView":
        DataType type
        Dims dims
        const c_byte* data
        size_t bytes
        c_OffsetSpan element_offsets

    cdef cppclass c_OutputSpan "std::span<const tidegate::OutputView>":
        c_OutputSpan(const c_OutputView* data, size_t size)
        size_t size()
        const c_OutputView& operator[](size_t index)

    cdef cppclass c_RequestSpan "std::span<tidegate::Request* const>":
        c_RequestSpan(c_Request** data, size_t size)

    Status CheckOutputs(const ModelSpec& spec, c_OutputSpan outputs, uint32_t rows) except +
    void EncodeInferResponse(const ModelSpec& spec, c_OutputSpan outputs, uint32_t first_row,
                             c_Request* request) except +
    void EncodeStreamError(string_view model_name, string_view model_version, string_view id, string_view message,
                           vector[c_byte]* reply) except +
    size_t GatherInput(c_RequestSpan requests, size_t index, c_byte* to) except +
