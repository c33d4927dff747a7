"""ModelConfig: read from config.pbtxt or JSON, checked, completed from what the ONNX file says, turned into settings.

The order of a load:

    read_text | read_json     text -> ModelConfig; a field nobody knows is refused with its place
    check                     every field is honoured or refused with its path and reason, all mistakes at once
    instance_groups           kinds, devices, optimization and parameters -> how sessions are opened
    complete                  + inputs and outputs of the session -> the ModelConfig that ModelConfig answers
    model_settings            -> the values the native core works with
    warmup_batches            one at a time, because they can be large

Everything here is a function of its arguments; only warm-up files are read from disk.
"""

from __future__ import annotations

import json
import math
import random
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format, text_format
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from protos.gen import model_config_pb2 as pb
from server.policy.versions import All, Latest, Specific, VersionPolicy
from server.settings import (
    BatchSettings,
    DataType,
    InstanceGroup,
    ModelSettings,
    ProviderSettings,
    QueuePolicySettings,
    SessionSettings,
    TensorSettings,
    WarmupBatch,
    WarmupTensor,
)
from server.versions import parse_version

if TYPE_CHECKING:
    from server._native import TensorInfo

PLATFORM = "onnxruntime_onnx"
BACKEND = "onnxruntime"
MODEL_FILENAME = "model.onnx"

# A configuration is some kilobytes; more is a mistake or an attack on the parser.
MOST_CONFIG_BYTES = 1 << 20
# Mistakes told at once. Beyond it nobody reads on.
_MOST_PROBLEMS = 20
# The native core counts tensors in 64-bit masks and keeps shapes in eight places (ext/infer/).
_MOST_TENSORS = 64
_MOST_RANK = 8
# One native thread each; more on one node is a typing mistake.
_MOST_INSTANCES = 256
_MOST_THREADS = 1024
# A level costs a queue that every batch looks at.
_MOST_PRIORITY_LEVELS = 100
# Waiting longer than this for a batch is a mistake in the unit.
_MOST_DELAY_US = 3600 * 10**6
_MOST_INT64 = 2**63 - 1
_MOST_BATCH = 65536
# Configured warm-up data of one batch, and what a made-up batch may take.
_MOST_WARMUP_BYTES = 1 << 30
_MOST_SYNTHETIC_BYTES = 256 << 20
_SYNTHETIC_RUNS = 5
_MOST_WARMUPS = 64

CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"

_DATATYPES: Mapping[int, DataType] = {
    pb.TYPE_BOOL: DataType.BOOL,
    pb.TYPE_UINT8: DataType.UINT8,
    pb.TYPE_UINT16: DataType.UINT16,
    pb.TYPE_UINT32: DataType.UINT32,
    pb.TYPE_UINT64: DataType.UINT64,
    pb.TYPE_INT8: DataType.INT8,
    pb.TYPE_INT16: DataType.INT16,
    pb.TYPE_INT32: DataType.INT32,
    pb.TYPE_INT64: DataType.INT64,
    pb.TYPE_FP16: DataType.FP16,
    pb.TYPE_FP32: DataType.FP32,
    pb.TYPE_FP64: DataType.FP64,
    pb.TYPE_STRING: DataType.BYTES,
    pb.TYPE_BF16: DataType.BF16,
}
_CONFIG_TYPES: Mapping[DataType, int] = {datatype: number for number, datatype in _DATATYPES.items()}
_OF_ELEM_TYPE: Mapping[int, DataType] = {datatype.value: datatype for datatype in DataType}
_ELEM_TYPE_NAMES = {14: "COMPLEX64", 15: "COMPLEX128", 21: "UINT4", 22: "INT4"}

_ELEMENT_BYTES: Mapping[DataType, int] = {
    DataType.BOOL: 1,
    DataType.UINT8: 1,
    DataType.INT8: 1,
    DataType.UINT16: 2,
    DataType.INT16: 2,
    DataType.FP16: 2,
    DataType.BF16: 2,
    DataType.UINT32: 4,
    DataType.INT32: 4,
    DataType.FP32: 4,
    DataType.UINT64: 8,
    DataType.INT64: 8,
    DataType.FP64: 8,
}


class ConfigError(Exception):
    """The configuration is refused. `problems` has one line per mistake, each beginning with the field's path."""

    def __init__(self, problems: Sequence[str]) -> None:
        shown = list(problems[:_MOST_PROBLEMS])
        if len(problems) > _MOST_PROBLEMS:
            shown.append(f"and {len(problems) - _MOST_PROBLEMS} more")
        super().__init__("; ".join(shown))
        self.problems = tuple(problems)


class _Problems(list[str]):
    """Mistakes found so far."""

    def add(self, path: str, message: str) -> None:
        self.append(f"{path}: {message}")

    def raise_if_any(self) -> None:
        if self:
            raise ConfigError(self)


@dataclass(frozen=True, slots=True)
class Machine:
    """What the runtime library offers here."""

    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    n_gpus: int = 0

    @property
    def has_cuda(self) -> bool:
        """Whether GPU instances can be had."""
        return CUDA in self.providers and self.n_gpus > 0


# -- reading -----------------------------------------------------------------------------------------------------------


def read_text(text: str) -> pb.ModelConfig:
    """Reads config.pbtxt. Raises ConfigError with line and column."""
    _check_size(text)
    try:
        return text_format.Parse(text, pb.ModelConfig())
    except text_format.ParseError as error:
        raise ConfigError([f"config.pbtxt:{' '.join(str(error).split())}"]) from error


def read_json(text: str) -> pb.ModelConfig:
    """Reads the JSON form: snake_case or camelCase names, enums by name in any case or by number.

    Raises ConfigError with every unknown field and every wrong type of value.
    """
    _check_size(text)
    try:
        document = json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError as error:
        raise ConfigError(["config: the JSON nests too deep"]) from error
    except ValueError as error:
        raise ConfigError([f"config: not JSON: {error}"]) from error
    problems = _Problems()
    prepared = _prepared(document, pb.ModelConfig.DESCRIPTOR, "", problems)
    problems.raise_if_any()
    try:
        return json_format.ParseDict(prepared, pb.ModelConfig())
    except json_format.ParseError as error:
        raise ConfigError([f"config: {' '.join(str(error).split())}"]) from error


def _check_size(text: str) -> None:
    if len(text) > MOST_CONFIG_BYTES:
        raise ConfigError([f"config: longer than {MOST_CONFIG_BYTES} characters"])


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        twice = next(key for key, _ in pairs if sum(key == other for other, _ in pairs) > 1)
        raise ValueError(f"{twice!r} is given twice")
    return found


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a value of JSON")


def _prepared(value: Any, message: Any, path: str, problems: _Problems) -> Any:
    """The value with enum names in their own case; unknown fields and non-objects become problems. `message`: its
    Descriptor."""
    if not isinstance(value, dict):
        problems.add(path or "config", f"must be an object, not {_kind(value)}")
        return value
    prepared: dict[str, Any] = {}
    for key, given in value.items():
        field: FieldDescriptor | None
        field = message.fields_by_name.get(key) or message.fields_by_camelcase_name.get(key)
        at = f"{path}.{key}" if path else key
        if field is None:
            problems.add(at, f"unknown field; {message.name} has {', '.join(f.name for f in message.fields)}")
        elif field.name in prepared:
            problems.add(at, "given twice")
        else:
            prepared[field.name] = _prepared_field(given, field, at, problems)
    return prepared


def _prepared_field(value: Any, field: FieldDescriptor, path: str, problems: _Problems) -> Any:
    if value is None:
        return None
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        entry = field.message_type.fields_by_name["value"]
        if not isinstance(value, dict):
            problems.add(path, f"must be an object, not {_kind(value)}")
            return value
        return {key: _prepared_one(item, entry, f"{path}[{key!r}]", problems) for key, item in value.items()}
    if field.is_repeated:
        if not isinstance(value, list):
            problems.add(path, f"must be a list, not {_kind(value)}")
            return value
        return [_prepared_one(item, field, f"{path}[{index}]", problems) for index, item in enumerate(value)]
    return _prepared_one(value, field, path, problems)


def _prepared_one(value: Any, field: FieldDescriptor, path: str, problems: _Problems) -> Any:
    if field.message_type is not None:
        return _prepared(value, field.message_type, path, problems)
    if field.enum_type is not None and isinstance(value, str):
        names = field.enum_type.values_by_name
        if value.upper() not in names:
            problems.add(path, f"unknown value {value!r}; there are {', '.join(names)}")
        return value.upper()
    if field.enum_type is not None and isinstance(value, bool):
        problems.add(path, "must be a name, not a boolean")
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}.get(
        type(value), "a number"
    )


# -- parameters --------------------------------------------------------------------------------------------------------

# ONNX Runtime's session entries that change how a model runs and name no file. The others are refused: entries that
# name files would let a load request open any path.
_SESSION_ENTRIES = frozenset(
    (
        "session.allow_released_opsets_only",
        "session.disable_aot_function_inlining",
        "session.disable_cpu_ep_fallback",
        "session.disable_double_qdq_remover",
        "session.disable_prepacking",
        "session.disable_quant_qdq",
        "session.disable_specified_optimizers",
        "session.dynamic_block_base",
        "session.enable_quant_qdq_cleanup",
        "session.force_spinning_stop",
        "session.inter_op.allow_spinning",
        "session.intra_op.allow_spinning",
        "session.intra_op_thread_affinities",
        "session.qdq_matmulnbits_accuracy_level",
        "session.qdqisint8allowed",
        "session.set_denormal_as_zero",
        "session.strict_shape_type_inference",
        "session.use_device_allocator_for_initializers",
        "session.use_env_allocators",
        "session.x64quantprecision",
    )
)

_SHRINKAGE = "memory.enable_memory_arena_shrinkage"
_INTEGERS: Mapping[str, tuple[int, int]] = {
    "intra_op_thread_count": (0, _MOST_THREADS),
    "inter_op_thread_count": (0, _MOST_THREADS),
    "execution_mode": (0, 1),
    "enable_mem_arena": (0, 1),
    "enable_mem_pattern": (0, 1),
    "cudnn_conv_algo_search": (0, 2),
    "gpu_mem_limit": (1, 2**63 - 1),
    "arena_extend_strategy": (0, 1),
    "do_copy_in_default_stream": (0, 1),
    "tidegate_slo_us": (0, _MOST_DELAY_US),
    "tidegate_priority_aging_us": (0, _MOST_DELAY_US),
}
_VERSIONS = "tidegate_versions"
PARAMETERS = (*_INTEGERS, _SHRINKAGE, _VERSIONS, *sorted(_SESSION_ENTRIES))


class _Parameters:
    """The model's `parameters`, read as what they mean. Values outside the bounds count as absent once reported."""

    def __init__(self, config: pb.ModelConfig, problems: _Problems) -> None:
        self._texts = {key: parameter.string_value.strip() for key, parameter in config.parameters.items()}
        for key, text in self._texts.items():
            path = f"parameters[{key!r}]"
            if key in _INTEGERS:
                least, most = _INTEGERS[key]
                if not re.fullmatch(r"-?[0-9]{1,19}", text) or not least <= int(text) <= most:
                    problems.add(path, f"must be a whole number from {least} to {most}, not {text!r}")
            elif key == _SHRINKAGE:
                if not re.fullmatch(r"(cpu|gpu):[0-9]{1,3}(;(cpu|gpu):[0-9]{1,3})*", text):
                    problems.add(path, f'must be devices like "cpu:0;gpu:0", not {text!r}')
            elif key == _VERSIONS:
                if not _split(text) or any(parse_version(version) is None for version in _split(text)):
                    problems.add(path, f'must be versions like "1.4.0, 1.5.0", not {text!r}')
                elif config.version_policy.WhichOneof("policy_choice") != "specific":
                    problems.add(path, "goes with version_policy { specific { } }, which is not set")
            elif key in _SESSION_ENTRIES:
                if not text or len(text) > 1024:
                    problems.add(path, "must have a value of at most 1024 characters")
            else:
                problems.add(path, f"unknown parameter; there are {', '.join(PARAMETERS)}")

    def number(self, key: str, default: int) -> int:
        return int(self._texts.get(key, default))

    def text(self, key: str) -> str:
        return self._texts.get(key, "")

    def session_entries(self) -> dict[str, str]:
        return {key: text for key, text in self._texts.items() if key in _SESSION_ENTRIES}

    def has(self, key: str) -> bool:
        return key in self._texts


def _split(text: str) -> list[str]:
    return [part for part in re.split(r"[ ,]+", text) if part]


# -- checks that need no model -----------------------------------------------------------------------------------------

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,254}")


def is_plain_name(name: str) -> bool:
    """Whether a model's or file's name is one we take: letters, digits, `.`, `_`, `-`, no dot in front."""
    return _PLAIN_NAME.fullmatch(name) is not None


def model_filename(config: pb.ModelConfig) -> str:
    """The file in a version's folder that holds the model."""
    return config.default_model_filename or MODEL_FILENAME


def version_policy(config: pb.ModelConfig) -> VersionPolicy:
    """Which versions should be loaded; the highest one when nothing is said."""
    choice = config.version_policy.WhichOneof("policy_choice")
    if choice == "all":
        return All()
    if choice == "specific":
        texts = _split(config.parameters[_VERSIONS].string_value) if _VERSIONS in config.parameters else []
        return Specific(tuple(config.version_policy.specific.versions), tuple(texts))
    return Latest(max(config.version_policy.latest.num_versions, 1))


def check(config: pb.ModelConfig, name: str, machine: Machine, *, is_from_request: bool = False) -> None:
    """Checks everything that can be checked without the model. Raises ConfigError with all mistakes.

    `is_from_request` says that a client sent the configuration: then options that name files on this node are refused.
    """
    problems = _Problems()
    _check_enums(config, "", problems)
    problems.raise_if_any()
    _check_identity(config, name, problems)
    _check_refused(config, problems)
    _check_batching(config, problems)
    _check_tensors(config, problems)
    _check_warmups(config, problems)
    parameters = _Parameters(config, problems)
    if is_from_request:
        _check_no_paths(config, problems)
    # Values that were refused above would only be misread below.
    if not problems:
        _groups(config, parameters, machine, problems)
    problems.raise_if_any()


def _check_enums(message: Message, path: str, problems: _Problems) -> None:
    """Both forms take enums by number, also by one that means nothing."""
    for field, value in message.ListFields():
        at = f"{path}.{field.name}" if path else field.name
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            if kind.fields_by_name["value"].message_type is not None:
                for key, item in value.items():
                    _check_enums(item, f"{at}[{key!r}]", problems)
        elif kind is not None:
            for index, item in enumerate(value) if field.is_repeated else ((None, value),):
                _check_enums(item, at if index is None else f"{at}[{index}]", problems)
        elif field.enum_type is not None:
            for number in value if field.is_repeated else (value,):
                if number not in field.enum_type.values_by_number:
                    names = ", ".join(field.enum_type.values_by_name)
                    problems.add(at, f"unknown value {number}; there are {names}")


def _check_identity(config: pb.ModelConfig, name: str, problems: _Problems) -> None:
    if config.name not in ("", name):
        problems.add("name", f"is {config.name!r} but the model is called {name!r}; leave it out or make them equal")
    if config.platform not in ("", PLATFORM):
        problems.add("platform", f"{config.platform!r} is not served here, only {PLATFORM!r}")
    if config.backend not in ("", BACKEND):
        problems.add("backend", f"{config.backend!r} is not served here, only {BACKEND!r}")
    if config.default_model_filename and not is_plain_name(config.default_model_filename):
        problems.add("default_model_filename", "must be a plain file name (letters, digits, '.', '_', '-')")
    if any(version < 0 for version in config.version_policy.specific.versions):
        problems.add("version_policy.specific.versions", "must not be negative")
    specific = config.version_policy.WhichOneof("policy_choice") == "specific"
    if specific and not config.version_policy.specific.versions and _VERSIONS not in config.parameters:
        problems.add("version_policy.specific.versions", f"names no version; list numbers, or texts in {_VERSIONS}")


def _check_refused(config: pb.ModelConfig, problems: _Problems) -> None:
    """Fields that mean something we do not do."""

    def refuse(is_set: bool, path: str, reason: str) -> None:
        if is_set:
            problems.add(path, reason)

    optimization = config.optimization
    cuda = optimization.cuda
    refuse(bool(config.runtime), "runtime", "there is one runtime here; leave it out")
    refuse(config.HasField("sequence_batching"), "sequence_batching", "sequences are not supported")
    refuse(config.HasField("ensemble_scheduling"), "ensemble_scheduling", "ensembles are not supported")
    refuse(config.model_transaction_policy.decoupled, "model_transaction_policy.decoupled", "a request has one answer")
    refuse(bool(config.batch_input), "batch_input", "ragged batching is not supported")
    refuse(bool(config.batch_output), "batch_output", "ragged batching is not supported")
    refuse(config.response_cache.enable, "response_cache.enable", "there is no response cache")
    refuse(bool(config.model_operations.op_library_filename), "model_operations", "a model cannot bring code")
    refuse(bool(config.model_repository_agents.agents), "model_repository_agents", "there are no repository agents")
    refuse(
        bool(config.cc_model_filenames), "cc_model_filenames", "use default_model_filename; it holds for all devices"
    )
    refuse(bool(config.metric_tags), "metric_tags", "metrics carry the labels model and version only")
    refuse(bool(config.model_metrics.metric_control), "model_metrics", "the buckets of histograms are fixed")
    refuse(optimization.priority != 0, "optimization.priority", "models have no priority; use instance_group.count")
    refuse(optimization.eager_batching, "optimization.eager_batching", "a batch is gathered when an instance takes it")
    refuse(
        optimization.gather_kernel_buffer_threshold != 0,
        "optimization.gather_kernel_buffer_threshold",
        "batches are gathered on the host",
    )
    refuse(cuda.graphs or bool(cuda.graph_spec), "optimization.cuda.graphs", "CUDA graphs are not supported")
    refuse(cuda.busy_wait_events, "optimization.cuda.busy_wait_events", "executors do not spin")
    refuse(cuda.output_copy_stream, "optimization.cuda.output_copy_stream", "outputs are copied in the compute stream")
    if optimization.graph.level not in _GRAPH_LEVELS:
        problems.add("optimization.graph.level", f"must be -1, 0, 1 or 2, not {optimization.graph.level}")
    for index, group in enumerate(config.instance_group):
        path = f"instance_group[{index}]"
        refuse(group.HasField("rate_limiter"), f"{path}.rate_limiter", "there is no rate limiter; use count")
        refuse(bool(group.secondary_devices), f"{path}.secondary_devices", "there are no secondary devices")
        refuse(bool(group.profile), f"{path}.profile", "use trt_profile_* of the tensorrt accelerator")
        refuse(group.passive, f"{path}.passive", "an instance that is never used is not loaded; remove the group")
        refuse(bool(group.host_policy), f"{path}.host_policy", "there are no host policies")
        refuse(group.kind == pb.ModelInstanceGroup.KIND_MODEL, f"{path}.kind", "KIND_MODEL: use KIND_CPU or KIND_GPU")


def _check_batching(config: pb.ModelConfig, problems: _Problems) -> None:
    most = config.max_batch_size
    if not 0 <= most <= _MOST_BATCH:
        problems.add("max_batch_size", f"must be from 0 to {_MOST_BATCH}, not {most}")
    batching = config.dynamic_batching
    if batching.max_queue_delay_microseconds > _MOST_DELAY_US:
        problems.add("dynamic_batching.max_queue_delay_microseconds", f"must be at most {_MOST_DELAY_US} (an hour)")
    for size in batching.preferred_batch_size:
        # With max_batch_size 0 the size is not known yet: complete() looks again.
        if size < 1 or (most and size > most):
            problems.add("dynamic_batching.preferred_batch_size", f"{size} is not from 1 to max_batch_size {most}")
    levels = batching.priority_levels
    if levels > _MOST_PRIORITY_LEVELS:
        problems.add("dynamic_batching.priority_levels", f"must be at most {_MOST_PRIORITY_LEVELS}")
    default = batching.default_priority_level
    if levels and not 1 <= default <= levels:
        problems.add("dynamic_batching.default_priority_level", f"must be from 1 to priority_levels {levels}")
    if not levels and default:
        problems.add("dynamic_batching.default_priority_level", "needs priority_levels")
    _check_queue_policy(batching.default_queue_policy, "dynamic_batching.default_queue_policy", problems)
    for level, policy in batching.priority_queue_policy.items():
        path = f"dynamic_batching.priority_queue_policy[{level}]"
        if not 1 <= level <= levels:
            problems.add(path, f"there is no such level; priority_levels is {levels}")
        _check_queue_policy(policy, path, problems)


def _check_queue_policy(policy: pb.ModelQueuePolicy, path: str, problems: _Problems) -> None:
    if policy.default_timeout_microseconds > _MOST_INT64 // 1000:
        problems.add(f"{path}.default_timeout_microseconds", f"must be at most {_MOST_INT64 // 1000}")


def _check_tensors(config: pb.ModelConfig, problems: _Problems) -> None:
    _check_side("input", config.input, problems)
    _check_side("output", config.output, problems)
    for index, tensor in enumerate(config.input):
        path = f"input[{index}]"
        if tensor.optional:
            problems.add(f"{path}.optional", "every input of a model must be sent")
        if tensor.allow_ragged_batch:
            problems.add(f"{path}.allow_ragged_batch", "ragged batching is not supported")
        if tensor.format != pb.ModelInput.FORMAT_NONE and len(tensor.dims) != 3:
            problems.add(f"{path}.format", "FORMAT_NHWC and FORMAT_NCHW need three dims")
    for index, output in enumerate(config.output):
        if output.label_filename:
            problems.add(
                f"output[{index}].label_filename", "classification is not supported; outputs are sent as they are"
            )


def _check_side(side: str, tensors: Sequence[pb.ModelInput | pb.ModelOutput], problems: _Problems) -> None:
    seen: set[str] = set()
    for index, tensor in enumerate(tensors):
        path = f"{side}[{index}]"
        if not tensor.name:
            problems.add(f"{path}.name", "is missing")
        elif tensor.name in seen:
            problems.add(f"{path}.name", f"{tensor.name!r} is given twice")
        seen.add(tensor.name)
        if tensor.is_shape_tensor:
            problems.add(f"{path}.is_shape_tensor", "shape tensors are not supported")
        if tensor.is_non_linear_format_io:
            problems.add(f"{path}.is_non_linear_format_io", "tensors are row-major here")
        if any(dim < 1 and dim != -1 for dim in tensor.dims):
            problems.add(f"{path}.dims", f"{_shown(tensor.dims)}: a dimension is -1 (free) or at least 1")
        if tensor.HasField("reshape"):
            _check_reshape(tensor, path, problems)


def _check_reshape(tensor: pb.ModelInput | pb.ModelOutput, path: str, problems: _Problems) -> None:
    shape = list(tensor.reshape.shape)
    if not tensor.dims:
        problems.add(f"{path}.reshape", "needs dims")
    elif any(dim < 1 and dim != -1 for dim in shape):
        problems.add(f"{path}.reshape.shape", f"{_shown(shape)}: a dimension is -1 (free) or at least 1")
    elif _segments(shape) != _segments(tensor.dims):
        problems.add(
            f"{path}.reshape.shape",
            f"{_shown(shape)} and dims {_shown(tensor.dims)} must have the same number of elements, "
            "also between free dimensions",
        )


def _segments(dims: Sequence[int]) -> list[int]:
    """Products of the fixed dimensions before, between and after the free ones."""
    products = [1]
    for dim in dims:
        if dim == -1:
            products.append(1)
        else:
            products[-1] *= dim
    return products


def _check_warmups(config: pb.ModelConfig, problems: _Problems) -> None:
    if len(config.model_warmup) > _MOST_WARMUPS:
        problems.add("model_warmup", f"at most {_MOST_WARMUPS} samples")
    for index, warmup in enumerate(config.model_warmup):
        path = f"model_warmup[{index}]"
        if not warmup.name:
            problems.add(f"{path}.name", "is missing")
        if warmup.count > 10_000:
            problems.add(f"{path}.count", "must be at most 10000")
        for name, tensor in warmup.inputs.items():
            at = f"{path}.inputs[{name!r}]"
            if any(dim < 1 for dim in tensor.dims):
                problems.add(f"{at}.dims", f"{_shown(tensor.dims)}: a dimension of warm-up data is at least 1")
            choice = tensor.WhichOneof("input_data_type")
            if choice is None or (choice != "input_data_file" and not getattr(tensor, choice)):
                problems.add(at, "set zero_data: true, random_data: true or input_data_file")
            if choice == "input_data_file" and _parts(tensor.input_data_file) is None:
                problems.add(f"{at}.input_data_file", "must be a relative path inside the model's warmup folder")


def _parts(path: str) -> tuple[str, ...] | None:
    """The parts of a relative path made of plain names; None for any other."""
    parts = tuple(path.split("/"))
    return parts if all(is_plain_name(part) for part in parts) else None


def _check_no_paths(config: pb.ModelConfig, problems: _Problems) -> None:
    accelerators = config.optimization.execution_accelerators
    for side in ("gpu_execution_accelerator", "cpu_execution_accelerator"):
        for index, accelerator in enumerate(getattr(accelerators, side)):
            for key in accelerator.parameters:
                if key in _FILE_KEYS:
                    problems.add(
                        f"optimization.execution_accelerators.{side}[{index}].parameters[{key!r}]",
                        "names a file of this node, which a load request may not; write it in config.pbtxt",
                    )


def _shown(dims: Sequence[int]) -> str:
    return "[" + ",".join(map(str, dims)) + "]"


# -- sessions ----------------------------------------------------------------------------------------------------------

# optimization.graph.level -> ONNX Runtime's level.
_GRAPH_LEVELS: Mapping[int, int] = {0: 99, 1: 2, -1: 1, 2: 0}

_CUDNN_SEARCH = ("EXHAUSTIVE", "HEURISTIC", "DEFAULT")
_ARENA_STRATEGIES = ("kNextPowerOfTwo", "kSameAsRequested")

_CUDA_KEYS = frozenset(
    (
        "arena_extend_strategy",
        "cudnn_conv1d_pad_to_nc1d",
        "cudnn_conv_algo_search",
        "cudnn_conv_use_max_workspace",
        "do_copy_in_default_stream",
        "enable_skip_layer_norm_strict_mode",
        "fuse_conv_bias",
        "gpu_mem_limit",
        "prefer_nhwc",
        "sdpa_kernel",
        "tunable_op_enable",
        "tunable_op_max_tuning_duration_ms",
        "tunable_op_tuning_enable",
        "use_ep_level_unified_stream",
        "use_tf32",
    )
)
_TENSORRT_KEYS = frozenset(
    (
        "trt_auxiliary_streams",
        "trt_bf16_enable",
        "trt_builder_optimization_level",
        "trt_build_heuristics_enable",
        "trt_context_memory_sharing_enable",
        "trt_cuda_graph_enable",
        "trt_detailed_build_log",
        "trt_dla_core",
        "trt_dla_enable",
        "trt_dump_ep_context_model",
        "trt_dump_subgraphs",
        "trt_engine_cache_enable",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_engine_hw_compatible",
        "trt_ep_context_embed_mode",
        "trt_ep_context_file_path",
        "trt_force_sequential_engine_build",
        "trt_force_timing_cache",
        "trt_fp16_enable",
        "trt_int8_calibration_table_name",
        "trt_int8_enable",
        "trt_int8_use_native_calibration_table",
        "trt_layer_norm_fp32_fallback",
        "trt_max_partition_iterations",
        "trt_max_workspace_size",
        "trt_min_subgraph_size",
        "trt_profile_max_shapes",
        "trt_profile_min_shapes",
        "trt_profile_opt_shapes",
        "trt_sparsity_enable",
        "trt_timing_cache_enable",
        "trt_timing_cache_path",
    )
)
_FILE_KEYS = frozenset(
    (
        "cache_dir",
        "int8_calibration_table_name",
        "trt_engine_cache_path",
        "trt_engine_cache_prefix",
        "trt_ep_context_file_path",
        "trt_int8_calibration_table_name",
        "trt_timing_cache_path",
    )
)
_OPENVINO_KEYS = frozenset(
    ("cache_dir", "device_type", "disable_dynamic_shapes", "num_of_threads", "num_streams", "precision")
)
# Triton's own keys of the tensorrt accelerator -> ONNX Runtime's.
_TENSORRT_RENAMED: Mapping[str, str] = {
    "max_workspace_size_bytes": "trt_max_workspace_size",
    "int8_calibration_table_name": "trt_int8_calibration_table_name",
    "int8_use_native_calibration_table": "trt_int8_use_native_calibration_table",
}
_PRECISIONS: Mapping[str, Mapping[str, str]] = {
    "FP32": {},
    "FP16": {"trt_fp16_enable": "1"},
    "BF16": {"trt_bf16_enable": "1"},
    "INT8": {"trt_int8_enable": "1"},
}


def _cuda_options(accelerators: Sequence[Any], parameters: _Parameters, problems: _Problems) -> dict[str, str]:
    options: dict[str, str] = {}
    if parameters.has("cudnn_conv_algo_search"):
        options["cudnn_conv_algo_search"] = _CUDNN_SEARCH[parameters.number("cudnn_conv_algo_search", 0)]
    if parameters.has("arena_extend_strategy"):
        options["arena_extend_strategy"] = _ARENA_STRATEGIES[parameters.number("arena_extend_strategy", 0)]
    for key in ("gpu_mem_limit", "do_copy_in_default_stream"):
        if parameters.has(key):
            options[key] = str(parameters.number(key, 0))
    for index, accelerator in enumerate(accelerators):
        if accelerator.name != "cuda":
            continue
        for key, value in sorted(accelerator.parameters.items()):
            if key not in _CUDA_KEYS:
                path = f"optimization.execution_accelerators.gpu_execution_accelerator[{index}].parameters[{key!r}]"
                problems.add(path, f"unknown option; cuda has {', '.join(sorted(_CUDA_KEYS))}")
            options[key] = value
    return options


def _tensorrt_options(accelerator: Any, path: str, problems: _Problems) -> dict[str, str]:
    options: dict[str, str] = {}
    for key, value in sorted(accelerator.parameters.items()):
        if key == "precision_mode":
            if value.upper() not in _PRECISIONS:
                problems.add(f"{path}.parameters['precision_mode']", f"must be one of {', '.join(_PRECISIONS)}")
            options |= _PRECISIONS.get(value.upper(), {})
        elif key in _TENSORRT_RENAMED:
            options[_TENSORRT_RENAMED[key]] = value
        elif key in _TENSORRT_KEYS:
            options[key] = value
        else:
            known = sorted({"precision_mode", *_TENSORRT_RENAMED, *_TENSORRT_KEYS})
            problems.add(f"{path}.parameters[{key!r}]", f"unknown option; tensorrt has {', '.join(known)}")
    return options


def _accelerated(
    config: pb.ModelConfig, parameters: _Parameters, machine: Machine, problems: _Problems
) -> tuple[list[ProviderSettings], list[ProviderSettings]]:
    """Providers in order of preference for a GPU (without device_id) and for the CPU."""
    accelerators = config.optimization.execution_accelerators
    gpu: list[ProviderSettings] = []
    for index, accelerator in enumerate(accelerators.gpu_execution_accelerator):
        path = f"optimization.execution_accelerators.gpu_execution_accelerator[{index}]"
        if accelerator.name == "tensorrt":
            if TENSORRT not in machine.providers:
                problems.add(path, f"the installed runtime has no {TENSORRT}")
            gpu.append(ProviderSettings(TENSORRT, _tensorrt_options(accelerator, path, problems)))
        elif accelerator.name != "cuda":
            problems.add(f"{path}.name", f"unknown accelerator {accelerator.name!r}; there are cuda and tensorrt")
    gpu.append(ProviderSettings(CUDA, _cuda_options(accelerators.gpu_execution_accelerator, parameters, problems)))
    cpu: list[ProviderSettings] = []
    for index, accelerator in enumerate(accelerators.cpu_execution_accelerator):
        path = f"optimization.execution_accelerators.cpu_execution_accelerator[{index}]"
        if accelerator.name != "openvino":
            problems.add(f"{path}.name", f"unknown accelerator {accelerator.name!r}; there is openvino")
            continue
        if OPENVINO not in machine.providers:
            problems.add(path, f"the installed runtime has no {OPENVINO}")
        for key in accelerator.parameters:
            if key not in _OPENVINO_KEYS:
                problems.add(
                    f"{path}.parameters[{key!r}]", f"unknown option; openvino has {', '.join(sorted(_OPENVINO_KEYS))}"
                )
        cpu.append(ProviderSettings(OPENVINO, dict(sorted(accelerator.parameters.items()))))
    if accelerators.gpu_execution_accelerator and not _wants_gpu(config, machine):
        problems.add(
            "optimization.execution_accelerators.gpu_execution_accelerator",
            "has no effect: no instance of the model is on a GPU here",
        )
    return gpu, cpu


def _is_on_gpu(group: pb.ModelInstanceGroup, machine: Machine) -> bool:
    if group.kind == pb.ModelInstanceGroup.KIND_AUTO:
        return bool(group.gpus) or machine.has_cuda
    return group.kind == pb.ModelInstanceGroup.KIND_GPU


def _wants_gpu(config: pb.ModelConfig, machine: Machine) -> bool:
    groups = config.instance_group or [pb.ModelInstanceGroup()]
    return any(_is_on_gpu(group, machine) for group in groups)


def _groups(
    config: pb.ModelConfig, parameters: _Parameters, machine: Machine, problems: _Problems
) -> tuple[tuple[InstanceGroup, ...], list[pb.ModelInstanceGroup]]:
    """The native groups, one per group and device, and the completed `instance_group`."""
    gpu_providers, cpu_providers = _accelerated(config, parameters, machine, problems)
    optimization = config.optimization

    def is_pinned(side: str) -> bool:
        return getattr(optimization, side).enable if optimization.HasField(side) else True

    def session(device_id: int) -> SessionSettings:
        is_gpu = device_id >= 0
        device = f"gpu:{device_id}" if is_gpu else ""
        shrunk = [part for part in parameters.text(_SHRINKAGE).split(";") if part in ("cpu:0", device) and part]
        return SessionSettings(
            providers=tuple(
                ProviderSettings(provider.name, {**provider.options, "device_id": str(device_id)})
                for provider in gpu_providers
            )
            if is_gpu
            else tuple(cpu_providers),
            device_id=device_id,
            intra_op_threads=parameters.number("intra_op_thread_count", 1),
            inter_op_threads=parameters.number("inter_op_thread_count", 1),
            parallel_execution=parameters.number("execution_mode", 0) == 1,
            graph_level=_GRAPH_LEVELS[optimization.graph.level],
            cpu_mem_arena=parameters.number("enable_mem_arena", 1) == 1,
            mem_pattern=parameters.number("enable_mem_pattern", 1) == 1,
            config_entries=parameters.session_entries(),
            run_config_entries={_SHRINKAGE: ";".join(shrunk)} if shrunk else {},
            pinned_input=is_pinned("input_pinned_memory"),
            pinned_output=is_pinned("output_pinned_memory"),
        )

    native: list[InstanceGroup] = []
    completed: list[pb.ModelInstanceGroup] = []
    for index, given in enumerate(config.instance_group or [pb.ModelInstanceGroup()]):
        path = f"instance_group[{index}]"
        group = pb.ModelInstanceGroup()
        group.CopyFrom(given)
        group.name = group.name or f"{config.name}_{index}"
        if group.count < 0:
            problems.add(f"{path}.count", f"must not be negative, is {group.count}")
            continue
        group.count = group.count or 1
        if _is_on_gpu(group, machine):
            group.kind = pb.ModelInstanceGroup.KIND_GPU
            if CUDA not in machine.providers:
                problems.add(path, f"wants a GPU, but the installed runtime has no {CUDA}; install onnxruntime-gpu")
            elif not machine.n_gpus:
                problems.add(path, "wants a GPU, but none is visible here")
            else:
                if not group.gpus:
                    group.gpus.extend(range(machine.n_gpus))
                if any(not 0 <= gpu < machine.n_gpus for gpu in group.gpus) or len(set(group.gpus)) != len(group.gpus):
                    problems.add(f"{path}.gpus", f"{_shown(group.gpus)}: each once, from 0 to {machine.n_gpus - 1}")
                native += [InstanceGroup(group.count, session(gpu)) for gpu in group.gpus]
        else:
            group.kind = pb.ModelInstanceGroup.KIND_CPU
            if group.gpus:
                problems.add(f"{path}.gpus", "KIND_CPU takes no gpus")
            native.append(InstanceGroup(group.count, session(-1)))
        completed.append(group)
    n_instances = sum(group.count for group in native)
    if n_instances > _MOST_INSTANCES:
        problems.add("instance_group", f"{n_instances} instances; at most {_MOST_INSTANCES} on one node")
    return tuple(native), completed


def instance_groups(config: pb.ModelConfig, machine: Machine) -> tuple[InstanceGroup, ...]:
    """How the model's instances are made, one entry per group and device. Raises ConfigError."""
    problems = _Problems()
    groups, _ = _groups(config, _Parameters(config, problems), machine, problems)
    problems.raise_if_any()
    return groups


# -- completion --------------------------------------------------------------------------------------------------------


def complete(
    config: pb.ModelConfig,
    name: str,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    machine: Machine,
    default_max_batch_size: int = 64,
) -> pb.ModelConfig:
    """The configuration with everything filled in that the model says.

    REQUIRES: check(config, ...) passed. A model batches when every input and output has a free first dimension; then
    max_batch_size 0 becomes the default and dynamic batching is switched on. Dims are written without the batch
    dimension. Raises ConfigError when configuration and model disagree.
    """
    problems = _Problems()
    done = pb.ModelConfig()
    done.CopyFrom(config)
    done.name, done.platform, done.backend = name, PLATFORM, BACKEND
    done.default_model_filename = model_filename(config)
    if done.version_policy.WhichOneof("policy_choice") is None:
        done.version_policy.latest.num_versions = 1
    for side in ("input_pinned_memory", "output_pinned_memory"):
        if not done.optimization.HasField(side):
            getattr(done.optimization, side).enable = True

    _check_model(inputs, outputs, problems)
    done.max_batch_size = _max_batch_size(config, inputs, outputs, default_max_batch_size, problems)
    if done.max_batch_size > 1 and done.WhichOneof("scheduling_choice") is None:
        done.dynamic_batching.SetInParent()
    for size in done.dynamic_batching.preferred_batch_size:
        if size > max(done.max_batch_size, 1) and not config.max_batch_size:
            problems.add(
                "dynamic_batching.preferred_batch_size", f"{size} is above max_batch_size {done.max_batch_size}"
            )

    for side, infos, given in (("input", inputs, config.input), ("output", outputs, config.output)):
        _match_names(side, infos, given, problems)
        by_name = {tensor.name: tensor for tensor in given}
        done.ClearField(side)
        for info in infos:
            if side == "output" and given and info.name not in by_name:
                continue  # A configuration may serve some of a model's outputs.
            tensor = getattr(done, side).add()
            if info.name in by_name:
                tensor.CopyFrom(by_name[info.name])
            _complete_tensor(tensor, side, info, done.max_batch_size > 0, problems)
    if not problems:
        _, groups = _groups(done, _Parameters(done, problems), machine, problems)
        del done.instance_group[:]
        done.instance_group.extend(groups)
        _match_warmups(done, problems)
    problems.raise_if_any()
    return done


def _check_model(inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo], problems: _Problems) -> None:
    if not outputs:
        problems.add("output", "the model has none")
    for side, infos in (("input", inputs), ("output", outputs)):
        if len(infos) > _MOST_TENSORS:
            problems.add(side, f"the model has {len(infos)}; at most {_MOST_TENSORS} are supported")
        for info in infos:
            if info.elem_type == 0:
                problems.add(f"{side} {info.name!r}", "is not a tensor in the model; sequences and maps are not served")
            elif info.elem_type not in _OF_ELEM_TYPE:
                kind = _ELEM_TYPE_NAMES.get(info.elem_type, f"number {info.elem_type}")
                problems.add(f"{side} {info.name!r}", f"has the element type {kind}, which the protocol does not carry")
            if len(info.dims) > _MOST_RANK:
                problems.add(f"{side} {info.name!r}", f"has {len(info.dims)} dimensions; at most {_MOST_RANK}")


def _max_batch_size(
    config: pb.ModelConfig,
    inputs: Sequence[TensorInfo],
    outputs: Sequence[TensorInfo],
    default_max_batch_size: int,
    problems: _Problems,
) -> int:
    fixed = [
        f"{side} {info.name!r} is {_shown(info.dims)}"
        for side, infos, given in (("input", inputs, config.input), ("output", outputs, config.output))
        for info in infos
        # Without dimensions the rank may be unknown rather than 0; a configuration that states it is believed.
        if (not info.dims or info.dims[0] != -1)
        and not (config.max_batch_size and not info.dims and any(t.name == info.name and t.dims for t in given))
    ]
    if config.max_batch_size:
        if not inputs:
            problems.add("max_batch_size", "the model has no inputs and cannot batch; set it to 0")
        elif fixed:
            problems.add(
                "max_batch_size",
                f"is {config.max_batch_size} but the model cannot batch: every input and output needs a free first "
                f"dimension, and {fixed[0]}; set it to 0",
            )
        return config.max_batch_size
    if fixed or not inputs or _says_no_batching(config, inputs, outputs):
        return 0
    return default_max_batch_size


def _says_no_batching(config: pb.ModelConfig, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> bool:
    """Whether the configuration writes out the first dimension, as one does for a model that is not to be batched."""
    ranks = {("input", info.name): len(info.dims) for info in inputs}
    ranks |= {("output", info.name): len(info.dims) for info in outputs}
    return any(
        (tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        and len(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims) == ranks.get((side, tensor.name))
        for side, tensors in (("input", config.input), ("output", config.output))
        for tensor in tensors
    )


def _match_names(side: str, infos: Sequence[TensorInfo], given: Sequence[Any], problems: _Problems) -> None:
    if not given:
        return
    known = [info.name for info in infos]
    for index, tensor in enumerate(given):
        if tensor.name not in known:
            problems.add(f"{side}[{index}].name", f"{tensor.name!r} is not in the model, which has {', '.join(known)}")
    configured = {tensor.name for tensor in given}
    missing = [name for name in known if name not in configured]
    if missing and side == "input":
        problems.add("input", f"{', '.join(map(repr, missing))} of the model is missing; list all inputs or none")


def _complete_tensor(tensor: Any, side: str, info: TensorInfo, is_batched: bool, problems: _Problems) -> None:
    """Fills name, data_type and dims, or compares them with the model's."""
    path = f"{side} {info.name!r}"
    tensor.name = info.name
    datatype = _OF_ELEM_TYPE.get(info.elem_type)
    if datatype is None:
        return  # Reported by _check_model.
    if tensor.data_type == pb.TYPE_INVALID:
        tensor.data_type = _CONFIG_TYPES[datatype]
    elif _DATATYPES.get(tensor.data_type) is not datatype:
        configured = pb.DataType.Name(tensor.data_type)
        problems.add(f"{path}.data_type", f"is {configured}, the model has {pb.DataType.Name(_CONFIG_TYPES[datatype])}")
    model_dims = list(info.dims[1:] if is_batched else info.dims)
    if tensor.dims:
        shape = list(tensor.reshape.shape if tensor.HasField("reshape") else tensor.dims)
        fits = len(shape) == len(model_dims) and all(
            have in (-1, want) for want, have in zip(shape, model_dims, strict=True)
        )
        # No dimensions in the file also stands for "not known before a run".
        if not fits and info.dims:
            word = "dims" if not tensor.HasField("reshape") else "reshape.shape"
            note = " after the batch dimension" if is_batched else ""
            problems.add(f"{path}.{word}", f"{_shown(shape)}, the model has {_shown(model_dims)}{note}")
    elif model_dims:
        tensor.dims.extend(model_dims)
    else:
        tensor.dims.append(1)
        tensor.reshape.SetInParent()
    if len(tensor.dims) + is_batched > _MOST_RANK:
        problems.add(f"{path}.dims", f"at most {_MOST_RANK} dimensions")


# -- settings ----------------------------------------------------------------------------------------------------------


def model_settings(completed: pb.ModelConfig, version: str, groups: tuple[InstanceGroup, ...]) -> ModelSettings:
    """The values the native core serves by. REQUIRES: `completed` comes from complete(). Without warm-up batches."""
    batch = (-1,) if completed.max_batch_size else ()

    def tensor(given: pb.ModelInput | pb.ModelOutput) -> TensorSettings:
        dims = (*batch, *given.dims)
        return TensorSettings(
            name=given.name,
            datatype=_DATATYPES[given.data_type],
            dims=dims,
            model_dims=(*batch, *given.reshape.shape) if given.HasField("reshape") else dims,
        )

    return ModelSettings(
        name=completed.name,
        version=version,
        max_batch_size=completed.max_batch_size,
        inputs=tuple(tensor(given) for given in completed.input),
        outputs=tuple(tensor(given) for given in completed.output),
        batching=_batch_settings(completed),
        instance_groups=groups,
        warmup=(),
    )


def _batch_settings(completed: pb.ModelConfig) -> BatchSettings:
    batching = completed.dynamic_batching
    parameters = _Parameters(completed, _Problems())
    return BatchSettings(
        dynamic_batching=completed.HasField("dynamic_batching") and completed.max_batch_size > 0,
        max_batch_rows=max(completed.max_batch_size, 1),
        preferred_batch_sizes=tuple(sorted(set(batching.preferred_batch_size))),
        max_queue_delay_us=batching.max_queue_delay_microseconds,
        preserve_ordering=batching.preserve_ordering,
        priority_levels=batching.priority_levels,
        default_priority_level=batching.default_priority_level,
        default_policy=_queue_policy(batching.default_queue_policy),
        level_policies={
            level: _queue_policy(policy) for level, policy in sorted(batching.priority_queue_policy.items())
        },
        slo_us=parameters.number("tidegate_slo_us", 0),
        priority_aging_us=parameters.number("tidegate_priority_aging_us", 100_000),
    )


def _queue_policy(policy: pb.ModelQueuePolicy) -> QueuePolicySettings:
    return QueuePolicySettings(
        delay=policy.timeout_action == pb.ModelQueuePolicy.DELAY,
        default_timeout_us=policy.default_timeout_microseconds,
        allow_timeout_override=policy.allow_timeout_override,
        max_queue_size=policy.max_queue_size,
    )


# -- warm-up -----------------------------------------------------------------------------------------------------------


def _match_warmups(completed: pb.ModelConfig, problems: _Problems) -> None:
    inputs = {tensor.name: tensor for tensor in completed.input}
    for index, warmup in enumerate(completed.model_warmup):
        path = f"model_warmup[{index}]"
        most = completed.max_batch_size
        if warmup.batch_size > max(most, 1):
            problems.add(f"{path}.batch_size", f"{warmup.batch_size} is above max_batch_size {most}")
        for name in sorted(inputs.keys() - warmup.inputs.keys()):
            problems.add(f"{path}.inputs", f"input {name!r} is missing")
        for name, given in sorted(warmup.inputs.items()):
            at = f"{path}.inputs[{name!r}]"
            tensor = inputs.get(name)
            if tensor is None:
                problems.add(at, f"the model has no such input, it has {', '.join(sorted(inputs))}")
                continue
            if given.data_type not in (pb.TYPE_INVALID, tensor.data_type):
                want = pb.DataType.Name(tensor.data_type)
                problems.add(f"{at}.data_type", f"is {pb.DataType.Name(given.data_type)}, the model has {want}")
            dims = list(given.dims)
            if len(dims) != len(tensor.dims) or any(
                have not in (-1, dim) for dim, have in zip(dims, tensor.dims, strict=True)
            ):
                problems.add(f"{at}.dims", f"{_shown(dims)}, the model has {_shown(tensor.dims)}")
            elif _payload_bytes(_DATATYPES[tensor.data_type], dims, warmup.batch_size or 1) > _MOST_WARMUP_BYTES:
                problems.add(f"{at}.dims", f"more than {_MOST_WARMUP_BYTES} bytes of warm-up data")


def _payload_bytes(datatype: DataType, dims: Sequence[int], rows: int) -> int:
    """Bytes of zeros or empty strings."""
    return rows * math.prod(dims) * _ELEMENT_BYTES.get(datatype, 4)


def warmup_batches(completed: pb.ModelConfig, model_folder: Path) -> Iterator[WarmupBatch]:
    """The batches to run before the version serves, made one at a time.

    Those of `model_warmup` are required: their failure fails the load. Without any, made-up batches of zeros and empty
    strings (free dimensions 1) of 1, 2, 4 ... max_batch_size rows let the runtime plan its memory and the batcher
    measure; their failure is a warning. Raises ConfigError for a data file that is missing, outside the model's
    `warmup` folder or of the wrong size.
    """
    if completed.model_warmup:
        for index, warmup in enumerate(completed.model_warmup):
            yield _configured(completed, index, warmup, model_folder)
    else:
        yield from _synthetic(completed)


def _configured(completed: pb.ModelConfig, index: int, warmup: pb.ModelWarmup, model_folder: Path) -> WarmupBatch:
    rows = warmup.batch_size or 1
    tensors = []
    for tensor in completed.input:
        given = warmup.inputs[tensor.name]
        datatype = _DATATYPES[tensor.data_type]
        n_elements = math.prod(given.dims)
        choice = given.WhichOneof("input_data_type")
        if choice == "input_data_file":
            path = f"model_warmup[{index}].inputs[{tensor.name!r}].input_data_file"
            data = _from_file(model_folder / "warmup", given.input_data_file, path, datatype, n_elements, rows)
        elif choice == "random_data":
            data = _random(datatype, rows * n_elements)
        else:
            data = bytes(_payload_bytes(datatype, given.dims, rows))
        dims = (rows, *given.dims) if completed.max_batch_size else tuple(given.dims)
        tensors.append(WarmupTensor(tensor.name, datatype, dims, data))
    return WarmupBatch(warmup.name, rows, warmup.count or 1, tuple(tensors), required=True)


def _synthetic(completed: pb.ModelConfig) -> Iterator[WarmupBatch]:
    most = max(completed.max_batch_size, 1)
    sizes = sorted({most, *(1 << power for power in range(most.bit_length()))})
    row = [
        (tensor.name, _DATATYPES[tensor.data_type], tuple(1 if dim == -1 else dim for dim in tensor.dims))
        for tensor in completed.input
    ]
    for rows in sizes:
        if sum(_payload_bytes(datatype, dims, rows) for _, datatype, dims in row) > _MOST_SYNTHETIC_BYTES:
            return
        tensors = tuple(
            WarmupTensor(
                name,
                datatype,
                (rows, *dims) if completed.max_batch_size else dims,
                bytes(_payload_bytes(datatype, dims, rows)),
            )
            for name, datatype, dims in row
        )
        yield WarmupBatch(f"zeros of {rows} rows", rows, _SYNTHETIC_RUNS, tensors, required=False)


def _from_file(folder: Path, name: str, path: str, datatype: DataType, n_elements: int, rows: int) -> bytes:
    """Raw wire bytes of the file: those of the whole batch, or those of one row, which then every row has."""
    parts = _parts(name)
    assert parts is not None, "check() refused other paths"
    file = folder.joinpath(*parts)
    if not file.resolve().is_relative_to(folder.resolve()) or not file.is_file():
        raise ConfigError([f"{path}: {name!r} is not a file in the model's warmup folder"])
    if file.stat().st_size > _MOST_WARMUP_BYTES:
        raise ConfigError([f"{path}: {name!r} has more than {_MOST_WARMUP_BYTES} bytes"])
    data = file.read_bytes()
    if datatype is DataType.BYTES:
        n_found = _count_strings(data)
        is_batch, is_row = n_found == n_elements * rows, n_found == n_elements
        found, wanted = f"{n_found} strings" if n_found >= 0 else "malformed strings", f"{n_elements * rows} strings"
    else:
        row_bytes = n_elements * _ELEMENT_BYTES[datatype]
        is_batch, is_row = len(data) == row_bytes * rows, len(data) == row_bytes
        found, wanted = f"{len(data)} bytes", f"{row_bytes * rows} bytes"
    if is_batch:
        return data
    if is_row:
        return data * rows
    raise ConfigError([f"{path}: {name!r} has {found}, the batch needs {wanted} (or those of one row)"])


def _count_strings(data: bytes) -> int:
    """How many length-prefixed strings these are; -1 when the lengths do not add up."""
    at = count = 0
    while at < len(data):
        if at + 4 > len(data):
            return -1
        at += 4 + int(struct.unpack_from("<I", data, at)[0])
        count += 1
    return count if at == len(data) else -1


def _random(datatype: DataType, n_elements: int) -> bytes:
    """Values in [0, 1) for floats, any for integers, eight letters for strings; the same at every load."""
    source = random.Random(0)
    n_block = max(1, min(n_elements, 4096))
    if datatype is DataType.BYTES:
        letters = "abcdefghijklmnopqrstuvwxyz"
        texts = ("".join(source.choices(letters, k=8)).encode() for _ in range(n_block))
        block = b"".join(struct.pack("<I", len(text)) + text for text in texts)
    elif datatype is DataType.BOOL:
        block = bytes(source.randrange(2) for _ in range(n_block))
    elif datatype is DataType.BF16:
        # The upper half of the little-endian FP32.
        block = b"".join(struct.pack("<f", source.random())[2:] for _ in range(n_block))
    elif datatype in (DataType.FP16, DataType.FP32, DataType.FP64):
        code = {DataType.FP16: "e", DataType.FP32: "f", DataType.FP64: "d"}[datatype]
        block = struct.pack(f"<{n_block}{code}", *(source.random() for _ in range(n_block)))
    else:
        block = source.randbytes(n_block * _ELEMENT_BYTES[datatype])
    size = len(block) // n_block * n_elements
    return (block * (n_elements // n_block + 1))[:size]
