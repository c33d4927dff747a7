"""More than the server can do: 2x and 10x of capacity, every request with a deadline.

An open loop offers the load whatever comes back, and gives up on a request at its deadline, as gRPC clients do. Only
answers that are right and in time count.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from loadtests import calibrate, models, paired, rig
from loadtests.report import Goal, Result
from loadtests.rig import CLIENT_CORE, SERVER_CORE, STATUS_DEADLINE_EXCEEDED, STATUS_RESOURCE_EXHAUSTED, Bench
from server.demo.process import ServeProcess

QUESTION = "How much of its capacity does the server still deliver in time when it is offered two and ten times that?"
MODEL = "heavy"
# 1 ms a row, a model that computes.
BATCH = 4
RUN_US = 4_000.0  # of a full batch
DEADLINE_US = 50_000
FACTORS = (2, 10)
LEAST_GOODPUT = 0.9
MOST_HEALTH_MS = 50.0
# What may wait is bounded by requests (4,096) and by streams; neither is more than a few MiB with these messages.
MOST_GROWTH_MIB = 64.0
# A refusal must say which: no room, or too late.
TYPED = {"0", STATUS_DEADLINE_EXCEEDED, STATUS_RESOURCE_EXHAUSTED}

# The goals are about a server with a core for its model and one, shared with the generator, for its wire. On one core
# refusals are paid for by the model; what that costs is a figure.
CORES = {"two cores": (SERVER_CORE, CLIENT_CORE), "one core": (SERVER_CORE,)}
JUDGED = "two cores"

Round = Mapping[str, Any]


def run(bench: Bench) -> Result:
    """Capacity, 2x, 10x in turns; health and memory are watched during each."""
    made = calibrate.stack_taking(RUN_US, BATCH, bench.folder)
    bench.say(f"a batch of {BATCH} rows runs {made.run_us / 1e3:.2f} ms")
    repository = bench.folder / "models"
    config = f"max_batch_size: {BATCH}\ndynamic_batching {{ }}\n"
    folder = models.put(repository, MODEL, made.model, config=config)
    x = rig.random_rows(1, 16)
    body, expected = rig.body_file(bench.folder, MODEL, x), rig.expected_answer(folder / "model.onnx", x)
    rounds: dict[str, list[Round]] = {}
    for where, cores in CORES.items():
        with rig.serve(repository, bench.folder / "serve.log", cores=cores) as server:
            rig.check_answer(server.grpc_address, MODEL, x, expected)
            rounds[where] = [_round(bench, server, body, number, where) for number in range(bench.count(4, 1))]
            rig.check_answer(server.grpc_address, MODEL, x, expected)
    return judge(made.run_us, rounds)


def _round(bench: Bench, server: ServeProcess, body: Path, number: int, where: str) -> Round:
    capacity = rig.rows_per_s(server, MODEL, body, connections=4, streams=2 * BATCH, seconds=bench.seconds(5.0, 1.0))
    found: dict[str, Any] = {"capacity_per_s": capacity, "rss_before": server.rss_bytes()}
    for factor in FACTORS if number % 2 == 0 else reversed(FACTORS):
        found[f"{factor}x"] = one = _overloaded(bench, server, body, factor * capacity)
        bench.say(f"{where}, round {number + 1}, {factor}x of {capacity:,.0f}/s: {_in_words(one)}")
    return found


def _overloaded(bench: Bench, server: ServeProcess, body: Path, rate: float) -> dict[str, Any]:
    with grpc.insecure_channel(server.grpc_address) as channel:
        health = health_pb2_grpc.HealthStub(channel)
        asked = health_pb2.HealthCheckRequest()
        health.Check(asked, timeout=10)  # connects

        def health_ms() -> float:
            began = time.perf_counter()
            answer = health.Check(asked, timeout=10)
            if answer.status != health_pb2.HealthCheckResponse.SERVING:
                raise rig.BenchError(f"health answered {answer.status} under overload")
            return round(1e3 * (time.perf_counter() - began), 3)

        with rig.Sampler(0.05, health_ms) as healths, rig.Sampler(0.05, server.rss_bytes) as rss:
            found = rig.trusted_open_loop(
                server.grpc_port,
                body,
                rate=rate,
                seconds=bench.seconds(8.0, 2.0),
                timeout_us=DEADLINE_US,
                cancel=True,
                # A fiftieth of the deadline: a send that is later than that is the generator's fault.
                late_us=DEADLINE_US // 50,
            )
    return {**found, "health_ms": healths.values, "rss_peak": max(rss.values)}


def _in_words(one: Mapping[str, Any]) -> str:
    return (
        f"{one['measured']['in_deadline'] / one['duration_s']:,.0f}/s in time, {one['measured']['by_status']}, "
        f"health at most {max(one['health_ms']):.1f} ms"
    )


def judge(run_us: float, rounds: Mapping[str, Sequence[Round]]) -> Result:
    """The goals: goodput, health, memory, and that every refusal is typed. `rounds` by where the server ran."""
    goals = [Goal("ms that a full batch runs, by bare ONNX Runtime", round(run_us / 1e3, 2), ">=", 2.0)]
    for factor in FACTORS:
        name = f"{factor}x"
        runs = [(found, found[name]) for found in rounds[JUDGED]]
        untyped = sum(one["unanswered"] + _untyped(one) for _, one in runs)
        growth = max(one["rss_peak"] - found["rss_before"] for found, one in runs) / 2**20
        goals += [
            Goal(f"goodput / capacity at {name}", _goodput(rounds[JUDGED], name)["median"], ">=", LEAST_GOODPUT),
            Goal(f"slowest health answer at {name}, ms", _slowest_health(runs), "<=", MOST_HEALTH_MS),
            Goal(f"memory added at {name}, MiB", round(growth, 1), "<=", MOST_GROWTH_MIB),
            Goal(f"requests without an answer or with another status than 0, 4, 8 at {name}", untyped, "==", 0),
        ]
    figures = {
        "batch_run_ms": round(run_us / 1e3, 2),
        "deadline_ms": DEADLINE_US / 1e3,
        **{
            where: {f"{factor}x": _figures(found, f"{factor}x") for factor in FACTORS}
            for where, found in rounds.items()
        },
    }
    return Result(goals, figures, {where: list(found) for where, found in rounds.items()})


def _figures(rounds: Sequence[Round], name: str) -> dict[str, Any]:
    return {
        "goodput": _goodput(rounds, name),
        "capacity_per_s": paired.summary([found["capacity_per_s"] for found in rounds]),
        "ok_latency_us": [found[name]["measured"]["ok_latency_us"] for found in rounds],
        "refused_latency_us": [found[name]["measured"]["refused_latency_us"] for found in rounds],
        "slowest_health_ms": _slowest_health([(found, found[name]) for found in rounds]),
    }


def _goodput(rounds: Sequence[Round], name: str) -> dict[str, float]:
    """Right answers in time per second, as a share of the capacity of the same round."""
    return paired.summary(
        [
            found[name]["measured"]["in_deadline"] / found[name]["duration_s"] / found["capacity_per_s"]
            for found in rounds
        ]
    )


def _slowest_health(runs: Sequence[tuple[Round, Round]]) -> float:
    slowest: float = max(ms for _, one in runs for ms in one["health_ms"])
    return slowest


def _untyped(one: Round) -> int:
    return sum(count for status, count in one["measured"]["by_status"].items() if status not in TYPED)
