# ort/session.h
from libc.stdint cimport int64_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr
from libcpp.optional cimport optional
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from status cimport Status

ctypedef vector[pair[string, string]] Entries


cdef extern from "ort/session.h" namespace "tidegate" nogil:
    cdef cppclass ProviderSettings:
        string name
        Entries options

    cdef cppclass c_SessionSettings "tidegate::SessionSettings":
        vector[ProviderSettings] providers
        int device_id
        int intra_op_threads
        int inter_op_threads
        bool parallel_execution
        int graph_level
        bool cpu_mem_arena
        bool mem_pattern
        Entries config_entries
        Entries run_config_entries
        bool pinned_input
        bool pinned_output

    cdef cppclass c_TensorInfo "tidegate::TensorInfo":
        string name
        int elem_type
        vector[int64_t] dims
        vector[string] symbols

    cdef cppclass c_Session "tidegate::Session":
        const vector[c_TensorInfo]& inputs()
        const vector[c_TensorInfo]& outputs()
        optional[string] CustomMetadata(const string& key) except +

    Status CreateSession "tidegate::Session::Create" (
        const string& path, c_SessionSettings settings, shared_ptr[c_Session]* out
    ) except +
    Status TryProvider(const string& name, const Entries& entries) except +
