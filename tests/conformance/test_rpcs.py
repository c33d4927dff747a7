"""Every RPC of inference.GRPCInferenceService beside inference, through tritonclient and the service's own stubs."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

from server.demo.process import ServeProcess
from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    PATIENCE_S,
    Code,
    Served,
    array_of,
    eventually,
    index_of,
    infer_request,
    int64_rows,
    refused,
    triton_input,
)

SHARED_MEMORY = {
    "SystemSharedMemoryStatus": pb.SystemSharedMemoryStatusRequest(),
    "SystemSharedMemoryRegister": pb.SystemSharedMemoryRegisterRequest(name="r", key="/k", byte_size=64),
    "SystemSharedMemoryUnregister": pb.SystemSharedMemoryUnregisterRequest(),
    "CudaSharedMemoryStatus": pb.CudaSharedMemoryStatusRequest(),
    "CudaSharedMemoryRegister": pb.CudaSharedMemoryRegisterRequest(name="r", raw_handle=b"x", byte_size=64),
    "CudaSharedMemoryUnregister": pb.CudaSharedMemoryUnregisterRequest(),
}


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server whose set of models does not change."""
    root = tmp_path_factory.mktemp("models")
    models.put(root, "mlp", models.perceptron())
    for name in ("counted", "failing", "streamed", "idle"):
        models.put(root, name, models.look_up(), config="max_batch_size: 16")
    for version in ("1", "1.5.0", "2"):
        models.put(root, "versions", models.add(int(version[0])), version=version, config="version_policy { all {} }")
    for version in ("1", "2"):
        models.put(root, "latest", models.add(int(version)), version=version)
    models.put(root, "text", models.identity("BYTES", (2, "n")))
    models.put(root, "broken", b"no model")
    (root / "empty").mkdir()
    return serve_module(root)


@pytest.fixture(scope="module")
def stub(served: Served) -> Any:
    return served.stub()


@pytest.fixture(scope="module")
def client(served: Served) -> triton.InferenceServerClient:
    return served.triton()


@pytest.fixture
def explicit(serve: Any, repository: Any) -> Served:
    """A server that loads what it is told: `add` (1, 2) and `other` at the start, not `later`."""
    for version in ("1", "2"):
        models.put(repository, "add", models.add(int(version)), version=version)
    models.put(repository, "other", models.add(1))
    models.put(repository, "later", models.add(3))
    return serve(repository, "--model-control-mode", "explicit", "--load-model", "add", "--load-model", "other")


# -- liveness, readiness, metadata, configuration ----------------------------------------------------------------------


def test_the_server_is_live_and_ready(client: Any) -> None:
    assert client.is_server_live()
    assert client.is_server_ready()


@pytest.mark.parametrize(
    ("model", "version", "is_ready"),
    [
        ("mlp", "", True),
        ("mlp", "1", True),
        ("mlp", "2", False),
        ("versions", "^1.0", True),
        ("latest", "1", False),
        ("broken", "", False),
        ("empty", "", False),
        ("nobody", "", False),
        ("", "", False),
    ],
)
def test_a_model_is_ready_when_it_would_answer(client: Any, model: str, version: str, is_ready: bool) -> None:
    assert client.is_model_ready(model, version) is is_ready


def test_the_server_says_what_it_is_and_only_what_works(client: Any) -> None:
    metadata = client.get_server_metadata()
    assert (metadata.name, metadata.version) == ("tidegate", "0.1.0")
    assert {"statistics", "model_repository", "schedule_policy", "logging"} <= set(metadata.extensions)
    assert not {"sequence", "system_shared_memory", "cuda_shared_memory", "trace"} & set(metadata.extensions)


def test_a_model_says_its_tensors_with_the_batch_dimension(client: Any) -> None:
    metadata = client.get_model_metadata("mlp", as_json=True)
    assert metadata == {
        "name": "mlp",
        "versions": ["1"],
        "platform": "onnxruntime_onnx",
        "inputs": [{"name": "x", "datatype": "FP32", "shape": ["-1", "16"]}],
        "outputs": [{"name": "probabilities", "datatype": "FP32", "shape": ["-1", "5"]}],
    }
    metadata = client.get_model_metadata("text", as_json=True)
    assert metadata["inputs"] == [{"name": "x", "datatype": "BYTES", "shape": ["2", "-1"]}]


def test_metadata_lists_the_versions_that_answer(client: Any) -> None:
    assert client.get_model_metadata("versions").versions == ["1", "1.5.0", "2"]
    assert client.get_model_metadata("versions", "^1.2").versions == ["1.5.0"]
    assert client.get_model_metadata("latest").versions == ["2"]


def test_the_configuration_is_complete(client: Any) -> None:
    config = client.get_model_config("mlp").config
    assert (config.name, config.platform, config.backend) == ("mlp", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching")
    assert [(one.name, one.data_type, list(one.dims)) for one in config.input] == [("x", 11, [16])]
    assert [(one.name, one.data_type, list(one.dims)) for one in config.output] == [("probabilities", 11, [5])]
    assert [(group.count, group.kind) for group in config.instance_group] == [(1, 2)]
    config = client.get_model_config("text").config
    assert config.max_batch_size == 0
    assert not config.HasField("dynamic_batching")


@pytest.mark.parametrize("method", ["ModelMetadata", "ModelConfig", "ModelStatistics"])
def test_questions_about_what_is_not_there_are_refused_as_a_request_is(stub: Any, method: str) -> None:
    def ask(name: str, version: str = "") -> Any:
        request = getattr(pb, f"{method}Request")(name=name, version=version)
        return lambda: getattr(stub, method)(request, timeout=PATIENCE_S)

    refused(Code.NOT_FOUND, ask("nobody"), "nobody")
    refused(Code.NOT_FOUND, ask("mlp", "7"), "mlp", "7")
    refused(Code.UNAVAILABLE, ask("latest", "1"), "latest", "1")
    refused(Code.UNAVAILABLE, ask("broken"), "broken", "corrupt")
    refused(Code.UNAVAILABLE, ask("empty"), "empty", "version")


# -- statistics --------------------------------------------------------------------------------------------------------


def statistics(stub: Any, name: str, version: str = "") -> Any:
    answer = stub.ModelStatistics(pb.ModelStatisticsRequest(name=name, version=version), timeout=PATIENCE_S)
    (one,) = answer.model_stats
    return one


def look_up(stub: Any, model: str, *index: int) -> Any:
    return stub.ModelInfer(infer_request(model, ("index", "INT64", int64_rows(*index))), timeout=PATIENCE_S)


def test_statistics_exist_at_zero_before_the_first_request(stub: Any) -> None:
    one = statistics(stub, "idle")
    assert (one.name, one.version) == ("idle", "1")
    assert (one.inference_count, one.execution_count, one.last_inference) == (0, 0, 0)
    for field in ("success", "fail", "queue", "compute_input", "compute_infer", "compute_output", "cache_hit"):
        assert (getattr(one.inference_stats, field).count, getattr(one.inference_stats, field).ns) == (0, 0)
    assert list(one.batch_stats) == []
    assert [(memory.type, memory.byte_size > 0) for memory in one.memory_usage] == [("CPU", True)]


def test_statistics_add_up_with_what_was_sent(stub: Any) -> None:
    began_ms = time.time_ns() // 1_000_000
    began_ns = time.monotonic_ns()
    # One after another: each request is a batch.
    for rows in (1, 1, 1, 1, 1, 3, 3, 16):
        assert array_of(look_up(stub, "counted", *range(rows)[:10], *[0] * (rows - 10)), "y", np.int64).size == rows
    for _ in range(2):
        refused(Code.INVALID_ARGUMENT, lambda: look_up(stub, "counted", *[0] * 17))
    took_ns = time.monotonic_ns() - began_ns
    one = statistics(stub, "counted")
    stats = one.inference_stats
    assert (one.inference_count, one.execution_count) == (27, 8)
    counts = {name: getattr(stats, name).count for name in ("success", "fail", "queue", "cache_hit", "cache_miss")}
    assert counts == {"success": 8, "fail": 2, "queue": 8, "cache_hit": 0, "cache_miss": 0}
    phases = (stats.queue, stats.compute_input, stats.compute_infer, stats.compute_output)
    assert [phase.count for phase in phases] == [8] * 4
    assert all(phase.ns > 0 for phase in phases)
    # The phases are parts of the whole, and the whole is a part of what the client saw.
    assert sum(phase.ns for phase in phases) <= stats.success.ns <= took_ns
    assert {batch.batch_size: batch.compute_infer.count for batch in one.batch_stats} == {1: 5, 3: 2, 16: 1}
    for batch in one.batch_stats:
        assert batch.compute_input.count == batch.compute_output.count == batch.compute_infer.count
        assert min(batch.compute_input.ns, batch.compute_infer.ns, batch.compute_output.ns) > 0
    of_batches = sum(batch.compute_infer.ns for batch in one.batch_stats)
    assert of_batches == pytest.approx(stats.compute_infer.ns, rel=0.5)
    assert began_ms <= one.last_inference <= time.time_ns() // 1_000_000


def test_requests_that_share_a_batch_are_counted_as_rows_and_one_execution(stub: Any) -> None:
    before = statistics(stub, "versions", "2")
    requests = [infer_request("versions", ("x", "INT64", int64_rows(i))) for i in range(300)]
    futures = [stub.ModelInfer.future(request, timeout=PATIENCE_S) for request in requests]
    for future in futures:
        future.result()
    after = statistics(stub, "versions", "2")
    n_batches = after.execution_count - before.execution_count
    assert after.inference_count - before.inference_count == 300
    assert after.inference_stats.success.count - before.inference_stats.success.count == 300
    assert 300 / 64 <= n_batches <= 300
    by_size = {batch.batch_size: batch.compute_infer.count for batch in after.batch_stats}
    for batch in before.batch_stats:
        by_size[batch.batch_size] -= batch.compute_infer.count
    assert sum(by_size.values()) == n_batches
    assert sum(size * count for size, count in by_size.items()) == 300


def test_a_failed_run_counts_as_a_failure_of_its_request_alone(stub: Any) -> None:
    look_up(stub, "failing", 1)
    refused(Code.INTERNAL, lambda: look_up(stub, "failing", 99), "failing")
    one = statistics(stub, "failing")
    assert (one.inference_stats.success.count, one.inference_stats.fail.count) == (1, 1)
    assert one.inference_stats.fail.ns > 0
    phases = ("queue", "compute_input", "compute_infer", "compute_output")
    assert [getattr(one.inference_stats, phase).count for phase in phases] == [1] * 4, "times of answered requests"


def test_requests_of_a_stream_are_counted_as_others_are(stub: Any) -> None:
    requests = [infer_request("streamed", ("index", "INT64", int64_rows(i, i))) for i in range(9)]
    answers = list(stub.ModelStreamInfer(iter(requests), timeout=PATIENCE_S))
    assert [array_of(answer.infer_response, "y", np.int64)[0, 0] for answer in answers] == [i * 100 for i in range(9)]
    one = statistics(stub, "streamed")
    assert (one.inference_count, one.inference_stats.success.count) == (18, 9)


def test_statistics_of_a_model_have_all_its_versions_and_of_nothing_everything(stub: Any) -> None:
    answer = stub.ModelStatistics(pb.ModelStatisticsRequest(name="versions"), timeout=PATIENCE_S)
    assert [one.version for one in answer.model_stats] == ["1", "1.5.0", "2"]
    answer = stub.ModelStatistics(pb.ModelStatisticsRequest(), timeout=PATIENCE_S)
    names = [(one.name, one.version) for one in answer.model_stats]
    assert names == sorted(names)
    assert {name for name, _ in names} == {
        "counted", "failing", "idle", "latest", "mlp", "streamed", "text", "versions",
    }  # fmt: skip
    assert stub.ModelStatistics(pb.ModelStatisticsRequest(name="versions", version="^1"), timeout=PATIENCE_S)


# -- the repository ----------------------------------------------------------------------------------------------------


def test_the_index_has_every_version_with_its_state_and_reason(stub: Any) -> None:
    index = index_of(stub)
    ready = {key for key, (state, _) in index.items() if state == "READY"}
    assert {("mlp", "1"), ("versions", "1.5.0"), ("latest", "2")} <= ready
    assert index["latest", "1"] == ("UNAVAILABLE", "not loaded")
    state, reason = index["broken", "1"]
    assert state == "UNAVAILABLE"
    assert "corrupt" in reason
    state, reason = index["empty", ""]
    assert state == "UNAVAILABLE"
    assert "no version folder" in reason


def test_the_index_can_be_asked_for_what_is_ready(stub: Any, client: Any) -> None:
    rows = stub.RepositoryIndex(pb.RepositoryIndexRequest(ready=True), timeout=PATIENCE_S).models
    assert {row.state for row in rows} == {"READY"}
    assert len(rows) == 10
    assert len(client.get_model_repository_index().models) > 10


def test_only_one_repository_without_a_name_exists(stub: Any) -> None:
    request = pb.RepositoryIndexRequest(repository_name="mine")
    refused(Code.UNIMPLEMENTED, lambda: stub.RepositoryIndex(request, timeout=PATIENCE_S), "mine")


def test_loads_and_unloads_need_the_explicit_mode(client: Any) -> None:
    refused(Code.FAILED_PRECONDITION, lambda: client.load_model("mlp"), "--model-control-mode", "explicit")
    refused(Code.FAILED_PRECONDITION, lambda: client.unload_model("mlp"), "--model-control-mode", "explicit")


def ask(client: Any, model: str, version: str = "") -> tuple[str, int]:
    """The version that answers and its number."""
    result = client.infer(model, [triton_input("x", int64_rows(0), "INT64")], model_version=version)
    return result.get_response().model_version, int(result.as_numpy("y").item())


def test_explicit_loads_what_it_is_told(explicit: Served) -> None:
    client = explicit.triton()
    assert ask(client, "add") == ("2", 2)
    refused(Code.UNAVAILABLE, lambda: ask(client, "later"), "later", "not loaded")
    client.load_model("later")
    assert ask(client, "later") == ("1", 3)
    client.unload_model("add")
    assert not client.is_model_ready("add")
    refused(Code.UNAVAILABLE, lambda: ask(client, "add"), "add", "unloaded")
    client.unload_model("add")  # What is not loaded needs no unloading, which is no error.
    client.load_model("add")
    assert ask(client, "add") == ("2", 2)
    assert ask(client, "other") == ("1", 1)
    refused(Code.NOT_FOUND, lambda: client.load_model("nobody"), "nobody")
    refused(Code.NOT_FOUND, lambda: client.unload_model("nobody"), "nobody")
    refused(Code.INVALID_ARGUMENT, lambda: client.load_model("../add"), "model name")
    refused(Code.INVALID_ARGUMENT, lambda: client.load_model(""), "model_name")


def test_a_load_may_bring_its_configuration(explicit: Served) -> None:
    client = explicit.triton()
    client.load_model("add", config=json.dumps({"version_policy": {"all": {}}, "max_batch_size": 3}))
    assert client.get_model_metadata("add").versions == ["1", "2"]
    assert client.get_model_config("add").config.max_batch_size == 3
    assert [ask(client, "add", version) for version in ("1", "2")] == [("1", 1), ("2", 2)]
    rows = [triton_input("x", int64_rows(1, 2, 3, 4), "INT64")]
    refused(Code.INVALID_ARGUMENT, lambda: client.infer("add", rows), "4 rows", "1 to 3")
    client.load_model("add")  # The repository's own again.
    assert client.get_model_metadata("add").versions == ["2"]
    assert client.get_model_config("add").config.max_batch_size == 64


def test_a_load_may_bring_its_files(explicit: Served) -> None:
    client = explicit.triton()
    files = {
        "file:7/model.onnx": models.add(7).SerializeToString(),
        "file:8.1.0/model.onnx": models.add(8).SerializeToString(),
    }
    config = json.dumps({"version_policy": {"all": {}}})
    client.load_model("brought", config=config, files=files)
    assert client.get_model_metadata("brought").versions == ["7", "8.1.0"]
    assert [ask(client, "brought", version) for version in ("7", "^8")] == [("7", 7), ("8.1.0", 8)]
    # In the place of the repository's model.
    client.load_model("add", config="{}", files=files)
    assert client.get_model_metadata("add").versions == ["8.1.0"]
    client.load_model("add")
    assert ask(client, "add") == ("2", 2)
    client.unload_model("brought")
    # It is not ready at once, and once its memory has gone back too, nothing names it any more.
    assert not client.is_model_ready("brought")
    stub = explicit.stub()
    eventually(lambda: "brought" not in {name for name, _ in index_of(stub)}, "the model is forgotten")
    refused(Code.NOT_FOUND, lambda: ask(client, "brought"), "brought")
    assert not (explicit.repository / "brought").exists()


def test_a_load_that_cannot_be_done_changes_nothing(explicit: Served) -> None:
    client = explicit.triton()

    def load(name: str = "add", **options: Any) -> Callable[[], Any]:
        return lambda: client.load_model(name, **options)

    good = models.add(9).SerializeToString()
    refused(Code.INVALID_ARGUMENT, load(config="{"), "add", "JSON")
    refused(Code.INVALID_ARGUMENT, load(config='{"max_batch": 1}'), "max_batch", "unknown field")
    refused(Code.INVALID_ARGUMENT, load(files={"file:9/model.onnx": good}), "config")
    for path in ("9/../../x/model.onnx", "/etc/model.onnx", "9//model.onnx", "x/model.onnx", "9/.hidden", "model.onnx"):
        call = load(config="{}", files={f"file:{path}": good})
        refused(Code.INVALID_ARGUMENT, call, "<version>/<file>", given=path)
    refused(Code.INTERNAL, load(config="{}", files={"file:9/model.onnx": b"junk"}), "add", "9")
    refused(Code.INTERNAL, load(config='{"max_batch_size": -1}'), "add", "max_batch_size")
    refused(Code.INTERNAL, load(config='{"instance_group": [{"kind": "KIND_GPU", "gpus": [99]}]}'), "instance_group")
    refused(
        Code.INTERNAL,
        load(config='{"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [{"name": "x"}]}}}'),
        "optimization",
    )
    refused(Code.INTERNAL, load(config='{"parameters": {"nobody_knows": {"string_value": "1"}}}'), "nobody_knows")
    assert ask(client, "add") == ("2", 2)
    assert "unknown parameter" in index_of(explicit.stub())["add", "2"][1], "the index says why the last load failed"
    client.load_model("add")
    assert index_of(explicit.stub())["add", "2"] == ("READY", "")


def test_parameters_of_loads_and_unloads_are_checked(explicit: Served) -> None:
    stub = explicit.stub()
    request = pb.RepositoryModelLoadRequest(model_name="add")
    request.parameters["config"].bytes_param = b"{}"
    refused(Code.INVALID_ARGUMENT, lambda: stub.RepositoryModelLoad(request, timeout=PATIENCE_S), "config")
    request = pb.RepositoryModelLoadRequest(model_name="add")
    request.parameters["speed"].string_param = "high"
    refused(Code.INVALID_ARGUMENT, lambda: stub.RepositoryModelLoad(request, timeout=PATIENCE_S), "speed")
    unload = pb.RepositoryModelUnloadRequest(model_name="add")
    unload.parameters["speed"].string_param = "high"
    refused(Code.INVALID_ARGUMENT, lambda: stub.RepositoryModelUnload(unload, timeout=PATIENCE_S), "speed")
    unload = pb.RepositoryModelUnloadRequest(model_name="add")
    unload.parameters["unload_dependents"].bool_param = True
    stub.RepositoryModelUnload(unload, timeout=PATIENCE_S)
    assert not explicit.triton().is_model_ready("add")


# -- settings ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def restored_logs(client: Any) -> Iterator[None]:
    yield
    client.update_log_settings({"log_info": True, "log_warning": True, "log_error": True, "log_verbose_level": 0})
    client.update_log_settings({"log_format": "default"})


@pytest.mark.usefixtures("restored_logs")
def test_log_settings_are_told_and_changed(served: Served, client: Any) -> None:
    settings = client.get_log_settings(as_json=True)["settings"]
    assert settings == {
        "log_file": {"string_param": ""},
        "log_info": {"bool_param": True},
        "log_warning": {"bool_param": True},
        "log_error": {"bool_param": True},
        "log_verbose_level": {"uint32_param": 0},
        "log_format": {"string_param": "default"},
    }
    changed = client.update_log_settings({"log_verbose_level": 2, "log_info": False, "log_format": "ISO8601"})
    assert changed.settings["log_verbose_level"].uint32_param == 2
    assert changed.settings["log_info"].bool_param is False
    assert client.get_log_settings().settings["log_format"].string_param == "ISO8601"
    assert served.is_running()


@pytest.mark.parametrize(
    ("settings", "code", "word"),
    [
        ({"log_file": "/tmp/x"}, Code.UNIMPLEMENTED, "log_file"),
        ({"log_format": "XML"}, Code.INVALID_ARGUMENT, "log_format"),
        ({"log_speed": 1}, Code.INVALID_ARGUMENT, "log_speed"),
    ],
)
def test_log_settings_that_cannot_be_had_change_nothing(client: Any, settings: Any, code: Any, word: str) -> None:
    before = client.get_log_settings(as_json=True)
    refused(code, lambda: client.update_log_settings({"log_verbose_level": 3, **settings}), word)
    assert client.get_log_settings(as_json=True) == before


def test_a_log_setting_of_the_wrong_kind_is_refused(stub: Any) -> None:
    request = pb.LogSettingsRequest()
    request.settings["log_info"].string_param = "yes"
    refused(Code.INVALID_ARGUMENT, lambda: stub.LogSettings(request, timeout=PATIENCE_S), "log_info", "bool_param")


def test_trace_settings_say_off(client: Any) -> None:
    settings = client.get_trace_settings(as_json=True)["settings"]
    assert settings["trace_level"] == {"value": ["OFF"]}
    assert {"trace_rate", "trace_count", "log_frequency", "trace_file", "trace_mode"} <= settings.keys()
    assert client.get_trace_settings("mlp").settings["trace_level"].value == ["OFF"]
    client.update_trace_settings(settings={"trace_level": ["OFF"]})
    client.update_trace_settings(settings={"trace_level": None})


@pytest.mark.parametrize("settings", [{"trace_level": ["TIMESTAMPS"]}, {"trace_rate": "1"}, {"trace_speed": "1"}])
def test_tracing_cannot_be_switched_on(client: Any, settings: Any) -> None:
    refused(Code.INVALID_ARGUMENT, lambda: client.update_trace_settings(settings=settings), next(iter(settings)))
    refused(Code.NOT_FOUND, lambda: client.update_trace_settings("nobody", settings), "nobody")


# -- what is not offered -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", list(SHARED_MEMORY))
def test_shared_memory_is_refused_and_says_what_to_do(stub: Any, method: str) -> None:
    call = lambda: getattr(stub, method)(SHARED_MEMORY[method], timeout=PATIENCE_S)  # noqa: E731
    refused(Code.UNIMPLEMENTED, call, "shared memory", "raw_input_contents")


def test_every_rpc_of_the_service_is_answered(served: Served) -> None:
    channel = served.channel()
    methods = pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods
    assert len(methods) == 20
    for method in methods:
        path = f"/{method.containing_service.full_name}/{method.name}"
        if method.client_streaming:
            call = channel.stream_stream(path)(iter([b""]), timeout=PATIENCE_S)
            assert len(list(call)) <= 1
        else:
            call = channel.unary_unary(path).future(b"", timeout=PATIENCE_S)
        # What it is depends on the method; that there is no such method is said of none but these.
        assert (call.code() is Code.UNIMPLEMENTED) is ("SharedMemory" in method.name), method.name
        assert call.code() in (Code.OK, Code.UNIMPLEMENTED, Code.NOT_FOUND, Code.INVALID_ARGUMENT) or (
            method.name.startswith("RepositoryModel") and call.code() is Code.FAILED_PRECONDITION
        ), method.name


def test_a_message_that_cannot_be_read_is_refused_by_every_rpc(served: Served) -> None:
    channel = served.channel()
    for method in pb.DESCRIPTOR.services_by_name["GRPCInferenceService"].methods:
        path = f"/{method.containing_service.full_name}/{method.name}"
        if not method.client_streaming:
            refused(Code.INTERNAL, lambda path=path: channel.unary_unary(path)(b"\x0a\xff", timeout=PATIENCE_S))
        else:
            stream = channel.stream_stream(path)
            refused(Code.INTERNAL, lambda stream=stream: list(stream(iter([b"\x0a\xff"]), timeout=PATIENCE_S)))


# -- the process -------------------------------------------------------------------------------------------------------


def mapped_files(served: ServeProcess) -> set[str]:
    with open(f"/proc/{served.pid}/maps") as maps:
        return {line.split(maxsplit=5)[5].strip() for line in maps if len(line.split(maxsplit=5)) == 6}


def test_no_serving_process_has_the_runtimes_or_onnxs_python_modules(served: Served, stub: Any) -> None:
    look_up(stub, "idle", 1)
    files = mapped_files(served)
    runtime = [path for path in files if "libonnxruntime.so" in path]
    assert len(runtime) == 1, "the runtime's library is there, once"
    assert any("_native" in path for path in files)
    assert not [path for path in files if "onnxruntime_pybind11_state" in path]
    assert not [path for path in files if "/onnx/" in path or "onnx_cpp2py" in path]
    assert not [path for path in files if "sklearn" in path or "tritonclient" in path]
