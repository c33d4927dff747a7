"""Semantic versions and ranges, pure: the Python side of `ext/route/semver.h`, run on the same table of comparisons.

A version is MAJOR[.MINOR[.PATCH]][-PRERELEASE][+BUILD]. Missing numbers are 0, so that a folder `3` counts as 3.0.0;
its text stays `3`. Order is that of semver.org 2.0.0 section 11; build metadata does not count.
Ranges: ^1.4  ~1.4  >=1.2  >1.2  <=1.2  <2  =1.2.3, several joined by blanks or commas; 1.x, 1.4.x, *.
A pre-release satisfies a range only when some bound of the range names a pre-release of the same MAJOR.MINOR.PATCH.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import total_ordering

# The native side keeps the numbers in 64 bits.
_MOST_NUMBER = 2**64 - 1

_NUMBER = r"(0|[1-9][0-9]*)"
_VERSION = re.compile(
    rf"{_NUMBER}(?:\.{_NUMBER}(?:\.{_NUMBER})?)?(?:-([0-9A-Za-z.-]+))?(?:\+([0-9A-Za-z.-]+))?", re.ASCII
)
_TERM = re.compile(r"([\^~<>=]*) *([^ ,]*)")
_OPERATORS = frozenset(("^", "~", ">=", ">", "<=", "<", "=", "=="))


@total_ordering
@dataclass(frozen=True, slots=True, eq=False)
class SemVer:
    """A semantic version. Two that differ only in build metadata are equal."""

    major: int = 0
    minor: int = 0
    patch: int = 0
    prerelease: str = ""

    @property
    def core(self) -> tuple[int, int, int]:
        """(major, minor, patch)."""
        return self.major, self.minor, self.patch

    def __eq__(self, other: object) -> bool:
        return isinstance(other, SemVer) and _key(self) == _key(other)

    def __lt__(self, other: SemVer) -> bool:
        return _key(self) < _key(other)

    def __hash__(self) -> int:
        return hash(_key(self))


_Key = tuple[int, int, int, bool, tuple[tuple[int, int, str], ...]]


def _key(version: SemVer) -> _Key:
    identifiers = tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in (version.prerelease.split(".") if version.prerelease else ())
    )
    return version.major, version.minor, version.patch, not version.prerelease, identifiers


def _parse(text: str) -> tuple[SemVer, int] | None:
    """The version and how many of its three numbers were written."""
    match = _VERSION.fullmatch(text)
    if match is None:
        return None
    numbers = [int(number) for number in match.group(1, 2, 3) if number is not None]
    if any(number > _MOST_NUMBER for number in numbers):
        return None
    prerelease, build = match.group(4), match.group(5)
    for identifiers, are_numbers_checked in ((prerelease, True), (build, False)):
        if identifiers is None:
            continue
        for part in identifiers.split("."):
            if not part or (are_numbers_checked and part.isdecimal() and part[0] == "0" and part != "0"):
                return None
    major, minor, patch = (*numbers, 0, 0)[:3]
    return SemVer(major, minor, patch, prerelease or ""), len(numbers)


def parse_version(text: str) -> SemVer | None:
    """Reads a version; None when the text is not one (leading zeros, trailing text, signs)."""
    parsed = _parse(text)
    return None if parsed is None else parsed[0]


@dataclass(frozen=True, slots=True)
class SemVerRange:
    """A conjunction of bounds."""

    bounds: tuple[tuple[str, SemVer], ...]  # (operator of >= > <= < =, version)

    def matches(self, version: SemVer) -> bool:
        """Whether the version satisfies every bound, and is no pre-release that nobody named."""
        is_named = not version.prerelease
        for operator, bound in self.bounds:
            if operator == ">=":
                is_inside = version >= bound
            elif operator == ">":
                is_inside = version > bound
            elif operator == "<=":
                is_inside = version <= bound
            elif operator == "<":
                is_inside = version < bound
            else:
                is_inside = version == bound
            if not is_inside:
                return False
            is_named = is_named or (bool(bound.prerelease) and bound.core == version.core)
        return is_named


def parse_range(text: str) -> SemVerRange | None:
    """Reads a range; None when the text is not one. A bare version is not: it is looked up as written."""
    bounds: list[tuple[str, SemVer]] = []
    at = 0
    while True:
        while at < len(text) and text[at] in " ,":
            at += 1
        if at == len(text):
            return SemVerRange(tuple(bounds)) if bounds else None
        match = _TERM.match(text, at)
        assert match is not None, "every part of the term may be empty"
        term = _term(match[1], match[2])
        if term is None:
            return None
        bounds += term
        at = match.end()


def _term(operator: str, text: str) -> list[tuple[str, SemVer]] | None:
    if text in ("*", "x"):
        return None if operator else [(">=", SemVer())]
    if not operator:
        if not text.endswith((".x", ".*")):
            return None
        parsed = _parse(text[:-2])
        if parsed is None or parsed[1] > 2 or parsed[0].prerelease:
            return None
        low, n_numbers = parsed
        return _between(low, SemVer(low.major + 1) if n_numbers == 1 else SemVer(low.major, low.minor + 1))
    parsed = _parse(text)
    if parsed is None or operator not in _OPERATORS:
        return None
    low, n_numbers = parsed
    if operator == "^":
        if low.major > 0 or n_numbers == 1:
            return _between(low, SemVer(low.major + 1))
        if low.minor > 0 or n_numbers == 2:
            return _between(low, SemVer(0, low.minor + 1))
        return _between(low, SemVer(0, 0, low.patch + 1))
    if operator == "~":
        return _between(low, SemVer(low.major + 1) if n_numbers == 1 else SemVer(low.major, low.minor + 1))
    return [("=" if operator == "==" else operator, low)]


def _between(low: SemVer, high: SemVer) -> list[tuple[str, SemVer]]:
    return [(">=", low), ("<", high)]


def order_key(text: str) -> tuple[bool, SemVer, str]:
    """Sorts version texts: semantic versions by their order, equal ones by text, and whatever is none of them first."""
    version = parse_version(text)
    return version is not None, version or SemVer(), text
