"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from tests.wire.harness import Http2, Server


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Starts servers; each is ended, and searched for leaks, when the test is over."""
    with ExitStack() as stack:
        yield lambda **settings: stack.enter_context(Server(**settings))


@pytest.fixture
def server(serve: Callable[..., Server]) -> Server:
    """A server with the model "echo": X and Y of rows of four FP32, at most eight rows."""
    server = serve()
    server.add()
    return server


@pytest.fixture
def client(server: Server) -> Iterator[Http2]:
    """A connection to `server`."""
    with Http2(server.port) as client:
        yield client


@pytest.fixture
def connect() -> Iterator[Callable[..., Http2]]:
    """Makes connections that are closed when the test is over."""
    with ExitStack() as stack:

        def make(server: Server, **options: Any) -> Http2:
            return stack.enter_context(Http2(server.port, **options))

        yield make
