"""What the extension offers. Every blocking call releases the GIL; every failure is a NativeError."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from server.settings import BatchSettings, ModelSettings, SessionSettings, WarmupBatch

class NativeError(Exception):
    """A refusal by the native core. `reason` is a name of server.errors.Reason."""

    reason: str
    message: str

# -- log ---------------------------------------------------------------------------------------------------------------

def set_log_level(level: int) -> None:
    """Lowest level that the native core logs: Python's logging numbers (10 debug .. 40 error)."""

# -- ONNX Runtime ------------------------------------------------------------------------------------------------------

def ort_open(library_path: str, record_calls: bool = False) -> None:
    """Opens ONNX Runtime's shared library and makes the process's only environment. Once; again is a no-op, and another
    path is refused. With `record_calls` each call of the library is counted (`ort_calls`)."""

def ort_version() -> str: ...
def ort_providers() -> list[str]:
    """Execution providers the library offers, its own order of preference."""

def ort_try_provider(name: str, options: Mapping[str, str]) -> None:
    """Raises when the library does not take this execution provider with these options here."""

class TensorInfo(NamedTuple):
    name: str
    elem_type: int  # ONNX TensorProto.DataType; 0: not a tensor
    dims: tuple[int, ...]  # -1: free
    symbols: tuple[str, ...]  # symbolic name per dimension, "" where none

class Session:
    """One ONNX Runtime session, shared by the instances of a version on one device.

    Construction loads and optimises the model on a native thread of low priority with the GIL released.
    """

    def __init__(self, path: str, settings: SessionSettings) -> None: ...
    @property
    def inputs(self) -> list[TensorInfo]: ...
    @property
    def outputs(self) -> list[TensorInfo]: ...
    def custom_metadata(self, key: str) -> str | None: ...
    def close(self) -> None:
        """Gives the session up; its memory goes when the last Version that uses it is gone. Idempotent. Whatever else
        is asked of a closed session raises ValueError."""

# For tests: what is declared of the library, and runs without queue and front end.

def ort_slots() -> list[tuple[int, str]]:
    """Number and name of every declared function of the library's table."""

def ort_calls(number: int) -> int:
    """Calls through that slot so far; 0 when they are not recorded."""

def clean_message(message: bytes, folders: Sequence[str] = ()) -> bytes:
    """The library's message as a client may read it: one line of text, no path, at most 512 bytes."""

class RunOutput(NamedTuple):
    dims: tuple[int, ...]
    data: bytes  # BYTES in wire form
    element_offsets: tuple[int, ...]  # BYTES only: where each element begins, and the end

class RuntimeInstance:
    """One instance of a version, run on the caller's thread."""

    def __init__(self, session: Session, settings: ModelSettings) -> None: ...
    def run(self, requests: Sequence[Sequence[tuple[Sequence[int], bytes]]], rows: int) -> list[RunOutput]:
        """Runs requests as one batch of `rows` rows. A request is (dims, raw bytes) per input of the settings."""
    def terminate(self) -> None:
        """Ends a run on another thread, and every later one, with an error."""
    @property
    def memory_bytes(self) -> int: ...

# -- versions ----------------------------------------------------------------------------------------------------------

class WarmupWarning(NamedTuple):
    name: str
    message: str

class Version:
    """One loaded version: sessions, instances, queue, counters. Serves once it is in a published route table."""

    def __init__(self, settings: ModelSettings, sessions: Sequence[Session]) -> None:
        """`sessions[i]` belongs to `settings.instance_groups[i]`. Checks settings against the sessions."""
    @staticmethod
    def mock(settings: ModelSettings, script: str = "echo") -> Version:
        """A version without a runtime for tests and benchmarks: output i is input i. Scripts: "echo", "sleep:US"
        (each run takes US microseconds), "fail-on:BYTE" (a batch with a row whose first byte is BYTE fails), "hold"
        (runs wait until release_mock())."""
    def release_mock(self, runs: int) -> None: ...
    def warm_up(self, batches: Sequence[WarmupBatch]) -> list[WarmupWarning]:
        """Runs each batch on every instance at low priority. A required one that fails raises; others are returned."""
    def start(self) -> None:
        """Starts one executor thread per instance."""
    def retire(self, timeout_s: float) -> bool:
        """After the route table no longer names it: refuses new work, runs what waits, ends the executors, frees all
        and trims the heap. False when work had to be ended by force at the timeout (those requests got UNAVAILABLE).
        The object is closed afterwards; statistics() still answers."""
    @property
    def memory_bytes(self) -> int:
        """Buffers of the instances."""
    def statistics(self) -> VersionStatistics: ...
    def queue_view(self) -> dict[str, object]:
        """waiting, waiting_rows, running_rows, knee, cap, l50_ns, l99_ns."""

class Histogram(NamedTuple):
    bounds: tuple[float, ...]  # upper bounds, seconds or rows; +Inf is left out
    counts: tuple[int, ...]  # per bucket, not cumulative, one more than bounds
    sum: float

class BatchStatistics(NamedTuple):
    batch_size: int
    count: int  # type: ignore[assignment]  # a tuple's method has this name
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int

class VersionStatistics(NamedTuple):
    last_inference_ms: int
    success_count: int
    success_ns: int
    fail_count: int
    fail_ns: int
    queue_count: int
    queue_ns: int
    compute_input_ns: int
    compute_infer_ns: int
    compute_output_ns: int
    inference_count: int  # rows
    execution_count: int  # batches
    bytes_gathered: int  # copied into batch buffers
    bisections: int  # batches that failed and were run again in halves
    pending: int
    failures: Mapping[str, int]  # REJECTED, CANCELED, BACKEND, OTHER
    shed: Mapping[str, int]  # by Reason name: QUEUE_FULL, TOO_LATE, DEADLINE_PASSED
    batches: tuple[BatchStatistics, ...]
    request_duration: Histogram
    queue_duration: Histogram
    batch_rows: Histogram

# -- route table -------------------------------------------------------------------------------------------------------

class VersionRoute(NamedTuple):
    text: str  # as on the wire
    version: Version | None  # None: named but not READY
    reason: str  # why not, for the UNAVAILABLE message

class ModelRoute(NamedTuple):
    name: str
    versions: Sequence[VersionRoute]
    default: str  # text of the version that an empty model_version means; "": none is READY
    aliases: Mapping[str, str]  # alias -> version text

# -- front end ---------------------------------------------------------------------------------------------------------

class FrontendSettings(NamedTuple):
    host: str = "127.0.0.1"
    port: int = 8001
    io_threads: int = 1
    max_message_bytes: int = 64 << 20
    max_inflight_bytes: int = 256 << 20
    max_connections: int = 10_000
    max_streams: int = 1_000  # SETTINGS_MAX_CONCURRENT_STREAMS, per connection
    keepalive_time_s: float = 7200.0
    keepalive_timeout_s: float = 20.0
    handshake_timeout_s: float = 10.0
    max_connection_age_s: float = 0.0  # 0: no limit; +-10 % jitter
    max_connection_age_grace_s: float = 30.0
    max_connection_idle_s: float = 0.0
    stall_timeout_s: float = 30.0  # an answer that nobody reads, an upload that does not come

class SlowCall:
    """One RPC that Python answers. Messages in, messages out, one finish. Methods may be called from any thread."""

    @property
    def method(self) -> str:
        """Path, e.g. "/inference.GRPCInferenceService/ServerLive"."""
    @property
    def peer(self) -> str: ...
    @property
    def metadata(self) -> Mapping[str, str]: ...
    @property
    def cancelled(self) -> bool: ...
    def send(self, message: bytes) -> None:
        """Sends one message. After cancellation or finish it does nothing."""
    def finish(self, status: int, message: str = "", trailers: Mapping[str, str] | None = None) -> None: ...

class SlowEvent(NamedTuple):
    call: SlowCall
    kind: str  # "message" | "half_close" | "cancelled"
    payload: bytes  # the message, decompressed, for "message"

class Frontend:
    def __init__(self, settings: FrontendSettings, slow_methods: Mapping[str, str]) -> None:
        """`slow_methods`: path -> lane and shape, e.g. "fast unary", "unary", "stream". A unary call arrives as one
        "message" event; a stream's messages arrive in order, then "half_close". Methods not listed and not native
        answer UNIMPLEMENTED."""
    def start(self) -> int:
        """Binds, starts the I/O threads and returns the port."""
    def publish(self, routes: Sequence[ModelRoute]) -> None:
        """Replaces the route table. Returns when no I/O thread can still see the old one."""
    def next_slow(self, lane: str, timeout_s: float) -> SlowEvent | None:
        """Waits for an event of the lane, "fast" or "general". None at the timeout or once the front end stopped."""
    def drain(self, timeout_s: float) -> bool:
        """Stops accepting, says GOAWAY, lets calls in flight finish. True when all connections ended in time."""
    def stop(self) -> None:
        """Closes what is left, ends the I/O threads. Idempotent."""
    def counters(self) -> dict[str, int]:
        """Process-wide counters: connections, streams, requests by outcome, protocol errors, bytes copied, ..."""

def live_objects() -> dict[str, int]:
    """Live native objects by kind (version, session, instance, request, ...), for leak checks."""

# -- codec, for tests --------------------------------------------------------------------------------------------------

def parse_infer_request(body: bytes) -> dict[str, object]:
    """What the front end sees in a serialized ModelInferRequest; texts are bytes."""

def check_infer_request(body: bytes, settings: ModelSettings) -> dict[str, object]:
    """What a queue would get of it: id, inputs (dims, raw bytes), outputs_wanted, rows, priority, timeout_us,
    shape_key, empty_final_response."""

def encode_infer_response(
    body: bytes,
    settings: ModelSettings,
    outputs: Sequence[tuple[int, tuple[int, ...], bytes | list[bytes]]],
    batch_rows: int,
    first_row: int,
    in_stream: bool,
) -> bytes:
    """The gRPC message that answers `body`, which stood at `first_row` of a batch of `batch_rows`. `outputs`: per
    output of the model (ONNX type number, dims of the batch, data), for BYTES a list of elements."""

def encode_stream_error(model_name: bytes, model_version: bytes, request_id: bytes, message: bytes) -> bytes: ...
def gather_input(bodies: Sequence[bytes], settings: ModelSettings, index: int) -> bytes:
    """Input `index` of several checked requests, one after another."""

# -- batching, for tests, simulation and tuning ------------------------------------------------------------------------

NEVER: int  # a time that does not come
SLACK_NS: int  # what the wire takes after a run
TRUSTED_RUNS: int  # measured runs before a prediction may refuse or drop anything

class Prediction(NamedTuple):
    """Run time by rows, as far as it is known: linear between the sizes."""

    sizes: tuple[int, ...]  # 1, 2, 4 .. largest batch
    l50_ns: tuple[int, ...]
    l99_ns: tuple[int, ...]
    beta_ns: int  # what a run costs before its first row
    knee: int  # least rows that reach 0.9 of the best throughput
    cap: int  # most rows to put into a batch
    trusted: bool

class Decision(NamedTuple):
    action: str  # "idle", "drop", "hold", "dispatch"
    count: int  # type: ignore[assignment]  # dispatch: how many candidates, from the first
    index: int  # type: ignore[assignment]  # drop: which candidate
    probe: bool  # dispatch: against the prediction
    until_ns: int  # hold

class Admission(NamedTuple):
    reason: str  # a name of server.errors.Reason; "OK": accepted
    pushback_ns: int  # negative: a retry is not worth it

def rank(list_index: int, listed_ns: int, aging_ns: int, now_ns: int) -> int:
    """Which list is served first: the lowest. A level has two, 2 * level and behind it what DELAY has set back."""

def pause_ns(l99_ns: int) -> int:
    """How long nothing of a shape must have run before a run against its prediction is tried, and nobody been refused
    before an overload is over."""

def pushback_ms(pushback_ns: int) -> int: ...
def plan(
    prediction: Prediction,
    candidates: Sequence[tuple[int, int, int]],
    now_ns: int,
    *,
    max_delay_ns: int = 0,
    preferred_rows: int = 0,
    all_waiting: bool = True,
    draining: bool = False,
    head_arrived_ns: int = 0,
    start_by_ns: int = ...,
    last_start_ns: int = 0,
    last_refusal_ns: int = ...,
    expected_gap_ns: int = ...,
    other_work: bool = False,
) -> Decision:
    """What a free instance does. `candidates`: (rows, due_ns, half_ns) of those who would share the batch, in order."""

def admit(
    prediction: Prediction,
    now_ns: int,
    *,
    rows: int = 1,
    due_ns: int = ...,
    half_ns: int = 0,
    start_by_ns: int = ...,
    waiting: int = 0,
    max_waiting: int = 4096,
    rows_ahead: int = 0,
    requests_ahead: int = 0,
    free_ns: Sequence[int] = (0,),
    gap_ns: int = ...,
    max_rows: int = 1,
    batching: bool = True,
) -> Admission:
    """Whether a request may join a queue."""

class Predictor:
    """Learns how long a batch takes by its rows. `slo_ns` 0: no target, and the cap is `max_rows`."""

    def __init__(self, max_rows: int, slo_ns: int = 0) -> None: ...
    def observe(self, rows: int, run_ns: int, now_ns: int, *, probe: bool = False) -> None:
        """A batch of `rows` took `run_ns` and ended at `now_ns`."""
    def reset(self) -> None:
        """As new."""
    @property
    def prediction(self) -> Prediction: ...
    def l50_ns(self, rows: int) -> int: ...
    def l99_ns(self, rows: int) -> int: ...
    @property
    def measured_l50_ns(self) -> tuple[int, ...]:
        """By size; 0 where nothing was measured."""
    @property
    def measured_l99_ns(self) -> tuple[int, ...]: ...
    @property
    def runs(self) -> int: ...
    @property
    def cap_cuts(self) -> int:
        """Times the cap gave way to a model that does not keep its predictions."""

class Arrival(NamedTuple):
    """A request for a BatchQueue. `due_ns`: its grpc-timeout, as a time. Requests of one `shape` may share a batch."""

    rows: int = 1
    priority: int = 0
    timeout_us: int = 0
    due_ns: int = ...
    shape: int = 0

class Pushed(NamedTuple):
    id: int
    reason: str  # a name of server.errors.Reason; "OK": accepted
    pushback_ms: int
    message: str
    expires_ns: int  # when it leaves the queue unrun if it still waits; the pusher sees to that

class Taken(NamedTuple):
    ids: tuple[int, ...]  # the batch
    rows: int
    dropped: tuple[tuple[int, str], ...]  # id and reason
    again_ns: int  # when asking again makes sense, if there is nothing

class BatchQueue:
    """The queue of one version, driven by hand at given times: no thread, no clock."""

    def __init__(self, settings: BatchSettings, instances: int = 1, *, beside: BatchQueue | None = None) -> None:
        """`beside`: another queue of the same node, whose waiting requests count as other work."""
    def push(self, arrivals: Sequence[Arrival], now_ns: int) -> list[Pushed]:
        """What one round of an I/O thread brought; one result for each, in order."""
    def cancel(self, request_id: int) -> None:
        """Marks a request as an I/O thread does whose client has gone. KeyError for one that has come out."""
    def remove(self, request_id: int) -> tuple[bool, list[int]]:
        """Whether it still waited, and with preserve_ordering those whose turn has come by its going."""
    def try_take(self, instance: int, now_ns: int) -> Taken:
        """RuntimeError while the instance runs a batch."""
    def finished(self, instance: int, run_ns: int, now_ns: int, *, ok: bool = True) -> None:
        """The batch of `instance` has ended after `run_ns`. RuntimeError when it runs none."""
    def release(self, request_id: int) -> list[int]:
        """With preserve_ordering: hands over a request that was run or dropped. Returns those that may leave now."""
    def close(self) -> None: ...
    def view(self) -> dict[str, object]:
        """waiting, waiting_rows, running_rows, knee, cap, l50_ns, l99_ns."""
