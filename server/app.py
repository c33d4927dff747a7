"""`tidegate serve`: builds every object once, starts them, serves, drains. In reading order.

    start    ports are bound, health answers; models are loaded beside it
    ready    each initial model is READY or has failed: SERVING, and the ready line goes to stdout
    stop     SIGTERM or SIGINT: NOT_SERVING at once; after --shutdown-grace GOAWAY; what is in flight is finished within
             --exit-timeout; models are freed. A second signal ends the process at once.

Threads    The main thread only waits for news (started, stop), so that signals are seen at once; the start runs on a
           thread of its own because a load may take minutes.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from types import FrameType
from typing import IO, Any

from server import cuda_libraries
from server.config import ControlMode, ServeConfig
from server.errors import Reason, ServingError
from server.gpus import Gpus
from server.loader import Loader, find_runtime_library, machine_of
from server.logs import Logs, LogSettings
from server.manager import Manager
from server.metrics import Metrics
from server.metrics_server import MetricsServer
from server.model_config import Machine
from server.rpc.health import Health, Phase
from server.rpc.metadata import Metadata
from server.rpc.reflection import Reflection
from server.rpc.repository import Repository
from server.rpc.settings import Settings
from server.slow_rpc import SERVICES, SlowRpcs, method_table

_LOG = logging.getLogger(__name__)

# After the front end has stopped its waiting threads return at once; handlers that still run are given up.
_SLOW_THREADS_END_S = 2.0

_STARTED, _STOP = "started", "stop"


class StartError(Exception):
    """The server cannot be started. The message says what to do."""


class App:
    """One data plane. run() once; stop() from any thread or signal handler."""

    def __init__(
        self, config: ServeConfig, native: Any, machine: Machine, logs: Logs, versions: dict[str, str]
    ) -> None:
        """`native` is `server._native` or what stands in for it; `versions` are told by ServerMetadata and /metrics."""
        self._config = config
        self._news: SimpleQueue[str] = SimpleQueue()
        self._is_clean = True

        loader = Loader(native, machine, default_max_batch_size=config.default_max_batch_size)
        self.manager = Manager(
            config.model_repository,
            loader,
            native,
            self._publish,
            control_mode=config.model_control_mode,
            load_models=config.load_model,
            load_threads=config.model_load_thread_count,
            drain_timeout_s=config.exit_timeout,
        )
        self.health = Health(self.manager)
        self._slow = SlowRpcs(
            method_table(
                Metadata(self.manager, self.health, versions["version"]),
                Repository(self.manager),
                Settings(logs, self.manager),
                self.health,
                Reflection(SERVICES),
            )
        )
        self._frontend = native.Frontend(frontend_settings(native, config), self._slow.declarations())
        self._metrics = Metrics(
            self.manager, self._frontend.counters, native.live_objects, versions=versions, gpus=Gpus().read
        )
        self._metrics_server: MetricsServer | None = None
        self.grpc_port = 0
        self.metrics_port = 0

    def _publish(self, routes: Any) -> None:
        # The manager exists before the front end, which needs the table of methods, which needs the manager.
        self._frontend.publish(routes)

    def run(self, out: IO[str]) -> bool:
        """Serves until stop(). The ready line goes to `out`.

        True when everything ended by itself; False when a load or a request had to be given up: then threads live on,
        and the process should end without waiting for them. Raises StartError.
        """
        self.start()
        threading.Thread(target=self._load_initial_models, name="start", daemon=True).start()
        if self._news.get() == _STARTED:
            self.health.enter(Phase.SERVING)
            self.say_ready(out)
            while self._news.get() != _STOP:
                pass
        self.drain()
        return self._is_clean

    def stop(self) -> None:
        """Makes run() drain and return. Also before it is ready."""
        self._news.put(_STOP)

    # -- start ---------------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Binds both ports and answers: alive, not ready. Raises StartError."""
        config = self._config
        try:
            self._metrics_server = MetricsServer(config.host, config.metrics_port, self._metrics.text)
        except OSError as error:
            raise StartError(
                f"--metrics-port: cannot listen on {config.host} port {config.metrics_port}: "
                f"{error.strerror or error}; choose another port, or 0 for a free one"
            ) from error
        self.metrics_port = self._metrics_server.port
        try:
            self.grpc_port = self._frontend.start()
        except Exception as error:
            self._metrics_server.close()
            raise StartError(f"--grpc-port: {getattr(error, 'message', error)}") from error
        self._metrics_server.start()
        self.health.start()
        self._slow.start(self._frontend)
        _LOG.info("listening: gRPC on port %d, metrics on port %d", self.grpc_port, self.metrics_port)

    def _load_initial_models(self) -> None:
        try:
            self.manager.load_all()
            if self._config.model_control_mode is ControlMode.POLL:
                self.manager.start_polling(self._config.repository_poll_secs)
        except Exception:
            # Nothing that a model can do comes here. The server stays up: what was loaded can be used.
            _LOG.exception("the start failed")
        self._news.put(_STARTED)

    def say_ready(self, out: IO[str]) -> None:
        """Prints the one line that tells whoever started us where we listen."""
        ready = len({placement.name for placement in self.manager.placements()})
        _LOG.info("ready: %d of %d models serve", ready, len(self.manager.known()))
        line = {"event": "ready", "grpc_port": self.grpc_port, "metrics_port": self.metrics_port, "pid": os.getpid()}
        try:
            out.write(json.dumps(line) + "\n")
            out.flush()
        except OSError as error:
            _LOG.warning("the ready line could not be written: %s", error.strerror)

    # -- the end -------------------------------------------------------------------------------------------------------

    def drain(self) -> None:
        """Ends everything in the order in which clients notice least: first the word, then the door, then the work."""
        config = self._config
        _LOG.info("stopping: not serving any more")
        self.health.enter(Phase.STOPPING)
        # Balancers need a moment to look elsewhere; whoever still comes is served.
        threading.Event().wait(config.shutdown_grace)
        deadline = time.monotonic() + config.exit_timeout

        def left() -> float:
            return max(0.0, deadline - time.monotonic())

        # Who only listens would hold up the drain.
        self._slow.end_streams(Reason.NODE_DRAINING, "the server is stopping")
        if not self._frontend.drain(left()):
            _LOG.warning("stopping: calls were still open after %g s and are ended", config.exit_timeout)
        self._is_clean = self.manager.close(left())
        self._slow.close()
        self._frontend.stop()
        self._slow.join(_SLOW_THREADS_END_S)
        self.health.stop()
        if self._metrics_server is not None:
            self._metrics_server.close()
        _LOG.info("stopped%s", "" if self._is_clean else "; a load or a request had to be given up")


def frontend_settings(native: Any, config: ServeConfig) -> Any:
    """What the front end needs of the configuration."""
    return native.FrontendSettings(
        host=config.host,
        port=config.grpc_port,
        io_threads=config.io_threads,
        max_message_bytes=config.max_message_bytes,
        max_inflight_bytes=config.max_inflight_bytes,
        max_connections=config.max_connections,
        max_streams=config.max_streams,
        keepalive_time_s=config.keepalive_time,
        keepalive_timeout_s=config.keepalive_timeout,
        handshake_timeout_s=config.handshake_timeout,
        max_connection_age_s=config.max_connection_age,
        max_connection_age_grace_s=config.max_connection_age_grace,
        max_connection_idle_s=config.max_connection_idle,
    )


# -- the process -------------------------------------------------------------------------------------------------------


def open_runtime(native: Any) -> Machine:
    """Opens ONNX Runtime and looks what it offers here. Raises ServingError with what to install."""
    library = find_runtime_library()
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        importlib.metadata.version("onnxruntime-gpu")
        cuda_libraries.preload()
    native.ort_open(str(library))
    return machine_of(native.ort_providers())


def own_version() -> str:
    """The version of the installed distribution."""
    try:
        return importlib.metadata.version("tidegate")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def raise_file_limit() -> None:
    """A connection is an open file: takes as many as the system lets us have."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    _LOG.debug("open files: limit raised from %d to %d", soft, resource.getrlimit(resource.RLIMIT_NOFILE)[0])


@contextlib.contextmanager
def stopping_on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `stop` once; after that both do what they do by default: end the process at once."""
    signals = (signal.SIGTERM, signal.SIGINT)

    def handle(_number: int, _frame: FrameType | None) -> None:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)
        stop()

    before = [signal.signal(number, handle) for number in signals]
    try:
        yield
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def run(config: ServeConfig) -> int:
    """`tidegate serve`: returns its exit code, 0 after a signal, 1 when it cannot start. Needs the main thread."""
    from server import _native  # noqa: PLC0415 - only a server needs it

    logs = Logs(LogSettings.from_level(config.log_level), _native.set_log_level)
    logs.install()
    raise_file_limit()
    try:
        machine = open_runtime(_native)
        versions = {"version": own_version(), "onnxruntime": _native.ort_version()}
        app = App(config, _native, machine, logs, versions)
        with stopping_on_signals(app.stop):
            is_clean = app.run(sys.stdout)
    except (StartError, ServingError, _native.NativeError) as error:
        print(f"tidegate serve: {getattr(error, 'message', error)}", file=sys.stderr)
        return 1
    if not is_clean:
        # Python would wait for the threads that were given up.
        logging.shutdown()
        sys.stdout.flush()
        os._exit(0)
    return 0
