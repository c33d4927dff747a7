"""All placements of this node: loads, replaces and unloads versions, and publishes the route table.

A change of one model goes: look at its folder -> decide which versions should serve (policy/versions.py) -> load the
new ones, warm, beside the old ones -> publish -> retire what left the route in the background. All versions of one
change succeed or none does, and until the publish nothing that serves is touched.

Threads    Queries read one immutable map and take no lock. Changes of one model are serialised by that model's lock;
           changes of different models run side by side, their loads on a small pool.
Locks      (1) a model's lock, (2) _state_lock, in this order. Listeners are called without _state_lock.
Owner      Placements belong to the manager; native versions to their placement until they are retired.
Invariants (1) _models is replaced whole. A version shows as READY there after the route table has it; one that is
               replaced is swapped for its successor in one step, so that a model stays ready through a reload; one that
               is removed shows as not ready before the route table drops it.
           (2) A version that has left the route is retired exactly once, on a retiring thread.
           (3) What a client can name without there being a file (or bytes) of it leaves nothing behind here.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from protos.gen import model_config_pb2
from server.config import ControlMode
from server.errors import Reason, ServingError
from server.loader import Loader, LoadRequest, Native, without_paths
from server.model_config import ConfigError, is_plain_name, model_filename, read_json, read_text, version_policy
from server.placement import Event, Placement, State
from server.policy.versions import admitted, default_version, highest_first
from server.source import ModelFolder, Repository, SourceError, Watcher, is_version_name
from server.statistics import Ledger
from server.versions import SemVerRange, parse_range, parse_version

if TYPE_CHECKING:
    from protos.gen.model_config_pb2 import ModelConfig

_LOG = logging.getLogger(__name__)

Listener = Callable[[str], None]

# Retiring waits for other people's requests; this many versions may do so at once before the next has to wait.
_RETIRING_THREADS = 4

# Versions named in a "not found" message; RepositoryIndex lists all.
_VERSIONS_NAMED = 8

# How old the list of models that nobody has loaded may be when it is shown.
_NAMES_AGE_S = 1.0

# Versions of a failed load never served: they have nothing to finish.
_DISCARD_TIMEOUT_S = 5.0

# A run that was told to end does so at its next step; beyond this a close gives up on it.
_FORCED_END_S = 5.0

_NOT_LOADED = "not loaded"
_LOADING = "loading"
_UNLOADED = "unloaded"


class IndexRow(NamedTuple):
    """One line of RepositoryIndex."""

    name: str
    version: str  # "" for a model of which no version is known
    state: str  # READY, LOADING, UNLOADING, UNAVAILABLE
    reason: str  # why it is not READY, or why the last attempt to replace a READY one failed


@dataclass(frozen=True, slots=True)
class _Entry:
    """One version as queries and the route see it."""

    text: str
    placement: Placement | None = None  # None: named by the repository, not loaded
    is_ready: bool = False
    is_named: bool = True  # the repository has it
    reason: str = ""

    @property
    def state(self) -> str:
        """The state as RepositoryIndex names it."""
        if self.is_ready:
            return "READY"
        return self.placement.index_state if self.placement is not None else "UNAVAILABLE"

    @property
    def is_coming(self) -> bool:
        """Whether it is being loaded."""
        return self.placement is not None and self.placement.state in (State.NEW, State.LOADING, State.WARMING)

    @property
    def shown_reason(self) -> str:
        """Why it is not READY; of a READY one, why it could not be replaced."""
        if self.is_ready or self.placement is None:
            return self.reason
        return self.placement.reason or self.reason


@dataclass(frozen=True, slots=True)
class _Model:
    """One model: replaced whole at every change."""

    name: str
    entries: Mapping[str, _Entry] = field(default_factory=dict)  # highest version first
    aliases: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""  # why the last change failed
    is_kept: bool = False  # shown even when it has no versions: the repository has it, or the operator named it

    @property
    def routed(self) -> list[_Entry]:
        """The versions that a request may name, highest first: not those that are only being freed."""
        return [entry for entry in self.entries.values() if entry.is_ready or entry.is_named or entry.is_coming]

    @property
    def ready(self) -> list[str]:
        """Texts of the READY versions, highest first."""
        return [text for text, entry in self.entries.items() if entry.is_ready]

    @property
    def default(self) -> str:
        """What an empty version means; "" when nothing is READY."""
        return default_version(self.ready)

    def find(self, version: str) -> _Entry | None:
        """What answers `version`, by the rules of the native route table (ext/route/route_table.cc)."""
        routed = {entry.text: entry for entry in self.routed}
        if not version:
            return routed.get(self.default) or next(iter(routed.values()), None)
        entry = routed.get(version) or routed.get(self.aliases.get(version, ""))
        if entry is not None:
            return entry
        wanted = _range(version)
        if wanted is None:
            return None
        matching = [
            entry
            for entry in routed.values()
            if (parsed := parse_version(entry.text)) is not None and wanted.matches(parsed)
        ]
        return next((entry for entry in matching if entry.is_ready), next(iter(matching), None))

    def naming(self, texts: Collection[str], is_kept: bool) -> _Model:
        """The model when the repository has these versions. What it has not and is not loaded either is dropped."""
        entries = {
            text: replace(entry, is_named=text in texts)
            for text, entry in self.entries.items()
            if text in texts or entry.is_ready or (entry.placement is not None and entry.placement.is_alive)
        }
        for text in texts:
            entries.setdefault(text, _Entry(text, reason=_NOT_LOADED))
        ordered = {text: entries[text] for text in highest_first(entries)}
        return replace(self, entries=MappingProxyType(ordered), is_kept=is_kept)

    def with_entries(self, changed: Mapping[str, _Entry]) -> _Model:
        """The model with some entries replaced or added."""
        entries = {**self.entries, **changed}
        ordered = {text: entries[text] for text in highest_first(entries)}
        return replace(self, entries=MappingProxyType(ordered))


@lru_cache(maxsize=256)
def _range(text: str) -> SemVerRange | None:
    return parse_range(text)


class _Files:
    """The private folder of a load request's files. Removed when the last one who uses it lets go."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._n_users = 1

    def keep(self) -> None:
        with self._lock:
            self._n_users += 1

    def release(self) -> None:
        with self._lock:
            self._n_users -= 1
            is_unused = self._n_users == 0
        if is_unused:
            shutil.rmtree(self.path)


class _Locks:
    """One lock per name, kept only while somebody uses it: names come from clients."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._locks: dict[str, tuple[threading.Lock, int]] = {}

    @contextmanager
    def hold(self, name: str, timeout_s: float = -1) -> Iterator[bool]:
        """Holds the name's lock; gives False when it could not be had in time (negative: no limit)."""
        with self._guard:
            lock, n_users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = lock, n_users + 1
        is_held = False
        try:
            is_held = lock.acquire(timeout=timeout_s)
            yield is_held
        finally:
            if is_held:
                lock.release()
            with self._guard:
                lock, n_users = self._locks[name]
                if n_users == 1:
                    del self._locks[name]
                else:
                    self._locks[name] = lock, n_users - 1


@dataclass(frozen=True, slots=True)
class _Plan:
    """What a change of one model has to do."""

    folder: ModelFolder
    config: ModelConfig
    is_from_request: bool
    wanted: Mapping[str, tuple[Any, ...]]  # version -> fingerprint of what it is to be made of
    changed: tuple[str, ...]  # of these, the ones to load

    def request(self, text: str) -> LoadRequest:
        """The load of one version."""
        return LoadRequest(self.folder, text, self.config, self.is_from_request)


class Manager:
    """Owns all placements. Queries take no lock and never wait for a load."""

    def __init__(
        self,
        repository: Path,
        loader: Loader,
        native: Native,
        publish: Callable[[Sequence[Any]], None],
        *,
        control_mode: ControlMode = ControlMode.NONE,
        load_models: Sequence[str] = (),
        load_threads: int = 4,
        drain_timeout_s: float = 30.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`publish(routes)` replaces the route table (Frontend.publish); calls of it never overlap.

        `load_models` names what an explicit mode loads at the start ("*": everything). `drain_timeout_s` bounds how
        long a version that left the route may finish what it took.
        """
        self._repository = Repository(repository)
        self._watcher = Watcher(self._repository)
        self._loader = loader
        self._native = native
        self._publish = publish
        self._control_mode = control_mode
        self._load_models = tuple(load_models)
        self._load_threads = load_threads
        self._drain_timeout_s = drain_timeout_s
        self._clock = clock
        self.ledger = Ledger(clock)

        self._locks = _Locks()
        self._tried: dict[str, tuple[object, ...]] = {}  # name -> its folder at the last change; under the model's lock
        self._loads = ThreadPoolExecutor(load_threads, thread_name_prefix="load")
        self._retirements = ThreadPoolExecutor(_RETIRING_THREADS, thread_name_prefix="retire")

        self._state_lock = threading.Lock()  # guards changes of the following
        self._models: Mapping[str, _Model] = MappingProxyType({})
        self._published: list[Any] = []
        self._listeners: tuple[Listener, ...] = ()
        self._names_at: float | None = None
        self._files: dict[Placement, _Files] = {}
        self._retiring: dict[Future[bool], str] = {}  # -> the model's name
        self._close_by: float | None = None  # set once closing
        self._was_forced_at_close = False  # a version that close() freed was still running something

        self._startup_done = False
        self._polling: threading.Thread | None = None
        self._stop_polling = threading.Event()

    # -- queries -------------------------------------------------------------------------------------------------------

    def index(self, ready_only: bool = False) -> list[IndexRow]:
        """Every version that the repository or a load names, sorted by model, then version (highest last).

        Looks at the repository's folders when the last look is older than a second.
        """
        if self._control_mode is ControlMode.EXPLICIT:
            self._refresh_names(_NAMES_AGE_S)
        rows: list[IndexRow] = []
        for name, model in sorted(self._models.items()):
            rows += [IndexRow(name, e.text, e.state, e.shown_reason) for e in reversed(list(model.entries.values()))]
            if not model.entries:
                rows.append(IndexRow(name, "", "UNAVAILABLE", model.reason or _NOT_LOADED))
        return [row for row in rows if row.state == "READY"] if ready_only else rows

    def resolve(self, name: str, version: str = "") -> Placement:
        """The READY placement that answers (name, version), by the rules of the native route table.

        `version` is "" (default), an exact text, an alias or a range. Its config and settings are set.
        Raises ServingError MODEL_NOT_FOUND, VERSION_NOT_FOUND or VERSION_NOT_READY.
        """
        model = self._known(name)
        entry = model.find(version)
        if entry is None and not version:
            # The model as a whole has failed, or there is nothing to load.
            reason = f": {model.reason}" if model.reason else ""
            raise ServingError(Reason.VERSION_NOT_READY, f"model {_quoted(name)} has no version that is ready{reason}")
        if entry is None:
            live = model.ready
            named = ", ".join(live[:_VERSIONS_NAMED]) + (", ..." if len(live) > _VERSIONS_NAMED else "")
            raise ServingError(
                Reason.VERSION_NOT_FOUND,
                f"model {_quoted(name)} has no version {_quoted(version)}; live: {named or 'none'}",
            )
        if entry.placement is None or not entry.is_ready:
            raise ServingError(
                Reason.VERSION_NOT_READY,
                f"model {_quoted(name)} version {_quoted(entry.text)} is not ready: {entry.shown_reason}",
            )
        return entry.placement

    def versions(self, name: str) -> list[str]:
        """Texts of the READY versions, lowest first. Raises ServingError MODEL_NOT_FOUND; [] when none is READY."""
        return self._known(name).ready[::-1]

    def ready(self, name: str, version: str = "") -> bool:
        """Whether (name, version) would be answered now. What nobody knows is not ready, which is no error."""
        model = self._models.get(name)
        entry = None if model is None else model.find(version)
        return entry is not None and entry.is_ready

    def placements(self) -> list[Placement]:
        """The READY placements, sorted by model and version."""
        return [
            entry.placement
            for _, model in sorted(self._models.items())
            for entry in reversed(list(model.entries.values()))
            if entry.is_ready and entry.placement is not None
        ]

    def known(self) -> dict[str, list[str]]:
        """Model -> versions that a request may name, sorted by model. Of what is known already: no disk is read."""
        return {name: [entry.text for entry in model.routed] for name, model in sorted(self._models.items())}

    @property
    def startup_done(self) -> bool:
        """Whether each model of the start is READY or has failed."""
        return self._startup_done

    def add_listener(self, listener: Listener) -> None:
        """`listener(model_name)` is called after the readiness of any version of that model has changed, and
        `listener("")` when the start is done; from any thread. Ask ready() for the state; do not block or load."""
        with self._state_lock:
            self._listeners = (*self._listeners, listener)

    def _known(self, name: str) -> _Model:
        model = self._models.get(name)
        if model is None:
            raise ServingError(
                Reason.MODEL_NOT_FOUND, f"unknown model {_quoted(name)}; RepositoryIndex lists what is here"
            )
        return model

    # -- changes -------------------------------------------------------------------------------------------------------

    def load_all(self) -> None:
        """The start: loads what the control mode says, side by side. Returns when each model serves or has failed."""
        self._refresh_names()
        names = list(self._models)
        if self._control_mode is ControlMode.EXPLICIT and "*" not in self._load_models:
            names = list(dict.fromkeys(self._load_models))
        if self._control_mode is ControlMode.POLL:
            # The look that the first poll is compared with comes before the loads: what changes under them is seen.
            self._look()
        if names:
            # These threads only wait for the loads, which have their own bound.
            with ThreadPoolExecutor(self._load_threads, thread_name_prefix="start") as starters:
                for future in [starters.submit(self._load_at_start, name) for name in names]:
                    future.result()
        self._startup_done = True
        self._tell("")

    def _load_at_start(self, name: str) -> None:
        try:
            self._change(name, lambda: self._converge(name, is_forced=False))
        except ServingError as error:
            # Any other failure has been logged and recorded where it was found.
            if error.reason is Reason.MODEL_NOT_FOUND:
                # Somebody expects it to be here: the index says why it is not.
                reason = error.message
                _LOG.error("%s", reason, extra={"model": name})
                self._update(name, lambda model: replace(model, reason=reason, is_kept=True))

    def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Loads or reloads a model as RepositoryModelLoad asks; returns once it serves.

        Only versions that changed are loaded when some did; when none did, all are loaded anew. `config` is a
        ModelConfig as JSON that replaces the file's. `files` maps "<version>/<file>" (an optional "file:" in front is
        dropped) to bytes that replace the model's folder; it needs `config`.
        Raises ServingError CONTROL_MODE, MODEL_NOT_FOUND, INVALID_TENSOR (malformed arguments) or LOAD_FAILED; what
        served before still serves then.
        """
        self._check_mode("load")
        if not is_plain_name(name):
            raise ServingError(Reason.INVALID_TENSOR, f"{_quoted(name)} is no model name: use letters, digits, . _ -")
        written = None
        if config is not None:
            try:
                written = read_json(config)
            except ConfigError as error:
                raise ServingError(
                    Reason.INVALID_TENSOR, f"model {_quoted(name)}: parameter config: {error}"
                ) from error
        if files and written is None:
            raise ServingError(Reason.INVALID_TENSOR, "parameters file:<version>/<file> need the parameter config")
        checked = _checked_files(files or {})
        self._change(name, lambda: self._converge(name, is_forced=True, config=written, files=checked))

    def unload(self, name: str, unload_dependents: bool = False) -> None:
        """Takes a model out of the route, as RepositoryModelUnload asks; its memory follows in the background.

        Nothing depends on a model here (no ensembles), so `unload_dependents` adds nothing.
        Raises ServingError CONTROL_MODE or MODEL_NOT_FOUND. A known model that is not loaded is no error.
        """
        self._check_mode("unload")
        self._refresh_names(_NAMES_AGE_S)
        self._known(name)
        self._change(name, lambda: self._remove(name))

    def set_aliases(self, name: str, aliases: Mapping[str, str]) -> None:
        """Names under which versions of a model also answer: alias -> version text. Replaces all of the model's.

        Raises ServingError MODEL_NOT_FOUND; an alias may name a version that is not here yet.
        """

        def change() -> None:
            self._known(name)
            self._update(name, lambda model: replace(model, aliases=MappingProxyType(dict(aliases))))

        self._change(name, change)

    def poll(self) -> None:
        """One look at the repository: loads, replaces and unloads what has changed and settled.

        Failures go to the index and the log; a model that failed is tried again when its files change.
        """
        looked = self._look()
        if looked is None:
            return
        settled, present = looked
        self._refresh_names()
        jobs = [self._poll_removal(name) for name in self._models if name not in present]
        jobs += [self._poll_change(f) for f in settled.values() if self._tried.get(f.name) != f.whole_fingerprint]
        if jobs:
            with ThreadPoolExecutor(self._load_threads, thread_name_prefix="poll") as pollers:
                for future in [pollers.submit(job) for job in jobs]:
                    future.result()

    def _look(self) -> tuple[dict[str, ModelFolder], set[str]] | None:
        """What the watcher sees; None when the repository cannot be read, which says nothing about its models."""
        try:
            return self._watcher.look()
        except SourceError as error:
            _LOG.error("%s", error)
            return None

    def _poll_removal(self, name: str) -> Callable[[], None]:
        return self._guarded(name, lambda: self._remove(name))

    def _poll_change(self, folder: ModelFolder) -> Callable[[], None]:
        return self._guarded(
            folder.name,
            lambda: self._converge(folder.name, is_forced=False, folder=folder, leaves_out_incomplete=True),
        )

    def _guarded(self, name: str, change: Callable[[], None]) -> Callable[[], None]:
        """A change of one model that nobody waits for."""

        def run() -> None:
            try:
                self._change(name, change)
            except ServingError as error:
                # What could not be loaded has been logged and recorded; else the server is stopping.
                _LOG.debug("model %s was not changed: %s", name, error.message, extra={"model": name})
            except Exception:
                _LOG.exception("model %s could not be changed", name, extra={"model": name})

        return run

    def start_polling(self, interval_s: float) -> None:
        """Polls every `interval_s` seconds on a thread of its own until close()."""

        def run() -> None:
            while not self._stop_polling.wait(interval_s):
                try:
                    self.poll()
                except Exception:
                    # The next poll may go better; ending the thread would silently end polling for good.
                    _LOG.exception("a poll of the model repository failed")

        self._polling = threading.Thread(target=run, name="poll", daemon=True)
        self._polling.start()

    def close(self, timeout_s: float) -> bool:
        """Ends changes, takes everything out of the route and frees it, in `timeout_s` and a little.

        False when running work had to be ended by force, or a load that is under way did not end in time; its thread
        lives on. Idempotent.
        """
        close_by = self._clock() + timeout_s
        with self._state_lock:
            self._close_by = close_by
        self._stop_polling.set()
        is_clean = True
        for name in list(self._models):
            with self._locks.hold(name, max(0.0, close_by - self._clock())) as is_held:
                if is_held:
                    self._remove(name)
                is_clean = is_clean and is_held
        with self._state_lock:
            retiring = list(self._retiring)
        _, late = wait(retiring, max(0.0, close_by - self._clock()) + _FORCED_END_S)
        is_clean = is_clean and not late and not self._was_forced_at_close
        if self._polling is not None:
            self._polling.join(0.0 if not is_clean else None)
        self._loads.shutdown(wait=is_clean, cancel_futures=True)
        self._retirements.shutdown(wait=is_clean)
        return is_clean

    # -- one model's change; everything below runs with that model's lock held -----------------------------------------

    def _change(self, name: str, change: Callable[[], None]) -> None:
        with self._locks.hold(name):
            self._refuse_when_closing()
            change()

    def _refuse_when_closing(self) -> None:
        if self._close_by is not None:
            raise ServingError(Reason.NODE_DRAINING, "the server is stopping; no model is loaded or unloaded any more")

    def _check_mode(self, what: str) -> None:
        if self._control_mode is not ControlMode.EXPLICIT:
            raise ServingError(
                Reason.CONTROL_MODE,
                f"{what} by request is not allowed with --model-control-mode {self._control_mode.value}; "
                "start the server with explicit",
            )

    def _converge(
        self,
        name: str,
        *,
        is_forced: bool,
        folder: ModelFolder | None = None,
        config: ModelConfig | None = None,
        files: Mapping[tuple[str, str], bytes] = MappingProxyType({}),
        leaves_out_incomplete: bool = False,
    ) -> None:
        """Brings the versions that serve in line with a folder: the repository's, the given look at it, or `files`."""
        stored = _store(name, files) if files else None
        try:
            if stored is not None:
                folder = Repository(stored.path).model(name)
            elif folder is None:
                folder = self._repository.model(name)
            if folder is None:
                raise ServingError(
                    Reason.MODEL_NOT_FOUND, f"the model repository has no model {_quoted(name)}; copy it there first"
                )
            if stored is None:
                self._tried[name] = folder.whole_fingerprint
            # A model that is reloaded faster than its old versions end would pile them up.
            self._wait_for_retirements(name)
            try:
                plan = self._plan(name, folder, config, is_forced, leaves_out_incomplete)
            except ServingError as error:
                self._record_failure(name, error.message)
                raise
            self._carry_out(name, plan, stored)
        finally:
            if stored is not None:
                stored.release()

    def _plan(
        self,
        name: str,
        folder: ModelFolder,
        config: ModelConfig | None,
        is_forced: bool,
        leaves_out_incomplete: bool,
    ) -> _Plan:
        """Decides. Raises ServingError when configuration and folder do not say what to serve."""
        written = _config_of(folder) if config is None else config
        texts = list(folder.versions)
        if leaves_out_incomplete:
            filename = model_filename(written)
            texts = [text for text in texts if (folder.versions[text].path / filename).exists()]
        choice = admitted(version_policy(written), texts)
        if choice.missing:
            raise _failed(name, f"version_policy names {', '.join(choice.missing)}, which no version folder is")
        if not choice.texts:
            raise _failed(name, "there is no version folder (1, 2, ... or 1.2.3) with a model in it")
        content = written.SerializeToString(deterministic=True)
        wanted = {text: (config is not None, content, folder.fingerprint(text)) for text in choice.texts}
        serving = self._serving(name)
        changed = [text for text in wanted if text not in serving or serving[text].fingerprint != wanted[text]]
        if is_forced and not changed and serving.keys() == wanted.keys():
            changed = list(wanted)
        plan = _Plan(folder, written, config is not None, wanted, tuple(changed))
        if changed:
            # Mistakes in the configuration are told before anything is opened.
            self._loader.check(plan.request(changed[0]))
        return plan

    def _serving(self, name: str) -> dict[str, Placement]:
        model = self._models.get(name)
        entries = model.entries.items() if model is not None else ()
        return {text: entry.placement for text, entry in entries if entry.is_ready and entry.placement is not None}

    def _carry_out(self, name: str, plan: _Plan, stored: _Files | None) -> None:
        """Loads what the plan says, publishes it and retires what it replaces."""
        placements = {text: Placement(name, text) for text in plan.changed}
        for text, placement in placements.items():
            placement.fingerprint = plan.wanted[text]
        if placements:
            self._show_loading(name, placements, is_named=stored is None)
            try:
                self._load_versions(plan, placements)
            except ServingError as error:
                self._record_failure(name, error.message, placements)
                raise
        leaving = [
            placement
            for text, placement in self._serving(name).items()
            if text in placements or text not in plan.wanted
        ]
        if stored is not None:
            for placement in placements.values():
                stored.keep()
                self._files[placement] = stored
        self._switch(name, placements, leaving)
        for text, placement in placements.items():
            _LOG.info(
                "model %s version %s is ready after %.2f s",
                name,
                text,
                placement.load_seconds,
                extra={"model": name, "version": text},
            )
        self._retire(leaving)

    def _show_loading(self, name: str, placements: Mapping[str, Placement], *, is_named: bool) -> None:
        """Shows versions that do not serve yet as LOADING. One that serves is shown as READY until it is replaced."""

        def update(model: _Model) -> _Model:
            loading = {}
            for text, placement in placements.items():
                before = model.entries.get(text)
                if before is None or not before.is_ready:
                    is_named_here = is_named if before is None else before.is_named
                    loading[text] = _Entry(text, placement, is_named=is_named_here, reason=_LOADING)
            return model.with_entries(loading)

        self._update(name, update)

    def _load_versions(self, plan: _Plan, placements: Mapping[str, Placement]) -> None:
        """Loads all of them or none. Raises ServingError with the first reason, by version."""
        futures = {
            text: self._loads.submit(self._load_one, plan.request(text), placement)
            for text, placement in placements.items()
        }
        failures: dict[str, Exception] = {}
        for text, future in futures.items():
            error = future.exception()
            if isinstance(error, Exception):
                failures[text] = error
            elif error is not None:
                raise error
        if not failures:
            return
        text, first = next(iter(failures.items()))
        for other, placement in placements.items():
            if other not in failures:
                self._discard(placement, f"version {_quoted(text)} of the same load failed")
        if isinstance(first, ServingError):
            raise first
        name = plan.folder.name
        _LOG.error(
            "model %s version %s: a load failed unexpectedly",
            name,
            text,
            exc_info=first,
            extra={"model": name, "version": text},
        )
        raise _failed(name, f"version {_quoted(text)}: internal error ({type(first).__name__}); see the log") from first

    def _load_one(self, request: LoadRequest, placement: Placement) -> None:
        def opened() -> None:
            placement.move(Event.OPENED, "warming up")
            self._update(placement.name, lambda model: model)  # the route table says why a version is not ready

        placement.move(Event.STARTED, _LOADING)
        try:
            placement.hold(self._loader.load(request, on_open=opened))
        except Exception as error:
            message = error.message if isinstance(error, ServingError) else f"internal error ({type(error).__name__})"
            placement.move(Event.BROKE, message)
            raise

    def _switch(self, name: str, loaded: Mapping[str, Placement], leaving: Sequence[Placement]) -> None:
        """Publishes the loaded versions in the place of the leaving ones. Raises ServingError; then nothing changed."""
        named = self._naming(name)

        def update(model: _Model) -> _Model:
            self._refuse_when_closing()
            entries = {}
            for text, entry in model.entries.items():
                if text in loaded:
                    entries[text] = _Entry(text, loaded[text], is_ready=True, is_named=entry.is_named)
                elif entry.is_ready:
                    is_leaving = entry.placement in leaving
                    reason = _UNLOADED if is_leaving else ""
                    entries[text] = replace(entry, is_ready=not is_leaving, reason=reason)
                elif entry.placement is None or not entry.placement.is_alive:
                    entries[text] = _Entry(text, is_named=entry.is_named, reason=_NOT_LOADED)
            return named(replace(model.with_entries(entries), reason=""))

        def moves() -> None:
            for text, placement in loaded.items():
                placement.move(Event.PUBLISHED)
                assert placement.native is not None, "loaded"
                self.ledger.open(name, text, placement.native)
            for placement in leaving:
                placement.move(Event.DISMISSED, _UNLOADED)

        try:
            self._update(name, update, moves)
        except Exception as error:
            # The old table is in force and was not touched.
            refusal = error if isinstance(error, ServingError) else None
            if refusal is None:
                _LOG.exception("the route table could not be published", extra={"model": name})
                refusal = _failed(name, "the route table could not be published; see the log")
            for placement in loaded.values():
                self._discard(placement, refusal.message)
            self._record_failure(name, refusal.message, loaded)
            raise refusal from error

    def _naming(self, name: str) -> Callable[[_Model], _Model]:
        """What the repository has of a model, as a change of what is known of it."""
        texts = self._repository.version_names(name)
        is_kept = self._repository.has(name) or name in self._load_models
        return lambda model: model.naming(texts, is_kept)

    def _remove(self, name: str) -> None:
        """Takes every version out of the route and lets go of it."""
        named = self._naming(name)
        leaving = list(self._serving(name).values())

        def update(model: _Model) -> _Model:
            entries = {
                text: replace(entry, is_ready=False, reason=_UNLOADED)
                for text, entry in model.entries.items()
                if entry.is_ready
            }
            return named(replace(model.with_entries(entries), reason=_UNLOADED))

        self._tried.pop(name, None)

        def moves() -> None:
            for placement in leaving:
                placement.move(Event.DISMISSED, _UNLOADED)

        self._update(name, update, moves, is_shown_first=True)
        for placement in leaving:
            _LOG.info(
                "model %s version %s left the route",
                name,
                placement.version,
                extra={"model": name, "version": placement.version},
            )
        self._retire(leaving)

    def _record_failure(self, name: str, message: str, tried: Collection[str] = ()) -> None:
        """Tells the log and keeps the reason for the index. `tried` are the versions whose placements say it already;
        without any, it is why none of the model's versions could be loaded."""
        extra = {"model": name} | ({"version": next(iter(tried))} if len(tried) == 1 else {})
        _LOG.error("%s", message, extra=extra)
        named = self._naming(name)

        def update(model: _Model) -> _Model:
            model = named(replace(model, reason=message))
            entries = {}
            for text, entry in model.entries.items():
                if entry.is_ready:
                    entries[text] = replace(entry, reason=message)
                elif not tried and (entry.placement is None or not entry.placement.is_alive):
                    entries[text] = _Entry(text, is_named=entry.is_named, reason=message)
            return model.with_entries(entries)

        self._update(name, update)

    # -- what is known and published -----------------------------------------------------------------------------------

    def _update(
        self,
        name: str,
        change: Callable[[_Model], _Model],
        moves: Callable[[], None] = lambda: None,
        *,
        is_shown_first: bool = False,
    ) -> None:
        """Replaces one model: publishes the routes that follow from it, calls `moves`, and shows it to queries.

        `is_shown_first` shows it before the publish. When the publish raises, nothing has changed.
        """
        with self._state_lock:
            before = self._models.get(name) or _Model(name)
            after = change(before)
            self._show({**self._models, name: after}, moves, is_shown_first=is_shown_first)
        if before.ready != after.ready:
            self._tell(name)

    def _show(
        self,
        models: Mapping[str, _Model],
        moves: Callable[[], None] = lambda: None,
        *,
        is_shown_first: bool = False,
    ) -> None:
        """The step from one state to the next. REQUIRES: _state_lock is held."""
        before = self._models
        models = MappingProxyType({n: model for n, model in models.items() if model.entries or model.is_kept})
        routes = [self._route(model) for _, model in sorted(models.items())]
        if is_shown_first:
            self._models = models
        if routes != self._published:
            try:
                self._publish(routes)
            except BaseException:
                self._models = before
                raise
            self._published = routes
        moves()
        self._models = models

    def _route(self, model: _Model) -> Any:
        versions = [
            self._native.VersionRoute(entry.text, entry.placement.native, "")
            if entry.is_ready and entry.placement is not None
            else self._native.VersionRoute(entry.text, None, entry.shown_reason)
            for entry in model.routed
        ]
        return self._native.ModelRoute(model.name, versions, model.default, model.aliases)

    def _tell(self, name: str) -> None:
        for listener in self._listeners:
            try:
                listener(name)
            except Exception:
                # A listener is told; what it makes of it must not end a load.
                _LOG.exception("a listener of the manager failed")

    def _refresh_names(self, max_age_s: float = 0.0) -> None:
        """Looks which models and versions the repository has, unless that was done `max_age_s` ago or later.

        With a `max_age_s` it is a query that asks: it does not wait for a change that is being published.
        """
        if not self._state_lock.acquire(blocking=not max_age_s):
            return
        try:
            now = self._clock()
            if self._names_at is not None and now - self._names_at < max_age_s:
                return
            self._names_at = now
        finally:
            self._state_lock.release()
        try:
            found = {name: self._repository.version_names(name) for name in self._repository.names()}
        except SourceError as error:
            _LOG.error("%s", error)
            return
        with self._state_lock:
            models = {
                name: model.naming(found.get(name, ()), is_kept=name in found or name in self._load_models)
                for name, model in self._models.items()
            }
            for name, texts in found.items():
                if name not in models:
                    models[name] = _Model(name).naming(texts, is_kept=True)
            self._show(models)

    # -- the end of a version ------------------------------------------------------------------------------------------

    def _retire(self, leaving: Sequence[Placement]) -> None:
        """Frees versions that have left the route, in the background."""
        for placement in leaving:
            with self._state_lock:
                future = self._retirements.submit(self._retire_one, placement)
                self._retiring[future] = placement.name
            future.add_done_callback(self._retired)

    def _retired(self, future: Future[bool]) -> None:
        with self._state_lock:
            del self._retiring[future]

    def _wait_for_retirements(self, name: str) -> None:
        with self._state_lock:
            waiting = [future for future, of in self._retiring.items() if of == name]
        wait(waiting)

    def _retire_one(self, placement: Placement) -> bool:
        """Lets a version finish what it took and frees it. False when its work had to be ended by force."""
        name, version = placement.name, placement.version
        extra = {"model": name, "version": version}
        timeout_s = self._drain_timeout_s
        if self._close_by is not None:
            timeout_s = max(0.0, min(timeout_s, self._close_by - self._clock()))
        native = placement.let_go()
        is_clean = False
        try:
            is_clean = self._loader.unload(native, timeout_s)
            if not is_clean:
                self._was_forced_at_close = self._was_forced_at_close or self._close_by is not None
                _LOG.warning(
                    "model %s version %s: what it still ran after %.1f s was ended by force",
                    name,
                    version,
                    timeout_s,
                    extra=extra,
                )
        except Exception:
            self._was_forced_at_close = self._was_forced_at_close or self._close_by is not None
            _LOG.exception("model %s version %s could not be freed", name, version, extra=extra)
        placement.move(Event.DRAINED, _UNLOADED)
        self.ledger.close(name, version, native)
        self._release_files(placement)
        placement.move(Event.FREED, _UNLOADED)
        self._forget(placement)
        _LOG.info("model %s version %s is unloaded", name, version, extra=extra)
        return is_clean

    def _forget(self, placement: Placement) -> None:
        """Leaves of a freed version what the repository has of it: its name."""

        def update(model: _Model) -> _Model:
            entries = {
                text: _Entry(text, is_named=entry.is_named, reason=_UNLOADED)
                for text, entry in model.entries.items()
                if entry.placement is placement
            }
            named = [text for text, entry in model.entries.items() if entry.is_named]
            return model.with_entries(entries).naming(named, model.is_kept)

        self._update(placement.name, update)

    def _discard(self, placement: Placement, reason: str) -> None:
        """Frees a loaded version that was never published."""
        try:
            self._loader.unload(placement.let_go(), _DISCARD_TIMEOUT_S)
        except Exception:
            # The failure that brought us here is the one to tell.
            extra = {"model": placement.name, "version": placement.version}
            _LOG.exception("a version that is not wanted any more could not be freed", extra=extra)
        self._release_files(placement)
        placement.move(Event.BROKE, reason)

    def _release_files(self, placement: Placement) -> None:
        files = self._files.pop(placement, None)
        if files is not None:
            files.release()


# -- texts and files ---------------------------------------------------------------------------------------------------


def _quoted(text: str) -> str:
    """Text from a client inside a message: bounded, as the native core quotes it."""
    return f"'{text[:128]}...'" if len(text) > 128 else f"'{text}'"


def _failed(name: str, message: str) -> ServingError:
    return ServingError(Reason.LOAD_FAILED, f"model {_quoted(name)} cannot be loaded: {without_paths(message)}")


def _config_of(folder: ModelFolder) -> ModelConfig:
    """The configuration as written in the folder; an empty one when there is none. Raises ServingError."""
    if folder.problem:
        raise _failed(folder.name, folder.problem)
    if not folder.config_text:
        return model_config_pb2.ModelConfig()
    try:
        return read_text(folder.config_text)
    except ConfigError as error:
        raise _failed(folder.name, str(error)) from error


def _checked_files(files: Mapping[str, bytes]) -> dict[tuple[str, str], bytes]:
    """(version, file name) -> bytes. Raises ServingError INVALID_TENSOR for a name that is not `<version>/<file>`."""
    checked: dict[tuple[str, str], bytes] = {}
    for given, content in files.items():
        version, _, name = given.removeprefix("file:").partition("/")
        if not is_version_name(version) or not is_plain_name(name):
            raise ServingError(
                Reason.INVALID_TENSOR,
                f"parameter {_quoted(given)}: write file:<version>/<file> with a version like 1 or 1.2.3 and a file "
                "name of letters, digits, . _ -",
            )
        checked[version, name] = content
    return checked


def _store(name: str, files: Mapping[tuple[str, str], bytes]) -> _Files:
    """Writes a request's files as a repository of one model into a private folder. Raises ServingError."""
    root = Path(tempfile.mkdtemp(prefix="tidegate-load-"))
    try:
        for (version, filename), content in files.items():
            folder = root / name / version
            folder.mkdir(parents=True, exist_ok=True)
            (folder / filename).write_bytes(content)
    except OSError as error:
        shutil.rmtree(root, ignore_errors=True)
        raise _failed(name, f"the files of the request cannot be stored: {error.strerror}") from error
    return _Files(root)
