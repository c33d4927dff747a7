"""One version on this node: its state, the legal moves between states, and what a READY one offers.

Threads    The thread that loads, unloads or retires the version moves it (the manager lets one at a time). Anybody reads:
           each attribute is replaced whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protos.gen.model_config_pb2 import ModelConfig
    from server._native import Version
    from server.settings import ModelSettings


class State(Enum):
    """The life of a placement. READY is announced after it can serve, DRAINING before it stops."""

    NEW = "NEW"  # asked for, nothing done yet
    LOADING = "LOADING"  # files are checked, sessions open
    WARMING = "WARMING"  # warm-up batches run; nobody is routed here
    READY = "READY"  # the route table names it
    DRAINING = "DRAINING"  # takes no new calls, finishes what it took
    UNLOADING = "UNLOADING"  # nothing runs any more, memory is being freed
    GONE = "GONE"  # freed
    FAILED = "FAILED"  # could not be loaded; the reason says why


class Event(Enum):
    """What moves a placement."""

    STARTED = "STARTED"
    OPENED = "OPENED"
    PUBLISHED = "PUBLISHED"
    BROKE = "BROKE"
    DISMISSED = "DISMISSED"
    DRAINED = "DRAINED"
    FREED = "FREED"


# Every legal move. A pair that is missing here is a bug of the caller and raises.
TRANSITIONS: Mapping[tuple[State, Event], State] = MappingProxyType(
    {
        (State.NEW, Event.STARTED): State.LOADING,
        (State.NEW, Event.BROKE): State.FAILED,
        (State.LOADING, Event.OPENED): State.WARMING,
        (State.LOADING, Event.BROKE): State.FAILED,
        (State.WARMING, Event.PUBLISHED): State.READY,
        (State.WARMING, Event.BROKE): State.FAILED,
        (State.READY, Event.DISMISSED): State.DRAINING,
        (State.DRAINING, Event.DRAINED): State.UNLOADING,
        (State.UNLOADING, Event.FREED): State.GONE,
    }
)

# RepositoryIndex knows five words (Triton's); this is how ours read there.
INDEX_STATES: Mapping[State, str] = MappingProxyType(
    {
        State.NEW: "UNAVAILABLE",
        State.LOADING: "LOADING",
        State.WARMING: "LOADING",
        State.READY: "READY",
        State.DRAINING: "UNLOADING",
        State.UNLOADING: "UNLOADING",
        State.GONE: "UNAVAILABLE",
        State.FAILED: "UNAVAILABLE",
    }
)


class IllegalTransition(Exception):
    """A move that the table does not have: a mistake in the caller, never in what a client sent."""


class Placement:
    """One version of a model on this node.

    `config` and `settings` are set from READY on and stay; `native` is the version that serves, None before WARMING and
    once GONE. `reason` says why it is not READY, or why the last attempt to replace it failed.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.state = State.NEW
        self.reason = ""
        self.config: ModelConfig | None = None
        self.settings: ModelSettings | None = None
        self.native: Version | None = None
        self.load_seconds = 0.0
        self.weights_bytes = 0
        self.fingerprint: tuple[Any, ...] = ()

    def move(self, event: Event, reason: str = "") -> None:
        """Takes one legal step. Raises IllegalTransition for any other."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise IllegalTransition(f"{self.name} {self.version}: no move {event.name} from {self.state.name}")
        self.reason = reason
        self.state = state

    @property
    def index_state(self) -> str:
        """The state as RepositoryIndex names it."""
        return INDEX_STATES[self.state]

    @property
    def memory_bytes(self) -> int:
        """Bytes of weights (as on disk, once per session) and of the instances' buffers; 0 when nothing is loaded."""
        native = self.native
        return 0 if native is None else self.weights_bytes + native.memory_bytes

    def __repr__(self) -> str:
        return f"Placement({self.name!r}, {self.version!r}, {self.state.name})"
