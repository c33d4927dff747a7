"""The ONNX models that the scenarios serve.

Weights are random with a fixed seed; axis 0 of every tensor is the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


def _value(name: str, dims: Sequence[int]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *dims])


def _model(
    name: str,
    nodes: Sequence[onnx.NodeProto],
    weights: Sequence[onnx.TensorProto],
    x: Sequence[int],
    y: Sequence[int],
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), name, [_value("x", x)], [_value("y", y)], list(weights))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    onnx.checker.check_model(model)
    return model


def identity(width: int = 16) -> onnx.ModelProto:
    """x [batch, width] -> y = x."""
    return _model("identity", [helper.make_node("Identity", ["x"], ["y"])], [], [width], [width])


def plus(number: float, width: int = 16) -> onnx.ModelProto:
    """x [batch, width] -> y = x + number: versions that can be told apart by every answer."""
    constant = numpy_helper.from_array(np.array(number, np.float32), "number")
    return _model("plus", [helper.make_node("Add", ["x", "number"], ["y"])], [constant], [width], [width])


def dense(sizes: Sequence[int], *, seed: int = 7, bias: float | None = None) -> onnx.ModelProto:
    """A multi-layer perceptron x [batch, sizes[0]] -> y [batch, sizes[-1]], ReLU between its layers.

    `bias` fixes every bias, so that two models of one size answer differently; without it they are random.
    """
    random = np.random.default_rng(seed)
    nodes, weights, here = [], [], "x"
    last = len(sizes) - 2
    for layer, (n_in, n_out) in enumerate(pairwise(sizes)):
        matrix = random.standard_normal((n_in, n_out), dtype=np.float32) * np.float32(np.sqrt(2.0 / n_in))
        vector = random.standard_normal(n_out, dtype=np.float32) * np.float32(0.1)
        if bias is not None:
            vector = np.full(n_out, bias, np.float32)
        weights += [numpy_helper.from_array(matrix, f"w{layer}"), numpy_helper.from_array(vector, f"b{layer}")]
        nodes.append(helper.make_node("MatMul", [here, f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Add", [f"m{layer}", f"b{layer}"], ["y" if layer == last else f"a{layer}"]))
        if layer != last:
            nodes.append(helper.make_node("Relu", [f"a{layer}"], [f"r{layer}"]))
            here = f"r{layer}"
    return _model("dense", nodes, weights, [sizes[0]], [sizes[-1]])


def mlp() -> onnx.ModelProto:
    """The small classifier of the goals: 64-256-256-10."""
    return dense((64, 256, 256, 10))


def stack(layers: int, *, tokens: int = 16, width: int = 256, seed: int = 5) -> onnx.ModelProto:
    """A compute-bound model x [batch, 16] -> y [batch, 16]: each row becomes `tokens` vectors, as in a transformer.

    `layers` square layers work on [batch, tokens, width]. A layer's weights (256 KiB) stay in the caches, so that the
    time of a row is arithmetic and hardly depends on what else uses the machine's memory.
    """
    random = np.random.default_rng(seed)

    def matrix(name: str, n_in: int, n_out: int, gain: float) -> onnx.TensorProto:
        values = random.standard_normal((n_in, n_out), dtype=np.float32) * np.float32(np.sqrt(gain / n_in))
        return numpy_helper.from_array(values, name)

    shape = numpy_helper.from_array(np.array([0, tokens, width], np.int64), "shape")
    weights = [matrix("w_in", 16, tokens * width, 1.0), shape, matrix("w_out", width, 16, 1.0)]
    nodes = [
        helper.make_node("MatMul", ["x", "w_in"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["h0"]),
    ]
    for layer in range(layers):
        bias = random.standard_normal(width, dtype=np.float32) * np.float32(0.1)
        weights += [matrix(f"w{layer}", width, width, 2.0), numpy_helper.from_array(bias, f"b{layer}")]
        nodes.append(helper.make_node("MatMul", [f"h{layer}", f"w{layer}"], [f"m{layer}"]))
        nodes.append(helper.make_node("Add", [f"m{layer}", f"b{layer}"], [f"a{layer}"]))
        nodes.append(helper.make_node("Relu", [f"a{layer}"], [f"h{layer + 1}"]))
    nodes.append(helper.make_node("ReduceMean", [f"h{layers}"], ["mean"], axes=[1], keepdims=0))
    nodes.append(helper.make_node("MatMul", ["mean", "w_out"], ["y"]))
    return _model("stack", nodes, weights, [16], [16])


def image() -> onnx.ModelProto:
    """x [batch, 3, 224, 224] (602,112 bytes a row) -> y [batch, 3], its mean per channel: payload, little compute."""
    node = helper.make_node("ReduceMean", ["x"], ["y"], axes=[2, 3], keepdims=0)
    return _model("image", [node], [], [3, 224, 224], [3])


def big(bias: float) -> onnx.ModelProto:
    """Some 90 MB of weights; the bias shows in the answer which file was loaded."""
    return dense((16, 2738, 2738, 2738, 2738, 16), seed=11, bias=bias)


def put(repository: Path, name: str, model: onnx.ModelProto, *, version: str = "1", config: str = "") -> Path:
    """Writes a model into a repository and returns its version folder; the folder appears complete."""
    target = repository / name / version
    staging = repository.parent / f".incoming-{name}-{version}"
    staging.mkdir(parents=True)
    onnx.save(model, staging / "model.onnx")
    target.parent.mkdir(parents=True, exist_ok=True)
    if config:
        (target.parent / "config.pbtxt").write_text(config)
    staging.rename(target)
    return target
