"""The `tidegate` command. Each subcommand loads what it needs when it runs: `--help` is quick and needs no native code.

Exit codes: 0 done, 1 refused (stderr says what and what to do), 2 bad usage.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import Annotated, Any

import typer

from server.config import (
    ConfigError,
    ControlMode,
    ServeConfig,
    default_text,
    environment_variable,
    flag,
    serve_config,
)

app = typer.Typer(
    name="tidegate",
    help="Serves ONNX models over gRPC and looks after each model's life.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _metavar(name: str, kind: str) -> str:
    """What a value looks like, as --help shows it."""
    if name == "model_control_mode":
        return "|".join(mode.value for mode in ControlMode)
    if name.endswith(("_port", "_bytes")):
        return name.rpartition("_")[2].upper()
    return {"int": "NUMBER", "float": "DURATION", "Path": "DIR"}.get(kind, "TEXT")


def _taking_flags_of_serve(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a function one parameter per field of ServeConfig. All are text: what it means is for serve_config to say,
    which finds every mistake at once where a parser of flags would stop at the first."""
    parameters = []
    for option in fields(ServeConfig):
        declaration = typer.Option(
            flag(option.name),
            envvar=environment_variable(option.name),
            help=option.metadata["help"],
            metavar=_metavar(option.name, str(option.type)),
            show_default=default_text(option.name),
        )
        kind: Any = list[str] if option.name == "load_model" else str
        parameters.append(
            inspect.Parameter(
                option.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=Annotated[kind | None, declaration],
            )
        )
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@app.command()
@_taking_flags_of_serve
def serve(**texts: str | Sequence[str] | None) -> None:
    """Serves the models of a repository until it is told to stop.

    Each flag may also be given as an environment variable.
    """
    try:
        # An option that may be repeated and is not given comes as an empty list.
        config = serve_config({name: None if text == [] else text for name, text in texts.items()})
    except ConfigError as error:
        for problem in error.problems:
            print(f"tidegate serve: {problem}", file=sys.stderr)
        raise typer.Exit(2) from error
    from server.app import run  # noqa: PLC0415 - loads the native module

    raise typer.Exit(run(config))


@app.command()
def demo(
    json: Annotated[
        bool, typer.Option("--json", help="One JSON document on stdout; what people read goes to stderr.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Short loads: some 8 s instead of 25 s.")] = False,
) -> None:
    """Tells the story of one model on real data: served, loaded, replaced under load. Takes half a minute."""
    try:
        from server.demo.main import run  # noqa: PLC0415 - needs the client library
    except ImportError as error:
        print(f"tidegate demo: {error}; run `pip install 'tidegate[demo]'`", file=sys.stderr)
        raise typer.Exit(1) from error
    raise typer.Exit(run(json_output=json, quick=quick))


def _show_version(is_asked: bool) -> None:
    if is_asked:
        from importlib.metadata import PackageNotFoundError, version  # noqa: PLC0415 - slow, and rarely needed

        try:
            typer.echo(f"tidegate {version('tidegate')}")
        except PackageNotFoundError:
            typer.echo("tidegate (not installed)")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Shows the version and ends.")
    ] = False,
) -> None:
    """Serves ONNX models over gRPC and looks after each model's life."""


def main() -> None:
    """The `tidegate` command."""
    app()
