"""Stand-ins for the native module, and builders of model repositories. No runtime, no socket, no thread of their own.

The files that these models are made of are real ONNX as far as `server/onnx_file.py` looks: a producer name, which the
fake session reads back as the model's *tag*, and an empty graph.
"""

from __future__ import annotations

import threading
from collections import namedtuple
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import Empty, Queue
from typing import Any

from server.settings import ModelSettings, SessionSettings, WarmupBatch

# Longer than anything here takes on a busy machine: reached only by a test that fails.
PATIENCE_S = 10.0

TensorInfo = namedtuple("TensorInfo", "name elem_type dims symbols", defaults=((),))
WarmupWarning = namedtuple("WarmupWarning", "name message")
Histogram = namedtuple("Histogram", "bounds counts sum")
BatchStatistics = namedtuple("BatchStatistics", "batch_size count compute_input_ns compute_infer_ns compute_output_ns")
VersionStatistics = namedtuple(
    "VersionStatistics",
    "last_inference_ms success_count success_ns fail_count fail_ns queue_count queue_ns compute_input_ns"
    " compute_infer_ns compute_output_ns inference_count execution_count bytes_gathered bisections pending failures"
    " shed batches request_duration queue_duration batch_rows",
)
VersionRoute = namedtuple("VersionRoute", "text version reason")
ModelRoute = namedtuple("ModelRoute", "name versions default aliases")
FrontendSettings = namedtuple(
    "FrontendSettings",
    "host port io_threads max_message_bytes max_inflight_bytes max_connections max_streams keepalive_time_s"
    " keepalive_timeout_s handshake_timeout_s max_connection_age_s max_connection_age_grace_s max_connection_idle_s"
    " stall_timeout_s",
    defaults=(30.0,),
)
SlowEvent = namedtuple("SlowEvent", "call kind payload", defaults=(b"",))

FLOAT = 1  # ONNX's TensorProto.FLOAT


class ManualClock:
    """Time that passes when a test says so."""

    def __init__(self, now_s: float = 1000.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class NativeError(Exception):
    """A refusal by the native core."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(f"{reason}: {message}")
        self.reason = reason
        self.message = message


def counts(**changes: Any) -> VersionStatistics:
    """Counters of a version that nobody has called yet."""
    nothing = VersionStatistics(
        last_inference_ms=0,
        success_count=0,
        success_ns=0,
        fail_count=0,
        fail_ns=0,
        queue_count=0,
        queue_ns=0,
        compute_input_ns=0,
        compute_infer_ns=0,
        compute_output_ns=0,
        inference_count=0,
        execution_count=0,
        bytes_gathered=0,
        bisections=0,
        pending=0,
        failures={"REJECTED": 0, "CANCELED": 0, "BACKEND": 0, "OTHER": 0},
        shed={"QUEUE_FULL": 0, "TOO_LATE": 0, "DEADLINE_PASSED": 0},
        batches=(),
        request_duration=Histogram((0.001, 0.01), (0, 0, 0), 0.0),
        queue_duration=Histogram((0.001, 0.01), (0, 0, 0), 0.0),
        batch_rows=Histogram((1.0, 2.0, 4.0), (0, 0, 0, 0), 0.0),
    )
    return nothing._replace(**changes)


def counts_of(n_requests: int) -> VersionStatistics:
    """Counters after `n_requests` requests of one row, each run alone: a millisecond each, half in the runtime."""
    return counts(
        last_inference_ms=1_700_000_000_000 + n_requests,
        success_count=n_requests,
        success_ns=1_000_000 * n_requests,
        queue_count=n_requests,
        queue_ns=100_000 * n_requests,
        compute_input_ns=200_000 * n_requests,
        compute_infer_ns=500_000 * n_requests,
        compute_output_ns=100_000 * n_requests,
        inference_count=n_requests,
        execution_count=n_requests,
        bytes_gathered=16 * n_requests,
        batches=(BatchStatistics(1, n_requests, 200_000 * n_requests, 500_000 * n_requests, 100_000 * n_requests),),
        request_duration=Histogram((0.001, 0.01), (n_requests, 0, 0), 0.001 * n_requests),
        queue_duration=Histogram((0.001, 0.01), (n_requests, 0, 0), 0.0001 * n_requests),
        batch_rows=Histogram((1.0, 2.0, 4.0), (n_requests, 0, 0, 0), 1.0 * n_requests),
    )


class FakeSession:
    """A session over a file made by onnx_bytes()."""

    def __init__(self, native: FakeNative, path: str, settings: SessionSettings) -> None:
        self.tag = tag_of(Path(path).read_bytes())
        self.path = Path(path)
        self.settings = settings
        self.is_closed = False
        native.on_session(self.tag)
        self.inputs, self.outputs = native.tensors.get(self.tag, native.tensors[""])
        native.sessions.append(self)

    def close(self) -> None:
        self.is_closed = True


class FakeVersion:
    """A version that counts what a test tells it to count."""

    def __init__(self, native: FakeNative, settings: ModelSettings, sessions: Sequence[FakeSession]) -> None:
        self._native = native
        self.settings = settings
        self.tag = sessions[0].tag if sessions else ""
        self.counts = counts()
        self.warmed: list[WarmupBatch] = []
        self.is_started = False
        self.retired_with_s: float | None = None
        self.memory_bytes = 1000
        # Cleared by a test to make the version busy: retire() then waits for it, as long as it may.
        self.idle = threading.Event()
        self.idle.set()
        self.is_retiring = threading.Event()
        native.on_version(self.tag)
        native.versions.append(self)

    def warm_up(self, batches: Sequence[WarmupBatch]) -> list[Any]:
        self.warmed += batches
        return self._native.on_warm_up(self.tag, batches)

    def start(self) -> None:
        self.is_started = True

    def retire(self, timeout_s: float) -> bool:
        assert self.retired_with_s is None, "retired twice"
        assert not self._native.is_routed(self), "retired while the route table names it"
        self.retired_with_s = timeout_s
        self.is_retiring.set()
        return self.idle.wait(min(timeout_s, PATIENCE_S))

    def statistics(self) -> VersionStatistics:
        return self.counts

    @property
    def is_retired(self) -> bool:
        return self.retired_with_s is not None


class FakeNative:
    """`server._native` without the native part.

    `on_session`, `on_version`, `on_warm_up` are called with the tag of the model's file: a test makes them raise or
    wait. `tensors` maps tag -> (inputs, outputs); "" is what every other tag has.
    """

    NativeError = NativeError
    VersionRoute = VersionRoute
    ModelRoute = ModelRoute
    FrontendSettings = FrontendSettings

    def __init__(self) -> None:
        self.sessions: list[FakeSession] = []
        self.versions: list[FakeVersion] = []
        self.routes: list[Any] = []
        self.publishes = 0
        self.on_publish: Callable[[list[Any]], None] = lambda _routes: None
        self.on_session: Callable[[str], None] = lambda _tag: None
        self.on_version: Callable[[str], None] = lambda _tag: None
        self.on_warm_up: Callable[[str, Sequence[WarmupBatch]], list[Any]] = lambda _tag, _batches: []
        self.tensors: dict[str, tuple[list[TensorInfo], list[TensorInfo]]] = {
            "": ([TensorInfo("X", FLOAT, (-1, 4))], [TensorInfo("Y", FLOAT, (-1, 4))])
        }
        self.log_levels: list[int] = []
        self.frontends: list[FakeFrontend] = []

    def Session(self, path: str, settings: SessionSettings) -> FakeSession:
        return FakeSession(self, path, settings)

    def Version(self, settings: ModelSettings, sessions: Sequence[FakeSession]) -> FakeVersion:
        return FakeVersion(self, settings, sessions)

    def Frontend(self, settings: Any, slow_methods: Mapping[str, str]) -> FakeFrontend:
        self.frontends.append(FakeFrontend(self, settings, slow_methods))
        return self.frontends[-1]

    def publish(self, routes: Sequence[Any]) -> None:
        """What a manager is given in the place of Frontend.publish."""
        self.on_publish(list(routes))
        self.routes = list(routes)
        self.publishes += 1

    def set_log_level(self, level: int) -> None:
        self.log_levels.append(level)

    def live_objects(self) -> dict[str, int]:
        return {"version": sum(not version.is_retired for version in self.versions), "session": 0}

    # -- for assertions ------------------------------------------------------------------------------------------------

    def is_routed(self, version: FakeVersion) -> bool:
        return any(one.version is version for route in self.routes for one in route.versions)

    def routed(self) -> dict[str, dict[str, str]]:
        """Model -> version -> tag of the file that serves it, or "(why not)"."""
        return {
            route.name: {one.text: one.version.tag if one.version else f"({one.reason})" for one in route.versions}
            for route in self.routes
        }

    def defaults(self) -> dict[str, str]:
        """Model -> what an empty version means."""
        return {route.name: route.default for route in self.routes}

    def serving(self, tag: str) -> FakeVersion:
        """The newest version made of that file."""
        return next(version for version in reversed(self.versions) if version.tag == tag)


class FakeCall:
    """One slow RPC as its handler sees it."""

    def __init__(self, method: str = "", metadata: Mapping[str, str] | None = None) -> None:
        self.method = method
        self.peer = "127.0.0.1:1"
        self.metadata = dict(metadata or {})
        self.cancelled = False
        self.sent: list[bytes] = []
        self.status: int | None = None
        self.message = ""
        self.is_finished = threading.Event()
        self.has_sent = threading.Event()

    def send(self, message: bytes) -> None:
        assert not self.is_finished.is_set(), "sent after the end"
        self.sent.append(message)
        self.has_sent.set()

    def finish(self, status: int, message: str = "", trailers: Mapping[str, str] | None = None) -> None:
        assert not self.is_finished.is_set(), "finished twice"
        self.status, self.message = status, message
        self.is_finished.set()

    def wait(self) -> FakeCall:
        assert self.is_finished.wait(PATIENCE_S), f"{self.method} was never finished"
        return self


class FakeFrontend:
    """A front end that a test feeds with events. `happened` has what was done to it, in order."""

    def __init__(self, native: FakeNative, settings: Any, slow_methods: Mapping[str, str]) -> None:
        self._native = native
        self.settings = settings
        self.slow_methods = dict(slow_methods)
        self.happened: list[str] = []
        self.start_error: Exception | None = None
        self.drains_in_time = True
        self.drained_with_s: float | None = None
        self._lanes: dict[str, Queue[Any]] = {"fast": Queue(), "general": Queue()}

    def start(self) -> int:
        self.happened.append("start")
        if self.start_error is not None:
            raise self.start_error
        return 12345

    def publish(self, routes: Sequence[Any]) -> None:
        self._native.publish(routes)
        self.happened.append("publish")

    def next_slow(self, lane: str, timeout_s: float) -> Any:
        try:
            return self._lanes[lane].get(timeout=timeout_s)
        except Empty:
            return None

    def drain(self, timeout_s: float) -> bool:
        self.happened.append("drain")
        self.drained_with_s = timeout_s
        return self.drains_in_time

    def stop(self) -> None:
        self.happened.append("stop")
        for lane in self._lanes.values():
            for _ in range(16):  # at least one for every thread that waits
                lane.put(None)

    def counters(self) -> dict[str, int]:
        return {"calls": 7, "connections_open": 2, "bytes_received": 4096}

    # -- for tests -----------------------------------------------------------------------------------------------------

    def event(self, call: FakeCall, kind: str, payload: bytes = b"") -> None:
        lane = "fast" if self.slow_methods.get(call.method, "").startswith("fast") else "general"
        self._lanes[lane].put(SlowEvent(call, kind, payload))

    def ask(self, method: str, payload: bytes = b"") -> FakeCall:
        """Sends a unary call and waits for its end."""
        call = FakeCall(method)
        self.event(call, "message", payload)
        return call.wait()


# -- files -------------------------------------------------------------------------------------------------------------


def varint(value: int) -> bytes:
    encoded = b""
    while value > 0x7F:
        encoded += bytes((value & 0x7F | 0x80,))
        value >>= 7
    return encoded + bytes((value,))


def field(number: int, payload: bytes | int) -> bytes:
    """One protobuf field: length-delimited for bytes, a varint for a number."""
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def onnx_bytes(tag: str = "model") -> bytes:
    """A ModelProto with a producer name and an empty graph."""
    return field(2, tag.encode()) + field(7, b"")


def tag_of(model: bytes) -> str:
    """What onnx_bytes() was given."""
    return model[2 : 2 + model[1]].decode()


def put_model(repository: Path, name: str, version: str = "1", tag: str | None = None, config: str = "") -> Path:
    """Writes REPOSITORY/NAME/VERSION/model.onnx (and config.pbtxt when there is text); returns the version's folder."""
    folder = repository / name / version
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(onnx_bytes(tag if tag is not None else f"{name}-{version}"))
    if config:
        (repository / name / "config.pbtxt").write_text(config)
    return folder


def eventually(condition: Callable[[], Any], what: str) -> None:
    """Fails the test when the condition does not come true. For effects of threads that tell nobody."""
    pause = threading.Event()
    for _ in ticks():
        if condition():
            return
        pause.wait(0.002)
    raise AssertionError(f"waited {PATIENCE_S} s in vain: {what}")


def ticks() -> Iterator[int]:
    """As many as PATIENCE_S has pauses of eventually()."""
    yield from range(int(PATIENCE_S / 0.002))
