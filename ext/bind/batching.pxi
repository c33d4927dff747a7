# Batching for tests, simulation and tuning.

from collections import namedtuple

from libc.stdint cimport int64_t, uint32_t, uint64_t
from libcpp cimport bool
from libcpp.memory cimport make_shared, make_unique, shared_ptr, unique_ptr
from libcpp.string_view cimport string_view
from libcpp.vector cimport vector

from admission cimport AdmissionRequest, AdmissionView, Admit, FreeSpan, PushbackMs, c_Admission
from batch_queue cimport Batch, NodeLoad, QueuedRequest, RequestList, c_BatchQueue
from batch_settings cimport BatchSettings
from policy cimport (
    Action,
    Candidate,
    CandidateSpan,
    PauseNs,
    Plan,
    PlanLimits,
    PlanView,
    Rank,
    c_Decision,
    c_Prediction,
    kLongAgo,
    kMaxSizes,
    kNever,
    kSlackNs,
    kTrustedRuns,
)
from predictor cimport c_Predictor
from status cimport Reason, ReasonName

NEVER = kNever
SLACK_NS = kSlackNs
TRUSTED_RUNS = kTrustedRuns

Prediction = namedtuple("Prediction", "sizes l50_ns l99_ns beta_ns knee cap trusted")
Decision = namedtuple("Decision", "action count index probe until_ns")
Admission = namedtuple("Admission", "reason pushback_ns")
Arrival = namedtuple("Arrival", "rows priority timeout_us due_ns shape", defaults=(1, 0, 0, kNever, 0))
Pushed = namedtuple("Pushed", "id reason pushback_ms message expires_ns")
Taken = namedtuple("Taken", "ids rows dropped again_ns")


cdef object to_prediction(const c_Prediction& prediction):
    cdef c_Prediction copy = prediction
    sizes = range(copy.n)
    return Prediction(
        sizes=tuple(copy.sizes[size] for size in sizes),
        l50_ns=tuple(copy.l50_ns[size] for size in sizes),
        l99_ns=tuple(copy.l99_ns[size] for size in sizes),
        beta_ns=copy.beta_ns,
        knee=copy.knee,
        cap=copy.cap,
        trusted=copy.trusted,
    )


cdef c_Prediction from_prediction(object given) except *:
    cdef c_Prediction prediction
    count = len(given.sizes)
    if not 0 < count <= kMaxSizes or count != len(given.l50_ns) or count != len(given.l99_ns):
        raise ValueError("a prediction has one l50 and one l99 for each of its sizes")
    prediction.n = count
    for size in range(count):
        prediction.sizes[size] = given.sizes[size]
        prediction.l50_ns[size] = given.l50_ns[size]
        prediction.l99_ns[size] = given.l99_ns[size]
    prediction.beta_ns = given.beta_ns
    prediction.knee = given.knee
    prediction.cap = given.cap
    prediction.trusted = given.trusted
    return prediction


cdef str reason_text(Reason reason):
    cdef string_view name = ReasonName(reason)
    return name.data()[: name.size()].decode()


def rank(uint32_t list_index, int64_t listed_ns, int64_t aging_ns, int64_t now_ns):
    return Rank(list_index, listed_ns, aging_ns, now_ns)


def pause_ns(int64_t l99_ns):
    return PauseNs(l99_ns)


def pushback_ms(int64_t pushback_ns):
    return PushbackMs(pushback_ns)


def plan(
    prediction,
    candidates,
    int64_t now_ns,
    *,
    int64_t max_delay_ns=0,
    uint32_t preferred_rows=0,
    bool all_waiting=True,
    bool draining=False,
    int64_t head_arrived_ns=0,
    int64_t start_by_ns=kNever,
    int64_t last_start_ns=0,
    int64_t last_refusal_ns=kLongAgo,
    int64_t expected_gap_ns=kNever,
    bool other_work=False,
):
    cdef PlanLimits limits
    cdef PlanView view
    cdef Candidate candidate
    cdef vector[Candidate] native
    cdef c_Prediction known = from_prediction(prediction)
    for rows, due_ns, half_ns in candidates:
        candidate.rows = rows
        candidate.due_ns = due_ns
        candidate.half_ns = half_ns
        native.push_back(candidate)
    limits.max_delay_ns = max_delay_ns
    limits.preferred_rows = preferred_rows
    view.candidates = CandidateSpan(native.data(), native.size())
    view.all_waiting = all_waiting
    view.draining = draining
    view.head_arrived_ns = head_arrived_ns
    view.start_by_ns = start_by_ns
    view.last_start_ns = last_start_ns
    view.last_refusal_ns = last_refusal_ns
    view.expected_gap_ns = expected_gap_ns
    view.other_work = other_work
    cdef c_Decision decision = Plan(limits, known, view, now_ns)
    if decision.action == Action.kIdle:
        action = "idle"
    elif decision.action == Action.kDrop:
        action = "drop"
    elif decision.action == Action.kHold:
        action = "hold"
    else:
        action = "dispatch"
    return Decision(action, decision.count, decision.index, decision.probe, decision.until_ns)


def admit(
    prediction,
    int64_t now_ns,
    *,
    uint32_t rows=1,
    int64_t due_ns=kNever,
    int64_t half_ns=0,
    int64_t start_by_ns=kNever,
    uint64_t waiting=0,
    uint64_t max_waiting=4096,
    uint64_t rows_ahead=0,
    uint64_t requests_ahead=0,
    free_ns=(0,),
    int64_t gap_ns=kNever,
    uint32_t max_rows=1,
    bool batching=True,
):
    cdef AdmissionView view
    cdef AdmissionRequest request
    cdef vector[int64_t] native_free_ns = free_ns
    view.waiting = waiting
    view.max_waiting = max_waiting
    view.rows_ahead = rows_ahead
    view.requests_ahead = requests_ahead
    view.free_ns = FreeSpan(native_free_ns.data(), native_free_ns.size())
    view.gap_ns = gap_ns
    view.max_rows = max_rows
    view.batching = batching
    request.rows = rows
    request.due_ns = due_ns
    request.half_ns = half_ns
    request.start_by_ns = start_by_ns
    cdef c_Admission admission = Admit(view, from_prediction(prediction), request, now_ns)
    return Admission(reason_text(admission.reason), admission.pushback_ns)


cdef class Predictor:
    cdef unique_ptr[c_Predictor] c_obj

    def __init__(self, uint32_t max_rows, int64_t slo_ns=0):
        self.c_obj = make_unique[c_Predictor](max_rows, slo_ns)

    def observe(self, uint32_t rows, int64_t run_ns, int64_t now_ns, *, bool probe=False):
        self.c_obj.get().Observe(rows, run_ns, probe, now_ns)

    def reset(self):
        self.c_obj.get().Reset()

    @property
    def prediction(self):
        return to_prediction(self.c_obj.get().prediction())

    def l50_ns(self, uint32_t rows):
        return self.c_obj.get().prediction().L50(rows)

    def l99_ns(self, uint32_t rows):
        return self.c_obj.get().prediction().L99(rows)

    @property
    def measured_l50_ns(self):
        return tuple(self.c_obj.get().MeasuredL50(size) for size in range(self.c_obj.get().prediction().n))

    @property
    def measured_l99_ns(self):
        return tuple(self.c_obj.get().MeasuredL99(size) for size in range(self.c_obj.get().prediction().n))

    @property
    def runs(self):
        return self.c_obj.get().runs()

    @property
    def cap_cuts(self):
        return self.c_obj.get().cap_cuts()


cdef class _Queued:
    """One request of a bound queue; owns the native one."""

    cdef unique_ptr[QueuedRequest] c_obj
    cdef int64_t expires_ns

    def __cinit__(self):
        self.c_obj = make_unique[QueuedRequest]()


cdef class BatchQueue:
    cdef shared_ptr[NodeLoad] node
    cdef unique_ptr[c_BatchQueue] c_obj
    cdef dict requests  # id -> _Queued, from a push that was accepted until the request has come out
    cdef list running  # per instance the ids that it runs
    cdef bint is_ordered
    cdef uint32_t next_id

    def __init__(self, settings, uint32_t instances=1, *, BatchQueue beside=None):
        cdef BatchSettings native
        if instances == 0:
            raise ValueError("a queue has at least one instance")
        to_batch_settings(settings, &native)
        native.instances = instances
        self.node = make_shared[NodeLoad](<bool>False) if beside is None else beside.node
        self.c_obj = make_unique[c_BatchQueue](native, self.node.get()[0])
        self.requests = {}
        self.running = [()] * instances
        self.is_ordered = native.preserve_ordering
        self.next_id = 0

    def __dealloc__(self):
        # A native queue ends empty: what was left in it comes out first.
        cdef vector[QueuedRequest*] ready
        if self.c_obj.get() == NULL:
            return
        for request in self.requests.values():
            self.c_obj.get().Remove((<_Queued>request).c_obj.get(), &ready)
        self.c_obj.reset()

    cdef QueuedRequest* find(self, request_id) except NULL:
        return (<_Queued>self.requests[request_id]).c_obj.get()

    cdef list leave(self, const vector[QueuedRequest*]& ready):
        """The ids of what came out; they are forgotten."""
        cdef size_t i
        ids = []
        for i in range(ready.size()):
            ids.append(ready[i].stream.slot)
        for request_id in ids:
            del self.requests[request_id]
        return ids

    def push(self, arrivals, int64_t now_ns):
        cdef RequestList native
        cdef RequestList refused
        cdef _Queued request
        cdef QueuedRequest* made
        pushed = []
        for rows, priority, timeout_us, due_ns, shape in arrivals:
            request = _Queued.__new__(_Queued)
            made = request.c_obj.get()
            made.rows = rows
            made.priority = priority
            made.timeout_us = timeout_us
            made.due_ns = due_ns
            made.shape_key = shape
            made.times.arrived_ns = now_ns
            made.stream.slot = self.next_id
            self.next_id += 1
            request.expires_ns = self.c_obj.get().SetDeadlines(made)
            pushed.append(request)
        for request in pushed:
            native.PushBack(request.c_obj.get())
        self.c_obj.get().Push(&native, &refused, now_ns)
        results = []
        for request in pushed:
            made = request.c_obj.get()
            if made.status.ok():
                self.requests[made.stream.slot] = request
            results.append(
                Pushed(
                    id=made.stream.slot,
                    reason=reason_text(made.status.reason),
                    pushback_ms=made.status.pushback_ms,
                    message=made.status.message.decode(),
                    expires_ns=request.expires_ns,
                )
            )
        return results

    def cancel(self, request_id):
        self.find(request_id).cancelled.store(True)

    def remove(self, request_id):
        cdef vector[QueuedRequest*] ready
        cdef bool removed = self.c_obj.get().Remove(self.find(request_id), &ready)
        if removed:
            del self.requests[request_id]
        return removed, self.leave(ready)

    def try_take(self, uint32_t instance, int64_t now_ns):
        cdef Batch batch
        cdef size_t i
        if self.running[instance]:
            raise RuntimeError("an instance finishes its batch before it takes the next")
        cdef int64_t again_ns = self.c_obj.get().TryTake(instance, now_ns, &batch)
        ids = []
        for i in range(batch.requests.size()):
            ids.append(batch.requests[i].stream.slot)
        dropped = []
        for i in range(batch.dropped.size()):
            dropped.append((batch.dropped[i].stream.slot, reason_text(batch.dropped[i].status.reason)))
        if not self.is_ordered:
            for request_id, _ in dropped:
                del self.requests[request_id]
        self.running[instance] = tuple(ids)
        return Taken(tuple(ids), batch.rows, tuple(dropped), again_ns)

    def finished(self, uint32_t instance, int64_t run_ns, int64_t now_ns, *, bool ok=True):
        cdef uint32_t rows = 0
        ids = self.running[instance]
        if not ids:
            raise RuntimeError("this instance runs nothing")
        for request_id in ids:
            rows += self.find(request_id).rows
        self.c_obj.get().Finished(instance, rows, run_ns, ok, now_ns)
        self.running[instance] = ()
        if not self.is_ordered:
            for request_id in ids:
                del self.requests[request_id]

    def release(self, request_id):
        cdef vector[QueuedRequest*] ready
        if not self.is_ordered:
            raise RuntimeError("only a queue with preserve_ordering keeps what has finished")
        self.c_obj.get().Release(self.find(request_id), &ready)
        return self.leave(ready)

    def close(self):
        self.c_obj.get().Close()

    def view(self):
        return to_queue_view(self.c_obj.get().View())
