"""/metrics as scrapers, dashboards and perf_analyzer read it."""

from __future__ import annotations

import http.client
import re
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    PATIENCE_S,
    Code,
    Served,
    array_of,
    countdown_request,
    eventually,
    infer_request,
    int64_rows,
    metric,
    occupy,
    refused,
    status_of,
    waiting,
)

# Every series that a loaded version has, with its other labels.
OF_A_VERSION = {
    "nv_inference_request_success": [{}],
    "nv_inference_request_failure": [{"reason": one} for one in ("REJECTED", "CANCELED", "BACKEND", "OTHER")],
    "nv_inference_count": [{}],
    "nv_inference_exec_count": [{}],
    "nv_inference_pending_request_count": [{}],
    "nv_inference_request_duration_us": [{}],
    "nv_inference_queue_duration_us": [{}],
    "nv_inference_compute_input_duration_us": [{}],
    "nv_inference_compute_infer_duration_us": [{}],
    "nv_inference_compute_output_duration_us": [{}],
    "tidegate_request_duration_seconds_count": [{}],
    "tidegate_request_duration_seconds_sum": [{}],
    "tidegate_queue_duration_seconds_count": [{}],
    "tidegate_queue_duration_seconds_sum": [{}],
    "tidegate_batch_rows_count": [{}],
    "tidegate_batch_rows_sum": [{}],
}
HISTOGRAMS = ("tidegate_request_duration_seconds", "tidegate_queue_duration_seconds", "tidegate_batch_rows")
SHED = ("QUEUE_FULL", "TOO_LATE", "DEADLINE_PASSED")
OF_THE_HOST = ("nv_cpu_utilization", "nv_cpu_memory_total_bytes", "nv_cpu_memory_used_bytes")
OF_A_GPU = (
    "nv_gpu_utilization",
    "nv_gpu_memory_total_bytes",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_power_usage",
    "nv_gpu_power_limit",
    "nv_energy_consumption",
)

MODELS = ("idle", "counted", "full", "late", "reloaded", "strange-name_1.x", "crowd")


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    for name in ("idle", "counted", "reloaded", "strange-name_1.x"):
        models.put(root, name, models.look_up(), config="max_batch_size: 16")
    models.put(root, "crowd", models.add(1))
    for name in ("full", "late"):
        config = "max_batch_size: 1 dynamic_batching { default_queue_policy { max_queue_size: 2 } }"
        models.put(root, name, models.countdown(is_batched=True), config=config)
    return serve_module(root, "--model-control-mode", "explicit", "--load-model", "*")


@pytest.fixture(scope="module")
def stub(served: Served) -> Any:
    return served.stub()


def look_up(stub: Any, model: str, *index: int) -> Any:
    return stub.ModelInfer(infer_request(model, ("index", "INT64", int64_rows(*index))), timeout=PATIENCE_S)


# -- the text ----------------------------------------------------------------------------------------------------------


def test_the_text_is_what_scrapers_read(served: Served) -> None:
    text = served.metrics_text()
    families = list(text_string_to_metric_families(text))
    assert len(families) > 40
    assert {family.type for family in families} == {"counter", "gauge", "histogram"}
    assert all(family.documentation for family in families)
    declared = re.findall(r"^# TYPE (\S+) (\S+)$", text, re.MULTILINE)
    assert len(dict(declared)) == len(declared), "each family is declared once"
    assert re.findall(r"^# HELP (\S+) ", text, re.MULTILINE) == [name for name, _ in declared]
    samples = [line for line in text.splitlines() if not line.startswith("#")]
    assert [line for line, n in Counter(line.rpartition(" ")[0] for line in samples).items() if n > 1] == []
    for line in samples:
        # Readers that know no exponents read 1e+09 as 1.
        assert re.fullmatch(r'[a-z_]+(\{([a-z_]+="[^"\n]*",?)+\})? -?\d+(\.\d+)?', line), line


def test_counters_have_the_names_that_dashboards_ask_for(served: Served) -> None:
    text = served.metrics_text()
    assert "nv_inference_count_total" not in text
    for query in (
        "nv_inference_count",
        "nv_inference_request_success",
        "nv_inference_request_failure",
        "nv_inference_compute_infer_duration_us",
        "nv_inference_queue_duration_us",
        "nv_cpu_memory_used_bytes",
        "nv_cpu_utilization",
    ):
        assert re.search(rf"^{query}(\{{| )", text, re.MULTILINE), query


def test_it_is_served_over_http_as_text_with_a_version(served: Served) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", served.metrics_port, timeout=PATIENCE_S)

    def ask(method: str, path: str) -> tuple[int, str, bytes]:
        connection.request(method, path)
        answer = connection.getresponse()
        return answer.status, answer.getheader("Content-Type", ""), answer.read()

    status, kind, body = ask("GET", "/metrics")
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    assert b"nv_inference_count" in body
    assert ask("HEAD", "/metrics")[::2] == (200, b"")
    assert ask("GET", "/metrics?name[]=x")[0] == 200
    assert ask("GET", "/nothing")[0] == 404
    assert ask("POST", "/metrics")[0] == 405
    connection.close()


# -- series ------------------------------------------------------------------------------------------------------------


def test_every_series_of_a_version_is_there_at_0_from_the_load(served: Served) -> None:
    metrics = served.metrics()
    labels = {"model": "idle", "version": "1"}
    for name, series in OF_A_VERSION.items():
        for more in series:
            assert metric(metrics, name, **labels, **more) == 0, (name, more)
    for name in HISTOGRAMS:
        buckets = {
            key: value for key, value in metrics.items() if key[0] == f"{name}_bucket" and labels.items() <= set(key[1])
        }
        assert len(buckets) > 10
        assert set(buckets.values()) == {0}
        assert any(("le", "+Inf") in key[1] for key in buckets)
    for reason in SHED:
        assert metric(metrics, "tidegate_shed_total", model="idle", reason=reason) == 0
    assert metric(metrics, "tidegate_model_memory_bytes", **labels) > 0
    assert 0 < metric(metrics, "nv_model_load_duration_secs", **labels) < 60


def test_every_loaded_version_has_the_same_series(served: Served) -> None:
    of_model: dict[str, set[Any]] = {name: set() for name in MODELS}
    for name, labels in served.metrics():
        values = dict(labels)
        if "model" in values:
            model = values.pop("model")
            of_model[model].add((name, frozenset(values.items())))
    assert len(of_model["idle"]) > 50
    for model, series in of_model.items():
        assert series == of_model["idle"], model


def test_the_host_and_the_process_are_there(served: Served) -> None:
    metrics = served.metrics()
    for name in OF_THE_HOST:
        assert metric(metrics, name) >= 0
    assert 0 <= metric(metrics, "nv_cpu_utilization") <= 1
    assert 0 < metric(metrics, "nv_cpu_memory_used_bytes") < metric(metrics, "nv_cpu_memory_total_bytes")
    assert metric(metrics, "process_resident_memory_bytes") == pytest.approx(served.rss_bytes(), rel=0.2)
    assert metric(metrics, "process_threads") > 5


def test_gpu_lines_are_there_when_there_is_a_gpu(served: Served) -> None:
    devices = Path("/proc/driver/nvidia/gpus")
    n_gpus = len(list(devices.iterdir())) if devices.is_dir() else 0
    found = {name: labels for name, labels in served.metrics() if name.startswith(("nv_gpu", "nv_energy"))}
    if n_gpus == 0:
        assert found == {}
    else:
        assert {name.removesuffix("_total") for name in found} == set(OF_A_GPU)
        assert all([name for name, _ in labels] == ["gpu_uuid"] for labels in found.values())


# -- counts ------------------------------------------------------------------------------------------------------------


def test_counts_are_exactly_what_was_sent(served: Served, stub: Any) -> None:
    for rows in (1, 1, 1, 1, 2, 2, 16):
        look_up(stub, "counted", *[3] * rows)
    for _ in range(3):
        refused(Code.INVALID_ARGUMENT, lambda: look_up(stub, "counted", *[0] * 17))
    for _ in range(2):
        refused(Code.INTERNAL, lambda: look_up(stub, "counted", 1000), "counted")
    metrics = served.metrics()
    labels = {"model": "counted", "version": "1"}
    assert metric(metrics, "nv_inference_request_success", **labels) == 7
    assert metric(metrics, "nv_inference_count", **labels) == 24
    assert metric(metrics, "nv_inference_exec_count", **labels) == 7
    failures = {one["reason"]: metric(metrics, "nv_inference_request_failure", **labels, **one)
                for one in OF_A_VERSION["nv_inference_request_failure"]}  # fmt: skip
    assert failures == {"REJECTED": 0, "CANCELED": 0, "BACKEND": 2, "OTHER": 3}
    assert metric(metrics, "tidegate_request_duration_seconds_count", **labels) == 7
    assert metric(metrics, "tidegate_queue_duration_seconds_count", **labels) == 7
    assert metric(metrics, "tidegate_batch_rows_count", **labels) == 7
    assert metric(metrics, "tidegate_batch_rows_sum", **labels) == 24
    below = {
        bound: metric(metrics, "tidegate_batch_rows_bucket", **labels, le=bound) for bound in ("1", "2", "8", "16")
    }
    assert below == {"1": 4, "2": 6, "8": 6, "16": 7}
    assert metric(metrics, "tidegate_bytes_gathered_total", **labels) == 24 * 8


def test_histograms_and_counters_of_time_agree(served: Served, stub: Any) -> None:
    for _ in range(200):
        look_up(stub, "strange-name_1.x", 1, 2, 3)
    metrics = served.metrics()
    labels = {"model": "strange-name_1.x", "version": "1"}
    for phase in ("request", "queue"):
        us = metric(metrics, f"nv_inference_{phase}_duration_us", **labels)
        seconds = metric(metrics, f"tidegate_{phase}_duration_seconds_sum", **labels)
        assert seconds * 1e6 == pytest.approx(us, rel=0.01, abs=2)
    phases = ("queue", "compute_input", "compute_infer", "compute_output")
    parts = sum(metric(metrics, f"nv_inference_{phase}_duration_us", **labels) for phase in phases)
    assert 0 < parts <= metric(metrics, "nv_inference_request_duration_us", **labels) + len(phases)


def test_a_full_queue_is_refused_with_a_time_to_come_back_and_counted(served: Served, stub: Any) -> None:
    slow = occupy(served, "full", 1)
    queued = [stub.ModelInfer.future(countdown_request("full", i, 1), timeout=PATIENCE_S) for i in range(2)]
    eventually(lambda: waiting(served, "full") == 2, "the queue is full")
    with pytest.raises(grpc.RpcError) as error:
        stub.ModelInfer(countdown_request("full", 9, 1), timeout=PATIENCE_S)
    assert error.value.code() is Code.RESOURCE_EXHAUSTED
    assert "waiting" in error.value.details()
    assert int(dict(error.value.trailing_metadata())["grpc-retry-pushback-ms"]) > 0
    for i, future in enumerate(queued):
        assert array_of(future.result(), "y", np.int64).tolist() == [[i]]
    assert array_of(slow.result(PATIENCE_S), "y", np.int64).tolist() == [[1]]
    metrics = served.metrics()
    labels = {"model": "full", "version": "1"}
    assert metric(metrics, "nv_inference_request_failure", **labels, reason="REJECTED") == 1
    assert metric(metrics, "tidegate_shed_total", model="full", reason="QUEUE_FULL") == 1
    assert metric(metrics, "nv_inference_request_success", **labels) == 3
    assert waiting(served, "full") == 0


def test_requests_whose_callers_went_are_counted_as_such(served: Served, stub: Any) -> None:
    slow = occupy(served, "late", 1)
    cancelled = stub.ModelInfer.future(countdown_request("late", 2, 1))
    eventually(lambda: waiting(served, "late") == 1, "the request waits")
    cancelled.cancel()
    eventually(lambda: waiting(served, "late") == 0, "the request has gone")
    # With the parameter rather than the call's deadline, at which the client would go by itself.
    request = countdown_request("late", 3, 1)
    request.parameters["timeout"].int64_param = 50_000
    code, _ = status_of(lambda: stub.ModelInfer(request, timeout=PATIENCE_S))
    assert code in (Code.DEADLINE_EXCEEDED, Code.RESOURCE_EXHAUSTED)
    slow.result(PATIENCE_S)
    metrics = served.metrics()
    labels = {"model": "late", "version": "1"}
    assert metric(metrics, "nv_inference_request_failure", **labels, reason="CANCELED") == 1
    # Whether it was refused at the door or gave up waiting depends on what is known of the model by then.
    assert metric(metrics, "nv_inference_request_failure", **labels, reason="REJECTED") == 1
    assert sum(metric(metrics, "tidegate_shed_total", model="late", reason=reason) for reason in SHED) == 1
    assert metric(metrics, "nv_inference_count", **labels) == 1


def test_a_crowd_is_counted_exactly_while_it_is_scraped(served: Served) -> None:
    stop = threading.Event()
    seen: list[float] = []

    def scrape() -> None:
        while not stop.is_set():
            seen.append(metric(served.metrics(), "nv_inference_count", model="crowd", version="1"))

    def ask() -> None:
        own = served.stub()
        request = infer_request("crowd", ("x", "INT64", int64_rows(1, 2)))
        for future in [own.ModelInfer.future(request, timeout=PATIENCE_S) for _ in range(250)]:
            future.result()

    scraper = threading.Thread(target=scrape)
    scraper.start()
    callers = [threading.Thread(target=ask) for _ in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join(PATIENCE_S)
    stop.set()
    scraper.join(PATIENCE_S)
    metrics = served.metrics()
    labels = {"model": "crowd", "version": "1"}
    assert metric(metrics, "nv_inference_request_success", **labels) == 1000
    assert metric(metrics, "nv_inference_count", **labels) == 2000
    assert metric(metrics, "tidegate_batch_rows_sum", **labels) == 2000
    n_batches = metric(metrics, "nv_inference_exec_count", **labels)
    assert metric(metrics, "tidegate_batch_rows_count", **labels) == n_batches <= 1000
    assert seen == sorted(seen), "a counter never goes back"


def test_counters_go_on_through_reloads_and_unloads(served: Served, stub: Any) -> None:
    client = served.triton()
    labels = {"model": "reloaded", "version": "1"}
    for count in range(1, 4):
        look_up(stub, "reloaded", 1)
        client.load_model("reloaded")
        assert metric(served.metrics(), "nv_inference_request_success", **labels) == count
    client.unload_model("reloaded")
    metrics = served.metrics()
    assert metric(metrics, "nv_inference_request_success", **labels) == 3, "it is shown for some minutes more"
    assert ("tidegate_model_memory_bytes", frozenset(labels.items())) not in metrics
    client.load_model("reloaded")
    look_up(stub, "reloaded", 1)
    assert metric(served.metrics(), "nv_inference_request_success", **labels) == 4


def test_a_model_that_nobody_knows_leaves_no_series_behind(served: Served, stub: Any) -> None:
    refused(Code.NOT_FOUND, lambda: look_up(stub, "never heard of", 1), "never heard of")
    assert "never heard of" not in served.metrics_text()
