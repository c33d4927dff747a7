"""Logs: one JSON object per line, and switches that work at once."""

from __future__ import annotations

import io
import json
import logging
import re
from typing import Any

import pytest

from server.logs import SILENT, Logs, LogSettings, TimeFormat


class World:
    def __init__(self, settings: LogSettings = LogSettings()) -> None:  # noqa: B008 - frozen
        self.stream = io.StringIO()
        self.native: list[int] = []
        self.root = logging.Logger("apart")
        self.logs = Logs(settings, self.native.append, self.stream, self.root)
        self.logs.install()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.stream.getvalue().splitlines()]

    def levels(self) -> list[str]:
        for level in (logging.DEBUG, logging.INFO, logging.WARNING, logging.ERROR):
            self.root.log(level, "x")
        return [line["level"] for line in self.lines()]


def test_a_line_has_what_is_always_there_and_what_the_caller_adds() -> None:
    world = World()
    world.root.info("loaded %s", "a", extra={"model": "a", "version": "1", "request_id": "r-7"})
    (line,) = world.lines()
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", line.pop("ts"))
    assert line == {
        "level": "info",
        "logger": "apart",
        "message": "loaded a",
        "model": "a",
        "version": "1",
        "request_id": "r-7",
    }


def test_a_line_stays_a_line_whatever_is_in_it() -> None:
    world = World()
    world.root.info("first\nsecond \x00 \u2028 ü", extra={"path": object(), "nested": {"a": [1]}})
    assert world.stream.getvalue().count("\n") == 1
    (line,) = world.lines()
    assert line["message"] == "first\nsecond \x00 \u2028 ü"
    assert line["nested"] == {"a": [1]}
    assert line["path"].startswith("<object")


def test_what_a_caller_adds_cannot_replace_what_is_always_there() -> None:
    world = World()
    world.root.info("x", extra={"level": "none", "logger": "other", "ts": 0, "trace": "none"})
    (line,) = world.lines()
    assert (line["level"], line["logger"]) == ("info", "apart")
    assert "trace" not in line


def test_a_trace_goes_into_the_line() -> None:
    world = World()
    try:
        raise KeyError("gone")
    except KeyError:
        world.root.exception("failed")
    (line,) = world.lines()
    assert "KeyError: 'gone'" in line["trace"]
    assert "test_logs.py" in line["trace"]


@pytest.mark.parametrize(
    ("level", "written", "native"),
    [
        ("debug", ["debug", "info", "warning", "error"], 10),
        ("info", ["info", "warning", "error"], 20),
        ("warning", ["warning", "error"], 30),
        ("error", ["error"], 40),
    ],
)
def test_a_level_lets_everything_above_it_through(level: str, written: list[str], native: int) -> None:
    world = World(LogSettings.from_level(level))
    assert world.levels() == written
    assert world.native == [native]


def test_each_level_has_its_own_switch() -> None:
    world = World(LogSettings(info=True, warning=False, error=True))
    assert world.levels() == ["info", "error"]
    assert world.native == [20], "the native core knows a threshold only"
    silent = World(LogSettings(info=False, warning=False, error=False))
    assert silent.levels() == []
    assert silent.native == [SILENT]


def test_settings_change_while_it_runs() -> None:
    world = World()
    world.logs.apply(LogSettings(info=False, verbose=1, time_format=TimeFormat.ISO8601))
    assert world.logs.settings.verbose == 1
    assert world.levels() == ["debug", "warning", "error"]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", line["ts"]) for line in world.lines())
    assert world.native == [20, 10]


def test_python_warnings_are_lines_too(recwarn: pytest.WarningsRecorder) -> None:
    import warnings

    stream = io.StringIO()
    Logs(LogSettings(), lambda _level: None, stream).install()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        logging.captureWarnings(True)
        warnings.warn("old", stacklevel=1)
    (line,) = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert line["logger"] == "py.warnings"
    assert "old" in line["message"]
