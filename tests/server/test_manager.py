"""The manager with a fake native core: what it loads, routes, keeps and frees, and what it says about it."""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.config import ControlMode
from server.errors import Reason, ServingError
from server.manager import Manager
from server.placement import State
from tests.server.fakes import (
    PATIENCE_S,
    NativeError,
    counts_of,
    eventually,
    onnx_bytes,
)
from tests.server.world import World

ALL = "version_policy { all { } }"


def rows(manager: Manager) -> list[tuple[str, str, str]]:
    return [(row.name, row.version, row.state) for row in manager.index()]


def refused(reason: Reason, call: Callable[[], object]) -> str:
    with pytest.raises(ServingError) as raised:
        call()
    assert raised.value.reason is reason
    return raised.value.message


# -- the start ---------------------------------------------------------------------------------------------------------


def test_everything_is_loaded_at_the_start(world: World) -> None:
    world.put("a")
    world.put("b", "3")
    manager = world.started()
    assert world.native.routed() == {"a": {"1": "a-1"}, "b": {"3": "b-3"}}
    assert world.native.defaults() == {"a": "1", "b": "3"}
    assert rows(manager) == [("a", "1", "READY"), ("b", "3", "READY")]
    assert manager.startup_done


def test_a_version_serves_only_after_it_is_warm_and_started(world: World) -> None:
    world.put("a")
    seen: list[tuple[bool, dict[str, dict[str, str]]]] = []

    def warming(tag: str, _batches: Any) -> list[Any]:
        seen.append((manager.ready("a"), world.native.routed()))
        return []

    world.native.on_warm_up = warming
    manager = world.manager(ControlMode.NONE)
    manager.load_all()
    assert seen
    assert all(not is_ready and "a-1" not in routed["a"].values() for is_ready, routed in seen)
    version = world.native.serving("a-1")
    assert [batch.rows for batch in version.warmed] == [1, 2, 4, 8, 16, 32, 64]
    assert version.is_started
    assert manager.ready("a")


def test_a_model_that_fails_at_the_start_harms_nobody_and_says_why(world: World) -> None:
    world.put("good")
    world.put("bad")
    (world.repository / "bad" / "1" / "model.onnx").write_bytes(b"junk")
    manager = world.started()
    assert manager.startup_done
    assert rows(manager) == [("bad", "1", "UNAVAILABLE"), ("good", "1", "READY")]
    reason = manager.index()[0].reason
    assert reason.startswith("model 'bad' version '1' cannot be loaded: the file is truncated or corrupt")
    assert world.native.routed()["bad"]["1"] == f"({reason})"
    assert reason in refused(Reason.VERSION_NOT_READY, lambda: manager.resolve("bad"))


def test_a_broken_config_is_the_reason_of_every_version(world: World) -> None:
    world.put("a", "1", config="max_batch_size: twelve")
    world.put("a", "2")
    manager = world.started()
    for row in manager.index():
        assert row.state == "UNAVAILABLE"
        assert "cannot be loaded: config.pbtxt:1:17" in row.reason
    assert not world.native.sessions


def test_explicit_mode_loads_what_is_named(world: World) -> None:
    for name in "abc":
        world.put(name)
    manager = world.started(ControlMode.EXPLICIT, load_models=["b", "b", "typo"])
    assert rows(manager) == [
        ("a", "1", "UNAVAILABLE"),
        ("b", "1", "READY"),
        ("c", "1", "UNAVAILABLE"),
        ("typo", "", "UNAVAILABLE"),
    ]
    reasons = {row.name: row.reason for row in manager.index()}
    assert reasons["a"] == "not loaded"
    assert reasons["typo"] == "the model repository has no model 'typo'; copy it there first"
    assert world.native.routed()["a"] == {"1": "(not loaded)"}
    assert len(world.native.versions) == 1


def test_explicit_mode_with_a_star_loads_everything(world: World) -> None:
    world.put("a")
    world.put("b")
    manager = world.started(ControlMode.EXPLICIT, load_models=["*"])
    assert [row.state for row in manager.index()] == ["READY", "READY"]


def test_an_empty_repository_is_a_fine_one(world: World) -> None:
    manager = world.started()
    assert manager.index() == []
    assert manager.startup_done


def test_loads_of_a_start_run_side_by_side(world: World) -> None:
    for name in "abc":
        world.put(name)
    together = threading.Barrier(3, timeout=PATIENCE_S)
    world.native.on_session = lambda _tag: together.wait() and None
    manager = world.started(load_threads=3)
    assert [row.state for row in manager.index()] == ["READY"] * 3


def test_no_more_loads_run_at_once_than_are_allowed(world: World) -> None:
    for name in "abcdef":
        world.put(name)
    running: list[str] = []
    most: list[int] = []

    def session(tag: str) -> None:
        running.append(tag)
        most.append(len(running))
        threading.Event().wait(0.005)
        running.remove(tag)

    world.native.on_session = session
    world.started(load_threads=2)
    assert len(most) == 6
    assert max(most) <= 2


# -- versions ----------------------------------------------------------------------------------------------------------


def test_the_highest_version_serves_when_nothing_is_said(world: World) -> None:
    for version in ("2", "10", "9.1", "1.0.0-rc.1"):
        world.put("a", version)
    manager = world.started()
    assert world.native.routed() == {
        "a": {"10": "a-10", "9.1": "(not loaded)", "2": "(not loaded)", "1.0.0-rc.1": "(not loaded)"}
    }
    assert manager.versions("a") == ["10"]
    assert rows(manager)[-1] == ("a", "10", "READY")


def test_all_versions_serve_when_the_policy_says_so(world: World) -> None:
    for version in ("1", "2", "10.0.1"):
        world.put("a", version, config=ALL)
    manager = world.started()
    assert manager.versions("a") == ["1", "2", "10.0.1"]
    assert world.native.defaults() == {"a": "10.0.1"}


def test_specific_versions_by_number_and_text(world: World) -> None:
    config = (
        "version_policy { specific { versions: [1] } }\n"
        'parameters { key: "tidegate_versions" value { string_value: "2.1.0" } }'
    )
    for version in ("1", "2", "2.1.0"):
        world.put("a", version, config=config)
    assert world.started().versions("a") == ["1", "2.1.0"]


def test_a_policy_that_names_what_is_not_there_fails(world: World) -> None:
    world.put("a", config="version_policy { specific { versions: [1, 7] } }")
    manager = world.started()
    assert "version_policy names 7, which no version folder is" in manager.index()[0].reason


def test_a_model_without_versions_says_so(world: World) -> None:
    (world.repository / "a").mkdir()
    manager = world.started()
    assert rows(manager) == [("a", "", "UNAVAILABLE")]
    assert "there is no version folder" in manager.index()[0].reason
    assert "there is no version folder" in refused(Reason.VERSION_NOT_READY, lambda: manager.resolve("a"))
    assert world.native.routed() == {"a": {}}


def test_resolve_knows_exact_texts_ranges_and_aliases(world: World) -> None:
    for version in ("1", "1.4.0", "1.10.3", "2.0.0-rc.1"):
        world.put("a", version, config="version_policy { specific { versions: [1] } }\n" + 'parameters { key: '
                  '"tidegate_versions" value { string_value: "1.4.0 1.10.3" } }')  # fmt: skip
    manager = world.started()
    manager.set_aliases("a", {"stable": "1.4.0", "1": "1.10.3", "gone": "7", "next": "2.0.0-rc.1"})

    def answer(version: str) -> str:
        return manager.resolve("a", version).version

    assert answer("") == "1.10.3"
    assert answer("1.4.0") == "1.4.0"
    assert answer("^1.4") == "1.10.3"
    assert answer("<1.4") == "1"
    assert answer("~1.4") == "1.4.0"
    assert answer("stable") == "1.4.0"
    assert answer("1") == "1", "a version's own text wins over an alias"
    message = refused(Reason.VERSION_NOT_FOUND, lambda: answer("1.0"))
    assert message == "model 'a' has no version '1.0'; live: 1.10.3, 1.4.0, 1"
    refused(Reason.VERSION_NOT_FOUND, lambda: answer("gone"))
    refused(Reason.VERSION_NOT_FOUND, lambda: answer("^3"))
    assert "version '2.0.0-rc.1' is not ready: not loaded" in refused(
        Reason.VERSION_NOT_READY, lambda: answer("2.0.0-rc.1")
    )
    refused(Reason.VERSION_NOT_READY, lambda: answer("next"))
    refused(Reason.VERSION_NOT_READY, lambda: answer(">=2.0.0-rc.1"))
    assert "unknown model 'b'" in refused(Reason.MODEL_NOT_FOUND, lambda: manager.resolve("b"))
    assert manager.ready("a", "^1.4")
    assert not manager.ready("a", "next")
    assert not manager.ready("b")
    assert world.native.routes[0].aliases["stable"] == "1.4.0"


def test_messages_quote_only_the_beginning_of_what_a_client_sent(world: World) -> None:
    world.put("a")
    manager = world.started()
    message = refused(Reason.VERSION_NOT_FOUND, lambda: manager.resolve("a", "9" * 10_000))
    assert len(message) < 300
    assert len(refused(Reason.MODEL_NOT_FOUND, lambda: manager.resolve("x" * 10_000))) < 300


def test_all_versions_of_a_change_succeed_or_none_does(world: World) -> None:
    world.put("a", "1", config=ALL)
    world.put("a", "2", "broken")
    world.put("a", "3")

    def session(tag: str) -> None:
        if tag == "broken":
            raise NativeError("LOAD_FAILED", "no kernel for Foo")

    world.native.on_session = session
    manager = world.started()
    assert [row.state for row in manager.index()] == ["UNAVAILABLE"] * 3
    reasons = {row.version: row.reason for row in manager.index()}
    assert reasons["2"] == "model 'a' version '2' cannot be loaded: no kernel for Foo"
    assert reasons["1"] == reasons["3"] == "version '2' of the same load failed"
    assert all(version.is_retired for version in world.native.versions)
    assert manager.versions("a") == []


def test_sessions_are_closed_whether_the_load_succeeds_or_fails(world: World) -> None:
    world.put("good")
    world.put("bad")

    def version(tag: str) -> None:
        if tag == "bad-1":
            raise NativeError("LOAD_FAILED", "the instance does not fit")

    world.native.on_version = version
    world.started()
    assert len(world.native.sessions) == 2
    assert all(session.is_closed for session in world.native.sessions)


def test_an_unexpected_failure_is_told_without_its_insides(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.put("a")

    def session(_tag: str) -> None:
        raise RuntimeError("/secret/path is broken")

    world.native.on_session = session
    manager = world.started()
    reason = manager.index()[0].reason
    assert "internal error (RuntimeError)" in reason
    assert "secret" not in reason
    assert any(record.exc_info and "secret" in str(record.exc_info[1]) for record in caplog.records)


# -- loads by request --------------------------------------------------------------------------------------------------


def test_load_and_unload_by_request(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT)
    assert not manager.ready("a")
    manager.load("a")
    assert manager.ready("a")
    version = world.native.serving("a-1")
    manager.unload("a")
    assert not manager.ready("a")
    world.settle()
    assert version.is_retired
    assert rows(manager) == [("a", "1", "UNAVAILABLE")]
    assert manager.index()[0].reason == "unloaded"
    assert world.native.routed() == {"a": {"1": "(unloaded)"}}
    manager.unload("a")  # what is known and not loaded is no error
    manager.load("a")
    assert manager.ready("a")


@pytest.mark.parametrize("mode", [ControlMode.NONE, ControlMode.POLL])
def test_load_and_unload_need_the_explicit_mode(world: World, mode: ControlMode) -> None:
    world.put("a")
    manager = world.started(mode)
    for call in (lambda: manager.load("a"), lambda: manager.unload("a")):
        assert f"not allowed with --model-control-mode {mode.value}" in refused(Reason.CONTROL_MODE, call)
    assert manager.ready("a")


def test_a_reload_without_change_loads_everything_anew(world: World) -> None:
    world.put("a", "1", config=ALL)
    world.put("a", "2")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    old = list(world.native.versions)
    manager.load("a")
    world.settle()
    assert len(world.native.versions) == 4
    assert all(version.is_retired for version in old)
    assert manager.versions("a") == ["1", "2"]


def test_a_reload_with_changes_loads_only_those(world: World) -> None:
    world.put("a", "1", config=ALL)
    world.put("a", "2")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    kept = world.native.serving("a-1")
    world.put("a", "3")
    manager.load("a")
    world.settle()
    assert not kept.is_retired
    assert world.native.is_routed(kept)
    assert manager.versions("a") == ["1", "2", "3"]
    world.put("a", "2", "new-2")
    manager.load("a")
    world.settle()
    assert world.native.routed()["a"] == {"3": "a-3", "2": "new-2", "1": "a-1"}
    assert not kept.is_retired
    assert [version.tag for version in world.native.versions if version.is_retired] == ["a-2"]


def test_a_changed_config_reloads_every_version(world: World) -> None:
    world.put("a", "1", config=ALL)
    world.put("a", "2")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    (world.repository / "a" / "config.pbtxt").write_text(ALL + "max_batch_size: 8")
    manager.load("a")
    assert len(world.native.versions) == 4
    assert manager.resolve("a", "1").config.max_batch_size == 8


def test_a_new_version_takes_over_and_the_old_one_leaves(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    old = world.native.serving("a-1")
    world.put("a", "2")
    manager.load("a")
    world.settle()
    assert manager.resolve("a").version == "2"
    assert old.is_retired
    assert world.native.routed() == {"a": {"2": "a-2", "1": "(unloaded)"}}


def test_a_failed_reload_keeps_the_old_version_and_says_why(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    old = world.native.serving("a-1")
    (world.repository / "a" / "1" / "model.onnx").write_bytes(onnx_bytes()[:-1])
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert message.startswith("model 'a' version '1' cannot be loaded")
    assert world.native.is_routed(old)
    assert not old.is_retired
    assert manager.index() == [("a", "1", "READY", message)]
    world.put("a", "1", "repaired")
    manager.load("a")
    assert manager.index() == [("a", "1", "READY", "")]
    assert world.native.routed() == {"a": {"1": "repaired"}}


def test_a_failed_new_version_keeps_the_old_one(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    world.put("a", "2", "a" * 3)

    def warm_up(tag: str, _batches: Any) -> list[Any]:
        raise NativeError("MODEL_RAISED", f"{tag} does not run")

    world.put("a", "2", config='model_warmup { name: "w" inputs { key: "X" value { dims: [4] zero_data: true } } }')
    world.native.on_warm_up = warm_up
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert message == "model 'a' version '2' cannot be loaded: a-2 does not run"
    assert manager.resolve("a").version == "1"
    assert rows(manager) == [("a", "1", "READY"), ("a", "2", "UNAVAILABLE")]
    failed = world.native.serving("a-2")
    assert failed.is_retired
    assert not failed.is_started


def test_a_broken_config_at_a_reload_keeps_what_serves(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    (world.repository / "a" / "config.pbtxt").write_text('backend: "python"')
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert "backend: 'python' is not served here" in message
    assert manager.ready("a")
    assert manager.index()[0].reason == message


def test_a_model_stays_ready_through_every_moment_of_a_reload(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    seen: list[bool] = []
    changes: list[str] = []
    manager.add_listener(changes.append)

    def look(*_anything: Any) -> list[Any]:
        seen.append(manager.ready("a") and manager.ready("a", "1") and rows(manager) == [("a", "1", "READY")])
        return []

    world.native.on_session = look
    world.native.on_warm_up = look
    world.native.on_publish = look
    manager.load("a")
    assert len(seen) > 3
    assert all(seen)
    assert changes == [], "nobody's readiness changed"


def test_what_a_version_took_is_finished_before_it_is_freed(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"], drain_timeout_s=PATIENCE_S)
    old = world.native.serving("a-1")
    old.idle.clear()
    world.put("a", "2")
    manager.load("a")  # does not wait for the old one
    assert old.is_retiring.wait(PATIENCE_S)
    assert ("a", "1", "UNLOADING") in rows(manager)
    assert not manager.ready("a", "1")
    assert manager.resolve("a").version == "2"
    old.idle.set()
    world.settle()
    assert rows(manager) == [("a", "1", "UNAVAILABLE"), ("a", "2", "READY")]
    assert old.retired_with_s == PATIENCE_S


def test_old_versions_do_not_pile_up_behind_a_slow_one(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"], drain_timeout_s=PATIENCE_S)
    first = world.native.versions[0]
    first.idle.clear()
    manager.load("a")
    assert first.is_retiring.wait(PATIENCE_S)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(manager.load, "a")
        assert not second.done()
        assert len(world.native.versions) == 2, "the next load waits until the one before the last is gone"
        first.idle.set()
        second.result(PATIENCE_S)
    assert len(world.native.versions) == 3


def test_loads_of_one_model_wait_for_each_other_and_others_do_not(world: World) -> None:
    world.put("slow")
    world.put("quick")
    manager = world.started(ControlMode.EXPLICIT)
    is_loading, may_go_on = threading.Event(), threading.Event()

    def session(tag: str) -> None:
        if tag == "slow-1":
            is_loading.set()
            assert may_go_on.wait(PATIENCE_S)

    world.native.on_session = session
    with ThreadPoolExecutor(2) as pool:
        slow = pool.submit(manager.load, "slow")
        assert is_loading.wait(PATIENCE_S)
        again = pool.submit(manager.load, "slow")
        assert ("slow", "1", "LOADING") in rows(manager)
        assert "not ready: loading" in refused(Reason.VERSION_NOT_READY, lambda: manager.resolve("slow"))
        assert world.native.routed()["slow"]["1"] == "(loading)"
        manager.load("quick")
        assert manager.ready("quick")
        assert not again.done()
        may_go_on.set()
        slow.result(PATIENCE_S)
        again.result(PATIENCE_S)
    assert [version.tag for version in world.native.versions].count("slow-1") == 2


def test_a_version_that_warms_up_says_so(world: World) -> None:
    world.put("a")
    manager = world.manager(ControlMode.EXPLICIT)
    said: list[str] = []

    def warm_up(_tag: str, _batches: Any) -> list[Any]:
        said.append(world.native.routed()["a"]["1"])
        said.append(refused(Reason.VERSION_NOT_READY, lambda: manager.resolve("a")))
        return []

    world.native.on_warm_up = warm_up
    manager.load("a", '{"max_batch_size": 1}')
    assert said == ["(warming up)", "model 'a' version '1' is not ready: warming up"]


def test_every_failure_is_logged_once_with_its_model(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR)
    world.put("a")
    (world.repository / "a" / "1" / "model.onnx").write_bytes(b"junk")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a", "ghost"])
    told = [(vars(record)["model"], vars(record).get("version"), record.message) for record in caplog.records]
    assert sorted(one[:2] for one in told) == [("a", "1"), ("ghost", None)]
    caplog.clear()
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert [record.message for record in caplog.records] == [message]
    caplog.clear()
    (world.repository / "a" / "config.pbtxt").write_text("max_batch: 1")
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert [record.message for record in caplog.records] == [message]
    caplog.clear()
    refused(Reason.MODEL_NOT_FOUND, lambda: manager.load("nobody"))
    assert caplog.records == [], "what clients make up is not worth a line"


def test_an_unknown_model_cannot_be_loaded_and_leaves_nothing_behind(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    for name in ("ghost", "ghost2"):
        refused(Reason.MODEL_NOT_FOUND, lambda name=name: manager.load(name))
        refused(Reason.MODEL_NOT_FOUND, lambda name=name: manager.unload(name))
        refused(Reason.MODEL_NOT_FOUND, lambda name=name: manager.set_aliases(name, {}))
    for name in ("../escape", ".hidden", "", "a/b", "a\0b"):
        refused(Reason.INVALID_TENSOR, lambda name=name: manager.load(name))
    assert manager.index() == []
    assert manager._models == {}
    assert manager._tried == {}
    assert manager._locks._locks == {}
    assert manager.ledger.rows() == []


def test_a_model_that_appears_is_named_before_it_is_loaded(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    world.put("late")
    assert manager.index() == [], "names are at most a second old"
    world.clock.advance(1.5)
    assert rows(manager) == [("late", "1", "UNAVAILABLE")]
    assert world.native.routed() == {"late": {"1": "(not loaded)"}}
    world.put("late", "2")
    world.clock.advance(1.5)
    assert rows(manager) == [("late", "1", "UNAVAILABLE"), ("late", "2", "UNAVAILABLE")]
    shutil.rmtree(world.repository / "late")
    world.clock.advance(1.5)
    assert manager.index() == []
    assert world.native.routed() == {}


def test_a_model_can_be_loaded_the_moment_it_is_there(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    world.put("late")
    manager.load("late")
    assert manager.ready("late")


def test_a_loaded_model_whose_folder_is_gone_goes_on_serving(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["*"])
    shutil.rmtree(world.repository / "a")
    refused(Reason.MODEL_NOT_FOUND, lambda: manager.load("a"))
    world.clock.advance(2)
    assert rows(manager) == [("a", "1", "READY")]
    manager.unload("a")
    world.settle()
    assert manager.index() == []
    assert world.native.routed() == {}


# -- config and files of a request -------------------------------------------------------------------------------------


def test_a_config_of_a_request_replaces_the_files(world: World) -> None:
    world.put("a", config="max_batch_size: 4")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    manager.load("a", json.dumps({"max_batch_size": 16, "dynamic_batching": {"preferred_batch_size": [8]}}))
    assert manager.resolve("a").settings.max_batch_size == 16
    assert manager.resolve("a").settings.batching.preferred_batch_sizes == (8,)
    manager.load("a")
    assert manager.resolve("a").settings.max_batch_size == 4, "the next load reads the file again"


@pytest.mark.parametrize("config", ["{", '{"max_batch": 3}', '{"max_batch_size": "many"}', "[]"])
def test_a_config_that_cannot_be_read_is_the_callers_mistake(world: World, config: str) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    message = refused(Reason.INVALID_TENSOR, lambda: manager.load("a", config))
    assert message.startswith("model 'a': parameter config: ")
    assert manager.index() == [("a", "1", "READY", "")]


def test_files_of_a_request_replace_the_folder(world: World) -> None:
    world.put("a", "1")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    config = json.dumps({"version_policy": {"all": {}}})
    manager.load("a", config, {"file:1/model.onnx": onnx_bytes("mine"), "1.2.3/model.onnx": onnx_bytes("also")})
    world.settle()
    assert world.native.routed() == {"a": {"1.2.3": "also", "1": "mine"}}
    folder = world.native.sessions[-1].path.parent.parent.parent
    assert folder.exists(), "a runtime may read weights later on"
    manager.load("a")
    world.settle()
    assert world.native.routed() == {"a": {"1": "a-1"}}, "a version that only the request had is gone"
    assert not folder.exists()


def test_files_can_make_a_model_that_the_repository_does_not_have(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    manager.load("mine", "{}", {"file:7/model.onnx": onnx_bytes("seven")})
    world.clock.advance(2)
    assert rows(manager) == [("mine", "7", "READY")]
    folder = world.native.sessions[-1].path.parent.parent.parent
    manager.unload("mine")
    world.settle()
    assert manager.index() == []
    assert manager._models == {}
    assert not folder.exists()


def test_files_that_cannot_be_loaded_leave_nothing_behind(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("mine", "{}", {"file:1/model.onnx": b"junk"}))
    assert "model 'mine' version '1' cannot be loaded" in message
    assert "/" not in message
    assert manager.index() == []
    assert manager._models == {}
    assert manager._files == {}


def test_the_private_folder_is_gone_after_a_failed_load(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def mkdtemp(prefix: str) -> str:
        folder = world.repository.parent / f"{prefix}{len(made)}"
        folder.mkdir()
        made.append(str(folder))
        return str(folder)

    monkeypatch.setattr("server.manager.tempfile.mkdtemp", mkdtemp)
    manager = world.started(ControlMode.EXPLICIT)
    refused(Reason.LOAD_FAILED, lambda: manager.load("mine", "{}", {"1/model.onnx": b"junk"}))
    refused(
        Reason.LOAD_FAILED,
        lambda: manager.load("mine", '{"backend": "python"}', {"1/model.onnx": onnx_bytes()}),
    )
    assert len(made) == 2
    assert not any(os.path.exists(folder) for folder in made)


@pytest.mark.parametrize(
    "name",
    [
        "file:model.onnx",
        "file:1/",
        "file:/model.onnx",
        "file:1/../model.onnx",
        "file:1/sub/model.onnx",
        "file:../1/model.onnx",
        "file:1/.hidden",
        "file:01/model.onnx",
        "file:latest/model.onnx",
        "file:1/mo\0del.onnx",
        "file:",
    ],
)
def test_files_have_a_version_and_a_plain_name(world: World, name: str) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT)
    assert "write file:<version>/<file>" in refused(
        Reason.INVALID_TENSOR, lambda: manager.load("a", "{}", {name: b"x"})
    )


def test_files_need_a_config(world: World) -> None:
    manager = world.started(ControlMode.EXPLICIT)
    assert "need the parameter config" in refused(
        Reason.INVALID_TENSOR, lambda: manager.load("a", None, {"1/model.onnx": b"x"})
    )


# -- polling -----------------------------------------------------------------------------------------------------------


def test_a_poll_loads_only_what_two_looks_found_the_same(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.POLL)
    world.put("b")
    manager.poll()
    assert not manager.ready("b"), "seen once: it may be half of a copy"
    assert rows(manager) == [("a", "1", "READY"), ("b", "1", "UNAVAILABLE")]
    manager.poll()
    assert manager.ready("b")


def test_a_poll_waits_while_a_file_grows(world: World) -> None:
    manager = world.started(ControlMode.POLL)
    folder = world.put("a")
    whole = onnx_bytes("a-1" * 30)
    for size in range(0, len(whole), 20):
        (folder / "model.onnx").write_bytes(whole[:size])
        manager.poll()
        assert not world.native.sessions
    (folder / "model.onnx").write_bytes(whole)
    manager.poll()
    manager.poll()
    assert manager.ready("a")


def test_a_poll_leaves_out_a_version_without_its_file(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.POLL)
    (world.repository / "a" / "2").mkdir()
    for _ in range(3):
        manager.poll()
    assert world.native.routed() == {"a": {"2": "(not loaded)", "1": "a-1"}}
    assert manager.index()[0].reason == ""
    world.put("a", "2")
    manager.poll()
    manager.poll()
    assert manager.resolve("a").version == "2"


def test_a_poll_that_sees_no_change_does_nothing(world: World) -> None:
    world.put("a")
    world.put("bad")
    (world.repository / "bad" / "1" / "model.onnx").write_bytes(b"junk")
    manager = world.started(ControlMode.POLL)
    loads, publishes = len(world.native.sessions), world.native.publishes
    for _ in range(3):
        manager.poll()
    assert len(world.native.sessions) == loads
    assert world.native.publishes == publishes


def test_a_poll_takes_up_what_changed_under_the_start(world: World) -> None:
    world.put("a")

    def session(tag: str) -> None:
        if tag == "a-1":
            world.put("a", "2")

    world.native.on_session = session
    manager = world.started(ControlMode.POLL)
    assert manager.resolve("a").version == "1"
    manager.poll()
    manager.poll()
    assert manager.resolve("a").version == "2"


def test_a_model_that_failed_is_tried_again_when_it_changes(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.put("a")
    (world.repository / "a" / "1" / "model.onnx").write_bytes(b"junk")
    manager = world.started(ControlMode.POLL)
    for _ in range(3):
        manager.poll()
    assert sum("cannot be loaded" in record.message for record in caplog.records) == 1
    world.put("a")
    manager.poll()
    manager.poll()
    assert manager.ready("a")


def test_a_poll_unloads_what_is_gone(world: World) -> None:
    world.put("a")
    world.put("b")
    manager = world.started(ControlMode.POLL)
    shutil.rmtree(world.repository / "a")
    manager.poll()
    assert manager.ready("a"), "missing once: it may be in the middle of a rename"
    manager.poll()
    world.settle()
    assert rows(manager) == [("b", "1", "READY")]
    assert world.native.serving("a-1").is_retired
    assert set(world.native.routed()) == {"b"}


def test_a_folder_that_is_replaced_by_renames_stays_up(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.POLL)
    os.rename(world.repository / "a", world.repository.parent / "old")
    manager.poll()
    os.rename(world.repository.parent / "old", world.repository / "a")
    for _ in range(3):
        manager.poll()
    assert len(world.native.versions) == 1
    assert manager.ready("a")


def test_a_repository_that_cannot_be_read_unloads_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.put("a")
    manager = world.started(ControlMode.POLL)
    os.rename(world.repository, world.repository.parent / "away")
    for _ in range(3):
        manager.poll()
    assert manager.ready("a")


def test_polling_goes_on_by_itself_until_the_close(world: World) -> None:
    manager = world.started(ControlMode.POLL)
    manager.start_polling(0.001)
    world.put("a")
    eventually(lambda: manager.ready("a"), "the poll finds the model")
    assert manager.close(PATIENCE_S)
    assert manager._polling is not None
    assert not manager._polling.is_alive()


def test_the_mode_none_ignores_changes(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.NONE)
    world.put("b")
    world.clock.advance(100)
    assert rows(manager) == [("a", "1", "READY")]


# -- listeners, counters, the end --------------------------------------------------------------------------------------


def test_listeners_hear_of_changed_readiness_after_the_change(world: World) -> None:
    world.put("a")
    manager = world.manager(ControlMode.EXPLICIT, load_models=["a"])
    heard: list[tuple[str, bool]] = []
    manager.add_listener(lambda name: heard.append((name, manager.ready("a"))))
    manager.load_all()
    assert heard == [("a", True), ("", True)]
    manager.unload("a")
    assert heard[2:] == [("a", False)]


def test_a_listener_that_fails_does_not_fail_the_load(world: World) -> None:
    world.put("a")
    manager = world.manager(ControlMode.EXPLICIT)

    def fail(_name: str) -> None:
        raise RuntimeError("a mistake in a listener")

    manager.add_listener(fail)
    manager.load("a")
    assert manager.ready("a")


def test_counters_go_on_through_a_reload(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    old = world.native.versions[0]
    old.counts = counts_of(10)
    old.idle.clear()
    manager.load("a")
    world.native.versions[1].counts = counts_of(5)
    between = manager.ledger.total("a", "1")
    assert between is not None
    assert between.success_count == 10 + 5
    old.counts = counts_of(12)  # two that it had taken end after the swap
    old.idle.set()
    world.settle()
    total = manager.ledger.total("a", "1")
    assert total is not None
    assert total.success_count == 12 + 5


def test_placements_are_the_ready_ones_in_order(world: World) -> None:
    for name in ("b", "a"):
        world.put(name, "1", config=ALL)
        world.put(name, "10")
        world.put(name, "2")
    manager = world.started()
    assert [(one.name, one.version) for one in manager.placements()] == [
        (name, version) for name in "ab" for version in ("1", "2", "10")
    ]
    assert all(one.state is State.READY for one in manager.placements())


def test_a_failed_publish_changes_nothing(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    old = world.native.versions[0]
    before = manager.index()
    routed = world.native.routed()

    def fail(routes: list[Any]) -> None:
        raise MemoryError

    world.native.on_publish = fail
    message = refused(Reason.LOAD_FAILED, lambda: manager.load("a"))
    assert "the route table could not be published" in message
    assert world.native.routed() == routed
    assert not old.is_retired
    assert [row[:3] for row in manager.index()] == [row[:3] for row in before]
    assert world.native.versions[1].is_retired
    world.native.on_publish = lambda _routes: None
    manager.load("a")
    world.settle()
    assert old.is_retired
    assert manager.ready("a")


def test_close_frees_everything_and_refuses_changes(world: World) -> None:
    world.put("a")
    world.put("b")
    manager = world.started(ControlMode.EXPLICIT, load_models=["*"])
    assert manager.close(PATIENCE_S)
    assert all(version.is_retired for version in world.native.versions)
    assert manager.placements() == []
    assert "the server is stopping" in refused(Reason.NODE_DRAINING, lambda: manager.load("a"))
    assert manager.close(PATIENCE_S), "closing twice is no error"


def test_close_says_when_work_had_to_be_ended_by_force(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.put("a")
    manager = world.started()
    world.native.versions[0].idle.clear()
    assert not manager.close(0.0)
    assert any("was ended by force" in record.message for record in caplog.records)


def test_close_does_not_wait_for_a_load_that_does_not_end(world: World) -> None:
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT)
    is_loading, may_go_on = threading.Event(), threading.Event()

    def session(_tag: str) -> None:
        is_loading.set()
        assert may_go_on.wait(PATIENCE_S)

    world.native.on_session = session
    with ThreadPoolExecutor(1) as pool:
        load = pool.submit(manager.load, "a")
        assert is_loading.wait(PATIENCE_S)
        assert not manager.close(0.0)
        may_go_on.set()
        error = load.exception(PATIENCE_S)
    assert isinstance(error, ServingError)
    assert error.reason is Reason.NODE_DRAINING
    assert not manager.ready("a"), "a load that ends after the close must not be published"
    assert world.native.versions[0].is_retired


def test_changes_are_logged_with_model_and_version(world: World, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    world.put("a")
    manager = world.started(ControlMode.EXPLICIT, load_models=["a"])
    manager.unload("a")
    world.settle()
    told = [(record.message.split(" ", 4)[4], vars(record)["model"], vars(record)["version"])
            for record in caplog.records if record.name == "server.manager"]  # fmt: skip
    assert [what.split(" after")[0] for what, _, _ in told] == ["is ready", "left the route", "is unloaded"]
    assert {(model, version) for _, model, version in told} == {("a", "1")}


# -- any history -------------------------------------------------------------------------------------------------------

STEPS = st.lists(
    st.tuples(
        st.sampled_from(["put", "break", "remove", "load", "unload", "reload-fails", "alias"]),
        st.sampled_from(["a", "b"]),
        st.sampled_from(["1", "2", "1.5.0"]),
    ),
    max_size=12,
)


@given(STEPS)
def test_after_any_history_what_is_shown_is_what_is_routed(steps: list[tuple[str, str, str]]) -> None:
    import tempfile  # a fixture would be shared by all examples

    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder) / "models")
        world.repository.mkdir()
        manager = world.started(ControlMode.EXPLICIT)
        for step, name, version in steps:
            world.clock.advance(2)
            if step == "put":
                world.put(name, version, config=ALL)
            elif step == "break":
                (world.put(name, version, config=ALL) / "model.onnx").write_bytes(b"junk")
            elif step == "remove":
                shutil.rmtree(world.repository / name / version, ignore_errors=True)
            elif step == "alias" and name in manager.known():
                manager.set_aliases(name, {"stable": version})
            before = {one.name: one.version for one in manager.placements()}
            try:
                if step == "load":
                    manager.load(name)
                elif step == "unload":
                    manager.unload(name)
                elif step == "reload-fails":
                    world.native.on_session = _no_memory
                    manager.load(name)
            except ServingError:
                assert {one.name: one.version for one in manager.placements()} == before, "a refusal changes nothing"
            world.native.on_session = lambda _tag: None
            world.settle()
            _check(world, manager)
        assert manager.close(PATIENCE_S)
        assert all(one.is_retired for one in world.native.versions)


def _no_memory(_tag: str) -> None:
    raise NativeError("LOAD_FAILED", "no memory")


def _check(world: World, manager: Manager) -> None:
    ready = {(row.name, row.version) for row in manager.index() if row.state == "READY"}
    routed = {
        (name, version)
        for name, versions in world.native.routed().items()
        for version, tag in versions.items()
        if not tag.startswith("(")
    }
    assert ready == routed
    assert {(one.name, one.version) for one in manager.placements()} == ready
    for version in world.native.versions:
        assert version.is_retired is not world.native.is_routed(version), "what is not routed is freed"
    for name, default in world.native.defaults().items():
        assert manager.ready(name) is bool(default)
