"""The one table from a reason to the gRPC status number that it travels as (`GrpcStatus` of `ext/util/reason.h`)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from server.errors import Reason

GRPC_STATUS: Mapping[Reason, int] = MappingProxyType(
    {
        Reason.OK: 0,
        Reason.CANCELLED: 1,
        Reason.INVALID_TENSOR: 3,
        Reason.DEADLINE_PASSED: 4,
        Reason.MODEL_NOT_FOUND: 5,
        Reason.VERSION_NOT_FOUND: 5,
        Reason.ALREADY_EXISTS: 6,
        Reason.NOT_ALLOWED: 7,
        Reason.MESSAGE_TOO_LARGE: 8,
        Reason.QUEUE_FULL: 8,
        Reason.TOO_LATE: 8,
        Reason.CONTROL_MODE: 9,
        Reason.NOT_SUPPORTED: 12,
        Reason.MALFORMED_MESSAGE: 13,
        Reason.MODEL_RAISED: 13,
        Reason.MODEL_OUTPUT_INVALID: 13,
        Reason.LOAD_FAILED: 13,
        Reason.INTERNAL: 13,
        Reason.VERSION_NOT_READY: 14,
        Reason.BREAKER_OPEN: 14,
        Reason.NODE_DRAINING: 14,
        Reason.UNAUTHENTICATED: 16,
    }
)
assert GRPC_STATUS.keys() == set(Reason), "every reason needs a row"


def status_of(reason: Reason) -> int:
    """The gRPC status number of a reason."""
    return GRPC_STATUS[reason]
