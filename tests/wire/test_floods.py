"""Attacks, each bounded: the attacker is stopped or ignored, memory stays, and a neighbour goes on being answered."""

from __future__ import annotations

import contextlib
import resource
import socket
import struct
import time
from collections.abc import Callable, Iterator

import psutil
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.wire.harness import (
    CANCEL,
    COMPRESSION_ERROR,
    DEADLINE_EXCEEDED,
    ECHO,
    ENHANCE_YOUR_CALM,
    LISTEN,
    OK,
    PREFACE,
    RESOURCE_EXHAUSTED,
    SETTING_WINDOW,
    STREAM_INFER,
    ClosedError,
    Http2,
    Server,
    blob_request,
    bytes_model,
    check_works,
    eventually,
    framed,
    healthy_neighbour,
    infer_request,
    model_settings,
    request_headers,
    values_of,
)

MIB = 1 << 20


@contextlib.contextmanager
def memory_stays(within_mib: int) -> Iterator[None]:
    """The process's resident memory grows by no more than that."""
    process = psutil.Process()
    before = process.memory_info().rss
    yield
    grown = process.memory_info().rss - before
    assert grown < within_mib * MIB, f"{grown / MIB:.1f} MiB more"


def flood(client: Http2, data: bytes, times: int) -> bool:
    """Sends `data` again and again without reading. True: the server closed or would take no more."""
    client.socket.settimeout(0.3)
    try:
        for _ in range(times):
            client.socket.sendall(data)
    except OSError:
        return True
    return False


def how_it_ended(client: Http2) -> tuple[int, bytes]:
    """Error code and text of the first GOAWAY with an error. Fails when the server keeps the connection."""
    with contextlib.suppress(ConnectionError):
        client.read_to_end()
    return next((frame.error_code, frame.additional_data) for frame in client.goaways() if frame.error_code)


def is_answered(neighbour: Callable[[], int]) -> None:
    """The neighbour gets answers now."""
    before = neighbour()
    eventually(lambda: neighbour() > before + 5, "the neighbour is answered")


# ---- frames that do nothing ------------------------------------------------------------------------------------------


def test_useless_frames_are_ignored_up_to_a_limit_and_then_end_the_connection(
    server: Server, connect: Callable[..., Http2]
) -> None:
    useless = {
        "priority": PriorityFrame(1, depends_on=3, stream_weight=9).serialize(),
        "unknown": b"\0\0\4\xee\0\0\0\0\0abcd",
        "unknown on a stream": b"\0\0\0\xee\0\0\0\0\1",
    }
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        for name, frame in useless.items():
            client = connect(server)
            flood(client, frame * 1000, 5)
            check_works(client)
            flood(client, frame * 1000, 20)
            assert how_it_ended(client) == (ENHANCE_YOUR_CALM, b"too many frames without effect"), name
        is_answered(neighbour)
    assert server.count("glitch_closes") == len(useless)


def test_empty_data_frames_end_the_connection(server: Server, connect: Callable[..., Http2]) -> None:
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        client = connect(server)
        stream_id = client.open()
        flood(client, (b"\0\0\0\0\0" + struct.pack(">I", stream_id)) * 1000, 20)
        assert how_it_ended(client)[0] == ENHANCE_YOUR_CALM
        is_answered(neighbour)


def test_a_settings_flood_is_stopped_also_when_nobody_reads(server: Server, connect: Callable[..., Http2]) -> None:
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        client = connect(server, receive_buffer=4096)
        flood(client, SettingsFrame(0, settings={SETTING_WINDOW: 70000}).serialize() * 1000, 200)
        is_answered(neighbour)
        with contextlib.suppress(ConnectionError):
            client.read_to_end()
        assert client.closed


def test_a_ping_flood_is_stopped_also_when_nobody_reads(server: Server, connect: Callable[..., Http2]) -> None:
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        client = connect(server, receive_buffer=4096)
        flood(client, PingFrame(0, opaque_data=b"flooding").serialize() * 1000, 200)
        is_answered(neighbour)
        assert how_it_ended(client) == (ENHANCE_YOUR_CALM, b"too_many_pings")


def test_window_updates_are_harmless(server: Server, connect: Callable[..., Http2]) -> None:
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        client = connect(server, window=0)
        flood(client, WindowUpdateFrame(0, window_increment=1).serialize() * 1000, 200)
        check_works(client)
        is_answered(neighbour)


# ---- headers ---------------------------------------------------------------------------------------------------------


def test_a_continuation_flood_ends_the_connection(server: Server, connect: Callable[..., Http2]) -> None:
    for piece in (b"", b"\x82"):
        with healthy_neighbour(server) as neighbour, memory_stays(32):
            client = connect(server)
            client.frame(HeadersFrame(1, b"\x83"))
            flood(client, ContinuationFrame(1, piece).serialize() * 1000, 200)
            with contextlib.suppress(ConnectionError):
                client.read_to_end()
            assert client.closed
            is_answered(neighbour)


def test_a_small_block_that_stands_for_many_headers_is_refused(server: Server, connect: Callable[..., Http2]) -> None:
    """One entry of nearly 4 KiB in the table, named 12,000 times: 47 MB of headers in 16 KB."""
    length = 3900 - 127
    entry = b"\x40\x01x\x7f" + bytes([length & 0x7F | 0x80, length >> 7]) + b"v" * 3900
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        for _ in range(5):
            client = connect(server)
            block = client.encoder.encode(request_headers()) + entry + b"\xbe" * 12_000
            client.frame(HeadersFrame(1, block, flags=["END_HEADERS"]))
            client.reply(1).expect(RESOURCE_EXHAUSTED)
        is_answered(neighbour)


def test_a_literal_that_claims_4_gib_ends_the_connection(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    with memory_stays(16):
        client.frame(HeadersFrame(1, b"\x00\x7f\x80\xff\xff\xff\x0f" + b"n" * 100, flags=["END_HEADERS"]))
        assert how_it_ended(client)[0] == COMPRESSION_ERROR


def test_refused_headers_by_the_thousand_cost_nobody_anything(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    big = [*request_headers(), ("x-big", "v" * 17000)]
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        for _ in range(300):
            stream_id = client.new_stream()
            block = client.encoder.encode(big, huffman=False)
            client.frame(HeadersFrame(stream_id, block, flags=["END_HEADERS", "END_STREAM"]))
            client.reply(stream_id).expect(RESOURCE_EXHAUSTED)
        is_answered(neighbour)
        check_works(client)


# ---- resets ----------------------------------------------------------------------------------------------------------


def reset_storm(client: Http2, body: bytes, count: int) -> bytes:
    """Calls that are reset at once."""
    storm = b""
    for _ in range(count):
        stream_id = client.new_stream()
        storm += client.headers_frame(stream_id, request_headers()).serialize()
        storm += client.data_frame(stream_id, body, end=True).serialize()
        storm += RstStreamFrame(stream_id, error_code=CANCEL).serialize()
    return storm


def test_rapid_reset_runs_nothing_and_ends_at_a_rate_no_client_needs(
    server: Server, connect: Callable[..., Http2]
) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    body = framed(infer_request("held"))
    attacker = connect(server)
    attacker.call(infer_request("held"))
    eventually(lambda: held.queue_view()["running_rows"] == 1, "the instance is busy")
    storm = [reset_storm(attacker, body, 1000) for _ in range(60)]
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        is_answered(neighbour)
        began_s = time.monotonic()
        for part in storm:
            flood(attacker, part, 1)
        is_answered(neighbour)
        # What a second's 10,000 and the first 20,000 do not cover. A machine too slow for that has seen no storm.
        if time.monotonic() - began_s < 2.0:
            with contextlib.suppress(ConnectionError):
                attacker.read_to_end()
            assert attacker.closed
    held.wait_waiting(0)
    held.release(100_000)
    server.retire("held", "1")
    assert held.statistics().execution_count == 1


def test_errors_that_we_are_provoked_to_answer_are_bounded(server: Server, connect: Callable[..., Http2]) -> None:
    """A stream error that the peer provokes makes us reset the stream while its work goes on: not for ever."""
    client = connect(server)
    overflow = (1 << 31) - 1
    with healthy_neighbour(server) as neighbour, memory_stays(32), contextlib.suppress(ConnectionError, ClosedError):
        for _ in range(300):
            stream_id = client.call(infer_request())
            client.frame(WindowUpdateFrame(stream_id, window_increment=overflow))
            stream_id = client.open()
            client.frame(WindowUpdateFrame(stream_id, window_increment=overflow))
            client.sync()
    assert how_it_ended(client) == (ENHANCE_YOUR_CALM, b"too many stream errors")
    assert server.count("calls") < 600 + 100_000
    del neighbour


# ---- slow readers ----------------------------------------------------------------------------------------------------


def test_answers_that_nobody_reads_are_bounded_and_do_not_lock_others_out(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    """Stream windows of zero: the answers stay with us. Their bytes come back within a second or two."""
    server = serve(max_inflight_bytes=32 * MIB, stall_timeout_s=30.0)
    server.add()
    server.add(bytes_model())
    with memory_stays(160):
        attackers = [connect(server, settings={SETTING_WINDOW: 0}) for _ in range(10)]
        refused = 0
        with contextlib.suppress(ClosedError, ConnectionError):  # on a slow machine they are given up meanwhile
            for attacker in attackers:
                streams = [attacker.call(blob_request(bytes(MIB))) for _ in range(8)]
                attacker.sync()
                refused += sum(attacker.replies[stream_id].over for stream_id in streams)
            assert refused > 0  # the budget is used up
        with Http2(server.port) as healthy:
            began_s = time.monotonic()
            eventually(lambda: healthy.infer(infer_request()).status == OK, "a healthy client is answered again")
            assert time.monotonic() - began_s < 4.0
            eventually(lambda: server.count("inflight_bytes") < 24 * MIB, "the bytes come back")
            check_works(healthy)
    assert server.count("stall_resets") + server.count("stall_closes") > 0


def test_a_peer_that_reads_nothing_is_closed_and_its_answers_are_freed(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(stall_timeout_s=0.3)
    server.add()
    server.add(bytes_model())
    with healthy_neighbour(server) as neighbour, memory_stays(96):
        # More than the kernel takes in our place.
        deaf = [connect(server, receive_buffer=4096, handshake=False) for _ in range(2)]
        body = framed(blob_request(bytes(60_000)))
        for client in deaf:
            frames = []
            for _ in range(150):
                stream_id = client.new_stream()
                frames.append(client.headers_frame(stream_id, request_headers()).serialize())
                frames += [
                    client.data_frame(stream_id, body[i : i + 16384]).serialize() for i in range(0, len(body), 16384)
                ]
                frames.append(client.data_frame(stream_id, b"", end=True).serialize())
            flood(client, b"".join(frames), 1)
        eventually(lambda: server.count("connections_open") == 1, "the deaf are closed")
        is_answered(neighbour)
    assert server.count("stall_closes") == 2


def test_one_stalled_stream_costs_the_others_of_its_connection_nothing(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(stall_timeout_s=0.2)
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    server.add()
    client = connect(server, settings={SETTING_WINDOW: 0})
    waiting = client.call(infer_request("held", [5, 0, 0, 0]))
    stalled = client.call(infer_request())
    assert client.reply(stalled).reset == CANCEL
    assert server.count("stall_resets") == 1
    held.release(1)
    client.frame(WindowUpdateFrame(waiting, window_increment=1000))
    assert values_of(client.reply(waiting).expect(OK).messages[0])[0] == 5


def test_a_slow_reader_that_gets_on_is_served(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(stall_timeout_s=0.4)
    server.add(bytes_model())
    client = connect(server, settings={SETTING_WINDOW: 1000})
    stream_id = client.call(blob_request(bytes(16_000)))
    reply = client.replies[stream_id]
    granted = 1000
    while not reply.over:
        while len(reply.data) < min(granted, 16_000):
            client.read_frame()
        time.sleep(0.05)  # slower than anybody, and yet in time: a second for what takes the server nothing
        client.frame(WindowUpdateFrame(stream_id, window_increment=1000))
        granted += 1000
        if granted > 17_000:
            client.read_frame()
    reply.expect(OK)


# ---- slow writers ----------------------------------------------------------------------------------------------------


def test_requests_that_do_not_come_are_given_up(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(stall_timeout_s=0.3)
    server.add()
    client = connect(server)
    began = struct.pack(">BI", 0, MIB) + b"x"
    streams = [client.open(path) for path in (*["/inference.GRPCInferenceService/ModelInfer"] * 50, STREAM_INFER, ECHO)]
    with healthy_neighbour(server) as neighbour:
        for stream_id in streams:
            client.data(stream_id, began)
        for stream_id in streams:
            client.reply(stream_id).expect(DEADLINE_EXCEEDED, "too slowly")
        is_answered(neighbour)
    assert server.count("stall_resets") == len(streams)
    check_works(client)


def test_a_large_start_does_not_buy_the_right_to_stop(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(stall_timeout_s=0.3)
    server.add(bytes_model())
    client = connect(server)
    stream_id = client.open()
    client.upload(stream_id, framed(blob_request(bytes(4 * MIB)))[:-1])
    client.reply(stream_id).expect(DEADLINE_EXCEEDED, "too slowly")


def test_a_slow_writer_that_gets_on_is_served(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(stall_timeout_s=0.3)
    server.add(bytes_model())
    client = connect(server)
    stream_id = client.open()
    body = framed(blob_request(bytes(20_000)))
    for i in range(0, len(body), 2_000):
        client.data(stream_id, body[i : i + 2_000])
        time.sleep(0.08)  # in all longer than the timeout, at some 20 KiB/s
    client.data(stream_id, b"", end=True)
    client.reply(stream_id).expect(OK)


def test_idle_streams_are_no_slow_writers(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(stall_timeout_s=0.05)
    server.add()
    client = connect(server)
    idle = [client.open(STREAM_INFER), client.open(LISTEN)]
    for stream_id in idle:
        client.data(stream_id, framed(infer_request()))
    slow = client.open()
    client.data(slow, b"\0\0")
    client.reply(slow).expect(DEADLINE_EXCEEDED)  # long enough for the others, if they were taken for slow
    assert not any(client.replies[stream_id].over for stream_id in idle)


def test_bytes_that_are_hoarded_come_back_when_others_need_them(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    """Half-sent requests that hold the whole budget are given up after a second, not after the full timeout."""
    server = serve(max_inflight_bytes=16 * MIB, stall_timeout_s=60.0)
    server.add()
    hoarder = connect(server)
    for _ in range(20):
        stream_id = hoarder.open()
        hoarder.upload(stream_id, framed(bytes(MIB))[:-1])
    with Http2(server.port) as healthy:
        began_s = time.monotonic()
        eventually(lambda: healthy.infer(infer_request()).status == OK, "a healthy client is answered again")
        assert time.monotonic() - began_s < 5.0


# ---- connections -----------------------------------------------------------------------------------------------------


def test_half_requests_by_the_hundred_leave_nothing(server: Server) -> None:
    body = framed(infer_request())
    with healthy_neighbour(server) as neighbour, memory_stays(32):
        for i in range(200):
            client = Http2(server.port, handshake=False)
            stream_id = client.open([STREAM_INFER, "/inference.GRPCInferenceService/ModelInfer", ECHO][i % 3])
            client.data(stream_id, body[: i % len(body)])
            client.close(reset=i % 2 == 0)
        is_answered(neighbour)
    eventually(lambda: server.count("connections_open") == 0, "all are gone")
    assert server.count("connections_accepted") == 201


def test_silent_connections_shut_nobody_out(serve: Callable[..., Server]) -> None:
    server = serve(handshake_timeout_s=0.4)
    server.add()
    with contextlib.ExitStack() as stack, healthy_neighbour(server) as neighbour, memory_stays(32):
        for i in range(300):
            silent = stack.enter_context(socket.create_connection(("127.0.0.1", server.port)))
            silent.sendall(PREFACE[: i % len(PREFACE)])
        is_answered(neighbour)
        eventually(lambda: server.count("handshake_closes") == 300, "the silent are closed")
        is_answered(neighbour)


def test_without_file_descriptors_connections_are_refused_and_the_loop_does_not_spin(server: Server) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    callers = [socket.socket() for _ in range(60)]
    with Http2(server.port) as inside:
        check_works(inside)
        probe = socket.socket()
        resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno() + 20, hard))
        probe.close()
        try:
            for caller in callers:
                caller.settimeout(5)
                caller.connect(("127.0.0.1", server.port))
            server.wait_for("connections_refused", 30)
            check_works(inside)
            began_s = time.process_time()
            time.sleep(0.1)  # a loop that spins would spend all of it
            assert time.process_time() - began_s < 0.06
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for caller in callers:
                caller.close()
        assert server.count("accept_errors") >= 30
        check_works(inside)
    with Http2(server.port) as client:
        check_works(client)


def test_slow_calls_by_the_thousand_are_bounded(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    """Streams that Python would answer, opened and reset while it is busy: what waits for it has an end."""
    server = serve()
    server.add()
    release = server.block_general_lane()
    client = connect(server)
    with healthy_neighbour(server) as neighbour, memory_stays(48):
        for _ in range(100):
            frames = b""
            for _ in range(100):
                stream_id = client.new_stream()
                frames += client.headers_frame(stream_id, request_headers(LISTEN)).serialize()
                frames += client.data_frame(stream_id, framed(b"watch"), end=True).serialize()
                frames += RstStreamFrame(stream_id, error_code=CANCEL).serialize()
            client.raw(frames)
            client.sync()
        is_answered(neighbour)
        release.set()
        server.calls.clear()
    check_works(client)
    client.infer(b"last", ECHO).expect(OK)
    events = sum(method == LISTEN for _, method, _ in server.events)
    assert events <= 3 * 4096 + 2000


@pytest.mark.slow
def test_a_long_rapid_reset_keeps_the_others_fast(server: Server) -> None:
    """Attackers that come back at once, for some seconds."""
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    body = framed(infer_request("held"))
    with healthy_neighbour(server) as neighbour, memory_stays(48):
        began_s = time.monotonic()
        before = neighbour()
        while time.monotonic() - began_s < 10:
            with Http2(server.port) as attacker:
                for _ in range(40):
                    if attacker.goaways() or flood(attacker, reset_storm(attacker, body, 1000), 1):
                        break
        assert neighbour() - before > 200
    held.release(1_000_000)
    server.retire("held", "1")
    assert held.statistics().execution_count <= 20


@pytest.mark.slow
def test_millions_of_useless_frames_are_refused_quickly(server: Server) -> None:
    frame = b"\0\0\0\xee\0\0\0\0\0" * 10_000
    with healthy_neighbour(server) as neighbour, memory_stays(48):
        for _ in range(100):
            with Http2(server.port) as attacker:
                flood(attacker, frame, 10)
                assert how_it_ended(attacker)[0] == ENHANCE_YOUR_CALM
        is_answered(neighbour)
    assert server.count("glitch_closes") == 100
