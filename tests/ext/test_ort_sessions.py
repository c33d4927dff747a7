"""Sessions: what loads, what is refused and in which words, on whose threads, and whom they outlive."""

from __future__ import annotations

import gc
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from server import _native
from server.settings import DataType, InstanceGroup, ModelSettings, ProviderSettings, SessionSettings, TensorSettings
from tests.ext.ort_models import (
    CPU,
    Runner,
    constant,
    identity,
    model,
    node,
    open_session,
    settings_for,
    value,
)


def refusal(made: onnx.ModelProto | bytes, folder: Path, **settings: Any) -> str:
    """Why this model is not loaded."""
    path = folder / "model.onnx"
    path.write_bytes(made if isinstance(made, bytes) else made.SerializeToString())
    with pytest.raises(_native.NativeError) as caught:
        _native.Session(str(path), SessionSettings(**settings))
    assert caught.value.reason == "LOAD_FAILED"
    return caught.value.message


# -- files ------------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["plain", "with blanks and ümlauts"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    made = tmp_path / request.param
    made.mkdir()
    return made


@pytest.mark.parametrize(
    "data", [b"", b"not a model", identity().SerializeToString()[:-20]], ids=["empty", "text", "cut"]
)
def test_a_corrupt_file_is_refused_without_its_path(data: bytes, folder: Path) -> None:
    message = refusal(data, folder)
    assert message.startswith("ONNX Runtime refused the model: ")
    assert "model.onnx" in message or "ModelProto" in message
    assert str(folder) not in message
    assert folder.name not in message
    assert "/" not in message


def test_a_missing_file_is_refused_without_its_path(folder: Path) -> None:
    with pytest.raises(_native.NativeError, match=r"Load model from missing\.onnx failed") as caught:
        _native.Session(str(folder / "missing.onnx"), SessionSettings())
    assert caught.value.reason == "LOAD_FAILED"
    assert folder.name not in caught.value.message


def test_missing_external_data_are_named_without_a_path(folder: Path) -> None:
    weights = constant("w", np.ones((3, 3), np.float32))
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights.bin")
    made = model([node("MatMul", "x w", "y")], [value("x", [1, 3])], [value("y", [1, 3])], [weights])
    message = refusal(made, folder)
    assert "weights.bin" in message
    assert folder.name not in message


def test_external_data_are_found_beside_the_model(folder: Path) -> None:
    (folder / "weights.bin").write_bytes(np.full((3, 3), 2, np.float32).tobytes())
    weights = constant("w", np.ones((3, 3), np.float32))
    weights.ClearField("raw_data")
    weights.data_location = TensorProto.EXTERNAL
    weights.external_data.add(key="location", value="weights.bin")
    made = model([node("MatMul", "x w", "y")], [value("x", [1, 3])], [value("y", [1, 3])], [weights])
    session = open_session(made, folder)
    (out,) = Runner(session, settings_for(session, 0)).run([np.ones((1, 3), np.float32)])
    np.testing.assert_array_equal(out, np.full((1, 3), 6, np.float32))


def test_an_operator_that_does_not_exist_is_named(folder: Path) -> None:
    message = refusal(model([node("NoSuchOperator", "x", "y")], [value("x", [1])], [value("y", [1])]), folder)
    assert "NoSuchOperator" in message
    assert folder.name not in message


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"intra_op_threads": -1}, "thread counts are 0"),
        ({"inter_op_threads": -1}, "thread counts are 0"),
        ({"graph_level": 7}, "graph optimisation level 7 does not exist; levels are 0, 1, 2, 3 and 99"),
        ({"graph_level": -1}, "graph optimisation level -1 does not exist"),
        (
            {"providers": (ProviderSettings("NoSuchExecutionProvider"),)},
            "execution provider 'NoSuchExecutionProvider' is not in the installed ONNX Runtime",
        ),
        (
            {"providers": (ProviderSettings("CPUExecutionProvider", {"use_arena": "1"}),)},
            "CPUExecutionProvider takes no options",
        ),
        ({"config_entries": {"": "1"}}, "key"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    assert message in refusal(identity(), tmp_path, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"graph_level": level} for level in (0, 1, 2, 3, 99)),
        {"intra_op_threads": 2, "inter_op_threads": 2, "parallel_execution": True},
        {"intra_op_threads": 0},
        {"cpu_mem_arena": False, "mem_pattern": False},
        {"providers": (ProviderSettings("CPUExecutionProvider"),)},
        {"config_entries": {"session.intra_op.allow_spinning": "1", "session.set_denormal_as_zero": "1"}},
        {"run_config_entries": {"memory.enable_memory_arena_shrinkage": "cpu:0"}},
    ],
)  # fmt: skip
def test_settings_that_are_served_give_the_same_answers(settings: dict[str, Any], tmp_path: Path) -> None:
    made = model(
        [node("MatMul", "x w", "wide"), node("Relu", "wide", "y")],
        [value("x", ["batch", 32])],
        [value("y", ["batch", 64])],
        [constant("w", np.eye(32, 64, dtype=np.float32))],
    )
    session = open_session(made, tmp_path, SessionSettings(**settings))
    x = np.arange(64, dtype=np.float32).reshape(2, 32)
    runner = Runner(session, settings_for(session))
    for _ in range(2):
        (out,) = runner.run([x])
        np.testing.assert_array_equal(out, np.pad(x, ((0, 0), (0, 32))))


def test_custom_metadata_are_what_the_file_says(tmp_path: Path) -> None:
    made = identity()
    onnx.helper.set_model_props(made, {"author": "größe", "empty": ""})
    session = open_session(made, tmp_path)
    assert session.custom_metadata("author") == "größe"
    assert session.custom_metadata("empty") == ""
    assert session.custom_metadata("missing") is None


# -- what a configuration promises ------------------------------------------------------------------------------------


def promise(
    max_batch_size: int = 4, *, inputs: dict[str, Any] | None = None, outputs: dict[str, Any] | None = None
) -> ModelSettings:
    """Settings for x [batch, 3] -> y [batch, 3], FP32. `inputs`, `outputs`: name -> (datatype, dims[, model_dims])."""

    def tensors(given: dict[str, Any] | None, name: str) -> tuple[TensorSettings, ...]:
        given = {name: (DataType.FP32, (-1, 3))} if given is None else given
        return tuple(
            TensorSettings(name, datatype, dims, *(rest or [dims])) for name, (datatype, dims, *rest) in given.items()
        )

    return ModelSettings("test", "1", max_batch_size, tensors(inputs, "x"), tensors(outputs, "y"), None, (), ())  # type: ignore[arg-type]


FP32 = DataType.FP32


@pytest.mark.parametrize(
    ("settings", "faults"),
    [
        (
            promise(inputs={"x": (FP32, (-1, 3)), "z": (FP32, (-1, 3))}),
            "input 'z' is not in the model, which has 'x'",
        ),
        (promise(inputs={}), "input 'x' of the model is not configured"),
        (promise(outputs={"no": (FP32, (-1, 3))}), "output 'no' is not in the model, which has 'y'"),
        (
            promise(inputs={"x": (DataType.INT64, (-1, 3))}),
            "input 'x' is configured as INT64 but the model has FP32",
        ),
        (
            promise(outputs={"y": (FP32, (-1, 4))}),
            "output 'y' is configured as [-1,4] but the model has [-1,3]",
        ),
        (
            promise(outputs={"y": (FP32, (-1, 3, 1))}),
            "output 'y' is configured as [-1,3,1] but the model has [-1,3]: ranks differ",
        ),
        (
            promise(0, inputs={"x": (FP32, (-1, 2), (-1, 3))}),
            "input 'x' is reshaped from [-1,2] to [-1,3]: both need as many free dimensions and as many elements",
        ),
        (
            promise(0, inputs={"x": (FP32, (-1, -1, 3), (-1, 3))}),
            "input 'x' is reshaped from [-1,-1,3] to [-1,3]: both need as many free dimensions and as many elements",
        ),
        (
            promise(inputs={"x": (DataType.INT8, (-1, 3))}, outputs={"y": (FP32, (-1, 5))}),
            (
                "input 'x' is configured as INT8 but the model has FP32; "
                "output 'y' is configured as [-1,5] but the model has [-1,3]"
            ),
        ),
    ],
)  # fmt: skip
def test_a_promise_that_the_model_does_not_keep_is_refused(
    settings: ModelSettings, faults: str, tmp_path: Path
) -> None:
    session = open_session(identity(), tmp_path)
    with pytest.raises(_native.NativeError) as caught:
        _native.RuntimeInstance(session, settings)
    assert (caught.value.reason, caught.value.message) == ("LOAD_FAILED", faults)


def test_a_fixed_first_dimension_cannot_batch(tmp_path: Path) -> None:
    session = open_session(identity(dims=[2, 3]), tmp_path)
    with pytest.raises(_native.NativeError, match="the model cannot batch; set max_batch_size to 0"):
        _native.RuntimeInstance(session, promise())


def test_a_type_that_nobody_can_send_is_not_served(tmp_path: Path) -> None:
    session = open_session(identity(TensorProto.FLOAT8E4M3FN), tmp_path)
    with pytest.raises(
        _native.NativeError, match="input 'x' is configured as FP32 but the model has ONNX element type 17"
    ):
        _native.RuntimeInstance(session, promise())


def test_a_buffer_that_cannot_be_is_refused_at_load(tmp_path: Path) -> None:
    session = open_session(identity(dims=["batch", 2**40]), tmp_path)
    with pytest.raises(_native.NativeError) as caught:
        _native.RuntimeInstance(session, settings_for(session, 2**24))
    assert caught.value.reason == "LOAD_FAILED"
    assert "buffer" in caught.value.message


# -- threads ----------------------------------------------------------------------------------------------------------


def nice_of_threads() -> dict[int, int]:
    """Nice value by thread id of this process."""
    found = {}
    for entry in Path("/proc/self/task").iterdir():
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # It has ended meanwhile.
            continue
        found[int(entry.name)] = int(fields[16])
    return found


def test_pool_threads_of_a_session_have_the_priority_of_the_caller(tmp_path: Path) -> None:
    before = nice_of_threads()
    session = open_session(
        identity(), tmp_path, SessionSettings(intra_op_threads=3, inter_op_threads=2, parallel_execution=True)
    )
    made = {thread: nice for thread, nice in nice_of_threads().items() if thread not in before}
    # The caller of a run is the third, and of the other pool the second.
    assert len(made) >= 3
    assert set(made.values()) == {os.getpriority(os.PRIO_PROCESS, threading.get_native_id())}
    session.close()
    assert not set(made) & set(nice_of_threads())


def test_a_model_is_read_at_the_lowest_priority_without_the_gil(tmp_path: Path) -> None:
    # A pipe in the file's place: the load waits in it, and so does whoever opens the other end first.
    pipe = tmp_path / "model.onnx"
    os.mkfifo(pipe)
    before = set(nice_of_threads())
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(_native.Session, str(pipe), SessionSettings())
        with pipe.open("wb") as file:
            nices = [nice for thread, nice in nice_of_threads().items() if thread not in before]
            file.write(identity().SerializeToString())
        assert [info.name for info in load.result(timeout=60).inputs] == ["x"]
    # The pool's own thread, which waits, and the one that loads.
    assert sorted(nices) == [os.getpriority(os.PRIO_PROCESS, 0), 19]


# -- lifetimes --------------------------------------------------------------------------------------------------------


def test_a_closed_session_answers_nothing_but_its_instances_go_on(tmp_path: Path) -> None:
    gc.collect()
    before = _native.live_objects()
    session = open_session(identity(), tmp_path)
    settings = settings_for(session)
    runner = Runner(session, settings)
    session.close()
    session.close()
    assert _native.live_objects()["session"] == before["session"] + 1
    for use in (
        lambda: session.inputs,
        lambda: session.outputs,
        lambda: session.custom_metadata("a"),
        lambda: _native.RuntimeInstance(session, settings),
    ):
        with pytest.raises(ValueError, match="the session is closed"):
            use()
    x = np.ones((2, 3), np.float32)
    np.testing.assert_array_equal(runner.run([x])[0], x)
    del runner
    assert _native.live_objects() == before


def test_a_version_has_as_many_instances_as_its_groups_say(tmp_path: Path) -> None:
    gc.collect()
    before = _native.live_objects()["instance"]
    sessions = [open_session(identity(), tmp_path) for _ in range(2)]
    groups = (InstanceGroup(2, CPU), InstanceGroup(1, CPU))
    settings = settings_for(sessions[0], groups=groups)
    for wrong in (sessions[:1], [*sessions, sessions[0]]):
        with pytest.raises(ValueError, match="zip"):
            _native.Version(settings, wrong)
    version = _native.Version(settings, sessions)
    assert _native.live_objects()["instance"] == before + 3
    # One session may stand behind several groups.
    shared = _native.Version(settings, [sessions[0], sessions[0]])
    assert _native.live_objects()["instance"] == before + 6
    assert version.retire(1.0)
    assert shared.retire(1.0)
    assert _native.live_objects()["instance"] == before


def test_sessions_without_instances_leave_nothing_behind(tmp_path: Path) -> None:
    gc.collect()
    before = _native.live_objects()
    threads = set(nice_of_threads())
    for _ in range(20):
        open_session(identity(), tmp_path, SessionSettings(intra_op_threads=2))
        refusal(b"x", tmp_path)
    assert _native.live_objects() == before
    assert set(nice_of_threads()) <= threads


def test_sessions_are_made_side_by_side(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(identity().SerializeToString())
    made: list[_native.Session] = []

    def load() -> None:
        for _ in range(10):
            made.append(_native.Session(str(path), SessionSettings(intra_op_threads=2)))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 40
    assert all(session.inputs == made[0].inputs for session in made)
