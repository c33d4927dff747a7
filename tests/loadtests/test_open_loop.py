"""The open-loop generator against grpcio: it offers what it was told, counts what comes back, keeps deadlines."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest

from loadtests import rig
from loadtests.rig import BenchError

BODY = b"a request of any kind"


class Scripted(grpc.GenericRpcHandler):
    """Answers as `self.script` says; counts calls."""

    def __init__(self) -> None:
        self.script = "echo"
        self.calls = 0
        self.bodies: set[bytes] = set()
        self.deadlines: list[float] = []
        self._lock = threading.Lock()
        self.released = threading.Event()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        if handler_call_details.method != rig.INFER_PATH:
            return None
        return grpc.unary_unary_rpc_method_handler(self._answer)

    def _answer(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        with self._lock:
            self.calls += 1
            is_second = self.calls % 2 == 0
        self.bodies.add(message)
        self.deadlines.append(context.time_remaining())
        if self.script == "refuse every second" and is_second:
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        if self.script == "hold":
            self.released.wait(20)
        return message


@pytest.fixture
def scripted() -> Iterator[tuple[Scripted, int]]:
    handler = Scripted()
    server = grpc.server(ThreadPoolExecutor(4))
    server.add_generic_rpc_handlers((handler,))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield handler, port
    handler.released.set()
    server.stop(None).wait()


@pytest.fixture
def body(tmp_path: Path) -> Path:
    path = tmp_path / "body"
    path.write_bytes(rig.framed(BODY))
    return path


def is_a_deadline(left_s: float) -> bool:
    """grpcio says centuries where there is none."""
    return left_s < 1e6


def offer(port: int, body: Path, *, rate: float = 200, seconds: float = 0.5, **flags: Any) -> dict[str, Any]:
    flags = {"connections": 2, "warm_up": 0, "seed": 3, **flags}
    command = rig.open_loop_command(port, body, rate=rate, seconds=seconds, core=None, **flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return rig.judged(done.stdout)


def test_every_request_is_sent_with_its_body_and_counted(scripted: tuple[Scripted, int], body: Path) -> None:
    handler, port = scripted
    found = offer(port, body)
    measured = found["measured"]
    assert found["requests"] == measured["due"] == measured["sent"] == measured["answered"] == handler.calls
    assert measured["by_status"] == {"0": handler.calls}
    assert measured["in_deadline"] == found["ok"] == handler.calls
    assert handler.bodies == {BODY}
    assert not any(is_a_deadline(left) for left in handler.deadlines)
    assert (found["unanswered"], found["connections_lost"], measured["http_errors"]) == (0, 0, 0)
    assert measured["ok_latency_us"]["count"] == handler.calls
    assert 0 < measured["ok_latency_us"]["p50"] <= measured["ok_latency_us"]["p99"] <= measured["ok_latency_us"]["max"]


def test_arrivals_are_the_same_for_the_same_seed_and_follow_the_rate(
    scripted: tuple[Scripted, int], body: Path
) -> None:
    _, port = scripted
    counts = [offer(port, body, rate=1000, seed=seed)["requests"] for seed in (3, 3, 4)]
    assert counts[0] == counts[1] != counts[2]
    # 500 are expected; five standard deviations of a Poisson count are 112.
    assert all(388 <= count <= 612 for count in counts)


def test_what_was_due_in_the_warm_up_is_not_measured(scripted: tuple[Scripted, int], body: Path) -> None:
    handler, port = scripted
    found = offer(port, body, warm_up=0.5)
    assert 0 < found["measured"]["due"] < found["requests"] == handler.calls


def test_refusals_are_counted_by_status_and_are_no_goodput(scripted: tuple[Scripted, int], body: Path) -> None:
    handler, port = scripted
    handler.script = "refuse every second"
    found = offer(port, body)
    measured = found["measured"]
    assert measured["by_status"] == {"0": handler.calls - handler.calls // 2, "8": handler.calls // 2}
    assert measured["in_deadline"] == measured["ok_latency_us"]["count"] == measured["by_status"]["0"]
    assert measured["refused_latency_us"]["count"] == measured["by_status"]["8"]


def test_a_deadline_is_announced_and_ends_a_request_that_gets_no_answer(
    scripted: tuple[Scripted, int], body: Path
) -> None:
    handler, port = scripted
    handler.script = "hold"
    found = offer(port, body, rate=20, timeout_us=200_000, cancel=True)
    measured = found["measured"]
    # Some servers answer DEADLINE_EXCEEDED themselves before the client gives up; none of these is an answer in time.
    ended = measured["cancelled"] + measured["by_status"].get("4", 0) + measured["by_status"].get("1", 0)
    assert ended == measured["due"] > 0
    assert measured["in_deadline"] == found["unanswered"] == 0
    assert all(is_a_deadline(left) and left <= 0.2 for left in handler.deadlines)


def test_answers_that_never_come_are_unanswered(scripted: tuple[Scripted, int], body: Path) -> None:
    handler, port = scripted
    handler.script = "hold"
    found = offer(port, body, rate=20, drain=0.1)
    assert found["unanswered"] == found["requests"] > 0


def test_requests_above_the_bound_in_flight_are_not_offered(scripted: tuple[Scripted, int], body: Path) -> None:
    handler, port = scripted
    handler.script = "hold"
    found = offer(port, body, rate=100, drain=0.1, most_inflight=3)
    assert found["measured"]["not_offered"] == found["requests"] - 3
    assert not found["trusted"]


def test_nothing_listens_is_an_error(body: Path) -> None:
    command = rig.open_loop_command(rig.free_port(), body, rate=10, seconds=0.1, core=None)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "Connection refused" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"rate": 0}, "--rate"),
        ({"connections": 0}, "--connections '0' is not a number of at least 1"),
        ({"seed": "x"}, "--seed 'x'"),
        ({"nonsense": 1}, "unknown flag --nonsense"),
    ],
)
def test_a_wrong_flag_is_named(body: Path, flags: dict[str, Any], message: str) -> None:
    settings = {"rate": 10.0, "seconds": 0.1, **flags}
    command = rig.open_loop_command(9, body, core=None, **settings)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert message in done.stderr


def test_a_run_that_fails_says_why(body: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rig, "CLIENT_CORE", None)
    monkeypatch.setattr(rig, "pinned", lambda *_: [])
    with pytest.raises(BenchError, match="Connection refused"):
        rig.open_loop(rig.free_port(), body, rate=10, seconds=0.1)


def test_the_echo_that_is_compared_with_answers_the_same_bytes() -> None:
    with rig.child([sys.executable, "-m", "loadtests.grpcio_echo"], wait_for="grpc_port") as (_, line):
        port = json.loads(line)["grpc_port"]
        with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
            assert channel.unary_unary(rig.INFER_PATH)(BODY, timeout=10) == BODY
