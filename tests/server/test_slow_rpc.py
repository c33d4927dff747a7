"""The lanes: who answers what, in which order, and what happens when somebody fails, floods or leaves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from protos.gen import grpc_service_pb2 as pb
from server import slow_rpc
from server.errors import Reason, ServingError
from server.slow_rpc import GENERAL_THREADS, MOST_PATIENT, PATIENT_THREADS, Lane, SlowRpcs, Streaming, Unary, unary
from tests.server.fakes import PATIENCE_S, FakeCall, FakeFrontend, FakeNative, eventually

OK, INVALID, EXHAUSTED, INTERNAL, UNAVAILABLE = 0, 3, 8, 13, 14


class Echo:
    """A stream that says back what it hears."""

    def __init__(self, call: FakeCall, goes_on: bool = False) -> None:
        self.call = call
        self.goes_on = goes_on
        self.heard: list[bytes] = []
        self.is_closed = threading.Event()

    def message(self, payload: bytes) -> None:
        self.heard.append(payload)
        if payload == b"fail":
            raise ServingError(Reason.INVALID_TENSOR, "not that")
        if payload == b"bug":
            raise RuntimeError("a bug")
        self.call.send(payload)

    def half_close(self) -> bool:
        return self.goes_on

    def closed(self) -> None:
        assert not self.is_closed.is_set(), "closed twice"
        self.is_closed.set()


class World:
    """The lanes over a fake front end, with methods that tests steer."""

    def __init__(self) -> None:
        self.gates: dict[str, threading.Event] = {}
        self.entered: dict[str, threading.Semaphore] = {}
        self.streams: list[Echo] = []
        self.table: dict[str, Unary | Streaming] = {
            "/fast": Unary(lambda payload: b"fast " + payload, Lane.FAST),
            "/plain": Unary(lambda payload: b"plain " + payload),
            "/slow": self._gated("/slow"),
            "/load": self._gated("/load", is_patient=True),
            "/refuse": Unary(self._refuse),
            "/bug": Unary(self._bug),
            "/stream": Streaming(self._open),
            "/listen": Streaming(lambda call: self._open(call, goes_on=True)),  # type: ignore[arg-type]
        }
        self.rpcs = SlowRpcs(self.table)
        self.frontend = FakeFrontend(FakeNative(), None, self.rpcs.declarations())

    def _gated(self, name: str, is_patient: bool = False) -> Unary:
        gate, entered = threading.Event(), threading.Semaphore(0)
        self.gates[name], self.entered[name] = gate, entered

        def answer(payload: bytes) -> bytes:
            entered.release()
            assert gate.wait(PATIENCE_S)
            return payload

        return Unary(answer, is_patient=is_patient)

    @staticmethod
    def _refuse(_payload: bytes) -> bytes:
        raise ServingError(Reason.VERSION_NOT_READY, "come back later")

    @staticmethod
    def _bug(_payload: bytes) -> bytes:
        raise KeyError("/secret/path")

    def _open(self, call: Any, goes_on: bool = False) -> Echo:
        self.streams.append(Echo(call, goes_on))
        return self.streams[-1]

    def send(self, method: str, payload: bytes = b"") -> FakeCall:
        call = FakeCall(method)
        self.frontend.event(call, "message", payload)
        return call

    def wait_until_inside(self, name: str, calls: int) -> None:
        for _ in range(calls):
            assert self.entered[name].acquire(timeout=PATIENCE_S)


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    world.rpcs.start(world.frontend)
    yield world
    for gate in world.gates.values():
        gate.set()
    world.rpcs.close()
    world.frontend.stop()
    world.rpcs.join(PATIENCE_S)


def test_methods_are_declared_by_lane_and_shape(world: World) -> None:
    assert world.rpcs.declarations() == {
        "/fast": "fast unary",
        "/plain": "unary",
        "/slow": "unary",
        "/load": "unary",
        "/refuse": "unary",
        "/bug": "unary",
        "/stream": "stream",
        "/listen": "stream",
    }


def test_unary_calls_are_answered(world: World) -> None:
    for method, reply in (("/fast", b"fast x"), ("/plain", b"plain x")):
        call = world.frontend.ask(method, b"x")
        assert (call.sent, call.status, call.message) == ([reply], OK, "")


def test_a_refusal_becomes_its_status(world: World) -> None:
    call = world.frontend.ask("/refuse")
    assert (call.sent, call.status, call.message) == ([], UNAVAILABLE, "come back later")


def test_a_bug_becomes_internal_with_a_number_that_the_log_knows(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    call = world.frontend.ask("/bug")
    assert call.status == INTERNAL
    assert "secret" not in call.message
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert vars(record)["error_id"] in call.message
    assert vars(record)["method"] == "/bug"
    assert record.exc_info
    assert world.frontend.ask("/plain", b"x").status == OK, "the thread lives on"


def test_the_fast_lane_never_waits_for_the_others(world: World) -> None:
    busy = [world.send("/slow") for _ in range(3 * GENERAL_THREADS)]
    loads = [world.send("/load") for _ in range(PATIENT_THREADS)]
    world.wait_until_inside("/slow", GENERAL_THREADS)
    assert world.frontend.ask("/fast", b"x").status == OK
    assert not any(call.is_finished.is_set() for call in (*busy, *loads))


def test_loads_never_keep_the_general_lane_waiting(world: World) -> None:
    loads = [world.send("/load", bytes((number,))) for number in range(20)]
    world.wait_until_inside("/load", PATIENT_THREADS)
    for _ in range(10):
        assert world.frontend.ask("/plain", b"x").status == OK
    assert not any(call.is_finished.is_set() for call in loads)
    world.gates["/load"].set()
    assert [call.wait().sent for call in loads] == [[bytes((number,))] for number in range(20)]


def test_more_loads_than_may_wait_are_refused(world: World) -> None:
    for _ in range(PATIENT_THREADS):
        world.send("/load")
    world.wait_until_inside("/load", PATIENT_THREADS)
    waiting = [world.send("/load") for _ in range(MOST_PATIENT)]
    eventually(lambda: world.rpcs._patient.qsize() == MOST_PATIENT, "all of them wait")
    refused = world.send("/load").wait()
    assert (refused.status, refused.sent) == (EXHAUSTED, [])
    assert f"{MOST_PATIENT} loads and unloads are waiting already" in refused.message
    world.gates["/load"].set()
    assert all(call.wait().status == OK for call in waiting)


def test_unary_calls_run_side_by_side_up_to_the_number_of_threads(world: World) -> None:
    calls = [world.send("/slow") for _ in range(GENERAL_THREADS)]
    world.wait_until_inside("/slow", GENERAL_THREADS)
    world.gates["/slow"].set()
    assert all(call.wait().status == OK for call in calls)


def test_a_call_whose_client_has_gone_is_not_answered(world: World) -> None:
    called: list[bytes] = []
    world.rpcs._table["/plain"] = Unary(lambda payload: called.append(payload) or b"")
    gone = FakeCall("/plain")
    gone.cancelled = True
    world.frontend.event(gone, "message", b"gone")
    world.frontend.event(gone, "cancelled")
    assert world.frontend.ask("/plain", b"here").status == OK
    assert called == [b"here"]
    assert not gone.is_finished.is_set()


def test_the_messages_of_a_stream_come_in_order(world: World) -> None:
    calls = [FakeCall("/stream") for _ in range(5)]
    for number in range(50):
        for call in calls:
            world.frontend.event(call, "message", bytes((number,)))
    for call in calls:
        world.frontend.event(call, "half_close")
    for call in calls:
        assert call.wait().status == OK
        assert call.sent == [bytes((number,)) for number in range(50)]
    assert all(stream.is_closed.is_set() for stream in world.streams)
    assert world.rpcs._streams == {}


def test_a_stream_may_go_on_after_the_client_said_everything(world: World) -> None:
    call = world.send("/listen", b"1")
    world.frontend.event(call, "half_close")
    assert world.frontend.ask("/plain").status == OK
    assert call.has_sent.wait(PATIENCE_S)
    assert not call.is_finished.is_set()
    world.frontend.event(call, "cancelled")
    eventually(lambda: world.streams and world.streams[0].is_closed.is_set(), "the stream is closed")
    assert not call.is_finished.is_set(), "nobody listens to an end"


@pytest.mark.parametrize(("payload", "status"), [(b"fail", INVALID), (b"bug", INTERNAL)])
def test_a_stream_that_fails_ends_with_its_status_and_the_others_live_on(
    world: World, payload: bytes, status: int
) -> None:
    other = world.send("/stream", b"1")
    call = world.send("/stream", payload)
    assert call.wait().status == status
    world.frontend.event(call, "message", b"on its way")
    world.frontend.event(call, "half_close")
    world.frontend.event(call, "cancelled")
    world.frontend.event(other, "half_close")
    assert other.wait().status == OK
    failed = next(stream for stream in world.streams if stream.call is call)
    assert failed.heard == [payload], "nothing reaches a stream that has ended"
    assert failed.is_closed.is_set()
    eventually(lambda: not world.rpcs._ended_early, "a cancellation is the last event of a call")


def test_streams_have_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_rpc, "MOST_STREAMS", 3)
    open_calls = [world.send("/listen", b"x") for _ in range(3)]
    assert all(call.has_sent.wait(PATIENCE_S) for call in open_calls)
    refused = world.send("/listen", b"x").wait()
    assert (refused.status, refused.message) == (EXHAUSTED, "3 streams are open already: close some")
    world.frontend.event(open_calls[0], "cancelled")
    assert world.send("/listen", b"x").has_sent.wait(PATIENCE_S)


def test_what_is_remembered_of_ended_streams_has_a_bound(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slow_rpc, "MOST_ENDED_EARLY", 3)
    for _ in range(10):
        world.send("/stream", b"fail").wait()
    eventually(lambda: len(world.rpcs._ended_early) == 3, "the oldest are forgotten")


def test_streams_can_be_ended_at_once_and_refused_from_then_on(world: World) -> None:
    calls = [world.send("/listen", b"x") for _ in range(3)]
    assert all(call.has_sent.wait(PATIENCE_S) for call in calls)
    world.rpcs.end_streams(Reason.NODE_DRAINING, "bye")
    assert [(call.wait().status, call.message) for call in calls] == [(UNAVAILABLE, "bye")] * 3
    assert all(stream.is_closed.is_set() for stream in world.streams)
    late = world.send("/listen", b"x").wait()
    assert (late.status, late.message) == (UNAVAILABLE, "bye")
    assert world.frontend.ask("/plain").status == OK, "unary calls are still answered"


def test_ending_streams_does_not_wait_for_a_thread_that_waits_for_events() -> None:
    world = World()
    is_waiting = threading.Event()
    may_return = threading.Event()

    class Silent:
        def next_slow(self, lane: str, _timeout_s: float) -> None:
            if lane == "general":
                is_waiting.set()
            assert may_return.wait(PATIENCE_S)

    world.rpcs.start(Silent())
    assert is_waiting.wait(PATIENCE_S)
    world.rpcs.end_streams(Reason.NODE_DRAINING, "bye")
    world.rpcs.close()
    may_return.set()
    world.rpcs.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in world.rpcs._threads)


def test_after_the_end_no_thread_is_left(world: World) -> None:
    world.rpcs.close()
    world.frontend.stop()
    world.rpcs.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in world.rpcs._threads)


def test_join_gives_up_on_a_load_that_does_not_end(world: World) -> None:
    world.send("/load")
    world.wait_until_inside("/load", 1)
    world.rpcs.close()
    world.frontend.stop()
    world.rpcs.join(0.0)
    assert any(thread.is_alive() for thread in world.rpcs._threads)


# -- messages ----------------------------------------------------------------------------------------------------------


def test_a_request_is_read_and_the_reply_written() -> None:
    method = unary(pb.ModelReadyRequest, lambda request: pb.ModelReadyResponse(ready=request.name == "a"))
    assert pb.ModelReadyResponse.FromString(method.answer(pb.ModelReadyRequest(name="a").SerializeToString())).ready


@pytest.mark.parametrize("payload", [b"\xff", b"\x0a\x05ab", b"\x0a\x02\xff\xfe"])
def test_bytes_that_are_no_request_are_malformed(payload: bytes) -> None:
    method = unary(pb.ModelReadyRequest, lambda _request: pb.ModelReadyResponse())
    with pytest.raises(ServingError, match="MALFORMED_MESSAGE: the message is not a valid ModelReadyRequest"):
        method.answer(payload)


def test_fields_that_nobody_knows_are_ignored() -> None:
    method = unary(pb.ServerLiveRequest, lambda _request: pb.ServerLiveResponse(live=True))
    assert pb.ServerLiveResponse.FromString(method.answer(b"\xfa\x07\x01x")).live


def test_every_rpc_of_the_services_has_a_handler() -> None:
    from unittest.mock import MagicMock

    from protos.gen import grpc_service_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2

    table = slow_rpc.method_table(MagicMock(), MagicMock(), MagicMock(), MagicMock(), MagicMock())
    expected = set()
    for module in (grpc_service_pb2, health_pb2, reflection_pb2, reflection_v1alpha_pb2):
        for service in module.DESCRIPTOR.services_by_name.values():
            expected |= {f"/{service.full_name}/{method.name}" for method in service.methods}
            assert service.full_name in slow_rpc.SERVICES
    native = {"/inference.GRPCInferenceService/ModelInfer", "/inference.GRPCInferenceService/ModelStreamInfer"}
    assert table.keys() == expected - native
    fast = {path.rpartition("/")[2] for path, method in table.items() if method.declaration == "fast unary"}
    assert fast == {"ServerLive", "ServerReady", "ModelReady", "Check", "List"}
