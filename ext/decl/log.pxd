# util/log.h and util/live.h
from libc.stdint cimport int64_t
from libcpp.string_view cimport string_view


cdef extern from "util/log.h" namespace "tidegate" nogil:
    void SetLogLevel(int level)


cdef extern from "util/live.h" namespace "tidegate" nogil:
    cdef enum class LiveKind(unsigned char):
        kSession

    size_t n_live_kinds "tidegate::kLiveKindNames.size" ()
    string_view live_kind_name "tidegate::kLiveKindNames.at" (size_t kind) except +
    int64_t LiveCount(LiveKind kind)
