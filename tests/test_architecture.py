"""The shape of the tree: who may import whom, which facts are told twice, what no file here may do.

Each failure names the cure.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# What a decision may be made of: no time, no randomness, no operating system.
PURE = {"__future__", "collections", "dataclasses", "enum", "functools", "itertools", "math", "re", "types", "typing"}

# Modules of `server` that are values and arithmetic: policies may use them.
VALUES = {"server.versions", "server.settings", "server.errors"}

SERVER = sorted(path for path in (ROOT / "server").rglob("*.py"))
# What a serving process can come to import. The demo is a client, its data were made elsewhere.
SERVING = [path for path in SERVER if "demo" not in path.relative_to(ROOT).parts]
POLICIES = sorted([*ROOT.glob("*/policy/*.py"), ROOT / "server" / "versions.py", ROOT / "server" / "settings.py"])


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def imports(path: Path, *, with_types: bool = True) -> Iterator[str]:
    """Full names of the modules that a file imports, also inside functions."""
    tree = ast.parse(path.read_text())
    skipped: set[ast.AST] = set()
    if not with_types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                skipped |= set(ast.walk(node))
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}: write the whole name instead of a relative import"
            yield node.module or ""
            # `from server import metrics` imports server.metrics.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def roots(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in imports(path)}


@pytest.mark.parametrize("path", POLICIES, ids=name_of)
def test_policies_import_only_values(path: Path) -> None:
    strangers = roots(path) - PURE - {"controlplane", "server"}
    assert not strangers, f"{name_of(path)} imports {sorted(strangers)}: give the policy the value instead"
    ours = {name for name in imports(path) if (ROOT / (name.replace(".", "/") + ".py")).exists()}
    not_values = {name for name in ours if name not in VALUES and ".policy" not in name}
    assert not not_values, f"{name_of(path)} imports {sorted(not_values)}: a policy is made of values"


@pytest.mark.parametrize("path", SERVING, ids=name_of)
def test_the_server_never_imports_the_runtime_or_the_model_format_in_python(path: Path) -> None:
    forbidden = roots(path) & {"onnx", "onnxruntime", "numpy", "tritonclient", "sklearn"}
    assert not forbidden, (
        f"{name_of(path)} imports {sorted(forbidden)}: the native core runs models, onnx_file.py looks at them"
    )


def test_a_serving_process_has_no_second_runtime_in_it() -> None:
    code = (
        "import sys\n"
        "import server.app, server.cli\n"
        "print(*[name for name in ('onnx', 'onnxruntime', 'numpy', 'grpc', 'tritonclient') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "", f"importing server.app brings {done.stdout.strip()}: find who imports it"


@pytest.mark.parametrize("path", SERVER, ids=name_of)
def test_the_server_knows_of_the_control_plane_only_its_values(path: Path) -> None:
    allowed = ("controlplane.resources", "controlplane.policy", "controlplane.monitor.profile")
    strangers = [name for name in imports(path) if name.startswith("controlplane.") and not name.startswith(allowed)]
    assert not strangers, f"{name_of(path)} imports {strangers}: the two planes talk over the wire"


def test_the_control_plane_never_imports_the_server() -> None:
    for path in (ROOT / "controlplane").rglob("*.py"):
        assert "server" not in roots(path), f"{name_of(path)} imports server: start it as a process"


@pytest.mark.parametrize("path", [path for path in SERVER if "rpc" not in path.parts], ids=name_of)
def test_only_the_lanes_and_the_application_know_the_handlers(path: Path) -> None:
    if path.name in ("slow_rpc.py", "app.py"):
        return
    handlers = [name for name in imports(path) if name.startswith("server.rpc")]
    assert not handlers, f"{name_of(path)} imports {handlers}: handlers call the others, not the other way round"


def test_the_native_module_is_loaded_in_one_place() -> None:
    loading = {
        name_of(path)
        for path in SERVING
        if any(name.startswith("server._native") for name in imports(path, with_types=False))
    }
    assert loading == {"server/app.py"}, "take the native module as an argument, as server/loader.py does"


def test_imports_have_no_cycle() -> None:
    names = {".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path for path in SERVER}
    graph = {
        name: {used for used in imports(path, with_types=False) if used in names and used != name}
        for name, path in names.items()
    }
    while leaves := {name for name, used in graph.items() if not used & graph.keys()}:
        graph = {name: used for name, used in graph.items() if name not in leaves}
    assert not graph, f"these import each other: {sorted(graph)}"


# -- what no file of the server may do ---------------------------------------------------------------------------------


def calls(path: Path) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield node.lineno, ast.unparse(node.func)


@pytest.mark.parametrize("path", SERVING, ids=name_of)
def test_a_server_does_not_sleep(path: Path) -> None:
    sleeping = [line for line, called in calls(path) if called in ("time.sleep", "sleep")]
    assert not sleeping, f"{name_of(path)}:{sleeping}: wait for an event, with a timeout"


@pytest.mark.parametrize("path", SERVER, ids=name_of)
def test_data_never_becomes_code(path: Path) -> None:
    loaders = roots(path) & {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
    assert not loaders, f"{name_of(path)} imports {sorted(loaders)}: models are data, ONNX only"
    running = [line for line, called in calls(path) if called in ("eval", "exec", "compile", "__import__")]
    assert not running, f"{name_of(path)}:{running}: data never becomes code"


@pytest.mark.parametrize("path", SERVING, ids=name_of)
def test_the_environment_is_read_in_one_place(path: Path) -> None:
    if path.name in ("cli.py", "__init__.py"):
        return
    reading = re.findall(r"os\.(?:environ|getenv)", path.read_text())
    assert not reading, f"{name_of(path)} reads the environment: take the value from server/config.py"


# -- facts that are told twice -----------------------------------------------------------------------------------------


def test_reasons_are_the_same_on_both_sides() -> None:
    from server.errors import Reason
    from server.grpc_status import status_of

    header = (ROOT / "ext" / "util" / "reason.h").read_text()
    enumeration = header.split("enum class Reason", 1)[1].split("};", 1)[0]
    constants = re.findall(r"\bk(\w+)(?: = 0)?,", enumeration)
    names = re.findall(r'"([A-Z_]+)"', header.split("kNames", 1)[1].split("};", 1)[0])
    assert names == [reason.name for reason in Reason], "ext/util/reason.h and server/errors.py name other reasons"
    assert [reason.value for reason in Reason] == list(range(len(names)))
    snake = [re.sub(r"(?<!^)(?=[A-Z])", "_", constant).upper() for constant in constants]
    assert snake == names
    switch = header.split("constexpr int GrpcStatus", 1)[1]
    statuses: dict[str, int] = {}
    waiting: list[str] = []
    for case, status in re.findall(r"case Reason::k(\w+):(?:\s*return (\d+);)?", switch):
        waiting.append(names[constants.index(case)])
        if status:
            statuses |= dict.fromkeys(waiting, int(status))
            waiting = []
    assert statuses == {reason.name: status_of(reason) for reason in Reason}, "they travel as other statuses"


def test_data_types_are_the_same_on_both_sides() -> None:
    from server.settings import DataType

    for header in sorted((ROOT / "ext" / "infer").glob("*.h")):
        found = re.search(r"enum class DataType[^{]*\{(.*?)\};", header.read_text(), re.S)
        if found:
            break
    else:
        raise AssertionError("no header of ext/infer declares DataType")
    numbers = {int(number) for number in re.findall(r"=\s*(\d+)", found[1])} - {0}
    assert numbers == {datatype.value for datatype in DataType}, f"{header.name} has other numbers than settings.py"


def test_limits_are_the_same_on_both_sides() -> None:
    from server import config, model_config

    def constant(header: str, name: str) -> int:
        found = re.search(rf"{name} = (\d+);", (ROOT / "ext" / header).read_text())
        assert found, f"ext/{header} has no {name}"
        return int(found[1])

    assert constant("serving/version.h", "kMaxIoThreads") == config.MOST_IO_THREADS
    spec = (ROOT / "ext" / "infer" / "model_spec.h").read_text() + (ROOT / "ext" / "infer" / "tensor.h").read_text()
    for name, ours in (
        ("kMaxInputs", model_config._MOST_TENSORS),
        ("kMaxOutputs", model_config._MOST_TENSORS),
        ("kMaxRank", model_config._MOST_RANK),
    ):
        found = re.search(rf"{name} = (\d+);", spec)
        assert found, f"{name} is declared nowhere"
        assert int(found[1]) >= ours, f"{name} holds less than server/model_config.py lets through"


def test_the_native_core_offers_what_the_stub_says() -> None:
    from server import _native

    stub = ast.parse((ROOT / "server" / "_native.pyi").read_text())
    missing = []
    for node in stub.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            offered = getattr(_native, node.name, None)
            if offered is None:
                missing.append(node.name)
            elif isinstance(node, ast.ClassDef):
                members = [
                    member.target.id if isinstance(member, ast.AnnAssign) else member.name
                    for member in node.body
                    if isinstance(member, ast.FunctionDef)
                    or (isinstance(member, ast.AnnAssign) and isinstance(member.target, ast.Name))
                ]
                instance_only = {"NativeError"}
                missing += [
                    f"{node.name}.{member}"
                    for member in members
                    if node.name not in instance_only and not hasattr(offered, member)
                ]
    assert not missing, f"server/_native.pyi promises {missing}, which ext/bind does not have"


def test_the_fakes_have_the_fields_of_the_native_core() -> None:
    from server import _native
    from tests.server import fakes

    for name in ("VersionStatistics", "Histogram", "BatchStatistics", "VersionRoute", "ModelRoute", "SlowEvent"):
        assert getattr(fakes, name)._fields == getattr(_native, name)._fields, f"tests/server/fakes.py: {name}"
    assert fakes.FrontendSettings._fields == _native.FrontendSettings._fields


def test_the_longest_files_and_functions_are_known(record_property: pytest.RecordProperty) -> None:
    """Information, not a limit: the ten longest of each, in the report of the test run."""
    files = sorted(((len(path.read_text().splitlines()), name_of(path)) for path in SERVER), reverse=True)
    functions = []
    for path in SERVER:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                functions.append(((node.end_lineno or 0) - node.lineno + 1, f"{name_of(path)}:{node.name}"))
    record_property("longest_files", files[:10])
    record_property("longest_functions", sorted(functions, reverse=True)[:10])
    assert files
    assert functions
