"""Scenarios from end to end against a real server, short: what they find is right, and a planted leak is found."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import rig
from loadtests.report import Result
from loadtests.rig import Bench
from loadtests.scenarios import identity_ids, reload

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """These are about counts, so they need no cores of their own."""
    monkeypatch.setattr(rig, "pinned", lambda *_: [])


def missed(result: Result) -> list[str]:
    return [goal.name for goal in result.goals if not goal.ok]


def test_ten_hot_swaps_lose_double_and_mix_up_nothing(tmp_path: Path) -> None:
    result = identity_ids.run(Bench(tmp_path, options={"count": 3000}))
    assert missed(result) == []
    assert sum(result.figures["answers_by_version"].values()) == 3000


def test_reloads_leave_no_native_object_and_a_planted_leak_fails_the_check(tmp_path: Path) -> None:
    clean, leaky = tmp_path / "clean", tmp_path / "leaky"
    for folder in (clean, leaky):
        folder.mkdir()
    # Memory of so few reloads says nothing; the objects do.
    assert [name for name in missed(reload.run(Bench(clean, options={"count": 6}))) if "left over" in name] == []
    leaks = missed(reload.run(Bench(leaky, options={"count": 6, "plant_leak": True})))
    assert {f"live native objects left over: {kind}" for kind in ("session", "version", "instance")} <= set(leaks)
