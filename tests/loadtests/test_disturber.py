"""The disturber keeps its rate and tells what it has done."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from loadtests import disturber


def counting(most: int, stop: threading.Event) -> tuple[list[int], Callable[[], None]]:
    done: list[int] = []

    def step() -> None:
        done.append(len(done))
        if len(done) == most:
            stop.set()

    return done, step


def test_steps_follow_each_other_until_they_are_stopped() -> None:
    stop = threading.Event()
    done, step = counting(50, stop)
    report = disturber.repeat(step, None, stop)
    assert report["done"] == len(done) == 50


def test_a_rate_is_not_exceeded() -> None:
    stop = threading.Event()
    _, step = counting(5, stop)
    report = disturber.repeat(step, 100.0, stop)
    assert report["done"] == 5
    # Four waits of 10 ms between five steps.
    assert report["seconds"] >= 0.04


@pytest.mark.parametrize(
    ("arguments", "lacks"), [(["look"], "--metrics-port"), (["load"], "--model")], ids=["look", "load"]
)
def test_what_it_needs_is_asked_for(arguments: list[str], lacks: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        disturber.main([*arguments, "--grpc-port", "1"])
    assert lacks in capsys.readouterr().err
