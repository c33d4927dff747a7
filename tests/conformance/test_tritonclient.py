"""An unchanged tritonclient: every datatype, shape and option that it can send, and the answers that it reads."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    A_WHILE,
    PATIENCE_S,
    Code,
    Served,
    array_of,
    countdown_request,
    eventually,
    infer_request,
    int64_rows,
    metric,
    occupy,
    refused,
    triton_input,
    waiting,
)

# Strict: what waits for as long as here would otherwise have been lifted to the highest level.
PRIORITIES = (
    "dynamic_batching { priority_levels: 2 default_priority_level: 2 } "
    "parameters { key: 'tidegate_priority_aging_us' value { string_value: '0' } }"
)


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    for datatype in models.ELEMENT_TYPES:
        models.put(root, f"identity_{datatype.lower()}", models.identity(datatype))
    models.put(root, "sum", models.sum_and_difference())
    models.put(root, "mlp", models.perceptron())
    models.put(root, "scalar", models.add(1, ()))
    models.put(root, "fixed", models.add(1, (2, 3)))
    models.put(root, "picture", models.row_sums())
    models.put(
        root,
        "reshaped",
        models.identity("INT32", ("batch", 2, 3)),
        config="max_batch_size: 8 input { name: 'x' data_type: TYPE_INT32 dims: [ 6 ] reshape { shape: [ 2, 3 ] } } "
        "output { name: 'y' data_type: TYPE_INT32 dims: [ 3, 2 ] reshape { shape: [ 2, 3 ] } }",
    )
    for name in ("cancelled", "late", "timed_out", "prioritized", "cut"):
        # One request is one batch, so that what waits behind it waits.
        config = f"max_batch_size: 1 {PRIORITIES}" if name == "prioritized" else "max_batch_size: 1"
        models.put(root, name, models.countdown(is_batched=True), config=config)
    for version in ("1.4.0", "1.10.3", "2.0.0", "7"):
        models.put(root, "versions", models.add(int(version[0])), version=version, config="version_policy { all {} }")
    for version in ("1", "2"):
        models.put(root, "latest", models.add(int(version)), version=version)
    models.put(root, "broken", b"not a model")
    return serve_module(root)


@pytest.fixture(scope="module")
def client(served: Served) -> triton.InferenceServerClient:
    return served.triton()


@pytest.fixture
async def aio_client(served: Served) -> AsyncIterator[triton_aio.InferenceServerClient]:
    async with triton_aio.InferenceServerClient(served.grpc_address) as client:
        yield client


def int64_input(*numbers: int, name: str = "x") -> triton.InferInput:
    return triton_input(name, int64_rows(*numbers), "INT64")


def countdown_inputs(number: int, steps: int) -> list[triton.InferInput]:
    return [int64_input(number), int64_input(steps, name="steps")]


# -- tensors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3, 64])
@pytest.mark.parametrize("datatype", list(models.ELEMENT_TYPES))
def test_every_datatype_comes_back_bit_by_bit(client: Any, datatype: str, rows: int) -> None:
    sent = models.values(datatype, (rows, 5), seed=rows)
    result = client.infer(f"identity_{datatype.lower()}", [triton_input("x", sent, datatype)])
    output = result.get_output("y")
    assert (output.datatype, list(output.shape)) == (datatype, [rows, 5])
    received = result.as_numpy("y")
    assert received.dtype == sent.dtype
    assert received.tolist() == sent.tolist() if datatype == "BYTES" else received.tobytes() == sent.tobytes()


def test_strings_of_no_elements_and_of_a_megabyte_come_back(client: Any) -> None:
    empty = np.empty((2, 0), object)
    assert client.infer("identity_bytes", [triton_input("x", empty, "BYTES")]).as_numpy("y").shape == (2, 0)
    large = np.array([[b"\0\xff" * 500_000, b""]], object)
    assert client.infer("identity_bytes", [triton_input("x", large, "BYTES")]).as_numpy("y").tolist() == large.tolist()


def test_a_tensor_without_elements_comes_back(client: Any) -> None:
    for datatype in ("FP32", "INT8"):
        sent = models.values(datatype, (3, 0))
        received = client.infer(f"identity_{datatype.lower()}", [triton_input("x", sent, datatype)]).as_numpy("y")
        assert received.shape == (3, 0)


def test_nan_infinity_and_negative_zero_keep_their_bits(client: Any) -> None:
    bits = np.array([[0x7FC00001, 0xFF800000, 0x80000000, 0x00000001]], np.uint32)
    received = client.infer("identity_fp32", [triton_input("x", bits.view(np.float32), "FP32")]).as_numpy("y")
    assert received.view(np.uint32).tolist() == bits.tolist()


def test_several_inputs_in_any_order_and_several_outputs(client: Any) -> None:
    a, b = models.values("INT32", (4, 4), 1), models.values("INT32", (4, 4), 2)
    inputs = [triton_input("B", b, "INT32"), triton_input("A", a, "INT32")]
    result = client.infer("sum", inputs)
    assert [output.name for output in result.get_response().outputs] == ["SUM", "DIFF"]
    assert result.as_numpy("SUM").tolist() == (a + b).tolist()
    assert result.as_numpy("DIFF").tolist() == (a - b).tolist()


@pytest.mark.parametrize("wanted", [["DIFF"], ["SUM"], ["DIFF", "SUM"]])
def test_only_requested_outputs_are_sent(client: Any, wanted: list[str]) -> None:
    a = models.values("INT32", (1, 4))
    outputs = [triton.InferRequestedOutput(name) for name in wanted]
    result = client.infer("sum", [triton_input("A", a, "INT32"), triton_input("B", a, "INT32")], outputs=outputs)
    assert {output.name for output in result.get_response().outputs} == set(wanted)
    assert len(result.get_response().raw_output_contents) == len(wanted)
    for name in wanted:
        assert result.as_numpy(name).tolist() == (a + a if name == "SUM" else a - a).tolist()


def test_a_model_of_scalars_takes_one_element(client: Any) -> None:
    result = client.infer("scalar", [triton_input("x", np.array([41], np.int64), "INT64")])
    assert result.as_numpy("y").tolist() == [42]


def test_a_model_without_a_batch_dimension_takes_its_own_shape(client: Any) -> None:
    sent = np.arange(6, dtype=np.int64).reshape(2, 3)
    assert client.infer("fixed", [triton_input("x", sent, "INT64")]).as_numpy("y").tolist() == (sent + 1).tolist()


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 7, 3), (5, 3, 7)])
def test_free_dimensions_take_any_size(client: Any, shape: tuple[int, ...]) -> None:
    sent = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    result = client.infer("picture", [triton_input("x", sent, "FP32")])
    # A dimension is added where the model gives one number per row: a configuration cannot say "none".
    assert result.as_numpy("total").tolist() == sent.sum(axis=(1, 2)).reshape(-1, 1).tolist()


def test_reshape_turns_the_clients_dimensions_into_the_models_and_back(client: Any) -> None:
    sent = np.arange(12, dtype=np.int32).reshape(2, 6)
    received = client.infer("reshaped", [triton_input("x", sent, "INT32")]).as_numpy("y")
    assert received.tolist() == sent.reshape(2, 3, 2).tolist()


# -- batches -----------------------------------------------------------------------------------------------------------


def ulps(a: np.ndarray, b: np.ndarray) -> int:
    """How many FP32 numbers lie between the two, at most. REQUIRES: both are positive."""
    return int(np.abs(a.view(np.int32).astype(np.int64) - b.view(np.int32).astype(np.int64)).max())


def test_answers_of_a_batch_of_requests_equal_single_answers(served: Served) -> None:
    stub = served.stub()
    a, b = models.values("INT32", (64, 4), 1), models.values("INT32", (64, 4), 2)
    x = models.values("FP32", (64, 16), 3)

    def request(row: int, rows: int = 1) -> list[Any]:
        span = slice(row, row + rows)
        return [
            infer_request("sum", ("A", "INT32", a[span]), ("B", "INT32", b[span])),
            infer_request("mlp", ("x", "FP32", x[span])),
        ]

    def answers(replies: list[Any], names: list[tuple[str, Any]]) -> list[np.ndarray]:
        return [np.concatenate([array_of(reply, name, dtype) for reply in replies]) for name, dtype in names]

    integer, real = [("SUM", np.int32), ("DIFF", np.int32)], [("probabilities", np.float32)]
    single = [[stub.ModelInfer(one, timeout=PATIENCE_S) for one in request(row)] for row in range(64)]
    before = {name: served.metrics() for name in ("sum", "mlp")}
    # All at once, in requests of 1 to 7 rows: the batcher puts them together as they come.
    sizes = [1, 2, 3, 4, 5, 6, 7] * 2 + [4, 4]
    starts = np.cumsum([0, *sizes[:-1]])
    futures = [
        [stub.ModelInfer.future(one, timeout=PATIENCE_S) for one in request(int(row), size)]
        for row, size in zip(starts, sizes, strict=True)
    ]
    together = [[future.result() for future in pair] for pair in futures]
    for index, names in enumerate((integer, real)):
        alone = answers([pair[index] for pair in single], names)
        shared = answers([pair[index] for pair in together], names)
        for one, other in zip(alone, shared, strict=True):
            if index == 0:
                assert one.tolist() == other.tolist()
            else:
                assert ulps(one, other) <= 4
    after = served.metrics()
    labels = {"model": "sum", "version": "1"}
    rows = metric(after, "nv_inference_count", **labels) - metric(before["sum"], "nv_inference_count", **labels)
    assert rows == 64


def test_one_request_of_many_rows_equals_its_rows(client: Any) -> None:
    x = models.values("FP32", (64, 16), 4)
    whole = client.infer("mlp", [triton_input("x", x, "FP32")]).as_numpy("probabilities")
    rows = [client.infer("mlp", [triton_input("x", x[i : i + 1], "FP32")]).as_numpy("probabilities") for i in range(64)]
    assert ulps(whole, np.concatenate(rows)) <= 4


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "answers"),
    [
        ("", "7"),
        ("7", "7"),
        ("1.4.0", "1.4.0"),
        ("1.10.3", "1.10.3"),
        ("2.0.0", "2.0.0"),
        ("^1.4", "1.10.3"),
        ("~1.4", "1.4.0"),
        (">=1.0 <3", "2.0.0"),
        (">2", "7"),
    ],
)
def test_a_version_is_found_and_the_reply_names_it_exactly(client: Any, asked: str, answers: str) -> None:
    result = client.infer("versions", [int64_input(10)], model_version=asked)
    assert result.get_response().model_version == answers
    assert result.as_numpy("y").tolist() == [[10 + int(answers[0])]]
    assert client.is_model_ready("versions", asked)


@pytest.mark.parametrize("asked", ["3", "1.4.1", "^3.0", "stable", "1.4.0 ", "v7", "-1", "07"])
def test_a_version_that_nothing_names_is_not_found(client: Any, asked: str) -> None:
    message = refused(
        Code.NOT_FOUND, lambda: client.infer("versions", [int64_input(1)], model_version=asked), "versions", asked
    )
    assert "1.10.3" in message, "it names what is live"
    assert not client.is_model_ready("versions", asked)


def test_a_version_that_is_known_and_not_loaded_is_unavailable(client: Any) -> None:
    assert client.infer("latest", [int64_input(1)]).get_response().model_version == "2"
    refused(Code.UNAVAILABLE, lambda: client.infer("latest", [int64_input(1)], model_version="1"), "latest", "1")


def test_a_model_that_failed_to_load_is_unavailable_and_says_why(client: Any) -> None:
    refused(Code.UNAVAILABLE, lambda: client.infer("broken", [int64_input(1)]), "broken", "not ready", "corrupt")
    refused(Code.UNAVAILABLE, lambda: client.infer("broken", [int64_input(1)], model_version="1"), "broken")
    refused(Code.NOT_FOUND, lambda: client.infer("broken", [int64_input(1)], model_version="2"), "broken")


def test_the_trailers_name_the_version(served: Served) -> None:
    stub = served.stub()
    request = infer_request("versions", ("x", "INT64", int64_rows(1)), version="^1.4")
    _, call = stub.ModelInfer.with_call(request, timeout=PATIENCE_S)
    assert dict(call.trailing_metadata())["x-model-version"] == "1.10.3"


# -- options of a request ----------------------------------------------------------------------------------------------


def test_a_request_id_comes_back_and_none_stays_none(client: Any) -> None:
    assert client.infer("mlp", mlp_inputs(), request_id="grüße/42").get_response().id == "grüße/42"
    assert client.infer("mlp", mlp_inputs()).get_response().id == ""


def mlp_inputs() -> list[triton.InferInput]:
    return [triton_input("x", models.values("FP32", (2, 16)), "FP32")]


@pytest.mark.parametrize("algorithm", [None, "gzip", "deflate"])
def test_compressed_requests_are_understood(client: Any, algorithm: str | None) -> None:
    expected = client.infer("mlp", mlp_inputs()).as_numpy("probabilities")
    result = client.infer("mlp", mlp_inputs(), compression_algorithm=algorithm)
    assert result.as_numpy("probabilities").tolist() == expected.tolist()


def test_a_compressed_megabyte_comes_back(client: Any) -> None:
    sent = np.zeros((1, 1 << 20), np.float32)
    for algorithm in ("gzip", "deflate"):
        result = client.infer("identity_fp32", [triton_input("x", sent, "FP32")], compression_algorithm=algorithm)
        assert not result.as_numpy("y").any()


def test_headers_and_parameters_of_ones_own_are_accepted(client: Any) -> None:
    result = client.infer(
        "mlp",
        mlp_inputs(),
        headers={"authorization": "Bearer something", "x-trace-bin": b"\x00\xff", "a": ""},
        parameters={"mine": "text", "number": 7, "flag": True, "real": 0.5, "sticky_key": "caller"},
    )
    assert result.as_numpy("probabilities").shape == (2, 5)


def test_parameters_that_a_sequence_needs_are_refused(client: Any) -> None:
    call = lambda: client.infer("mlp", mlp_inputs(), sequence_id=5, sequence_start=True)  # noqa: E731
    refused(Code.UNIMPLEMENTED, call, "mlp", "sequence_id")


def test_a_client_timeout_ends_the_call_and_the_next_is_served(client: Any) -> None:
    with pytest.raises(InferenceServerException) as error:
        client.infer("late", countdown_inputs(1, 200_000), client_timeout=0.1)
    assert "DEADLINE_EXCEEDED" in str(error.value.status()).upper() or "Deadline" in error.value.message()
    assert client.infer("late", countdown_inputs(7, 1)).as_numpy("y").tolist() == [[7]]


def test_a_timeout_parameter_ends_what_waits_too_long_without_running_it(served: Served, client: Any) -> None:
    slow = occupy(served, "timed_out", 1)
    call = lambda: client.infer("timed_out", countdown_inputs(2, 1), timeout=1000)  # noqa: E731
    refused(Code.DEADLINE_EXCEEDED, call, "waited")
    assert array_of(slow.result(PATIENCE_S), "y", np.int64).tolist() == [[1]]
    metrics = served.metrics()
    labels = {"model": "timed_out", "version": "1"}
    assert metric(metrics, "nv_inference_count", **labels) == 1
    assert metric(metrics, "nv_inference_request_failure", **labels, reason="REJECTED") == 1
    assert metric(metrics, "tidegate_shed_total", model="timed_out", reason="DEADLINE_PASSED") == 1


def test_higher_priorities_are_served_first(served: Served) -> None:
    stub = served.stub()
    order: queue.SimpleQueue[int] = queue.SimpleQueue()

    def send(priority: int) -> grpc.Future:
        # Each takes long enough for its answer to be there before the next one's.
        future = stub.ModelInfer.future(countdown_request("prioritized", 1, 5000, priority=priority))
        future.add_done_callback(lambda _: order.put(priority))
        return future

    first = occupy(served, "prioritized", 0)
    futures = [send(priority) for priority in (2, 2, 1, 1)]
    eventually(lambda: waiting(served, "prioritized") == 4, "four requests wait")
    assert [order.get(timeout=PATIENCE_S) for _ in futures] == [1, 1, 2, 2]
    assert array_of(first.result(PATIENCE_S), "y", np.int64).tolist() == [[0]]


def test_a_priority_that_the_model_does_not_have_is_refused(client: Any) -> None:
    call = lambda: client.infer("prioritized", countdown_inputs(1, 1), priority=3)  # noqa: E731
    refused(Code.INVALID_ARGUMENT, call, "priority 3")


# -- asynchronous calls ------------------------------------------------------------------------------------------------


def test_asynchronous_calls_get_their_own_answers(client: Any) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    for number in range(200):
        client.async_infer(
            "versions",
            [int64_input(number * 1000)],
            callback=lambda result, error: answers.put((result, error)),
            request_id=str(number),
        )
    seen = {}
    for _ in range(200):
        result, error = answers.get(timeout=PATIENCE_S)
        assert error is None
        seen[int(result.get_response().id)] = result.as_numpy("y").item()
    assert seen == {number: number * 1000 + 7 for number in range(200)}


def test_a_cancelled_call_leaves_the_queue_and_is_never_run(served: Served, client: Any) -> None:
    answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
    slow = occupy(served, "cancelled", 1)
    second = client.async_infer(
        "cancelled", countdown_inputs(2, 1), callback=lambda result, error: answers.put((result, error))
    )
    eventually(lambda: waiting(served, "cancelled") == 1, "the second request waits")
    second.cancel()
    result, error = answers.get(timeout=PATIENCE_S)
    assert result is None
    assert error.status() == "StatusCode.CANCELLED"
    eventually(lambda: waiting(served, "cancelled") == 0, "the second request has left the queue")
    assert array_of(slow.result(PATIENCE_S), "y", np.int64).tolist() == [[1]]
    metrics = served.metrics()
    labels = {"model": "cancelled", "version": "1"}
    assert metric(metrics, "nv_inference_count", **labels) == 1
    assert metric(metrics, "nv_inference_request_success", **labels) == 1
    assert metric(metrics, "nv_inference_request_failure", **labels, reason="CANCELED") == 1


async def test_asyncio_calls_get_their_own_answers(aio_client: Any) -> None:
    async def ask(number: int) -> int:
        result = await aio_client.infer(
            "versions", [int64_input(number)], model_version="2.0.0", request_id=f"{number}"
        )
        assert result.get_response().id == f"{number}"
        return int(result.as_numpy("y").item())

    assert await asyncio.gather(*map(ask, range(100))) == [number + 2 for number in range(100)]


async def test_an_asyncio_client_sees_errors_compression_and_its_timeout(aio_client: Any) -> None:
    result = await aio_client.infer("mlp", mlp_inputs(), compression_algorithm="gzip", client_timeout=PATIENCE_S)
    assert result.as_numpy("probabilities").shape == (2, 5)
    with pytest.raises(InferenceServerException) as unknown:
        await aio_client.infer("nobody", mlp_inputs())
    assert unknown.value.status() == "StatusCode.NOT_FOUND"
    with pytest.raises(InferenceServerException) as late:
        await aio_client.infer("cut", countdown_inputs(1, A_WHILE), client_timeout=0.05)
    assert late.value.status() == "StatusCode.DEADLINE_EXCEEDED"


async def test_an_asyncio_stream_answers_in_order(aio_client: Any) -> None:
    async def requests() -> AsyncIterator[dict[str, Any]]:
        for number in range(50):
            yield {"model_name": "versions", "inputs": [int64_input(number)], "request_id": str(number)}

    got = [
        (result.get_response().id, result.as_numpy("y").item())
        async for result, error in aio_client.stream_infer(requests())
        if error is None
    ]
    assert got == [(str(number), number + 7) for number in range(50)]


# -- streams -----------------------------------------------------------------------------------------------------------


class Stream:
    """A tritonclient's stream; what its callback got comes out of next()."""

    def __init__(self, served: Served, **options: Any) -> None:
        self.client = served.triton()
        self._got: queue.SimpleQueue[tuple[Any, Any]] = queue.SimpleQueue()
        self.client.start_stream(callback=lambda result, error: self._got.put((result, error)), **options)

    def next(self) -> tuple[Any, Any]:
        return self._got.get(timeout=PATIENCE_S)

    def is_empty(self) -> bool:
        return self._got.empty()


@pytest.fixture
def stream(served: Served) -> Iterator[Stream]:
    stream = Stream(served)
    yield stream
    stream.client.stop_stream()


def test_a_stream_answers_in_order_and_each_answer_is_final(stream: Stream) -> None:
    for number in range(100):
        stream.client.async_stream_infer("versions", [int64_input(number)], request_id=str(number))
    for number in range(100):
        result, error = stream.next()
        assert error is None
        response = result.get_response()
        assert (response.id, result.as_numpy("y").item()) == (str(number), number + 7)
        assert response.parameters["triton_final_response"].bool_param is True


def test_an_error_in_a_stream_is_in_band_and_the_stream_goes_on(stream: Stream) -> None:
    stream.client.async_stream_infer("nobody", [int64_input(1)], request_id="a")
    stream.client.async_stream_infer("versions", [int64_input(1)], request_id="b", model_version="9")
    stream.client.async_stream_infer("versions", [int64_input(5)], request_id="c")
    result, error = stream.next()
    assert result is None
    assert "nobody" in error.message()
    result, error = stream.next()
    assert "versions" in error.message()
    assert "'9'" in error.message()
    result, error = stream.next()
    assert error is None
    assert (result.get_response().id, result.as_numpy("y").item()) == ("c", 12)


def test_a_stream_that_asked_for_it_ends_with_a_grpc_error(served: Served) -> None:
    stream = Stream(served, headers={"triton_grpc_error": "true"})
    stream.client.async_stream_infer("versions", [int64_input(5)])
    result, error = stream.next()
    assert error is None
    stream.client.async_stream_infer("nobody", [int64_input(1)])
    result, error = stream.next()
    assert result is None
    assert error.status() == "StatusCode.NOT_FOUND"
    stream.client.stop_stream(cancel_requests=True)


def test_a_stream_asked_for_empty_final_responses_still_answers_once(stream: Stream) -> None:
    stream.client.async_stream_infer("versions", [int64_input(5)], enable_empty_final_response=True)
    stream.client.async_stream_infer("versions", [int64_input(6)], enable_empty_final_response=True)
    for number in (5, 6):
        result, error = stream.next()
        assert error is None
        assert result.as_numpy("y").item() == number + 7
        assert result.get_response().parameters["triton_final_response"].bool_param is True


def test_a_stream_may_be_compressed_and_time_out(served: Served) -> None:
    stream = Stream(served, compression_algorithm="gzip")
    stream.client.async_stream_infer("mlp", mlp_inputs())
    result, error = stream.next()
    assert error is None
    assert result.as_numpy("probabilities").shape == (2, 5)
    stream.client.stop_stream()

    stream = Stream(served, stream_timeout=0.2)
    result, error = stream.next()
    assert result is None
    assert error.status() == "StatusCode.DEADLINE_EXCEEDED"
    stream.client.stop_stream(cancel_requests=True)


def test_stopping_a_stream_waits_for_its_answers(served: Served) -> None:
    stream = Stream(served)
    for number in range(20):
        stream.client.async_stream_infer("versions", [int64_input(number)])
    stream.client.stop_stream()
    assert [stream.next()[0].as_numpy("y").item() for _ in range(20)] == [number + 7 for number in range(20)]


# -- many at once ------------------------------------------------------------------------------------------------------


def test_clients_side_by_side_get_their_own_answers(served: Served) -> None:
    wrong: list[str] = []

    def ask(number: int) -> None:
        with triton.InferenceServerClient(served.grpc_address) as own:
            for i in range(50):
                rows = int64_rows(*range(number * 1000 + i, number * 1000 + i + 1 + i % 5))
                result = own.infer("versions", [triton_input("x", rows, "INT64")], request_id=f"{number}-{i}")
                if result.get_response().id != f"{number}-{i}" or result.as_numpy("y").tolist() != (rows + 7).tolist():
                    wrong.append(f"{number}-{i}")

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert not any(thread.is_alive() for thread in threads)
    assert wrong == []


def test_the_repository_is_as_it_was(served: Served) -> None:
    assert (served.repository / "broken" / "1" / "model.onnx").read_bytes() == b"not a model"
    assert sorted(path.name for path in Path(served.repository / "versions").iterdir()) == [
        "1.10.3", "1.4.0", "2.0.0", "7", "config.pbtxt",
    ]  # fmt: skip
