"""Whether perf_analyzer, unchanged, measures this server with its server-side statistics in all of its modes.

The program is the one inside the tritonclient 2.41 wheel; later wheels have none. It is installed beside the project's
environment, whose tritonclient is newer, and stays there for the next run.
"""

from __future__ import annotations

import csv
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from loadtests import models, rig
from loadtests.machine import ROOT
from loadtests.report import Goal, Result
from loadtests.rig import CLIENT_CORE, Bench, BenchError

QUESTION = "Does perf_analyzer complete with server-side statistics in closed-loop, request-rate and async modes?"
MODEL = "mlp"
HOME = ROOT / "build" / "loadtests" / "perf_analyzer"
# The program is linked against CUDA's runtime, which it does not use with gRPC and no shared memory.
PACKAGES = ("tritonclient==2.41.0", "nvidia-cuda-runtime-cu12==12.9.79")
MODES = {
    "closed loop": ["--concurrency-range", "4"],
    "request rate": ["--request-rate-range", "200", "--request-distribution", "poisson"],
    "async": ["--async", "--concurrency-range", "64"],
    "streaming": ["--async", "--streaming", "--concurrency-range", "16"],
}
TIMEOUT_S = 180


def install() -> Path:
    """The perf_analyzer program; installs it the first time. Raises BenchError."""
    program, done = HOME / "bin" / "perf_analyzer", HOME / "installed.txt"
    if not done.exists() or done.read_text() != " ".join(PACKAGES):
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--quiet", "--no-deps"]
        command += ["--upgrade", "--target", str(HOME), *PACKAGES]
        made = subprocess.run(command, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise BenchError(f"perf_analyzer cannot be installed: {made.stderr.strip()[-600:]}")
        done.write_text(" ".join(PACKAGES))
    program.chmod(0o755)
    return program


def environment() -> dict[str, str]:
    """What the program needs to find its libraries."""
    return {**os.environ, "LD_LIBRARY_PATH": str(HOME / "nvidia" / "cuda_runtime" / "lib")}


def run(bench: Bench) -> Result:
    """One run per mode."""
    program = install()
    repository = bench.folder / "models"
    models.put(repository, MODEL, models.mlp())
    found = {}
    with rig.serve(repository, bench.folder / "serve.log") as server:
        for mode, flags in MODES.items():
            table = bench.folder / f"{mode.replace(' ', '-')}.csv"
            command = [*rig.pinned(CLIENT_CORE), str(program), "-i", "grpc", "-u", server.grpc_address, "-m", MODEL]
            command += ["--measurement-interval", f"{1000 * bench.seconds(3.0, 1.0):.0f}", "--verbose-csv", *flags]
            # Three windows, however they differ: this is about completing, not about a figure.
            command += ["--stability-percentage", "999", "--max-trials", "3", "-f", str(table)]
            done = subprocess.run(
                command, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment(), check=False
            )
            found[mode] = parse(mode, done.returncode, done.stdout + done.stderr, table)
            bench.say(f"{mode}: {found[mode]['per_s']:,.0f}/s, server {found[mode]['server_us']}")
    return judge(found)


_SERVER = re.compile(
    r"Server:\s+Inference count: (\d+)\s+Execution count: (\d+)\s+Successful request count: (\d+)"
    r"\s+Avg request latency: (\d+) usec \(overhead (\d+) usec \+ queue (\d+) usec \+ compute input (\d+) usec"
    r" \+ compute infer (\d+) usec \+ compute output (\d+) usec\)"
)
_SERVER_NAMES = ("overhead", "queue", "compute_input", "compute_infer", "compute_output")


def parse(mode: str, status: int, text: str, table: Path) -> dict[str, Any]:
    """What one run printed and wrote. Raises BenchError when it failed or knows nothing of the server's side."""
    if status != 0 or not table.exists():
        raise BenchError(f"perf_analyzer, {mode}, exited {status}: {text.strip()[-1200:]}")
    server = _SERVER.search(text)
    if server is None:
        raise BenchError(f"perf_analyzer, {mode}, printed no server-side statistics: {text.strip()[-1200:]}")
    with table.open() as file:
        (line,) = csv.DictReader(file)
    inferences, executions, successes, latency_us = (int(server[i]) for i in range(1, 5))
    return {
        "per_s": float(line["Inferences/Second"]),
        "p50_us": float(line["p50 latency"]),
        "p99_us": float(line["p99 latency"]),
        "inferences": inferences,
        "executions": executions,
        "successes": successes,
        "server_latency_us": latency_us,
        "server_us": {name: int(server[i + 5]) for i, name in enumerate(_SERVER_NAMES)},
    }


def judge(found: Mapping[str, Mapping[str, Any]]) -> Result:
    """The goals: each mode measured something, and the server's side of it is there."""
    goals = []
    for mode in MODES:
        one = found[mode]
        goals.append(Goal(f"{mode}: inferences in the server-side statistics", one["successes"], ">=", 1))
        goals.append(Goal(f"{mode}: inferences/s", one["per_s"], ">=", 1))
    return Result(goals, dict(found))
