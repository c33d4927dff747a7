"""The whole data plane over a fake native core: start, ready line, service, drain, in that order."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from protos.gen import grpc_service_pb2 as pb
from protos.gen import health_pb2
from server import app as app_module
from server.app import App, StartError, stopping_on_signals
from server.config import ServeConfig, serve_config
from server.logs import Logs, LogSettings
from server.model_config import Machine
from tests.server.fakes import PATIENCE_S, FakeCall, FakeFrontend, FakeNative, eventually, put_model

INFERENCE = "/inference.GRPCInferenceService/"
CHECK, WATCH = "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"
NOT_SERVING, SERVING = health_pb2.HealthCheckResponse.NOT_SERVING, health_pb2.HealthCheckResponse.SERVING


class Out(io.StringIO):
    """Standard output, with a moment to wait for."""

    def __init__(self) -> None:
        super().__init__()
        self.has_line = threading.Event()

    def flush(self) -> None:
        super().flush()
        self.has_line.set()


class World:
    """An app that runs on a thread of its own."""

    def __init__(self, repository: Path, **flags: str) -> None:
        self.native = FakeNative()
        self.out = Out()
        self.config: ServeConfig = serve_config(
            {"model_repository": str(repository), "metrics_port": "0", "grpc_port": "0", **flags}
        )
        logs = Logs(LogSettings(), self.native.set_log_level, io.StringIO(), logging.Logger("apart"))
        self.app = App(self.config, self.native, Machine(), logs, {"version": "1.2.3", "onnxruntime": "0"})
        self.is_clean: bool | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            self.is_clean = self.app.run(self.out)
        except BaseException as error:  # noqa: BLE001, RUF100 - the test's own thread looks at it
            self.error = error

    def start(self) -> World:
        self._thread.start()
        return self

    def wait_until_ready(self) -> dict[str, Any]:
        assert self.out.has_line.wait(PATIENCE_S)
        line: dict[str, Any] = json.loads(self.out.getvalue())
        return line

    def stop(self) -> bool | None:
        self.app.stop()
        return self.join()

    def join(self) -> bool | None:
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        return self.is_clean

    @property
    def frontend(self) -> FakeFrontend:
        return self.native.frontends[0]

    def status(self, service: str = "") -> int:
        call = self.frontend.ask(CHECK, health_pb2.HealthCheckRequest(service=service).SerializeToString())
        return health_pb2.HealthCheckResponse.FromString(call.sent[0]).status

    def metrics(self) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.app.metrics_port}/metrics", timeout=PATIENCE_S) as answer:
            text: bytes = answer.read()
        return text.decode()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    put_model(tmp_path, "a")
    return tmp_path


@pytest.fixture
def world(repository: Path) -> Iterator[World]:
    world = World(repository).start()
    yield world
    with contextlib.suppress(AssertionError):
        world.stop()


def test_the_ready_line_has_the_ports_and_the_process(world: World) -> None:
    line = world.wait_until_ready()
    assert line == {
        "event": "ready",
        "grpc_port": 12345,
        "metrics_port": world.app.metrics_port,
        "pid": os.getpid(),
    }
    assert world.out.getvalue().count("\n") == 1


def test_it_serves_between_ready_and_stop(world: World) -> None:
    world.wait_until_ready()
    assert world.status() == world.status("a") == SERVING
    ready = world.frontend.ask(INFERENCE + "ServerReady")
    assert pb.ServerReadyResponse.FromString(ready.sent[0]).ready
    metadata = world.frontend.ask(INFERENCE + "ServerMetadata")
    assert pb.ServerMetadataResponse.FromString(metadata.sent[0]).version == "1.2.3"
    assert 'nv_inference_request_success{model="a",version="1"} 0' in world.metrics()
    assert world.stop() is True
    assert [what for what in world.frontend.happened if what != "publish"] == ["start", "drain", "stop"]
    assert all(version.is_retired for version in world.native.versions)
    assert all(session.is_closed for session in world.native.sessions)


def test_before_the_models_are_there_it_is_alive_and_not_ready(repository: Path) -> None:
    may_load = threading.Event()
    world = World(repository)
    world.native.on_session = lambda _tag: may_load.wait(PATIENCE_S) and None
    world.start()
    eventually(lambda: "start" in world.frontend.happened, "the ports are bound")
    live = world.frontend.ask(INFERENCE + "ServerLive")
    assert pb.ServerLiveResponse.FromString(live.sent[0]).live
    ready = world.frontend.ask(INFERENCE + "ServerReady")
    assert not pb.ServerReadyResponse.FromString(ready.sent[0]).ready
    assert world.status() == NOT_SERVING
    assert "nv_cpu_utilization" in world.metrics()
    assert not world.out.has_line.is_set()
    may_load.set()
    world.wait_until_ready()
    assert world.status() == SERVING
    world.stop()


def test_a_model_that_fails_does_not_keep_the_server_from_being_ready(repository: Path) -> None:
    (put_model(repository, "bad") / "model.onnx").write_bytes(b"junk")
    world = World(repository).start()
    world.wait_until_ready()
    assert world.status() == SERVING
    assert world.status("bad") == NOT_SERVING
    world.stop()


def test_a_stop_tells_watchers_first_and_then_ends_them(world: World) -> None:
    world.wait_until_ready()
    call = FakeCall(WATCH)
    world.frontend.event(call, "message", health_pb2.HealthCheckRequest().SerializeToString())
    assert call.has_sent.wait(PATIENCE_S)
    world.stop()
    told = [health_pb2.HealthCheckResponse.FromString(message).status for message in call.sent]
    assert told == [SERVING, NOT_SERVING]
    assert (call.status, call.message) == (14, "the server is stopping")


def test_during_the_grace_it_says_not_serving_and_still_answers(repository: Path) -> None:
    world = World(repository, shutdown_grace="1h").start()
    world.wait_until_ready()
    world.app.stop()
    eventually(lambda: world.status() == NOT_SERVING, "health says so")
    assert world.frontend.ask(INFERENCE + "ServerLive").status == 0
    assert "drain" not in world.frontend.happened
    assert world.native.routed()["a"] == {"1": "a-1"}, "models still serve"
    # An hour is longer than this test: the thread is left behind, as a process would be by a second signal.


def test_what_is_in_flight_gets_the_exit_timeout(repository: Path) -> None:
    world = World(repository, exit_timeout="17s").start()
    world.wait_until_ready()
    world.stop()
    assert world.frontend.drained_with_s == pytest.approx(17, abs=1)


def test_a_drain_that_takes_too_long_is_told_and_ends_all_the_same(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.wait_until_ready()
    world.frontend.drains_in_time = False
    assert world.stop() is True
    assert any("calls were still open" in record.message for record in caplog.records)
    assert "stop" in world.frontend.happened


def test_a_run_that_does_not_end_is_given_up(repository: Path) -> None:
    world = World(repository, exit_timeout="0").start()
    world.wait_until_ready()
    world.native.versions[0].idle.clear()
    assert world.stop() is False


def test_a_stop_during_the_start_does_not_wait_for_the_loads(repository: Path) -> None:
    is_loading, may_load = threading.Event(), threading.Event()

    def session(_tag: str) -> None:
        is_loading.set()
        may_load.wait(PATIENCE_S)

    world = World(repository, exit_timeout="0")
    world.native.on_session = session
    world.start()
    assert is_loading.wait(PATIENCE_S)
    assert world.stop() is False
    assert world.out.getvalue() == "", "it never was ready"
    may_load.set()


def test_polling_begins_after_the_start(repository: Path) -> None:
    world = World(repository, model_control_mode="poll", repository_poll_secs="100ms").start()
    world.wait_until_ready()
    put_model(repository, "later")
    eventually(lambda: world.status("later") == SERVING if "later" in world.native.routed() else False, "it is found")
    assert world.stop() is True


def test_a_load_request_goes_all_the_way(repository: Path) -> None:
    world = World(repository, model_control_mode="explicit").start()
    world.wait_until_ready()
    request = pb.RepositoryModelLoadRequest(model_name="a").SerializeToString()
    assert world.frontend.ask(INFERENCE + "RepositoryModelLoad", request).status == 0
    assert world.native.routed() == {"a": {"1": "a-1"}}
    assert world.status("a@1") == SERVING
    world.stop()


def test_log_settings_reach_the_native_core(world: World) -> None:
    world.wait_until_ready()
    request = pb.LogSettingsRequest()
    request.settings["log_verbose_level"].uint32_param = 1
    assert world.frontend.ask(INFERENCE + "LogSettings", request.SerializeToString()).status == 0
    assert world.native.log_levels == [10]


def test_the_front_end_gets_what_the_flags_say(repository: Path) -> None:
    world = World(
        repository,
        host="127.0.0.1",
        io_threads="2",
        max_message_bytes="1MiB",
        max_inflight_bytes="2MiB",
        max_connections="3",
        max_streams="4",
        keepalive_time="5s",
        keepalive_timeout="6s",
        handshake_timeout="7s",
        max_connection_age="8s",
        max_connection_age_grace="9s",
        max_connection_idle="10s",
    )
    given = world.frontend.settings
    assert given[:13] == ("127.0.0.1", 0, 2, 1 << 20, 2 << 20, 3, 4, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0)
    assert world.frontend.slow_methods[CHECK] == "fast unary"
    assert world.frontend.slow_methods[WATCH] == "stream"


def test_a_grpc_port_that_is_taken_ends_the_start(repository: Path) -> None:
    world = World(repository)
    world.frontend.start_error = world.native.NativeError("INTERNAL", "cannot listen on 127.0.0.1 port 1: in use")
    world.start().join()
    assert isinstance(world.error, StartError)
    assert str(world.error) == "--grpc-port: cannot listen on 127.0.0.1 port 1: in use"
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", world.app.metrics_port), 1)


def test_a_metrics_port_that_is_taken_ends_the_start(repository: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        world = World(repository, metrics_port=str(taken.getsockname()[1]))
        world.start().join()
    assert isinstance(world.error, StartError)
    assert str(world.error).startswith("--metrics-port: cannot listen on 127.0.0.1 port")
    assert "Address already in use" in str(world.error)
    assert "start" not in world.frontend.happened


def test_a_ready_line_that_nobody_reads_ends_nothing(repository: Path) -> None:
    class Closed(Out):
        def write(self, text: str) -> int:
            self.has_line.set()
            raise BrokenPipeError(32, "Broken pipe")

    world = World(repository)
    world.out = Closed()
    world.start()
    assert world.out.has_line.wait(PATIENCE_S)
    assert world.status() == SERVING
    assert world.stop() is True


# -- signals and the process -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_stops_and_the_second_does_what_it_always_did(number: signal.Signals) -> None:
    before = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    stops: list[int] = []
    with stopping_on_signals(lambda: stops.append(1)):
        os.kill(os.getpid(), number)
        assert stops == [1]
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == before


def test_the_file_limit_is_raised_as_far_as_it_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = [100, 5000]
    monkeypatch.setattr(app_module.resource, "getrlimit", lambda _kind: tuple(limits))

    def setrlimit(_kind: int, wanted: tuple[int, int]) -> None:
        limits[:] = wanted

    monkeypatch.setattr(app_module.resource, "setrlimit", setrlimit)
    app_module.raise_file_limit()
    assert limits == [5000, 5000]


def test_the_version_is_that_of_the_distribution() -> None:
    assert app_module.own_version()
