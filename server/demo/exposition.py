"""Reads Prometheus's text format, as far as /metrics uses it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

_LINE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)(?: \d+)?$")
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"')
_ESCAPES = {r"\\": "\\", r"\"": '"', r"\n": "\n"}


@dataclass(frozen=True, slots=True)
class Series:
    """One line of the exposition."""

    name: str
    labels: Mapping[str, str]
    value: float


class Scrape:
    """One reading of /metrics."""

    def __init__(self, series: list[Series]) -> None:
        self.series = series

    def total(self, name: str, **labels: str) -> float:
        """The sum over the series of that name that carry these labels; 0 where there is none."""
        return sum(one.value for one in self.matching(name, **labels))

    def matching(self, name: str, **labels: str) -> list[Series]:
        """The series of that name that carry these labels."""
        return [one for one in self.series if one.name == name and labels.items() <= one.labels.items()]

    def names(self) -> set[str]:
        """Every series name."""
        return {one.name for one in self.series}


def samples_of(text: str) -> Scrape:
    """Parses an exposition. Raises ValueError with the line that is neither a comment nor a sample."""
    found = []
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            raise ValueError(f"not a line of the exposition format: {line!r}")
        name, labels, value = match.groups()
        pairs = {
            key: re.sub(r"\\.", lambda escape: _ESCAPES.get(escape[0], escape[0]), raw)
            for key, raw in _LABEL.findall(labels or "")
        }
        found.append(Series(name, pairs, float(value)))
    return Scrape(found)
