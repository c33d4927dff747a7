"""How connections begin, live and end: handshake, keepalive, age, idleness, drain."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import grpc
import pytest
from hyperframe.frame import Frame, GoAwayFrame, HeadersFrame, PingFrame
from tritonclient.grpc import InferenceServerClient, InferInput, KeepAliveOptions

from tests.wire.harness import (
    ENHANCE_YOUR_CALM,
    INFER,
    LISTEN,
    NO_ERROR,
    OK,
    PREFACE,
    STREAM_INFER,
    UNAVAILABLE,
    ClosedError,
    Http2,
    Server,
    check_works,
    eventually,
    framed,
    infer_request,
    model_settings,
    pb,
    request_headers,
    values_of,
)

LAST_POSSIBLE = (1 << 31) - 1

# The server looks at its clocks once a second.
SOON_S = 4.0


def seconds_until_closed(client: Http2) -> float:
    """How long the server keeps the connection."""
    began_s = time.monotonic()
    client.read_to_end(SOON_S)
    return time.monotonic() - began_s


# ---- beginning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said", [b"", PREFACE[:10], PREFACE, PREFACE + b"\0\0\6\4\0"], ids=["nothing", "half", "preface", "start"]
)
def test_who_never_finishes_the_handshake_is_closed(
    serve: Callable[..., Server], connect: Callable[..., Http2], said: bytes
) -> None:
    server = serve(handshake_timeout_s=0.2)
    server.add()
    other = connect(server)
    check_works(other)
    silent = connect(server, preface=b"")
    silent.raw(said)
    assert 0.1 < seconds_until_closed(silent) < SOON_S
    assert server.count("handshake_closes") == 1
    check_works(other)


def test_who_never_finishes_a_header_block_is_closed(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(handshake_timeout_s=0.2)
    server.add()
    other = connect(server)
    for ending in (b"", b"\0\0\5\1\4\0\0\0\3ab"):
        client = connect(server)
        check_works(client)
        block = client.encoder.encode(request_headers())
        client.raw(ending if ending else HeadersFrame(3, block[:5]).serialize() + ending[5:])
        assert seconds_until_closed(client) < SOON_S
    check_works(other)


# ---- keepalive -------------------------------------------------------------------------------------------------------


def test_a_silent_client_is_asked_and_then_closed(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(keepalive_time_s=0.1, keepalive_timeout_s=0.1)
    server.add()
    silent = connect(server, answer_pings=False)
    silent.read_to_end(SOON_S)
    assert any(isinstance(frame, PingFrame) and "ACK" not in frame.flags for frame in silent.frames)
    assert server.count("keepalive_closes") == 1


def test_a_client_that_answers_pings_is_kept(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(keepalive_time_s=0.1, keepalive_timeout_s=1.5)
    server.add()
    client = connect(server)
    pings = 0
    while pings < 3:
        pings += isinstance(client.read_frame(), PingFrame)
    check_works(client)
    assert server.count("keepalive_closes") == 0


def test_too_many_pings_end_the_connection_with_enhance_your_calm(
    server: Server, connect: Callable[..., Http2]
) -> None:
    client = connect(server)
    for i in range(4):
        client.frame(PingFrame(0, opaque_data=bytes([i] * 8)))
    client.read_to_end()
    (goaway,) = client.goaways()[:1]
    assert goaway.error_code == ENHANCE_YOUR_CALM
    assert goaway.additional_data == b"too_many_pings"
    assert server.count("ping_closes") == 1


def test_pings_between_answers_are_no_strikes(client: Http2) -> None:
    for _ in range(20):
        for _ in range(3):
            client.frame(PingFrame(0, opaque_data=b"measure!"))
        check_works(client)
    client.sync()
    assert not client.goaways()


def test_the_keepalive_options_of_tritonclient_work(serve: Callable[..., Server]) -> None:
    server = serve()
    server.add()
    options = KeepAliveOptions(
        keepalive_time_ms=50,
        keepalive_timeout_ms=5000,
        keepalive_permit_without_calls=True,
        http2_max_pings_without_data=2,
    )
    with InferenceServerClient(f"127.0.0.1:{server.port}", keepalive_options=options) as client:
        for i in range(8):
            tensor = InferInput("X", [1, 4], "FP32")
            tensor.set_data_from_numpy(__import__("numpy").full((1, 4), i, "f4"))
            assert client.infer("echo", [tensor]).as_numpy("Y")[0][0] == i
            threading.Event().wait(0.12)  # idle for longer than the client's keepalive time
    assert server.count("ping_closes") == 0
    assert server.count("connections_accepted") == 1


# ---- age and idleness ------------------------------------------------------------------------------------------------


def test_an_idle_connection_is_told_to_go_and_a_busy_one_is_not(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_connection_idle_s=0.2)
    held = server.add(model_settings("held"), script="hold")
    busy = connect(server)
    stream_id = busy.call(infer_request("held"))
    idle = connect(server)
    idle.read_to_end(SOON_S)
    assert [(frame.last_stream_id, frame.error_code) for frame in idle.goaways()] == [(LAST_POSSIBLE, 0), (0, 0)]
    held.release(1)
    busy.reply(stream_id).expect(OK)


def test_an_old_connection_is_told_to_go_and_finishes_its_calls(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_connection_age_s=0.3, max_connection_age_grace_s=20.0)
    held = server.add(model_settings("held"), script="hold")
    client = connect(server)
    stream_id = client.call(infer_request("held"))
    while len(client.goaways()) < 2:
        client.read_frame()
    assert [(frame.last_stream_id, frame.error_code) for frame in client.goaways()] == [(LAST_POSSIBLE, 0), (1, 0)]
    held.release(1)
    client.reply(stream_id).expect(OK)
    client.read_to_end()


def test_an_old_connection_that_does_not_go_is_closed_after_the_grace(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_connection_age_s=0.2, max_connection_age_grace_s=1.0)
    server.add(model_settings("held"), script="hold")
    client = connect(server)
    client.call(infer_request("held"))
    client.read_to_end(SOON_S)
    assert client.goaways()


def test_nothing_is_lost_when_connections_grow_old_under_load(serve: Callable[..., Server]) -> None:
    server = serve(max_connection_age_s=0.1, max_connection_age_grace_s=10.0)
    server.add()
    lost, answered = load(server, clients=4, until=lambda: server.count("connections_accepted") >= 9)
    assert lost == []
    assert answered > 100
    assert server.count("calls") == answered


def load(server: Server, clients: int, until: Callable[[], bool]) -> tuple[list[str], int]:
    """Asks from several grpcio channels until a condition holds. Returns failures and the number of good answers."""
    stop = threading.Event()
    lost: list[str] = []
    answered = [0] * clients

    def ask(which: int) -> None:
        # Every channel its own connections, as separate clients have.
        with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.use_local_subchannel_pool", 1)]) as channel:
            infer = channel.unary_unary(INFER)
            while not stop.is_set():
                value = float(which * 1_000_000 + answered[which])
                try:
                    reply = infer(infer_request(values=[value] * 4).SerializeToString(), timeout=20)
                except grpc.RpcError as error:
                    lost.append(f"{error.code()}: {error.details()}")
                    return
                assert values_of(reply) == [value] * 4
                answered[which] += 1

    with ThreadPoolExecutor(clients) as pool:
        futures = [pool.submit(ask, which) for which in range(clients)]
        try:
            eventually(until, "the load has gone on long enough", 20)
        finally:
            stop.set()
        for future in futures:
            future.result()
    return lost, sum(answered)


# ---- drain -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def draining(server: Server, timeout_s: float = 20.0) -> contextlib.AbstractContextManager[Future[bool]]:
    """A drain on a thread of its own."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(server.frontend.drain, timeout_s)


def read_until_goaway(client: Http2) -> GoAwayFrame:
    while not isinstance(frame := client.read_frame(), GoAwayFrame):
        pass
    return frame


def test_a_drain_says_goaway_pings_says_goaway_and_finishes_what_is_under_way(
    server: Server, connect: Callable[..., Http2]
) -> None:
    held = server.add(model_settings("held"), script="hold")
    client = connect(server, answer_pings=False)
    first = client.call(infer_request("held", [1, 0, 0, 0]))
    client.sync()
    with draining(server) as done:
        assert read_until_goaway(client).last_stream_id == LAST_POSSIBLE
        while not isinstance(ping := client.read_frame(), PingFrame):
            pass
        # The client had already sent another call when it heard of the drain: it is served as well.
        second = client.call(infer_request("held", [2, 0, 0, 0]))
        client.frame(PingFrame(0, opaque_data=ping.opaque_data, flags=["ACK"]))
        last = read_until_goaway(client)
        assert (last.last_stream_id, last.error_code) == (second, NO_ERROR)
        # One that is sent after that is not: the client knows that it may try it elsewhere.
        third = client.call(infer_request("held", [3, 0, 0, 0]))
        held.release(100)
        assert values_of(client.reply(first).expect(OK).messages[0])[0] == 1
        assert values_of(client.reply(second).expect(OK).messages[0])[0] == 2
        client.read_to_end()
        assert done.result() is True
    assert client.replies[third].shape == []


def test_a_drained_server_takes_no_connections(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    check_works(client)
    with draining(server) as done:
        client.read_to_end()
        assert done.result() is True
    with pytest.raises(ConnectionRefusedError):
        Http2(server.port)


def test_a_client_that_does_not_answer_the_ping_gets_the_last_goaway_anyway(
    server: Server, connect: Callable[..., Http2]
) -> None:
    client = connect(server, answer_pings=False)
    check_works(client)
    with draining(server) as done:
        client.read_to_end(SOON_S)
        assert done.result() is True
    assert [frame.last_stream_id for frame in client.goaways()] == [LAST_POSSIBLE, 1]


def test_a_drain_ends_streams_that_only_listen(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    watch = client.open(LISTEN)
    client.data(watch, framed(b"service"))
    idle = client.open(STREAM_INFER)
    client.data(idle, framed(infer_request()))
    server.wait_event("message", LISTEN)
    while not client.replies[idle].data:
        client.read_frame()
    with draining(server) as done:
        client.read_to_end()
        assert done.result() is True
    client.replies[watch].expect(UNAVAILABLE, "shutting down")
    client.replies[idle].expect(UNAVAILABLE, "shutting down")
    server.wait_event("cancelled", LISTEN)


def test_a_drain_gives_up_at_its_timeout(server: Server, client: Http2) -> None:
    server.add(model_settings("held"), script="hold")
    client.call(infer_request("held"))
    client.sync()
    assert server.frontend.drain(0.05) is False


def test_a_connection_that_was_just_made_is_drained_too(serve: Callable[..., Server]) -> None:
    for _ in range(10):
        server = serve()
        server.add()
        with Http2(server.port) as client, draining(server) as done:
            stream_id = client.call(infer_request())
            # Either the listener was closed before it was seen, or the call is answered.
            with contextlib.suppress(ClosedError):
                client.reply(stream_id).expect(OK)
            client.read_to_end()
            assert done.result() is True
        server.close()


@pytest.mark.parametrize(
    "rounds",
    [pytest.param(range(3), id="three times"), pytest.param(range(200), id="200 times", marks=pytest.mark.slow)],
)
def test_no_call_is_lost_when_the_server_drains_under_load(serve: Callable[..., Server], rounds: range) -> None:
    """A call that the last GOAWAY does not exclude is answered."""
    for round_ in rounds:
        server = serve(io_threads=1 + round_ % 2)
        server.add(script="sleep:500")
        with ThreadPoolExecutor(4) as pool:
            asking = [pool.submit(ask_until_goaway, server, which) for which in range(4)]
            eventually(lambda server=server: server.count("calls") > 300, "there is load")
            assert server.frontend.drain(20) is True
            assert sum(future.result() for future in asking) > 200
        server.close()


def ask_until_goaway(server: Server, which: int) -> int:
    """Sends 16 calls at a time until the server wants to go. Returns how many were answered; fails when one is lost."""
    answered = 0
    with Http2(server.port) as client:
        while not client.goaways():
            values = [float(which * 1000 + i) for i in range(16)]
            streams = {client.call(infer_request(values=[value] * 4)): value for value in values}
            for stream_id, value in streams.items():
                while not client.replies[stream_id].over and not refused(client, stream_id):
                    client.read_frame()
                if client.replies[stream_id].over:
                    assert values_of(client.replies[stream_id].expect(OK).messages[0])[0] == value
                    answered += 1
    return answered


def refused(client: Http2, stream_id: int) -> bool:
    """Whether the server has said that it never took this stream."""
    return any(frame.last_stream_id < stream_id for frame in client.goaways())


def test_no_call_of_grpcio_is_lost_when_the_server_drains(serve: Callable[..., Server]) -> None:
    """Without a place to go on, grpcio fails new calls UNAVAILABLE; the ones that were sent must all be answered."""
    server = serve()
    held = server.add(script="hold")
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", [("grpc.enable_retries", 0)]) as channel:
        infer = channel.unary_unary(INFER)
        calls = [infer.future(infer_request(values=[i] * 4).SerializeToString(), timeout=20) for i in range(200)]
        eventually(lambda: server.count("calls_open") == 200, "all have been sent")
        with draining(server) as done:
            held.release(1000)
            assert [values_of(call.result())[0] for call in calls] == list(range(200))
            assert done.result() is True


def test_frames_of_a_drain_come_in_order(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    check_works(client)
    with draining(server) as done:
        client.read_to_end()
        assert done.result()

    def kind(frame: Frame) -> str:
        return type(frame).__name__.removesuffix("Frame")

    kinds = [kind(frame) for frame in client.frames if kind(frame) in ("GoAway", "Ping")]
    assert kinds == ["GoAway", "Ping", "GoAway"]


def test_a_stop_without_a_drain_closes_everything_at_once(server: Server, connect: Callable[..., Http2]) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    client = connect(server)
    for _ in range(5):
        client.call(infer_request("held"))
    held.wait_waiting(4)
    held.release(1)
    server.close()
    client.read_to_end()


def test_answers_are_what_they_are_even_to_a_closing_client(server: Server, connect: Callable[..., Http2]) -> None:
    assert isinstance(pb.ModelInferResponse(), object)
    client = connect(server)
    stream_id = client.call(infer_request())
    client.frame(GoAwayFrame(0))
    client.reply(stream_id).expect(OK)
