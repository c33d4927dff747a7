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
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
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


def pinned(*cores: int) -> list[str]:
    """The words that put a command on these cores; none for no core."""
    return ["taskset", "-c", ",".join(map(str, cores))] if cores else []


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
    """Raises BenchError when the model's answer to `x` is not `expected`.

    Sums of FP32 differ a little with the batch: 1e-4 of the largest number is allowed.
    """
    y = ask(address, model, x)
    if y.shape != expected.shape:
        raise BenchError(f"{model} answers wrongly: shape {y.shape}, expected {expected.shape}")
    if not np.abs(y - expected).max() <= 1e-4 * max(1.0, float(np.abs(expected).max())):
        raise BenchError(f"{model} answers wrongly: off by {np.abs(y - expected).max():g}")


def expected_answer(model_file: Path, x: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """What bare ONNX Runtime answers."""
    session = onnxruntime.InferenceSession(model_file, providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    answer: npt.NDArray[Any] = y
    return answer


# -- processes ---------------------------------------------------------------------------------------------------------


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def serve(repository: Path, log: Path, *flags: str, cores: Sequence[int] = (SERVER_CORE,)) -> ServeProcess:
    """A `tidegate serve`, not started yet; quiet, so that logging is no part of a figure."""
    return ServeProcess(repository, log, flags=["--log-level", "warning", *flags], prefix=pinned(*cores))


@contextlib.contextmanager
def client_of(address: str) -> Iterator[Any]:
    """A tritonclient for everything that is no load: loading, unloading, the index."""
    client = triton.InferenceServerClient(address)
    try:
        yield client
    finally:
        client.close()


def scrape(server: ServeProcess) -> Scrape:
    """One reading of /metrics."""
    return samples_of(server.metrics_text())


def needed(found: Scrape, name: str, **labels: str) -> float:
    """The total of a series that must exist. Raises BenchError: a missing series is not a zero."""
    if not found.matching(name, **labels):
        raise BenchError(f"/metrics has no {name}{labels or ''}")
    return found.total(name, **labels)


def histogram(before: Scrape, after: Scrape, name: str, **labels: str) -> dict[str, int]:
    """What came into each bucket between two readings, by upper bound; empty buckets are left out."""
    totals: dict[float, float] = {}
    for sign, found in ((-1, before), (1, after)):
        for one in found.matching(f"{name}_bucket", **labels):
            bound = float(one.labels["le"])
            totals[bound] = totals.get(bound, 0.0) + sign * one.value
    counts, below = {}, 0.0
    for bound in sorted(totals):
        if own := round(totals[bound] - below):
            counts[f"{bound:g}"] = own
        below = totals[bound]
    return counts


class Sampler:
    """Calls a function again and again on a thread of its own while a `with` block runs, and keeps what it returns."""

    def __init__(self, every_s: float, sample: Callable[[], Any]) -> None:
        self._every_s, self._sample = every_s, sample
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._error: Exception | None = None
        self.values: list[Any] = []

    def _run(self) -> None:
        try:
            while True:
                self.values.append(self._sample())
                if self._stop.wait(self._every_s):
                    return
        except Exception as why:  # raised where the block ends
            self._error = why

    def __enter__(self) -> Sampler:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Raises what a sample raised, unless the block failed by itself."""
        self._stop.set()
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error


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
    """A closed loop of `connections` x `streams` for `seconds`. Raises BenchError when a request failed for HTTP.

    gRPC errors arrive with HTTP status 200: `counted` below compares with what the server counted.
    """
    need("h2load", "nghttp2-client")
    command = [
        *pinned(core),
        "h2load",
        "-t",
        "1",
        "-c",
        str(connections),
        "-m",
        str(streams),
        "-D",
        f"{1e3 * seconds:.0f}ms",
    ]
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


def settled(server: ServeProcess, model: str, timeout_s: float = 10.0) -> Scrape:
    """A reading after a load: nothing waits any more, and what was running or dropped has been counted."""
    until = time.monotonic() + timeout_s
    seen, now = -1.0, scrape(server)
    while time.monotonic() < until:
        ended = now.total(SUCCESSES, model=model) + now.total(FAILURES, model=model)
        if not now.total("nv_inference_pending_request_count", model=model) and ended == seen:
            break
        seen = ended
        time.sleep(0.1)
        now = scrape(server)
    return now


@contextlib.contextmanager
def counted(server: ServeProcess, model: str, most_in_flight: int) -> Iterator[list[int]]:
    """Checks that the server counted what the client did: append the client's count to the list that is given.

    At the end of a timed run h2load drops what is in flight, at most connections x streams: so many more successes, or
    cancelled requests, are right. Anything else makes the run say nothing, and raises BenchError.
    """
    before = scrape(server)
    counts: list[int] = []
    yield counts
    after = settled(server, model)

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


def rows_per_s(
    server: ServeProcess, model: str, body: Path, *, connections: int, streams: int, seconds: float, lead_s: float = 1.0
) -> float:
    """Rows/s that the server finished by its own count in a window of `seconds` inside a closed loop.

    The load starts `lead_s` before the window and ends after it, so that what fills up at the start and what is dropped
    at the end is no part of the figure: with batches of tens of ms that would be a percent of it.
    """

    def rows() -> tuple[float, float]:
        began = time.monotonic()
        found = scrape(server)
        return needed(found, "nv_inference_count", model=model), (began + time.monotonic()) / 2

    with counted(server, model, connections * streams) as counts, ThreadPoolExecutor(1) as pool:
        lasts = lead_s + seconds + 0.5
        load = pool.submit(
            h2load, server.grpc_port, INFER_PATH, body, connections=connections, streams=streams, seconds=lasts
        )
        time.sleep(lead_s)
        rows_before, began = rows()
        time.sleep(seconds)
        rows_after, ended = rows()
        counts.append(load.result().done)
    return (rows_after - rows_before) / (ended - began)


def bare_runtime(file: Path, batches: Sequence[int], seconds: float) -> dict[str, dict[int, float]]:
    """ONNX Runtime alone on the server's core: {"rows_per_s": {batch: ...}, "run_us": {...}, "cpu_us": {...}}."""
    command = [*pinned(SERVER_CORE), sys.executable, "-m", "loadtests.bare_runtime", str(file)]
    command += ["--batches", ",".join(map(str, batches)), "--seconds", f"{seconds:g}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode != 0:
        raise BenchError(f"bare_runtime exited {done.returncode}: {done.stderr[-600:]}")
    found: dict[str, dict[str, float]] = json.loads(done.stdout)
    return {name: {int(rows): value for rows, value in by_batch.items()} for name, by_batch in found.items()}


# -- open loop ---------------------------------------------------------------------------------------------------------

MOST_LATE_SHARE = 0.01


def open_loop_binary() -> Path:
    """Builds loadtests/native/open_loop.cc when it is newer than what was built."""
    source, target = NATIVE / "open_loop.cc", ROOT / "build" / "loadtests" / "open_loop"
    if not target.exists() or target.stat().st_mtime < source.stat().st_mtime:
        target.parent.mkdir(parents=True, exist_ok=True)
        incoming = target.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-O2", "-Wall", "-Wextra", "-o", str(incoming), str(source), "-lnghttp2"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise BenchError(f"open_loop.cc does not build: {done.stderr[-800:]}")
        incoming.replace(target)
    return target


def open_loop_command(
    port: int, body: Path, *, rate: float, seconds: float, core: int | None = CLIENT_CORE, **flags: Any
) -> list[str]:
    """The command line of a run; `flags` are open_loop's own, e.g. timeout_us=50_000, cancel=True."""
    command = [
        *pinned(*(() if core is None else (core,))),
        str(open_loop_binary()),
        "--port",
        str(port),
        "--body",
        str(body),
    ]
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


def trusted_open_loop(
    port: int, body: Path, *, rate: float, seconds: float, tries: int = 3, **flags: Any
) -> dict[str, Any]:
    """A run whose generator kept up; one that did not is thrown away. Raises BenchError after `tries` of those."""
    for _ in range(tries):
        found = open_loop(port, body, rate=rate, seconds=seconds, **flags)
        if found["trusted"]:
            return found
    measured = found["measured"]
    raise BenchError(
        f"the generator cannot offer {rate:,.0f}/s here: {100 * measured['late_share']:.1f} % late, "
        f"{measured['not_offered']} not offered, {found['connections_lost']} connections lost"
    )


def judged(output: str) -> dict[str, Any]:
    """open_loop's document with the verdict on the generator itself."""
    found: dict[str, Any] = json.loads(output)
    measured = found["measured"]
    found["trusted"] = (
        measured["late_share"] <= MOST_LATE_SHARE and measured["not_offered"] == 0 and found["connections_lost"] == 0
    )
    return found
