# net/frontend.h, net/frontend_settings.h, route/route_table.h, slow/slow_queue.h
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.map cimport map
from libcpp.memory cimport shared_ptr
from libcpp.pair cimport pair
from libcpp.string cimport string
from libcpp.vector cimport vector

from codec cimport c_byte
from serving cimport c_Version
from status cimport Status


cdef extern from "route/route_table.h" namespace "tidegate" nogil:
    cdef cppclass c_VersionRoute "tidegate::VersionRoute":
        string text
        shared_ptr[c_Version] version
        string reason

    cdef cppclass c_ModelRoute "tidegate::ModelRoute":
        string name
        vector[c_VersionRoute] versions
        string default_version
        vector[pair[string, string]] aliases


cdef extern from "net/frontend_settings.h" namespace "tidegate" nogil:
    cdef cppclass c_FrontendSettings "tidegate::FrontendSettings":
        string host
        uint16_t port
        uint32_t io_threads
        uint32_t max_message_bytes
        int64_t max_inflight_bytes
        uint32_t max_connections
        uint32_t max_streams
        int64_t keepalive_time_ns
        int64_t keepalive_timeout_ns
        int64_t handshake_timeout_ns
        int64_t max_connection_age_ns
        int64_t max_connection_age_grace_ns
        int64_t max_connection_idle_ns
        int64_t stall_timeout_ns


cdef extern from "slow/slow_queue.h" namespace "tidegate" nogil:
    cdef cppclass c_SlowCall "tidegate::SlowCall":
        const string& method()
        const string& peer()
        const vector[pair[string, string]]& metadata()
        bool cancelled()
        void Send(const char* data, size_t size) except +
        void Finish(int grpc_status, string message, vector[pair[string, string]] trailers) except +

    cdef enum class SlowKind "tidegate::SlowEvent::Kind"(unsigned char):
        kMessage
        kHalfClose
        kCancelled

    cdef cppclass c_SlowEvent "tidegate::SlowEvent":
        shared_ptr[c_SlowCall] call
        SlowKind kind
        vector[c_byte] payload

    cdef cppclass SlowQueue:
        bool Pop(double timeout_s, c_SlowEvent* event) except +


cdef extern from "net/frontend.h" namespace "tidegate" nogil:
    cdef cppclass SlowMethod:
        uint8_t lane
        bool stream

    ctypedef map[string, SlowMethod] SlowMethods "std::map<std::string, tidegate::SlowMethod, std::less<>>"

    uint8_t kFastLane
    uint8_t kGeneralLane

    cdef cppclass FrontendCore:
        Status Start(uint16_t* port) except +
        void Publish(vector[c_ModelRoute] models) except +
        bool Drain(int64_t timeout_ns) except +
        void Stop() except +
        SlowQueue& lane(uint8_t index)
        vector[pair[string, uint64_t]] Counters() except +

    shared_ptr[FrontendCore] MakeFrontend "std::make_shared<tidegate::FrontendCore>" (
        c_FrontendSettings settings, SlowMethods methods
    ) except +
