"""Drives a running server with locust: users that ask over gRPC, through tritonclient.

    locust -f loadtests/locustfile.py --headless -u 8 -r 8 -t 10s --host 127.0.0.1:8001 --model digits

What a request looks like is asked of the server: every input is filled with numbers from a fixed seed, `--rows` of them
where the model has a batch dimension. locust's own figures count from when a user sent its request, one at a time: it
is a closed loop, and Python takes most of the time. For what the server can do there is `make bench`.
"""

from __future__ import annotations

import logging
import time
from typing import Any

import gevent
import numpy as np
import tritonclient.grpc as triton
from grpc.experimental import gevent as grpc_gevent
from locust import User, constant, events, task
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.exception import StopUser
from tritonclient.utils import triton_to_np_dtype

# Without this a call in one user stops all others.
grpc_gevent.init_gevent()

_LOG = logging.getLogger(__name__)

DEFAULT_HOST = "127.0.0.1:8001"
SEED = 7


@events.init_command_line_parser.add_listener
def _add_arguments(parser: LocustArgumentParser) -> None:
    group = parser.add_argument_group("Tidegate")
    group.add_argument("--model", default="", env_var="LOCUST_MODEL", help="which model; default: the first READY one")
    group.add_argument("--rows", type=int, default=1, env_var="LOCUST_ROWS", help="rows of a request")
    group.add_argument("--timeout-s", type=float, default=10.0, env_var="LOCUST_TIMEOUT_S", help="of a request")


@events.init.add_listener
def _let_requests_finish(environment: Environment, **_: Any) -> None:
    # Users that are ended inside a call would make the server count requests that locust does not.
    environment.stop_timeout = max(environment.stop_timeout or 0.0, environment.parsed_options.timeout_s)


def first_ready(client: triton.InferenceServerClient) -> str:
    """The name of a model that serves. Raises LookupError when none does."""
    for row in client.get_model_repository_index().models:
        if row.state == "READY":
            return str(row.name)
    raise LookupError("no model of this server is READY: name one with --model to see why")


def inputs_for(client: triton.InferenceServerClient, model: str, rows: int) -> list[triton.InferInput]:
    """The tensors of one request. Free dimensions other than the batch are 1; text is digits."""
    config = client.get_model_config(model).config
    random = np.random.default_rng(SEED)
    inputs = []
    for tensor in client.get_model_metadata(model).inputs:
        shape = [max(1, dim) for dim in tensor.shape]
        if config.max_batch_size > 0:
            shape[0] = rows
        dtype = triton_to_np_dtype(tensor.datatype)
        values: Any = random.integers(0, 10, shape)
        values = values.astype(str).astype(np.object_) if dtype == np.object_ else values.astype(dtype)
        inputs.append(triton.InferInput(tensor.name, shape, tensor.datatype).set_data_from_numpy(values))
    return inputs


class InferFailed(Exception):
    """A request failed. locust's table of errors shows arguments, which tritonclient's exceptions have none of."""


class InferUser(User):
    """Sends a request, waits for the answer, sends the next."""

    host = DEFAULT_HOST
    wait_time = constant(0)

    def on_start(self) -> None:
        """Connects and learns what a request looks like."""
        options = self.environment.parsed_options
        self._timeout_s = options.timeout_s
        self._client = triton.InferenceServerClient(self.host.removeprefix("http://"))
        try:
            self._model = options.model or first_ready(self._client)
            self._inputs = inputs_for(self._client, self._model, options.rows)
        except (triton.InferenceServerException, LookupError) as why:
            # No user can do better: the run ends, with an exit code that says so.
            _LOG.error("%s", why)
            self.environment.process_exit_code = 1
            gevent.spawn(self.environment.runner.quit)
            raise StopUser from why

    def on_stop(self) -> None:
        """Disconnects."""
        # The client closes itself when it goes. Left to the end of the process, that may wait for ever: grpcio then has
        # no gevent any more.
        del self._client

    @task
    def infer(self) -> None:
        """One request; its failure is one in locust's table, with the gRPC status and message."""
        began, error, size = time.perf_counter(), None, 0
        try:
            answer = self._client.infer(self._model, self._inputs, client_timeout=self._timeout_s)
            size = answer.get_response().ByteSize()
        except triton.InferenceServerException as why:
            error = InferFailed(str(why))
        self.environment.events.request.fire(
            request_type="ModelInfer",
            name=self._model,
            response_time=1e3 * (time.perf_counter() - began),
            response_length=size,
            exception=error,
        )
