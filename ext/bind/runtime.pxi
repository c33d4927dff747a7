# ONNX Runtime: the library, sessions, and the instances that a version or a test runs.

from collections import namedtuple
from os import fsencode

from libc.stdint cimport int64_t, uint32_t
from libcpp cimport bool
from libcpp.memory cimport shared_ptr, unique_ptr
from libcpp.optional cimport optional
from libcpp.pair cimport pair
from libcpp.utility cimport move
from libcpp.vector cimport vector

from codec cimport c_byte, c_OutputView, c_Request, c_RequestSpan
from instance cimport Instance, MakeOrtInstance, RunTimes
from model_spec cimport ModelSpec
from ort cimport GetLibrary, LibraryCalls, OpenLibrary, c_CleanMessage, kSlots, n_slots
from session cimport CreateSession, Entries, ProviderSettings, TryProvider, c_Session, c_SessionSettings, c_TensorInfo

TensorInfo = namedtuple("TensorInfo", "name elem_type dims symbols")
RunOutput = namedtuple("RunOutput", "dims data element_offsets")


# -- the library ------------------------------------------------------------------------------------------------------

def ort_open(library_path, bint record_calls=False):
    cdef string path = fsencode(library_path)
    cdef bool is_recorded = record_calls
    cdef Status status
    with nogil:
        status = OpenLibrary(path, is_recorded)
    check(status)


cdef int need_library() except -1:
    if GetLibrary() == NULL:
        raise NativeError("INTERNAL", "ONNX Runtime is not open: ort_open comes first")
    return 0


def ort_version():
    need_library()
    return GetLibrary().version().decode()


def ort_providers():
    need_library()
    cdef vector[string] names = GetLibrary().providers()
    return [name.decode() for name in names]


def ort_try_provider(str name, options):
    cdef string native_name = name.encode()
    cdef Entries entries = to_entries(options)
    cdef Status status
    need_library()
    with nogil:
        status = TryProvider(native_name, entries)
    check(status)


def ort_slots():
    return [(kSlots[i].number, kSlots[i].name.decode()) for i in range(n_slots(kSlots))]


def ort_calls(int number):
    return LibraryCalls(number)


def clean_message(bytes message, folders=()):
    cdef vector[string] native
    for folder in folders:
        native.push_back(fsencode(folder))
    return c_CleanMessage(string_view(message, len(message)), native)


# -- sessions ---------------------------------------------------------------------------------------------------------

cdef Entries to_entries(object mapping) except *:
    cdef Entries entries
    for key, value in mapping.items():
        entries.push_back(pair[string, string](<string>key.encode(), <string>value.encode()))
    return entries


cdef c_SessionSettings to_session_settings(object given) except *:
    """server.settings.SessionSettings -> SessionSettings."""
    cdef c_SessionSettings settings
    cdef ProviderSettings provider
    for one in given.providers:
        provider.name = one.name.encode()
        provider.options = to_entries(one.options)
        settings.providers.push_back(provider)
    settings.device_id = given.device_id
    settings.intra_op_threads = given.intra_op_threads
    settings.inter_op_threads = given.inter_op_threads
    settings.parallel_execution = given.parallel_execution
    settings.graph_level = given.graph_level
    settings.cpu_mem_arena = given.cpu_mem_arena
    settings.mem_pattern = given.mem_pattern
    settings.config_entries = to_entries(given.config_entries)
    settings.run_config_entries = to_entries(given.run_config_entries)
    settings.pinned_input = given.pinned_input
    settings.pinned_output = given.pinned_output
    return settings


cdef list to_tensor_infos(vector[c_TensorInfo] infos):
    return [
        TensorInfo(
            info.name.decode("utf-8", "replace"),
            info.elem_type,
            tuple(info.dims),
            tuple([symbol.decode("utf-8", "replace") for symbol in info.symbols]),
        )
        for info in infos
    ]


cdef class Session:
    cdef shared_ptr[c_Session] c_obj

    def __init__(self, path, settings):
        cdef string native_path = fsencode(path)
        cdef c_SessionSettings native = to_session_settings(settings)
        cdef shared_ptr[c_Session] made
        cdef Status status
        with nogil:
            status = CreateSession(native_path, move(native), &made)
        check(status)
        self.c_obj.swap(made)

    def __dealloc__(self):
        # The last owner frees the model and gives memory back to the system: not with the GIL held.
        with nogil:
            self.c_obj.reset()

    cdef c_Session* get(self) except NULL:
        """The session, or ValueError once it is closed."""
        if self.c_obj.get() == NULL:
            raise ValueError("the session is closed")
        return self.c_obj.get()

    @property
    def inputs(self):
        return to_tensor_infos(self.get().inputs())

    @property
    def outputs(self):
        return to_tensor_infos(self.get().outputs())

    def custom_metadata(self, str key):
        cdef string native_key = key.encode()
        cdef optional[string] found = self.get().CustomMetadata(native_key)
        return found.value().decode("utf-8", "replace") if found.has_value() else None

    def close(self):
        cdef shared_ptr[c_Session] given_up
        given_up.swap(self.c_obj)
        with nogil:
            given_up.reset()


# -- instances --------------------------------------------------------------------------------------------------------

cdef int make_instances(object sessions, object settings, vector[unique_ptr[Instance]]* out) except -1:
    """Appends `count` instances of each of settings.instance_groups; group i runs on sessions[i]."""
    cdef ModelSpec spec
    cdef shared_ptr[c_Session] session
    cdef unique_ptr[Instance] made
    cdef Status status
    to_model_spec(settings, &spec)
    for group, given in zip(settings.instance_groups, sessions, strict=True):
        (<Session?>given).get()
        session = (<Session>given).c_obj
        for _ in range(group.count):
            with nogil:
                status = MakeOrtInstance(session, spec, &made)
            check(status)
            out.push_back(move(made))
    return 0


cdef class RuntimeInstance:
    """One instance without queue and front end, for tests: runs batches on the caller's thread."""

    cdef unique_ptr[Instance] c_obj
    cdef size_t n_inputs

    def __init__(self, Session session, settings):
        cdef ModelSpec spec
        cdef Status status
        to_model_spec(settings, &spec)
        session.get()
        cdef shared_ptr[c_Session] shared = session.c_obj
        with nogil:
            status = MakeOrtInstance(shared, spec, &self.c_obj)
        check(status)
        self.n_inputs = spec.inputs.size()

    def __dealloc__(self):
        with nogil:
            self.c_obj.reset()

    def run(self, requests, uint32_t rows):
        """Runs requests as one batch of `rows` rows. A request is a sequence of (dims, bytes), in the model's order.

        Returns a RunOutput per output; BYTES in wire form. Raises NativeError.
        """
        cdef vector[unique_ptr[c_Request]] owned
        cdef vector[c_Request*] native
        cdef c_Request* request
        cdef RunTimes times
        cdef Status status
        cdef bytes data
        cdef Instance* instance = self.c_obj.get()
        keep = []  # what the views point to
        for tensors in requests:
            owned.emplace_back(new c_Request())
            request = owned.back().get()
            request.inputs.resize(len(tensors))
            for i, (dims, given) in enumerate(tensors):
                data = bytes(given)
                keep.append(data)
                to_dims(dims, f"#{i}", &request.inputs[i].dims)
                request.inputs[i].data = <const c_byte*><const char*>data
                request.inputs[i].bytes = len(data)
            native.push_back(request)
        with nogil:
            status = instance.Run(c_RequestSpan(native.data(), native.size()), rows, &times)
        check(status)
        outputs = []
        for i in range(instance.outputs().size()):
            outputs.append(to_run_output(&instance.outputs()[i]))
        return outputs

    def terminate(self):
        """Ends a run on another thread, and every later one, with an error."""
        self.c_obj.get().Terminate()

    @property
    def memory_bytes(self):
        return self.c_obj.get().memory_bytes()


cdef object to_run_output(const c_OutputView* view):
    return RunOutput(
        tuple([view.dims.d[i] for i in range(view.dims.rank)]),
        (<const char*>view.data)[: view.bytes],
        tuple([view.element_offsets[i] for i in range(view.element_offsets.size())]),
    )
