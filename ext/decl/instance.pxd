# batch/instance.h and ort/instance.h
from libc.stdint cimport int64_t, uint32_t
from libcpp.memory cimport shared_ptr, unique_ptr

from codec cimport c_OutputSpan, c_RequestSpan
from model_spec cimport ModelSpec
from session cimport c_Session
from status cimport Status


cdef extern from "batch/instance.h" namespace "tidegate" nogil:
    cdef cppclass RunTimes:
        int64_t input_done_ns
        int64_t infer_done_ns

    cdef cppclass Instance:
        Status Run(c_RequestSpan requests, uint32_t rows, RunTimes* times) except +
        c_OutputSpan outputs()
        size_t memory_bytes()
        void Terminate()


cdef extern from "ort/instance.h" namespace "tidegate" nogil:
    Status MakeOrtInstance(shared_ptr[c_Session] session, const ModelSpec& spec, unique_ptr[Instance]* out) except +
