"""Why something was refused or failed: the names of `ext/util/reason.h`, and the one exception that carries them."""

from __future__ import annotations

from enum import Enum


class Reason(Enum):
    """Stable names: they appear in metrics, logs and docs. Numbers are those of the native enumeration."""

    OK = 0
    INVALID_TENSOR = 1
    MALFORMED_MESSAGE = 2
    MESSAGE_TOO_LARGE = 3
    MODEL_NOT_FOUND = 4
    VERSION_NOT_FOUND = 5
    VERSION_NOT_READY = 6
    QUEUE_FULL = 7
    TOO_LATE = 8
    BREAKER_OPEN = 9
    NODE_DRAINING = 10
    DEADLINE_PASSED = 11
    CANCELLED = 12
    MODEL_RAISED = 13
    MODEL_OUTPUT_INVALID = 14
    LOAD_FAILED = 15
    CONTROL_MODE = 16
    ALREADY_EXISTS = 17
    NOT_SUPPORTED = 18
    UNAUTHENTICATED = 19
    NOT_ALLOWED = 20
    INTERNAL = 21


class ServingError(Exception):
    """A refusal or failure for the person who asked.

    `message` says what, which and what to do; never a path, a stack or another caller's data.
    """

    def __init__(self, reason: Reason, message: str) -> None:
        # Messages quote what clients sent, and not every str of Python can travel: half a surrogate pair cannot.
        self.message = message.encode("utf-8", "replace").decode()
        super().__init__(f"{reason.name}: {self.message}")
        self.reason = reason
