# batch/admission.h
from libc.stdint cimport int32_t, int64_t, uint32_t, uint64_t
from libcpp cimport bool

from policy cimport c_Prediction
from status cimport Reason


cdef extern from "batch/admission.h" namespace "tidegate" nogil:
    cdef cppclass FreeSpan "std::span<const int64_t>":
        FreeSpan()
        FreeSpan(const int64_t* data, size_t size)

    cdef cppclass AdmissionView:
        uint64_t waiting
        uint64_t max_waiting
        uint64_t rows_ahead
        uint64_t requests_ahead
        FreeSpan free_ns
        int64_t gap_ns
        uint32_t max_rows
        bool batching

    cdef cppclass AdmissionRequest:
        uint32_t rows
        int64_t due_ns
        int64_t half_ns
        int64_t start_by_ns

    cdef cppclass c_Admission "tidegate::Admission":
        Reason reason
        int64_t pushback_ns

    c_Admission Admit(
        const AdmissionView& view, const c_Prediction& prediction, const AdmissionRequest& request, int64_t now_ns
    )
    int32_t PushbackMs(int64_t pushback_ns)
