"""The locustfile against a real server: its users get answers, and a failure is one in locust's eyes."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from loadtests import models
from loadtests.machine import ROOT
from server.demo.exposition import samples_of
from server.demo.process import ServeProcess


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServeProcess]:
    folder = tmp_path_factory.mktemp("locust")
    models.put(folder / "models", "mlp", models.mlp())
    with ServeProcess(folder / "models", folder / "serve.log") as running:
        yield running


def locust(server: ServeProcess, *flags: str, as_json: bool = True) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "-u", "2", "-r", "2"]
    command += ["-t", "3s", "--host", server.grpc_address, *flags]
    command += ["--json"] if as_json else []
    # A process of its own: locust replaces what the standard library does with sockets and threads.
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def figures(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    (found,) = json.loads(done.stdout)
    assert (found["name"], found["method"]) == ("mlp", "ModelInfer")
    return dict(found)


def test_users_find_the_model_and_every_request_is_answered(server: ServeProcess) -> None:
    done = locust(server)
    assert done.returncode == 0, done.stderr
    found = figures(done)
    assert found["num_requests"] > 10
    assert found["num_failures"] == 0
    # locust drops what is in flight at the end: at most one request a user.
    counted = samples_of(server.metrics_text()).total("nv_inference_request_success", model="mlp")
    assert found["num_requests"] <= counted <= found["num_requests"] + 2


def test_a_request_that_the_server_refuses_is_a_failure_with_its_message(server: ServeProcess) -> None:
    # Not as JSON: that leaves out the table of errors.
    done = locust(server, "--model", "mlp", "--rows", "100", as_json=False)
    assert done.returncode == 1
    assert "InferFailed(\"[StatusCode.INVALID_ARGUMENT] model 'mlp', input 'x'" in done.stdout + done.stderr


def test_a_model_that_is_not_there_ends_the_run_and_is_told(server: ServeProcess) -> None:
    done = locust(server, "--model", "nobody")
    assert done.returncode == 1
    assert "unknown model 'nobody'" in done.stderr
