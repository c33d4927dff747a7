"""The text of /metrics: names and labels that dashboards ask for, numbers that add up, a format that others read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from server.config import ControlMode
from server.demo.exposition import Scrape, samples_of
from server.gpus import Gpu
from server.manager import Manager
from server.metrics import Family, Metrics, Sample, exposition, histogram, number
from server.statistics import SHOWN_S
from tests.server.fakes import Histogram, ManualClock, counts, counts_of
from tests.server.world import World

PER_VERSION = [
    "nv_inference_request_success",
    "nv_inference_count",
    "nv_inference_exec_count",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_compute_input_duration_us",
    "nv_inference_compute_infer_duration_us",
    "nv_inference_compute_output_duration_us",
    "nv_inference_pending_request_count",
    "nv_model_load_duration_secs",
    "tidegate_model_memory_bytes",
    "tidegate_bytes_gathered_total",
    "tidegate_request_duration_seconds_count",
    "tidegate_queue_duration_seconds_count",
    "tidegate_batch_rows_count",
]
A = {"model": "a", "version": "1"}


def a_gpu(**changes: Any) -> Gpu:
    return Gpu("GPU-1", 0.25, 80 << 30, 1 << 30, 100.5, 700.0, 12345.678)._replace(**changes)


class Reader:
    """Scrapes the metrics of a manager."""

    def __init__(self, manager: Manager, world: World, gpus: list[Gpu] | None = None) -> None:
        self.metrics = Metrics(
            manager,
            lambda: {"calls": 7, "connections_open": 2, "bytes_received": 4096, "something_new": 1},
            world.native.live_objects,
            versions={"version": "0.1.0", "onnxruntime": "1.31.0"},
            gpus=lambda: gpus or [],
        )

    def text(self) -> str:
        return self.metrics.text()

    def read(self) -> Scrape:
        return samples_of(self.text())


@pytest.fixture
def manager(world: World) -> Manager:
    world.put("a")
    return world.started(ControlMode.EXPLICIT, load_models=["a"])


@pytest.fixture
def reader(manager: Manager, world: World) -> Reader:
    return Reader(manager, world)


def test_every_series_of_a_version_exists_from_its_load_on(reader: Reader) -> None:
    scrape = reader.read()
    for name in PER_VERSION:
        (series,) = scrape.matching(name)
        assert series.labels == A
        if name not in ("nv_model_load_duration_secs", "tidegate_model_memory_bytes"):
            assert series.value == 0
    failures = scrape.matching("nv_inference_request_failure")
    assert [(one.labels["reason"], one.value) for one in failures] == [
        ("REJECTED", 0),
        ("CANCELED", 0),
        ("BACKEND", 0),
        ("OTHER", 0),
    ]
    shed = scrape.matching("tidegate_shed_total")
    assert [one.labels for one in shed] == [
        {"model": "a", "reason": reason} for reason in ("DEADLINE_PASSED", "QUEUE_FULL", "TOO_LATE")
    ]


def test_counts_are_those_of_the_native_core(reader: Reader, world: World) -> None:
    world.native.serving("a-1").counts = counts_of(8)._replace(
        pending=3,
        inference_count=20,
        bisections=2,
        failures={"REJECTED": 4, "CANCELED": 1, "BACKEND": 2, "OTHER": 0},
        shed={"QUEUE_FULL": 3, "TOO_LATE": 1, "DEADLINE_PASSED": 0},
    )
    scrape = reader.read()
    expected = {
        "nv_inference_request_success": 8,
        "nv_inference_count": 20,
        "nv_inference_exec_count": 8,
        "nv_inference_request_duration_us": 8000,
        "nv_inference_queue_duration_us": 800,
        "nv_inference_compute_input_duration_us": 1600,
        "nv_inference_compute_infer_duration_us": 4000,
        "nv_inference_compute_output_duration_us": 800,
        "nv_inference_pending_request_count": 3,
        "tidegate_bytes_gathered_total": 128,
        "tidegate_batch_bisections_total": 2,
    }
    assert {name: scrape.total(name, **A) for name in expected} == expected
    assert scrape.total("nv_inference_request_failure", reason="REJECTED") == 4
    assert scrape.total("nv_inference_request_failure") == 7
    assert scrape.total("tidegate_shed_total", reason="QUEUE_FULL") == 3


def test_counters_never_go_back_through_a_reload(reader: Reader, manager: Manager, world: World) -> None:
    world.native.serving("a-1").counts = counts_of(8)
    manager.load("a")
    assert reader.read().total("nv_inference_request_success", **A) == 8
    world.settle()
    assert reader.read().total("nv_inference_request_success", **A) == 8
    world.native.serving("a-1").counts = counts_of(2)
    scrape = reader.read()
    assert scrape.total("nv_inference_request_success", **A) == 10
    assert scrape.total("tidegate_request_duration_seconds_count", **A) == 10


def test_the_last_counts_of_a_version_that_left_can_still_be_read(
    reader: Reader, manager: Manager, world: World
) -> None:
    world.native.serving("a-1").counts = counts_of(8)
    world.put("a", "2")
    manager.load("a")
    world.settle()
    scrape = reader.read()
    assert scrape.total("nv_inference_request_success", **A) == 8
    assert not scrape.matching("tidegate_model_memory_bytes", **A), "it has no memory any more"
    world.clock.advance(SHOWN_S)
    scrape = reader.read()
    assert not scrape.matching("nv_inference_request_success", **A)
    assert scrape.matching("nv_inference_request_success", model="a", version="2")


def test_other_parsers_read_the_text(reader: Reader, world: World) -> None:
    world.native.serving("a-1").counts = counts_of(3)
    families = {family.name: family for family in text_string_to_metric_families(reader.text())}
    assert families["tidegate_batch_rows"].type == "histogram"
    assert families["nv_inference_pending_request_count"].type == "gauge"
    assert families["nv_inference_count"].type == "counter"
    ours = {(one.name, tuple(sorted(one.labels.items()))): one.value for one in reader.read().series}
    theirs = {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in families.values()
        for sample in family.samples
    }
    # The parser renames counters that do not end as it wants.
    renamed = {name + "_total" for name, _ in ours if name.startswith("nv_")}
    theirs = {
        ((name.removesuffix("_total") if name in renamed else name), labels): value
        for (name, labels), value in theirs.items()
    }
    assert ours.keys() == theirs.keys()
    still = {key for key in ours if key[0].startswith(("nv_inference", "tidegate"))}
    assert {key: ours[key] for key in still} == {key: theirs[key] for key in still}


def test_every_family_has_help_and_type_and_appears_once(reader: Reader) -> None:
    text = reader.text()
    helps = re.findall(r"^# HELP (\S+) \S", text, re.M)
    types = re.findall(r"^# TYPE (\S+) (?:counter|gauge|histogram)$", text, re.M)
    assert helps == types
    assert len(set(helps)) == len(helps)
    assert text.endswith("\n")
    assert "\n\n" not in text


def test_no_number_has_an_exponent(reader: Reader, world: World) -> None:
    world.native.serving("a-1").counts = counts(
        success_ns=10**30, request_duration=Histogram((1e-7, 1e9), (10**20, 1, 1), 1e-9)
    )
    for line in reader.text().splitlines():
        if not line.startswith("#"):
            assert re.fullmatch(r'\S+?(\{.*\})? -?\d+(\.\d+)?|.*le="\+Inf".* \d+', line), line


def test_counters_of_the_front_end_have_its_name(reader: Reader) -> None:
    text = reader.text()
    scrape = samples_of(text)
    assert scrape.total("tidegate_calls_total") == 7
    assert scrape.total("tidegate_bytes_received_total") == 4096
    assert scrape.total("tidegate_connections_open") == 2
    assert "# TYPE tidegate_connections_open gauge" in text
    assert "# HELP tidegate_something_new_total Something new" in text
    assert scrape.total("tidegate_live_objects", kind="version") == 1


def test_the_machine_and_the_process_are_there(reader: Reader) -> None:
    scrape = reader.read()
    assert 0 <= scrape.total("nv_cpu_utilization") <= 1
    assert 0 < scrape.total("nv_cpu_memory_used_bytes") < scrape.total("nv_cpu_memory_total_bytes")
    assert scrape.total("process_resident_memory_bytes") > 1e6
    assert scrape.total("process_cpu_seconds_total") > 0
    assert scrape.total("process_open_fds") >= 3
    (info,) = scrape.matching("tidegate_build_info")
    assert info.labels == {"version": "0.1.0", "onnxruntime": "1.31.0"}


def test_gpus_are_lines_that_perf_analyzer_can_read(manager: Manager, world: World) -> None:
    text = Reader(manager, world, [a_gpu(), a_gpu(uuid="GPU-2", memory_used=3)]).text()
    for name, value in (
        ("nv_gpu_utilization", "0.25"),
        ("nv_gpu_power_usage", "100.5"),
        ("nv_gpu_power_limit", "700"),
        ("nv_gpu_memory_total_bytes", str(80 << 30)),
        ("nv_gpu_memory_used_bytes", str(1 << 30)),
        ("nv_energy_consumption", "12345.678"),
    ):
        assert f'\n{name}{{gpu_uuid="GPU-1"}} {value}\n' in text
    assert '\nnv_gpu_memory_used_bytes{gpu_uuid="GPU-2"} 3\n' in text


def test_without_a_gpu_there_are_no_gpu_lines(reader: Reader) -> None:
    assert "nv_gpu" not in reader.text()


def test_labels_are_escaped(tmp_path: Path) -> None:
    text = exposition([Family("x", "gauge", "h", [Sample((("l", 'a"b\\c\nd'),), 1)])])
    assert text == '# HELP x h\n# TYPE x gauge\nx{l="a\\"b\\\\c\\nd"} 1\n'
    (series,) = samples_of(text).series
    assert series.labels["l"] == 'a"b\\c\nd'


def test_buckets_are_cumulative_and_agree_with_the_count() -> None:
    samples = list(histogram((("m", "a"),), Histogram((0.5, 1.0, 2.5), (1, 0, 2, 4), 21.5)))  # type: ignore[arg-type]
    assert [(one.suffix, dict(one.labels).get("le"), one.value) for one in samples] == [
        ("_bucket", "0.5", 1),
        ("_bucket", "1", 1),
        ("_bucket", "2.5", 3),
        ("_bucket", "+Inf", 7),
        ("_sum", None, 21.5),
        ("_count", None, 7),
    ]


@given(st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(10**40), 10**40))
def test_a_number_reads_back_as_itself(value: float) -> None:
    text = number(value)
    assert re.fullmatch(r"-?\d+(\.\d+)?", text)
    assert (int(text) if isinstance(value, int) else float(text)) == value


def test_a_scrape_asks_nothing_of_a_manager_that_is_busy(world: World) -> None:
    manager = world.manager()
    reader = Reader(manager, world)
    with manager._state_lock:
        assert reader.read().names()


def test_cpu_utilization_is_a_share_of_the_time_between_two_scrapes() -> None:
    from server.host import CpuTimes, CpuUsage

    clock = ManualClock()
    readings = iter([CpuTimes(0, 0), CpuTimes(30, 100), CpuTimes(30, 100), CpuTimes(130, 200)])
    usage = CpuUsage(lambda: next(readings), clock)
    assert usage.utilization() == 0.0
    clock.advance(1)
    assert usage.utilization() == 0.3
    clock.advance(0.1)
    assert usage.utilization() == 0.3, "too soon to say something new"
    clock.advance(1)
    assert usage.utilization() == 0.3, "no time has passed for the kernel"
    clock.advance(1)
    assert usage.utilization() == 1.0
