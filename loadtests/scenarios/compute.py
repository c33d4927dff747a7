"""What the server takes from a model that computes: its rows/s beside ONNX Runtime alone, on the same core."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from loadtests import calibrate, models, paired, rig
from loadtests.report import Goal, Result
from loadtests.rig import Bench

QUESTION = "How much of bare ONNX Runtime's rows/s is left through the server when the model is what takes the time?"
BATCHES = (8, 16, 32, 64)
CALIBRATION_BATCH = 32
# us a row -> the share of bare rows/s that must be left
TARGETS = {200.0: 0.85, 1000.0: 0.95}
CONNECTIONS = 4


@dataclass(frozen=True, slots=True)
class Measured:
    """One model: what was asked for, what it is, and rows/s per round."""

    target_us: float
    row_us: float
    layers: int
    batch: int  # the best one for bare ONNX Runtime; also the server's max_batch_size
    rounds: Sequence[Mapping[str, float]]  # {"server": rows/s, "bare": rows/s}
    cpu_us_a_row: Mapping[str, float]  # the same two; the server's has all of its threads
    batch_rows: Mapping[str, int]


def run(bench: Bench) -> Result:
    """Measures both models, one after the other."""
    return judge([_measure(bench, target_us) for target_us in TARGETS])


def _measure(bench: Bench, target_us: float) -> Measured:
    seconds, name = bench.seconds(6.0, 0.5), f"rows_of_{target_us:.0f}_us"
    made = calibrate.stack_taking(target_us * CALIBRATION_BATCH, CALIBRATION_BATCH, bench.folder)
    repository = bench.folder / f"models-{name}"
    sweep_file = models.put(bench.folder / "sweep", name, made.model) / "model.onnx"
    sweep = rig.bare_runtime(sweep_file, BATCHES, bench.seconds(1.5, 0.3))
    batch = min(BATCHES, key=lambda rows: sweep["cpu_us"][rows] / rows)
    bench.say(f"{made.layers} layers, {made.row_us:.0f} us a row; best batch {batch} of {sweep['cpu_us']}")
    models.put(repository, name, made.model, config=f"max_batch_size: {batch}\ndynamic_batching {{ }}\n")
    x = rig.random_rows(1, 16)
    body, expected = rig.body_file(bench.folder, name, x), rig.expected_answer(sweep_file, x)

    with rig.serve(repository, bench.folder / f"serve-{name}.log") as server:

        def served() -> float:
            # Four batches in flight: one runs, one waits, and two are on the wire.
            return rig.rows_per_s(server, name, body, connections=CONNECTIONS, streams=batch, seconds=seconds)

        def bare() -> float:
            return rig.bare_runtime(sweep_file, [batch], seconds)["rows_per_s"][batch]

        turns = {"server": served, "bare": bare}
        rig.check_answer(server.grpc_address, name, x, expected)
        rounds = []
        before, cpu_before = rig.scrape(server), server.cpu_seconds()
        for number in range(bench.count(6, 2)):
            found = {turn: turns[turn]() for turn in paired.order(list(turns), number)}
            bench.say(f"round {number + 1}: server {found['server']:,.0f} rows/s, bare {found['bare']:,.0f} rows/s")
            rounds.append(found)
        after, cpu_used = rig.settled(server, name), server.cpu_seconds() - cpu_before
        batch_rows = rig.histogram(before, after, "tidegate_batch_rows", model=name)
        n_rows = after.total("nv_inference_count", model=name) - before.total("nv_inference_count", model=name)
        cpu_us_a_row = {"server": 1e6 * cpu_used / n_rows, "bare": sweep["cpu_us"][batch] / batch}
        rig.check_answer(server.grpc_address, name, x, expected)
    return Measured(target_us, made.row_us, made.layers, batch, rounds, cpu_us_a_row, batch_rows)


def judge(measured: Sequence[Measured]) -> Result:
    """The goals: the share of bare rows/s that is left, per model."""
    goals, figures, raw = [], {}, {}
    for one in measured:
        ratio = paired.summary(paired.ratios(one.rounds, "server", "bare"))
        name = f"{one.target_us:.0f} us a row"
        goals.append(Goal(f"server / bare ONNX Runtime, {name}", ratio["median"], ">=", TARGETS[one.target_us]))
        figures[name] = {
            "ratio": ratio,
            "measured_us_a_row": round(one.row_us, 1),
            "layers": one.layers,
            "batch": one.batch,
            "server_rows_per_s": paired.summary([found["server"] for found in one.rounds]),
            "bare_rows_per_s": paired.summary([found["bare"] for found in one.rounds]),
            "cpu_us_a_row": {where: round(us, 2) for where, us in one.cpu_us_a_row.items()},
            "batch_rows": dict(one.batch_rows),
        }
        raw[name] = _rounded(one.rounds)
    return Result(goals, figures, raw)


def _rounded(rounds: Sequence[Mapping[str, float]]) -> list[dict[str, Any]]:
    return [{name: round(value, 1) for name, value in found.items()} for found in rounds]
