# One loaded version: sessions and settings in, a queue with executors behind it, statistics out.

from collections import namedtuple

from libcpp.memory cimport make_shared, shared_ptr, unique_ptr
from libcpp.utility cimport move
from libcpp.vector cimport vector

from serving cimport (
    HistogramTotals,
    MakeMockInstance,
    MockGate,
    Sum,
    VersionTotals,
    WarmupBatch,
    WarmupTensor,
    c_Version,
)

WarmupWarning = namedtuple("WarmupWarning", "name message")
Histogram = namedtuple("Histogram", "bounds counts sum")
BatchStatistics = namedtuple(
    "BatchStatistics", "batch_size count compute_input_ns compute_infer_ns compute_output_ns"
)
VersionStatistics = namedtuple(
    "VersionStatistics",
    "last_inference_ms success_count success_ns fail_count fail_ns queue_count queue_ns compute_input_ns"
    " compute_infer_ns compute_output_ns inference_count execution_count bytes_gathered bisections pending failures"
    " shed batches request_duration queue_duration batch_rows",
)

# The four reasons of nv_inference_request_failure; what is not named here is OTHER.
_FAILURE_OF = {
    "QUEUE_FULL": "REJECTED",
    "TOO_LATE": "REJECTED",
    "DEADLINE_PASSED": "REJECTED",
    "BREAKER_OPEN": "REJECTED",
    "CANCELLED": "CANCELED",
    "MODEL_RAISED": "BACKEND",
    "MODEL_OUTPUT_INVALID": "BACKEND",
}
# Requests turned away or given up because there was no room or no time.
_SHED = ("QUEUE_FULL", "TOO_LATE", "DEADLINE_PASSED")


cdef object to_histogram(const HistogramTotals& totals, double unit):
    return Histogram(tuple(bound * unit for bound in totals.bounds), tuple(totals.counts), totals.sum * unit)


cdef WarmupBatch to_warmup_batch(object batch) except *:
    cdef WarmupBatch native
    cdef WarmupTensor tensor
    native.rows = batch.rows
    native.count = batch.count
    for given in batch.tensors:
        tensor.name = given.name.encode()
        tensor.type = <DataType><int>given.datatype.value
        to_dims(given.dims, given.name, &tensor.dims)
        tensor.data = given.data
        native.tensors.push_back(tensor)
    return native


cdef class Version:
    cdef shared_ptr[c_Version] c_obj
    cdef shared_ptr[MockGate] gate

    def __init__(self, settings, sessions):
        cdef vector[unique_ptr[Instance]] instances
        make_instances(sessions, settings, &instances)
        self._make(settings, &instances)

    @staticmethod
    def mock(settings, str script="echo"):
        cdef Version version = Version.__new__(Version)
        cdef vector[unique_ptr[Instance]] instances
        cdef unique_ptr[Instance] instance
        cdef ModelSpec spec
        cdef bytes text = script.encode()
        to_model_spec(settings, &spec)
        version.gate = make_shared[MockGate]()
        for _ in range(sum(group.count for group in settings.instance_groups)):
            check(MakeMockInstance(spec, string_view(text, len(text)), version.gate, &instance))
            instances.push_back(move(instance))
        version._make(settings, &instances)
        return version

    cdef int _make(self, object settings, vector[unique_ptr[Instance]]* instances) except -1:
        cdef ModelSpec spec
        cdef BatchSettings batching
        to_model_spec(settings, &spec)
        to_batch_settings(settings.batching, &batching)
        self.c_obj = make_shared[c_Version](move(spec), batching, move(instances[0]))
        return 0

    def __dealloc__(self):
        # Freeing sessions gives memory back to the system: milliseconds that must not be spent with the GIL held.
        with nogil:
            self.c_obj.reset()

    def release_mock(self, runs):
        if self.gate.get() == NULL:
            raise TypeError("only a mock with the script hold waits")
        self.gate.get().Release(runs)

    def warm_up(self, batches):
        cdef WarmupBatch native
        cdef Status status
        cdef c_Version* version = self.c_obj.get()
        warnings = []
        for batch in batches:
            native = to_warmup_batch(batch)
            with nogil:
                status = version.WarmUp(native)
            if batch.required:
                check(status)
            elif not status.ok():
                warnings.append(WarmupWarning(batch.name, status.message.decode("utf-8", "replace")))
        return warnings

    def start(self):
        cdef c_Version* version = self.c_obj.get()
        with nogil:
            version.Start()

    def retire(self, double timeout_s):
        cdef c_Version* version = self.c_obj.get()
        cdef int64_t timeout_ns = <int64_t>(timeout_s * 1e9)
        cdef bool in_time
        with nogil:
            in_time = version.Retire(timeout_ns)
        return in_time

    @property
    def memory_bytes(self):
        return self.c_obj.get().memory_bytes()

    def statistics(self):
        cdef VersionTotals totals
        cdef c_Version* version = self.c_obj.get()
        with nogil:
            totals = Sum(version[0])
        failures = dict.fromkeys(("REJECTED", "CANCELED", "BACKEND", "OTHER"), 0)
        shed = dict.fromkeys(_SHED, 0)
        for number in range(1, <int>totals.reasons.size()):
            name = text_of(ReasonName(<Reason>number))
            failures[_FAILURE_OF.get(name, "OTHER")] += totals.reasons[number]
            if name in shed:
                shed[name] = totals.reasons[number]
        return VersionStatistics(
            last_inference_ms=totals.last_inference_ms,
            success_count=totals.success,
            success_ns=totals.success_ns,
            fail_count=totals.fail,
            fail_ns=totals.fail_ns,
            queue_count=totals.queue,
            queue_ns=totals.queue_ns,
            compute_input_ns=totals.compute_input_ns,
            compute_infer_ns=totals.compute_infer_ns,
            compute_output_ns=totals.compute_output_ns,
            inference_count=totals.rows,
            execution_count=totals.executions,
            bytes_gathered=totals.bytes_gathered,
            bisections=totals.bisections,
            pending=totals.waiting,
            failures=failures,
            shed=shed,
            batches=tuple(
                BatchStatistics(batch.rows, batch.count, batch.input_ns, batch.infer_ns, batch.output_ns)
                for batch in totals.batches
            ),
            request_duration=to_histogram(totals.request_duration, 1e-9),
            queue_duration=to_histogram(totals.queue_duration, 1e-9),
            batch_rows=to_histogram(totals.batch_rows, 1.0),
        )

    def queue_view(self):
        cdef c_Version* version = self.c_obj.get()
        return to_queue_view(version.queue().View())
