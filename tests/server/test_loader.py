"""A load gives a warm version or a reason, and leaves nothing behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from server.errors import Reason, ServingError
from server.loader import (
    LoadedVersion,
    Loader,
    LoadRequest,
    count_gpus,
    find_runtime_library,
    machine_of,
    without_paths,
)
from server.model_config import Machine, read_text
from server.settings import SessionSettings
from server.source import Repository
from tests.server.fakes import FakeNative, ManualClock, NativeError, WarmupWarning, onnx_bytes, put_model

WARMUP = 'model_warmup { name: "w" inputs { key: "X" value { dims: [4] zero_data: true } } }'
CPU = Machine()
TWO_GPUS = Machine(("CUDAExecutionProvider", "CPUExecutionProvider"), 2)


class World:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.native = FakeNative()
        self.clock = ManualClock()
        put_model(root, "a")

    def load(self, config: str = "", machine: Machine = CPU, **named: Any) -> LoadedVersion:
        folder = Repository(self.root).model("a")
        assert folder is not None
        loader = Loader(self.native, machine, clock=self.clock)
        return loader.load(LoadRequest(folder, "1", read_text(config)), **named)

    def refusal(self, config: str = "", machine: Machine = CPU) -> str:
        with pytest.raises(ServingError) as raised:
            self.load(config, machine)
        assert raised.value.reason is Reason.LOAD_FAILED
        assert all(session.is_closed for session in self.native.sessions)
        assert all(version.is_retired for version in self.native.versions)
        return raised.value.message


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def test_a_load_opens_warms_and_starts(world: World) -> None:
    loaded = world.load("max_batch_size: 2")
    (version,) = world.native.versions
    assert loaded.native is version  # type: ignore[comparison-overlap]
    assert version.is_started
    assert [batch.rows for batch in version.warmed] == [1, 2]
    assert loaded.config.max_batch_size == 2
    assert (loaded.settings.name, loaded.settings.version) == ("a", "1")
    assert loaded.weights_bytes == len(onnx_bytes("a-1"))
    assert all(session.is_closed for session in world.native.sessions)


def test_the_warm_up_comes_after_on_open_and_before_the_start(world: World) -> None:
    order: list[str] = []
    world.native.on_version = lambda _tag: order.append("version")
    world.native.on_warm_up = lambda _tag, _batches: (
        order.append(f"warm-up, started: {world.native.versions[0].is_started}") or []
    )
    world.load("max_batch_size: 1", on_open=lambda: order.append("open"))
    assert order == ["version", "open", "warm-up, started: False"]


def test_instances_of_one_kind_share_a_session(world: World) -> None:
    world.load("instance_group { count: 2 kind: KIND_CPU } instance_group { kind: KIND_CPU }")
    assert len(world.native.sessions) == 1


def test_each_device_has_its_own_session_and_weights(world: World) -> None:
    loaded = world.load("instance_group { kind: KIND_GPU }", TWO_GPUS)
    assert [session.settings.device_id for session in world.native.sessions] == [0, 1]
    assert loaded.weights_bytes == 2 * len(onnx_bytes("a-1"))


def test_a_file_that_is_no_model_is_refused_before_the_runtime_sees_it(world: World) -> None:
    (world.root / "a" / "1" / "model.onnx").write_bytes(b"junk")
    assert world.refusal().startswith("model 'a' version '1' cannot be loaded: the file is truncated or corrupt")
    assert not world.native.sessions


def test_a_missing_file_is_told(world: World) -> None:
    assert world.refusal('default_model_filename: "other.onnx"') == (
        "model 'a' version '1' cannot be loaded: version folder 1 has no other.onnx"
    )


def test_mistakes_of_the_configuration_are_told_before_anything_is_opened(world: World) -> None:
    message = world.refusal("max_batch_size: -1 response_cache { enable: true }")
    assert "response_cache.enable: there is no response cache; max_batch_size: must be from 0" in message
    assert not world.native.sessions


def test_what_the_runtime_says_is_told_without_paths(world: World) -> None:
    def fail(_tag: str) -> None:
        raise NativeError("LOAD_FAILED", "Load model from /srv/models/a/1/model.onnx failed:\n  bad node")

    world.native.on_session = fail
    assert world.refusal() == ("model 'a' version '1' cannot be loaded: Load model from model.onnx failed: bad node")


def test_a_second_session_that_fails_closes_the_first(world: World) -> None:
    opened: list[str] = []

    def fail_second(tag: str) -> None:
        opened.append(tag)
        if len(opened) == 2:
            raise NativeError("LOAD_FAILED", "no memory on the device")

    world.native.on_session = fail_second
    assert "no memory on the device" in world.refusal("instance_group { kind: KIND_GPU }", TWO_GPUS)
    assert len(world.native.sessions) == 1


def test_a_configured_warm_up_that_fails_fails_the_load(world: World) -> None:
    def fail(_tag: str, _batches: Sequence[Any]) -> list[Any]:
        raise NativeError("MODEL_RAISED", "node Foo failed")

    world.native.on_warm_up = fail
    assert world.refusal(WARMUP) == "model 'a' version '1' cannot be loaded: node Foo failed"


def test_a_warm_up_file_that_is_missing_fails_the_load(world: World) -> None:
    assert "'x' is not a file in the model's warmup folder" in world.refusal(
        'model_warmup { name: "w" inputs { key: "X" value { dims: 4 input_data_file: "x" } } }'
    )


def test_a_made_up_warm_up_that_fails_is_a_warning(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.native.on_warm_up = lambda _tag, batches: [WarmupWarning(batches[0].name, "index out of range")]
    loaded = world.load()
    (version,) = world.native.versions
    assert len(version.warmed) == 1, "what fails with zeros fails with more zeros"
    assert version.is_started
    assert loaded.native is version  # type: ignore[comparison-overlap]
    (record,) = caplog.records
    assert "made-up warm-up 'zeros of 1 rows' of a version 1 failed; add model_warmup" in record.message


def test_made_up_warm_ups_of_a_slow_model_end_early(world: World, caplog: pytest.LogCaptureFixture) -> None:
    def slow(_tag: str, batches: Sequence[Any]) -> list[Any]:
        world.clock.advance(sum(0.5 * batch.rows * batch.count for batch in batches))
        return []

    world.native.on_warm_up = slow
    world.load()
    # 1 row x 5 runs 2.5 s, 2 rows x 5 5 s, then one run each until 10 s are spent.
    assert [(batch.rows, batch.count) for batch in world.native.versions[0].warmed] == [(1, 5), (2, 5), (4, 1), (8, 1)]
    assert any("ended before 16 rows" in record.message for record in caplog.records)


def test_configured_warm_ups_run_to_their_end_however_slow(world: World) -> None:
    def slow(_tag: str, _batches: Sequence[Any]) -> list[Any]:
        world.clock.advance(60)
        return []

    world.native.on_warm_up = slow
    loaded = world.load(WARMUP + WARMUP)
    assert len(world.native.versions[0].warmed) == 2
    assert loaded.load_seconds == 120


def test_a_bug_is_not_disguised_as_a_bad_model(world: World) -> None:
    def fail(_tag: str) -> None:
        raise ZeroDivisionError

    world.native.on_version = fail
    with pytest.raises(ZeroDivisionError):
        world.load()
    assert all(session.is_closed for session in world.native.sessions)


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("Load /a/b/c.onnx failed", "Load c.onnx failed"),
        ("'/a/b/c d' and \"/x/y\"", "'c d' and \"y\""),
        ("/usr/lib/libfoo.so: no such file", "libfoo.so: no such file"),
        ("shape 3/4 and a/b stay", "shape 3/4 and a/b stay"),
        ("from 1.5/sec", "from 1.5/sec"),
    ],
)
def test_paths_in_messages_are_cut_to_their_last_part(message: str, shown: str) -> None:
    assert without_paths(message) == shown


def test_the_installed_runtime_is_found() -> None:
    path = find_runtime_library()
    assert path.is_file()
    assert path.name.startswith("libonnxruntime.so.1.")


def test_a_missing_runtime_is_told_with_the_line_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.loader._DISTRIBUTIONS", ("no-such-distribution",))
    with pytest.raises(ServingError, match=r"pip install 'tidegate\[cpu\]'"):
        find_runtime_library()


def test_gpus_are_counted_only_where_the_runtime_could_use_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.loader.count_gpus", lambda: 3)
    assert machine_of(["CPUExecutionProvider"]).n_gpus == 0
    assert machine_of(["CUDAExecutionProvider", "CPUExecutionProvider"]).n_gpus == 3
    assert not machine_of(["CPUExecutionProvider"]).has_cuda


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_library(_name: str) -> None:
        raise OSError

    monkeypatch.setattr("server.loader.ctypes.CDLL", no_library)
    assert count_gpus() == 0


def test_sessions_are_shared_by_what_they_do_not_by_who_asks() -> None:
    from server.loader import _hashable

    assert _hashable(SessionSettings()) == _hashable(SessionSettings())
    assert _hashable(SessionSettings(device_id=1)) != _hashable(SessionSettings())
    assert _hashable(SessionSettings(config_entries={"a": "1"})) != _hashable(SessionSettings())
    hash(_hashable(SessionSettings(config_entries={"a": "1"})))
