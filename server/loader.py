"""Loads one version and frees it again: files -> sessions -> completed configuration -> a warm native version.

A load either gives a version that can be published or raises ServingError(LOAD_FAILED) and leaves nothing behind. The
native module comes in as an argument, so that tests can run without it.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import logging
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from server.errors import Reason, ServingError
from server.model_config import (
    ConfigError,
    Machine,
    check,
    complete,
    instance_groups,
    model_filename,
    model_settings,
    warmup_batches,
)
from server.onnx_file import OnnxFileError, check_model_file
from server.settings import SessionSettings
from server.source import ModelFolder, SourceError

if TYPE_CHECKING:
    from protos.gen.model_config_pb2 import ModelConfig
    from server._native import TensorInfo, Version, WarmupWarning
    from server.settings import ModelSettings, WarmupBatch

_LOG = logging.getLogger(__name__)

# Made-up warm-up batches stop growing once they have cost this much: a version that takes seconds a row should not take
# minutes to load.
_SYNTHETIC_WARMUP_S = 10.0

# Versions that never served have nothing to finish.
_DISCARD_TIMEOUT_S = 5.0

_DISTRIBUTIONS = ("onnxruntime-gpu", "onnxruntime")


class Session(Protocol):
    """What is used of a native session."""

    @property
    def inputs(self) -> list[TensorInfo]: ...
    @property
    def outputs(self) -> list[TensorInfo]: ...
    def close(self) -> None: ...


class Native(Protocol):
    """What is used of `server._native`; tests bring their own."""

    @property
    def NativeError(self) -> type[Exception]: ...  # noqa: N802 - a class
    @property
    def Session(self) -> Callable[[str, SessionSettings], Session]: ...  # noqa: N802
    @property
    def Version(self) -> Callable[[ModelSettings, Sequence[Any]], Version]: ...  # noqa: N802
    @property
    def VersionRoute(self) -> Callable[..., Any]: ...  # noqa: N802
    @property
    def ModelRoute(self) -> Callable[..., Any]: ...  # noqa: N802


def find_runtime_library() -> Path:
    """ONNX Runtime's shared library inside the installed wheel, the GPU one first.

    Raises ServingError(LOAD_FAILED) with the line to run when neither wheel is installed.
    """
    for name in _DISTRIBUTIONS:
        try:
            files = importlib.metadata.files(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found = sorted(
            (file for file in files if file.match("onnxruntime/capi/libonnxruntime.so.1.*")), key=lambda file: file.name
        )
        for file in reversed(found):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    raise ServingError(
        Reason.LOAD_FAILED,
        "ONNX Runtime is not installed: run `pip install 'tidegate[cpu]'`, or `pip install 'tidegate[gpu]'` for CUDA",
    )


def count_gpus() -> int:
    """CUDA devices that this process may use; 0 without a driver. The driver knows about CUDA_VISIBLE_DEVICES."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def machine_of(providers: Sequence[str]) -> Machine:
    """What the runtime library offers here. The driver is asked only when the library could use a GPU."""
    return Machine(tuple(providers), count_gpus() if "CUDAExecutionProvider" in providers else 0)


@dataclass(frozen=True, slots=True)
class LoadRequest:
    """One version to load. `config` is as written, not completed."""

    folder: ModelFolder
    version: str
    config: ModelConfig
    is_from_request: bool = False


@dataclass(frozen=True, slots=True)
class LoadedVersion:
    """A warm version that may be published."""

    native: Version
    config: ModelConfig
    settings: ModelSettings
    weights_bytes: int  # of the model's files, once per session
    load_seconds: float


class Loader:
    """Loads versions on the caller's thread; any number of threads at once."""

    def __init__(
        self,
        native: Native,
        machine: Machine,
        *,
        default_max_batch_size: int = 64,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._native = native
        self._machine = machine
        self._default_max_batch_size = default_max_batch_size
        self._clock = clock

    def check(self, request: LoadRequest) -> None:
        """The checks that need no file but the configuration. Raises ServingError(LOAD_FAILED)."""
        try:
            check(request.config, request.folder.name, self._machine, is_from_request=request.is_from_request)
        except ConfigError as error:
            raise _refusal(request, str(error)) from error

    def load(self, request: LoadRequest, on_open: Callable[[], None] = lambda: None) -> LoadedVersion:
        """Opens, completes, warms up and starts one version. `on_open` is called before the warm-up.

        Raises ServingError(LOAD_FAILED) with a reason that names no path; everything opened is closed then.
        """
        began = self._clock()
        opened: dict[Any, Session] = {}
        version: Version | None = None
        try:
            self.check(request)
            path = request.folder.model_path(request.version, model_filename(request.config))
            n_bytes = _bytes_of([path, *(path.parent / name for name in check_model_file(path))])
            groups = instance_groups(request.config, self._machine)
            sessions = []
            for group in groups:
                key = _hashable(group.session)
                if key not in opened:
                    opened[key] = self._native.Session(str(path), group.session)
                sessions.append(opened[key])
            config = complete(
                request.config,
                request.folder.name,
                sessions[0].inputs,
                sessions[0].outputs,
                self._machine,
                self._default_max_batch_size,
            )
            settings = model_settings(config, request.version, groups)
            version = self._native.Version(settings, sessions)
            on_open()
            self._warm_up(request, version, config)
            version.start()
        except Exception as error:
            if version is not None:
                _discard(version)
            if not isinstance(error, (ConfigError, OnnxFileError, SourceError, ServingError, self._native.NativeError)):
                raise
            raise _refusal(request, getattr(error, "message", None) or str(error)) from error
        finally:
            # The version keeps what it needs of them.
            for session in opened.values():
                session.close()
        return LoadedVersion(version, config, settings, n_bytes * len(opened), self._clock() - began)

    def _warm_up(self, request: LoadRequest, version: Version, config: ModelConfig) -> None:
        spent = last = 0.0
        for made in warmup_batches(config, request.folder.path):
            batch = made
            if not batch.required:
                if spent >= _SYNTHETIC_WARMUP_S:
                    _LOG.warning(
                        "warm-up of %s version %s ended before %d rows: %.1f s are enough",
                        request.folder.name,
                        request.version,
                        batch.rows,
                        spent,
                    )
                    return
                # The next size takes up to twice as long as the last.
                if spent + 2 * last > _SYNTHETIC_WARMUP_S:
                    batch = _once(batch)
            began = self._clock()
            warnings = version.warm_up([batch])
            last = self._clock() - began
            spent += last
            if warnings:
                self._warn(request, warnings)
                return  # What fails with zeros fails with more zeros.

    def _warn(self, request: LoadRequest, warnings: Sequence[WarmupWarning]) -> None:
        for warning in warnings:
            _LOG.warning(
                "made-up warm-up %r of %s version %s failed; add model_warmup for real data: %s",
                warning.name,
                request.folder.name,
                request.version,
                warning.message,
            )

    def unload(self, version: Version, timeout_s: float) -> bool:
        """Frees a version that no route names. False when running work had to be ended by force."""
        return version.retire(timeout_s)


def _once(batch: WarmupBatch) -> WarmupBatch:
    return type(batch)(batch.name, batch.rows, 1, batch.tensors, batch.required)


def _hashable(settings: SessionSettings) -> Any:
    """A key that is equal for sessions that may be shared."""

    def frozen(value: Any) -> Any:
        return tuple(sorted(value.items())) if isinstance(value, Mapping) else value

    providers = tuple((provider.name, frozen(provider.options)) for provider in settings.providers)
    names = [name for name in settings.__dataclass_fields__ if name != "providers"]
    return providers, tuple(frozen(getattr(settings, name)) for name in names)


def _bytes_of(paths: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _discard(version: Version) -> None:
    try:
        version.retire(_DISCARD_TIMEOUT_S)
    except Exception:
        # The load's own error is what counts; this one must not hide it.
        _LOG.exception("a version that failed to load could not be freed")


_PATH = re.compile(r"(?<![\w.])/(?:[^\s/:'\"]+/)+([^\s/:'\"]*)")


def without_paths(message: str) -> str:
    """The message with every absolute path cut down to its last part: it goes to clients."""
    return _PATH.sub(r"\1", message)


def _refusal(request: LoadRequest, message: str) -> ServingError:
    shown = without_paths(" ".join(message.split()))
    prefix = f"model {request.folder.name!r} version {request.version!r} "
    # A refusal that has been through here once already says which version it is about.
    return ServingError(Reason.LOAD_FAILED, shown if shown.startswith(prefix) else f"{prefix}cannot be loaded: {shown}")
