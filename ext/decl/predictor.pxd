# batch/predictor.h
from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool

from policy cimport c_Prediction


cdef extern from "batch/predictor.h" namespace "tidegate" nogil:
    cdef cppclass c_Predictor "tidegate::Predictor":
        c_Predictor(uint32_t max_rows, int64_t slo_ns) except +
        const c_Prediction& prediction() const
        uint64_t runs() const
        uint64_t cap_cuts() const
        int64_t MeasuredL50(int size) const
        int64_t MeasuredL99(int size) const
        void Observe(uint32_t rows, int64_t run_ns, bool probe, int64_t now_ns)
        void Reset()
