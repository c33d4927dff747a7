"""What interleaved rounds say: the median of the ratios within each round, with an interval. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median


def order(names: Sequence[str], round_number: int) -> list[str]:
    """The order of a round: A B C, then C B A, and so on, so that a machine that drifts favours nobody."""
    return list(names) if round_number % 2 == 0 else list(reversed(names))


def ratios(rounds: Sequence[Mapping[str, float]], numerator: str, denominator: str) -> list[float]:
    """numerator / denominator within each round. Raises ZeroDivisionError for a denominator that was 0."""
    return [one[numerator] / one[denominator] for one in rounds]


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, and the interval between the second smallest and the second largest (98 % for ten rounds).

    With fewer than four values the interval is the whole range.
    """
    if not values:
        raise ValueError("no round was measured")
    ordered = sorted(values)
    cut = 1 if len(ordered) >= 4 else 0
    return {
        "median": round(median(ordered), 4),
        "low": round(ordered[cut], 4),
        "high": round(ordered[len(ordered) - 1 - cut], 4),
        "n": len(ordered),
    }


def is_difference(interval: Mapping[str, float], least: float = 0.05) -> bool:
    """Whether a ratio differs from 1: by at least 5 %, and with 1 outside its interval."""
    return abs(interval["median"] - 1.0) >= least and not interval["low"] <= 1.0 <= interval["high"]
