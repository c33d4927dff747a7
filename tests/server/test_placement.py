"""The life of a placement: the table of moves, and nothing beside it."""

from __future__ import annotations

import itertools

import pytest

from server.loader import LoadedVersion
from server.placement import INDEX_STATES, TRANSITIONS, Event, IllegalTransition, Placement, State

LIFE = [Event.STARTED, Event.OPENED, Event.PUBLISHED, Event.DISMISSED, Event.DRAINED, Event.FREED]


def a_placement(state: State) -> Placement:
    placement = Placement("a", "1")
    placement.state = state
    return placement


class Native:
    memory_bytes = 100


def loaded() -> LoadedVersion:
    return LoadedVersion(Native(), "config", "settings", weights_bytes=1000, load_seconds=0.5)  # type: ignore[arg-type]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_a_move_is_in_the_table_or_refused(state: State, event: Event) -> None:
    placement = a_placement(state)
    if (state, event) in TRANSITIONS:
        placement.move(event, "because")
        assert (placement.state, placement.reason) == (TRANSITIONS[state, event], "because")
    else:
        with pytest.raises(IllegalTransition, match=f"no move {event.name} from {state.name}"):
            placement.move(event, "because")
        assert (placement.state, placement.reason) == (state, "")


def test_a_whole_life() -> None:
    placement = Placement("a", "1")
    seen = [placement.state]
    for event in LIFE:
        placement.move(event)
        seen.append(placement.state)
    assert seen == [
        State.NEW,
        State.LOADING,
        State.WARMING,
        State.READY,
        State.DRAINING,
        State.UNLOADING,
        State.GONE,
    ]


def test_every_state_can_be_reached_and_two_are_ends() -> None:
    assert {State.NEW, *TRANSITIONS.values()} == set(State)
    assert set(State) - {state for state, _ in TRANSITIONS} == {State.GONE, State.FAILED}
    assert {state for state in State if not a_placement(state).is_alive} == {State.GONE, State.FAILED}


def test_the_index_knows_every_state() -> None:
    assert INDEX_STATES.keys() == set(State)
    assert set(INDEX_STATES.values()) == {"READY", "LOADING", "UNLOADING", "UNAVAILABLE"}
    assert a_placement(State.WARMING).index_state == "LOADING"


def test_what_was_loaded_stays_known_when_the_native_version_is_given_away() -> None:
    placement = Placement("a", "1")
    assert placement.memory_bytes == 0
    native = loaded()
    placement.hold(native)
    assert placement.memory_bytes == 1100
    assert placement.load_seconds == 0.5
    assert placement.let_go() is native.native
    assert (placement.native, placement.memory_bytes) == (None, 0)
    assert (placement.config, placement.settings) == ("config", "settings")
    with pytest.raises(AssertionError, match="holds no native version"):
        placement.let_go()


def test_asking_what_was_never_loaded_is_a_bug() -> None:
    with pytest.raises(AssertionError, match="never loaded"):
        _ = Placement("a", "1").config
    with pytest.raises(AssertionError, match="never loaded"):
        _ = Placement("a", "1").settings
