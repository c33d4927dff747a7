"""Which versions are loaded, and which one answers when none is named."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from server.policy.versions import (
    All,
    Choice,
    Latest,
    Specific,
    VersionPolicy,
    admitted,
    default_version,
    highest_first,
)

TEXTS = st.lists(
    st.sampled_from(["1", "2", "10", "1.0.0", "1.2.3", "1.2.3-rc.1", "0.9", "3.0.0+b"]), unique=True, max_size=8
)
POLICIES: st.SearchStrategy[VersionPolicy] = st.one_of(
    st.builds(Latest, st.integers(0, 5)),
    st.just(All()),
    st.builds(
        Specific,
        st.lists(st.integers(-1, 10), max_size=3).map(tuple),
        st.lists(st.sampled_from(["1", "1.2.3", "9.9.9"]), max_size=2).map(tuple),
    ),
)


@pytest.mark.parametrize(
    ("policy", "texts", "chosen"),
    [
        (Latest(), ["1", "10", "9"], ("10",)),
        (Latest(2), ["1", "10", "9"], ("10", "9")),
        (Latest(5), ["1", "2"], ("2", "1")),
        (Latest(0), ["1", "2"], ("2",)),
        (Latest(), [], ()),
        (Latest(), ["1.0.0-rc.1", "1.0.0", "0.9"], ("1.0.0",)),
        (All(), ["1", "2.0.0", "1.5"], ("2.0.0", "1.5", "1")),
        (Specific((1, 3)), ["1", "2", "3"], ("3", "1")),
        (Specific((1,)), ["1.0.0", "2"], ("1.0.0",)),
        (Specific((1,)), ["1", "1.0.0"], ("1",)),
        (Specific((), ("1.2.3",)), ["1.2.3", "1"], ("1.2.3",)),
        (Specific((2,), ("2.0.0",)), ["2", "2.0.0"], ("2.0.0", "2")),
    ],
)
def test_a_policy_admits(policy: VersionPolicy, texts: list[str], chosen: tuple[str, ...]) -> None:
    assert admitted(policy, texts) == Choice(chosen)


def test_what_a_policy_names_and_nobody_has_is_told() -> None:
    assert admitted(Specific((7, 1), ("1.5.0",)), ["1", "2"]) == Choice(("1",), ("1.5.0", "7"))
    assert admitted(Specific((-1,)), ["1"]) == Choice((), ("-1",))


@pytest.mark.parametrize(
    ("ready", "default"),
    [
        ([], ""),
        (["1"], "1"),
        (["2", "10", "1"], "10"),
        (["1.0.0", "1.0.0-rc.1"], "1.0.0"),
        (["1.0.0", "2.0.0-rc.1"], "2.0.0-rc.1"),
        (["1", "1.0.0"], "1.0.0"),
    ],
)
def test_the_highest_ready_version_is_the_default(ready: list[str], default: str) -> None:
    assert default_version(ready) == default


@given(POLICIES, TEXTS)
def test_a_policy_admits_only_what_is_there_and_says_so_twice(policy: VersionPolicy, texts: list[str]) -> None:
    choice = admitted(policy, texts)
    assert set(choice.texts) <= set(texts)
    assert list(choice.texts) == highest_first(choice.texts)
    assert not set(choice.missing) & set(texts)
    assert admitted(policy, list(reversed(texts))) == choice


@given(TEXTS)
def test_the_default_is_admitted_by_the_default_policy(texts: list[str]) -> None:
    assert admitted(Latest(), texts).texts == ((default_version(texts),) if texts else ())
