"""What each scenario makes of its measurements: good ones meet every goal, and each wrong one is noticed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as pb

from loadtests.report import Result
from loadtests.rig import BenchError, Closed
from loadtests.scenarios import compute, disturb, identity_ids, overload, payload, perf_analyzer, reload, wire
from server.demo.exposition import samples_of


def missed(result: Result) -> list[str]:
    return [goal.name for goal in result.goals if not goal.ok]


# -- wire --------------------------------------------------------------------------------------------------------------


def closed(per_s: float, mean_us: float = 100.0) -> Closed:
    return Closed(per_s, 1000, mean_us, 1.0, 0.5, 2.0)


def wire_rounds(**rates: float) -> list[dict[str, Closed]]:
    return [{name: closed(rate * speed) for name, rate in rates.items()} for speed in (1.0, 0.7, 1.3)]


GOOD_RATES = {"nghttpd": 400e3, "identity": 360e3, "mlp": 250e3, "grpcio": 3e3}


def latencies(identity_us: float) -> list[dict[str, Closed]]:
    return [{"nghttpd": closed(1e4, 100.0), "identity": closed(8e3, identity_us), "mlp": closed(8e3, 130.0)}] * 3


def test_wire_takes_ratios_within_rounds_of_a_machine_that_changes_its_speed() -> None:
    result = wire.judge(wire_rounds(**GOOD_RATES), latencies(115.0), {})
    assert missed(result) == []
    assert [round(goal.value, 3) for goal in result.goals] == [0.9, 0.625, 120.0, 1.15]
    assert all(goal.is_stretch_met for goal in result.goals)
    assert result.figures["8x32"]["identity"]["per_s"] == {"median": 360e3, "low": 252e3, "high": 468e3, "n": 3}


@pytest.mark.parametrize(
    ("rates", "latency_us", "expected"),
    [
        ({"identity": 230e3}, 115.0, "identity [16] / nghttpd, rate at 8x32"),
        ({"mlp": 190e3}, 115.0, "MLP 64-256-256-10 / nghttpd, rate at 8x32"),
        ({"grpcio": 8e3}, 115.0, "identity / grpcio aio echo, rate at 8x32"),
        ({}, 141.0, "identity / nghttpd, mean latency at one stream"),
    ],
)
def test_wire_misses_a_ratio(rates: dict[str, float], latency_us: float, expected: str) -> None:
    assert missed(wire.judge(wire_rounds(**{**GOOD_RATES, **rates}), latencies(latency_us), {})) == [expected]


# -- payload -----------------------------------------------------------------------------------------------------------


def image_counts(received: float, gathered: float) -> dict[str, payload.Counted]:
    return {"one by one": payload.Counted(10, received * 10 * payload.PAYLOAD, gathered * 10 * payload.PAYLOAD)}


def test_payload_allows_two_copies_and_the_message_around_the_tensor() -> None:
    assert missed(payload.judge(image_counts(1.0001, 1.0), closed(1000), 50.0)) == []


@pytest.mark.parametrize(
    ("received", "gathered", "expected"),
    [
        (2.0, 1.0, "copies of a 602,112-byte payload, one by one"),
        (1.02, 1.0, "copies of a 602,112-byte payload, one by one"),
        (0.0, 1.0, "payload seen by the counter of received bytes, one by one"),
    ],
)
def test_payload_notices_a_copy_too_many_and_a_counter_that_stands_still(
    received: float, gathered: float, expected: str
) -> None:
    assert missed(payload.judge(image_counts(received, gathered), closed(1000), 50.0)) == [expected]


# -- compute -----------------------------------------------------------------------------------------------------------


def computed(target_us: float, share: float) -> compute.Measured:
    rounds = [{"server": share * bare, "bare": bare} for bare in (900.0, 1000.0, 1100.0)]
    return compute.Measured(target_us, target_us, 10, 32, rounds, {"server": 205.0, "bare": 200.0}, {"32": 100})


def test_compute_judges_each_model_by_its_own_share() -> None:
    assert missed(compute.judge([computed(200.0, 0.86), computed(1000.0, 0.96)])) == []
    assert missed(compute.judge([computed(200.0, 0.84), computed(1000.0, 0.94)])) == [
        "server / bare ONNX Runtime, 200 us a row",
        "server / bare ONNX Runtime, 1000 us a row",
    ]


# -- overload ----------------------------------------------------------------------------------------------------------


def offered(in_deadline: int = 950, **changes: Any) -> dict[str, Any]:
    measured = {
        "in_deadline": in_deadline,
        "by_status": changes.pop("by_status", {"0": in_deadline, "4": 7, "8": 900}),
        "ok_latency_us": {},
        "refused_latency_us": {},
    }
    good = {"measured": measured, "duration_s": 1.0, "health_ms": [1.0, 49.0], "rss_peak": 60 << 20, "unanswered": 0}
    return {**good, **changes}


def overload_round(**at_10x: Any) -> dict[str, Any]:
    return {"capacity_per_s": 1000.0, "rss_before": 50 << 20, "2x": offered(), "10x": offered(**at_10x)}


def test_overload_is_met_by_a_server_that_refuses_in_time() -> None:
    assert missed(overload.judge(4000.0, {"two cores": [overload_round()]})) == []


@pytest.mark.parametrize(
    ("at_10x", "expected"),
    [
        ({"in_deadline": 890}, "goodput / capacity at 10x"),
        ({"health_ms": [51.0, 1.0]}, "slowest health answer at 10x, ms"),
        ({"rss_peak": 115 << 20}, "memory added at 10x, MiB"),
        ({"unanswered": 1}, "requests without an answer or with another status than 0, 4, 8 at 10x"),
        ({"by_status": {"0": 950, "14": 1}}, "requests without an answer or with another status than 0, 4, 8 at 10x"),
        ({"by_status": {"0": 950, "none": 1}}, "requests without an answer or with another status than 0, 4, 8 at 10x"),
    ],
)
def test_overload_notices(at_10x: dict[str, Any], expected: str) -> None:
    assert missed(overload.judge(4000.0, {"two cores": [overload_round(**at_10x)]})) == [expected]


def test_overload_shows_one_core_and_judges_two() -> None:
    rounds = {"two cores": [overload_round()], "one core": [overload_round(in_deadline=600)]}
    result = overload.judge(4000.0, rounds)
    assert missed(result) == []
    assert result.figures["one core"]["10x"]["goodput"]["median"] == 0.6


def test_overload_wants_a_batch_of_two_ms() -> None:
    assert missed(overload.judge(1900.0, {"two cores": [overload_round()]})) == [
        "ms that a full batch runs, by bare ONNX Runtime"
    ]


# -- disturb -----------------------------------------------------------------------------------------------------------


def pair(ratio: float) -> dict[str, Any]:
    def one(p99: float) -> dict[str, Any]:
        return {"measured": {"ok_latency_us": {"p99": p99}}}

    return {"alone": one(500.0), "disturbed": {**one(500.0 * ratio), "disturber": {"done": 100, "seconds": 5.0}}}


def test_disturb_judges_the_median_of_the_pairs() -> None:
    good = {"look": [pair(1.0), pair(1.09), pair(3.0)], "load": [pair(1.49)]}
    assert missed(disturb.judge(50.0, 2e4, good)) == []
    bad = {"look": [pair(1.11)], "load": [pair(1.51)]}
    assert missed(disturb.judge(50.0, 2e4, bad)) == [disturb.NAMES["look"], disturb.NAMES["load"]]


@pytest.mark.parametrize(
    ("what", "done", "is_enough"), [("look", 180, True), ("look", 179, False), ("load", 1, True), ("load", 0, False)]
)
def test_a_disturber_that_did_too_little_makes_the_run_say_nothing(what: str, done: int, is_enough: bool) -> None:
    report = {"done": done, "seconds": 10.0, "slowest_ms": 3.0}
    if is_enough:
        assert disturb.checked_disturbance(what, report) == report
    else:
        with pytest.raises(BenchError, match=f"the disturber {what} did {done}"):
            disturb.checked_disturbance(what, report)


# -- identity_ids ------------------------------------------------------------------------------------------------------


def reply_to(number: int, version: int, **changes: str) -> pb.ModelInferResponse:
    y = identity_ids.row_of(number) + np.float32(version)
    message = pb.ModelInferResponse(id=identity_ids.request_id(number), model_version=str(version))
    message.raw_output_contents.append(y.tobytes())
    for name, value in changes.items():
        setattr(message, name, value)
    return message


def test_an_answer_is_the_requests_own_by_its_id_version_and_numbers() -> None:
    assert identity_ids.is_own(1234, reply_to(1234, 7))
    assert not identity_ids.is_own(1234, reply_to(1234, 7, id="request-1235"))
    assert not identity_ids.is_own(1234, reply_to(1234, 7, model_version="8"))
    assert not identity_ids.is_own(1234, reply_to(1234, 7, model_version=""))
    assert not identity_ids.is_own(1234, reply_to(2234, 7, id="request-1234"))
    assert not identity_ids.is_own(1234, pb.ModelInferResponse(id="request-1234", model_version="7"))


def test_no_two_requests_and_versions_have_one_answer() -> None:
    rows = {identity_ids.row_of(number).tobytes() for number in (*range(3000), 99_999, 100_000)}
    assert len(rows) == 3002
    numbers = np.unique(np.concatenate([identity_ids.row_of(number)[0] for number in range(3000)]))
    assert np.diff(numbers).min() >= 32 > identity_ids.SWAPS + 1


def answered(count: int = 110) -> identity_ids.Outcome:
    outcome = identity_ids.Outcome()
    for number in range(count):
        outcome.take(number, reply_to(number, 1 + number // 10))
    return outcome


def test_swaps_begin_at_equal_distances_and_are_waited_for_in_the_second_half() -> None:
    stages = [identity_ids.stage_of(number, 1100) for number in range(1100)]
    assert [number for number, stage in enumerate(stages) if stage.starts_swap] == list(range(100, 1100, 100))
    for number, stage in enumerate(stages):
        assert stage.swaps == number // 100
        is_under_way = number >= 100 and number % 100 < 50
        assert stage.swaps_done == stage.swaps - is_under_way


SWAPS_S = [0.1] * 10
COUNTED = {str(version): 10 for version in range(1, 12)}


def test_identity_ids_is_met_when_all_is_answered_once() -> None:
    assert missed(identity_ids.judge(110, answered(), SWAPS_S, 1.0, COUNTED)) == []


def test_identity_ids_notices_each_kind_of_mistake() -> None:
    lost, twice, foreign, failed = answered(), answered(), answered(), answered()
    del lost.answers["request-5"]
    twice.answers["request-5"] += 1
    foreign.foreign += 1
    failed.failed += 1
    names = [missed(identity_ids.judge(110, one, SWAPS_S, 1.0, COUNTED)) for one in (lost, twice, foreign, failed)]
    assert names == [
        ["ids that got no answer"],
        ["ids that got more than one answer"],
        ["answers that are not the request's own"],
        ["requests that failed"],
    ]
    assert missed(identity_ids.judge(110, answered(), SWAPS_S[1:], 1.0, COUNTED)) == ["hot swaps done"]
    for counted in ({**COUNTED, "3": 11}, {**COUNTED, "12": 1}, {version: 10 for version in COUNTED if version != "3"}):
        assert missed(identity_ids.judge(110, answered(), SWAPS_S, 1.0, counted)) == [
            "versions of which the server counted other answers than its clients"
        ]
    only_two = identity_ids.Outcome(Counter(answered().answers), Counter({"1": 100, "11": 10}))
    assert missed(identity_ids.judge(110, only_two, SWAPS_S, 1.0, {"1": 100, "11": 10})) == ["versions that answered"]


def test_a_foreign_answer_is_noted_with_its_request() -> None:
    outcome = identity_ids.Outcome()
    outcome.take(3, reply_to(4, 1))
    assert (outcome.foreign, outcome.errors) == (1, ["request 3 got id 'request-4' of version '1'"])


# -- perf_analyzer -----------------------------------------------------------------------------------------------------

PERF_TEXT = """*** Measurement Settings ***
Request concurrency: 4
  Client:
    Request count: 9000
    Throughput: 2999.5 infer/sec
  Server:
    Inference count: 9100
    Execution count: 4100
    Successful request count: 9100
    Avg request latency: 210 usec (overhead 20 usec + queue 50 usec + compute input 30 usec + compute infer 90 usec \
+ compute output 20 usec)
"""


def table(folder: Path) -> Path:
    path = folder / "table.csv"
    path.write_text("Concurrency,Inferences/Second,p50 latency,p99 latency\n4,2999.5,310,520\n")
    return path


def test_perf_analyzers_output_is_read(tmp_path: Path) -> None:
    assert perf_analyzer.parse("async", 0, PERF_TEXT, table(tmp_path)) == {
        "per_s": 2999.5,
        "p50_us": 310.0,
        "p99_us": 520.0,
        "inferences": 9100,
        "executions": 4100,
        "successes": 9100,
        "server_latency_us": 210,
        "server_us": {"overhead": 20, "queue": 50, "compute_input": 30, "compute_infer": 90, "compute_output": 20},
    }


def test_perf_analyzer_without_server_side_statistics_has_not_completed(tmp_path: Path) -> None:
    client_only = PERF_TEXT.partition("  Server:")[0]
    with pytest.raises(BenchError, match="no server-side statistics"):
        perf_analyzer.parse("async", 0, client_only, table(tmp_path))
    with pytest.raises(BenchError, match="exited 3"):
        perf_analyzer.parse("async", 3, PERF_TEXT, table(tmp_path))
    with pytest.raises(BenchError, match="exited 0"):
        perf_analyzer.parse("async", 0, PERF_TEXT, tmp_path / "missing.csv")


def test_perf_analyzer_must_have_counted_in_every_mode() -> None:
    good = {mode: {"successes": 10, "per_s": 5.0} for mode in perf_analyzer.MODES}
    assert missed(perf_analyzer.judge(good)) == []
    bad = {**good, "async": {"successes": 0, "per_s": 5.0}}
    assert missed(perf_analyzer.judge(bad)) == ["async: inferences in the server-side statistics"]


# -- reload ------------------------------------------------------------------------------------------------------------

LIVE: Mapping[str, int] = {"session": 1, "version": 1, "request": 0}


def memory(growth: float, count: int = 1000) -> list[int]:
    return [int((200 << 20) * (1 + growth * number / count)) for number in range(count)]


def test_reload_is_met_by_flat_memory_and_the_same_objects() -> None:
    result = reload.judge(memory(0.01), [0.2], LIVE, LIVE, 90_000_000)
    assert missed(result) == []
    assert result.figures["file_mb"] == 90.0


def test_reload_notices_growth_and_each_object_left_over() -> None:
    assert missed(reload.judge(memory(0.05), [0.2], LIVE, LIVE, 1)) == ["memory after 1000 reloads / after 100"]
    left = {**LIVE, "version": 2, "instance": 1}
    assert missed(reload.judge(memory(0.0), [0.2], LIVE, left, 1)) == [
        "live native objects left over: instance",
        "live native objects left over: version",
    ]


def test_reload_reads_live_objects_and_does_not_take_silence_for_none() -> None:
    kinds = 'tidegate_live_objects{kind="session"} 2\ntidegate_live_objects{kind="request"} 9\n'
    assert reload.live_by_kind(samples_of(f"{kinds}tidegate_requests_live 1")) == {"session": 2, "request": 1}
    with pytest.raises(BenchError, match="tidegate_requests_live"):
        reload.live_by_kind(samples_of(kinds))
    with pytest.raises(BenchError, match="tidegate_live_objects"):
        reload.live_by_kind(samples_of("other 1"))


def test_a_replaced_file_is_another_file_with_the_new_content(tmp_path: Path) -> None:
    sources = [tmp_path / "a", tmp_path / "b"]
    for source in sources:
        source.write_text(source.name)
    served = tmp_path / "models" / "m" / "1" / "model.onnx"
    served.parent.mkdir(parents=True)
    seen = []
    for source in (*sources, *sources):
        reload._replace(served, source)
        seen.append((served.read_text(), served.stat().st_ino))
    assert [text for text, _ in seen] == ["a", "b", "a", "b"]
    assert all(one[1] != other[1] for one, other in pairwise(seen))
