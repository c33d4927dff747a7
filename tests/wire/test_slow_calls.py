"""Calls that Python answers: unary and streaming, with their cancellations, on lanes that do not block each other."""

from __future__ import annotations

import struct
from collections.abc import Callable

import grpc
import pytest

from tests.wire.harness import (
    CHAT,
    DEADLINE_EXCEEDED,
    ECHO,
    FAIL,
    FAST_ECHO,
    LISTEN,
    NOT_FOUND,
    OK,
    SILENT,
    Http2,
    Server,
    check_works,
    eventually,
    framed,
    infer_request,
)


@pytest.mark.parametrize("path", [ECHO, FAST_ECHO])
@pytest.mark.parametrize("payload", [b"", b"x", b"hello" * 1000, bytes(1 << 20)], ids=["empty", "one", "some", "large"])
def test_a_unary_call_is_answered(client: Http2, path: str, payload: bytes) -> None:
    reply = client.infer(payload, path).expect(OK)
    assert reply.messages == [payload]
    assert reply.shape[0] == "HEADERS"
    assert reply.shape[-1] == "HEADERS+END"


def test_a_unary_call_arrives_as_one_message_event(server: Server, client: Http2) -> None:
    client.infer(b"hello", ECHO, x_who="me").expect(OK)
    server.wait_event("message", ECHO)
    assert server.events == [("message", ECHO, b"hello")]
    assert server.metadata["x-who"] == "me"


def test_a_refusal_is_one_block_of_headers(client: Http2) -> None:
    reply = client.infer(b"5 no such thing", FAIL).expect(NOT_FOUND, "no such thing")
    assert reply.trailers_only


def test_a_conversation_keeps_its_order(server: Server, client: Http2) -> None:
    stream_id = client.open(CHAT)
    sent = [f"{i}".encode() * (i % 7) for i in range(200)]
    client.data(stream_id, b"".join(map(framed, sent)), end=True)
    reply = client.reply(stream_id).expect(OK)
    assert reply.messages == sent
    server.wait_event("half_close", CHAT)
    assert [kind for kind, _, _ in server.events] == ["message"] * 200 + ["half_close"]


def test_grpcio_talks_to_a_slow_stream(server: Server) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        assert list(channel.stream_stream(CHAT)(iter([b"a", b"", b"c"]))) == [b"a", b"", b"c"]
        assert channel.unary_unary(ECHO)(b"hi") == b"hi"


def test_a_cancelled_stream_is_told_to_python(server: Server, client: Http2) -> None:
    stream_id = client.open(LISTEN)
    client.data(stream_id, framed(b"watch"))
    server.wait_event("message", LISTEN)
    (call,) = server.calls
    assert not call.cancelled
    client.reset(stream_id)
    server.wait_event("cancelled", LISTEN)
    assert call.cancelled
    call.send(b"nobody hears this")
    call.finish(0)
    check_works(client)


def test_a_stream_whose_deadline_passes_is_told_to_python(server: Server, client: Http2) -> None:
    stream_id = client.open(LISTEN, grpc_timeout="30m")
    client.data(stream_id, framed(b"watch"))
    client.reply(stream_id).expect(DEADLINE_EXCEEDED)
    server.wait_event("cancelled", LISTEN)
    assert server.calls[0].cancelled


def test_a_stream_that_breaks_the_rules_is_told_to_python(server: Server, client: Http2) -> None:
    stream_id = client.open(LISTEN)
    client.data(stream_id, framed(b"watch"))
    server.wait_event("message", LISTEN)
    client.data(stream_id, framed(b"x", flag=9))
    client.reply(stream_id).expect(13)
    server.wait_event("cancelled", LISTEN)


def test_a_stream_whose_connection_closes_is_told_to_python(server: Server, connect: Callable[..., Http2]) -> None:
    client = connect(server)
    stream_id = client.open(LISTEN)
    client.data(stream_id, framed(b"watch"), end=True)
    server.wait_event("half_close", LISTEN)
    client.close(reset=True)
    server.wait_event("cancelled", LISTEN)
    assert server.calls[0].cancelled


def test_a_stream_that_python_never_heard_of_is_not_told_of(server: Server, client: Http2) -> None:
    for _ in range(10):
        client.reset(client.open(LISTEN))
    check_works(client)
    assert client.infer(b"marker", ECHO).status == OK
    server.wait_event("message", ECHO)
    assert server.events == [("message", ECHO, b"marker")]


def test_a_unary_call_that_is_cancelled_knows_it(server: Server, client: Http2) -> None:
    stream_id = client.call(b"question", SILENT)
    server.wait_event("message", SILENT)
    (call,) = server.calls
    client.reset(stream_id)
    eventually(lambda: call.cancelled, "the call knows")
    call.send(b"too late")
    call.finish(0)
    client.sync()
    assert client.replies[stream_id].shape == []
    check_works(client)


def test_a_unary_call_whose_deadline_passes_knows_it(server: Server, client: Http2) -> None:
    reply = client.infer(b"question", SILENT, grpc_timeout="30m")
    reply.expect(DEADLINE_EXCEEDED)
    eventually(lambda: server.calls and server.calls[0].cancelled, "the call knows")


def test_what_python_says_after_the_end_is_dropped(server: Server, client: Http2) -> None:
    stream_id = client.open(LISTEN)
    client.data(stream_id, framed(b"watch"))
    server.wait_event("message", LISTEN)
    (call,) = server.calls
    call.send(b"one")
    call.finish(0)
    call.send(b"two")
    call.finish(5, "again")
    assert client.reply(stream_id).expect(OK).messages == [b"one"]


def test_a_stream_may_be_finished_before_the_client_is_done(server: Server, client: Http2) -> None:
    stream_id = client.open(LISTEN)
    client.data(stream_id, framed(b"watch"))
    server.wait_event("message", LISTEN)
    server.calls[0].finish(9, "enough")
    reply = client.reply(stream_id).expect(9, "enough")
    while reply.reset is None:
        client.read_frame()
    assert reply.reset == 0
    client.data(stream_id, framed(b"more"))
    check_works(client)


def test_the_fast_lane_does_not_wait_for_the_general_one(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve()
    client = connect(server)
    # The general lane's only thread here is busy with a call that is answered when this test says so.
    release = server.block_general_lane()
    stuck = client.call(b"slow", ECHO)
    client.infer(b"quick", FAST_ECHO).expect(OK)
    assert not client.replies[stuck].over
    release.set()
    client.reply(stuck).expect(OK)


def test_a_full_lane_refuses_and_says_when_to_come_back(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_streams=10_000)
    client = connect(server)
    client.sync()
    release = server.block_general_lane()
    streams = [client.call(b"x", ECHO) for _ in range(4200)]
    client.infer(b"quick", FAST_ECHO).expect(OK)
    refused = [stream_id for stream_id in streams if client.replies[stream_id].over]
    assert 90 <= len(refused) <= 104
    reply = client.replies[refused[0]].expect(8, "too many calls")
    assert int(reply.fields["grpc-retry-pushback-ms"]) > 0
    release.set()
    for stream_id in streams:
        if stream_id not in refused:
            client.reply(stream_id).expect(OK)


def test_what_waits_for_python_counts_as_bytes_in_flight(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve(max_inflight_bytes=8 << 20)
    client = connect(server)
    release = server.block_general_lane()
    streams = [client.call(bytes(1 << 20), ECHO) for _ in range(12)]
    client.sync()
    eventually(lambda: any(client.replies[s].over for s in streams) or client.sync(), "one is refused")
    refused = [client.replies[s] for s in streams if client.replies[s].over]
    assert refused
    for reply in refused:
        reply.expect(8, "in flight")
    release.set()
    for stream_id in streams:
        if client.replies[stream_id] not in refused:
            client.reply(stream_id).expect(OK)
    client.infer(bytes(4 << 20), ECHO).expect(OK)


def test_bad_messages_of_slow_calls_disturb_nobody(client: Http2) -> None:
    for body in (b"\0", struct.pack(">BI", 0, 10) + b"short"):
        for path in (ECHO, CHAT):
            stream_id = client.open(path)
            client.data(stream_id, body, end=True)
            client.reply(stream_id).expect(13)
    check_works(client)
    client.infer(infer_request().SerializeToString(), ECHO).expect(OK)
