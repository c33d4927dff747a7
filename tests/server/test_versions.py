"""Versions and ranges: every row of the table that the native side is run on too, and what holds for all of them."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.versions import SemVer, order_key, parse_range, parse_version

TABLE: dict[str, Any] = json.loads((Path(__file__).parent.parent / "data" / "versions.json").read_text())

NUMBERS = st.integers(0, 2**64 - 1) | st.integers(0, 3)
IDENTIFIERS = st.sampled_from(["0", "1", "10", "a", "rc", "beta", "A", "-", "0a"])
VERSIONS = st.builds(SemVer, NUMBERS, NUMBERS, NUMBERS, st.lists(IDENTIFIERS, max_size=3).map(".".join))


def version(text: str) -> SemVer:
    parsed = parse_version(text)
    assert parsed is not None, f"{text!r} is no version"
    return parsed


def written(semver: SemVer) -> str:
    core = f"{semver.major}.{semver.minor}.{semver.patch}"
    return f"{core}-{semver.prerelease}" if semver.prerelease else core


@pytest.mark.parametrize(("text", "meaning"), TABLE["versions"])
def test_a_version_is_read(text: str, meaning: str) -> None:
    assert written(version(text)) == meaning


@pytest.mark.parametrize("text", TABLE["not_versions"])
def test_what_is_no_version_is_refused(text: str) -> None:
    assert parse_version(text) is None


@pytest.mark.parametrize(("left", "sign", "right"), TABLE["comparisons"])
def test_versions_compare_as_in_the_table(left: str, sign: str, right: str) -> None:
    a, b = version(left), version(right)
    assert (a == b, a < b, a > b) == (sign == "=", sign == "<", False)
    if a == b:
        assert hash(a) == hash(b)


def test_the_order_of_the_table_is_one_chain() -> None:
    texts = sorted({text for left, _, right in TABLE["comparisons"] for text in (left, right)}, key=order_key)
    versions = [version(text) for text in texts]
    assert versions == sorted(versions)


@pytest.mark.parametrize(("text", "candidate", "is_inside"), TABLE["matches"])
def test_a_range_matches_as_in_the_table(text: str, candidate: str, is_inside: bool) -> None:
    wanted = parse_range(text)
    assert wanted is not None
    assert wanted.matches(version(candidate)) is is_inside


@pytest.mark.parametrize("text", TABLE["not_ranges"])
def test_what_is_no_range_is_refused(text: str) -> None:
    assert parse_range(text) is None


@given(VERSIONS)
def test_a_version_survives_being_written_and_read(semver: SemVer) -> None:
    assert version(written(semver)) == semver


@given(st.lists(VERSIONS, min_size=3, max_size=3))
def test_the_order_is_total_and_transitive(three: list[SemVer]) -> None:
    for a, b in itertools.permutations(three, 2):
        assert (a < b) + (b < a) + (a == b) == 1
    a, b, c = sorted(three)
    assert a <= b <= c
    assert a <= c


@given(VERSIONS)
def test_every_version_is_inside_the_ranges_that_begin_with_it(semver: SemVer) -> None:
    for operator in ("^", "~", ">=", "<=", "="):
        if operator in "^~" and max(semver.core) == 2**64 - 1:
            continue  # The native side would wrap around; no such version exists.
        wanted = parse_range(operator + written(semver))
        assert wanted is not None
        assert wanted.matches(semver), operator


@given(st.text(max_size=20))
def test_no_text_breaks_the_readers(text: str) -> None:
    parse_version(text)
    parse_range(text)
    order_key(text)
