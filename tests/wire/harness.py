"""A front end inside the test process, versions that need no runtime, and a client that speaks raw HTTP/2 frames.

`Server` starts a `_native.Frontend` on a free port, answers a few slow methods on two threads, and proves when it
closes that no native object is left. `Http2` keeps no rules: it sends what it is told, in any order, and shows what
came back.
"""

from __future__ import annotations

import contextlib
import gc
import re
import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self
from urllib.parse import unquote_to_bytes

import numpy as np
from hpack import Decoder, Encoder
from hyperframe.frame import (
    DataFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from protos.gen import grpc_service_pb2 as pb
from server import _native
from server.settings import BatchSettings, DataType, InstanceGroup, ModelSettings, SessionSettings, TensorSettings

INFER = "/inference.GRPCInferenceService/ModelInfer"
STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"

# What the server's slow threads answer; see Server._answer.
ECHO = "/test.Slow/Echo"
FAST_ECHO = "/test.Slow/FastEcho"
CHAT = "/test.Slow/Chat"
SILENT = "/test.Slow/Silent"
LISTEN = "/test.Slow/Listen"
FAIL = "/test.Slow/Fail"
SLOW_METHODS = {
    ECHO: "unary",
    FAST_ECHO: "fast unary",
    CHAT: "stream",
    SILENT: "unary",
    LISTEN: "stream",
    FAIL: "unary",
}

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

# Longer than anything here takes on a busy machine: reached only by a test that fails.
PATIENCE_S = 10.0

OK, CANCELLED, INVALID_ARGUMENT, DEADLINE_EXCEEDED, NOT_FOUND = 0, 1, 3, 4, 5
RESOURCE_EXHAUSTED, UNIMPLEMENTED, INTERNAL, UNAVAILABLE = 8, 12, 13, 14

NO_ERROR, PROTOCOL_ERROR, INTERNAL_ERROR, FLOW_CONTROL_ERROR = 0, 1, 2, 3
STREAM_CLOSED, FRAME_SIZE_ERROR, REFUSED_STREAM, CANCEL, COMPRESSION_ERROR = 5, 6, 7, 8, 9
ENHANCE_YOUR_CALM = 11

SETTING_TABLE_SIZE, SETTING_MAX_STREAMS, SETTING_WINDOW, SETTING_FRAME_SIZE, SETTING_HEADER_LIST = 1, 3, 4, 5, 6


def eventually(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Asks until the answer is true and returns it; fails the test after `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, f"waited {patience_s} s in vain: {what}"
        time.sleep(0.0005)
    return answer


# ---- models ----------------------------------------------------------------------------------------------------------


def tensor(name: str, dims: Sequence[int], datatype: DataType = DataType.FP32) -> TensorSettings:
    """A tensor whose shape on the wire is the runtime's."""
    return TensorSettings(name, datatype, tuple(dims), tuple(dims))


def model_settings(
    name: str = "echo",
    version: str = "1",
    *,
    max_batch_size: int = 8,
    inputs: Sequence[TensorSettings] = (tensor("X", (-1, 4)),),
    outputs: Sequence[TensorSettings] = (tensor("Y", (-1, 4)),),
    instances: int = 1,
    **batching: Any,
) -> ModelSettings:
    """Settings of a mock: output i shows input i."""
    return ModelSettings(
        name=name,
        version=version,
        max_batch_size=max_batch_size,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        batching=BatchSettings(max_batch_rows=max(max_batch_size, 1), **batching),
        instance_groups=(InstanceGroup(instances, SessionSettings()),),
        warmup=(),
    )


def bytes_model(name: str = "blob", **rest: Any) -> ModelSettings:
    """One row of any number of bytes: for messages of an exact size."""
    return model_settings(
        name,
        max_batch_size=0,
        inputs=(tensor("X", (-1,), DataType.UINT8),),
        outputs=(tensor("Y", (-1,), DataType.UINT8),),
        **rest,
    )


def infer_request(model: str = "echo", values: Any = (1.0, 2.0, 3.0, 4.0), **fields: Any) -> pb.ModelInferRequest:
    """A request with one FP32 tensor X of rows of four. `fields` are those of ModelInferRequest."""
    array = np.asarray(values, "<f4").reshape(-1, 4)
    request = pb.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="X", datatype="FP32", shape=array.shape)
    request.raw_input_contents.append(array.tobytes())
    return request


def blob_request(payload: bytes, model: str = "blob", **fields: Any) -> pb.ModelInferRequest:
    """A request for a `bytes_model`."""
    request = pb.ModelInferRequest(model_name=model, **fields)
    request.inputs.add(name="X", datatype="UINT8", shape=[len(payload)])
    request.raw_input_contents.append(payload)
    return request


def blob_of_message_size(size: int, model: str = "blob") -> bytes:
    """A serialized blob request of exactly `size` bytes."""
    filler = size
    while True:
        message = blob_request(b"\x07" * filler, model).SerializeToString()
        if len(message) == size:
            return message
        filler -= max(len(message) - size, 1)


def values_of(message: bytes) -> list[float]:
    """The numbers of a reply to `infer_request`."""
    reply = pb.ModelInferResponse.FromString(message)
    return list(np.frombuffer(reply.raw_output_contents[0], "<f4"))


def framed(message: bytes | Any, flag: int = 0) -> bytes:
    """One gRPC message with its prefix."""
    payload = message if isinstance(message, bytes) else message.SerializeToString()
    return struct.pack(">BI", flag, len(payload)) + payload


def unframed(data: bytes) -> list[bytes]:
    """The messages of a reply's body; fails when it is cut."""
    messages = []
    while data:
        flag, size = struct.unpack(">BI", data[:5])
        assert flag == 0, "replies are not compressed"
        assert len(data) >= 5 + size, "the reply ends inside a message"
        messages.append(data[5 : 5 + size])
        data = data[5 + size :]
    return messages


# ---- the server ------------------------------------------------------------------------------------------------------


class Mock:
    """A mock version. After its end it still knows its statistics, and holds nothing native."""

    def __init__(self, settings: ModelSettings, script: str) -> None:
        self.name = settings.name
        self.native: Any = _native.Version.mock(settings, script)
        self.native.start()
        self._final: Any = None

    def statistics(self) -> Any:
        """_native.VersionStatistics."""
        return self.native.statistics() if self.native else self._final

    def queue_view(self) -> dict[str, Any]:
        """What waits and runs."""
        view: dict[str, Any] = self.native.queue_view()
        return view

    def wait_waiting(self, requests: int) -> None:
        """Until exactly so many requests wait in the queue."""
        eventually(lambda: self.queue_view()["waiting"] == requests, f"{requests} waiting in {self.name}")

    def release(self, runs: int) -> None:
        """With the script hold: lets so many runs pass."""
        self.native.release_mock(runs)

    def end(self, timeout_s: float) -> bool:
        """Retires it. It is in no published table any more."""
        in_time: bool = self.native.retire(timeout_s)
        self._final = self.native.statistics()
        self.native = None
        return in_time


class Server:
    """A front end on a free port of 127.0.0.1. Leave it as a context: it ends everything and looks for leaks.

    `settings` are fields of `_native.FrontendSettings`.
    """

    def __init__(self, **settings: Any) -> None:
        gc.collect()  # what an earlier test left in a cycle must not go while this one counts
        self.live_before = _native.live_objects()
        self.frontend: Any = _native.Frontend(
            _native.FrontendSettings(**{"port": 0, "io_threads": 1} | settings), SLOW_METHODS
        )
        self.versions: dict[tuple[str, str], Mock] = {}
        self.events: list[tuple[str, str, bytes]] = []  # (kind, method, payload) of every slow event, in order
        self.calls: list[Any] = []  # of the methods that leave them open
        self.metadata: dict[str, str] = {}  # of the latest slow call
        self._stopping = False
        self._block: tuple[threading.Event, threading.Event] | None = None
        self.port: int = self.frontend.start()
        self._threads = [
            threading.Thread(target=self._serve_lane, args=(lane,), daemon=True) for lane in ("fast", "general")
        ]
        for thread in self._threads:
            thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close()
        if kind is None:
            self.check_left_over()

    # -- models

    def add(self, settings: ModelSettings | None = None, script: str = "echo", publish: bool = True) -> Mock:
        """Makes, starts and publishes a mock version. The latest version of a model is its default."""
        settings = settings or model_settings()
        version = Mock(settings, script)
        self.versions[settings.name, settings.version] = version
        if publish:
            self.publish()
        return version

    def publish(self, extra: Sequence[Any] = ()) -> None:
        """Publishes the route table of all versions that there are."""
        by_model: dict[str, list[Any]] = defaultdict(list)
        for (model, text), version in self.versions.items():
            by_model[model].append(_native.VersionRoute(text, version.native, ""))
        routes = [_native.ModelRoute(model, tuple(some), some[-1].text, {}) for model, some in by_model.items()]
        self.frontend.publish([*routes, *extra])

    def retire(self, model: str, version: str, timeout_s: float = PATIENCE_S) -> bool:
        """Takes a version out of the table and retires it."""
        going = self.versions.pop((model, version))
        self.publish()
        return going.end(timeout_s)

    # -- looking

    def counters(self) -> dict[str, int]:
        """Of the front end."""
        counters: dict[str, int] = self.frontend.counters()
        return counters

    def count(self, name: str) -> int:
        """One counter."""
        return self.counters()[name]

    def wait_for(self, name: str, at_least: int) -> None:
        """Until a counter has got there."""
        eventually(lambda: self.count(name) >= at_least, f"{name} >= {at_least}")

    def wait_event(self, kind: str, method: str, count: int = 1) -> None:
        """Until so many slow events of a kind have come."""
        eventually(
            lambda: sum(event[:2] == (kind, method) for event in list(self.events)) >= count,
            f"{count} events {kind} of {method}, there are {self.events}",
        )

    def block_general_lane(self) -> threading.Event:
        """Makes the thread of the general lane wait, with nothing taken, until the event that is returned is set."""
        release, blocked = threading.Event(), threading.Event()
        self._block = (blocked, release)
        # It notices at its next event.
        with Http2(self.port) as client:
            client.call(b"wake up", SILENT)
            assert blocked.wait(PATIENCE_S)
        return release

    # -- ending

    def close(self) -> None:
        """Ends everything. Requests that are held are failed."""
        if self._stopping:
            return
        self._stopping = True
        self.frontend.publish([])
        for version in self.versions.values():
            version.end(0.0)
        self.versions.clear()
        for call in self.calls:
            call.finish(UNAVAILABLE, "the test is over")
        self.frontend.stop()
        for thread in self._threads:
            thread.join()

    def check_left_over(self) -> None:
        """No native object is left, and the counters of what is open are at zero."""
        counters = self.counters()
        for name in ("connections_open", "calls_open", "requests_live"):
            assert counters[name] == 0, counters
        self.calls.clear()
        del self.frontend
        if _native.live_objects() != self.live_before:
            gc.collect()  # a failed test's traceback, for one, may hold on to something in a cycle
        assert _native.live_objects() == self.live_before

    # -- slow methods

    def _serve_lane(self, lane: str) -> None:
        # Looks at `_stopping` after each event; stop() wakes it.
        while not self._stopping:
            event = self.frontend.next_slow(lane, 1.0)
            if event is not None:
                self.metadata = dict(event.call.metadata)
                self._answer(event.call, event.kind, event.payload)
                self.events.append((event.kind, event.call.method, event.payload))
            del event
            if lane == "general" and (block := self._block):
                self._block = None
                block[0].set()
                block[1].wait(PATIENCE_S)

    def _answer(self, call: Any, kind: str, payload: bytes) -> None:
        """ECHO, FAST_ECHO: the message back. CHAT: each message back, OK at half-close. SILENT, LISTEN: nothing ever.
        FAIL: what the JSON-free message "STATUS TEXT" says."""
        match call.method, kind:
            case (("/test.Slow/Echo" | "/test.Slow/FastEcho"), "message"):
                call.send(payload)
                call.finish(0, "", {"x-slow": "yes"})
            case ("/test.Slow/Chat", "message"):
                call.send(payload)
            case ("/test.Slow/Chat", "half_close"):
                call.finish(0)
            case (("/test.Slow/Silent" | "/test.Slow/Listen"), "message"):
                self.calls.append(call)
            case ("/test.Slow/Fail", "message"):
                status, text = payload.decode().split(" ", 1)
                call.finish(int(status), text)


# ---- the client ------------------------------------------------------------------------------------------------------


class ClosedError(Exception):
    """The server closed the connection while more was expected."""


@dataclass
class Reply:
    """What came back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    trailers: dict[str, str] = field(default_factory=dict)
    data: bytes = b""
    reset: int | None = None  # error code of RST_STREAM
    ended: bool = False  # END_STREAM seen
    shape: list[str] = field(default_factory=list)  # e.g. ["HEADERS", "DATA", "HEADERS+END"]

    @property
    def trailers_only(self) -> bool:
        """One block of headers and nothing else."""
        return bool(self.headers) and not self.trailers and not self.data

    @property
    def fields(self) -> dict[str, str]:
        """Headers and trailers together."""
        return self.headers | self.trailers

    @property
    def http_status(self) -> int:
        """The :status."""
        return int(self.headers[":status"])

    @property
    def status(self) -> int:
        """grpc-status, checked for its form."""
        text = self.fields["grpc-status"]
        assert re.fullmatch(r"0|[1-9]|1[0-6]", text), text
        return int(text)

    @property
    def message(self) -> str:
        """grpc-message, decoded."""
        text = self.fields.get("grpc-message", "")
        assert re.fullmatch(r"[ -~]*", text), text
        return unquote_to_bytes(text).decode()

    @property
    def messages(self) -> list[bytes]:
        """The messages of the body."""
        return unframed(self.data)

    @property
    def over(self) -> bool:
        """Nothing more will come."""
        return self.ended or self.reset is not None

    def expect(self, status: int, *texts: str) -> Self:
        """Checks the status, and that the message has these texts."""
        assert self.reset is None or "grpc-status" in self.fields, self
        assert self.status == status, f"{self.status}: {self.message}"
        for text in texts:
            assert text in self.message, self.message
        return self


def request_headers(path: str = INFER, **changes: str | None) -> list[tuple[str, str]]:
    """Headers as a gRPC client sends them.

    `changes` come on top: "_" stands for "-", a leading "p_" for ":", and None leaves a header out.
    """
    fields: dict[str, str | None] = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": "localhost",
        "te": "trailers",
        "content-type": "application/grpc",
    }
    for name, value in changes.items():
        fields[re.sub("^p_", ":", name).replace("_", "-")] = value
    return [(name, value) for name, value in fields.items() if value is not None]


class Http2:
    """One connection. Sends exactly what it is told; answers SETTINGS and PING unless told not to.

    The receive window is opened wide at the start, so that replies need no updates. With `handshake` the server's
    settings have been read and confirmed before the first call.
    """

    def __init__(
        self,
        port: int,
        *,
        preface: bytes = PREFACE,
        settings: Mapping[int, int] | None = None,
        window: int = 1 << 30,
        receive_buffer: int | None = None,
        answer_pings: bool = True,
        handshake: bool = True,
    ) -> None:
        self.socket = socket.socket()
        if receive_buffer is not None:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        self.socket.settimeout(PATIENCE_S)
        self.socket.connect(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.encoder = Encoder()
        self.decoder = Decoder()
        self.decoder.max_header_list_size = 1 << 20
        self.answer_pings = answer_pings
        self.replies: dict[int, Reply] = defaultdict(Reply)
        self.frames: list[Frame] = []  # all that came, in order
        self.server_settings: dict[int, int] = {}
        self.next_id = 1
        self.closed = False
        self._received = bytearray()
        self._speaks = preface == PREFACE
        self._settings_sent = 0
        self._confirmed = 0
        self._sent: dict[int, int] = defaultdict(int)  # bytes of DATA, by stream; 0: all together
        self._granted: dict[int, int] = defaultdict(int)  # by WINDOW_UPDATE
        if preface:
            self.raw(preface)
        if self._speaks:
            values = {SETTING_WINDOW: (1 << 31) - 1} if settings is None else dict(settings)
            self.frame(SettingsFrame(0, settings=values))
            if window:
                self.frame(WindowUpdateFrame(0, window_increment=window))
            while handshake and not self.server_settings:
                self.read_frame()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self, reset: bool = False) -> None:
        """Closes the socket; `reset` drops what is under way, as a crashed peer does."""
        if reset:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    # -- sending

    def raw(self, data: bytes) -> None:
        """Any bytes."""
        self.socket.sendall(data)

    def frame(self, *frames: Frame) -> None:
        """Frames, in one write."""
        for frame in frames:
            if isinstance(frame, SettingsFrame) and "ACK" not in frame.flags:
                self._settings_sent += 1
            if isinstance(frame, DataFrame):
                self._sent[0] += len(frame.data)
                self._sent[frame.stream_id] += len(frame.data)
        self.raw(b"".join(frame.serialize() for frame in frames))

    def new_stream(self) -> int:
        """An unused stream id."""
        stream_id = self.next_id
        self.next_id += 2
        return stream_id

    def headers_frame(
        self, stream_id: int, fields: Iterable[tuple[Any, Any]], end: bool = False, end_headers: bool = True
    ) -> HeadersFrame:
        """HEADERS, encoded: the frame has to be sent, for the table of the peer follows ours."""
        frame = HeadersFrame(stream_id, self.encoder.encode(fields))
        if end:
            frame.flags.add("END_STREAM")
        if end_headers:
            frame.flags.add("END_HEADERS")
        return frame

    @staticmethod
    def data_frame(stream_id: int, data: bytes, end: bool = False) -> DataFrame:
        """DATA."""
        frame = DataFrame(stream_id, data)
        if end:
            frame.flags.add("END_STREAM")
        return frame

    def open(self, path: str = INFER, end: bool = False, **changes: str | None) -> int:
        """Opens a stream with a gRPC client's headers; see `request_headers`."""
        stream_id = self.new_stream()
        self.frame(self.headers_frame(stream_id, request_headers(path, **changes), end))
        return stream_id

    def data(self, stream_id: int, data: bytes, end: bool = False, size: int = 16384) -> None:
        """DATA frames of at most `size` bytes."""
        parts = [data[i : i + size] for i in range(0, len(data), size)] or [b""]
        self.frame(*[self.data_frame(stream_id, part, end and part is parts[-1]) for part in parts])

    def upload(self, stream_id: int, data: bytes, end: bool = False) -> None:
        """DATA as fast as the server's windows allow. Stops when the server has ended the stream."""
        while data and not self.replies[stream_id].over:
            window = min(
                65535 + self._granted[0] - self._sent[0],
                self.server_settings.get(SETTING_WINDOW, 65535) + self._granted[stream_id] - self._sent[stream_id],
            )
            if window <= 0:
                self.read_frame()
                continue
            self.data(stream_id, data[:window], end and window >= len(data))
            data = data[window:]

    def call(self, message: bytes | Any, path: str = INFER, **changes: str | None) -> int:
        """Sends a whole unary call; in one write if it is small."""
        stream_id = self.new_stream()
        body = framed(message)
        headers = self.headers_frame(stream_id, request_headers(path, **changes))
        if len(body) <= 16384:
            self.frame(headers, self.data_frame(stream_id, body, end=True))
        else:
            self.frame(headers)
            self.upload(stream_id, body, end=True)
        return stream_id

    def reset(self, stream_id: int, code: int = CANCEL) -> None:
        """RST_STREAM."""
        self.frame(RstStreamFrame(stream_id, error_code=code))

    # -- receiving

    def read_frame(self, timeout_s: float = PATIENCE_S) -> Frame:
        """The next frame, whatever it is. ClosedError at the end, TimeoutError when nothing comes."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            if len(self._received) >= 9:
                frame, size = Frame.parse_frame_header(memoryview(bytes(self._received[:9])))
                if len(self._received) >= 9 + size:
                    frame.parse_body(memoryview(bytes(self._received[9 : 9 + size])))
                    del self._received[: 9 + size]
                    self._take(frame)
                    return frame
            self.socket.settimeout(max(deadline_s - time.monotonic(), 0.001))
            try:
                data = self.socket.recv(1 << 18)
            except ConnectionError as error:
                self.closed = True
                raise ClosedError from error
            if not data:
                self.closed = True
                raise ClosedError
            self._received += data

    def _take(self, frame: Frame) -> None:
        self.frames.append(frame)
        reply = self.replies[frame.stream_id] if frame.stream_id else Reply()
        match frame:
            case SettingsFrame():
                if "ACK" in frame.flags:
                    self._confirmed += 1
                else:
                    self.server_settings |= frame.settings
                    if self._speaks:
                        self._try_send(SettingsFrame(0, flags=["ACK"]))
            case PingFrame():
                if "ACK" not in frame.flags and self.answer_pings:
                    self._try_send(PingFrame(0, opaque_data=frame.opaque_data, flags=["ACK"]))
            case HeadersFrame():
                assert "END_HEADERS" in frame.flags, "our replies are short"
                fields = {str(name): str(value) for name, value in self.decoder.decode(frame.data)}
                if reply.headers:
                    reply.trailers = fields
                else:
                    reply.headers = fields
            case DataFrame():
                reply.data += frame.data
            case RstStreamFrame():
                reply.reset = frame.error_code
            case WindowUpdateFrame():
                self._granted[frame.stream_id] += frame.window_increment
            case _:
                pass
        if frame.stream_id and not isinstance(frame, WindowUpdateFrame):
            end = "END_STREAM" in frame.flags
            reply.ended = reply.ended or end
            reply.shape.append(type(frame).__name__.removesuffix("Frame").upper() + ("+END" if end else ""))

    def _try_send(self, frame: Frame) -> None:
        # The server may have closed already; what it said before is still to be read.
        with contextlib.suppress(ConnectionError):
            self.frame(frame)

    def reply(self, stream_id: int, timeout_s: float = PATIENCE_S) -> Reply:
        """Reads until the stream is over."""
        while not self.replies[stream_id].over:
            self.read_frame(timeout_s)
        return self.replies[stream_id]

    def infer(self, message: bytes | Any, path: str = INFER, **changes: str | None) -> Reply:
        """One unary call."""
        return self.reply(self.call(message, path, **changes))

    def sync(self) -> None:
        """Returns when the server has seen all that was sent before, and what it said to it at once has been read.

        Two rounds of SETTINGS, for an ACK overtakes other frames; PINGs would be counted as strikes.
        """
        for _ in range(2):
            self.frame(SettingsFrame(0))
            while self._confirmed < self._settings_sent:
                self.read_frame()

    def read_to_end(self, timeout_s: float = PATIENCE_S) -> list[Frame]:
        """Reads until the server closes, and closes too; returns all frames that ever came."""
        with contextlib.suppress(ClosedError):
            while True:
                self.read_frame(timeout_s)
        self.close()
        return self.frames

    def goaways(self) -> list[GoAwayFrame]:
        """The GOAWAY frames that came."""
        return [frame for frame in self.frames if isinstance(frame, GoAwayFrame)]


def check_works(client: Http2, model: str = "echo") -> None:
    """A good request on this connection gets its own answer."""
    values = [float(client.next_id), 2.0, 3.0, 4.0]
    reply = client.infer(infer_request(model, values))
    assert reply.status == OK, reply.message
    assert values_of(reply.messages[0]) == values


@contextlib.contextmanager
def healthy_neighbour(server: Server, model: str = "echo") -> Iterator[Callable[[], int]]:
    """A second connection that goes on asking. Yields a function that says how many answers it has had.

    Fails the test when one of its requests fails.
    """
    stop = threading.Event()
    answered = 0
    failure: list[BaseException] = []

    def ask() -> None:
        nonlocal answered
        try:
            with Http2(server.port) as client:
                while not stop.is_set():
                    check_works(client, model)
                    answered += 1
                    client.frames.clear()
                    client.replies.clear()
        except BaseException as error:  # The test's own thread raises it.
            failure.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield lambda: answered
    finally:
        stop.set()
        thread.join()
    if failure:
        raise failure[0]
