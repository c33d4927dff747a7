"""The health check of containers, against a gRPC server of somebody else."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from concurrent import futures

import grpc
import pytest
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from server.healthcheck import main

SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def address() -> Iterator[str]:
    server = grpc.server(futures.ThreadPoolExecutor(1))
    servicer = health.HealthServicer()
    servicer.set("", SERVING)
    servicer.set("asleep", NOT_SERVING)
    health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_a_serving_server_is_healthy(address: str) -> None:
    assert main([address]) == 0


def test_what_does_not_serve_is_told(address: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([address, "asleep"]) == 1
    assert "NOT_SERVING" in capsys.readouterr().err
    assert main([address, "nobody"]) == 1
    assert "NOT_FOUND" in capsys.readouterr().err


def test_nobody_there_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as bound:  # bound and not listening: nobody can be there
        bound.bind(("127.0.0.1", 0))
        assert main([f"127.0.0.1:{bound.getsockname()[1]}"]) == 1
    assert "UNAVAILABLE" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [[], ["a", "b", "c"]])
def test_bad_usage_is_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    assert "usage:" in capsys.readouterr().err
