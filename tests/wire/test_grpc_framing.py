"""Messages inside DATA frames: cuts mean nothing, ends mean everything, and a length is no promise to allocate."""

from __future__ import annotations

import struct
from collections.abc import Callable

import psutil
import pytest

from tests.wire.harness import (
    CHAT,
    ECHO,
    FAST_ECHO,
    INFER,
    INTERNAL,
    NO_ERROR,
    OK,
    RESOURCE_EXHAUSTED,
    STREAM_INFER,
    UNIMPLEMENTED,
    Http2,
    Server,
    blob_of_message_size,
    blob_request,
    bytes_model,
    check_works,
    framed,
    infer_request,
    pb,
    request_headers,
    values_of,
)

BODY = framed(infer_request(values=[5, 6, 7, 8]))


def test_a_request_in_frames_of_one_byte_is_answered(client: Http2) -> None:
    stream_id = client.open()
    client.data(stream_id, BODY, end=True, size=1)
    reply = client.reply(stream_id)
    assert reply.status == OK
    assert values_of(reply.messages[0]) == [5, 6, 7, 8]


def test_a_request_written_byte_by_byte_is_answered(client: Http2) -> None:
    stream_id = client.new_stream()
    body = client.data_frame(stream_id, BODY, end=True)
    frames = client.headers_frame(stream_id, request_headers()).serialize() + body.serialize()
    for i in range(len(frames)):
        client.raw(frames[i : i + 1])
    assert values_of(client.reply(stream_id).messages[0]) == [5, 6, 7, 8]


def test_every_cut_of_a_request_into_two_frames_is_answered_alike(client: Http2) -> None:
    for cut in range(len(BODY) + 1):
        stream_id = client.open()
        client.data(stream_id, BODY[:cut])
        client.data(stream_id, BODY[cut:], end=True)
        reply = client.reply(stream_id)
        assert values_of(reply.expect(OK).messages[0]) == [5, 6, 7, 8], cut


def test_every_cut_of_a_stream_of_messages_is_answered_alike(client: Http2) -> None:
    # An empty message between two others: its prefix is all there is of it.
    body = framed(b"one") + framed(b"") + framed(b"three") + framed(b"")
    for cut in range(len(body) + 1):
        stream_id = client.open(CHAT)
        client.data(stream_id, body[:cut])
        client.data(stream_id, body[cut:], end=True)
        reply = client.reply(stream_id)
        assert reply.expect(OK).messages == [b"one", b"", b"three", b""], cut


def test_padded_data_is_answered(client: Http2) -> None:
    stream_id = client.open()
    frame = client.data_frame(stream_id, BODY, end=True)
    frame.flags.add("PADDED")
    frame.pad_length = 200
    client.frame(frame)
    client.reply(stream_id).expect(OK)


def test_the_end_may_come_with_the_last_byte_or_in_an_empty_frame(client: Http2) -> None:
    with_the_last = client.open()
    client.data(with_the_last, BODY, end=True)
    alone = client.open()
    client.data(alone, BODY)
    client.data(alone, b"", end=True)
    client.reply(with_the_last).expect(OK)
    client.reply(alone).expect(OK)


@pytest.mark.parametrize("path", [INFER, ECHO, FAST_ECHO])
def test_a_unary_call_without_a_message_is_internal(client: Http2, path: str) -> None:
    reply = client.reply(client.open(path, end=True))
    reply.expect(INTERNAL, "none")
    stream_id = client.open(path)
    client.data(stream_id, b"", end=True)
    client.reply(stream_id).expect(INTERNAL)
    check_works(client)


@pytest.mark.parametrize("path", [INFER, ECHO])
@pytest.mark.parametrize("end", [True, False])
def test_a_second_message_in_a_unary_call_is_internal(client: Http2, path: str, end: bool) -> None:
    for second in (BODY, framed(b"")):
        stream_id = client.open(path)
        client.data(stream_id, BODY + second, end=end)
        reply = client.reply(stream_id)
        reply.expect(INTERNAL, "second")
    check_works(client)


def test_every_early_end_inside_a_message_is_internal(client: Http2) -> None:
    for path in (INFER, STREAM_INFER, ECHO, CHAT):
        for cut in [*range(1, 6), len(BODY) - 1]:
            stream_id = client.open(path)
            client.data(stream_id, BODY[:cut], end=True)
            reply = client.reply(stream_id)
            assert reply.status == INTERNAL, (path, cut)
            assert "inside a message" in reply.message
    check_works(client)


def test_bytes_after_a_unary_message_are_internal(client: Http2) -> None:
    stream_id = client.open()
    client.data(stream_id, BODY + b"\0\0", end=True)
    client.reply(stream_id).expect(INTERNAL)
    check_works(client)


@pytest.mark.parametrize("flag", [2, 3, 0x80, 0xFF])
@pytest.mark.parametrize("path", [INFER, STREAM_INFER, ECHO])
def test_an_unknown_flag_is_internal(client: Http2, path: str, flag: int) -> None:
    stream_id = client.open(path)
    client.data(stream_id, framed(infer_request(), flag), end=True)
    reply = client.reply(stream_id)
    reply.expect(INTERNAL, "flag")
    check_works(client)


def test_an_empty_message_is_a_request_without_a_model(client: Http2) -> None:
    reply = client.infer(b"")
    reply.expect(5, "unknown model ''")


@pytest.fixture
def small(serve: Callable[..., Server]) -> Server:
    """A server that takes messages of up to 100,000 bytes."""
    server = serve(max_message_bytes=100_000)
    server.add()
    server.add(bytes_model())
    return server


@pytest.mark.parametrize(("size", "status"), [(99_999, OK), (100_000, OK), (100_001, RESOURCE_EXHAUSTED)])
def test_the_message_limit_is_exact(small: Server, connect: Callable[..., Http2], size: int, status: int) -> None:
    client = connect(small)
    reply = client.infer(blob_of_message_size(size))
    reply.expect(status)
    if status == OK:
        (answer,) = reply.messages
        assert pb.ModelInferResponse.FromString(answer).raw_output_contents[0].count(b"\x07") > size - 100
    else:
        assert "100001 bytes" in reply.message
        assert "limit of 100000 bytes" in reply.message
    check_works(client)


@pytest.mark.parametrize("path", [INFER, STREAM_INFER, ECHO, CHAT])
@pytest.mark.parametrize("declared", [100_001, 2**31 - 1, 2**31, 2**32 - 1])
def test_a_declared_length_above_the_limit_is_refused_on_the_prefix(
    small: Server, connect: Callable[..., Http2], path: str, declared: int
) -> None:
    client = connect(small)
    before = psutil.Process().memory_info().rss
    stream_id = client.open(path)
    client.data(stream_id, struct.pack(">BI", 0, declared))
    reply = client.reply(stream_id)
    reply.expect(RESOURCE_EXHAUSTED, str(declared))
    assert psutil.Process().memory_info().rss - before < 16 << 20
    check_works(client)


def test_a_refused_upload_sees_its_status_and_the_connection_goes_on(
    small: Server, connect: Callable[..., Http2]
) -> None:
    client = connect(small)
    stream_id = client.open()
    client.data(stream_id, struct.pack(">BI", 0, 100 << 20))
    # A client that has not heard yet goes on sending: its bytes are dropped and its window comes back.
    for _ in range(64):
        client.data(stream_id, b"\0" * 16384)
    reply = client.reply(stream_id)
    while reply.reset is None:
        client.read_frame()
    assert (reply.status, reply.reset) == (RESOURCE_EXHAUSTED, NO_ERROR)
    assert reply.trailers_only
    check_works(client)


def test_many_declared_lengths_take_nothing_from_others(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_message_bytes=64 << 20, max_inflight_bytes=128 << 20)
    server.add()
    liar = connect(server)
    for _ in range(200):
        stream_id = liar.open()
        liar.data(stream_id, struct.pack(">BI", 0, 60 << 20) + b"x")
    liar.sync()
    check_works(connect(server))
    assert server.count("inflight_bytes") < 8 << 20


def test_the_bytes_in_flight_are_bounded_and_come_back(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_inflight_bytes=8 << 20)
    held = server.add(bytes_model(), script="hold")
    server.add()
    client = connect(server)
    streams = [client.call(blob_request(bytes(1 << 20))) for _ in range(12)]
    refused = [client.reply(stream_id) for stream_id in streams[8:]]
    for reply in refused:
        reply.expect(RESOURCE_EXHAUSTED, "in flight")
        assert int(reply.fields["grpc-retry-pushback-ms"]) > 0
    held.release(1000)
    accepted = [client.reply(stream_id) for stream_id in streams if not client.replies[stream_id].over]
    assert len(accepted) >= 6
    assert all(reply.status == OK for reply in accepted)
    check_works(client)
    client.infer(blob_request(bytes(4 << 20))).expect(OK)


def test_what_is_copied_of_a_body_is_its_own_size(server: Server, client: Http2) -> None:
    before = server.count("bytes_received")
    message = infer_request()
    client.infer(message)
    assert server.count("bytes_received") - before == message.ByteSize()


def test_a_large_answer_comes_whole(server: Server, client: Http2) -> None:
    server.add(bytes_model())
    payload = bytes(range(256)) * (5 << 12)
    reply = client.infer(blob_request(payload))
    reply.expect(OK)
    assert pb.ModelInferResponse.FromString(reply.messages[0]).raw_output_contents[0] == payload


def test_unknown_methods_are_refused_before_their_body(client: Http2) -> None:
    stream_id = client.open("/no.Such/Method")
    client.reply(stream_id).expect(UNIMPLEMENTED)
