"""What a client sees of the queue while instances are busy: timeouts answered on time, turns, order of answers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hyperframe.frame import HeadersFrame

from protos.gen import grpc_service_pb2 as pb
from server.settings import QueuePolicySettings
from tests.wire.harness import (
    DEADLINE_EXCEEDED,
    INVALID_ARGUMENT,
    OK,
    STREAM_INFER,
    Http2,
    Mock,
    Server,
    eventually,
    framed,
    infer_request,
    model_settings,
    unframed,
)


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        yield server


@pytest.fixture
def client(server: Server) -> Iterator[Http2]:
    with Http2(server.port) as client:
        yield client


def a_request(request_id: str = "", priority: int = 0, timeout_us: int = 0) -> pb.ModelInferRequest:
    request = infer_request(id=request_id)
    if priority:
        request.parameters["priority"].uint64_param = priority
    if timeout_us:
        request.parameters["timeout"].int64_param = timeout_us
    return request


def busy(server: Server, client: Http2, **batching: Any) -> tuple[Mock, int]:
    """A model whose only instance is running until it is released, and the stream of what it runs."""
    model = server.add(model_settings(max_batch_size=1, **batching), script="hold")
    running = client.call(a_request())
    eventually(lambda: model.queue_view()["running_rows"] == 1, "the instance is busy")
    return model, running


def test_a_default_timeout_is_answered_while_the_instance_is_busy(server: Server, client: Http2) -> None:
    policy = QueuePolicySettings(default_timeout_us=20_000)
    model, running = busy(server, client, default_policy=policy)
    waiting = [client.call(a_request()) for _ in range(3)]
    for stream_id in waiting:
        client.reply(stream_id).expect(DEADLINE_EXCEEDED, "timeout")
    assert model.queue_view()["running_rows"] == 1
    assert model.queue_view()["waiting"] == 0
    # It limits the wait and not the run: what runs has been at it for longer.
    model.release(1)
    client.reply(running).expect(OK)
    assert model.statistics().shed["DEADLINE_PASSED"] == 3


def test_a_timeout_within_a_stream_ends_one_request_and_not_the_stream(server: Server, client: Http2) -> None:
    model, running = busy(server, client)
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, framed(a_request("late", timeout_us=20_000)) + framed(a_request("fine")))
    reply = client.replies[stream_id]
    while not reply.data:
        client.read_frame()
    (late,) = [pb.ModelStreamInferResponse.FromString(message) for message in unframed(reply.data)]
    assert (late.infer_response.id, "timeout" in late.error_message) == ("late", True)
    model.release(2)
    client.reply(running).expect(OK)
    client.data(stream_id, b"", end=True)
    fine = pb.ModelStreamInferResponse.FromString(client.reply(stream_id).expect(OK).messages[1])
    assert (fine.infer_response.id, fine.error_message) == ("fine", "")
    assert model.statistics().execution_count == 2


def test_a_delayed_request_waits_on_behind_the_others(server: Server, client: Http2) -> None:
    policy = QueuePolicySettings(delay=True, allow_timeout_override=True)
    model, running = busy(server, client, default_policy=policy)
    delayed = client.call(a_request(timeout_us=5_000))
    model.wait_waiting(1)
    # Once this one's deadline has passed, so has the timeout of the first, and nobody has answered that.
    client.reply(client.call(a_request(), grpc_timeout="20m")).expect(DEADLINE_EXCEEDED)
    later = client.call(a_request())
    model.wait_waiting(2)
    model.release(2)
    client.reply(running).expect(OK)
    client.reply(later).expect(OK)
    assert not client.replies[delayed].over
    model.release(1)
    client.reply(delayed).expect(OK)


def test_a_higher_priority_is_served_first(server: Server, client: Http2) -> None:
    model, running = busy(server, client, priority_levels=2, default_priority_level=2)
    low = client.call(a_request())
    model.wait_waiting(1)
    high = client.call(a_request(priority=1))
    model.wait_waiting(2)
    client.infer(a_request(priority=3)).expect(INVALID_ARGUMENT, "priority 3 does not exist", "1 (highest) to 2")
    model.release(2)
    client.reply(running).expect(OK)
    client.reply(high).expect(OK)
    assert not client.replies[low].over
    model.release(1)
    client.reply(low).expect(OK)


def test_answers_leave_in_order_although_instances_finish_out_of_order(server: Server, client: Http2) -> None:
    # Three instances that take turns: answers would overtake each other all the time.
    settings = model_settings(max_batch_size=1, instances=3, preserve_ordering=True)
    model = server.add(settings, script="sleep:100")
    streams = [client.call(a_request()) for _ in range(300)]
    for stream_id in streams:
        client.reply(stream_id).expect(OK)
    answered = [frame.stream_id for frame in client.frames if isinstance(frame, HeadersFrame)]
    assert list(dict.fromkeys(answered)) == streams
    assert model.statistics().execution_count == 300
