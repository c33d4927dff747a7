"""Who goes away takes its work with it: resets, closed connections, deadlines."""

from __future__ import annotations

import socket
from collections.abc import Callable

import pytest
from hyperframe.frame import RstStreamFrame

from server.settings import QueuePolicySettings
from tests.wire.harness import (
    CANCEL,
    DEADLINE_EXCEEDED,
    INTERNAL_ERROR,
    NO_ERROR,
    OK,
    PROTOCOL_ERROR,
    STREAM_INFER,
    Http2,
    Mock,
    Server,
    check_works,
    eventually,
    framed,
    infer_request,
    model_settings,
    request_headers,
    values_of,
)


@pytest.fixture
def held(server: Server) -> Mock:
    """The version "held", one row a batch, whose runs wait until they are released."""
    return server.add(model_settings("held", max_batch_size=1), script="hold")


def fill(server: Server, client: Http2, held: Mock, waiting: int, **headers: str | None) -> list[int]:
    """One request that runs and `waiting` behind it. Returns their streams."""
    streams = [client.call(infer_request("held", [100, 0, 0, 0]))]
    client.sync()
    eventually(lambda: held.queue_view()["running_rows"] == 1, "the first one runs")
    streams += [client.call(infer_request("held", [i, 0, 0, 0]), **headers) for i in range(waiting)]
    held.wait_waiting(waiting)
    return streams


@pytest.mark.parametrize("code", [CANCEL, NO_ERROR, INTERNAL_ERROR, PROTOCOL_ERROR, 0xDEADBEEF])
def test_a_reset_takes_queued_work_out_and_nothing_runs(server: Server, client: Http2, held: Mock, code: int) -> None:
    streams = fill(server, client, held, 5)
    for stream_id in streams[1:4]:
        client.reset(stream_id, code)
    client.sync()
    assert held.queue_view()["waiting"] == 2
    held.release(100)
    assert values_of(client.reply(streams[4]).messages[0])[0] == 3
    assert values_of(client.reply(streams[5]).messages[0])[0] == 4
    client.sync()
    assert [client.replies[stream_id].shape for stream_id in streams[1:4]] == [[], [], []]
    statistics = held.statistics()
    assert statistics.execution_count == 3
    assert statistics.failures["CANCELED"] == 3
    assert server.count("resets_received") == 3


def test_a_reset_in_the_same_write_as_the_request_is_not_run(server: Server, client: Http2, held: Mock) -> None:
    streams = fill(server, client, held, 0)

    for _ in range(10):
        stream_id = client.new_stream()
        client.frame(
            client.headers_frame(stream_id, request_headers()),
            client.data_frame(stream_id, framed(infer_request("held")), end=True),
            RstStreamFrame(stream_id, error_code=CANCEL),
        )
    client.sync()
    held.release(100)
    client.reply(streams[0]).expect(OK)
    server.retire("held", "1")
    assert held.statistics().execution_count == 1


def test_a_reset_while_the_request_runs_gets_no_answer(server: Server, client: Http2, held: Mock) -> None:
    (stream_id,) = fill(server, client, held, 0)
    client.reset(stream_id)
    client.sync()
    held.release(1)
    eventually(lambda: server.count("requests_live") == 0, "the request came back")
    client.sync()
    assert client.replies[stream_id].shape == []
    assert held.statistics().failures["CANCELED"] == 1
    check_works(client)


@pytest.mark.parametrize("reset", [True, False])
def test_a_closed_connection_takes_its_work_with_it(
    server: Server, connect: Callable[..., Http2], held: Mock, reset: bool
) -> None:
    other = connect(server)
    gone = connect(server)
    (running,) = fill(server, other, held, 0)
    for _ in range(5):
        gone.call(infer_request("held"))
    half_sent = gone.open()
    gone.data(half_sent, framed(infer_request())[:-3])
    held.wait_waiting(5)
    gone.close(reset)
    held.wait_waiting(0)
    held.release(100)
    other.reply(running).expect(OK)
    eventually(lambda: server.count("connections_open") == 1, "the connection has gone")
    assert held.statistics().execution_count == 1
    check_works(other)


def test_a_stream_that_is_reset_takes_all_its_requests_with_it(server: Server, client: Http2, held: Mock) -> None:
    fill(server, client, held, 0)
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, b"".join(framed(infer_request("held")) for _ in range(7)))
    held.wait_waiting(7)
    client.reset(stream_id)
    client.sync()
    assert held.queue_view()["waiting"] == 0
    held.release(1)


def test_what_has_expired_in_the_queue_is_not_run(server: Server, client: Http2, held: Mock) -> None:
    streams = fill(server, client, held, 6, grpc_timeout="30m")
    for stream_id in streams[1:]:
        reply = client.reply(stream_id)
        reply.expect(DEADLINE_EXCEEDED, "deadline")
        assert reply.trailers_only
    assert held.queue_view()["waiting"] == 0
    held.release(100)
    client.reply(streams[0]).expect(OK)
    statistics = held.statistics()
    assert statistics.execution_count == 1
    assert statistics.shed["DEADLINE_PASSED"] == 6
    assert server.count("deadline_expired") == 6


def test_the_timeout_parameter_ends_the_wait_on_time_where_the_model_allows_it(server: Server, client: Http2) -> None:
    policy = QueuePolicySettings(allow_timeout_override=True)
    held = server.add(model_settings("held", max_batch_size=1, default_policy=policy), script="hold")
    (running,) = fill(server, client, held, 0)
    request = infer_request("held")
    request.parameters["timeout"].int64_param = 20_000
    client.reply(client.call(request)).expect(DEADLINE_EXCEEDED)
    held.release(100)
    client.reply(running).expect(OK)
    assert held.statistics().execution_count == 1


def test_a_deadline_that_passes_during_the_run_is_answered_on_time(server: Server, client: Http2, held: Mock) -> None:
    stream_id = client.call(infer_request("held"), grpc_timeout="30m")
    reply = client.reply(stream_id)
    reply.expect(DEADLINE_EXCEEDED)
    held.release(1)
    eventually(lambda: server.count("requests_live") == 0, "the request came back")
    check_works(client)


def test_a_deadline_passes_for_a_request_that_never_came_whole(client: Http2) -> None:
    stream_id = client.open(grpc_timeout="30m")
    client.data(stream_id, framed(infer_request())[:-1])
    reply = client.reply(stream_id)
    reply.expect(DEADLINE_EXCEEDED)
    while reply.reset is None:
        client.read_frame()
    assert reply.reset == NO_ERROR
    check_works(client)


def test_expired_calls_cost_the_connection_nothing(server: Server, client: Http2, held: Mock) -> None:
    """Ten thousand calls that a lawful client gives up on: far more resets a second than HTTP/2 libraries allow."""

    streams = fill(server, client, held, 0)
    body = framed(infer_request("held"))
    for _ in range(100):
        frames = b""
        for _ in range(100):
            stream_id = client.new_stream()
            frames += client.headers_frame(stream_id, request_headers()).serialize()
            frames += client.data_frame(stream_id, body, end=True).serialize()
            frames += RstStreamFrame(stream_id, error_code=CANCEL).serialize()
        client.raw(frames)
    client.sync()
    assert held.queue_view()["waiting"] == 0
    assert not client.goaways()
    held.release(10_000)
    client.reply(streams[0]).expect(OK)
    server.retire("held", "1")
    assert held.statistics().execution_count == 1
    check_works(client)


def test_a_connection_that_goes_away_mid_frame_is_no_matter(server: Server, connect: Callable[..., Http2]) -> None:
    healthy = connect(server)
    body = framed(infer_request())
    for cut in range(1, 60, 7):
        client = connect(server)
        stream_id = client.new_stream()

        data = client.headers_frame(stream_id, request_headers()).serialize()
        data += client.data_frame(stream_id, body, end=True).serialize()
        client.raw(data[:cut])
        client.close(reset=cut % 2 == 0)
    eventually(lambda: server.count("connections_open") == 1, "they have gone")
    check_works(healthy)


def test_the_peer_that_only_closes_its_side_is_gone(server: Server, connect: Callable[..., Http2]) -> None:

    client = connect(server)
    check_works(client)
    client.socket.shutdown(socket.SHUT_WR)
    client.read_to_end()
    eventually(lambda: server.count("connections_open") == 0, "it has gone")
