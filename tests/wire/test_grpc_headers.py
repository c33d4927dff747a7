"""What the headers of a call may say, and what each answer looks like on the wire."""

from __future__ import annotations

import pytest
from hyperframe.frame import ContinuationFrame, HeadersFrame

from tests.wire.harness import (
    DEADLINE_EXCEEDED,
    ECHO,
    INFER,
    INTERNAL,
    NO_ERROR,
    OK,
    RESOURCE_EXHAUSTED,
    UNIMPLEMENTED,
    Http2,
    Server,
    check_works,
    framed,
    infer_request,
    request_headers,
    values_of,
)


def test_an_answer_is_headers_then_data_then_trailers(client: Http2) -> None:
    reply = client.infer(infer_request(values=[1, 2, 3, 4], id="a"))
    assert reply.shape == ["HEADERS", "DATA", "HEADERS+END"]
    assert reply.headers == {":status": "200", "content-type": "application/grpc"}
    assert reply.trailers == {"grpc-status": "0", "x-model-version": "1"}
    assert values_of(reply.messages[0]) == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "path",
    [
        "/inference.GRPCInferenceService/modelinfer",
        "/inference.GRPCInferenceService/ModelInfer/",
        "/inference.GRPCInferenceService/",
        "/inference.GRPCInferenceService/Model%49nfer",
        "/Inference.GRPCInferenceService/ModelInfer",
        "/nobody.Service/Nothing",
        "/",
        "/" + "long" * 1000,
    ],
)
def test_an_unknown_path_is_one_block_of_headers_with_status_12(client: Http2, path: str) -> None:
    reply = client.infer(infer_request(), path)
    assert reply.trailers_only
    assert reply.http_status == 200
    reply.expect(UNIMPLEMENTED)
    assert "unknown method" in reply.message
    check_works(client)


def test_a_path_of_odd_bytes_gives_a_message_that_is_text(client: Http2) -> None:
    reply = client.infer(infer_request(), "/caf\u00e9/\u20ac")
    reply.expect(UNIMPLEMENTED)
    assert reply.message == "unknown method /café/€"
    stream_id = client.new_stream()
    fields = [(n, "/x\u00ff".encode("latin-1") if n == ":path" else v) for n, v in request_headers()]
    client.frame(client.headers_frame(stream_id, fields, end=True))
    assert client.reply(stream_id).message == "unknown method /x\ufffd"


def test_a_long_path_is_cut_between_characters(client: Http2) -> None:
    for shift in range(3):
        reply = client.infer(infer_request(), "/" + "x" * shift + "€" * 1000)
        reply.expect(UNIMPLEMENTED)
        text = reply.message.removeprefix("unknown method /" + "x" * shift)
        assert set(text) == {"€"}
        assert len(reply.message.encode()) <= 1024


@pytest.mark.parametrize(
    "content_type",
    ["application/grpc", "application/grpc+proto", "application/grpc;charset=utf-8", "application/grpc+whatever"],
)
def test_grpc_content_types_are_served(client: Http2, content_type: str) -> None:
    client.infer(infer_request(), content_type=content_type).expect(OK)


@pytest.mark.parametrize(
    "content_type",
    ["text/plain", "application/json", "application/grpcx", "application/grp", "", "APPLICATION/GRPC", None],
)
def test_any_other_content_type_is_http_415(client: Http2, server: Server, content_type: str | None) -> None:
    reply = client.infer(infer_request(), content_type=content_type)
    assert reply.http_status == 415
    assert reply.ended
    assert "grpc-status" not in reply.fields
    assert server.count("http_refusals") == 1
    check_works(client)


@pytest.mark.parametrize("method", ["GET", "PUT", "OPTIONS", "HEAD", "post", "FROBNICATE"])
def test_any_method_but_post_is_http_405(client: Http2, method: str) -> None:
    reply = client.reply(client.open(end=True, p_method=method))
    assert reply.http_status == 405
    assert reply.headers["allow"] == "POST"
    check_works(client)


def test_a_missing_te_is_served_and_counted(client: Http2, server: Server) -> None:
    client.infer(infer_request(), te=None).expect(OK)
    assert server.count("te_missing") == 1
    client.infer(infer_request()).expect(OK)
    assert server.count("te_missing") == 1


@pytest.mark.parametrize("timeout", ["20S", "1M", "1H", "99999999H", "99999999M", "99999999S", "60000m", "00000009S"])
def test_a_timeout_that_is_long_enough_is_kept(client: Http2, timeout: str) -> None:
    client.infer(infer_request(), grpc_timeout=timeout).expect(OK)


@pytest.mark.parametrize("timeout", ["0n", "0S", "00000000H", "1n"])
def test_a_timeout_that_is_over_at_once_is_deadline_exceeded(server: Server, client: Http2, timeout: str) -> None:
    version = server.add(script="hold")
    reply = client.infer(infer_request(), grpc_timeout=timeout)
    reply.expect(DEADLINE_EXCEEDED)
    assert reply.trailers_only
    assert version.statistics().execution_count == 0


@pytest.mark.parametrize(
    "timeout", ["", "1", "S", "1x", "-1S", "123456789S", "1 S", " S", "+1S", "1.5S", "1s", "0x1S", "\u0661S", "1SS"]
)
def test_a_malformed_timeout_is_internal(client: Http2, timeout: str) -> None:
    reply = client.infer(infer_request(), grpc_timeout=timeout)
    reply.expect(INTERNAL)
    assert reply.trailers_only
    assert "grpc-timeout" in reply.message
    check_works(client)


def test_custom_metadata_of_every_legal_form_is_no_error(client: Http2, server: Server) -> None:
    stream_id = client.new_stream()
    odd = [
        ("x-blank", ""),
        ("x-spaces", "  both ends  "),
        ("x-high", bytes(range(0x80, 0x100))),
        ("x-printable", bytes(range(0x21, 0x7F))),
        ("x-tab", "a\tb"),
        ("x_under.score-9", "v"),
        ("x-padded-bin", "AAECAw=="),
        ("x-unpadded-bin", "AAECAw"),
        ("x-joined-bin", "AAE,AgM="),
        ("x-bad-bin", "!!!"),
        ("grpc-previous-rpc-attempts", "2"),
        ("x-same", "1"),
        ("x-same", "2"),
    ]
    client.frame(
        client.headers_frame(stream_id, [*request_headers(ECHO), *odd]),
        client.data_frame(stream_id, framed(b"hello"), end=True),
    )
    reply = client.reply(stream_id)
    reply.expect(OK)
    assert reply.messages == [b"hello"]
    assert server.metadata["x_under.score-9"] == "v"
    assert server.metadata["x-padded-bin"] == "AAECAw=="
    check_works(client)


@pytest.mark.parametrize("name", ["X-Upper", "x y", "", "x:y", "x\u00e9", "te", "connection"])
def test_a_malformed_header_costs_its_own_stream_only(client: Http2, name: str) -> None:
    stream_id = client.new_stream()
    value = "gzip" if name == "te" else "v"
    client.frame(client.headers_frame(stream_id, [*request_headers(), (name, value)], end=True))
    reply = client.reply(stream_id)
    assert reply.over
    assert reply.reset is not None or reply.status == INTERNAL
    check_works(client)


@pytest.mark.parametrize(
    "fields",
    [
        [(":method", "POST"), (":scheme", "http"), (":authority", "a"), ("content-type", "application/grpc")],
        [(":method", "POST"), (":path", INFER), (":authority", "a"), ("content-type", "application/grpc")],
        [(":path", INFER), (":scheme", "http"), (":authority", "a"), ("content-type", "application/grpc")],
        [*request_headers(), (":path", INFER)],
        [(":status", "200"), *request_headers()],
        [(":path", ""), *[field for field in request_headers() if field[0] != ":path"]],
        [],
    ],
    ids=["no path", "no scheme", "no method", "path last", "status", "empty path", "empty"],
)
def test_wrong_pseudo_headers_cost_their_own_stream_only(client: Http2, fields: list[tuple[str, str]]) -> None:
    stream_id = client.new_stream()
    client.frame(client.headers_frame(stream_id, fields, end=True))
    assert client.reply(stream_id).over
    check_works(client)


def header_list_of(size: int) -> list[tuple[str, str]]:
    """Request headers whose list, by HTTP/2's count, has exactly `size` bytes."""
    fields = request_headers()
    used = sum(len(name) + len(value) + 32 for name, value in fields)
    return [*fields, ("x-filler", "f" * (size - used - 32 - len("x-filler")))]


@pytest.mark.parametrize(
    ("size", "status"), [(8192, OK), (16384, OK), (16385, RESOURCE_EXHAUSTED), (40000, RESOURCE_EXHAUSTED)]
)
def test_headers_above_16_kib_are_refused_and_the_connection_lives(client: Http2, size: int, status: int) -> None:
    stream_id = client.new_stream()
    block = client.encoder.encode(header_list_of(size), huffman=False)
    frames = [HeadersFrame(stream_id, block[:16384])]
    frames += [ContinuationFrame(stream_id, block[i : i + 16384]) for i in range(16384, len(block), 16384)]
    frames[-1].flags.add("END_HEADERS")
    body = client.data_frame(stream_id, framed(infer_request()), end=True)
    client.frame(*frames, body)
    reply = client.reply(stream_id)
    reply.expect(status)
    assert status == OK or "16 KiB" in reply.message
    check_works(client)


def test_request_trailers_are_accepted_and_ignored(client: Http2) -> None:
    stream_id = client.open()
    client.data(stream_id, framed(infer_request()))
    client.frame(client.headers_frame(stream_id, [("x-late", "1")], end=True))
    client.reply(stream_id).expect(OK)
    check_works(client)


def test_request_trailers_above_16_kib_are_refused(client: Http2) -> None:
    client.sync()  # the frame is larger than the protocol allows before our settings are known
    stream_id = client.open()
    client.data(stream_id, framed(infer_request()))
    client.frame(client.headers_frame(stream_id, [(f"x-{i}", "v" * 4000) for i in range(5)], end=True))
    reply = client.reply(stream_id)
    reply.expect(RESOURCE_EXHAUSTED)
    check_works(client)


def test_a_refusal_before_the_end_of_the_request_asks_the_client_to_stop(client: Http2) -> None:
    stream_id = client.open("/no.Such/Method")
    reply = client.reply(stream_id)
    reply.expect(UNIMPLEMENTED)
    while reply.reset is None:
        client.read_frame()
    assert reply.reset == NO_ERROR
    assert reply.shape == ["HEADERS+END", "RSTSTREAM"]
    client.data(stream_id, b"x" * 1000, end=True)  # was under way: harmless
    check_works(client)
