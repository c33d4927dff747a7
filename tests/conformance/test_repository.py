"""The model repository: control modes, version policies, loads that fail, warm-up, reloads under load, memory."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    PATIENCE_S,
    Code,
    Served,
    assert_discloses_nothing,
    eventually,
    index_of,
    infer_request,
    int64_rows,
    metric,
    refused,
    triton_input,
)
from tests.conformance.traffic import Traffic

EXPLICIT = ("--model-control-mode", "explicit", "--load-model", "*")
POLL = ("--model-control-mode", "poll", "--repository-poll-secs", "0.1")
ALL = "version_policy { all {} }"
SEMANTIC = "parameters { key: 'tidegate_versions' value { string_value: '1.4.0, 1.10.3' } }"


def answer(served: Served, model: str, version: str = "") -> tuple[str, int]:
    """The version that answers and the number that it adds."""
    result = served.triton().infer(model, [triton_input("x", int64_rows(0), "INT64")], model_version=version)
    return result.get_response().model_version, int(result.as_numpy("y").item())


def ready(served: Served, model: str) -> list[str]:
    """The versions that answer, lowest first."""
    index = index_of(served.stub())
    return [version for (name, version), (state, _) in index.items() if name == model and state == "READY"]


# -- control modes -----------------------------------------------------------------------------------------------------


def test_mode_none_loads_everything_and_looks_no_more(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1))
    models.put(repository, "other", models.add(2))
    served = serve(repository)
    assert (answer(served, "add"), answer(served, "other")) == (("1", 1), ("1", 2))
    models.put(repository, "add", models.add(2), version="2")
    models.put(repository, "late", models.add(3))
    shutil.rmtree(repository / "other")
    stub = served.stub()
    for _ in range(20):
        assert set(index_of(stub)) == {("add", "1"), ("other", "1")}
    assert (answer(served, "add"), answer(served, "other")) == (("1", 1), ("1", 2))
    refused(Code.NOT_FOUND, lambda: answer(served, "late"), "late")


def test_mode_explicit_starts_with_the_named_models(serve: Any, repository: Path) -> None:
    for number, name in enumerate(("first", "second", "third"), 1):
        models.put(repository, name, models.add(number))
    served = serve(repository, "--model-control-mode", "explicit", "--load-model", "second", "--load-model", "missing")
    assert index_of(served.stub()) == {
        ("first", "1"): ("UNAVAILABLE", "not loaded"),
        ("second", "1"): ("READY", ""),
        ("third", "1"): ("UNAVAILABLE", "not loaded"),
        ("missing", ""): ("UNAVAILABLE", "the model repository has no model 'missing'; copy it there first"),
    }
    assert answer(served, "second") == ("1", 2)
    assert served.triton().is_server_ready(), "a model that is missing keeps nobody from the others"


def test_mode_explicit_without_names_starts_with_nothing(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1))
    served = serve(repository, "--model-control-mode", "explicit")
    assert served.triton().is_server_ready()
    assert ready(served, "add") == []
    # New folders are seen when somebody asks.
    models.put(repository, "late", models.add(2))
    eventually(lambda: ("late", "1") in index_of(served.stub()), "the index shows the new model")
    served.triton().load_model("late")
    assert answer(served, "late") == ("1", 2)


def test_mode_poll_follows_the_repository(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1), config=ALL)
    models.put(repository, "steady", models.add(5), version="5")
    served = serve(repository, *POLL)
    assert answer(served, "add") == ("1", 1)
    with Traffic(served, "steady") as traffic:
        # A model that appears, a version that appears.
        models.put(repository, "late", models.add(3))
        models.put(repository, "add", models.add(2), version="2")
        eventually(lambda: ready(served, "add") == ["1", "2"], "version 2 serves")
        eventually(lambda: ready(served, "late") == ["1"], "the new model serves")
        assert answer(served, "add") == ("2", 2)
        # A file that changes.
        models.put(repository, "late", models.add(4))
        eventually(lambda: answer(served, "late") == ("1", 4), "the changed file serves")
        # A configuration that changes.
        models.put(repository, "add", None, version="2", config="version_policy { specific { versions: 1 } }")
        eventually(lambda: ready(served, "add") == ["1"], "version 1 alone serves")
        refused(Code.UNAVAILABLE, lambda: answer(served, "add", "2"), "add", "2")
        # A version that goes, a model that goes.
        models.put(repository, "add", None, version="2", config=ALL)
        eventually(lambda: ready(served, "add") == ["1", "2"], "both serve again")
        shutil.rmtree(repository / "add" / "2")
        eventually(lambda: ready(served, "add") == ["1"], "version 2 has gone")
        refused(Code.NOT_FOUND, lambda: answer(served, "add", "2"), "add", "'2'")
        shutil.rmtree(repository / "late")
        eventually(lambda: ("late", "1") not in index_of(served.stub()), "the model has gone")
        refused(Code.NOT_FOUND, lambda: answer(served, "late"), "late")
    assert set(traffic.answers) == {"5"}


def test_mode_poll_keeps_a_model_whose_folder_is_replaced_by_two_renames(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1))
    served = serve(repository, *POLL)

    def fill(folder: Path) -> None:
        models.write_file(folder / "2" / "model.onnx", models.add(2).SerializeToString())

    with Traffic(served, "add") as traffic:
        models.replace_folder(repository, "add", fill)
        eventually(lambda: "2" in traffic.answers, "version 2 answers")
    assert set(traffic.answers) == {"1", "2"}


def test_mode_poll_waits_for_a_copy_that_is_under_way(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1))
    served = serve(repository, *POLL)
    stub = served.stub()
    whole = models.heavy(2, 2).SerializeToString()
    # A folder without its file is no version yet, and a file that grows is not looked at.
    folder = repository / "heavy" / "1"
    folder.mkdir(parents=True)
    eventually(lambda: any(name == "heavy" for name, _ in index_of(stub)), "the folder has been seen")
    with (folder / "model.onnx").open("wb") as file:
        for at in range(0, len(whole), 1 << 17):
            file.write(whole[at : at + (1 << 17)])
            file.flush()
            index_of(stub)
    eventually(lambda: index_of(stub).get(("heavy", "1"), ("", ""))[0] == "READY", "the whole file serves")
    assert "truncated" not in served.log.read_text()


# -- versions ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("policy", "loaded"),
    [
        ("", ["2"]),
        ("version_policy { latest {} }", ["2"]),
        ("version_policy { latest { num_versions: 2 } }", ["1.10.3", "2"]),
        ("version_policy { latest { num_versions: 9 } }", ["1", "1.4.0", "1.10.3", "2"]),
        (ALL, ["1", "1.4.0", "1.10.3", "2"]),
        ("version_policy { specific { versions: [ 1, 2 ] } }", ["1", "2"]),
        (f"version_policy {{ specific {{ versions: [ 1 ] }} }} {SEMANTIC}", ["1", "1.4.0", "1.10.3"]),
    ],
)
def test_the_version_policy_says_what_is_loaded(policies: Served, policy: str, loaded: list[str]) -> None:
    models.put(policies.repository, "add", None, config=policy or "backend: 'onnxruntime'")
    policies.triton().load_model("add")
    assert ready(policies, "add") == loaded
    assert answer(policies, "add")[0] == loaded[-1]
    index = index_of(policies.stub())
    for version in {"1", "1.4.0", "1.10.3", "2"} - set(loaded):
        assert index["add", version][0] == "UNAVAILABLE"
        refused(Code.UNAVAILABLE, lambda version=version: answer(policies, "add", version), "add", version)


@pytest.fixture(scope="module")
def policies(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    for version in ("1", "1.4.0", "1.10.3", "2"):
        models.put(root, "add", models.add(1), version=version)
    # Not versions, and left alone.
    for folder in ("01", "v3", "latest", ".4", "5.x"):
        models.put(root, "add", models.add(9), version=folder)
    (root / "add" / "6").write_text("a file")
    return serve_module(root, *EXPLICIT)


def test_a_policy_that_names_what_is_not_there_fails_as_a_whole(policies: Served) -> None:
    models.put(policies.repository, "add", None, config="version_policy { latest {} }")
    client = policies.triton()
    client.load_model("add")
    models.put(policies.repository, "add", None, config="version_policy { specific { versions: [ 2, 7 ] } }")
    refused(Code.INTERNAL, lambda: client.load_model("add"), "add", "version_policy", "7")
    assert ready(policies, "add") == ["2"]


def test_all_versions_of_one_load_succeed_or_none_does(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1), config=ALL)
    served = serve(repository, *EXPLICIT)
    models.put(repository, "add", models.add(2), version="2")
    models.put(repository, "add", b"junk", version="3")
    refused(Code.INTERNAL, lambda: served.triton().load_model("add"), "add", "'3'")
    assert ready(served, "add") == ["1"]
    index = index_of(served.stub())
    assert "'3'" in index["add", "2"][1]
    assert "corrupt" in index["add", "3"][1]


# -- loads that fail ---------------------------------------------------------------------------------------------------


def corrupt(root: Path) -> None:
    content = bytearray(models.perceptron().SerializeToString())
    for at in range(0, len(content), 7):
        content[at] ^= 0x5A
    models.put(root, "add", bytes(content), version="2")


def truncated(root: Path) -> None:
    models.put(root, "add", models.perceptron().SerializeToString()[:-100], version="2")


def empty(root: Path) -> None:
    models.put(root, "add", b"", version="2")


def text(root: Path) -> None:
    models.put(root, "add", b"import os; os.abort()\n" * 100, version="2")


def unknown_operator(root: Path) -> None:
    made = models.model([models.node("NoSuchThing", "x", "y")], [models.value("x", (1,))], [models.value("y", (1,))])
    models.put(root, "add", made, version="2")


def broken_graph(root: Path) -> None:
    made = models.model([models.node("Identity", "nowhere", "y")], [models.value("x", (1,))], [models.value("y", (1,))])
    models.put(root, "add", made, version="2")


def external_above(root: Path) -> None:
    (root.parent / "weights.bin").write_bytes(bytes(np.ones(4, np.float32)))
    models.put_with_external_data(root, "add", "../../../weights.bin", version="2")


def external_absolute(root: Path) -> None:
    (root.parent / "weights.bin").write_bytes(bytes(np.ones(4, np.float32)))
    models.put_with_external_data(root, "add", str(root.parent / "weights.bin"), version="2")


def external_by_link(root: Path) -> None:
    (root.parent / "weights.bin").write_bytes(bytes(np.ones(4, np.float32)))
    folder = models.put_with_external_data(root, "add", "weights.bin", version="2")
    (folder / "weights.bin").symlink_to(root.parent / "weights.bin")


def external_missing(root: Path) -> None:
    models.put_with_external_data(root, "add", "weights.bin", version="2")


def external_too_short(root: Path) -> None:
    folder = models.put_with_external_data(root, "add", "weights.bin", version="2")
    (folder / "weights.bin").write_bytes(b"1234")


def external_in_memory(root: Path) -> None:
    models.put_with_external_data(root, "add", "*/_ORT_MEM_ADDR_/*", version="2")


def linked_file(root: Path) -> None:
    models.write_file(root.parent / "outside.onnx", models.add(2).SerializeToString())
    (root / "add" / "2").mkdir()
    (root / "add" / "2" / "model.onnx").symlink_to(root.parent / "outside.onnx")


def linked_folder(root: Path) -> None:
    models.write_file(root.parent / "outside" / "model.onnx", models.add(2).SerializeToString())
    (root / "add" / "2").symlink_to(root.parent / "outside")


def named_pipe(root: Path) -> None:
    (root / "add" / "2").mkdir()
    os.mkfifo(root / "add" / "2" / "model.onnx")


def missing_file(root: Path) -> None:
    (root / "add" / "2").mkdir()


def config_syntax(root: Path) -> None:
    models.put(root, "add", models.add(2), version="2", config="max_batch_size: 8\n input [ {")


def config_unknown_field(root: Path) -> None:
    models.put(root, "add", models.add(2), version="2", config="max_batch: 8")


def config_other_tensor(root: Path) -> None:
    config = "input { name: 'z' data_type: TYPE_INT64 dims: [ 1 ] }"
    models.put(root, "add", models.add(2), version="2", config=config)


def config_other_type(root: Path) -> None:
    config = "max_batch_size: 4 input { name: 'x' data_type: TYPE_FP32 dims: [ 1 ] }"
    models.put(root, "add", models.add(2), version="2", config=config)


def config_cannot_batch(root: Path) -> None:
    models.put(root, "add", models.add(2, (2, 3)), version="2", config="max_batch_size: 8")


def config_without_gpu(root: Path) -> None:
    config = "instance_group { kind: KIND_GPU gpus: [ 64 ] }"
    models.put(root, "add", models.add(2), version="2", config=config)


def config_of_something_else(root: Path) -> None:
    models.put(root, "add", models.add(2), version="2", config="platform: 'tensorflow_graphdef'")


def warmup_of_a_wrong_shape(root: Path) -> None:
    config = """model_warmup { name: "wide" batch_size: 1
        inputs { key: "x" value { data_type: TYPE_INT64 dims: [ 7 ] zero_data: true } } }"""
    models.put(root, "add", models.add(2), version="2", config=config)


def warmup_that_fails(root: Path) -> None:
    (root / "add" / "warmup").mkdir()
    (root / "add" / "warmup" / "far").write_bytes(np.int64(99).tobytes())
    config = """model_warmup { name: "out of range" batch_size: 1
        inputs { key: "index" value { data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "far" } } }"""
    models.put(root, "add", models.look_up(), version="2", config=config)


def warmup_file_outside(root: Path) -> None:
    (root / "add" / "warmup").mkdir()
    (root.parent / "data").write_bytes(np.int64(1).tobytes())
    (root / "add" / "warmup" / "link").symlink_to(root.parent / "data")
    config = """model_warmup { name: "linked" batch_size: 1
        inputs { key: "x" value { data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "link" } } }"""
    models.put(root, "add", models.add(2), version="2", config=config)


# What is put there -> what the reason says.
FAILURES: dict[Callable[[Path], None], str] = {
    corrupt: "corrupt",
    truncated: "truncated",
    empty: "empty",
    text: "corrupt",
    unknown_operator: "NoSuchThing",
    broken_graph: "nowhere",
    external_above: "leaves the version's folder",
    external_absolute: "absolute",
    external_by_link: "symbolic links",
    external_missing: "no such file",
    external_too_short: "4 bytes",
    external_in_memory: "character",
    linked_file: "leaves the model repository",
    linked_folder: "leaves the model repository",
    named_pipe: "not a plain file",
    missing_file: "no model.onnx",
    config_syntax: "config.pbtxt",
    config_unknown_field: "max_batch",
    config_other_tensor: "'z'",
    config_other_type: "TYPE_FP32",
    config_cannot_batch: "cannot batch",
    config_without_gpu: "GPU",
    config_of_something_else: "tensorflow_graphdef",
    warmup_of_a_wrong_shape: "model_warmup",
    warmup_that_fails: "out of",
    warmup_file_outside: "warmup",
}


@pytest.fixture(scope="module")
def kept(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    """A server of `add` 1 and `other` 7 in a folder of its own, beside which tests may put things."""
    root = tmp_path_factory.mktemp("beside") / "models"
    models.put(root, "add", models.add(1))
    models.put(root, "other", models.add(7), version="7")
    return serve_module(root, *EXPLICIT)


@pytest.fixture
def clean(kept: Served) -> Served:
    """`kept` with version 1 of `add` and nothing else."""
    shutil.rmtree(kept.repository / "add")
    models.put(kept.repository, "add", models.add(1))
    kept.triton().load_model("add")
    assert index_of(kept.stub())["add", "1"] == ("READY", "")
    return kept


@pytest.mark.parametrize("failure", FAILURES, ids=lambda failure: failure.__name__)
def test_a_reload_that_fails_keeps_what_serves_and_says_why(clean: Served, failure: Callable[[Path], None]) -> None:
    n_lines = len(clean.log_lines())
    with Traffic(clean, "other", clients=1), Traffic(clean, "add", clients=1) as traffic:
        failure(clean.repository)
        message = refused(Code.INTERNAL, lambda: clean.triton().load_model("add"), "add", FAILURES[failure])
        traffic.wait_for_more()
    assert set(traffic.answers) == {"1"}
    index = index_of(clean.stub())
    assert index["add", "1"] == ("READY", message), "it serves, and why it could not be replaced"
    state, reason = index["add", "2"]
    assert state == "UNAVAILABLE"
    assert FAILURES[failure] in reason
    refused(Code.UNAVAILABLE, lambda: answer(clean, "add", "2"), "add", "2", FAILURES[failure])
    assert index["other", "7"] == ("READY", "")
    for _, told in index.values():
        assert_discloses_nothing(told, str(clean.repository.parent), "os.abort")
    new_lines = clean.log_lines()[n_lines:]
    assert any(FAILURES[failure] in line["message"] and line.get("model") == "add" for line in new_lines), new_lines


def test_the_start_says_of_each_model_why_it_failed_and_serves_the_others(serve: Any, tmp_path: Path) -> None:
    root = tmp_path / "models"
    models.put(root, "good", models.add(1))
    for failure in FAILURES:
        alone = tmp_path / "made" / "models"
        (alone / "add").mkdir(parents=True)
        failure(alone)
        os.rename(alone / "add", root / failure.__name__)
    served = serve(root)
    assert answer(served, "good") == ("1", 1)
    index = index_of(served.stub())
    for failure, why in FAILURES.items():
        state, reason = index[failure.__name__, "2"]
        assert state == "UNAVAILABLE", failure.__name__
        assert why in reason, failure.__name__
        assert_discloses_nothing(reason, str(tmp_path))


def test_external_data_inside_the_versions_folder_is_used(serve: Any, repository: Path) -> None:
    folder = models.put_with_external_data(repository, "weights", "data/w.bin")
    (folder / "data").mkdir()
    (folder / "data" / "w.bin").write_bytes(np.array([1, 2, 3, 4], np.float32).tobytes())
    served = serve(repository)
    result = served.triton().infer("weights", [triton_input("x", np.zeros((1, 4), np.float32), "FP32")])
    assert result.as_numpy("y").tolist() == [[1, 2, 3, 4]]


# -- warm-up -----------------------------------------------------------------------------------------------------------


def test_a_model_is_not_ready_before_its_warm_up_is_over(serve: Any, repository: Path) -> None:
    steps = 400_000
    config = """max_batch_size: 1 model_warmup { name: "long" batch_size: 1
        inputs { key: "x" value { data_type: TYPE_INT64 dims: [ 1 ] zero_data: true } }
        inputs { key: "steps" value { data_type: TYPE_INT64 dims: [ 1 ] input_data_file: "steps" } } }"""
    models.put(repository, "slow", models.countdown(is_batched=True), config=config)
    models.write_file(repository / "slow" / "warmup" / "steps", np.int64(steps).tobytes())
    models.put(repository, "other", models.add(1))
    served = serve(repository, "--model-control-mode", "explicit", "--load-model", "other")
    client, stub = served.triton(), served.stub()
    load = threading.Thread(target=served.triton().load_model, args=("slow",))
    with Traffic(served, "other", clients=1) as traffic:
        load.start()
        eventually(lambda: index_of(stub)["slow", "1"] == ("LOADING", "warming up"), "the warm-up runs")
        traffic.wait_for_more()
        assert not client.is_model_ready("slow")
        request = infer_request("slow", ("x", "INT64", int64_rows(1)), ("steps", "INT64", int64_rows(1)))
        refused(Code.UNAVAILABLE, lambda: stub.ModelInfer(request, timeout=PATIENCE_S), "slow", "not ready")
        assert load.is_alive(), "all of that was said while the load went on"
        load.join(PATIENCE_S)
    assert client.is_model_ready("slow")
    assert stub.ModelInfer(request, timeout=PATIENCE_S).model_version == "1"
    assert index_of(stub)["slow", "1"] == ("READY", "")


def test_a_made_up_warm_up_that_fails_is_a_warning(serve: Any, repository: Path) -> None:
    # Zero is no index into a table of nothing.
    models.put(repository, "none", models.look_up(0))
    served = serve(repository)
    assert ready(served, "none") == ["1"]
    warnings = [line for line in served.log_lines() if line["level"] == "warning"]
    assert any("warm-up" in line["message"] and "none" in line["message"] for line in warnings)


# -- reloads under load ------------------------------------------------------------------------------------------------


def test_ten_swaps_under_load_lose_nothing_and_answers_are_of_the_version_they_name(
    serve: Any, repository: Path
) -> None:
    models.put(repository, "add", models.add(1))
    models.put(repository, "other", models.add(7), version="7")
    served = serve(repository, *EXPLICIT)
    client = served.triton()
    with Traffic(served, "other", clients=1) as other, Traffic(served, "add", clients=3) as traffic:
        for number in range(2, 12):
            traffic.wait_for_more()
            models.put(repository, "add", models.add(number), version=str(number))
            client.load_model("add")
            # What is asked from now on is answered by the new version.
            assert answer(served, "add") == (str(number), number)
            assert ready(served, "add") == [str(number)]
        traffic.wait_for_more()
    assert set(traffic.answers) == {str(number) for number in range(1, 12)}
    assert set(other.answers) == {"7"}
    served.triton().unload_model("other")
    eventually(
        lambda: metric(served.metrics(), "tidegate_live_objects", kind="version") == 1, "the other versions are freed"
    )


def test_versions_that_come_and_go_under_load_with_semantic_names(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1), version="1.0.0")
    served = serve(repository, *POLL)
    with Traffic(served, "add") as traffic:
        for number in (2, 3, 4):
            models.put(repository, "add", models.add(number), version=f"{number}.1.0")
            eventually(lambda number=number: f"{number}.1.0" in traffic.answers, f"version {number}.1.0 answers")
        # Back, by taking the highest ones away.
        shutil.rmtree(repository / "add" / "4.1.0")
        eventually(lambda: ready(served, "add") == ["3.1.0"], "the next lower version serves")
        traffic.wait_for_more()
    assert set(traffic.answers) == {"1.0.0", "2.1.0", "3.1.0", "4.1.0"}


def test_a_reload_of_the_same_version_under_load_loses_nothing(serve: Any, repository: Path) -> None:
    models.put(repository, "add", models.add(1))
    served = serve(repository, *EXPLICIT)
    client = served.triton()
    with Traffic(served, "add") as traffic:
        for count in range(1, 6):
            config = {"max_batch_size": 8 * count, "instance_group": [{"count": count}]}
            client.load_model("add", config=json.dumps(config))
            traffic.wait_for_more()
            assert client.get_model_config("add").config.max_batch_size == 8 * count


def test_loads_of_many_models_at_once_disturb_nobody(serve: Any, repository: Path) -> None:
    names = [f"model{number}" for number in range(12)]
    for number, name in enumerate(names, 1):
        models.put(repository, name, models.add(number), version=str(number))
    served = serve(repository, "--model-control-mode", "explicit", "--load-model", "model0")
    with Traffic(served, "model0") as traffic:
        threads = [threading.Thread(target=served.triton().load_model, args=(name,)) for name in names]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE_S)
        traffic.wait_for_more()
    assert [answer(served, name) for name in names] == [(str(number), number) for number in range(1, 13)]


# -- memory ------------------------------------------------------------------------------------------------------------


def test_memory_goes_back_when_a_large_model_is_unloaded(serve: Any, repository: Path) -> None:
    mebibyte = 1 << 20
    models.put(repository, "add", models.add(1))
    models.put(repository, "heavy", models.heavy(96))
    served = serve(repository, "--model-control-mode", "explicit", "--load-model", "add")
    client = served.triton()
    resting = []
    for _ in range(8):
        client.load_model("heavy")
        loaded = served.rss_bytes()
        client.unload_model("heavy")
        eventually(lambda loaded=loaded: served.rss_bytes() < loaded - 80 * mebibyte, "the weights are given back")
        resting.append(served.rss_bytes())
    # The first loads bring code and caches with them that stay. What is left of later ones is far from their weights.
    assert max(resting[4:]) < max(resting[:4]) + 24 * mebibyte
    assert answer(served, "add") == ("1", 1)
