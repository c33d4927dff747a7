"""ModelStreamInfer: order, errors inside the stream, the flag of the last response, and every way to end it."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Any

import grpc
import numpy as np
import pytest
from tritonclient.grpc import InferenceServerClient, InferInput
from tritonclient.utils import InferenceServerException

from tests.wire.harness import (
    DEADLINE_EXCEEDED,
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OK,
    STREAM_INFER,
    Http2,
    Reply,
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


def responses(reply: Reply) -> list[pb.ModelStreamInferResponse]:
    return [pb.ModelStreamInferResponse.FromString(message) for message in reply.messages]


def read_messages(client: Http2, stream_id: int, count: int) -> list[pb.ModelStreamInferResponse]:
    """Reads until the stream has brought so many responses."""
    reply = client.replies[stream_id]
    while not reply.over:
        data, messages = reply.data, []
        while len(data) >= 5 and len(data) >= 5 + (size := int.from_bytes(data[1:5])):
            messages.append(pb.ModelStreamInferResponse.FromString(data[5 : 5 + size]))
            data = data[5 + size :]
        if len(messages) >= count:
            return messages
        client.read_frame()
    return responses(reply)


def numbers(some: list[pb.ModelStreamInferResponse]) -> list[float]:
    return [values_of(one.infer_response.SerializeToString())[0] for one in some]


def test_answers_come_in_the_order_of_their_requests(server: Server, client: Http2) -> None:
    server.add(model_settings("many", max_batch_size=2, instances=4), script="sleep:200")
    stream_id = client.open(STREAM_INFER)
    for i in range(50):
        client.data(stream_id, framed(infer_request("many", [i, 0, 0, 0], id=str(i))))
    client.data(stream_id, b"", end=True)
    reply = client.reply(stream_id).expect(OK)
    some = responses(reply)
    assert numbers(some) == list(range(50))
    assert [one.infer_response.id for one in some] == [str(i) for i in range(50)]
    assert {one.error_message for one in some} == {""}
    assert reply.shape[0] == "HEADERS"
    assert reply.shape[-1] == "HEADERS+END"


def test_every_response_says_that_it_is_the_last_of_its_request(client: Http2) -> None:
    stream_id = client.open(STREAM_INFER)
    requests = [infer_request(), infer_request("nobody"), infer_request()]
    requests[2].parameters["triton_enable_empty_final_response"].bool_param = True
    client.data(stream_id, b"".join(map(framed, requests)), end=True)
    some = responses(client.reply(stream_id).expect(OK))
    assert len(some) == 3
    for one in some:
        assert one.infer_response.parameters["triton_final_response"].bool_param is True


def test_an_error_stays_inside_the_stream(server: Server, client: Http2) -> None:
    server.add(model_settings("fails", max_batch_size=1), script="fail-on:1")
    failing = infer_request("fails", id="bad row")
    failing.raw_input_contents[0] = b"\x01" + bytes(15)
    wrong = infer_request(id="bad shape")
    wrong.inputs[0].shape[1] = 5
    stream_id = client.open(STREAM_INFER)
    requests = [infer_request(id="1"), wrong, infer_request("nobody", id="who"), failing, infer_request(id="2")]
    client.data(stream_id, b"".join(map(framed, requests)), end=True)
    good, shape, unknown, row, last = responses(client.reply(stream_id).expect(OK))
    assert good.error_message == last.error_message == ""
    assert numbers([good, last]) == [1.0, 1.0]
    assert "'X'" in shape.error_message
    assert "'nobody'" in unknown.error_message
    assert "told to fail" in row.error_message
    assert [one.infer_response.id for one in (good, shape, unknown, row, last)] == [
        "1",
        "bad shape",
        "who",
        "bad row",
        "2",
    ]
    assert (row.infer_response.model_name, row.infer_response.model_version) == ("fails", "1")
    assert unknown.infer_response.model_name == "nobody"
    assert not row.infer_response.outputs
    check_works(client)


def test_with_triton_grpc_error_the_first_failure_ends_the_stream(server: Server, client: Http2) -> None:
    stream_id = client.new_stream()

    client.frame(client.headers_frame(stream_id, [*request_headers(STREAM_INFER), ("triton_grpc_error", "true")]))
    requests = [infer_request(values=[1, 0, 0, 0]), infer_request("nobody"), infer_request(values=[3, 0, 0, 0])]
    client.data(stream_id, b"".join(map(framed, requests)))
    reply = client.reply(stream_id)
    reply.expect(NOT_FOUND, "'nobody'")
    assert numbers(responses(reply)) == [1]
    check_works(client)


@pytest.mark.parametrize("value", ["false", "True", "1", ""])
def test_any_other_value_of_triton_grpc_error_means_no(client: Http2, value: str) -> None:
    stream_id = client.new_stream()

    client.frame(client.headers_frame(stream_id, [*request_headers(STREAM_INFER), ("triton_grpc_error", value)]))
    client.data(stream_id, framed(infer_request("nobody")), end=True)
    (one,) = responses(client.reply(stream_id).expect(OK))
    assert "'nobody'" in one.error_message


def test_a_message_that_is_none_ends_the_stream(client: Http2) -> None:
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, framed(infer_request()) + framed(b"\xff\xff\xff") + framed(infer_request()))
    reply = client.reply(stream_id)
    reply.expect(INTERNAL)
    assert len(reply.messages) == 1
    check_works(client)


def test_an_empty_stream_ends_well(client: Http2) -> None:
    reply = client.reply(client.open(STREAM_INFER, end=True))
    reply.expect(OK)
    assert reply.messages == []
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, b"", end=True)
    client.reply(stream_id).expect(OK)


def test_a_conversation_goes_back_and_forth(client: Http2) -> None:
    stream_id = client.open(STREAM_INFER)
    for i in range(20):
        client.data(stream_id, framed(infer_request(values=[i, 0, 0, 0])))
        assert numbers(read_messages(client, stream_id, i + 1)) == list(range(i + 1))
    client.data(stream_id, b"", end=True)
    client.reply(stream_id).expect(OK)


def test_half_close_waits_for_what_is_outstanding(server: Server, client: Http2) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, b"".join(framed(infer_request("held", [i, 0, 0, 0])) for i in range(5)), end=True)
    client.sync()
    assert not client.replies[stream_id].over
    held.release(2)
    assert numbers(read_messages(client, stream_id, 2)) == [0, 1]
    held.release(3)
    reply = client.reply(stream_id).expect(OK)
    assert numbers(responses(reply)) == [0, 1, 2, 3, 4]


def test_streams_do_not_wait_for_one_another(server: Server, client: Http2) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    slow, fast = client.open(STREAM_INFER), client.open(STREAM_INFER)
    client.data(slow, framed(infer_request("held")))
    client.data(fast, framed(infer_request(values=[7, 0, 0, 0])), end=True)
    assert numbers(responses(client.reply(fast).expect(OK))) == [7]
    client.data(slow, framed(infer_request(values=[8, 0, 0, 0])), end=True)
    client.sync()
    assert client.replies[slow].data == b""  # the second answer is ready and waits for the first
    held.release(1)
    assert numbers(responses(client.reply(slow).expect(OK))) == [1, 8]


def test_a_cancel_in_the_middle_drops_all_that_is_left(server: Server, client: Http2) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, b"".join(framed(infer_request("held", [i, 0, 0, 0])) for i in range(6)))
    client.sync()
    held.release(1)
    assert numbers(read_messages(client, stream_id, 1)) == [0]
    eventually(lambda: held.queue_view()["running_rows"] == 1, "the second one runs")
    client.reset(stream_id)
    client.sync()
    assert held.queue_view()["waiting"] == 0
    held.release(100)
    server.retire("held", "1")
    assert held.statistics().execution_count == 2
    check_works(client)


def test_a_deadline_ends_a_stream_and_its_work(server: Server, client: Http2) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    stream_id = client.open(STREAM_INFER, grpc_timeout="50m")
    client.data(stream_id, framed(infer_request()) + framed(infer_request("held")) + framed(infer_request("held")))
    reply = client.reply(stream_id)
    reply.expect(DEADLINE_EXCEEDED)
    assert len(reply.messages) == 1
    assert held.queue_view()["waiting"] == 0
    held.release(2)
    check_works(client)


def test_grpcio_streams_in_both_directions(server: Server) -> None:
    outgoing: queue.Queue[bytes | None] = queue.Queue()
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        call = channel.stream_stream(STREAM_INFER)(iter(outgoing.get, None))
        for i in range(10):
            outgoing.put(infer_request(values=[i, 0, 0, 0]).SerializeToString())
            assert numbers([pb.ModelStreamInferResponse.FromString(next(call))]) == [i]
        outgoing.put(None)
        assert list(call) == []
        assert call.code() is grpc.StatusCode.OK


def test_tritonclient_streams(server: Server) -> None:
    got: queue.Queue[Any] = queue.Queue()
    with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        client.start_stream(lambda result, error: got.put(error or result))
        for i in range(10):
            tensor = InferInput("X", [2, 4], "FP32")
            tensor.set_data_from_numpy(np.full((2, 4), i, "f4"))
            client.async_stream_infer("echo" if i != 5 else "nobody", [tensor], request_id=str(i))
        for i in range(10):
            one = got.get(timeout=10)
            if i == 5:
                assert isinstance(one, InferenceServerException)
                assert "nobody" in one.message()
            else:
                assert one.as_numpy("Y").tolist() == [[i] * 4] * 2
                assert one.get_response().id == str(i)
        client.stop_stream()


def test_a_cancelled_stream_of_tritonclient_leaves_nothing(server: Server) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    ended = threading.Event()
    with InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        client.start_stream(lambda result, error: ended.set())
        tensor = InferInput("X", [1, 4], "FP32")
        tensor.set_data_from_numpy(np.zeros((1, 4), "f4"))
        for _ in range(4):
            client.async_stream_infer("held", [tensor])
        held.wait_waiting(3)
        client.stop_stream(cancel_requests=True)
        held.wait_waiting(0)
    held.release(10)


def test_statuses_of_a_stream_are_those_of_a_single_call(client: Http2) -> None:
    wrong = infer_request()
    wrong.inputs[0].datatype = "FP64"
    single = client.infer(wrong)
    single.expect(INVALID_ARGUMENT)
    stream_id = client.open(STREAM_INFER)
    client.data(stream_id, framed(wrong), end=True)
    (one,) = responses(client.reply(stream_id).expect(OK))
    assert one.error_message == single.message


def test_a_stream_may_be_opened_by_many_clients(serve: Callable[..., Server], connect: Callable[..., Http2]) -> None:
    server = serve(io_threads=2)
    server.add()
    clients = [connect(server) for _ in range(8)]
    streams = [client.open(STREAM_INFER) for client in clients]
    for i in range(5):
        for client, stream_id in zip(clients, streams, strict=True):
            client.data(stream_id, framed(infer_request(values=[i, 0, 0, 0])))
    for client, stream_id in zip(clients, streams, strict=True):
        client.data(stream_id, b"", end=True)
        assert numbers(responses(client.reply(stream_id).expect(OK))) == list(range(5))
