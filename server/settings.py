"""The serving settings of one version as frozen values: what `model_config.py` makes of a ModelConfig.

The native module reads these attributes by name (`ext/bind/`), so a rename here is a rename there.
Shapes are tuples in which -1 is a free dimension; times carry their unit in the name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum


class DataType(Enum):
    """Wire names of the Open Inference Protocol with ONNX's TensorProto.DataType numbers."""

    FP32 = 1
    UINT8 = 2
    INT8 = 3
    UINT16 = 4
    INT16 = 5
    INT32 = 6
    INT64 = 7
    BYTES = 8
    BOOL = 9
    FP16 = 10
    FP64 = 11
    UINT32 = 12
    UINT64 = 13
    BF16 = 16


@dataclass(frozen=True, slots=True)
class TensorSettings:
    """One input or output. Both shapes include the batch dimension (-1, first) when the model batches."""

    name: str
    datatype: DataType
    dims: tuple[int, ...]  # as on the wire
    model_dims: tuple[int, ...]  # as the runtime has it; differs only with `reshape`


@dataclass(frozen=True, slots=True)
class QueuePolicySettings:
    """ModelQueuePolicy. `max_queue_size` 0 means the built-in bound, never unlimited."""

    delay: bool = False  # timeout_action: DELAY
    default_timeout_us: int = 0
    allow_timeout_override: bool = False
    max_queue_size: int = 0


@dataclass(frozen=True, slots=True)
class BatchSettings:
    """ModelDynamicBatching and the parameters beside it."""

    dynamic_batching: bool = True
    max_batch_rows: int = 1
    preferred_batch_sizes: tuple[int, ...] = ()
    max_queue_delay_us: int = 0
    preserve_ordering: bool = False
    priority_levels: int = 0
    default_priority_level: int = 0
    default_policy: QueuePolicySettings = field(default_factory=QueuePolicySettings)
    level_policies: Mapping[int, QueuePolicySettings] = field(default_factory=dict)
    slo_us: int = 0
    priority_aging_us: int = 100_000


@dataclass(frozen=True, slots=True)
class ProviderSettings:
    """One execution provider with its options, e.g. ("CUDAExecutionProvider", {"device_id": "0"})."""

    name: str
    options: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SessionSettings:
    """How ONNX Runtime builds a session. `device_id` -1 is the CPU."""

    providers: tuple[ProviderSettings, ...] = ()  # in order of preference; the CPU provider is always last
    device_id: int = -1
    intra_op_threads: int = 1
    inter_op_threads: int = 1
    parallel_execution: bool = False
    graph_level: int = 99  # ONNX Runtime's: 0 none, 1 basic, 2 extended, 99 all
    cpu_mem_arena: bool = True
    mem_pattern: bool = True
    config_entries: Mapping[str, str] = field(default_factory=dict)  # AddSessionConfigEntry
    run_config_entries: Mapping[str, str] = field(default_factory=dict)  # AddRunConfigEntry
    pinned_input: bool = True  # GPU: page-locked staging buffers
    pinned_output: bool = True


@dataclass(frozen=True, slots=True)
class WarmupTensor:
    """One input of a warm-up batch: raw wire bytes for the whole batch."""

    name: str
    datatype: DataType
    dims: tuple[int, ...]  # batch dimension included when the model batches
    data: bytes


@dataclass(frozen=True, slots=True)
class WarmupBatch:
    """One warm-up batch. `required` says whether its failure fails the load (a configured one) or only warns."""

    name: str
    rows: int
    count: int
    tensors: tuple[WarmupTensor, ...]
    required: bool


@dataclass(frozen=True, slots=True)
class InstanceGroup:
    """`count` executors on one device; `device_id` -1 is the CPU."""

    count: int
    session: SessionSettings


@dataclass(frozen=True, slots=True)
class ModelSettings:
    """Everything the native core needs to serve one version."""

    name: str
    version: str
    max_batch_size: int  # 0: no batch dimension
    inputs: tuple[TensorSettings, ...]
    outputs: tuple[TensorSettings, ...]
    batching: BatchSettings
    instance_groups: tuple[InstanceGroup, ...]
    warmup: tuple[WarmupBatch, ...]
