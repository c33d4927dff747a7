"""Compressed requests: what is opened, what is refused, and where opening stops."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import psutil
import pytest

from tests.wire.harness import (
    CHAT,
    ECHO,
    INTERNAL,
    OK,
    RESOURCE_EXHAUSTED,
    STREAM_INFER,
    UNIMPLEMENTED,
    Http2,
    Server,
    blob_of_message_size,
    bytes_model,
    check_works,
    framed,
    infer_request,
    pb,
    values_of,
)

MESSAGE = infer_request(values=[9, 8, 7, 6]).SerializeToString()
COMPRESS = {"gzip": gzip.compress, "deflate": zlib.compress}


def send(client: Http2, path: str, body: bytes, encoding: str | None) -> int:
    stream_id = client.open(path, grpc_encoding=encoding)
    client.upload(stream_id, body, end=True)
    return stream_id


@pytest.mark.parametrize("encoding", COMPRESS)
def test_a_compressed_request_is_answered_uncompressed(client: Http2, encoding: str) -> None:
    stream_id = client.open(grpc_encoding=encoding, grpc_accept_encoding="identity,gzip,deflate")
    client.data(stream_id, framed(COMPRESS[encoding](MESSAGE), flag=1), end=True)
    reply = client.reply(stream_id)
    assert reply.status == OK
    assert values_of(reply.messages[0]) == [9, 8, 7, 6]
    assert reply.headers.get("grpc-encoding", "identity") == "identity"


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity", "snappy", None])
def test_an_encoding_without_the_flag_is_no_compression(client: Http2, encoding: str | None) -> None:
    reply = client.reply(send(client, "/inference.GRPCInferenceService/ModelInfer", framed(MESSAGE), encoding))
    assert reply.status == OK
    assert values_of(reply.messages[0]) == [9, 8, 7, 6]


@pytest.mark.parametrize("encoding", ["identity", None])
@pytest.mark.parametrize("path", ["/inference.GRPCInferenceService/ModelInfer", STREAM_INFER, ECHO])
def test_the_flag_without_an_encoding_is_internal(client: Http2, path: str, encoding: str | None) -> None:
    reply = client.reply(send(client, path, framed(gzip.compress(MESSAGE), 1), encoding))
    reply.expect(INTERNAL, "grpc-encoding")
    check_works(client)


@pytest.mark.parametrize("encoding", ["snappy", "zstd", "br", "GZIP", "gzip, deflate", ""])
def test_an_unknown_encoding_is_unimplemented_and_says_what_there_is(client: Http2, encoding: str) -> None:
    reply = client.reply(send(client, ECHO, framed(MESSAGE, 1), encoding))
    reply.expect(UNIMPLEMENTED)
    assert set(reply.fields["grpc-accept-encoding"].split(",")) == {"identity", "deflate", "gzip"}
    check_works(client)


@pytest.mark.parametrize("encoding", COMPRESS)
def test_streams_mix_compressed_and_plain_messages(client: Http2, encoding: str) -> None:
    body = framed(COMPRESS[encoding](b"first"), 1) + framed(b"second") + framed(COMPRESS[encoding](b""), 1)
    reply = client.reply(send(client, CHAT, body, encoding))
    assert reply.messages == [b"first", b"second", b""]


DAMAGED = {
    "cut": gzip.compress(MESSAGE)[:-1],
    "cut in the middle": gzip.compress(MESSAGE)[:20],
    "wrong sum": gzip.compress(MESSAGE)[:-8] + b"\0" * 8,
    "something behind": gzip.compress(MESSAGE) + b"x",
    "not compressed": MESSAGE,
    "empty": b"",
    "header only": gzip.compress(b"")[:10],
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_data_is_internal(client: Http2, damage: str) -> None:
    for path in (ECHO, STREAM_INFER):
        reply = client.reply(send(client, path, framed(DAMAGED[damage], 1), "gzip"))
        reply.expect(INTERNAL, "damaged")
    check_works(client)


@pytest.mark.parametrize("encoding", COMPRESS)
@pytest.mark.parametrize(("size", "status"), [(99_999, OK), (100_000, OK), (100_001, RESOURCE_EXHAUSTED)])
def test_the_message_limit_counts_after_decompression(
    serve: Callable[..., Server], connect: Callable[..., Http2], encoding: str, size: int, status: int
) -> None:
    server = serve(max_message_bytes=100_000)
    server.add(bytes_model())
    client = connect(server)
    message = blob_of_message_size(size)
    reply = client.reply(
        send(client, "/inference.GRPCInferenceService/ModelInfer", framed(COMPRESS[encoding](message), 1), encoding)
    )
    reply.expect(status)
    if status == OK:
        answer = pb.ModelInferResponse.FromString(reply.messages[0])
        assert set(answer.raw_output_contents[0]) == {7}
    else:
        assert "after decompression" in reply.message


def bomb(size: int) -> bytes:
    """Zeros, compressed as far as it goes (about 1000 to 1)."""
    compressor = zlib.compressobj(9)
    block = bytes(1 << 20)
    return b"".join(compressor.compress(block) for _ in range(size >> 20)) + compressor.flush()


def test_a_bomb_stops_at_the_limit(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(max_message_bytes=1 << 20)
    server.add()
    client = connect(server)
    body = framed(bomb(512 << 20), 1)
    assert len(body) < 1 << 20
    before = psutil.Process().memory_info().rss
    for _ in range(5):
        reply = client.reply(send(client, "/inference.GRPCInferenceService/ModelInfer", body, "deflate"))
        reply.expect(RESOURCE_EXHAUSTED, "after decompression")
    assert psutil.Process().memory_info().rss - before < 32 << 20
    check_works(client)
