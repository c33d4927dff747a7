"""The shared-memory RPCs: not offered, and said so.

A client that maps memory into the server can make it read where it should not, so this stays off until regions are
checked at each use. All six answer UNIMPLEMENTED. perf_analyzer unregisters only with --shared-memory and goes on
whatever the answer is, so nothing depends on a polite OK here.
"""

from __future__ import annotations

from typing import NoReturn

from google.protobuf.message import Message

from server.errors import Reason, ServingError


def refuse(_request: Message) -> NoReturn:
    """Raises ServingError(NOT_SUPPORTED)."""
    raise ServingError(
        Reason.NOT_SUPPORTED, "shared memory is not offered by this server: send tensors in raw_input_contents"
    )
