"""Statuses and messages on the wire, and what a client is told about trying again."""

from __future__ import annotations

from collections.abc import Callable

import grpc
import pytest

from server.settings import QueuePolicySettings
from tests.wire.harness import (
    ECHO,
    FAIL,
    NOT_FOUND,
    OK,
    RESOURCE_EXHAUSTED,
    UNAVAILABLE,
    Http2,
    Server,
    _native,
    check_works,
    infer_request,
    model_settings,
    values_of,
)

TEXTS = [
    "plain",
    "100 %",
    "%41 stays %41",
    "tab\tcr\rlf\nnul\0del\x7f",
    "grüße, 数字, \U0001f600",
    "~ and space at the end ",
    "",
    '"quotes" \\ and /',
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_message_of_any_text_makes_the_round_trip(client: Http2, text: str) -> None:
    reply = client.infer(f"5 {text}".encode(), FAIL)
    assert reply.trailers_only
    reply.expect(NOT_FOUND)
    assert reply.message == text


@pytest.mark.parametrize("text", TEXTS)
def test_grpcio_reads_the_same_message(server: Server, text: str) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel, pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(FAIL)(f"5 {text}".encode())
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    # A message of nothing travels as no message, and grpcio then makes one up or leaves it empty.
    assert (caught.value.details() or "") == text


@pytest.mark.parametrize("status", range(1, 17))
def test_every_status_travels_as_its_number(client: Http2, status: int) -> None:
    client.infer(f"{status} x".encode(), FAIL).expect(status, "x")


@pytest.mark.parametrize("status", [-1, 17, 99, 2**31 - 1])
def test_a_number_that_is_no_status_becomes_unknown(client: Http2, status: int) -> None:
    client.infer(f"{status} x".encode(), FAIL).expect(2, "x")
    check_works(client)


def test_trailers_from_python_reach_the_client(client: Http2) -> None:
    reply = client.infer(b"hello", ECHO)
    assert reply.trailers == {"grpc-status": "0", "x-slow": "yes"}


def test_the_version_that_answered_is_named_in_a_trailer_also_when_it_failed(server: Server, client: Http2) -> None:
    server.add(model_settings(version="2.5.0-rc.1"), script="fail-on:9")
    assert client.infer(infer_request()).fields["x-model-version"] == "2.5.0-rc.1"
    failing = infer_request()
    failing.raw_input_contents[0] = b"\x09" + bytes(15)
    reply = client.infer(failing)
    assert reply.status == 13
    assert reply.fields["x-model-version"] == "2.5.0-rc.1"
    assert client.infer(infer_request(model_version="1")).fields["x-model-version"] == "1"


def test_a_full_queue_says_when_to_come_back(server: Server, client: Http2) -> None:
    policy = QueuePolicySettings(max_queue_size=3)
    held = server.add(model_settings("full", max_batch_size=1, default_policy=policy), script="hold")
    running = client.call(infer_request("full"))
    server.wait_for("requests_live", 1)
    waiting = [running]
    # One runs and three wait; whether the first has been taken yet when the others come does not matter.
    while sum(client.replies[stream_id].over for stream_id in waiting) == 0:
        waiting.append(client.call(infer_request("full", [len(waiting), 0, 0, 0])))
        client.sync()
    refused = [client.replies[stream_id] for stream_id in waiting if client.replies[stream_id].over]
    assert 4 <= len(waiting) <= 5
    for reply in refused:
        reply.expect(RESOURCE_EXHAUSTED)
        assert reply.trailers_only
        assert int(reply.fields["grpc-retry-pushback-ms"]) > 0
    statistics = held.statistics()
    assert statistics.shed["QUEUE_FULL"] == statistics.failures["REJECTED"] == len(refused)
    held.release(100)
    for i, stream_id in enumerate(waiting):
        reply = client.reply(stream_id)
        if reply not in refused:
            assert values_of(reply.expect(OK).messages[0])[0] in (i, 1.0)


def test_what_is_not_ready_is_unavailable_with_the_reason_and_what_is_unknown_is_not_found(
    server: Server, client: Http2
) -> None:
    loading = _native.ModelRoute(
        "later", (_native.VersionRoute("1", None, "loading: 40 % of the weights read"),), "", {"stable": "1"}
    )
    server.publish([loading])
    for version in ("", "1", "stable", "^1"):
        reply = client.infer(infer_request("later", model_version=version))
        reply.expect(UNAVAILABLE, "'later'", "not ready", "40 %")
        assert int(reply.fields["grpc-retry-pushback-ms"]) > 0
    client.infer(infer_request("later", model_version="2")).expect(NOT_FOUND, "'later'", "'2'")
    client.infer(infer_request("echo", model_version="7")).expect(NOT_FOUND, "'echo'", "'7'", "live: 1")
    client.infer(infer_request("nobody")).expect(NOT_FOUND, "'nobody'")
    long = client.infer(infer_request("n" * 5000)).expect(NOT_FOUND)
    assert len(long.message) < 400
    check_works(client)


def test_aliases_and_ranges_answer_with_the_exact_version(
    serve: Callable[..., Server], connect: Callable[..., Http2]
) -> None:
    server = serve()
    versions = {text: server.add(model_settings(version=text)) for text in ("1.2.0", "1.4.1", "2.0.0")}
    routes = tuple(_native.VersionRoute(text, version.native, "") for text, version in versions.items())
    server.frontend.publish([_native.ModelRoute("echo", routes, "1.2.0", {"stable": "1.4.1"})])
    client = connect(server)
    wanted = {"": "1.2.0", "1.2.0": "1.2.0", "^1": "1.4.1", "stable": "1.4.1", "2.0.0": "2.0.0"}
    for text, exact in wanted.items():
        reply = client.infer(infer_request(model_version=text)).expect(OK)
        assert reply.trailers["x-model-version"] == exact, text
