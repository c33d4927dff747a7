"""The configuration of `tidegate serve`: every flag, and every mistake told at once."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server.config import (
    ConfigError,
    ControlMode,
    ServeConfig,
    default_text,
    environment_variable,
    flag,
    serve_config,
)
from server.cpus import available_cores

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


def config(folder: Path, **texts: Any) -> ServeConfig:
    return serve_config({"model_repository": str(folder), **texts})


def problems(**texts: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        serve_config(texts)
    return raised.value.problems


def test_defaults_are_those_that_are_shown(tmp_path: Path) -> None:
    chosen = config(tmp_path)
    assert chosen == ServeConfig(model_repository=tmp_path)
    assert (chosen.host, chosen.grpc_port, chosen.metrics_port) == ("127.0.0.1", 8001, 8002)
    assert chosen.model_control_mode is ControlMode.NONE
    assert chosen.io_threads == min(4, available_cores())
    assert (chosen.max_message_bytes, chosen.max_inflight_bytes) == (64 * MIB, 256 * MIB)
    assert (chosen.shutdown_grace, chosen.exit_timeout, chosen.log_level) == (0.0, 30.0, "info")
    assert default_text("max_message_bytes") == "64MiB"
    assert default_text("keepalive_time") == "7200s"
    assert default_text("model_control_mode") == "none"
    assert default_text("model_repository") == "required"
    assert default_text("io_threads") == "cores, at most 4"


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("model_control_mode", "explicit", ControlMode.EXPLICIT),
        ("model_control_mode", " Poll ", ControlMode.POLL),
        ("model_load_thread_count", "8", 8),
        ("default_max_batch_size", "0", 0),
        ("host", "0.0.0.0", "0.0.0.0"),  # noqa: S104 - nothing listens
        ("grpc_port", "0", 0),
        ("metrics_port", "65535", 65535),
        ("io_threads", "64", 64),
        ("max_message_bytes", "1024", 1024),
        ("max_message_bytes", "8 KiB", 8 * KIB),
        ("max_message_bytes", "2MiB", 2 * MIB),
        ("max_inflight_bytes", "4gib", 4 * GIB),
        ("max_connections", "1", 1),
        ("max_streams", "250", 250),
        ("keepalive_time", "2h", 7200.0),
        ("keepalive_timeout", "500ms", 0.5),
        ("handshake_timeout", "3", 3.0),
        ("max_connection_age", "1.5m", 90.0),
        ("max_connection_age_grace", "0", 0.0),
        ("max_connection_idle", "10s", 10.0),
        ("shutdown_grace", "5s", 5.0),
        ("exit_timeout", "0", 0.0),
        ("log_level", "DEBUG", "debug"),
    ],
)
def test_each_flag_is_read(tmp_path: Path, name: str, text: str, value: Any) -> None:
    assert getattr(config(tmp_path, **{name: text}), name) == value


def test_flags_that_go_with_a_mode(tmp_path: Path) -> None:
    assert config(tmp_path, model_control_mode="poll", repository_poll_secs="0.5").repository_poll_secs == 0.5
    explicit = config(tmp_path, model_control_mode="explicit", load_model=["a", "b"])
    assert explicit.load_model == ("a", "b")


@pytest.mark.parametrize(
    ("name", "text", "problem"),
    [
        ("model_repository", "/no/such/folder", "--model-repository '/no/such/folder' is not a directory"),
        ("model_control_mode", "all", "--model-control-mode 'all' must be one of none, poll, explicit"),
        ("grpc_port", "65536", "--grpc-port '65536' must be from 0 to 65535"),
        ("grpc_port", "80x", "--grpc-port '80x' is not a whole number"),
        ("grpc_port", "1e3", "--grpc-port '1e3' is not a whole number"),
        ("grpc_port", "", "--grpc-port '' is not a whole number"),
        ("metrics_port", "-1", "--metrics-port '-1' must be from 0 to 65535"),
        ("io_threads", "0", "--io-threads '0' must be from 1 to 64"),
        ("io_threads", "65", "--io-threads '65' must be from 1 to 64"),
        ("max_connections", "0", "--max-connections '0' must be 1 or more"),
        ("max_message_bytes", "64MB", "--max-message-bytes '64MB' is not a size: write bytes, or a number with KiB"),
        ("max_message_bytes", "2GiB", "--max-message-bytes '2GiB' must be from 1024 to 2147483647"),
        ("max_message_bytes", "1000", "--max-message-bytes '1000' must be from 1024"),
        ("keepalive_time", "soon", "--keepalive-time 'soon' is not a duration: write seconds, or a number with ms"),
        ("keepalive_time", "-5", "--keepalive-time '-5' is not a duration"),
        ("keepalive_time", "0.5", "--keepalive-time '0.5' must be 1 s or more"),
        ("exit_timeout", "inf", "--exit-timeout 'inf' is not a duration"),
        ("host", " ", "--host ' ' is empty"),
        ("log_level", "trace", "--log-level 'trace' must be one of debug, info, warning, error"),
    ],
)
def test_each_mistake_names_its_flag_and_the_cure(tmp_path: Path, name: str, text: str, problem: str) -> None:
    found = problems(**{"model_repository": str(tmp_path), name: text})
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_every_mistake_is_told_at_once() -> None:
    found = problems(model_repository="/no/such/folder", grpc_port="x", io_threads="0", log_level="loud", host="")
    assert [problem.split()[0] for problem in found] == [
        "--model-repository",
        "--host",
        "--grpc-port",
        "--io-threads",
        "--log-level",
    ]


def test_a_missing_repository_is_told() -> None:
    assert problems() == ("--model-repository is missing: name the directory that holds one folder per model",)


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        ({"load_model": ["a"]}, "--load-model needs --model-control-mode explicit: with none every model is loaded"),
        ({"load_model": ["a"], "model_control_mode": "poll"}, "--load-model needs --model-control-mode explicit"),
        ({"load_model": [" "], "model_control_mode": "explicit"}, "--load-model is empty"),
        ({"repository_poll_secs": "5"}, "--repository-poll-secs needs --model-control-mode poll"),
        ({"grpc_port": "8002"}, "--grpc-port and --metrics-port are both 8002"),
        ({"grpc_port": "9000", "metrics_port": "9000"}, "--grpc-port and --metrics-port are both 9000"),
        ({"max_inflight_bytes": "1MiB"}, "--max-inflight-bytes is below --max-message-bytes"),
    ],
)
def test_values_that_do_not_fit_together(tmp_path: Path, texts: dict[str, Any], problem: str) -> None:
    found = problems(model_repository=str(tmp_path), **texts)
    assert len(found) == 1
    assert found[0].startswith(problem)


def test_two_free_ports_may_both_be_zero(tmp_path: Path) -> None:
    assert config(tmp_path, grpc_port="0", metrics_port="0").grpc_port == 0


def test_what_cannot_be_read_is_not_also_called_a_contradiction(tmp_path: Path) -> None:
    found = problems(
        model_repository=str(tmp_path),
        model_control_mode="explicitly",
        load_model=["a"],
        repository_poll_secs="5",
        max_inflight_bytes="some",
        max_message_bytes="1GiB",
    )
    assert [problem.split()[0] for problem in found] == ["--model-control-mode", "--max-inflight-bytes"]


def test_every_field_has_a_flag_a_variable_and_a_help() -> None:
    for option in fields(ServeConfig):
        assert flag(option.name) == "--" + option.name.replace("_", "-")
        assert environment_variable(option.name) == "TIDEGATE_" + option.name.upper()
        assert option.metadata["help"].endswith(".")
        assert default_text(option.name)
