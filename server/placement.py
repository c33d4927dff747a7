"""One version on this node: its state, the legal moves between states, and what a READY one offers.

Threads    The thread that loads, unloads or retires the version moves it (the manager lets one at a time). Anybody
           reads: each attribute is replaced whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protos.gen.model_config_pb2 import ModelConfig
    from server._native import Version
    from server.loader import LoadedVersion
    from server.settings import ModelSettings


class State(Enum):
    """The life of a placement."""

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

    `native` is the version that serves, None before it is loaded and once it is freed. `reason`: why it is not READY.
    """

    def __init__(self, name: str, version: str) -> None:
        self.name = name
        self.version = version
        self.state = State.NEW
        self.reason = ""
        self.native: Version | None = None
        self.fingerprint: tuple[Any, ...] = ()  # of what it is made of
        self.weights_bytes = 0
        self.load_seconds = 0.0
        self._config: ModelConfig | None = None
        self._settings: ModelSettings | None = None

    def move(self, event: Event, reason: str = "") -> None:
        """Takes one legal step. Raises IllegalTransition for any other."""
        state = TRANSITIONS.get((self.state, event))
        if state is None:
            raise IllegalTransition(f"{self.name} {self.version}: no move {event.name} from {self.state.name}")
        self.reason = reason
        self.state = state

    def hold(self, loaded: LoadedVersion) -> None:
        """Takes what the loader made."""
        self._config = loaded.config
        self._settings = loaded.settings
        self.weights_bytes = loaded.weights_bytes
        self.load_seconds = loaded.load_seconds
        self.native = loaded.native

    def let_go(self) -> Version:
        """Gives the native version away. REQUIRES: it holds one. What it was stays known: config, settings."""
        native = self.native
        assert native is not None, f"{self!r} holds no native version"
        self.native = None
        return native

    @property
    def config(self) -> ModelConfig:
        """The configuration in force, completed from the model. REQUIRES: it was loaded; it may be gone again."""
        assert self._config is not None, f"{self!r} was never loaded"
        return self._config

    @property
    def settings(self) -> ModelSettings:
        """The values it serves by. REQUIRES: it was loaded; it may be gone again."""
        assert self._settings is not None, f"{self!r} was never loaded"
        return self._settings

    @property
    def is_alive(self) -> bool:
        """Whether it serves, may come to serve, or is not freed yet."""
        return self.state not in (State.FAILED, State.GONE)

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
