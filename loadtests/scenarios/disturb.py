"""What users of one model feel of everything else: open loop at 30 % load, with and without a disturbance, in pairs.

The disturbances run on the client's core at idle priority, so that they take nothing from the generator: what the p99
shows is what they cost the server.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from loadtests import calibrate, models, paired, rig
from loadtests.machine import ROOT
from loadtests.report import Goal, Result
from loadtests.rig import CLIENT_CORE, Bench, BenchError
from server.demo.process import ServeProcess

QUESTION = "How much slower do answers get while somebody scrapes and lists, and while another model loads?"
MODEL, OTHER = "measured", "other"
LOAD = 0.3
# A row takes about this long, as in the quicker model of `compute`: the generator can be exact at this rate, and a
# disturbance of a millisecond shows.
BATCH, ROW_US = 16, 200.0
PER_SECOND = 20.0
LEAST_SHARE = 0.9  # of the looks that were asked for
GOALS = {"look": 1.1, "load": 1.5}
NAMES = {
    "look": "p99 while metrics are scraped and RepositoryIndex is called 20 times a second / p99 alone",
    "load": "p99 while a model of 90 MB loads in a loop / p99 alone",
}


def run(bench: Bench) -> Result:
    """Measures capacity, then pairs of runs for each disturbance."""
    made = calibrate.stack_taking(BATCH * ROW_US, BATCH, bench.folder)
    repository = bench.folder / "models"
    folder = models.put(repository, MODEL, made.model)
    models.put(repository, OTHER, models.big(0.5))
    x = rig.random_rows(1, 16)
    body, expected = rig.body_file(bench.folder, MODEL, x), rig.expected_answer(folder / "model.onnx", x)
    flags = ("--model-control-mode", "explicit", "--load-model", MODEL)
    with rig.serve(repository, bench.folder / "serve.log", *flags) as server:
        rig.check_answer(server.grpc_address, MODEL, x, expected)
        capacity = rig.rows_per_s(server, MODEL, body, connections=8, streams=32, seconds=bench.seconds(5.0, 1.0))
        bench.say(f"capacity {capacity:,.0f} rows/s, offered {LOAD * capacity:,.0f}/s")
        rounds = {what: _pairs(bench, server, body, what, LOAD * capacity) for what in GOALS}
        rig.check_answer(server.grpc_address, MODEL, x, expected)
    return judge(made.row_us, capacity, rounds)


def _pairs(bench: Bench, server: ServeProcess, body: Path, what: str, rate: float) -> list[dict[str, Any]]:
    def alone() -> dict[str, Any]:
        found: dict[str, Any] = rig.trusted_open_loop(
            server.grpc_port, body, rate=rate, seconds=bench.seconds(10.0, 2.0)
        )
        if set(found["measured"]["by_status"]) != {"0"}:
            raise BenchError(f"at {100 * LOAD:.0f} % load requests failed: {found['measured']['by_status']}")
        return found

    def disturbed() -> dict[str, Any]:
        with _Disturber(server, what) as disturber:
            found = alone()
        return {**found, "disturber": disturber.report()}

    turns = {"alone": alone, "disturbed": disturbed}
    pairs = []
    for number in range(bench.count(10, 2)):
        pair = {name: turns[name]() for name in paired.order(list(turns), number)}
        p99 = {name: one["measured"]["ok_latency_us"]["p99"] for name, one in pair.items()}
        bench.say(f"{what}, pair {number + 1}: p99 {p99['alone']:.0f} us, disturbed {p99['disturbed']:.0f} us")
        pairs.append(pair)
    return pairs


class _Disturber:
    """A running loadtests.disturber."""

    def __init__(self, server: ServeProcess, what: str) -> None:
        command = ["chrt", "--idle", "0", *rig.pinned(CLIENT_CORE), sys.executable, "-m", "loadtests.disturber", what]
        command += ["--grpc-port", str(server.grpc_port), "--metrics-port", str(server.metrics_port)]
        self._command = [*command, "--model", OTHER, "--per-second", f"{PER_SECOND:g}"]
        self._what = what
        self._output = ""

    def __enter__(self) -> _Disturber:
        self._process = subprocess.Popen(self._command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        if "started" not in self._process.stdout.readline():
            self.__exit__()
            raise BenchError(f"the disturber {self._what} did not start")
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._output = self._process.communicate(timeout=60)[0]
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def report(self) -> dict[str, float]:
        """What it did. Raises BenchError when that was no disturbance."""
        if not self._output:
            raise BenchError(f"the disturber {self._what} failed")
        return checked_disturbance(self._what, json.loads(self._output))


def checked_disturbance(what: str, done: Mapping[str, float]) -> dict[str, float]:
    """The disturber's report, unless it did too little. Raises BenchError."""
    least = LEAST_SHARE * PER_SECOND * done["seconds"] if what == "look" else 1
    if done["done"] < least:
        raise BenchError(f"the disturber {what} did {done['done']} of {least:.0f} steps in {done['seconds']:.1f} s")
    return dict(done)


def judge(row_us: float, capacity: float, rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> Result:
    """The goals: ratios of p99 within each pair."""
    goals: list[Goal] = []
    figures: dict[str, Any] = {}
    for what, pairs in rounds.items():
        p99 = [{name: one["measured"]["ok_latency_us"]["p99"] for name, one in pair.items()} for pair in pairs]
        ratio = paired.summary(paired.ratios(p99, "disturbed", "alone"))
        goals.append(Goal(NAMES[what], ratio["median"], "<=", GOALS[what]))
        figures[what] = {
            "p99_ratio": ratio,
            "is_difference": paired.is_difference(ratio),
            "p99_alone_us": paired.summary([one["alone"] for one in p99]),
            "p99_disturbed_us": paired.summary([one["disturbed"] for one in p99]),
            "steps_per_s": paired.summary(
                [pair["disturbed"]["disturber"]["done"] / pair["disturbed"]["disturber"]["seconds"] for pair in pairs]
            ),
        }
    figures |= {"row_us": round(row_us, 1), "capacity_rows_per_s": round(capacity), "offered_share": LOAD}
    return Result(goals, figures, {what: list(pairs) for what, pairs in rounds.items()})
