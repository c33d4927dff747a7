"""`make bench` itself: one scenario's failure is a result, and the exit code says whether all was well."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from loadtests import bench, machine
from loadtests.report import Goal, Result
from loadtests.rig import Bench, BenchError
from server.demo.process import ServeFailed

Run = Callable[[Bench], Result]


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch) -> dict[str, Run]:
    """Scenarios by name; bench knows these only, and does not move this process to one core."""
    runs: dict[str, Run] = {}

    def find(name: str) -> SimpleNamespace:
        return SimpleNamespace(QUESTION="How fast?", run=runs[name])

    monkeypatch.setattr(bench, "SCENARIOS", ("first", "second"))
    monkeypatch.setattr(bench, "scenario", find)
    monkeypatch.setattr(machine, "CORES", frozenset({0, 1}))
    monkeypatch.setattr(os, "sched_setaffinity", lambda *_: None)
    return runs


def met(_: Bench) -> Result:
    return Result([Goal("rate", 2, ">=", 1)], {"rate": 2}, [1, 2])


def missed(_: Bench) -> Result:
    return Result([Goal("rate", 0, ">=", 1)], {})


def refused(_: Bench) -> Result:
    raise BenchError("h2load is missing")


def died(_: Bench) -> Result:
    raise ServeFailed("the server ended with status 1", "its last words")


def mistaken(_: Bench) -> Result:
    raise KeyError("typo")


def results(folder: Path) -> dict[str, dict[str, object]]:
    return {path.stem.split("-", 3)[3]: json.loads(path.read_text()) for path in folder.glob("*.json")}


def test_all_goals_met_is_exit_0_with_a_json_each_and_a_summary(
    scenarios: dict[str, Run], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scenarios.update(first=met, second=met)
    assert bench.main(["--results", str(tmp_path)]) == 0
    found = results(tmp_path)
    assert set(found) == {"first", "second"}
    assert found["first"]["figures"] == {"rate": 2}
    assert found["first"]["machine"]["commit"]  # type: ignore[index]
    (summary,) = tmp_path.glob("*-summary.md")
    assert "| second | rate | 2 | >= 1 | yes |" in summary.read_text()
    assert "| first | rate | 2 | >= 1 | yes |" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("run", "told"),
    [
        (missed, None),
        (refused, "h2load is missing"),
        (died, "the server ended with status 1"),
        (mistaken, "KeyError: 'typo'"),
    ],
)
def test_a_scenario_that_fails_is_exit_1_and_costs_the_other_nothing(
    scenarios: dict[str, Run], tmp_path: Path, run: Run, told: str | None
) -> None:
    scenarios.update(first=run, second=met)
    assert bench.main(["--results", str(tmp_path)]) == 1
    found = results(tmp_path)
    assert found["first"]["ok"] is False
    assert found["second"]["ok"] is True
    if told is not None:
        assert str(found["first"]["error"]).startswith(told)


def test_options_reach_the_scenario_and_its_result(scenarios: dict[str, Run], tmp_path: Path) -> None:
    seen: list[Bench] = []

    def look(given: Bench) -> Result:
        seen.append(given)
        assert given.folder.is_dir()
        return met(given)

    scenarios.update(first=look)
    arguments = ["--quick", "--scenario", "first", "--count", "7", "--plant-leak", "--results", str(tmp_path)]
    assert bench.main(arguments) == 0
    assert seen[0].options == {"count": 7, "plant_leak": True}
    assert (seen[0].seconds(10, 1), seen[0].count(100, 5)) == (1, 5)
    assert not seen[0].folder.exists()
    found = results(tmp_path)
    assert found["first-quick"]["options"] == {"quick": True, "count": 7, "plant_leak": True}
    assert len(list(tmp_path.glob("*-summary-quick.md"))) == 1


@pytest.mark.parametrize("arguments", [["--scenario", "unknown"], ["--count", "0"]])
def test_bad_usage_is_exit_2(scenarios: dict[str, Run], arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(arguments)
    assert ended.value.code == 2


def test_one_core_is_not_enough(scenarios: dict[str, Run], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "CORES", frozenset({0}))
    with pytest.raises(SystemExit):
        bench.main([])


@pytest.mark.parametrize("name", bench.SCENARIOS)
def test_every_scenario_has_a_question_and_a_run(name: str) -> None:
    module = bench.scenario(name)
    assert module.QUESTION.endswith("?")
    assert callable(module.run)


def test_what_others_use_of_the_cores_leaves_out_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    # (time, CPU seconds of the cores, CPU seconds of ours): 4 s on two cores, of which others took 2 s and we 1 s.
    readings = [(100.0, 50.0, 7.0), (104.0, 53.0, 8.0)]
    monkeypatch.setattr(machine, "CORES", frozenset({0, 1}))
    monkeypatch.setattr(machine.Others, "_now", lambda _: readings.pop(0))
    assert machine.Others().share() == 0.25


def test_what_others_use_is_a_share() -> None:
    assert 0.0 <= machine.Others().share() <= 1.0


def test_the_machine_is_described() -> None:
    found = machine.describe()
    assert found["cores"] >= 1
    assert found["python"] == sys.version.split()[0]
    assert found["packages"]["grpcio"]
