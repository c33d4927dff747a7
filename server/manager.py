"""All placements of this node: loads, replaces and unloads versions, and publishes the route table.

A change of one model goes: look at its folder -> decide which versions should serve (policy/versions.py) -> load the new
ones, warm, beside the old ones -> publish -> retire what left the route in the background. All versions of one change
succeed or none does, and until the publish nothing that serves is touched.

Threads    Queries read one immutable map and take no lock. Changes of one model are serialised by that model's lock;
           changes of different models run side by side, their loads on a small pool.
Locks      (1) a model's lock, (2) _state_lock. In this order; listeners are called with none of them held... see _update.
Owner      Placements belong to the manager; native versions to their placement until they are retired.
Invariants (1) What _models shows as READY has been published; what leaves is DRAINING before the publish.
           (2) A version that has left the route is retired exactly once, on a retiring thread.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

from server.config import ControlMode
from server.errors import Reason, ServingError
from server.loader import Loader, LoadRequest, Native, without_paths
from server.model_config import (
    ConfigError,
    is_plain_name,
    model_filename,
    read_json,
    read_text,
    version_policy,
)
from server.placement import Event, Placement, State
from server.policy.versions import admitted, default_version, highest_first
from server.source import ModelFolder, Repository, SourceError, Watcher, is_version_name
from server.versions import SemVerRange, parse_range, parse_version

if TYPE_CHECKING:
    from protos.gen.model_config_pb2 import ModelConfig

_LOG = logging.getLogger(__name__)

Listener = Callable[[str], None]

# Retiring waits for other people's requests; this many models may do so at once before the next has to wait.
_RETIRING_THREADS = 4

# Versions named in a "not found" message; RepositoryIndex lists all.
_VERSIONS_NAMED = 8

# How old the list of models that nobody has loaded may be when it is shown.
_NAMES_AGE_S = 1.0

_NOT_LOADED = "not loaded"
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
    placement: Placement | None = None  # None: named by the repository, never loaded
    reason: str = ""
    is_named: bool = True  # the repository (or the files of a load) has it

    @property
    def is_ready(self) -> bool:
        return self.placement is not None and self.placement.state is State.READY


@dataclass(frozen=True, slots=True)
class _Model:
    """One model: replaced whole at every change."""

    name: str
    entries: Mapping[str, _Entry] = field(default_factory=dict)  # highest version first
    aliases: Mapping[str, str] = field(default_factory=dict)
    reason: str = ""  # why the last change failed, for a model without entries
    is_wanted: bool = False  # it should serve: loaded at the start, by request or by a poll

    @property
    def ready(self) -> list[str]:
        return [text for text, entry in self.entries.items() if entry.is_ready]

    @property
    def default(self) -> str:
        return default_version(self.ready)


class _Files:
    """The private folder of a load request's files. Removed when the last placement made of it is gone."""

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
    def hold(self, name: str) -> Iterator[None]:
        with self._guard:
            lock, n_users = self._locks.get(name, (threading.Lock(), 0))
            self._locks[name] = lock, n_users + 1
        try:
            with lock:
                yield
        finally:
            with self._guard:
                lock, n_users = self._locks[name]
                if n_users == 1:
                    del self._locks[name]
                else:
                    self._locks[name] = lock, n_users - 1


@dataclass(slots=True)
class _Own:
    """What the holder of a model's lock knows beyond the published state."""

    files: _Files | None = None  # of the last load with files
    tried: tuple[object, ...] | None = None  # fingerprint of the folder at the last change, successful or not
    retiring: list[Future[None]] = field(default_factory=list)


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

        `load_models` names what an explicit mode loads at the start ("*": everything). `drain_timeout_s` bounds how long
        a version that left the route may finish what it took.
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

        self._locks = _Locks()
        self._own: dict[str, _Own] = {}  # each value is the holder's of that model's lock
        self._loads = ThreadPoolExecutor(load_threads, thread_name_prefix="load")
        self._retirements = ThreadPoolExecutor(_RETIRING_THREADS, thread_name_prefix="retire")

        self._state_lock = threading.RLock()  # guards changes of the four below
        self._models: Mapping[str, _Model] = MappingProxyType({})
        self._published: list[Any] | None = None
        self._listeners: tuple[Listener, ...] = ()
        self._names_at: float | None = None
        self._startup_done = False
        self._is_closed = False
        self._polling: threading.Thread | None = None
        self._stop_polling = threading.Event()

    # -- queries -------------------------------------------------------------------------------------------------------

    def index(self, ready_only: bool = False) -> list[IndexRow]:
        """Every version that the repository or a load names, sorted by model, then version (highest last)."""
        self._refresh_names()
        rows: list[IndexRow] = []
        for name, model in sorted(self._models.items()):
            for entry in reversed(model.entries.values()):
                placement = entry.placement
                state = placement.index_state if placement is not None else "UNAVAILABLE"
                rows.append(IndexRow(name, entry.text, state, _shown_reason(entry)))
            if not model.entries:
                rows.append(IndexRow(name, "", "UNAVAILABLE", model.reason or _NOT_LOADED))
        return [row for row in rows if row.state == "READY"] if ready_only else rows

    def resolve(self, name: str, version: str = "") -> Placement:
        """The READY placement that answers (name, version), by the rules of the native route table.

        `version` is "" (default), an exact text, an alias or a range. Its config, settings and native are set.
        Raises ServingError MODEL_NOT_FOUND, VERSION_NOT_FOUND or VERSION_NOT_READY.
        """
        model = self._models.get(name)
        if model is None:
            raise ServingError(
                Reason.MODEL_NOT_FOUND, f"unknown model {_quoted(name)}; RepositoryIndex lists what is here"
            )
        entry = _find(model, version)
        if entry is None and not version:
            # The model as a whole has failed, or nothing of it was ever loaded.
            reason = f": {model.reason}" if model.reason else ""
            raise ServingError(
                Reason.VERSION_NOT_READY, f"model {_quoted(name)} has no version that is ready{reason}"
            )
        if entry is None:
            live = highest_first(model.ready)
            named = ", ".join(live[:_VERSIONS_NAMED]) + (", ..." if len(live) > _VERSIONS_NAMED else "")
            raise ServingError(
                Reason.VERSION_NOT_FOUND,
                f"model {_quoted(name)} has no version {_quoted(version)}; live: {named or 'none'}",
            )
        placement = entry.placement
        if placement is None or not entry.is_ready:
            raise ServingError(
                Reason.VERSION_NOT_READY,
                f"model {_quoted(name)} version {_quoted(entry.text)} is not ready: {_shown_reason(entry)}",
            )
        return placement

    def versions(self, name: str) -> list[str]:
        """Texts of the READY versions, lowest first. Raises ServingError MODEL_NOT_FOUND; [] when none is READY."""
        model = self._models.get(name)
        if model is None:
            raise ServingError(
                Reason.MODEL_NOT_FOUND, f"unknown model {_quoted(name)}; RepositoryIndex lists what is here"
            )
        return highest_first(model.ready)[::-1]

    def ready(self, name: str, version: str = "") -> bool:
        """Whether (name, version) would be answered now. What nobody knows is not ready, which is no error."""
        model = self._models.get(name)
        entry = None if model is None else _find(model, version)
        return entry is not None and entry.is_ready

    def placements(self) -> list[Placement]:
        """The READY placements, sorted by model and version."""
        return [
            entry.placement
            for _, model in sorted(self._models.items())
            for entry in reversed(model.entries.values())
            if entry.is_ready and entry.placement is not None
        ]

    def names(self) -> list[str]:
        """All known model names, sorted."""
        self._refresh_names()
        return sorted(self._models)

    @property
    def startup_done(self) -> bool:
        """Whether each model of the start is READY or has failed."""
        return self._startup_done

    @property
    def all_ready(self) -> bool:
        """Whether the start is done and every model that should serve has a READY version."""
        return self._startup_done and all(model.default for model in self._models.values() if model.is_wanted)

    def add_listener(self, listener: Listener) -> None:
        """`listener(model_name)` is called after the readiness of any version of that model has changed, and
        `listener("")` when the start is done; from any thread. Ask ready() for the state; do not block or load."""
        with self._state_lock:
            self._listeners = (*self._listeners, listener)

    # -- changes -------------------------------------------------------------------------------------------------------

    def load_all(self) -> None:
        """The start: loads what the control mode says, side by side, and returns when each model serves or has failed."""
        try:
            names = self._repository.names()
            if self._control_mode is ControlMode.EXPLICIT and "*" not in self._load_models:
                names = list(dict.fromkeys(self._load_models))
        except SourceError as error:
            _LOG.error("%s", error)
            names = []
        self._refresh_names(is_forced=True)
        if names:
            # These threads only wait for the loads, which have their own bound.
            with ThreadPoolExecutor(self._load_threads, thread_name_prefix="start") as starters:
                for future in [starters.submit(self._load_quietly, name) for name in names]:
                    future.result()
        if self._control_mode is ControlMode.POLL:
            # The first look is the one that the next is compared with.
            self._look()
        self._startup_done = True
        self._tell("")

    def _load_quietly(self, name: str) -> None:
        try:
            self._change(name, lambda: self._converge(name, is_forced=False))
        except ServingError as error:
            _LOG.error("%s", error.message, extra={"model": name})

    def load(self, name: str, config: str | None = None, files: Mapping[str, bytes] | None = None) -> None:
        """Loads or reloads a model as RepositoryModelLoad asks; returns once it serves.

        Only versions that changed are loaded when some did; when none did, all are loaded anew. `config` is a ModelConfig
        as JSON that replaces the file's. `files` maps "<version>/<file>" (an optional "file:" in front is dropped) to
        bytes that replace the model's folder; it needs `config`.
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
                raise ServingError(Reason.INVALID_TENSOR, f"model {_quoted(name)}: parameter config: {error}") from error
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
        self._refresh_names()
        if name not in self._models:
            raise ServingError(
                Reason.MODEL_NOT_FOUND, f"unknown model {_quoted(name)}; RepositoryIndex lists what is here"
            )
        self._change(name, lambda: self._remove(name))

    def set_aliases(self, name: str, aliases: Mapping[str, str]) -> None:
        """Names under which versions of a model also answer: alias -> version text. Replaces all of the model's.

        Raises ServingError MODEL_NOT_FOUND; an alias may name a version that is not here yet.
        """

        def change() -> None:
            if name not in self._models:
                raise ServingError(
                    Reason.MODEL_NOT_FOUND, f"unknown model {_quoted(name)}; RepositoryIndex lists what is here"
                )
            self._update(name, lambda model: replace(model, aliases=MappingProxyType(dict(aliases))))

        self._change(name, change)

    def poll(self) -> None:
        """One look at the repository: loads, replaces and unloads what has changed and settled.

        Failures go to the index and the log; a model that failed is tried again when its files change.
        """
        settled, present = self._look()
        gone = [name for name, model in self._models.items() if name not in present and model.entries]
        jobs: list[Callable[[], None]] = [self._guarded_removal(name) for name in gone]
        jobs += [self._guarded_convergence(folder) for folder in settled.values()]
        with ThreadPoolExecutor(self._load_threads, thread_name_prefix="poll") as pollers:
            for future in [pollers.submit(job) for job in jobs]:
                future.result()

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
        """Ends changes, takes everything out of the route and frees it. False when running work had to be ended by force.

        Waits for loads that are under way. Idempotent.
        """
        self._stop_polling.set()
        if self._polling is not None:
            self._polling.join()
        self._is_closed = True
        self._drain_timeout_s = timeout_s
        for name in list(self._models):
            with self._locks.hold(name):
                self._remove(name)
        retiring = [future for own in list(self._own.values()) for future in own.retiring]
        is_clean = True
        for future in retiring:
            error = future.exception()
            is_clean = is_clean and error is None
        self._loads.shutdown()
        self._retirements.shutdown()
        return is_clean

    # -- one model's change; everything below runs with that model's lock held -----------------------------------------

    def _change(self, name: str, change: Callable[[], None]) -> None:
        with self._locks.hold(name):
            if self._is_closed:
                raise ServingError(Reason.NODE_DRAINING, "the server is stopping; no model is loaded or unloaded any more")
            change()

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
        own = self._own.setdefault(name, _Own())
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
            own.tried = folder.whole_fingerprint
            self._wait_for_retirements(own)
            try:
                self._replace_versions(name, own, folder, config, stored, is_forced, leaves_out_incomplete)
            except ServingError as error:
                self._record_failure(name, folder, error.message)
                raise
        finally:
            if stored is not None:
                stored.release()

    def _replace_versions(
        self,
        name: str,
        own: _Own,
        folder: ModelFolder,
        config: ModelConfig | None,
        stored: _Files | None,
        is_forced: bool,
        leaves_out_incomplete: bool,
    ) -> None:
        is_from_request = config is not None
        written = _config_of(name, folder) if config is None else config
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
        wanted = {
            text: (is_from_request, content, id(stored) if stored else None, folder.fingerprint(text))
            for text in choice.texts
        }
        model = self._models.get(name) or _Model(name)
        serving = {text: entry.placement for text, entry in model.entries.items() if entry.is_ready and entry.placement}
        changed = [text for text in choice.texts if text not in serving or serving[text].fingerprint != wanted[text]]
        if is_forced and not changed and serving.keys() == wanted.keys():
            changed = list(choice.texts)
        loaded = self._load_versions(name, folder, written, is_from_request, changed, wanted) if changed else {}
        leaving = [placement for text, placement in serving.items() if text in loaded or text not in wanted]
        if not leaving and not loaded:
            self._name_versions(name, folder, is_wanted=True)
            return
        if stored is not None:
            for _ in loaded:
                stored.keep()
        previous, own.files = own.files, stored if loaded and stored is not None else own.files
        self._switch(name, folder, loaded, leaving)
        for text, placement in loaded.items():
            _LOG.info(
                "model %s version %s is ready after %.2f s",
                name,
                text,
                placement.load_seconds,
                extra={"model": name, "version": text},
            )
        del previous
        self._retire(name, own, leaving)

    def _load_versions(
        self,
        name: str,
        folder: ModelFolder,
        config: ModelConfig,
        is_from_request: bool,
        texts: Sequence[str],
        fingerprints: Mapping[str, tuple[Any, ...]],
    ) -> dict[str, Placement]:
        """Loads all of them or none. Raises ServingError with the first reason, by version."""
        requests = {text: LoadRequest(folder, text, config, is_from_request) for text in texts}
        # Mistakes in the configuration are told before the first session is opened.
        self._loader.check(requests[texts[0]])
        placements = {text: Placement(name, text) for text in texts}
        for text, placement in placements.items():
            placement.fingerprint = fingerprints[text]
        self._show_loading(name, placements)
        futures = {text: self._loads.submit(self._load_one, requests[text], placements[text]) for text in texts}
        failures: dict[str, Exception] = {}
        for text, future in futures.items():
            error = future.exception()
            if isinstance(error, Exception):
                failures[text] = error
            elif error is not None:
                raise error
        if not failures:
            return placements
        for text, placement in placements.items():
            if text not in failures and placement.native is not None:
                self._free(placement)
                placement.move(Event.BROKE, f"another version of model {name!r} could not be loaded")
        text, first = next(iter(failures.items()))
        if isinstance(first, ServingError):
            raise first
        _LOG.error("model %s version %s: unexpected failure of a load", name, text, exc_info=first)
        raise ServingError(
            Reason.LOAD_FAILED,
            f"model {name!r} version {text!r} cannot be loaded: internal error ({type(first).__name__}); see the log",
        ) from first

    def _load_one(self, request: LoadRequest, placement: Placement) -> None:
        placement.move(Event.STARTED, "loading")
        try:
            loaded = self._loader.load(request, on_open=lambda: placement.move(Event.OPENED, "warming up"))
        except Exception as error:
            message = error.message if isinstance(error, ServingError) else f"internal error ({type(error).__name__})"
            placement.move(Event.BROKE, message)
            raise
        placement.config = loaded.config
        placement.settings = loaded.settings
        placement.weights_bytes = loaded.weights_bytes
        placement.load_seconds = loaded.load_seconds
        placement.native = loaded.native

    def _switch(
        self, name: str, folder: ModelFolder, loaded: Mapping[str, Placement], leaving: Sequence[Placement]
    ) -> None:
        """Publishes the loaded versions in the place of the leaving ones."""

        def update(model: _Model) -> _Model:
            entries = dict(model.entries)
            for text, placement in loaded.items():
                entries[text] = _Entry(text, placement)
            return replace(
                model, entries=_named_entries(entries, folder, _NOT_LOADED), reason="", is_wanted=True
            )

        for placement in loaded.values():
            placement.move(Event.PUBLISHED)
        for placement in leaving:
            placement.move(Event.DISMISSED, _UNLOADED)
        try:
            self._update(name, update)
        except Exception as error:
            # The old table is still in force: put back what it names.
            for placement in loaded.values():
                placement.move(Event.DISMISSED)
                self._free(placement)
                placement.move(Event.DRAINED)
                placement.move(Event.FREED)
            for placement in leaving:
                placement.move(Event.KEPT)
            _LOG.exception("the route table could not be published")
            raise ServingError(
                Reason.LOAD_FAILED, f"model {name!r}: the route table could not be published; see the log"
            ) from error

    def _remove(self, name: str) -> None:
        """Takes every version out of the route and lets go of it."""
        own = self._own.setdefault(name, _Own())
        own.tried = None
        model = self._models.get(name)
        if model is None:
            return
        leaving = [entry.placement for entry in model.entries.values() if entry.is_ready and entry.placement]
        for placement in leaving:
            placement.move(Event.DISMISSED, _UNLOADED)

        def update(model: _Model) -> _Model:
            entries = {
                text: replace(entry, reason=_UNLOADED) if entry.placement in leaving else entry
                for text, entry in model.entries.items()
            }
            return replace(model, entries=MappingProxyType(entries), reason=_UNLOADED, is_wanted=False)

        self._update(name, update)
        for placement in leaving:
            _LOG.info(
                "model %s version %s left the route",
                name,
                placement.version,
                extra={"model": name, "version": placement.version},
            )
        self._retire(name, own, leaving)
