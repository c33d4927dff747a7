"""One `tidegate serve` child process: started, waited for, looked at, stopped.

The demo and the load tests start servers only through this class, so that each is a process of its own (as in
production), listens on ports the operating system picked, and is ended by its own process id whatever happens.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import server

# A cold start loads ONNX Runtime and every initial model; on a busy two-core machine that is a few seconds.
READY_TIMEOUT_S = 120.0
# Longer than --exit-timeout's 30 s, so that a server that drains to its own limit is not ended by us.
STOP_TIMEOUT_S = 45.0
LOG_TAIL_LINES = 30


class ServeFailed(Exception):
    """The child did not become ready, or ended by itself. `log_tail` has the end of its log."""

    def __init__(self, message: str, log_tail: str) -> None:
        super().__init__(message)
        self.log_tail = log_tail


def serve_command() -> list[str]:
    """`tidegate` of this interpreter's environment; the module where the command is not installed."""
    script = Path(sys.executable).with_name("tidegate")
    return [str(script), "serve"] if script.exists() else [sys.executable, "-m", "server", "serve"]


class ServeProcess:
    """A running `tidegate serve`. Use as a context manager; `stop()` inside it to see the exit status."""

    def __init__(
        self,
        repository: Path,
        log: Path,
        *,
        flags: Sequence[str] = (),
        prefix: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
    ) -> None:
        """Does not start yet. `flags` go to `serve`; `prefix` comes before the command, e.g. ("taskset", "-c", "0")."""
        self.command = [
            *prefix,
            *serve_command(),
            "--model-repository",
            str(repository),
            "--grpc-port",
            "0",
            "--metrics-port",
            "0",
            *flags,
        ]
        self.log = log
        self.grpc_port = 0
        self.metrics_port = 0
        self.started_in_s = 0.0
        self._env = {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None

    # -- life ----------------------------------------------------------------------------------------------------------

    def start(self, timeout_s: float = READY_TIMEOUT_S) -> dict[str, Any]:
        """Starts the child and returns its ready line. Raises ServeFailed when none comes in time."""
        began = time.monotonic()
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self._env,
                # `-m server` must find the package this module belongs to, wherever the caller stands.
                cwd=Path(server.__file__).parent.parent,
            )
        try:
            ready = self._wait_for_ready_line(began + timeout_s)
        except BaseException:
            self.stop(timeout_s=2.0)
            raise
        self.started_in_s = time.monotonic() - began
        self.grpc_port, self.metrics_port = int(ready["grpc_port"]), int(ready["metrics_port"])
        return ready

    def _wait_for_ready_line(self, until: float) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        pipe, pending = self._process.stdout.fileno(), b""
        with selectors.DefaultSelector() as selector:
            selector.register(pipe, selectors.EVENT_READ)
            while (left := until - time.monotonic()) > 0:
                if not selector.select(left):
                    break
                chunk = os.read(pipe, 65536)
                if not chunk:
                    status = self._process.wait(timeout=10)
                    raise ServeFailed(f"the server ended with status {status} before it was ready", self.log_tail())
                *lines, pending = (pending + chunk).split(b"\n")
                for line in lines:
                    with contextlib.suppress(ValueError):
                        value = json.loads(line)
                        if isinstance(value, dict) and value.get("event") == "ready":
                            return value
        raise ServeFailed("the server printed no ready line in time", self.log_tail())

    def stop(self, timeout_s: float = STOP_TIMEOUT_S) -> int | None:
        """Asks the child to end (SIGTERM) and returns its exit status; ends it by force at the timeout. Idempotent.

        The status is negative when a signal ended it, -9 also when it had to be forced. None when it never started.
        """
        process = self._process
        if process is None:
            return None
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(timeout=timeout_s)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process.stdout is not None:
            process.stdout.close()
        return process.returncode

    def __enter__(self) -> ServeProcess:
        if self._process is None:
            self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    # -- looking at it -------------------------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        """Process id. Raises RuntimeError before start()."""
        if self._process is None:
            raise RuntimeError("the server has not been started")
        return self._process.pid

    @property
    def grpc_address(self) -> str:
        """HOST:PORT for gRPC clients."""
        return f"127.0.0.1:{self.grpc_port}"

    def is_running(self) -> bool:
        """Whether the child is alive."""
        return self._process is not None and self._process.poll() is None

    def log_tail(self, lines: int = LOG_TAIL_LINES) -> str:
        """The last lines of the child's log."""
        try:
            return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])
        except OSError as why:
            return f"(no log: {why.strerror})"

    def metrics_text(self, timeout_s: float = 10.0) -> str:
        """The exposition text of /metrics. Raises OSError."""
        url = f"http://127.0.0.1:{self.metrics_port}/metrics"
        with urllib.request.urlopen(url, timeout=timeout_s) as answer:
            text: bytes = answer.read()
        return text.decode()

    def cpu_seconds(self) -> float:
        """CPU time that the child has used, user and system, all threads."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def rss_bytes(self) -> int:
        """Resident memory of the child."""
        return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
