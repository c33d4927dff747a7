"""HTTP/2 as such: windows, settings, limits, and peers that speak something else."""

from __future__ import annotations

import socket
import ssl
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from hyperframe.frame import (
    ContinuationFrame,
    Frame,
    GoAwayFrame,
    HeadersFrame,
    PingFrame,
    PriorityFrame,
    PushPromiseFrame,
    RstStreamFrame,
    SettingsFrame,
    WindowUpdateFrame,
)

from tests.wire.harness import (
    COMPRESSION_ERROR,
    FLOW_CONTROL_ERROR,
    FRAME_SIZE_ERROR,
    INFER,
    NO_ERROR,
    OK,
    PREFACE,
    PROTOCOL_ERROR,
    REFUSED_STREAM,
    SETTING_FRAME_SIZE,
    SETTING_HEADER_LIST,
    SETTING_MAX_STREAMS,
    SETTING_TABLE_SIZE,
    SETTING_WINDOW,
    STREAM_CLOSED,
    Http2,
    Server,
    blob_request,
    bytes_model,
    check_works,
    eventually,
    framed,
    infer_request,
    model_settings,
    pb,
    request_headers,
    values_of,
)


def test_the_server_says_its_limits(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    client = connect(serve(max_streams=7))
    client.sync()
    assert client.server_settings[SETTING_MAX_STREAMS] == 7
    assert client.server_settings[SETTING_HEADER_LIST] == 16384
    assert client.server_settings[SETTING_WINDOW] == 1 << 20


def test_a_ping_is_answered_with_its_own_bytes(client: Http2) -> None:
    client.frame(PingFrame(0, opaque_data=b"12345678"))
    while not isinstance(frame := client.read_frame(), PingFrame):
        pass
    assert frame.opaque_data == b"12345678"
    assert "ACK" in frame.flags


# ---- windows ---------------------------------------------------------------------------------------------------------


def test_an_answer_fits_through_a_window_of_one_byte(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server, settings={SETTING_WINDOW: 1})
    stream_id = client.call(infer_request(values=[1, 2, 3, 4]))
    reply = client.replies[stream_id]
    while not reply.over:
        before = len(reply.data)
        frame = client.read_frame()
        if type(frame).__name__ == "DataFrame":
            assert len(reply.data) - before == 1
            client.frame(WindowUpdateFrame(stream_id, window_increment=1))
    assert values_of(reply.expect(OK).messages[0]) == [1, 2, 3, 4]


def test_a_closed_window_holds_one_answer_and_no_other(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server, settings={SETTING_WINDOW: 0})
    stuck = client.call(infer_request(values=[1, 0, 0, 0]))
    client.frame(SettingsFrame(0, settings={SETTING_WINDOW: 0}))
    free = client.call(infer_request(values=[2, 0, 0, 0]))
    client.frame(WindowUpdateFrame(free, window_increment=10_000))
    assert values_of(client.reply(free).expect(OK).messages[0])[0] == 2
    assert client.replies[stuck].shape == ["HEADERS"]
    client.frame(SettingsFrame(0, settings={SETTING_WINDOW: 65535}))
    assert values_of(client.reply(stuck).expect(OK).messages[0])[0] == 1


def test_a_window_may_become_negative_and_recover(server: Server, connect: Callable[..., Http2]) -> None:
    server.add(bytes_model())
    client = connect(server, settings={SETTING_WINDOW: 60_000}, window=0)
    stream_id = client.call(blob_request(b"\x05" * 100_000))
    while len(client.replies[stream_id].data) < 60_000:
        client.read_frame()
    client.frame(SettingsFrame(0, settings={SETTING_WINDOW: 0}))  # the stream's window is now -60,000
    client.frame(WindowUpdateFrame(0, window_increment=1 << 20))
    client.frame(WindowUpdateFrame(stream_id, window_increment=60_000))  # 0
    client.sync()
    assert len(client.replies[stream_id].data) == 60_000
    client.frame(WindowUpdateFrame(stream_id, window_increment=1 << 20))
    reply = client.reply(stream_id).expect(OK)
    assert pb.ModelInferResponse.FromString(reply.messages[0]).raw_output_contents[0] == b"\x05" * 100_000


def test_a_connection_window_that_overflows_ends_the_connection(client: Http2) -> None:
    client.frame(WindowUpdateFrame(0, window_increment=(1 << 31) - 1))
    client.read_to_end()
    assert client.goaways()[-1].error_code == FLOW_CONTROL_ERROR


def test_a_stream_window_that_overflows_ends_the_stream(server: Server, client: Http2) -> None:
    stream_id = client.open()
    client.frame(WindowUpdateFrame(stream_id, window_increment=(1 << 31) - 1))
    assert client.reply(stream_id).reset == FLOW_CONTROL_ERROR
    check_works(client)


def test_a_window_update_of_zero_ends_the_connection(client: Http2) -> None:
    stream_id = client.open()
    client.raw(b"\0\0\4\x08\0" + struct.pack(">II", stream_id, 0))
    client.read_to_end()
    assert client.goaways()[-1].error_code == PROTOCOL_ERROR


def test_a_setting_of_a_window_above_2_31_ends_the_connection(client: Http2) -> None:
    client.raw(b"\0\0\6\4\0\0\0\0\0" + struct.pack(">HI", SETTING_WINDOW, 1 << 31))
    client.read_to_end()
    assert client.goaways()[-1].error_code == FLOW_CONTROL_ERROR


def test_what_a_refused_stream_still_sends_gives_the_window_back(server: Server, connect: Callable[..., Http2]) -> None:
    """32 MiB after the answer, with a window of 16 MiB: none of it may be lost for the connection."""
    client = connect(server)
    stream_id = client.open("/no.Such/Method")
    client.reply(stream_id)
    for _ in range(32):
        client.data(stream_id, bytes(1 << 20))
        client.sync()
    check_works(client)


def test_sending_beyond_our_window_is_a_flow_control_error(server: Server, connect: Callable[..., Http2]) -> None:
    server.add(bytes_model())
    client = connect(server)
    stream_id = client.open()
    # In one frame after the other without a pause for our updates; the window is 1 MiB and a read at most 256 KiB.
    body = framed(blob_request(bytes(3 << 20)))
    client.raw(
        b"".join(client.data_frame(stream_id, body[i : i + 16384]).serialize() for i in range(0, len(body), 16384))
    )
    client.data(stream_id, b"", end=True)
    reply = client.reply(stream_id)
    # Fast enough a server gives the window back in time; otherwise the peer is told that it broke the rule.
    assert reply.reset == FLOW_CONTROL_ERROR or reply.status == OK
    check_works(client)


# ---- settings and frames ---------------------------------------------------------------------------------------------


def test_settings_may_change_at_any_time(client: Http2) -> None:
    for settings in (
        {SETTING_TABLE_SIZE: 0},
        {SETTING_FRAME_SIZE: 16384},
        {SETTING_FRAME_SIZE: (1 << 24) - 1},
        {SETTING_TABLE_SIZE: 4096, SETTING_MAX_STREAMS: 0},
        {SETTING_HEADER_LIST: 1 << 20},
        {0xFE03: 1, 0x9999: 2**32 - 1},
        {},
    ):
        client.frame(SettingsFrame(0, settings=settings))
        check_works(client)


def test_small_frames_are_kept_to(server: Server, connect: Callable[..., Http2]) -> None:
    server.add(bytes_model())
    client = connect(server)
    client.infer(blob_request(bytes(200_000))).expect(OK)
    assert max(frame.body_len for frame in client.frames) <= 16384


@pytest.mark.parametrize(
    ("settings", "code"),
    [
        (struct.pack(">HI", SETTING_FRAME_SIZE, 16383), PROTOCOL_ERROR),
        (struct.pack(">HI", SETTING_FRAME_SIZE, 1 << 24), PROTOCOL_ERROR),
        (struct.pack(">HI", 2, 2), PROTOCOL_ERROR),
        (b"12345", FRAME_SIZE_ERROR),
    ],
)
def test_wrong_settings_end_the_connection(client: Http2, settings: bytes, code: int) -> None:
    client.raw(len(settings).to_bytes(3) + b"\4\0\0\0\0\0" + settings)
    client.read_to_end()
    assert client.goaways()[-1].error_code == code


def test_unknown_frames_flags_and_reserved_bits_are_ignored(client: Http2) -> None:
    client.raw(b"\0\0\5\xbb\xff" + struct.pack(">I", 0) + b"12345")
    client.raw(b"\0\0\5\xbb\xff" + struct.pack(">I", (1 << 31) | 99) + b"12345")
    client.frame(PriorityFrame(1, depends_on=0, stream_weight=15))
    stream_id = client.open()
    client.raw(b"\0\0\0\xbb\0" + struct.pack(">I", stream_id))
    body = framed(infer_request(values=[4, 3, 2, 1]))
    # DATA with the reserved bit of its stream id and every undefined flag set.
    client.raw(
        len(body).to_bytes(3) + b"\0" + bytes([0x01 | 0xF6 & ~0x08]) + struct.pack(">I", stream_id | 1 << 31) + body
    )
    assert values_of(client.reply(stream_id).expect(OK).messages[0]) == [4, 3, 2, 1]


def test_headers_in_many_continuations_are_one_block(client: Http2) -> None:
    stream_id = client.new_stream()
    block = client.encoder.encode(request_headers())
    frames: list[Frame] = [HeadersFrame(stream_id, block[:1])]
    step = len(block) // 5 + 1
    frames += [ContinuationFrame(stream_id, block[i : i + step]) for i in range(1, len(block), step)]
    frames[-1].flags.add("END_HEADERS")
    client.frame(*frames, client.data_frame(stream_id, framed(infer_request()), end=True))
    client.reply(stream_id).expect(OK)


def wrong_frames() -> dict[str, tuple[Callable[[Http2], bytes], int]]:
    """Frames that break the connection, with the error code that is due."""

    def unfinished(client: Http2) -> bytes:
        return client.headers_frame(1, request_headers(), end_headers=False).serialize()

    return {
        "data on stream 0": (lambda c: b"\0\0\1\0\0\0\0\0\0x", PROTOCOL_ERROR),
        "headers on stream 0": (lambda c: b"\0\0\1\1\4\0\0\0\0\x82", PROTOCOL_ERROR),
        "an even stream": (lambda c: c.headers_frame(2, request_headers()).serialize(), PROTOCOL_ERROR),
        "data on an idle stream": (lambda c: c.data_frame(9, b"x").serialize(), PROTOCOL_ERROR),
        "a reset of an idle stream": (lambda c: RstStreamFrame(9).serialize(), PROTOCOL_ERROR),
        "a lone continuation": (lambda c: ContinuationFrame(1, b"\x82").serialize(), PROTOCOL_ERROR),
        "data between headers": (lambda c: unfinished(c) + c.data_frame(1, b"x").serialize(), PROTOCOL_ERROR),
        "a ping between headers": (lambda c: unfinished(c) + PingFrame(0).serialize(), PROTOCOL_ERROR),
        "a push from a client": (
            lambda c: (
                c.headers_frame(1, request_headers()).serialize()
                + PushPromiseFrame(1, promised_stream_id=2, data=b"\x82", flags=["END_HEADERS"]).serialize()
            ),
            PROTOCOL_ERROR,
        ),
        "a header block that cannot be read": (
            lambda c: HeadersFrame(1, b"\xff" * 20, flags=["END_HEADERS"]).serialize(),
            COMPRESSION_ERROR,
        ),
        "an index beyond the table": (
            lambda c: HeadersFrame(1, b"\xbe", flags=["END_HEADERS"]).serialize(),
            COMPRESSION_ERROR,
        ),
        "padding longer than the frame": (lambda c: b"\0\0\2\0\x08\0\0\0\1\xffx", PROTOCOL_ERROR),
        "a ping of seven bytes": (lambda c: b"\0\0\7\6\0\0\0\0\0" + b"1234567", FRAME_SIZE_ERROR),
        "a frame that is too large": (lambda c: b"\xff\xff\xff\0\0\0\0\0\1", FRAME_SIZE_ERROR),
        "settings on a stream": (lambda c: b"\0\0\0\4\0\0\0\0\1", PROTOCOL_ERROR),
    }


@pytest.mark.parametrize("wrong", wrong_frames())
def test_a_broken_connection_says_goaway_and_harms_nobody_else(
    server: Server, connect: Callable[..., Http2], wrong: str
) -> None:
    other = connect(server)
    client = connect(server)
    make, code = wrong_frames()[wrong]
    client.raw(make(client))
    client.read_to_end()
    assert client.goaways()[-1].error_code == code
    check_works(other)


def test_headers_on_an_old_stream_do_nothing(client: Http2) -> None:
    client.infer(infer_request()).expect(OK)
    shape = list(client.replies[1].shape)
    client.frame(client.headers_frame(1, request_headers()))
    client.sync()
    assert client.replies[1].shape == shape
    check_works(client)


def test_data_after_the_end_ends_the_connection_and_its_work(server: Server, connect: Callable[..., Http2]) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    client = connect(server)
    client.call(infer_request("held"))
    stream_id = client.call(infer_request("held"))
    held.wait_waiting(1)
    client.data(stream_id, b"more")
    client.read_to_end()
    assert client.goaways()[-1].error_code == STREAM_CLOSED
    held.wait_waiting(0)
    held.release(1)


# ---- limits ----------------------------------------------------------------------------------------------------------


def test_streams_above_the_limit_are_refused_and_the_others_live(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_streams=10)
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    client = connect(server, handshake=False)
    # All in one write, before the client has seen the limit: the lawful way to be over it.
    frames = b""
    streams = []
    for _ in range(15):
        stream_id = client.new_stream()
        streams.append(stream_id)
        frames += client.headers_frame(stream_id, request_headers()).serialize()
        frames += client.data_frame(stream_id, framed(infer_request("held")), end=True).serialize()
    client.raw(frames)
    for stream_id in streams[10:]:
        assert client.reply(stream_id).reset == REFUSED_STREAM
    held.release(100)
    for stream_id in streams[:10]:
        client.reply(stream_id).expect(OK)
    held.release(1)
    client.infer(infer_request("held")).expect(OK)


def test_who_knows_the_limit_of_streams_and_breaks_it_loses_the_connection(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_streams=3)
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    client = connect(server)
    for _ in range(4):
        client.call(infer_request("held"))
    client.read_to_end()
    assert client.goaways()[-1].error_code == PROTOCOL_ERROR
    held.wait_waiting(0)
    held.release(1)


def test_the_last_stream_id_of_all_is_served(client: Http2) -> None:
    client.next_id = (1 << 31) - 1
    client.infer(infer_request()).expect(OK)


def test_a_thousand_large_calls_on_one_channel_all_succeed(serve: Callable[..., Server]) -> None:
    server = serve(max_streams=100)
    server.add(bytes_model())
    payload = blob_request(bytes(100_000)).SerializeToString()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        infer = channel.unary_unary(INFER)
        calls = [infer.future(payload, timeout=30) for _ in range(1000)]
        assert all(len(call.result()) > 100_000 for call in calls)


def test_connections_above_the_limit_are_closed_and_the_others_live(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_connections=3)
    server.add()
    inside = [connect(server) for _ in range(3)]
    for client in inside:
        check_works(client)
    with socket.create_connection(("127.0.0.1", server.port)) as outside:
        outside.settimeout(10)
        assert outside.recv(1) == b""
    assert server.count("connections_refused") == 1
    inside.pop().close()
    eventually(lambda: server.count("connections_open") == 2, "one has gone")
    check_works(connect(server))
    for client in inside:
        check_works(client)


# ---- not HTTP/2 ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "first",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"POST /v2/models/echo/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: 5\r\n\r\nhello",
        b"GET / HTTP/1.1\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABk\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200),
        bytes(4096),
        b"\xff" * 100,
        PREFACE[:-1] + b"X",
        b"PRI * HTTP/1.1\r\n\r\nSM\r\n\r\n",
        PREFACE + b"\0\0\4\x08\0\0\0\0\0\0\0\0\1",
    ],
    ids=["get", "post", "upgrade", "tls", "zeros", "ones", "last byte", "version", "no settings"],
)
def test_whatever_is_not_http2_is_closed(server: Server, connect: Callable[..., Http2], first: bytes) -> None:
    other = connect(server)
    with socket.create_connection(("127.0.0.1", server.port)) as stranger:
        stranger.settimeout(10)
        stranger.sendall(first)
        received = b""
        while data := stranger.recv(65536):
            received += data
    # Nothing but frames of ours: SETTINGS, WINDOW_UPDATE and perhaps GOAWAY.
    assert len(received) < 200
    check_works(other)


def test_a_tls_client_fails_at_once(server: Server) -> None:
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", server.port), 10) as stranger, pytest.raises((ssl.SSLError, OSError)):
        context.wrap_socket(stranger, server_hostname="localhost")


def test_the_preface_may_come_byte_by_byte(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server, preface=b"")
    for byte in PREFACE + SettingsFrame(0).serialize():
        client.raw(bytes([byte]))
    check_works(client)


def test_many_connections_are_served_side_by_side(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)
    server.add()

    def work(_: int) -> int:
        with Http2(server.port) as client:
            for _ in range(20):
                check_works(client)
        return 20

    with ThreadPoolExecutor(16) as pool:
        assert sum(pool.map(work, range(64))) == 64 * 20
    eventually(lambda: server.count("connections_open") == 0, "all have gone")
    assert server.count("connections_accepted") == 64


def test_goaway_from_the_client_lets_its_calls_finish(server: Server, connect: Callable[..., Http2]) -> None:
    held = server.add(model_settings("held"), script="hold")
    client = connect(server)
    stream_id = client.call(infer_request("held"))
    client.frame(GoAwayFrame(0, last_stream_id=0, error_code=NO_ERROR))
    client.sync()
    held.release(1)
    client.reply(stream_id).expect(OK)
