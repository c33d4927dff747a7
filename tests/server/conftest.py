"""Fixtures of the data plane's Python side."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.server.world import World


@pytest.fixture(autouse=True)
def root_logger_as_it_was() -> Iterator[None]:
    """A test that installs the server's logs must not take pytest's away from the next one."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(False)


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    repository = tmp_path / "models"
    repository.mkdir()
    world = World(repository)
    yield world
    for version in world.native.versions:
        version.idle.set()
    for manager in world.managers:
        manager.close(0.0)
