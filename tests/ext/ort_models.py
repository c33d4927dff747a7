"""Small ONNX models, the settings that serve them, and runs by our instance and by the runtime's own package."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from server import _native, cuda_libraries
from server.loader import find_runtime_library, machine_of
from server.settings import (
    BatchSettings,
    DataType,
    InstanceGroup,
    ModelSettings,
    ProviderSettings,
    SessionSettings,
    TensorSettings,
)

# Opened here rather than by a fixture: what there is to run on decides which tests there are.
_native.ort_open(str(find_runtime_library()))

CPU = SessionSettings()
# A device that the CPU stands in for: inputs are bound for each run and outputs waited for, as on a GPU.
CPU_AS_DEVICE = SessionSettings(device_id=0)
GPU = SessionSettings(providers=(ProviderSettings("CUDAExecutionProvider"),), device_id=0)

DEVICES = {"cpu": CPU, "cpu as a device": CPU_AS_DEVICE}
if machine_of(_native.ort_providers()).n_gpus > 0:
    cuda_libraries.preload()
    DEVICES["gpu"] = GPU

# How numpy holds each wire type; BF16 as its bits.
NUMPY_TYPES: Mapping[DataType, Any] = {
    DataType.FP32: np.float32,
    DataType.UINT8: np.uint8,
    DataType.INT8: np.int8,
    DataType.UINT16: np.uint16,
    DataType.INT16: np.int16,
    DataType.INT32: np.int32,
    DataType.INT64: np.int64,
    DataType.BOOL: np.bool_,
    DataType.FP16: np.float16,
    DataType.FP64: np.float64,
    DataType.UINT32: np.uint32,
    DataType.UINT64: np.uint64,
    DataType.BF16: np.uint16,
}

Dims = Sequence[int | str]


def value(name: str, dims: Dims | None, elem_type: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    """One input or output. A name for a free dimension; None when the shape is not known."""
    return helper.make_tensor_value_info(name, elem_type, dims)


def constant(name: str, array: Any) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(array), name)


def model(
    nodes: Sequence[onnx.NodeProto],
    inputs: Sequence[onnx.ValueInfoProto],
    outputs: Sequence[onnx.ValueInfoProto],
    constants: Sequence[onnx.TensorProto] = (),
    *,
    opset: int = 21,
    metadata: Mapping[str, str] | None = None,
) -> onnx.ModelProto:
    graph = helper.make_graph(list(nodes), "test", list(inputs), list(outputs), list(constants))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    helper.set_model_props(made, dict(metadata or {}))
    return made


def node(op: str, inputs: str, outputs: str, **attributes: Any) -> onnx.NodeProto:
    """`inputs` and `outputs` are names with blanks between."""
    return helper.make_node(op, inputs.split(), outputs.split(), **attributes)


def identity(elem_type: int = TensorProto.FLOAT, dims: Dims = ("batch", 3)) -> onnx.ModelProto:
    return model([node("Identity", "x", "y")], [value("x", dims, elem_type)], [value("y", dims, elem_type)])


def open_session(made: onnx.ModelProto, folder: Path, settings: SessionSettings = CPU) -> _native.Session:
    """The model in a session of ours."""
    path = folder / "model.onnx"
    path.write_bytes(made.SerializeToString())
    return _native.Session(str(path), settings)


def settings_for(
    session: _native.Session,
    max_batch_size: int = 64,
    *,
    groups: Sequence[InstanceGroup] = (),
    **changes: tuple[tuple[int, ...], tuple[int, ...]],
) -> ModelSettings:
    """What the session reports as the settings of a version. `changes`: tensor name -> (dims, model_dims)."""

    def tensors(infos: Sequence[_native.TensorInfo]) -> tuple[TensorSettings, ...]:
        return tuple(
            TensorSettings(info.name, DataType(info.elem_type), *changes.get(info.name, (info.dims, info.dims)))
            for info in infos
        )

    return ModelSettings(
        name="test",
        version="1",
        max_batch_size=max_batch_size,
        inputs=tensors(session.inputs),
        outputs=tensors(session.outputs),
        batching=BatchSettings(),
        instance_groups=tuple(groups),
        warmup=(),
    )


# -- runs -------------------------------------------------------------------------------------------------------------


def to_wire(array: np.ndarray) -> bytes:
    """A tensor as a request carries it: BYTES for arrays of objects, raw elements for others."""
    if array.dtype != object:
        return np.ascontiguousarray(array).tobytes()
    return b"".join(struct.pack("<I", len(one)) + one for one in map(as_bytes, array.ravel()))


def as_bytes(one: str | bytes) -> bytes:
    return one.encode() if isinstance(one, str) else one


def to_array(output: _native.RunOutput, datatype: DataType) -> np.ndarray:
    """An output of ours as an array; BYTES as an array of bytes objects, after a look at its offsets."""
    if datatype is not DataType.BYTES:
        return np.frombuffer(output.data, NUMPY_TYPES[datatype]).reshape(output.dims)
    assert len(output.element_offsets) == int(np.prod(output.dims)) + 1
    assert output.element_offsets[-1] == len(output.data)
    array = np.empty(len(output.element_offsets) - 1, object)
    for i, at in enumerate(output.element_offsets[:-1]):
        (length,) = struct.unpack_from("<I", output.data, at)
        array[i] = output.data[at + 4 : at + 4 + length]
        assert at + 4 + length == output.element_offsets[i + 1]
    return array.reshape(output.dims)


class Runner:
    """One instance of ours with the settings that it was made of."""

    def __init__(self, session: _native.Session, settings: ModelSettings) -> None:
        self.settings = settings
        self.instance = _native.RuntimeInstance(session, settings)

    def run(self, *requests: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Runs requests, each with one array per input, as one batch."""
        rows = sum(request[0].shape[0] for request in requests) if self.settings.max_batch_size else 1
        wire = [[(array.shape, to_wire(array)) for array in request] for request in requests]
        outputs = self.instance.run(wire, rows)
        return [
            to_array(output, tensor.datatype) for output, tensor in zip(outputs, self.settings.outputs, strict=True)
        ]


def run_package(made: onnx.ModelProto, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The same model and inputs through the runtime's own Python package."""
    session = onnxruntime.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    feeds = {info.name: array for info, array in zip(session.get_inputs(), arrays, strict=True)}
    return session.run(None, feeds)


def random_array(random: np.random.Generator, datatype: DataType, shape: Sequence[int]) -> np.ndarray:
    """Every bit pattern for integers, finite numbers for others, short and long strings with any byte in them."""
    dtype = NUMPY_TYPES.get(datatype)
    if datatype is DataType.BYTES:
        array = np.empty(int(np.prod(shape)), object)
        for i in range(array.size):
            array[i] = random.bytes(int(random.choice([0, 1, 15, 16, 40])))
        return array.reshape(shape)
    if datatype is DataType.BOOL:
        return random.integers(0, 2, shape).astype(np.bool_)
    if datatype is DataType.BF16:
        return (random.standard_normal(shape).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if np.issubdtype(dtype, np.floating):
        return random.standard_normal(shape).astype(dtype)
    info = np.iinfo(dtype)
    return random.integers(info.min, info.max, shape, dtype=dtype, endpoint=True)
