"""Small ONNX models, and repositories made of them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

Dims = Sequence[int | str]

# Wire name -> (ONNX element type, how numpy holds it).
ELEMENT_TYPES: Mapping[str, tuple[int, Any]] = {
    "BOOL": (TensorProto.BOOL, np.bool_),
    "UINT8": (TensorProto.UINT8, np.uint8),
    "UINT16": (TensorProto.UINT16, np.uint16),
    "UINT32": (TensorProto.UINT32, np.uint32),
    "UINT64": (TensorProto.UINT64, np.uint64),
    "INT8": (TensorProto.INT8, np.int8),
    "INT16": (TensorProto.INT16, np.int16),
    "INT32": (TensorProto.INT32, np.int32),
    "INT64": (TensorProto.INT64, np.int64),
    "FP16": (TensorProto.FLOAT16, np.float16),
    "FP32": (TensorProto.FLOAT, np.float32),
    "FP64": (TensorProto.DOUBLE, np.float64),
    "BF16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16),
    "BYTES": (TensorProto.STRING, np.object_),
}


def value(name: str, dims: Dims, datatype: str = "FP32") -> onnx.ValueInfoProto:
    """One input or output. A name is a free dimension."""
    return helper.make_tensor_value_info(name, ELEMENT_TYPES[datatype][0], dims)


def constant(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """`inputs` and `outputs` are names with blanks between."""
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto] = (),
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(constants))
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


# -- models ------------------------------------------------------------------------------------------------------------


def identity(datatype: str = "FP32", dims: Dims = ("batch", "n")) -> onnx.ModelProto:
    """y is x."""
    return model([node("Identity", "x", "y")], [value("x", dims, datatype)], [value("y", dims, datatype)])


def add(number: int, dims: Dims = ("batch", 1)) -> onnx.ModelProto:
    """y = x + number, INT64: the number tells which version answered."""
    return model(
        [node("Add", "x number", "y")],
        [value("x", dims, "INT64")],
        [value("y", dims, "INT64")],
        [constant("number", np.int64(number))],
    )


def sum_and_difference(dims: Dims = ("batch", 4)) -> onnx.ModelProto:
    """SUM = A + B, DIFF = A - B, INT32."""
    return model(
        [node("Add", "A B", "SUM"), node("Sub", "A B", "DIFF")],
        [value("A", dims, "INT32"), value("B", dims, "INT32")],
        [value("SUM", dims, "INT32"), value("DIFF", dims, "INT32")],
    )


def perceptron(n_in: int = 16, n_hidden: int = 64, n_out: int = 5, seed: int = 1) -> onnx.ModelProto:
    """probabilities = softmax(relu(x W1 + b1) W2 + b2), FP32."""
    random = np.random.default_rng(seed)

    def weights(*shape: int) -> Any:
        return (random.standard_normal(shape) / np.sqrt(shape[0])).astype(np.float32)

    return model(
        [
            node("Gemm", "x w1 b1", "a"),
            node("Relu", "a", "h"),
            node("Gemm", "h w2 b2", "logits"),
            node("Softmax", "logits", "probabilities", axis=-1),
        ],
        [value("x", ("batch", n_in))],
        [value("probabilities", ("batch", n_out))],
        [
            constant("w1", weights(n_in, n_hidden)),
            constant("b1", weights(n_hidden)),
            constant("w2", weights(n_hidden, n_out)),
            constant("b2", weights(n_out)),
        ],
    )


def weighted_sum(numbers: Sequence[int]) -> onnx.ModelProto:
    """y = x W of INT32, where rounding cannot hide who sat next to whom in a batch."""
    weights = np.asarray(numbers, np.int32).reshape(-1, 1)
    return model(
        [node("MatMulInteger", "x8 w8", "y")],
        [value("x8", ("batch", len(weights)), "INT8")],
        [value("y", ("batch", 1), "INT32")],
        [constant("w8", weights.astype(np.int8))],
    )


def row_sums() -> onnx.ModelProto:
    """total[b] = the sum of x[b, h, w]: two free dimensions besides the batch."""
    return model(
        [node("ReduceSum", "x axes", "total", keepdims=0)],
        [value("x", ("batch", "h", "w"), "FP32")],
        [value("total", ("batch",), "FP32")],
        [constant("axes", np.array([1, 2], np.int64))],
    )


def look_up(n: int = 10) -> onnx.ModelProto:
    """y = table[index], where a row with an index outside 0 .. n-1 fails the batch that it is in."""
    return model(
        [node("Gather", "table index", "y", axis=0)],
        [value("index", ("batch", 1), "INT64")],
        [value("y", ("batch", 1), "INT64")],
        [constant("table", np.arange(n, dtype=np.int64) * 100)],
    )


def countdown(is_batched: bool = False) -> onnx.ModelProto:
    """y = x after `steps` turns of a loop, each of which takes some microseconds: as slow as a request asks for.

    Not batched: x is INT64 [1], steps is INT64 [1]. Batched: rows; the loop takes the largest of the steps.
    """
    dims: Dims = ("batch", 1) if is_batched else (1,)
    body = helper.make_graph(
        [
            node("Identity", "go", "go_out"),
            node("MatMul", "m weights", "product"),
            node("Tanh", "product", "m_out"),
        ],
        "body",
        [
            helper.make_tensor_value_info("turn", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m", TensorProto.FLOAT, [48, 48]),
        ],
        [
            helper.make_tensor_value_info("go_out", TensorProto.BOOL, []),
            helper.make_tensor_value_info("m_out", TensorProto.FLOAT, [48, 48]),
        ],
        [constant("weights", np.eye(48, dtype=np.float32))],
    )
    return model(
        [
            node("ReduceMax", "steps", "n", keepdims=0),
            helper.make_node("Loop", ["n", "", "start"], ["end"], body=body),
            node("ReduceMin", "end", "least", keepdims=0),
            node("Cast", "least", "zero", to=TensorProto.INT64),
            node("Add", "x zero", "y"),
        ],
        [value("x", dims, "INT64"), value("steps", dims, "INT64")],
        [value("y", dims, "INT64")],
        [constant("start", np.zeros((48, 48), np.float32))],
    )


def heavy(mebibytes: int, number: int = 0) -> onnx.ModelProto:
    """y = x + number, with that much weights that take part in nothing but the sum of two of their elements."""
    side = 1024
    rows = mebibytes * (1 << 20) // (4 * side)
    weights = np.zeros((rows, side), np.float32)
    weights[0, 0] = number
    return model(
        [node("MatMul", "x weights", "y")],
        [value("x", ("batch", rows))],
        [value("y", ("batch", side))],
        [constant("weights", weights)],
    )


# -- repositories ------------------------------------------------------------------------------------------------------


def write_file(path: Path, content: bytes) -> None:
    """Writes beside the place and renames: nobody sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.half")
    half.write_bytes(content)
    half.replace(path)


def put(
    repository: Path, name: str, made: onnx.ModelProto | bytes | None, *, version: str = "1", config: str = ""
) -> Path:
    """Puts a version, and a configuration if there is one, into a repository. Returns the version's folder."""
    folder = repository / name / version
    folder.mkdir(parents=True, exist_ok=True)
    if config:
        write_file(repository / name / "config.pbtxt", config.encode())
    if made is not None:
        write_file(folder / "model.onnx", made if isinstance(made, bytes) else made.SerializeToString())
    return folder


def put_with_external_data(repository: Path, name: str, location: str, *, version: str = "1") -> Path:
    """A version whose weights are said to lie in `location`. Returns the version's folder, where no data is."""
    made = model(
        [node("Add", "x weights", "y")],
        [value("x", ("batch", 4))],
        [value("y", ("batch", 4))],
        [constant("weights", np.ones(4, np.float32))],
    )
    tensor = made.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", location), ("offset", "0"), ("length", "16")):
        entry = tensor.external_data.add()
        entry.key, entry.value = key, text
    return put(repository, name, made, version=version)


def replace_folder(repository: Path, name: str, fill: Callable[[Path], None]) -> None:
    """Replaces a model's folder by what `fill` puts into the empty folder it gets: two renames."""
    fresh = repository.parent / f"{name}.fresh"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    fill(fresh)
    old = repository.parent / f"{name}.old"
    os.rename(repository / name, old)
    os.rename(fresh, repository / name)
    shutil.rmtree(old)


# -- values ------------------------------------------------------------------------------------------------------------


def values(datatype: str, shape: Sequence[int], seed: int = 0) -> np.ndarray:
    """Every bit pattern for integers, finite numbers for floats, strings with any byte in them."""
    random = np.random.default_rng(seed)
    if datatype == "BYTES":
        texts = [b"", b"\0", b"a\0b", b"\xff\xfe\x80", "grüße".encode(), random.bytes(300)]
        array = np.empty(int(np.prod(shape)), object)
        array[:] = [texts[int(random.integers(len(texts)))] for _ in range(array.size)]
        return array.reshape(shape)
    dtype = ELEMENT_TYPES[datatype][1]
    if datatype == "BOOL":
        return random.integers(0, 2, shape).astype(dtype)
    if datatype in ("FP16", "FP32", "FP64", "BF16"):
        return random.standard_normal(shape).astype(dtype)
    limits = np.iinfo(dtype)
    return random.integers(limits.min, limits.max, shape, dtype=dtype, endpoint=True)
