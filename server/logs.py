"""Logs: one JSON object per line on stderr, and the settings that may change while the server runs.

A line has `ts`, `level`, `logger`, `message` and whatever the caller put into `extra` (`model`, `version`,
`request_id`, `error_id`, …). An exception's trace goes to `trace`: into the log, never into a reply.
"""

from __future__ import annotations

import json
import logging
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import Enum
from typing import IO

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}

# Higher than any level in use: nothing passes.
SILENT = logging.CRITICAL + 10

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
# What JSON leaves as it is and some readers take for the end of a line.
_LINE_ENDS = {ord(end): f"\\u{ord(end):04x}" for end in "\x7f\x85\u2028\u2029"}
_RESERVED = frozenset({"ts", "level", "logger", "message", "trace"})


class TimeFormat(Enum):
    """How `ts` is written. The names are those of the logging extension's `log_format`."""

    DEFAULT = "default"  # 2026-01-31T12:00:00.123456Z
    ISO8601 = "ISO8601"  # 2026-01-31T12:00:00Z


@dataclass(frozen=True, slots=True)
class LogSettings:
    """Which lines are written. Each level has its own switch, as in the logging extension; `verbose` > 0 is debug."""

    info: bool = True
    warning: bool = True
    error: bool = True
    verbose: int = 0
    time_format: TimeFormat = TimeFormat.DEFAULT

    @classmethod
    def from_level(cls, level: str) -> LogSettings:
        """Settings of `--log-level`: that level and everything above it."""
        number = LEVELS[level]
        return cls(
            info=number <= logging.INFO,
            warning=number <= logging.WARNING,
            error=True,
            verbose=1 if number <= logging.DEBUG else 0,
        )

    def allows(self, level: int) -> bool:
        """Whether a line of this level is written."""
        if level < logging.INFO:
            return self.verbose > 0
        if level < logging.WARNING:
            return self.info
        return self.warning if level < logging.ERROR else self.error

    def lowest(self) -> int:
        """The lowest level that is written; SILENT when none is."""
        return next((level for level in LEVELS.values() if self.allows(level)), SILENT)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def __init__(self, time_format: TimeFormat = TimeFormat.DEFAULT) -> None:
        super().__init__()
        self.time_format = time_format

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end. Values that JSON does not know are written as text."""
        line: dict[str, object] = {
            "ts": self._time(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name, value in vars(record).items():
            if name not in _STANDARD and name not in _RESERVED:
                line[name] = value
        if record.exc_info:
            line["trace"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str).translate(_LINE_ENDS)

    def _time(self, created_s: float) -> str:
        at = datetime.fromtimestamp(created_s, UTC)
        timespec = "seconds" if self.time_format is TimeFormat.ISO8601 else "microseconds"
        return at.isoformat(timespec=timespec).replace("+00:00", "Z")


class Logs:
    """The process's log output. One object; `apply` may be called from any thread.

    `set_native_level` takes the lowest level that the native core writes. The core knows a threshold only, so of
    switches that leave a gap (info on, warning off) it follows the lowest one that is on.
    """

    def __init__(
        self,
        settings: LogSettings,
        set_native_level: Callable[[int], None],
        stream: IO[str] | None = None,
        root: logging.Logger | None = None,
    ) -> None:
        self._lock = threading.Lock()
        self._root = root or logging.getLogger()
        self._settings = settings
        self._set_native_level = set_native_level
        self._formatter = JsonFormatter(settings.time_format)
        self._handler = logging.StreamHandler(stream or sys.stderr)
        self._handler.setFormatter(self._formatter)
        self._handler.addFilter(lambda record: self._settings.allows(record.levelno))

    def install(self) -> None:
        """Makes this the only output of the root logger and applies the settings."""
        self._root.handlers[:] = [self._handler]
        logging.captureWarnings(True)
        self.apply(self._settings)

    @property
    def settings(self) -> LogSettings:
        """What is in force."""
        return self._settings

    def apply(self, settings: LogSettings) -> None:
        """Puts settings in force for Python's and the native core's lines."""
        with self._lock:
            self._settings = settings
            self._formatter.time_format = settings.time_format
            self._root.setLevel(settings.lowest())
            self._set_native_level(settings.lowest())
