"""The `tidegate` command: flags, variables, mistakes, and what it does not load."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from server import cli
from server.config import ControlMode, ServeConfig, environment_variable, flag

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServeConfig]:
    """The configurations that servers would have been started with."""
    from server import app

    configs: list[ServeConfig] = []

    def run(config: ServeConfig) -> int:
        configs.append(config)
        return 0

    monkeypatch.setattr(app, "run", run)
    return configs


def invoke(*arguments: str, **environment: str) -> Any:
    return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200", "TERM": "dumb", **environment})


def test_serve_takes_flags(started: list[ServeConfig], tmp_path: Path) -> None:
    result = invoke(
        "serve", "--model-repository", str(tmp_path), "--grpc-port", "9001", "--model-control-mode", "explicit",
        "--load-model", "a", "--load-model=b", "--exit-timeout", "5s",
    )  # fmt: skip
    assert (result.exit_code, result.output) == (0, "")
    (config,) = started
    assert (config.model_repository, config.grpc_port, config.exit_timeout) == (tmp_path, 9001, 5.0)
    assert (config.model_control_mode, config.load_model) == (ControlMode.EXPLICIT, ("a", "b"))


def test_serve_takes_variables_and_flags_win(started: list[ServeConfig], tmp_path: Path) -> None:
    result = invoke(
        "serve",
        "--grpc-port",
        "9001",
        TIDEGATE_MODEL_REPOSITORY=str(tmp_path),
        TIDEGATE_GRPC_PORT="9002",
        TIDEGATE_METRICS_PORT="9003",
        TIDEGATE_MODEL_CONTROL_MODE="explicit",
        TIDEGATE_LOAD_MODEL="a b",
    )
    assert result.exit_code == 0
    (config,) = started
    assert (config.grpc_port, config.metrics_port, config.load_model) == (9001, 9003, ("a", "b"))


def test_every_field_can_be_given_by_its_flag_and_by_its_variable(started: list[ServeConfig], tmp_path: Path) -> None:
    texts = {
        "model_repository": str(tmp_path),
        "model_control_mode": "poll",
        "host": "127.0.0.2",
        "log_level": "error",
        "max_message_bytes": "2MiB",
        "max_inflight_bytes": "3MiB",
    }
    mode_free = [option.name for option in fields(ServeConfig) if option.name != "load_model"]
    given = {name: texts.get(name, str(11 + number)) for number, name in enumerate(mode_free)}
    by_flags = invoke("serve", *(word for name, text in given.items() for word in (flag(name), text)))
    by_variables = invoke("serve", **{environment_variable(name): text for name, text in given.items()})
    assert (by_flags.output, by_variables.output) == ("", "")
    first, second = started
    assert first == second
    default = ServeConfig(model_repository=tmp_path)
    same = [name for name in mode_free if getattr(first, name) == getattr(default, name)]
    assert same == ["model_repository"], "each flag must change something"


def test_every_mistake_is_told_and_the_exit_code_is_2(started: list[ServeConfig]) -> None:
    result = invoke("serve", "--grpc-port", "x", "--io-threads", "0", "--model-repository", "/no/such/folder")
    assert result.exit_code == 2
    assert result.stderr.splitlines() == [
        "tidegate serve: --model-repository '/no/such/folder' is not a directory",
        "tidegate serve: --grpc-port 'x' is not a whole number",
        "tidegate serve: --io-threads '0' must be from 1 to 64",
    ]
    assert result.stdout == ""
    assert started == []


@pytest.mark.parametrize("arguments", [["serve", "--no-such-flag"], ["no-such-command"], ["serve", "--grpc-port"]])
def test_bad_usage_is_2(arguments: list[str]) -> None:
    assert invoke(*arguments).exit_code == 2


def test_the_exit_code_of_the_server_is_the_commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from server import app

    monkeypatch.setattr(app, "run", lambda _config: 1)
    assert invoke("serve", "--model-repository", str(tmp_path)).exit_code == 1


def test_help_names_every_flag_with_its_default_and_variable() -> None:
    text = invoke("serve", "--help").output
    for option in fields(ServeConfig):
        assert flag(option.name) in text
        assert environment_variable(option.name) in text
    assert "64MiB" in text
    assert "none|poll|explicit" in text


def test_without_a_command_there_is_help() -> None:
    result = invoke()
    assert "serve" in result.output
    assert "demo" in result.output


def test_the_version_is_shown() -> None:
    result = invoke("--version")
    assert result.exit_code == 0
    assert result.output.startswith("tidegate ")


def test_demo_passes_its_flags_on(monkeypatch: pytest.MonkeyPatch) -> None:
    from server.demo import main

    called: list[dict[str, bool]] = []
    monkeypatch.setattr(main, "run", lambda **flags: called.append(flags) or 3)
    assert invoke("demo", "--json", "--quick").exit_code == 3
    assert invoke("demo").exit_code == 3
    assert called == [{"json_output": True, "quick": True}, {"json_output": False, "quick": False}]


def test_demo_without_its_client_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "server.demo.main", None)
    result = invoke("demo")
    assert result.exit_code == 1
    assert "pip install 'tidegate[demo]'" in result.stderr


def run_python(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_help_loads_no_native_code_and_no_messages() -> None:
    loaded = run_python(
        "import sys\n"
        "from server import cli\n"
        "try:\n"
        "    cli.app(['serve', '--help'], standalone_mode=False)\n"
        "except SystemExit:\n"
        "    pass\n"
        "heavy = ('server._native', 'google', 'grpc', 'numpy', 'onnx', 'onnxruntime', 'tritonclient', 'server.app')\n"
        "print('LOADED', *[name for name in heavy if name in sys.modules])"
    )
    assert loaded.splitlines()[-1] == "LOADED"


def test_the_module_is_the_command() -> None:
    command = [sys.executable, "-m", "server", "serve", "--grpc-port", "x"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "tidegate serve: --grpc-port 'x' is not a whole number" in done.stderr
