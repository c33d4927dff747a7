"""The RPCs that Python answers: the table method path -> handler, and the threads that run it. Bytes in, bytes out.

Two lanes, each with its own threads, so that a health check never waits behind another RPC:

- fast: one thread; handlers look something up and return.
- general: four threads. One of them at a time waits for the next event, so a stream's events are handled in their
  order. A stream's handlers run before the next event is taken and therefore must not block; unary handlers run after
  it, four at a time. Patient ones (load, unload: minutes) move on to threads of their own, so that no number of loads
  keeps metadata and statistics waiting.

The native side bounds what waits for a lane; here streams and patient calls have bounds, and whoever is over one is
told.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from queue import Full, Queue
from typing import TYPE_CHECKING, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from protos.gen import grpc_service_pb2 as pb
from protos.gen import health_pb2
from server.errors import Reason, ServingError
from server.grpc_status import status_of
from server.rpc import shared_memory

if TYPE_CHECKING:
    from server._native import SlowCall, SlowEvent
    from server.rpc.health import Health
    from server.rpc.metadata import Metadata
    from server.rpc.reflection import Reflection
    from server.rpc.repository import Repository
    from server.rpc.settings import Settings

_LOG = logging.getLogger(__name__)

INFERENCE = "/inference.GRPCInferenceService/"
HEALTH = "/grpc.health.v1.Health/"
REFLECTION = ("/grpc.reflection.v1.ServerReflection/", "/grpc.reflection.v1alpha.ServerReflection/")

# Full names for reflection's list of services.
SERVICES = tuple(path.strip("/") for path in (INFERENCE, HEALTH, *REFLECTION))

GENERAL_THREADS = 4

# As many loads as the loader runs at once by default; more only wait, and beyond the second bound they are refused.
PATIENT_THREADS = 4
MOST_PATIENT = 64

# A stream holds a little memory and no thread. Far above what sidecars and consoles open, far below what hurts.
MOST_STREAMS = 2048

# Streams that ended before the client was done: its messages under way are dropped. More than can be under way at once.
MOST_ENDED_EARLY = 1024

# How long a thread waits before it looks whether it should end. Only a stop that nobody announced waits that long.
WAIT_S = 1.0


class Lane(Enum):
    """Which threads answer a method. The values are the native side's names."""

    FAST = "fast"
    GENERAL = "general"


class Stream(Protocol):
    """One streaming call. Its methods are called one at a time and must not block."""

    def message(self, payload: bytes) -> None:
        """The client's next message."""

    def half_close(self) -> bool:
        """The client has sent its last message. False: that was all, end the call with OK; True: there is more."""

    def closed(self) -> None:
        """The call is over, for whatever reason. Called exactly once, last."""


class EventSource(Protocol):
    """What is needed of the native front end."""

    def next_slow(self, lane: str, timeout_s: float) -> SlowEvent | None:
        """See server/_native.pyi."""


@dataclass(frozen=True, slots=True)
class Unary:
    """A method with one message each way."""

    answer: Callable[[bytes], bytes]
    lane: Lane = Lane.GENERAL
    is_patient: bool = False

    @property
    def declaration(self) -> str:
        """What the native side is told about the method."""
        return "fast unary" if self.lane is Lane.FAST else "unary"


@dataclass(frozen=True, slots=True)
class Streaming:
    """A method whose call stays open. `open` makes the object that handles one call."""

    open: Callable[[SlowCall], Stream]

    @property
    def declaration(self) -> str:
        """What the native side is told about the method."""
        return "stream"


Method = Unary | Streaming

Request = TypeVar("Request", bound=Message)


def unary(
    message: type[Request], handler: Callable[[Request], Message], lane: Lane = Lane.GENERAL, is_patient: bool = False
) -> Unary:
    """A unary method from a handler of messages. A request that cannot be read is MALFORMED_MESSAGE."""

    def answer(payload: bytes) -> bytes:
        try:
            request = message.FromString(payload)
        except DecodeError as error:
            name = message.DESCRIPTOR.name
            raise ServingError(Reason.MALFORMED_MESSAGE, f"the message is not a valid {name}") from error
        return handler(request).SerializeToString()

    return Unary(answer, lane, is_patient)


def method_table(
    metadata: Metadata, repository: Repository, settings: Settings, health: Health, reflection: Reflection
) -> dict[str, Method]:
    """Every RPC that is not inference, by path."""
    inference = {
        "ServerLive": unary(pb.ServerLiveRequest, metadata.server_live, Lane.FAST),
        "ServerReady": unary(pb.ServerReadyRequest, metadata.server_ready, Lane.FAST),
        "ModelReady": unary(pb.ModelReadyRequest, metadata.model_ready, Lane.FAST),
        "ServerMetadata": unary(pb.ServerMetadataRequest, metadata.server_metadata),
        "ModelMetadata": unary(pb.ModelMetadataRequest, metadata.model_metadata),
        "ModelConfig": unary(pb.ModelConfigRequest, metadata.model_config),
        "ModelStatistics": unary(pb.ModelStatisticsRequest, metadata.model_statistics),
        "RepositoryIndex": unary(pb.RepositoryIndexRequest, repository.index),
        "RepositoryModelLoad": unary(pb.RepositoryModelLoadRequest, repository.load, is_patient=True),
        "RepositoryModelUnload": unary(pb.RepositoryModelUnloadRequest, repository.unload, is_patient=True),
        "TraceSetting": unary(pb.TraceSettingRequest, settings.trace),
        "LogSettings": unary(pb.LogSettingsRequest, settings.log),
        "SystemSharedMemoryStatus": unary(pb.SystemSharedMemoryStatusRequest, shared_memory.refuse),
        "SystemSharedMemoryRegister": unary(pb.SystemSharedMemoryRegisterRequest, shared_memory.refuse),
        "SystemSharedMemoryUnregister": unary(pb.SystemSharedMemoryUnregisterRequest, shared_memory.refuse),
        "CudaSharedMemoryStatus": unary(pb.CudaSharedMemoryStatusRequest, shared_memory.refuse),
        "CudaSharedMemoryRegister": unary(pb.CudaSharedMemoryRegisterRequest, shared_memory.refuse),
        "CudaSharedMemoryUnregister": unary(pb.CudaSharedMemoryUnregisterRequest, shared_memory.refuse),
    }
    table: dict[str, Method] = {INFERENCE + name: method for name, method in inference.items()}
    table[HEALTH + "Check"] = unary(health_pb2.HealthCheckRequest, health.check, Lane.FAST)
    table[HEALTH + "List"] = unary(health_pb2.HealthListRequest, health.list, Lane.FAST)
    table[HEALTH + "Watch"] = Streaming(health.watch)
    for service in REFLECTION:
        table[service + "ServerReflectionInfo"] = Streaming(reflection.stream)
    return table


class SlowRpcs:
    """Takes events from the front end and runs the table's handlers."""

    def __init__(self, table: Mapping[str, Method]) -> None:
        self._table = dict(table)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        # Held while waiting for a general event and while it is sorted: keeps the events of a stream in order.
        self._turn = threading.Lock()
        self._streams_lock = threading.Lock()  # after _turn; guards the following three
        self._streams: dict[SlowCall, Stream] = {}
        self._ended_early: OrderedDict[SlowCall, None] = OrderedDict()
        self._no_streams: ServingError | None = None  # set once streams are refused
        self._patient: Queue[tuple[SlowCall, Unary, bytes] | None] = Queue(MOST_PATIENT + PATIENT_THREADS)

    def declarations(self) -> dict[str, str]:
        """Path -> lane and shape, for the native front end."""
        return {path: method.declaration for path, method in self._table.items()}

    def start(self, source: EventSource) -> None:
        """Starts the threads."""
        self._spawn("slow-fast", self._serve_fast, source)
        for i in range(GENERAL_THREADS):
            self._spawn(f"slow-general-{i}", self._serve_general, source)
        for i in range(PATIENT_THREADS):
            self._spawn(f"slow-patient-{i}", self._serve_patient)

    def end_streams(self, reason: Reason, message: str) -> None:
        """Ends the open streams and refuses new ones, so that a drain need not wait for clients that only listen."""
        with self._streams_lock:
            self._no_streams = ServingError(reason, message)
            for call in list(self._streams):
                self._end(call, self._no_streams)

    def close(self) -> None:
        """The threads take nothing more; calls that run are finished. Does not wait: the front end wakes them."""
        self._stopping.set()

    def join(self, timeout_s: float) -> None:
        """Waits for the threads, `timeout_s` in all. What still runs then is abandoned: the threads are daemons."""
        for _ in range(PATIENT_THREADS):
            try:
                self._patient.put_nowait(None)
            except Full:
                break  # Loads are waiting; their threads are abandoned.
        deadline_s = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline_s - time.monotonic()))

    # -- threads -------------------------------------------------------------------------------------------------------

    def _spawn(self, name: str, serve: Callable[..., None], *arguments: object) -> None:
        thread = threading.Thread(target=serve, args=arguments, name=name, daemon=True)
        thread.start()
        self._threads.append(thread)

    def _serve_fast(self, source: EventSource) -> None:
        while not self._stopping.is_set():
            event = source.next_slow(Lane.FAST.value, WAIT_S)
            if event is not None and event.kind == "message":
                self._answer(event.call, self._table[event.call.method], event.payload)

    def _serve_general(self, source: EventSource) -> None:
        while not self._stopping.is_set():
            event = None  # The one before is let go of before the wait, and a load's files with it.
            with self._turn:
                # Looked at again: this thread may have waited long for its turn.
                event = None if self._stopping.is_set() else source.next_slow(Lane.GENERAL.value, WAIT_S)
                if event is None:
                    continue
                method = self._table[event.call.method]
                if isinstance(method, Streaming):
                    with self._streams_lock:
                        self._stream_event(event, method)
                    continue
            if event.kind != "message":
                continue  # A unary call that is cancelled is told so by `call.cancelled`.
            if method.is_patient:
                self._hand_over(event.call, method, event.payload)
            else:
                self._answer(event.call, method, event.payload)

    def _serve_patient(self) -> None:
        while (work := self._patient.get()) is not None:
            self._answer(*work)
            del work  # As above.

    # -- unary ---------------------------------------------------------------------------------------------------------

    def _answer(self, call: SlowCall, method: Method, payload: bytes) -> None:
        if call.cancelled:
            return
        try:
            if not isinstance(method, Unary):
                raise TypeError(f"{call.method} is a stream and came on the fast lane")
            reply = method.answer(payload)
        except Exception as error:  # Whatever it is becomes this call's status; the thread lives on.
            call.finish(*failure(error, call.method))
            return
        call.send(reply)
        call.finish(0)

    def _hand_over(self, call: SlowCall, method: Unary, payload: bytes) -> None:
        try:
            if self._patient.qsize() >= MOST_PATIENT:
                raise Full
            self._patient.put_nowait((call, method, payload))
        except Full:
            message = f"{MOST_PATIENT} loads and unloads are waiting already: try again when some are done"
            call.finish(status_of(Reason.QUEUE_FULL), message)

    # -- streams, all of it with _streams_lock held --------------------------------------------------------------------

    def _stream_event(self, event: SlowEvent, method: Streaming) -> None:
        call = event.call
        if event.kind == "cancelled":
            self._ended_early.pop(call, None)
            self._close(call)
            return
        if call in self._ended_early:
            return
        try:
            stream = self._streams.get(call) or self._open(call, method)
            if event.kind == "message":
                stream.message(event.payload)
            elif not stream.half_close():
                self._close(call)
                call.finish(0)
        except Exception as error:  # Whatever it is ends this call with its status; the others live on.
            self._end(call, error)

    def _open(self, call: SlowCall, method: Streaming) -> Stream:
        if self._no_streams is not None:
            raise self._no_streams
        if len(self._streams) >= MOST_STREAMS:
            raise ServingError(Reason.QUEUE_FULL, f"{MOST_STREAMS} streams are open already: close some")
        stream = self._streams[call] = method.open(call)
        return stream

    def _close(self, call: SlowCall) -> None:
        stream = self._streams.pop(call, None)
        if stream is not None:
            stream.closed()

    def _end(self, call: SlowCall, error: Exception) -> None:
        self._close(call)
        call.finish(*failure(error, call.method))
        self._ended_early[call] = None
        if len(self._ended_early) > MOST_ENDED_EARLY:
            self._ended_early.popitem(last=False)


def failure(error: Exception, method: str) -> tuple[int, str]:
    """The status and message of a call whose handler raised.

    A ServingError was meant for the client. Anything else is ours: the client gets a number to quote, the log a trace.
    """
    if isinstance(error, ServingError):
        return status_of(error.reason), error.message
    error_id = uuid.uuid4().hex[:16]
    _LOG.error("handler failed", exc_info=error, extra={"method": method, "error_id": error_id})
    return status_of(Reason.INTERNAL), f"internal error {error_id}: the server's log says more under this number"
