"""A `tidegate serve` process, the clients that people use, and what every refusal has to be like."""

from __future__ import annotations

import contextlib
import json
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import tritonclient.grpc as triton
from prometheus_client.parser import text_string_to_metric_families
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc
from tritonclient.utils import InferenceServerException

from server.demo.process import ServeProcess

# Longer than anything here takes on a busy machine: reached only by a test that fails.
PATIENCE_S = 30.0

INFER = "/inference.GRPCInferenceService/ModelInfer"

Code = grpc.StatusCode


class Served(ServeProcess):
    """A running server with its repository and clients. Closing it ends the clients and the process."""

    def __init__(self, repository: Path, log: Path, *flags: str, **options: Any) -> None:
        super().__init__(repository, log, flags=flags, **options)
        self.repository = repository
        self._clients = contextlib.ExitStack()
        self._is_ended_elsewhere = False

    def __enter__(self) -> Served:
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._clients.close()
        status = self.stop()
        # A server that a test ended otherwise is that test's business.
        assert self._is_ended_elsewhere or status == 0, f"ended with status {status}:\n{self.log_tail()}"

    def expect_other_end(self) -> None:
        """The test itself looks at how the process ends."""
        self._is_ended_elsewhere = True

    def channel(self, **options: int) -> grpc.Channel:
        """A new connection: channels of the same address and options share one unless told not to."""
        given = [(f"grpc.{name}", number) for name, number in options.items()]
        channel = grpc.insecure_channel(
            self.grpc_address, [*given, ("grpc.use_local_subchannel_pool", 1), ("grpc.enable_retries", 0)]
        )
        return self._clients.enter_context(channel)

    def stub(self, **options: int) -> service_pb2_grpc.GRPCInferenceServiceStub:
        """Every RPC of the inference service on a connection of its own."""
        return service_pb2_grpc.GRPCInferenceServiceStub(self.channel(**options))

    def triton(self) -> triton.InferenceServerClient:
        """A tritonclient as people make it."""
        return self._clients.enter_context(triton.InferenceServerClient(self.grpc_address))

    def log_lines(self) -> list[dict[str, Any]]:
        """The log so far. Raises ValueError when a line of it is no JSON."""
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def metrics(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """(name, labels) -> value, as a scraper reads them."""
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.metrics_text())
            for sample in family.samples
        }


def metric(metrics: Mapping[tuple[str, frozenset[tuple[str, str]]], float], name: str, **labels: str) -> float:
    """One sample of Served.metrics(). KeyError when there is none."""
    # The parser gives counters without `_total` one.
    key = frozenset(labels.items())
    return metrics[name, key] if (name, key) in metrics else metrics[f"{name}_total", key]


def eventually(condition: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Asks until the answer is true and returns it; fails the test after `patience_s`."""
    deadline_s = time.monotonic() + patience_s
    while not (answer := condition()):
        assert time.monotonic() < deadline_s, f"waited {patience_s} s in vain: {what}"
        time.sleep(0.01)
    return answer


# -- requests ----------------------------------------------------------------------------------------------------------


def triton_input(name: str, array: np.ndarray, datatype: str) -> triton.InferInput:
    """A tensor of tritonclient."""
    return triton.InferInput(name, list(array.shape), datatype).set_data_from_numpy(array)


def infer_request(
    model: str, *tensors: tuple[str, str, np.ndarray], version: str = "", request_id: str = "", **more: Any
) -> pb.ModelInferRequest:
    """(name, datatype, array) per input, raw."""
    request = pb.ModelInferRequest(model_name=model, model_version=version, id=request_id, **more)
    for name, datatype, array in tensors:
        request.inputs.add(name=name, datatype=datatype, shape=array.shape)
        request.raw_input_contents.append(np.ascontiguousarray(array).tobytes())
    return request


def array_of(response: pb.ModelInferResponse, name: str, dtype: Any) -> np.ndarray:
    """An output of a reply."""
    index = [tensor.name for tensor in response.outputs].index(name)
    return np.frombuffer(response.raw_output_contents[index], dtype).reshape(response.outputs[index].shape)


def int64_rows(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64).reshape(-1, 1)


# -- a model that is busy ----------------------------------------------------------------------------------------------

# Turns of the countdown model that take two seconds: longer than a client needs, also on a busy machine, to send what
# is to wait behind it.
A_WHILE = 350_000


def countdown_request(model: str, number: int, steps: int, **more: int) -> pb.ModelInferRequest:
    """A request of onnx_models.countdown with rows; `more` are parameters (priority)."""
    request = infer_request(model, ("x", "INT64", int64_rows(number)), ("steps", "INT64", int64_rows(steps)))
    for key, priority in more.items():
        request.parameters[key].uint64_param = priority
    return request


def occupy(served: Served, model: str, number: int) -> grpc.Future:
    """A slow request for number, which the model's only instance runs when this returns."""
    request = countdown_request(model, number, A_WHILE)
    before = metric(served.metrics(), "tidegate_bytes_received_total")
    slow: grpc.Future = served.stub().ModelInfer.future(request)

    def has_come() -> bool:
        return metric(served.metrics(), "tidegate_bytes_received_total") >= before + request.ByteSize()

    eventually(has_come, "the slow request has come")
    eventually(lambda: waiting(served, model) == 0, "the slow request runs")
    return slow


def waiting(served: Served, model: str) -> float:
    """Requests in the queue of the model's version 1."""
    return metric(served.metrics(), "nv_inference_pending_request_count", model=model, version="1")


# -- refusals ----------------------------------------------------------------------------------------------------------

# An absolute path of more than one part. A method's path is the client's own word.
_PATH = re.compile(r"(?<![\w.])/(?!inference\.|grpc\.)[\w.~-]+/")
_SECRETS = ("Traceback", 'File "', ".py", ".cc", ".so", "0x", "std::", "onnxruntime::", "errno")


def assert_discloses_nothing(message: str, *neighbours: str) -> None:
    """No path, no stack, nothing of the server's inside, nothing of the neighbours'."""
    assert not _PATH.search(message), message
    for secret in (*_SECRETS, *neighbours):
        assert secret not in message, message
    assert "\n" not in message, message
    assert len(message) < 2048


def status_of(call: Callable[[], Any]) -> tuple[grpc.StatusCode, str]:
    """Code and message of a call that must fail."""
    try:
        answer = call()
    except grpc.RpcError as error:
        return error.code(), error.details() or ""
    except InferenceServerException as error:
        # KeyError: the client itself refused, and nothing was sent.
        return Code[str(error.status()).removeprefix("StatusCode.")], error.message()
    raise AssertionError(f"not refused, but answered: {answer}")


def refused(code: grpc.StatusCode, call: Callable[[], Any], *words: str, given: str = "") -> str:
    """The message of a call that must fail with `code`, say each of `words` and disclose nothing.

    `given` is what the client itself said and may be told.
    """
    actual, message = status_of(call)
    assert actual is code, f"{actual}: {message}"
    for word in words:
        assert word in message, f"{word!r} is not said in: {message}"
    assert message, "a refusal says why"
    assert_discloses_nothing(message.replace(given, "") if given else message)
    return message


def index_of(stub: service_pb2_grpc.GRPCInferenceServiceStub) -> dict[tuple[str, str], tuple[str, str]]:
    """(model, version) -> (state, reason)."""
    rows = stub.RepositoryIndex(pb.RepositoryIndexRequest(), timeout=PATIENCE_S).models
    return {(row.name, row.version): (row.state, row.reason) for row in rows}
