"""Stock clients, unchanged: tritonclient's sync, callback and asyncio forms, and grpcio's own."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import numpy as np
import pytest
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient.utils import InferenceServerException

from tests.wire.harness import INFER, Server, eventually, infer_request, model_settings, values_of


def inputs_of(value: float, rows: int = 2) -> list[Any]:
    tensor = triton.InferInput("X", [rows, 4], "FP32")
    tensor.set_data_from_numpy(np.full((rows, 4), value, "f4"))
    return [tensor]


@pytest.mark.parametrize("compression", [None, "gzip", "deflate"])
def test_tritonclient_infers(server: Server, compression: str | None) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        outputs = [triton.InferRequestedOutput("Y")]
        result = client.infer(
            "echo", inputs_of(7), "1", outputs, request_id="id", compression_algorithm=compression, client_timeout=10
        )
        assert result.as_numpy("Y").tolist() == [[7] * 4] * 2
        assert (result.get_response().id, result.get_response().model_version) == ("id", "1")


def test_tritonclient_reads_our_refusals(server: Server) -> None:
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InferenceServerException, match="unknown model 'nobody'") as caught:
            client.infer("nobody", inputs_of(1))
        assert caught.value.status() == "StatusCode.NOT_FOUND"
        with pytest.raises(InferenceServerException, match="9 rows; expected 1 to 8") as caught:
            client.infer("echo", inputs_of(1, rows=9))
        assert caught.value.status() == "StatusCode.INVALID_ARGUMENT"


def test_tritonclient_calls_back(server: Server) -> None:
    got: queue.Queue[tuple[Any, Any]] = queue.Queue()
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        for i in range(50):
            client.async_infer("echo", inputs_of(i), lambda result, error: got.put((result, error)))
        answers = [got.get(timeout=10) for _ in range(50)]
    assert [error for _, error in answers if error] == []
    assert sorted(result.as_numpy("Y")[0][0] for result, _ in answers) == list(range(50))


def test_a_call_that_tritonclient_cancels_is_not_run(server: Server) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    got: queue.Queue[Any] = queue.Queue()
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        calls = [
            client.async_infer("held", inputs_of(i, rows=1), lambda result, error: got.put(error)) for i in range(3)
        ]
        held.wait_waiting(2)
        for call in calls:
            call.cancel()
        assert {got.get(timeout=10).status() for _ in calls} == {"StatusCode.CANCELLED"}
        held.wait_waiting(0)
    held.release(10)
    server.retire("held", "1")
    assert held.statistics().execution_count == 1


def test_the_timeout_of_a_client_is_our_deadline(server: Server) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    with triton.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        with pytest.raises(InferenceServerException) as caught:
            client.infer("held", inputs_of(1, rows=1), client_timeout=0.05)
        assert caught.value.status() == "StatusCode.DEADLINE_EXCEEDED"
    held.release(1)


async def test_tritonclient_of_asyncio_infers_and_streams(server: Server) -> None:
    async with triton_aio.InferenceServerClient(f"127.0.0.1:{server.port}") as client:
        results = await asyncio.gather(*(client.infer("echo", inputs_of(i)) for i in range(20)))
        assert [result.as_numpy("Y")[1][3] for result in results] == list(range(20))

        async def requests() -> AsyncIterator[dict[str, Any]]:
            for i in range(10):
                yield {"model_name": "echo", "inputs": inputs_of(i), "request_id": str(i)}

        seen = []
        async for result, error in client.stream_infer(requests()):
            assert error is None
            seen.append((result.get_response().id, result.as_numpy("Y")[0][0]))
        assert seen == [(str(i), i) for i in range(10)]


async def test_grpcio_of_asyncio_infers_and_cancels(server: Server) -> None:
    held = server.add(model_settings("held", max_batch_size=1), script="hold")
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        infer = channel.unary_unary(INFER)
        answers = await asyncio.gather(*(infer(infer_request(values=[i] * 4).SerializeToString()) for i in range(50)))
        assert [values_of(answer)[0] for answer in answers] == list(range(50))
        calls = [infer(infer_request("held").SerializeToString()) for _ in range(3)]
        await asyncio.to_thread(held.wait_waiting, 2)
        for call in calls:
            call.cancel()
        for call in calls:
            with pytest.raises(asyncio.CancelledError):
                await call
        await asyncio.to_thread(held.wait_waiting, 0)
    held.release(10)


@pytest.mark.parametrize(
    "compression", [grpc.Compression.Gzip, grpc.Compression.Deflate, grpc.Compression.NoCompression]
)
def test_grpcio_compresses(server: Server, compression: grpc.Compression) -> None:
    address = f"127.0.0.1:{server.port}"
    with grpc.insecure_channel(address, compression=compression) as channel:
        request = infer_request(values=[3.0] * 32).SerializeToString()
        answer, call = channel.unary_unary(INFER).with_call(request)
        assert values_of(answer) == [3.0] * 32
        assert ("x-model-version", "1") in call.trailing_metadata()


def test_a_client_that_retries_comes_back_after_the_pushback(server: Server) -> None:
    """With a retry policy grpcio itself obeys grpc-retry-pushback-ms: UNAVAILABLE now, answered once it is ready."""
    server.publish()
    server.frontend.publish([])
    config = """{"methodConfig": [{"name": [{}], "retryPolicy": {"maxAttempts": 5, "initialBackoff": "0.01s",
        "maxBackoff": "0.01s", "backoffMultiplier": 1, "retryableStatusCodes": ["NOT_FOUND"]}}]}"""
    options = [("grpc.service_config", config), ("grpc.enable_retries", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options) as channel:
        call = channel.unary_unary(INFER).future(infer_request().SerializeToString(), timeout=20)
        eventually(lambda: server.count("calls") >= 1, "the first attempt has come")
        server.publish()
        assert values_of(call.result()) == [1, 2, 3, 4]
    assert server.count("calls") >= 2
