# serving/version.h, serving/statistics.h, serving/mock_instance.h
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.string cimport string
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from batch_settings cimport BatchSettings, QueueView
from instance cimport Instance
from model_spec cimport DataType, Dims, ModelSpec
from status cimport Status


cdef extern from "batch/batch_queue.h" namespace "tidegate" nogil:
    cdef cppclass VersionQueue "tidegate::BatchQueue":
        QueueView View() except +


cdef extern from "serving/version.h" namespace "tidegate" nogil:
    cdef cppclass WarmupTensor:
        string name
        DataType type
        Dims dims
        string data

    cdef cppclass WarmupBatch:
        uint32_t rows
        uint32_t count
        vector[WarmupTensor] tensors

    cdef cppclass c_Version "tidegate::Version":
        c_Version(ModelSpec spec, const BatchSettings& batching, vector[unique_ptr[Instance]] instances) except +
        const ModelSpec& spec()
        VersionQueue& queue()
        size_t memory_bytes()
        Status WarmUp(const WarmupBatch& batch) except +
        void Start() except +
        bool Retire(int64_t timeout_ns) except +


cdef extern from "serving/mock_instance.h" namespace "tidegate" nogil:
    cdef cppclass MockGate:
        MockGate() except +
        void Release(uint32_t runs)

    Status MakeMockInstance(
        const ModelSpec& spec, string_view script, shared_ptr[MockGate] gate, unique_ptr[Instance]* out
    ) except +


cdef extern from "serving/statistics.h" namespace "tidegate" nogil:
    cdef cppclass HistogramTotals:
        vector[int64_t] bounds
        vector[uint64_t] counts
        uint64_t sum

    cdef cppclass BatchTotals:
        uint32_t rows
        uint64_t count
        uint64_t input_ns
        uint64_t infer_ns
        uint64_t output_ns

    cdef cppclass VersionTotals:
        uint64_t success
        uint64_t success_ns
        uint64_t fail
        uint64_t fail_ns
        uint64_t queue
        uint64_t queue_ns
        uint64_t compute_input_ns
        uint64_t compute_infer_ns
        uint64_t compute_output_ns
        vector[uint64_t] reasons
        uint64_t waiting
        uint64_t executions
        uint64_t rows
        uint64_t last_inference_ms
        uint64_t bytes_gathered
        uint64_t bisections
        vector[BatchTotals] batches
        HistogramTotals request_duration
        HistogramTotals queue_duration
        HistogramTotals batch_rows

    VersionTotals Sum(const c_Version& version) except +
