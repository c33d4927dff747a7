"""The configuration of `tidegate serve`: text from flags and environment -> one frozen value.

Every mistake is told at once: an operator who has three of them learns so in one start, not in three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from server.cpus import available_cores
from server.logs import LEVELS

# The native core counts per I/O thread in arrays of this size (ext/serving/version.h).
MOST_IO_THREADS = 64

# gRPC states message lengths in 32 bits and clients stop at 2^31 - 1.
MOST_MESSAGE_BYTES = 2**31 - 1


class ControlMode(Enum):
    """What may change the set of loaded models while the server runs."""

    NONE = "none"
    POLL = "poll"
    EXPLICIT = "explicit"


class ConfigError(Exception):
    """The configuration cannot be used. `problems` has one line per mistake, each naming its flag."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = tuple(problems)


# -- from text ---------------------------------------------------------------------------------------------------------


def _whole(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch(r"[+-]?\d+", text.strip()):
            raise ValueError("is not a whole number")
        return _within(int(text), least, most)

    return parse


def _within(number: int, least: int, most: int | None) -> int:
    if number < least or (most is not None and number > most):
        raise ValueError(f"must be {least} or more" if most is None else f"must be from {least} to {most}")
    return number


_UNIT_BYTES = {"": 1, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}


def _bytes(least: int, most: int | None = None) -> Callable[[str], int]:
    def parse(text: str) -> int:
        match = re.fullmatch(r"(\d+)\s*(|kib|mib|gib)", text.strip().lower())
        if not match:
            raise ValueError("is not a size: write bytes, or a number with KiB, MiB or GiB")
        return _within(int(match[1]) * _UNIT_BYTES[match[2]], least, most)

    return parse


_UNIT_SECONDS = {"": 1.0, "ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


def _seconds(least: float = 0.0) -> Callable[[str], float]:
    def parse(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|ms|s|m|h)", text.strip().lower())
        if not match:
            raise ValueError("is not a duration: write seconds, or a number with ms, s, m or h")
        seconds = float(match[1]) * _UNIT_SECONDS[match[2]]
        if seconds < least:
            raise ValueError(f"must be {least:g} s or more")
        return seconds

    return parse


def _choice(names: Sequence[str]) -> Callable[[str], str]:
    def parse(text: str) -> str:
        name = text.strip().lower()
        if name not in names:
            raise ValueError(f"must be one of {', '.join(names)}")
        return name

    return parse


def _mode(text: str) -> ControlMode:
    return ControlMode(_choice([mode.value for mode in ControlMode])(text))


def _directory(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_dir():
        raise ValueError("is not a directory")
    return path


def _host(text: str) -> str:
    if not text.strip():
        raise ValueError("is empty: write 127.0.0.1 for this machine only or 0.0.0.0 for every interface")
    return text.strip()


_port = _whole(0, 65535)


def _option(parse: Callable[[str], Any], default: Any = None) -> Any:
    # A default of None means required, or worked out from the machine; see `default_text`.
    return field(default=default, metadata={"parse": parse})


# -- the value ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `tidegate serve` can be told. Times in seconds, sizes in bytes."""

    model_repository: Path = _option(_directory)
    model_control_mode: ControlMode = _option(_mode, ControlMode.NONE)
    repository_poll_secs: float = _option(_seconds(0.1), 15.0)
    load_model: tuple[str, ...] = ()
    model_load_thread_count: int = _option(_whole(1, 64), 4)
    default_max_batch_size: int = _option(_whole(0, 65536), 64)  # 0: auto-completion does not switch batching on

    host: str = _option(_host, "127.0.0.1")
    grpc_port: int = _option(_port, 8001)
    metrics_port: int = _option(_port, 8002)

    io_threads: int = field(
        default_factory=lambda: min(4, available_cores()), metadata={"parse": _whole(1, MOST_IO_THREADS)}
    )
    max_message_bytes: int = _option(_bytes(1024, MOST_MESSAGE_BYTES), 64 << 20)
    max_inflight_bytes: int = _option(_bytes(1024), 256 << 20)
    max_connections: int = _option(_whole(1), 10_000)
    max_streams: int = _option(_whole(1, 2**31 - 1), 1_000)

    keepalive_time: float = _option(_seconds(1.0), 7200.0)
    keepalive_timeout: float = _option(_seconds(0.1), 20.0)
    handshake_timeout: float = _option(_seconds(0.1), 10.0)
    max_connection_age: float = _option(_seconds(), 0.0)  # 0: no limit
    max_connection_age_grace: float = _option(_seconds(), 30.0)
    max_connection_idle: float = _option(_seconds(), 0.0)  # 0: no limit

    shutdown_grace: float = _option(_seconds(), 0.0)
    exit_timeout: float = _option(_seconds(), 30.0)
    log_level: str = _option(_choice(list(LEVELS)), "info")


def flag(name: str) -> str:
    """The flag of a field: `grpc_port` -> `--grpc-port`."""
    return "--" + name.replace("_", "-")


def environment_variable(name: str) -> str:
    """The environment variable that stands in for a flag that is not given."""
    return "TIDEGATE_" + name.upper()


def default_text(name: str) -> str:
    """The default of a field as `--help` shows it."""
    if name == "io_threads":
        return "cores, at most 4"
    default = next(f.default for f in fields(ServeConfig) if f.name == name)
    if isinstance(default, Enum):
        return str(default.value)
    if name.endswith("_bytes"):
        return f"{default >> 20}MiB"
    return f"{default:g}s" if isinstance(default, float) else str(default)


def serve_config(texts: Mapping[str, str | Sequence[str] | None]) -> ServeConfig:
    """Makes the configuration from what was given: field name -> text, or None where nothing was.

    Raises ConfigError with every problem found.
    """
    problems: list[str] = []
    values: dict[str, Any] = {}
    for option in fields(ServeConfig):
        text = texts.get(option.name)
        if text is None:
            if option.name == "model_repository":
                problems.append("--model-repository is missing: name the directory that holds one folder per model")
            continue
        if not isinstance(text, str):
            values[option.name] = tuple(text)
            continue
        try:
            values[option.name] = option.metadata["parse"](text)
        except ValueError as error:
            problems.append(f"{flag(option.name)} {text!r} {error}")
    problems += _contradictions(values)
    if problems:
        raise ConfigError(problems)
    return ServeConfig(**values)


def _contradictions(values: Mapping[str, Any]) -> list[str]:
    """Values that are each fine and do not fit together. Looks at what could be read and takes defaults for the rest."""

    def value(name: str) -> Any:
        return values.get(name, next(f.default for f in fields(ServeConfig) if f.name == name))

    problems = []
    mode = value("model_control_mode")
    if value("load_model") and mode is not ControlMode.EXPLICIT:
        problems.append(
            f"--load-model needs --model-control-mode explicit: with {mode.value} every model of the repository is loaded"
        )
    if any(not name.strip() for name in value("load_model")):
        problems.append("--load-model is empty: write a model's name, or * for all")
    if "repository_poll_secs" in values and mode is not ControlMode.POLL:
        problems.append(f"--repository-poll-secs needs --model-control-mode poll: with {mode.value} nothing is polled")
    if value("grpc_port") == value("metrics_port") != 0:
        problems.append(f"--grpc-port and --metrics-port are both {value('grpc_port')}: give them different ports")
    if value("max_inflight_bytes") < value("max_message_bytes"):
        problems.append("--max-inflight-bytes is below --max-message-bytes: no message of that size could ever be read")
    return problems
