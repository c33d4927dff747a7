"""The configuration of `tidegate serve`: text from flags and environment -> one frozen value.

Every mistake is told at once: an operator who has three of them learns so in one start, not in three.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
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


def _option(parse: Callable[[str], Any], default: Any = None, *, help: str) -> Any:  # noqa: A002
    # A default of None means required, or worked out from the machine; see `default_text`.
    return field(default=default, metadata={"parse": parse, "help": help})


# -- the value ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeConfig:
    """Everything `tidegate serve` can be told. Times in seconds, sizes in bytes."""

    # fmt: off
    model_repository: Path = _option(  # noqa: RUF009 - dataclasses.field, with what text means
        _directory, help="Directory that holds MODEL/VERSION/model.onnx and, where wanted, MODEL/config.pbtxt.")
    model_control_mode: ControlMode = _option(  # noqa: RUF009
        _mode, ControlMode.NONE,
        help="What changes the loaded models: none (all are loaded at the start), poll (the repository is looked at "
        "again and again), explicit (load and unload requests).")
    repository_poll_secs: float = _option(_seconds(0.1), 15.0, help="With poll: time between two looks.")
    load_model: tuple[str, ...] = field(
        default=(), metadata={"help": "With explicit: a model to load at the start, * for all. May be repeated."})
    model_load_thread_count: int = _option(_whole(1, 64), 4, help="Loads that run side by side.")
    default_max_batch_size: int = _option(
        _whole(0, 65536), 64, help="max_batch_size of models that can batch and do not say; 0 switches batching off.")

    host: str = _option(_host, "127.0.0.1", help="Address to listen on; 0.0.0.0 for every interface.")
    grpc_port: int = _option(_port, 8001, help="gRPC port; 0 picks a free one.")
    metrics_port: int = _option(_port, 8002, help="HTTP port of /metrics; 0 picks a free one.")

    io_threads: int = field(
        default_factory=lambda: min(4, available_cores()),
        metadata={"parse": _whole(1, MOST_IO_THREADS), "help": "Event loops of the front end."})
    max_message_bytes: int = _option(
        _bytes(1024, MOST_MESSAGE_BYTES), 64 << 20, help="Largest request message, also after decompression.")
    max_inflight_bytes: int = _option(
        _bytes(1024), 256 << 20, help="Most bytes of messages held at once; beyond it requests are refused.")
    max_connections: int = _option(_whole(1), 10_000, help="Most connections; beyond it new ones are closed.")
    max_streams: int = _option(_whole(1, 2**31 - 1), 1_000, help="Most concurrent calls on one connection.")

    keepalive_time: float = _option(
        _seconds(1.0), 7200.0, help="Silence after which a connection is asked whether it lives.")
    keepalive_timeout: float = _option(_seconds(0.1), 20.0, help="Time to answer that.")
    handshake_timeout: float = _option(_seconds(0.1), 10.0, help="Time for a new connection to speak HTTP/2.")
    max_connection_age: float = _option(
        _seconds(), 0.0, help="Age at which a connection is asked to go, so that balancers can spread; 0: never.")
    max_connection_age_grace: float = _option(_seconds(), 30.0, help="Time that its calls then have to end.")
    max_connection_idle: float = _option(_seconds(), 0.0, help="Time without calls after which it is asked; 0: never.")

    shutdown_grace: float = _option(
        _seconds(), 0.0, help="Time between the first word of a stop and the closing of the door.")
    exit_timeout: float = _option(_seconds(), 30.0, help="Time for calls in flight to end at a stop.")
    log_level: str = _option(
        _choice(list(LEVELS)), "info", help="Least severe lines to log: " + ", ".join(LEVELS) + ".")
    # fmt: on


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
    if default is None or default == ():
        return "none" if default == () else "required"
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
    unreadable = {name for name, text in texts.items() if text is not None and name not in values}
    problems += _contradictions(values, unreadable)
    if problems:
        raise ConfigError(problems)
    return ServeConfig(**values)


def _contradictions(values: Mapping[str, Any], unreadable: Collection[str]) -> list[str]:
    """Values that are each fine and do not fit together. Of what could not be read nothing more is said."""

    def value(name: str) -> Any:
        return values.get(name, next(f.default for f in fields(ServeConfig) if f.name == name))

    def is_known(*names: str) -> bool:
        return not any(name in unreadable for name in names)

    problems = []
    mode = value("model_control_mode")
    if value("load_model") and mode is not ControlMode.EXPLICIT and is_known("model_control_mode"):
        problems.append(f"--load-model needs --model-control-mode explicit: with {mode.value} every model is loaded")
    if any(not name.strip() for name in value("load_model")):
        problems.append("--load-model is empty: write a model's name, or * for all")
    if "repository_poll_secs" in values and mode is not ControlMode.POLL and is_known("model_control_mode"):
        problems.append(f"--repository-poll-secs needs --model-control-mode poll: with {mode.value} nothing is polled")
    if value("grpc_port") == value("metrics_port") != 0 and is_known("grpc_port", "metrics_port"):
        problems.append(f"--grpc-port and --metrics-port are both {value('grpc_port')}: give them different ports")
    is_known_size = is_known("max_inflight_bytes", "max_message_bytes")
    if value("max_inflight_bytes") < value("max_message_bytes") and is_known_size:
        problems.append("--max-inflight-bytes is below --max-message-bytes: no message of that size could ever be read")
    return problems
