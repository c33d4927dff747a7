"""Reasons and their statuses."""

from __future__ import annotations

import pytest

from server.errors import Reason, ServingError
from server.grpc_status import GRPC_STATUS, status_of


def test_every_reason_has_a_status() -> None:
    assert GRPC_STATUS.keys() == set(Reason)
    assert all(0 <= status <= 16 for status in GRPC_STATUS.values())
    assert [reason for reason in Reason if status_of(reason) == 0] == [Reason.OK]


@pytest.mark.parametrize(
    ("reason", "status"),
    [
        (Reason.INVALID_TENSOR, 3),
        (Reason.MODEL_NOT_FOUND, 5),
        (Reason.QUEUE_FULL, 8),
        (Reason.CONTROL_MODE, 9),
        (Reason.NOT_SUPPORTED, 12),
        (Reason.LOAD_FAILED, 13),
        (Reason.VERSION_NOT_READY, 14),
    ],
)
def test_statuses_are_those_of_the_error_map(reason: Reason, status: int) -> None:
    assert status_of(reason) == status


def test_an_error_says_its_reason_and_message() -> None:
    error = ServingError(Reason.QUEUE_FULL, "too many wait")
    assert str(error) == "QUEUE_FULL: too many wait"
    assert (error.reason, error.message) == (Reason.QUEUE_FULL, "too many wait")


def test_a_message_can_always_travel() -> None:
    error = ServingError(Reason.INVALID_TENSOR, "half a pair: \ud800")
    assert error.message.encode() == b"half a pair: ?"
