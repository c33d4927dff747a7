"""The verdict of `tidegate demo`: a good story passes, and every single wrong figure is noticed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from server.demo.report import Classified, Loaded, Story, Swapped, as_document, checks, tables

LATENCY = {"count": 10, "p50": 1.0, "p99": 2.0, "max": 3.0}


def classified(version: str, correct: int, **changes: Any) -> Classified:
    good = Classified(
        version=version,
        images=100,
        sent=100,
        answered=100,
        own=100,
        failed=0,
        correct=correct,
        expected_correct=correct,
        served_by=(version,),
    )
    return replace(good, **changes)


def loaded(**changes: Any) -> Loaded:
    good = Loaded(
        clients=8,
        seconds=1.0,
        sent=50,
        answered=50,
        own=50,
        failed=0,
        per_s=50.0,
        latency_ms=LATENCY,
        server_counted=50,
    )
    return replace(good, **changes)


def swapped(**changes: Any) -> Swapped:
    good = Swapped(
        sent=60,
        answered=60,
        own=60,
        failed=0,
        load_s=0.1,
        versions_before={"1": 30},
        versions_during={"1": 5, "2": 5},
        versions_after={"2": 20},
        latency_before_ms=LATENCY,
        latency_during_ms=LATENCY,
        latency_after_ms=LATENCY,
        ready_at_the_end=("2",),
    )
    return replace(good, **changes)


def a_story(**changes: Any) -> Story:
    good = Story(
        server_started_s=0.5,
        classified=(classified("1", 92), classified("2", 97)),
        loaded=loaded(),
        swapped=swapped(),
        server_counted_version_2=125,
        answered_by_version_2=125,
        rows_per_batch=1.5,
        exit_status=0,
        errors=(),
    )
    return replace(good, **changes)


def test_a_good_story_passes() -> None:
    assert as_document(a_story())["ok"] is True


@pytest.mark.parametrize(
    "story",
    [
        a_story(classified=(classified("1", 92, own=99), classified("2", 97))),
        a_story(classified=(classified("1", 92, answered=99), classified("2", 97))),
        a_story(classified=(classified("1", 92, sent=99), classified("2", 97))),
        a_story(classified=(classified("1", 91, expected_correct=92), classified("2", 97))),
        a_story(classified=(classified("1", 92), classified("2", 97, failed=1))),
        a_story(classified=(classified("1", 92), classified("2", 97, served_by=("1", "2")))),
        a_story(classified=(classified("1", 97), classified("2", 97))),
        a_story(loaded=loaded(failed=1)),
        a_story(loaded=loaded(answered=49, own=49)),
        a_story(loaded=loaded(own=49)),
        a_story(loaded=loaded(sent=0, answered=0, own=0, server_counted=0)),
        a_story(loaded=loaded(server_counted=51)),
        a_story(swapped=swapped(failed=1)),
        a_story(swapped=swapped(sent=61)),
        a_story(swapped=swapped(own=59)),
        a_story(swapped=swapped(versions_before={"1": 29, "2": 1})),
        a_story(swapped=swapped(versions_during={"3": 1})),
        a_story(swapped=swapped(versions_after={"1": 1, "2": 19})),
        a_story(swapped=swapped(versions_after={})),
        a_story(swapped=swapped(ready_at_the_end=("1", "2"))),
        a_story(swapped=swapped(ready_at_the_end=())),
        a_story(answered_by_version_2=124),
        a_story(exit_status=-9),
        a_story(exit_status=None),
    ],
)
def test_every_wrong_figure_is_noticed(story: Story) -> None:
    document = as_document(story)
    assert document["ok"] is False
    assert [check for check in document["checks"] if not check["ok"]]


def test_the_tables_show_every_check_and_both_accuracies() -> None:
    console = Console(width=200)
    story = a_story(swapped=swapped(failed=3))
    with console.capture() as captured:
        for table in tables(story):
            console.print(table)
    text = captured.get()
    assert "92.00 %" in text
    assert "97.00 %" in text
    assert text.count("NOT OK") == 1
    for check in checks(story):
        assert check.name in text
