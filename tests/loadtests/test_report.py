"""Goals are judged, and the table says so."""

from __future__ import annotations

from pathlib import Path

import pytest

from loadtests import report
from loadtests.report import Goal, Origin, Result

MACHINE = {
    "commit": "abc123",
    "uncommitted_changes": False,
    "cpu": "A CPU",
    "cores": 2,
    "kernel": "6.1",
    "python": "3.11.9",
    "packages": {"grpcio": "1.0"},
}


def origin(scenario: str, when: str = "2030-01-02 03:04 UTC", **options: object) -> Origin:
    return Origin(scenario, "How fast?", when, MACHINE, options)


@pytest.mark.parametrize(
    ("value", "relation", "target", "ok"),
    [
        (0.6, ">=", 0.6, True),
        (0.59, ">=", 0.6, False),
        (1.4, "<=", 1.4, True),
        (1.41, "<=", 1.4, False),
        (0, "==", 0, True),
        (1, "==", 0, False),
        (float("nan"), ">=", 0, False),
        (float("nan"), "<=", 0, False),
    ],
)
def test_a_goal_is_met_by_its_relation(value: float, relation: str, target: float, ok: bool) -> None:
    assert Goal("g", value, relation, target).ok is ok


def test_an_unknown_relation_is_a_mistake() -> None:
    with pytest.raises(ValueError, match="unknown relation"):
        _ = Goal("g", 1, ">", 0).ok


def test_a_stretch_target_decides_nothing() -> None:
    goal = Goal("g", 0.7, ">=", 0.6, stretch=0.85)
    assert goal.ok
    assert not goal.is_stretch_met
    assert Goal("g", 0.9, ">=", 0.6, stretch=0.85).is_stretch_met
    assert not Goal("g", 0.9, ">=", 0.6).is_stretch_met


def test_a_result_without_goals_is_not_ok() -> None:
    assert not Result([], {}).ok
    assert not Result([Goal("a", 1, ">=", 1), Goal("b", 0, ">=", 1)], {}).ok
    assert Result([Goal("a", 1, ">=", 1)], {}).ok


def test_the_table_has_a_line_per_goal_and_where_it_was_measured() -> None:
    goals = [Goal("rate", 0.7, ">=", 0.6, "a note", 0.85), Goal("lost", 3, "==", 0)]
    table = report.markdown([report.document(origin("wire"), Result(goals, {}))])
    assert "| wire | rate (a note) | 0.7 | >= 0.6, stretch 0.85 | yes |" in table
    assert "| wire | lost | 3 | == 0 | **no** |" in table
    assert "2030-01-02 03:04 UTC, commit abc123; A CPU, 2 cores, Linux 6.1; Python 3.11.9, grpcio 1.0." in table


def test_the_table_says_what_did_not_finish_and_why() -> None:
    failed = report.failure(origin("reload"), "no | answer\nTraceback ...")
    assert failed["ok"] is False
    assert "| reload | did not finish: no / answer | - | - | **no** |" in report.markdown([failed])


def test_the_table_tells_results_of_different_times_apart_and_marks_quick_ones() -> None:
    good = Result([Goal("g", 1, ">=", 1)], {})
    documents = [
        report.document(origin("wire"), good),
        report.document(origin("payload"), good),
        report.document(origin("reload", "2030-01-02 09:00 UTC", quick=True), good),
    ]
    table = report.markdown(documents)
    assert "\nwire, payload: 2030-01-02 03:04 UTC" in table
    assert "\nreload: 2030-01-02 09:00 UTC" in table
    assert table.count("a quick run") == 1


def test_the_table_warns_of_figures_that_were_taken_on_a_busy_machine() -> None:
    document = report.document(origin("wire"), Result([Goal("g", 1, ">=", 1)], {}))
    assert "other processes" not in report.markdown([{**document, "others_cpu_share": 0.02}])
    assert "wire: other processes used 40 % of the cores" in report.markdown([{**document, "others_cpu_share": 0.4}])


def test_the_summary_takes_the_latest_of_each_scenario_of_the_day(tmp_path: Path) -> None:
    def save(name: str, value: float) -> None:
        content = report.document(origin(name), Result([Goal(f"goal of {name}", value, ">=", 1)], {}))
        report.write(tmp_path / "results", f"2030-01-02-{name}", content)

    save("wire", 1)
    save("reload", 2)
    save("wire", 3)
    path = report.write_summary(tmp_path / "results", "2030-01-02", "", ["wire", "payload", "reload"])
    lines = [line for line in path.read_text().splitlines() if "goal of" in line]
    assert lines == ["| wire | goal of wire | 3 | >= 1 | yes |", "| reload | goal of reload | 2 | >= 1 | yes |"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.61234, "0.612"), (12.0, "12"), (275123.4, "275,123"), (1000000, "1,000,000"), (float("inf"), "inf")],
)
def test_numbers_read_well(value: float, text: str) -> None:
    assert report.number(value) == text
