"""How fast the wire is: h2load, 8 connections x 32 streams and one stream, beside nghttpd and a grpcio echo.

All servers run on one core and idle unless it is their turn; the turns go A B C, C B A, and each ratio is taken within
its round, so that a machine that gets slower or faster favours nobody.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from typing import Any

from loadtests import models, paired, rig
from loadtests.report import Goal, Result
from loadtests.rig import INFER_PATH, Bench, Closed

QUESTION = "How close does a request come to what an HTTP/2 server without gRPC and without a model needs?"
CONNECTIONS, STREAMS = 8, 32
STATIC_BYTES = 300

Run = Callable[[int, int, float], Closed]  # connections, streams, seconds
Rounds = Sequence[Mapping[str, Closed]]


def run(bench: Bench) -> Result:
    """Runs the rounds and judges them."""
    repository = bench.folder / "models"
    files = {"identity": models.identity(), "mlp": models.mlp()}
    rows = {"identity": rig.random_rows(1, 16), "mlp": rig.random_rows(1, 64)}
    folders = {name: models.put(repository, name, model) for name, model in files.items()}
    bodies = {name: rig.body_file(bench.folder, name, x) for name, x in rows.items()}

    with ExitStack() as running:
        static_port, static_pid, static_path = running.enter_context(rig.nghttpd(bench.folder, STATIC_BYTES))
        echo_port, echo_pid = running.enter_context(rig.grpcio_echo())
        server = running.enter_context(rig.serve(repository, bench.folder / "serve.log"))

        def check() -> None:
            for name, x in rows.items():
                rig.check_answer(server.grpc_address, name, x, rig.expected_answer(folders[name] / "model.onnx", x))

        def plain(port: int, pid: int, path: str, body: Any) -> Run:
            return lambda connections, streams, seconds: rig.h2load(
                port, path, body, connections=connections, streams=streams, seconds=seconds, server_pid=pid
            )

        def served(model: str) -> Run:
            load = plain(server.grpc_port, server.pid, INFER_PATH, bodies[model])

            def one(connections: int, streams: int, seconds: float) -> Closed:
                with rig.counted(server, model, connections * streams) as counts:
                    done = load(connections, streams, seconds)
                    counts.append(done.done)
                return done

            return one

        turns = {
            "nghttpd": plain(static_port, static_pid, static_path, None),
            "identity": served("identity"),
            "mlp": served("mlp"),
            "grpcio": plain(echo_port, echo_pid, INFER_PATH, bodies["identity"]),
        }
        check()
        before = rig.scrape(server)
        many = _rounds(bench, turns, list(turns), CONNECTIONS, STREAMS)
        after = rig.scrape(server)
        one = _rounds(bench, turns, ["nghttpd", "identity", "mlp"], 1, 1)
        check()
        batches = {
            name: rig.histogram(before, after, "tidegate_batch_rows", model=name) for name in ("identity", "mlp")
        }
    return judge(many, one, batches)


def _rounds(bench: Bench, turns: Mapping[str, Run], names: Sequence[str], connections: int, streams: int) -> Rounds:
    seconds = bench.seconds(4.0, 0.5)
    for name in names:
        turns[name](connections, streams, bench.seconds(1.0, 0.2))  # warm up
    rounds = []
    for number in range(bench.count(10, 2)):
        found = {name: turns[name](connections, streams, seconds) for name in paired.order(names, number)}
        shown = ", ".join(f"{name} {found[name].per_s:,.0f}/s {found[name].mean_us:.0f} us" for name in names)
        bench.say(f"{connections}x{streams}, round {number + 1}: {shown}")
        rounds.append(found)
    return rounds


def judge(many: Rounds, one: Rounds, batches: Mapping[str, Mapping[str, int]]) -> Result:
    """The goals: ratios of rates at 8x32 and of mean latencies at one stream."""
    rates = [{name: closed.per_s for name, closed in found.items()} for found in many]
    means = [{name: closed.mean_us for name, closed in found.items()} for found in one]

    def ratio(rounds: Sequence[Mapping[str, float]], numerator: str, denominator: str) -> dict[str, float]:
        return paired.summary(paired.ratios(rounds, numerator, denominator))

    identity, mlp = ratio(rates, "identity", "nghttpd"), ratio(rates, "mlp", "nghttpd")
    echo, latency = ratio(rates, "identity", "grpcio"), ratio(means, "identity", "nghttpd")
    goals = [
        Goal("identity [16] / nghttpd, rate at 8x32", identity["median"], ">=", 0.60, stretch=0.85),
        Goal("MLP 64-256-256-10 / nghttpd, rate at 8x32", mlp["median"], ">=", 0.50, stretch=0.60),
        Goal("identity / grpcio aio echo, rate at 8x32", echo["median"], ">=", 50, stretch=80),
        Goal("identity / nghttpd, mean latency at one stream", latency["median"], "<=", 1.4, stretch=1.2),
    ]
    figures = {
        "ratios": {
            "identity/nghttpd": identity,
            "mlp/nghttpd": mlp,
            "identity/grpcio": echo,
            "mlp/grpcio": ratio(rates, "mlp", "grpcio"),
            "identity/nghttpd latency": latency,
            "mlp/nghttpd latency": ratio(means, "mlp", "nghttpd"),
        },
        "8x32": {name: _spread(many, name) for name in many[0]},
        "1x1": {name: _spread(one, name) for name in one[0]},
        "batch_rows_at_8x32": batches,
    }
    raw = {
        shape: [{name: asdict(closed) for name, closed in found.items()} for found in rounds]
        for shape, rounds in (("8x32", many), ("1x1", one))
    }
    return Result(goals, figures, raw)


def _spread(rounds: Rounds, name: str) -> dict[str, Any]:
    runs = [found[name] for found in rounds]
    return {
        "per_s": paired.summary([closed.per_s for closed in runs]),
        "mean_us": paired.summary([closed.mean_us for closed in runs]),
        "server_cpu_us_per_request": paired.summary([closed.server_cpu_us for closed in runs]),
        "client_cpu": paired.summary([closed.client_cpu for closed in runs]),
    }
