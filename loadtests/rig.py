"""What scenarios share: pinned servers, request bodies, h2load, the open-loop generator, checked answers.

Servers run on core 0 and whatever loads them on core 1, so that a figure is what one core of the server can do and
the client cannot take from it. Only processes started here are ever ended.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

from loadtests.machine import ROOT
from server.demo.exposition import Scrape, samples_of
from server.demo.process import ServeProcess

SERVER_CORE = 0
CLIENT_CORE = 1
INFER_PATH = "/inference.GRPCInferenceService/ModelInfer"
NATIVE = Path(__file__).parent / "native"
DATATYPES = {"float32": "FP32", "int64": "INT64", "int32": "INT32"}
STATUS_DEADLINE_EXCEEDED = "4"
STATUS_RESOURCE_EXHAUSTED = "8"


class BenchError(Exception):
    """A run that says nothing: a tool is missing, an answer is wrong, the counts do not agree."""


@dataclass(slots=True)
class Bench:
    """What a scenario gets: where to work, how long, and its own options."""

    folder: Path
    quick: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)

    def say(self, text: str) -> None:
        """Progress, on stderr."""
        print(f"  {text}", file=sys.stderr, flush=True)

    def seconds(self, usual: float, quick: float) -> float:
        """How long something lasts."""
        return quick if self.quick else usual

    def count(self, usual: int, quick: int) -> int:
        """How often something is done."""
        return quick if self.quick else usual


def pinned(core: int) -> list[str]:
    """The words that put a command on one core."""
    return ["taskset", "-c", str(core)]


# -- requests ----------------------------------------------------------------------------------------------------------


def request_message(model: str, tensors: Mapping[str, npt.NDArray[Any]], request_id: str = "") -> bytes:
    """A serialized ModelInferRequest with raw contents."""
    message = pb.ModelInferRequest(model_name=model, id=request_id)
    for name, array in tensors.items():
        message.inputs.add(name=name, datatype=DATATYPES[array.dtype.name], shape=array.shape)
        message.raw_input_contents.append(array.tobytes())
    serialized: bytes = message.SerializeToString()
    return serialized


def framed(message: bytes) -> bytes:
    """gRPC's frame: not compressed, length, message."""
    return struct.pack(">BI", 0, len(message)) + message


def body_file(folder: Path, model: str, x: npt.NDArray[Any]) -> Path:
    """One framed request in a file, for h2load -d and open_loop --body."""
    path = folder / f"{model}.body"
    path.write_bytes(framed(request_message(model, {"x": x})))
    return path


def random_rows(rows: int, *dims: int, seed: int = 3) -> npt.NDArray[np.float32]:
    """FP32 [rows, *dims], the same for the same seed."""
    return np.random.default_rng(seed).standard_normal((rows, *dims), dtype=np.float32)


def ask(address: str, model: str, x: npt.NDArray[Any], timeout_s: float = 30.0) -> npt.NDArray[Any]:
    """The answer `y` of a model to `x`, through tritonclient."""
    client = triton.InferenceServerClient(address)
    try:
        tensor = triton.InferInput("x", list(x.shape), DATATYPES[x.dtype.name])
        tensor.set_data_from_numpy(x)
        y: npt.NDArray[Any] = client.infer(model, [tensor], client_timeout=timeout_s).as_numpy("y")
        return y
    finally:
        client.close()


def check_answer(address: str, model: str, x: npt.NDArray[Any], expected: npt.NDArray[Any]) -> None:
    """Raises BenchError when the model's answer to `x` is not `expected` (1e-4 relative, FP32 sums differ)."""
    y = ask(address, model, x)
    if y.shape != expected.shape or not np.allclose(y, expected, rtol=1e-4, atol=1e-4):
        raise BenchError(f"{model} answers wrongly: shape {y.shape}, expected {expected.shape}")


def expected_answer(model_file: Path, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What bare ONNX Runtime answers."""
    import onnxruntime  # only here: bench runs that need no reference answer do not load it

    session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    answer: npt.NDArray[Any] = y
    return answer


# -- processes ---------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(repository: Path, log: Path, *flags: str, core: int | None = SERVER_CORE) -> ServeProcess:
    """A `tidegate serve` pinned to a core, not started yet; quiet, so that logging is no part of a figure."""
    prefix = [] if core is None else pinned(core)
    return ServeProcess(repository, log, flags=["--log-level", "warning", *flags], prefix=prefix)


def scrape(server: ServeProcess) -> Scrape:
    """One reading of /metrics."""
    return samples_of(server.metrics_text())


@contextlib.contextmanager
def child(command: Sequence[str], *, wait_for: str = "", env: Mapping[str, str] | None = None) -> Iterator[Any]:
    """Runs a helper process; gives (process, the first line of stdout) and ends it afterwards.

    `wait_for` is a text that this line must have; without one nothing is waited for and the line is "".
    """
    process = subprocess.Popen(
        list(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if wait_for else subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
        env={**os.environ, **(env or {})},
    )
    try:
        line = ""
        if wait_for:
            assert process.stdout is not None
            line = process.stdout.readline().decode()
            if wait_for not in line:
                raise BenchError(f"{' '.join(command[:6])} did not start: {line!r}")
        yield process, line
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()


def free_port() -> int:
    """A port that was free a moment ago, for servers that cannot say which one they got."""
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextlib.contextmanager
def nghttpd(folder: Path, size: int = 300) -> Iterator[tuple[int, int, str]]:
    """nghttp2's own server on core 0 with a static file of `size` bytes: (port, pid, path)."""
    need("nghttpd", "nghttp2-server")
    root = folder / f"static-{size}"
    root.mkdir(exist_ok=True)
    (root / "file").write_bytes(bytes(size))
    port = free_port()
    command = [*pinned(SERVER_CORE), "nghttpd", "--no-tls", "-a", "127.0.0.1", "-n", "1", "-d", str(root), str(port)]
    with child(command) as (process, _):
        wait_for_port(port)
        yield port, process.pid, "/file"


def wait_for_port(port: int, timeout_s: float = 10.0) -> None:
    """Returns when something listens on the port. Raises BenchError."""
    import socket

    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.02)
    raise BenchError(f"nothing listens on port {port}")


@contextlib.contextmanager
def grpcio_echo() -> Iterator[tuple[int, int]]:
    """A grpcio aio echo server on core 0: (port, pid)."""
    command = [*pinned(SERVER_CORE), sys.executable, "-m", "loadtests.grpcio_echo"]
    with child(command, wait_for="grpc_port") as (process, line):
        yield int(json.loads(line)["grpc_port"]), process.pid


def need(command: str, package: str) -> None:
    """Raises BenchError when a command is missing."""
    if shutil.which(command) is None:
        raise BenchError(f"{command} is missing: apt-get install {package}")


# -- h2load ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Closed:
    """One closed-loop run of h2load."""

    per_s: float
    done: int
    mean_us: float
    seconds: float
    client_cpu: float  # share of its core
    server_cpu_us: float  # per request; 0 when no server process was named


_UNITS_US = {"us": 1.0, "ms": 1e3, "s": 1e6}


def parse_h2load(text: str) -> tuple[float, int, float, float]:
    """(requests/s, done, mean time for request in us, seconds) of h2load's output. Raises BenchError."""
    rate = re.search(r"finished in ([\d.]+)(us|ms|s), ([\d.]+) req/s", text)
    counts = re.search(
        r"requests: (\d+) total, (\d+) started, (\d+) done, (\d+) succeeded, (\d+) failed, (\d+) errored", text
    )
    times = re.search(r"time for request:\s+(\S+?)(us|ms|s)\s+(\S+?)(us|ms|s)\s+(\S+?)(us|ms|s)\s", text)
    if rate is None or counts is None or times is None:
        raise BenchError(f"h2load printed something else: {text[-600:]}")
    done, succeeded, failed, errored = (int(counts[i]) for i in (3, 4, 5, 6))
    if failed or errored or done != succeeded or not done:
        raise BenchError(f"h2load: {done} done, {succeeded} succeeded, {failed} failed, {errored} errored")
    seconds = float(rate[1]) * _UNITS_US[rate[2]] / 1e6
    return float(rate[3]), done, float(times[5]) * _UNITS_US[times[6]], seconds


def h2load(
    port: int,
    path: str,
    body: Path | None,
    *,
    connections: int,
    streams: int,
    seconds: float,
    server_pid: int | None = None,
    core: int = CLIENT_CORE,
) -> Closed:
    """A closed loop of `connections` x `streams` for `seconds`. Raises BenchError when a request failed in HTTP's sense.

    gRPC errors arrive with HTTP status 200: `counted` below compares with what the server counted.
    """
    need("h2load", "nghttp2-client")
    command = [*pinned(core), "h2load", "-t", "1", "-c", str(connections), "-m", str(streams), "-D", f"{seconds:g}"]
    if body is not None:
        command += ["-d", str(body), "-H", "content-type: application/grpc", "-H", "te: trailers"]
    command.append(f"http://127.0.0.1:{port}{path}")
    before = os.times()
    server_before = cpu_seconds(server_pid) if server_pid else 0.0
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60, check=False)
    took = time.monotonic() - began
    after = os.times()
    server_used = cpu_seconds(server_pid) - server_before if server_pid else 0.0
    if done.returncode != 0:
        raise BenchError(f"h2load exited {done.returncode}: {(done.stdout + done.stderr)[-600:]}")
    per_s, count, mean_us, lasted = parse_h2load(done.stdout)
    client = after.children_user + after.children_system - before.children_user - before.children_system
    return Closed(per_s, count, mean_us, lasted, round(client / took, 3), round(1e6 * server_used / count, 3))


FAILURES = "nv_inference_request_failure"
SUCCESSES = "nv_inference_request_success"


@contextlib.contextmanager
def counted(server: ServeProcess, model: str, most_in_flight: int) -> Iterator[list[int]]:
    """Checks that the server counted what the client did: append the client's count to the list that is given.

    At the end of a timed run h2load drops what is in flight, at most connections x streams: so many more successes, or
    cancelled requests, are right. Anything else makes the run say nothing, and raises BenchError.
    """
    before = scrape(server)
    counts: list[int] = []
    yield counts
    # What was dropped is cancelled when its connection closes; the server has settled when nothing is pending.
    until = time.monotonic() + 10.0
    after = scrape(server)
    while after.total("nv_inference_pending_request_count", model=model) and time.monotonic() < until:
        time.sleep(0.05)
        after = scrape(server)

    def grew(name: str, **labels: str) -> int:
        return int(after.total(name, model=model, **labels) - before.total(name, model=model, **labels))

    successes, cancelled = grew(SUCCESSES), grew(FAILURES, reason="CANCELED")
    failures, shed = grew(FAILURES), grew("tidegate_shed_total")
    client = sum(counts)
    allowed = most_in_flight * max(1, len(counts))
    if failures != cancelled or shed or cancelled > allowed or not client <= successes <= client + allowed:
        raise BenchError(
            f"{model}: the client counted {client}, the server {successes} successes, {failures} failures "
            f"({cancelled} cancelled), {shed} shed"
        )


# -- open loop ---------------------------------------------------------------------------------------------------------

MOST_LATE_SHARE = 0.01


def open_loop_binary() -> Path:
    """Builds loadtests/native/open_loop.cc when it is newer than what was built."""
    source, target = NATIVE / "open_loop.cc", ROOT / "build" / "loadtests" / "open_loop"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-o", str(target), str(source), "-lnghttp2"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"open_loop.cc does not build: {done.stderr[-800:]}")
    return target


def open_loop_command(
    port: int, body: Path, *, rate: float, seconds: float, core: int = CLIENT_CORE, **flags: Any
) -> list[str]:
    """The command line of a run; `flags` are open_loop's own, e.g. timeout_us=50_000, cancel=True."""
    command = [*pinned(core), str(open_loop_binary()), "--port", str(port), "--body", str(body)]
    command += ["--rate", f"{rate:.3f}", "--duration", f"{seconds:g}"]
    for name, value in flags.items():
        if value is True:
            command.append(f"--{name.replace('_', '-')}")
        elif value is not False:
            command += [f"--{name.replace('_', '-')}", str(value)]
    return command


def open_loop(port: int, body: Path, *, rate: float, seconds: float, **flags: Any) -> dict[str, Any]:
    """One open-loop run; the document that open_loop prints, with `trusted` False when over 1 % of sends were late."""
    command = open_loop_command(port, body, rate=rate, seconds=seconds, **flags)
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 90, check=False)
    if done.returncode != 0:
        raise BenchError(done.stderr.strip() or f"open_loop exited {done.returncode}")
    return judged(done.stdout)


def judged(output: str) -> dict[str, Any]:
    """open_loop's document with the verdict on the generator itself."""
    found: dict[str, Any] = json.loads(output)
    measured = found["measured"]
    found["trusted"] = (
        measured["late_share"] <= MOST_LATE_SHARE and measured["not_offered"] == 0 and found["connections_lost"] == 0
    )
    return found
