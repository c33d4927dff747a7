"""The declared part of ONNX Runtime's C API is what the installed library has, and nothing of it is idle."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from server import _native
from server.loader import find_runtime_library
from server.settings import DataType
from tests.ext.ort_models import identity, model, node, open_session, value

ROOT = Path(__file__).resolve().parents[2]

# What a library without CUDA answers with an error before anything else of it can be called, and page-locked memory.
# The native test `ort_test` calls these without a GPU.
GPU_ONLY = {
    "ReleaseMemoryInfo",
    "CreateAllocator",
    "ReleaseAllocator",
    "AllocatorAlloc",
    "AppendTensorRt",
    "UpdateTensorRtOptions",
    "ReleaseTensorRtOptions",
    "AppendCuda",
    "UpdateCudaOptions",
    "ReleaseCudaOptions",
}
# TensorRT's own libraries are no part of any wheel that we install.
TENSORRT_ONLY = {name for name in GPU_ONLY if "TensorRt" in name}


def python(code: str, *arguments: object) -> str:
    """What a fresh interpreter prints: a process opens the runtime once."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def walk() -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.ext.ort_walk"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_every_declared_slot_is_used(walk: dict[str, Any]) -> None:
    idle = {name for number, name in _native.ort_slots() if walk["calls"][str(number)] == 0}
    if "gpu" in walk["devices"]:
        assert idle <= TENSORRT_ONLY
    elif "CUDAExecutionProvider" in _native.ort_providers():
        assert idle <= GPU_ONLY  # How far one gets without a device is the library's choice.
    else:
        assert idle == GPU_ONLY


def test_what_is_made_is_released(walk: dict[str, Any]) -> None:
    def calls(name: str) -> int:
        return sum(walk["calls"][str(number)] for number, slot in _native.ort_slots() if slot == name)

    assert walk["live"]["session"] == walk["live"]["instance"] == 0
    for made, released in (
        ("CreateSession", "ReleaseSession"),
        ("CreateSessionOptions", "ReleaseSessionOptions"),
        ("CreateRunOptions", "ReleaseRunOptions"),
        ("CreateIoBinding", "ReleaseIoBinding"),
        ("SessionGetModelMetadata", "ReleaseModelMetadata"),
        ("GetTensorTypeAndShape", "ReleaseTensorTypeAndShapeInfo"),
        ("GetAvailableProviders", "ReleaseAvailableProviders"),
    ):
        assert calls(made) == calls(released) > 0, made
    assert calls("SessionGetInputTypeInfo") + calls("SessionGetOutputTypeInfo") == calls("ReleaseTypeInfo") > 0
    assert calls("GetErrorMessage") == calls("ReleaseStatus") > 0
    # A process keeps the memory info of the heap.
    assert calls("CreateMemoryInfo") == calls("ReleaseMemoryInfo") + 1


def test_slots_are_declared_once_and_in_order() -> None:
    numbers, names = zip(*_native.ort_slots(), strict=True)
    assert list(numbers) == sorted(set(numbers))
    assert len(set(names)) == len(names)


def test_calls_are_counted_only_on_request(tmp_path: Path) -> None:
    open_session(identity(), tmp_path)
    assert all(_native.ort_calls(number) == 0 for number, _ in _native.ort_slots())
    assert _native.ort_calls(-1) == _native.ort_calls(10_000) == 0


# -- what it reports --------------------------------------------------------------------------------------------------


def test_version_and_providers_are_the_packages() -> None:
    assert _native.ort_version() == onnxruntime.__version__
    assert _native.ort_providers() == onnxruntime.get_available_providers()


def pair(name: str, dims: list[int | str] | None, elem_type: int = TensorProto.FLOAT) -> onnx.ModelProto:
    return model([node("Identity", name, "out")], [value(name, dims, elem_type)], [value("out", dims, elem_type)])


MODELS = {
    **{f"type {datatype.name}": pair("x", ["batch", 2], datatype.value) for datatype in DataType},
    "float8": pair("x", [2], TensorProto.FLOAT8E4M3FN),
    "scalar": pair("x", []),
    "no shape": pair("x", None),
    "no names": pair("x", [1, 2, 3, 4, 5, 6, 7, 8, 9]),
    "names": pair("größe", ["batch", "высота", 3, "w"]),
    "several": model(
        [node("Add", "b a", "z"), node("Sub", "b a", "y")],
        [value("b", ["n", 2]), value("a", ["n", 2])],
        [value("z", ["n", 2]), value("y", ["n", 2])],
    ),
}

# The package names element types as C does.
TYPE_NAMES = {
    "float": 1, "uint8": 2, "int8": 3, "uint16": 4, "int16": 5, "int32": 6, "int64": 7, "string": 8, "bool": 9,
    "float16": 10, "double": 11, "uint32": 12, "uint64": 13, "bfloat16": 16, "float8e4m3fn": 17,
}  # fmt: skip


@pytest.mark.parametrize("name", MODELS)
def test_names_types_and_shapes_are_the_packages(name: str, tmp_path: Path) -> None:
    ours = open_session(MODELS[name], tmp_path)
    theirs = onnxruntime.InferenceSession(MODELS[name].SerializeToString(), providers=["CPUExecutionProvider"])
    for mine, expected in ((ours.inputs, theirs.get_inputs()), (ours.outputs, theirs.get_outputs())):
        assert [info.name for info in mine] == [info.name for info in expected]
        for info, other in zip(mine, expected, strict=True):
            found = re.fullmatch(r"tensor\((\w+)\)", other.type)
            assert found is not None
            assert info.elem_type == TYPE_NAMES[found[1]]
            # The package shows a name, or None, where a dimension is free.
            assert [
                size if size >= 0 else (symbol or None) for size, symbol in zip(info.dims, info.symbols, strict=True)
            ] == other.shape


def test_what_is_not_a_tensor_has_no_element_type(tmp_path: Path) -> None:
    made = onnx.helper.make_tensor_sequence_value_info("y", TensorProto.FLOAT, None)
    session = open_session(model([node("SequenceConstruct", "x x", "y")], [value("x", [2])], [made]), tmp_path)
    assert session.outputs == [("y", 0, (), ())]


# -- opening it -------------------------------------------------------------------------------------------------------

OPEN = """
import sys
from server import _native
for path in sys.argv[1:]:
    try:
        _native.ort_open(path)
        print("opened")
    except _native.NativeError as error:
        print(error.reason, error.message)
"""


def test_opening_it_again_is_a_no_op_and_another_one_is_refused() -> None:
    path = str(find_runtime_library())
    _native.ort_open(path)
    with pytest.raises(_native.NativeError, match="is already open; a process has one runtime") as caught:
        _native.ort_open(path + ".other")
    assert caught.value.reason == "LOAD_FAILED"


def test_a_library_that_cannot_be_used_is_refused_and_the_next_may_be_opened(tmp_path: Path) -> None:
    other, old = tmp_path / "libother.so", tmp_path / "libold.so"
    compile_library("int nothing;", other)
    compile_library(
        """
        static const void* api(unsigned version) { return 0; }
        static const char* version(void) { return "1.2.3"; }
        static const struct { const void* (*api)(unsigned); const char* (*version)(void); } base = {api, version};
        const void* OrtGetApiBase(void) { return &base; }
        """,
        old,
    )
    missing, other_said, old_said, last = python(
        OPEN, tmp_path / "libmissing.so", other, old, find_runtime_library()
    ).splitlines()
    assert missing.startswith("LOAD_FAILED ONNX Runtime's library cannot be opened: libmissing.so: ")
    assert other_said == "LOAD_FAILED the library is not ONNX Runtime: it has no OrtGetApiBase"
    assert old_said == "LOAD_FAILED ONNX Runtime 1.2.3 is too old; install 1.17 or newer"
    assert last == "opened"


def compile_library(source: str, output: Path) -> None:
    subprocess.run(["cc", "-x", "c", "-shared", "-fPIC", "-o", output, "-"], input=source, text=True, check=True)


def test_nothing_works_before_it_is_open() -> None:
    code = """
from server import _native
from server.settings import SessionSettings
for use in (_native.ort_version, _native.ort_providers, lambda: _native.ort_try_provider("x", {}),
            lambda: _native.Session("model.onnx", SessionSettings())):
    try:
        use()
    except _native.NativeError as error:
        print(error.message)
"""
    said = python(code).splitlines()
    assert said == ["ONNX Runtime is not open: ort_open comes first"] * 3 + ["ONNX Runtime is not open"]


def test_a_provider_that_is_not_there_says_so() -> None:
    with pytest.raises(_native.NativeError) as caught:
        _native.ort_try_provider("NoSuchExecutionProvider", {"key": "value"})
    assert caught.value.reason == "LOAD_FAILED"
    assert "NoSuch" in caught.value.message


# -- what it says -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("message", "clean"),
    [
        ("", ""),
        ("plain words", "plain words"),
        ("Load model from /srv/models/a/1/model.onnx failed", "Load model from model.onnx failed"),
        ("'/srv/a.onnx' (/srv/b.onnx) \"/srv/c\" =/srv/d,/srv/e", "'a.onnx' (b.onnx) \"c\" =e"),
        ("see ../up/a.onnx or ./here/b.onnx", "see a.onnx or b.onnx"),
        ("either/or and a/b stay", "either/or and a/b stay"),
        ("/src/core/reshape.h:47 input mismatch", "input mismatch"),
        ("at /src/session.cc:12", "at"),
        ("Name:'/encoder/layer.0/Gather' Status Message: bad", "Name:'/encoder/layer.0/Gather' Status Message: bad"),
        ("node /encoder/Add and Node: /a/b", "node /encoder/Add and Node: /a/b"),
        (
            "(node:'/a/b' ep:'CPU') Node (/c/d) In Node, (\"/e/f\"",
            "(node:'/a/b' ep:'CPU') Node (/c/d) In Node, (\"/e/f\"",
        ),
        ("node was read from /srv/a.onnx", "node was read from a.onnx"),
        ("two\nlines\tand \0\x7f\x01blanks", "two lines and blanks"),
        ("ümlaut → stays", "ümlaut → stays"),
    ],
)
def test_messages_for_clients_are_one_line_without_paths(message: str, clean: str) -> None:
    assert _native.clean_message(message.encode()).decode() == clean


def test_a_folder_with_blanks_is_cut_out_where_it_is_known() -> None:
    message = b"Load model from /my models/a b/1/model.onnx failed"
    assert _native.clean_message(message, ["/my models/a b/1"]) == b"Load model from model.onnx failed"
    assert _native.clean_message(b"a/b", ["/", ""]) == b"a/b"


@pytest.mark.parametrize("filler", ["x", "é", "→", "😀"])
def test_long_messages_are_cut_between_characters(filler: str) -> None:
    for shift in range(4):
        clean = _native.clean_message(("a" * shift + filler * 1_000).encode())
        assert 500 <= len(clean) <= 512
        assert clean.decode().endswith(filler + "...")


def test_bytes_that_are_no_text_become_text() -> None:
    assert _native.clean_message(b"a\xff\xc3b\xed\xa0\x80").decode() == "a\ufffd\ufffdb\ufffd\ufffd\ufffd"
