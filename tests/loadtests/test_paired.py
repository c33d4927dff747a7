"""Interleaved rounds and what they say."""

from __future__ import annotations

import pytest

from loadtests import paired


def test_rounds_alternate_their_order() -> None:
    assert [paired.order("ABC", number) for number in range(3)] == [["A", "B", "C"], ["C", "B", "A"], ["A", "B", "C"]]


def test_ratios_are_taken_within_each_round() -> None:
    rounds = [{"a": 10.0, "b": 20.0}, {"a": 30.0, "b": 40.0}]
    assert paired.ratios(rounds, "a", "b") == [0.5, 0.75]


def test_the_interval_of_ten_rounds_leaves_out_one_value_at_each_end() -> None:
    found = paired.summary([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 100.0])
    assert found == {"median": 5.5, "low": 2.0, "high": 9.0, "n": 10}


def test_the_interval_of_three_rounds_is_their_range() -> None:
    assert paired.summary([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}


def test_no_round_is_no_figure() -> None:
    with pytest.raises(ValueError, match="no round"):
        paired.summary([])


@pytest.mark.parametrize(
    ("median", "low", "high", "expected"),
    [(1.2, 1.1, 1.3, True), (1.04, 1.01, 1.06, False), (1.2, 0.99, 1.3, False), (0.9, 0.85, 0.95, True)],
)
def test_a_difference_is_five_percent_and_has_one_outside_its_interval(
    median: float, low: float, high: float, expected: bool
) -> None:
    assert paired.is_difference({"median": median, "low": low, "high": high}) is expected
