# The front end, and the calls that Python answers.

from libc.stdint cimport uint16_t, uint64_t
from libcpp.pair cimport pair

from frontend cimport (
    FrontendCore,
    MakeFrontend,
    SlowKind,
    SlowMethod,
    SlowMethods,
    c_FrontendSettings,
    c_SlowCall,
    c_SlowEvent,
    kFastLane,
    kGeneralLane,
)

FrontendSettings = namedtuple(
    "FrontendSettings",
    "host port io_threads max_message_bytes max_inflight_bytes max_connections max_streams keepalive_time_s"
    " keepalive_timeout_s handshake_timeout_s max_connection_age_s max_connection_age_grace_s max_connection_idle_s"
    " stall_timeout_s",
    defaults=("127.0.0.1", 8001, 1, 64 << 20, 256 << 20, 10_000, 1_000, 7200.0, 20.0, 10.0, 0.0, 30.0, 0.0, 30.0),
)
SlowEvent = namedtuple("SlowEvent", "call kind payload")

_LANES = {"fast": kFastLane, "general": kGeneralLane}
# What Frontend is told about a method -> (lane, whether it is a stream).
_SHAPES = {"fast unary": (kFastLane, False), "unary": (kGeneralLane, False), "stream": (kGeneralLane, True)}


cdef int64_t to_ns(double seconds) noexcept:
    return <int64_t>(seconds * 1e9)


cdef c_FrontendSettings to_frontend_settings(object given) except *:
    cdef c_FrontendSettings settings
    settings.host = given.host.encode()
    settings.port = given.port
    settings.io_threads = given.io_threads
    settings.max_message_bytes = given.max_message_bytes
    settings.max_inflight_bytes = given.max_inflight_bytes
    settings.max_connections = given.max_connections
    settings.max_streams = given.max_streams
    settings.keepalive_time_ns = to_ns(given.keepalive_time_s)
    settings.keepalive_timeout_ns = to_ns(given.keepalive_timeout_s)
    settings.handshake_timeout_ns = to_ns(given.handshake_timeout_s)
    settings.max_connection_age_ns = to_ns(given.max_connection_age_s)
    settings.max_connection_age_grace_ns = to_ns(given.max_connection_age_grace_s)
    settings.max_connection_idle_ns = to_ns(given.max_connection_idle_s)
    settings.stall_timeout_ns = to_ns(given.stall_timeout_s)
    return settings


cdef class SlowCall:
    cdef shared_ptr[c_SlowCall] c_obj

    # Each event brings a new wrapper of the same call: they are one key.
    def __eq__(self, other):
        return isinstance(other, SlowCall) and self.c_obj.get() == (<SlowCall>other).c_obj.get()

    def __hash__(self):
        return hash(<size_t>self.c_obj.get())

    @property
    def method(self):
        return self.c_obj.get().method().decode("utf-8", "replace")

    @property
    def peer(self):
        return self.c_obj.get().peer().decode()

    @property
    def metadata(self):
        cdef const vector[pair[string, string]]* headers = &self.c_obj.get().metadata()
        cdef size_t i
        found = {}
        for i in range(headers.size()):
            found[headers[0][i].first.decode("utf-8", "replace")] = headers[0][i].second.decode("utf-8", "replace")
        return found

    @property
    def cancelled(self):
        return self.c_obj.get().cancelled()

    def send(self, bytes message):
        cdef const char* data = message
        cdef size_t size = len(message)
        cdef c_SlowCall* call = self.c_obj.get()
        with nogil:
            call.Send(data, size)

    def finish(self, int status, str message="", trailers=None):
        cdef vector[pair[string, string]] native
        cdef string text = message.encode("utf-8", "replace")
        for name, value in (trailers or {}).items():
            native.push_back(pair[string, string](<string>name.encode(), <string>value.encode()))
        cdef c_SlowCall* call = self.c_obj.get()
        with nogil:
            call.Finish(status, text, native)


cdef class Frontend:
    cdef shared_ptr[FrontendCore] c_obj

    def __init__(self, settings, slow_methods):
        cdef SlowMethods methods
        cdef SlowMethod method
        for path, shape in slow_methods.items():
            method.lane, method.stream = _SHAPES[shape]
            methods[path.encode()] = method
        self.c_obj = MakeFrontend(to_frontend_settings(settings), methods)

    def __dealloc__(self):
        # Ends the I/O threads if nobody has: they may wait for the GIL's holder no less than it for them.
        with nogil:
            if self.c_obj.get() != NULL:
                self.c_obj.get().Stop()
                self.c_obj.reset()

    def start(self):
        cdef uint16_t port = 0
        cdef Status status
        cdef FrontendCore* core = self.c_obj.get()
        with nogil:
            status = core.Start(&port)
        check(status)
        return port

    def publish(self, routes):
        cdef vector[c_ModelRoute] models
        for route in routes:
            models.push_back(to_model_route(route))
        cdef FrontendCore* core = self.c_obj.get()
        with nogil:
            core.Publish(move(models))

    def next_slow(self, str lane, double timeout_s):
        cdef c_SlowEvent event
        cdef bool found
        cdef uint8_t index = _LANES[lane]
        cdef FrontendCore* core = self.c_obj.get()
        with nogil:
            found = core.lane(index).Pop(timeout_s, &event)
        if not found:
            return None
        cdef SlowCall call = SlowCall.__new__(SlowCall)
        call.c_obj = event.call
        kind = "message" if event.kind == SlowKind.kMessage else (
            "half_close" if event.kind == SlowKind.kHalfClose else "cancelled"
        )
        return SlowEvent(call, kind, (<const char*>event.payload.data())[: event.payload.size()])

    def drain(self, double timeout_s):
        cdef FrontendCore* core = self.c_obj.get()
        cdef int64_t timeout_ns = to_ns(timeout_s)
        cdef bool in_time
        with nogil:
            in_time = core.Drain(timeout_ns)
        return in_time

    def stop(self):
        cdef FrontendCore* core = self.c_obj.get()
        with nogil:
            core.Stop()

    def counters(self):
        return {counter.first.decode(): counter.second for counter in self.c_obj.get().Counters()}
