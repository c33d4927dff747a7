"""Servers for the tests of this folder: each is looked at once more when the module, or the test, is over."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from tests.conformance.harness import Served

Serve = Callable[..., Served]


def _serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts servers of a repository; at the end each must stop as it should and have logged nothing but JSON."""
    with ExitStack() as stack:

        def start(repository: Path, *flags: str, **options: Any) -> Served:
            log = tmp_path_factory.mktemp("log") / "stderr"
            served = Served(repository, log, *flags, **options)
            stack.callback(check_log, served)
            return stack.enter_context(served)

        yield start


def check_log(served: Served) -> None:
    """Every line of the log is a JSON object, and none tells of something that nobody expected."""
    for line in served.log_lines():
        assert {"ts", "level", "logger", "message"} <= line.keys(), line
        assert "trace" not in line, line


@pytest.fixture(scope="module")
def serve_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts servers that live as long as the module's tests."""
    yield from _serving(tmp_path_factory)


@pytest.fixture
def serve(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serve]:
    """Starts servers that live as long as the test."""
    yield from _serving(tmp_path_factory)


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """An empty model repository."""
    path = tmp_path / "models"
    path.mkdir()
    return path
