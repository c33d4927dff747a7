# util/status.h and util/reason.h
from libc.stdint cimport int32_t
from libcpp cimport bool
from libcpp.string cimport string
from libcpp.string_view cimport string_view


cdef extern from "util/reason.h" namespace "tidegate" nogil:
    cdef enum class Reason:
        kOk

    string_view ReasonName(Reason reason)
    int GrpcStatus(Reason reason)


cdef extern from "util/status.h" namespace "tidegate" nogil:
    cdef cppclass Status:
        Reason reason
        int32_t pushback_ms
        string message
        bool ok() const
