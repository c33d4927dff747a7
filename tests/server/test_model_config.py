"""ModelConfig: what is read, refused with its path, completed from the model, and turned into settings."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format, text_format
from hypothesis import given
from hypothesis import strategies as st

from protos.gen import model_config_pb2 as pb
from server.model_config import (
    MOST_CONFIG_BYTES,
    ConfigError,
    Machine,
    check,
    complete,
    instance_groups,
    is_plain_name,
    model_filename,
    model_settings,
    read_json,
    read_text,
    version_policy,
    warmup_batches,
)
from server.policy.versions import All, Latest, Specific
from server.settings import DataType, ModelSettings, ProviderSettings, QueuePolicySettings, WarmupBatch
from tests.server.fakes import TensorInfo

FLOAT, INT64, STRING, BOOL, FP16, BF16 = 1, 7, 8, 9, 10, 16
CPU = Machine()
GPU = Machine(("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"), 2)
GPU_WITHOUT_DEVICE = Machine(("CUDAExecutionProvider", "CPUExecutionProvider"), 0)

X, Y = TensorInfo("X", FLOAT, (-1, 4)), TensorInfo("Y", FLOAT, (-1, 2))


def completed(
    text: str = "",
    inputs: list[TensorInfo] | None = None,
    outputs: list[TensorInfo] | None = None,
    machine: Machine = CPU,
    default: int = 64,
) -> pb.ModelConfig:
    config = read_text(text)
    check(config, "m", machine)
    return complete(config, "m", [X] if inputs is None else inputs, outputs or [Y], machine, default)


def settings(text: str = "", machine: Machine = CPU, **tensors: Any) -> ModelSettings:
    config = completed(text, machine=machine, **tensors)
    return model_settings(config, "1", instance_groups(config, machine))


def problems(call: Any, *arguments: Any, **named: Any) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        call(*arguments, **named)
    return raised.value.problems


def check_problems(text: str, machine: Machine = CPU, *, is_from_request: bool = False) -> tuple[str, ...]:
    return problems(check, read_text(text), "m", machine, is_from_request=is_from_request)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_text_in_all_its_forms_is_read() -> None:
    config = read_text(
        'name: "m", max_batch_size: 8; # a comment\n'
        "input [ { name: 'X' data_type: TYPE_FP32 dims: [ 4 ] } ]\n"
        "input < name: 'Z' data_type: TYPE_STRING dims: 1 dims: -1 >\n"
        "dynamic_batching { }"
    )
    assert [list(tensor.dims) for tensor in config.input] == [[4], [1, -1]]
    assert config.WhichOneof("scheduling_choice") == "dynamic_batching"


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("max_batch: 3", "config.pbtxt:1:1"),
        ("name: 'm'\nmax_batch_size: lots", "config.pbtxt:2:17"),
        ("input { name: 'X' dims: [4 }", "config.pbtxt:1:"),
        ("input {", "config.pbtxt:1:"),
        ("dynamic_batching { } sequence_batching { direct { } }", "config.pbtxt:1:22"),
    ],
)
def test_a_mistake_in_text_is_told_with_its_place(text: str, place: str) -> None:
    (problem,) = problems(read_text, text)
    assert problem.startswith(place)


def test_text_and_json_have_a_largest_size() -> None:
    assert "longer than" in problems(read_text, "#" * (MOST_CONFIG_BYTES + 1))[0]
    assert "longer than" in problems(read_json, " " * (MOST_CONFIG_BYTES + 1))[0]


def test_json_takes_both_spellings_and_enums_in_any_case() -> None:
    config = read_json(
        json.dumps(
            {
                "maxBatchSize": 8,
                "input": [{"name": "X", "data_type": "type_fp32", "dims": ["4", -1]}],
                "output": [{"name": "Y", "dataType": 9, "dims": [2]}],
                "parameters": {"execution_mode": {"string_value": "1"}},
                "instance_group": [{"kind": "kind_cpu", "count": 2}],
                "model_transaction_policy": None,
            }
        )
    )
    assert config.max_batch_size == 8
    assert (config.input[0].data_type, config.output[0].data_type) == (pb.TYPE_FP32, pb.TYPE_INT64)
    assert config.parameters["execution_mode"].string_value == "1"
    assert config.instance_group[0].kind == pb.ModelInstanceGroup.KIND_CPU


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "config: not JSON"),
        ("[]", "config: must be an object, not a list"),
        ("3", "config: must be an object, not a number"),
        ('{"max_batch": 1}', "max_batch: unknown field; ModelConfig has name"),
        ('{"max_batch_size": 1, "maxBatchSize": 2}', "maxBatchSize: given twice"),
        ('{"name": "a", "name": "b"}', "config: not JSON: 'name' is given twice"),
        ('{"max_batch_size": NaN}', "config: not JSON: NaN is not a value of JSON"),
        ('{"max_batch_size": "many"}', "config: "),
        ('{"max_batch_size": 3.5}', "config: "),
        ('{"max_batch_size": 99999999999}', "config: "),
        ('{"input": {}}', "input: must be a list, not an object"),
        ('{"input": [{"name": "X"}, {"nam": "Y"}]}', "input[1].nam: unknown field; ModelInput has"),
        ('{"input": ["X"]}', "input[0]: must be an object, not a string"),
        ('{"input": [{"data_type": "FP33"}]}', "input[0].data_type: unknown value 'FP33'; there are TYPE_INVALID"),
        ('{"parameters": []}', "parameters: must be an object, not a list"),
        ('{"parameters": {"a": "b"}}', "parameters['a']: must be an object, not a string"),
        ('{"instance_group": [{"kind": true}]}', "instance_group[0].kind: must be a name, not a boolean"),
        ('{"x": ' + "[" * 100_000 + "]" * 100_000 + "}", "config: the JSON nests too deep"),
    ],
)
def test_a_mistake_in_json_is_told_with_its_path(text: str, problem: str) -> None:
    found = problems(read_json, text)
    assert found[0].startswith(problem)


def test_all_mistakes_in_json_are_told_at_once() -> None:
    found = problems(read_json, '{"a": 1, "b": 2, "input": [{"c": 3}]}')
    assert [problem.split(":")[0] for problem in found] == ["a", "b", "input[0].c"]


def test_more_mistakes_than_anybody_reads_are_counted() -> None:
    with pytest.raises(ConfigError) as raised:
        read_json(json.dumps({f"f{number}": 1 for number in range(50)}))
    assert len(raised.value.problems) == 50
    assert str(raised.value).endswith("and 30 more")


NAMES = st.text(st.characters(categories=("L", "N")), min_size=1, max_size=5)
CONFIGS = st.builds(
    pb.ModelConfig,
    name=NAMES,
    max_batch_size=st.integers(0, 1000),
    default_model_filename=NAMES,
    input=st.lists(
        st.builds(
            pb.ModelInput,
            name=NAMES,
            data_type=st.sampled_from(pb.DataType.values()),
            dims=st.lists(st.integers(-1, 2**40), max_size=3),
        ),
        max_size=2,
    ),
    instance_group=st.lists(
        st.builds(
            pb.ModelInstanceGroup,
            kind=st.sampled_from(pb.ModelInstanceGroup.Kind.values()),
            count=st.integers(0, 9),
            gpus=st.lists(st.integers(0, 3), max_size=2),
        ),
        max_size=2,
    ),
    parameters=st.dictionaries(NAMES, st.builds(pb.ModelParameter, string_value=st.text(max_size=5)), max_size=2),
    dynamic_batching=st.none()
    | st.builds(
        pb.ModelDynamicBatching,
        preferred_batch_size=st.lists(st.integers(1, 8), max_size=2),
        max_queue_delay_microseconds=st.integers(0, 2**63),
    ),
)


@given(CONFIGS)
def test_text_survives_being_written_and_read(config: pb.ModelConfig) -> None:
    assert read_text(text_format.MessageToString(config)) == config
    assert read_text(text_format.MessageToString(config, as_one_line=True)) == config


@given(CONFIGS, st.booleans())
def test_json_survives_being_written_and_read(config: pb.ModelConfig, keeps_names: bool) -> None:
    assert read_json(json_format.MessageToJson(config, preserving_proto_field_name=keeps_names)) == config


@given(st.text(max_size=100))
def test_no_text_does_anything_but_be_refused(text: str) -> None:
    for read in (read_text, read_json):
        try:
            assert isinstance(read(text), pb.ModelConfig)
        except ConfigError as error:
            assert error.problems  # noqa: PT017 - either is right


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from([field.name for field in pb.ModelConfig.DESCRIPTOR.fields] + ["count", "x"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=8,
)


@given(JSON_VALUES)
def test_no_json_does_anything_but_be_refused(value: Any) -> None:
    try:
        config = read_json(json.dumps(value))
        check(config, "m", CPU)
        assert complete(config, "m", [X], [Y], CPU).name == "m"
    except ConfigError as error:
        assert error.problems  # noqa: PT017 - either is right


# -- names and policies ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a", "A-1_b.c", "0", "_x", "-x", "x" * 255])
def test_plain_names(name: str) -> None:
    assert is_plain_name(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".x", "a/b", "a\\b", "a b", "ü", "x" * 256, "a\n", "a\0"])
def test_names_that_are_not_plain(name: str) -> None:
    assert not is_plain_name(name)


@pytest.mark.parametrize(
    ("text", "policy"),
    [
        ("", Latest(1)),
        ("version_policy { latest { } }", Latest(1)),
        ("version_policy { latest { num_versions: 3 } }", Latest(3)),
        ("version_policy { all { } }", All()),
        ("version_policy { specific { versions: [1, 3] } }", Specific((1, 3))),
        (
            (
                "version_policy { specific { versions: 1 } } "
                'parameters { key: "tidegate_versions" value { string_value: "1.4.0, 1.5.0 2" } }'
            ),
            Specific((1,), ("1.4.0", "1.5.0", "2")),
        ),
    ],
)
def test_version_policies(text: str, policy: Any) -> None:
    config = read_text(text)
    check(config, "m", CPU)
    assert version_policy(config) == policy


def test_the_file_of_a_model_may_be_named() -> None:
    assert model_filename(read_text("")) == "model.onnx"
    assert model_filename(read_text('default_model_filename: "net.onnx"')) == "net.onnx"


# -- refused, with the path --------------------------------------------------------------------------------------------

REFUSED = [
    ('name: "other"', "name: is 'other' but the model is called 'm'"),
    ('platform: "tensorflow_savedmodel"', "platform: 'tensorflow_savedmodel' is not served here"),
    ('backend: "python"', "backend: 'python' is not served here"),
    ('runtime: "x"', "runtime: "),
    ('default_model_filename: "../m.onnx"', "default_model_filename: must be a plain file name"),
    ('default_model_filename: "/etc/passwd"', "default_model_filename: must be a plain file name"),
    ("version_policy { specific { } }", "version_policy.specific.versions: names no version"),
    ("version_policy { specific { versions: -1 } }", "version_policy.specific.versions: must not be negative"),
    ("input { name: 'X' } input { name: 'Z' data_type: 99 }", "input[1].data_type: unknown value 99; there are TYPE_"),
    ("instance_group { kind: 7 }", "instance_group[0].kind: unknown value 7; there are KIND_AUTO"),
    (
        "model_warmup { name: 'w' inputs { key: 'X' value { data_type: 77 } } }",
        "model_warmup[0].inputs['X'].data_type: unknown value 77",
    ),
    (
        "dynamic_batching { default_queue_policy { timeout_action: 5 } }",
        "dynamic_batching.default_queue_policy.timeout_action: unknown value 5; there are REJECT, DELAY",
    ),
    ("max_batch_size: -1", "max_batch_size: must be from 0 to 65536, not -1"),
    ("max_batch_size: 65537", "max_batch_size: must be from 0 to 65536"),
    ("sequence_batching { direct { } }", "sequence_batching: "),
    ("ensemble_scheduling { }", "ensemble_scheduling: "),
    ("model_transaction_policy { decoupled: true }", "model_transaction_policy.decoupled: "),
    ("batch_input { kind: BATCH_ITEM_SHAPE }", "batch_input: "),
    ("batch_output { target_name: 'Y' }", "batch_output: "),
    ("response_cache { enable: true }", "response_cache.enable: "),
    ("model_operations { op_library_filename: 'x.so' }", "model_operations: a model cannot bring code"),
    ("model_repository_agents { agents { name: 'checksum' } }", "model_repository_agents: "),
    ("cc_model_filenames { key: '7.5' value: 'm' }", "cc_model_filenames: "),
    ("metric_tags { key: 'a' value: 'b' }", "metric_tags: "),
    ("model_metrics { metric_control { } }", "model_metrics: "),
    ("optimization { priority: PRIORITY_MAX }", "optimization.priority: "),
    ("optimization { eager_batching: true }", "optimization.eager_batching: "),
    ("optimization { gather_kernel_buffer_threshold: 1 }", "optimization.gather_kernel_buffer_threshold: "),
    ("optimization { cuda { graphs: true } }", "optimization.cuda.graphs: "),
    ("optimization { cuda { graph_spec { batch_size: 1 } } }", "optimization.cuda.graphs: "),
    ("optimization { cuda { busy_wait_events: true } }", "optimization.cuda.busy_wait_events: "),
    ("optimization { cuda { output_copy_stream: true } }", "optimization.cuda.output_copy_stream: "),
    ("optimization { graph { level: 3 } }", "optimization.graph.level: must be -1, 0, 1 or 2, not 3"),
    ("instance_group { rate_limiter { priority: 1 } }", "instance_group[0].rate_limiter: "),
    ("instance_group { secondary_devices { } }", "instance_group[0].secondary_devices: "),
    ("instance_group { } instance_group { profile: 'p' }", "instance_group[1].profile: "),
    ("instance_group { passive: true }", "instance_group[0].passive: "),
    ("instance_group { host_policy: 'p' }", "instance_group[0].host_policy: "),
    ("instance_group { kind: KIND_MODEL }", "instance_group[0].kind: KIND_MODEL"),
    ("instance_group { count: -1 }", "instance_group[0].count: must not be negative"),
    ("instance_group { kind: KIND_CPU gpus: 0 }", "instance_group[0].gpus: KIND_CPU takes no gpus"),
    ("instance_group { count: 200 } instance_group { count: 200 }", "instance_group: 400 instances; at most 256"),
    ("dynamic_batching { preferred_batch_size: 0 }", "dynamic_batching.preferred_batch_size: 0 is not"),
    ("max_batch_size: 4 dynamic_batching { preferred_batch_size: [2, 8] }", "dynamic_batching.preferred_batch_size: 8"),
    (
        "dynamic_batching { max_queue_delay_microseconds: 3600000001 }",
        "dynamic_batching.max_queue_delay_microseconds: must be at most",
    ),
    ("dynamic_batching { priority_levels: 101 default_priority_level: 1 }", "dynamic_batching.priority_levels: "),
    ("dynamic_batching { priority_levels: 3 }", "dynamic_batching.default_priority_level: must be from 1 to"),
    (
        "dynamic_batching { default_priority_level: 1 }",
        "dynamic_batching.default_priority_level: needs priority_levels",
    ),
    (
        "dynamic_batching { priority_queue_policy { key: 1 value { } } }",
        "dynamic_batching.priority_queue_policy[1]: there is no such level",
    ),
    (
        "dynamic_batching { default_queue_policy { default_timeout_microseconds: 9223372036854775807 } }",
        "dynamic_batching.default_queue_policy.default_timeout_microseconds: must be at most",
    ),
    ("input { dims: 4 }", "input[0].name: is missing"),
    ("output { name: 'Y' } output { name: 'Y' }", "output[1].name: 'Y' is given twice"),
    ("input { name: 'X' dims: [4, 0] }", "input[0].dims: [4,0]: a dimension is -1 (free) or at least 1"),
    ("output { name: 'Y' dims: -2 }", "output[0].dims: [-2]"),
    ("input { name: 'X' is_shape_tensor: true }", "input[0].is_shape_tensor: "),
    ("input { name: 'X' is_non_linear_format_io: true }", "input[0].is_non_linear_format_io: "),
    ("input { name: 'X' optional: true }", "input[0].optional: "),
    ("input { name: 'X' allow_ragged_batch: true }", "input[0].allow_ragged_batch: "),
    ("input { name: 'X' format: FORMAT_NCHW dims: [1, 2] }", "input[0].format: "),
    ("output { name: 'Y' label_filename: 'l.txt' }", "output[0].label_filename: "),
    ("input { name: 'X' reshape { shape: 4 } }", "input[0].reshape: needs dims"),
    ("input { name: 'X' dims: 4 reshape { shape: [2, 3] } }", "input[0].reshape.shape: [2,3] and dims [4] must have"),
    ("input { name: 'X' dims: [4, -1, 2] reshape { shape: [2, -1, 4] } }", "input[0].reshape.shape: "),
    ("input { name: 'X' dims: 4 reshape { shape: [4, 0] } }", "input[0].reshape.shape: [4,0]: a dimension"),
    ("model_warmup { batch_size: 1 }", "model_warmup[0].name: is missing"),
    ("model_warmup { name: 'w' count: 10001 }", "model_warmup[0].count: must be at most 10000"),
    ("model_warmup { name: 'w' inputs { key: 'X' value { dims: 4 } } }", "model_warmup[0].inputs['X']: set zero_data"),
    (
        "model_warmup { name: 'w' inputs { key: 'X' value { dims: 4 zero_data: false } } }",
        "model_warmup[0].inputs['X']: set zero_data",
    ),
    (
        "model_warmup { name: 'w' inputs { key: 'X' value { dims: -1 zero_data: true } } }",
        "model_warmup[0].inputs['X'].dims: [-1]: a dimension of warm-up data is at least 1",
    ),
    (
        "model_warmup { name: 'w' inputs { key: 'X' value { dims: 4 input_data_file: '../x' } } }",
        "model_warmup[0].inputs['X'].input_data_file: must be a relative path",
    ),
    (
        "model_warmup { name: 'w' inputs { key: 'X' value { dims: 4 input_data_file: '/etc/passwd' } } }",
        "model_warmup[0].inputs['X'].input_data_file: must be a relative path",
    ),
    ('parameters { key: "x" value { string_value: "1" } }', "parameters['x']: unknown parameter; there are"),
    (
        'parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
        "parameters['intra_op_thread_count']: must be a whole number from 0 to 1024, not 'many'",
    ),
    (
        'parameters { key: "execution_mode" value { string_value: "2" } }',
        "parameters['execution_mode']: must be a whole number from 0 to 1",
    ),
    (
        'parameters { key: "gpu_mem_limit" value { string_value: "9223372036854775808" } }',
        "parameters['gpu_mem_limit']: must be a whole number",
    ),
    (
        'parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "all" } }',
        "parameters['memory.enable_memory_arena_shrinkage']: must be devices",
    ),
    (
        'parameters { key: "tidegate_versions" value { string_value: "1.4.0" } }',
        "parameters['tidegate_versions']: goes with version_policy",
    ),
    (
        'version_policy { specific { } } parameters { key: "tidegate_versions" value { string_value: "new" } }',
        "parameters['tidegate_versions']: must be versions",
    ),
    (
        'parameters { key: "session.disable_prepacking" value { string_value: "" } }',
        "parameters['session.disable_prepacking']: must have a value",
    ),
    (
        'parameters { key: "session.load_model_format" value { string_value: "ORT" } }',
        "parameters['session.load_model_format']: unknown parameter",
    ),
    (
        "optimization { execution_accelerators { cpu_execution_accelerator { name: 'x' } } }",
        "optimization.execution_accelerators.cpu_execution_accelerator[0].name: unknown accelerator 'x'",
    ),
    (
        "optimization { execution_accelerators { cpu_execution_accelerator { name: 'openvino' } } }",
        "optimization.execution_accelerators.cpu_execution_accelerator[0]: the installed runtime has no OpenVINO",
    ),
    (
        "optimization { execution_accelerators { gpu_execution_accelerator { name: 'cuda' } } }",
        "optimization.execution_accelerators.gpu_execution_accelerator: has no effect: no instance of the model is on",
    ),
    ("instance_group { kind: KIND_GPU }", "instance_group[0]: wants a GPU, but the installed runtime has no CUDA"),
    ("instance_group { gpus: 0 }", "instance_group[0]: wants a GPU, but the installed runtime has no CUDA"),
]


@pytest.mark.parametrize(("text", "problem"), REFUSED)
def test_what_is_not_honoured_is_refused_with_its_path(text: str, problem: str) -> None:
    found = check_problems(text)
    assert any(one.startswith(problem) for one in found), found


def test_every_field_of_the_message_is_honoured_or_refused() -> None:
    refused = {problem.split(":")[0].split(".")[0].split("[")[0] for _, problem in REFUSED}
    honoured = {"default_model_filename", "instance_group", "input", "output", "optimization", "dynamic_batching"}
    for field in pb.ModelConfig.DESCRIPTOR.fields:
        assert field.name in refused | honoured, f"{field.name} is neither refused nor known to be honoured"


def test_all_mistakes_are_told_at_once() -> None:
    found = check_problems("backend: 'x' max_batch_size: -1 input { dims: 0 } response_cache { enable: true }")
    assert [problem.split(":")[0] for problem in found] == [
        "backend",
        "response_cache.enable",
        "max_batch_size",
        "input[0].name",
        "input[0].dims",
    ]


@pytest.mark.parametrize(
    ("key", "accelerator"),
    [("trt_engine_cache_path", "tensorrt"), ("int8_calibration_table_name", "tensorrt")],
)
def test_a_request_may_not_name_files_of_the_node(key: str, accelerator: str) -> None:
    text = (
        "optimization { execution_accelerators { gpu_execution_accelerator { "
        f"name: '{accelerator}' parameters {{ key: '{key}' value: '/tmp/x' }} }} }} }}"
    )
    check(read_text(text), "m", GPU)
    (problem,) = check_problems(text, GPU, is_from_request=True)
    assert "names a file of this node, which a load request may not" in problem


# -- completion --------------------------------------------------------------------------------------------------------


def test_a_model_with_free_first_dimensions_batches() -> None:
    done = completed()
    assert text_format.MessageToString(done, as_one_line=True) == text_format.MessageToString(
        text_format.Parse(
            """
            name: "m" platform: "onnxruntime_onnx" backend: "onnxruntime" default_model_filename: "model.onnx"
            version_policy { latest { num_versions: 1 } }
            max_batch_size: 64
            dynamic_batching { }
            input { name: "X" data_type: TYPE_FP32 dims: 4 }
            output { name: "Y" data_type: TYPE_FP32 dims: 2 }
            instance_group { name: "m_0" kind: KIND_CPU count: 1 }
            optimization { input_pinned_memory { enable: true } output_pinned_memory { enable: true } }
            """,
            pb.ModelConfig(),
        ),
        as_one_line=True,
    )


def test_completing_twice_changes_nothing() -> None:
    once = completed("max_batch_size: 16 instance_group { count: 2 }")
    check(once, "m", CPU)
    assert complete(once, "m", [X], [Y], CPU) == once


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        ([TensorInfo("X", FLOAT, (1, 4))], [Y]),
        ([X], [TensorInfo("Y", FLOAT, (2,))]),
        ([X, TensorInfo("Z", FLOAT, ())], [Y]),
        ([], [Y]),
    ],
)
def test_a_model_with_a_fixed_first_dimension_does_not_batch(
    inputs: list[TensorInfo], outputs: list[TensorInfo]
) -> None:
    done = completed("", inputs, outputs)
    assert done.max_batch_size == 0
    assert done.WhichOneof("scheduling_choice") is None


def test_a_model_that_cannot_batch_and_is_told_to_is_refused() -> None:
    (problem,) = problems(completed, "max_batch_size: 8", [TensorInfo("X", FLOAT, (1, 4))])
    assert problem.startswith("max_batch_size: is 8 but the model cannot batch")
    assert "input 'X' is [1,4]" in problem
    assert "the model has no inputs and cannot batch" in problems(completed, "max_batch_size: 8", [])[0]


def test_writing_out_the_first_dimension_means_no_batching() -> None:
    done = completed("input { name: 'X' data_type: TYPE_FP32 dims: [-1, 4] }")
    assert done.max_batch_size == 0
    assert list(done.input[0].dims) == [-1, 4]
    assert list(done.output[0].dims) == [-1, 2]


@pytest.mark.parametrize(("default", "has_batching"), [(0, False), (1, False), (2, True)])
def test_the_default_largest_batch(default: int, has_batching: bool) -> None:
    done = completed("", default=default)
    assert done.max_batch_size == default
    assert done.HasField("dynamic_batching") is has_batching


def test_preferred_sizes_are_compared_with_the_completed_size() -> None:
    assert completed("dynamic_batching { preferred_batch_size: 64 }").max_batch_size == 64
    (problem,) = problems(completed, "dynamic_batching { preferred_batch_size: 65 }")
    assert problem == "dynamic_batching.preferred_batch_size: 65 is above max_batch_size 64"


def test_a_tensor_without_dimensions_gets_one_and_a_reshape() -> None:
    done = completed("", outputs=[TensorInfo("Y", INT64, (-1,))])
    assert list(done.output[0].dims) == [1]
    assert done.output[0].HasField("reshape")
    output = settings("", outputs=[TensorInfo("Y", INT64, (-1,))]).outputs[0]
    assert (output.dims, output.model_dims) == ((-1, 1), (-1,))


def test_a_reshape_is_honoured() -> None:
    made = settings("max_batch_size: 8 input { name: 'X' dims: [2, 2] reshape { shape: 4 } }")
    assert (made.inputs[0].dims, made.inputs[0].model_dims) == ((-1, 2, 2), (-1, 4))


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("input { name: 'Z' }", "input[0].name: 'Z' is not in the model, which has X"),
        ("output { name: 'Z' }", "output[0].name: 'Z' is not in the model, which has Y"),
        ("input { name: 'X' data_type: TYPE_INT8 }", "input 'X'.data_type: is TYPE_INT8, the model has TYPE_FP32"),
        ("max_batch_size: 8 input { name: 'X' dims: 5 }", "input 'X'.dims: [5], the model has [4] after the batch"),
        ("max_batch_size: 8 input { name: 'X' dims: [4, 1] }", "input 'X'.dims: [4,1], the model has [4]"),
        (
            "max_batch_size: 8 input { name: 'X' dims: [6] reshape { shape: [2, 3] } }",
            "input 'X'.reshape.shape: [2,3], the model has [4]",
        ),
        (
            "model_warmup { name: 'w' batch_size: 65 inputs { key: 'X' value { dims: 4 zero_data: true } } }",
            "model_warmup[0].batch_size: 65 is above max_batch_size 64",
        ),
        ("model_warmup { name: 'w' }", "model_warmup[0].inputs: input 'X' is missing"),
        (
            (
                "model_warmup { name: 'w' inputs { key: 'X' value { dims: 4 zero_data: true } } "
                "inputs { key: 'Q' value { dims: 4 zero_data: true } } }"
            ),
            "model_warmup[0].inputs['Q']: the model has no such input, it has X",
        ),
        (
            "model_warmup { name: 'w' inputs { key: 'X' value { data_type: TYPE_INT8 dims: 4 zero_data: true } } }",
            "model_warmup[0].inputs['X'].data_type: is TYPE_INT8, the model has TYPE_FP32",
        ),
        (
            "model_warmup { name: 'w' inputs { key: 'X' value { dims: 5 zero_data: true } } }",
            "model_warmup[0].inputs['X'].dims: [5], the model has [4]",
        ),
    ],
)
def test_where_configuration_and_model_disagree(text: str, problem: str) -> None:
    found = problems(completed, text)
    assert any(one.startswith(problem) for one in found), found


def test_all_inputs_or_none_are_listed_and_outputs_may_be_chosen() -> None:
    two = [X, TensorInfo("Z", FLOAT, (-1, 1))]
    (problem,) = problems(completed, "input { name: 'X' dims: 4 }", two)
    assert problem == "input: 'Z' of the model is missing; list all inputs or none"
    done = completed("output { name: 'B' }", outputs=[Y._replace(name="A"), Y._replace(name="B")])
    assert [output.name for output in done.output] == ["B"]


@pytest.mark.parametrize(
    ("tensor", "problem"),
    [
        (TensorInfo("X", 0, ()), "input 'X': is not a tensor in the model"),
        (TensorInfo("X", 14, (-1, 2)), "input 'X': has the element type COMPLEX64"),
        (TensorInfo("X", 99, (-1, 2)), "input 'X': has the element type number 99"),
        (TensorInfo("X", FLOAT, (-1,) * 9), "input 'X': has 9 dimensions; at most 8"),
    ],
)
def test_models_that_the_protocol_cannot_carry(tensor: TensorInfo, problem: str) -> None:
    assert problems(completed, "", [tensor])[0].startswith(problem)


def test_a_model_has_outputs_and_a_bounded_number_of_tensors() -> None:
    config = read_text("")
    assert "output: the model has none" in problems(complete, config, "m", [X], [], CPU)
    many = [X._replace(name=f"X{number}") for number in range(65)]
    assert "input: the model has 65; at most 64 are supported" in problems(complete, config, "m", many, [Y], CPU)


@pytest.mark.parametrize("datatype", list(DataType))
def test_every_datatype_comes_from_the_model(datatype: DataType) -> None:
    made = settings("", inputs=[TensorInfo("X", datatype.value, (-1, 4))])
    assert made.inputs[0].datatype is datatype


# -- settings ----------------------------------------------------------------------------------------------------------


def test_batch_settings() -> None:
    batching = settings(
        """
        max_batch_size: 32
        dynamic_batching {
          preferred_batch_size: [16, 8, 16]
          max_queue_delay_microseconds: 500
          preserve_ordering: true
          priority_levels: 3
          default_priority_level: 2
          default_queue_policy { timeout_action: DELAY default_timeout_microseconds: 1000 max_queue_size: 10 }
          priority_queue_policy { key: 1 value { allow_timeout_override: true } }
        }
        parameters { key: "tidegate_slo_us" value { string_value: "20000" } }
        parameters { key: "tidegate_priority_aging_us" value { string_value: "5" } }
        """
    ).batching
    assert batching.dynamic_batching
    assert batching.max_batch_rows == 32
    assert batching.preferred_batch_sizes == (8, 16)
    assert (batching.max_queue_delay_us, batching.preserve_ordering) == (500, True)
    assert (batching.priority_levels, batching.default_priority_level) == (3, 2)
    assert batching.default_policy == QueuePolicySettings(True, 1000, False, 10)
    assert batching.level_policies == {1: QueuePolicySettings(allow_timeout_override=True)}
    assert (batching.slo_us, batching.priority_aging_us) == (20000, 5)


def test_a_model_that_does_not_batch_takes_one_row_at_a_time() -> None:
    made = settings("", inputs=[TensorInfo("X", FLOAT, (4,))])
    assert (made.max_batch_size, made.batching.max_batch_rows, made.batching.dynamic_batching) == (0, 1, False)
    assert made.inputs[0].dims == (4,)


def test_session_settings_come_from_parameters_and_optimization() -> None:
    made = settings(
        """
        instance_group { count: 3 }
        optimization { graph { level: 1 } input_pinned_memory { } }
        parameters { key: "intra_op_thread_count" value { string_value: "4" } }
        parameters { key: "inter_op_thread_count" value { string_value: "2" } }
        parameters { key: "execution_mode" value { string_value: "1" } }
        parameters { key: "enable_mem_arena" value { string_value: "0" } }
        parameters { key: "session.set_denormal_as_zero" value { string_value: "1" } }
        parameters { key: "memory.enable_memory_arena_shrinkage" value { string_value: "cpu:0;gpu:0" } }
        """
    )
    (group,) = made.instance_groups
    assert group.count == 3
    session = group.session
    assert (session.providers, session.device_id) == ((), -1)
    assert (session.intra_op_threads, session.inter_op_threads, session.parallel_execution) == (4, 2, True)
    assert (session.graph_level, session.cpu_mem_arena, session.mem_pattern) == (2, False, True)
    assert session.config_entries == {"session.set_denormal_as_zero": "1"}
    assert session.run_config_entries == {"memory.enable_memory_arena_shrinkage": "cpu:0"}
    assert (session.pinned_input, session.pinned_output) == (False, True)


@pytest.mark.parametrize(("level", "native"), [(0, 99), (1, 2), (-1, 1), (2, 0)])
def test_graph_levels(level: int, native: int) -> None:
    made = settings(f"optimization {{ graph {{ level: {level} }} }}")
    assert made.instance_groups[0].session.graph_level == native


def test_one_thread_per_run_is_the_default() -> None:
    session = settings().instance_groups[0].session
    assert (session.intra_op_threads, session.inter_op_threads, session.parallel_execution) == (1, 1, False)


# -- devices -----------------------------------------------------------------------------------------------------------


def test_instances_go_to_every_gpu_where_there_are_some() -> None:
    made = settings("instance_group { count: 2 }", GPU)
    assert [(group.count, group.session.device_id) for group in made.instance_groups] == [(2, 0), (2, 1)]
    assert made.instance_groups[1].session.providers == (ProviderSettings("CUDAExecutionProvider", {"device_id": "1"}),)
    done = completed("instance_group { count: 2 }", machine=GPU)
    assert done.instance_group[0].kind == pb.ModelInstanceGroup.KIND_GPU
    assert list(done.instance_group[0].gpus) == [0, 1]


@pytest.mark.parametrize(
    ("text", "machine", "devices"),
    [
        ("", CPU, [-1]),
        ("", GPU_WITHOUT_DEVICE, [-1]),
        ("", GPU, [0, 1]),
        ("instance_group { kind: KIND_CPU }", GPU, [-1]),
        ("instance_group { kind: KIND_GPU gpus: 1 }", GPU, [1]),
        ("instance_group { gpus: [1, 0] }", GPU, [1, 0]),
        ("instance_group { kind: KIND_CPU } instance_group { kind: KIND_GPU }", GPU, [-1, 0, 1]),
    ],
)
def test_kinds_and_devices(text: str, machine: Machine, devices: list[int]) -> None:
    assert [group.session.device_id for group in settings(text, machine).instance_groups] == devices


@pytest.mark.parametrize(
    ("text", "machine", "problem"),
    [
        (
            "instance_group { kind: KIND_GPU }",
            GPU_WITHOUT_DEVICE,
            "instance_group[0]: wants a GPU, but none is visible",
        ),
        ("instance_group { gpus: 2 }", GPU, "instance_group[0].gpus: [2]: each once, from 0 to 1"),
        ("instance_group { gpus: [0, 0] }", GPU, "instance_group[0].gpus: [0,0]: each once"),
        ("instance_group { gpus: -1 }", GPU, "instance_group[0].gpus: [-1]"),
        (
            "optimization { execution_accelerators { gpu_execution_accelerator { name: 'x' } } }",
            GPU,
            "optimization.execution_accelerators.gpu_execution_accelerator[0].name: unknown accelerator 'x'",
        ),
        (
            (
                "optimization { execution_accelerators { gpu_execution_accelerator { name: 'cuda' "
                "parameters { key: 'x' value: '1' } } } }"
            ),
            GPU,
            "optimization.execution_accelerators.gpu_execution_accelerator[0].parameters['x']: unknown option; cuda",
        ),
        (
            (
                "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' "
                "parameters { key: 'precision_mode' value: 'FP8' } } } }"
            ),
            GPU,
            "optimization.execution_accelerators.gpu_execution_accelerator[0].parameters['precision_mode']: must be",
        ),
        (
            "optimization { execution_accelerators { gpu_execution_accelerator { name: 'tensorrt' } } }",
            Machine(("CUDAExecutionProvider", "CPUExecutionProvider"), 1),
            "optimization.execution_accelerators.gpu_execution_accelerator[0]: the installed runtime has no Tensorrt",
        ),
    ],
)
def test_devices_and_accelerators_that_cannot_be_had(text: str, machine: Machine, problem: str) -> None:
    found = check_problems(text, machine)
    assert any(one.startswith(problem) for one in found), found


def test_accelerators_come_before_cuda_with_their_options() -> None:
    made = settings(
        """
        optimization { execution_accelerators {
          gpu_execution_accelerator { name: "tensorrt"
            parameters { key: "precision_mode" value: "fp16" }
            parameters { key: "max_workspace_size_bytes" value: "1000" }
            parameters { key: "trt_engine_cache_enable" value: "1" } }
          gpu_execution_accelerator { name: "cuda" parameters { key: "use_tf32" value: "0" } }
        } }
        parameters { key: "cudnn_conv_algo_search" value { string_value: "1" } }
        parameters { key: "gpu_mem_limit" value { string_value: "5000" } }
        parameters { key: "arena_extend_strategy" value { string_value: "1" } }
        instance_group { gpus: 1 }
        """,
        GPU,
    )
    assert made.instance_groups[0].session.providers == (
        ProviderSettings(
            "TensorrtExecutionProvider",
            {
                "trt_fp16_enable": "1",
                "trt_max_workspace_size": "1000",
                "trt_engine_cache_enable": "1",
                "device_id": "1",
            },
        ),
        ProviderSettings(
            "CUDAExecutionProvider",
            {
                "cudnn_conv_algo_search": "HEURISTIC",
                "arena_extend_strategy": "kSameAsRequested",
                "gpu_mem_limit": "5000",
                "use_tf32": "0",
                "device_id": "1",
            },
        ),
    )


# -- warm-up -----------------------------------------------------------------------------------------------------------


def warmups(text: str, folder: Path = Path("/nonexistent"), **tensors: Any) -> list[WarmupBatch]:
    return list(warmup_batches(completed(text, **tensors), folder))


def warm_up_of(data: str, dims: str = "4", batch_size: int = 2) -> str:
    return (
        f"model_warmup {{ name: 'w' batch_size: {batch_size} count: 3 "
        f"inputs {{ key: 'X' value {{ dims: {dims} {data} }} }} }}"
    )


def test_without_a_warm_up_batches_of_zeros_of_growing_size_are_made() -> None:
    batches = warmups("max_batch_size: 12")
    assert [batch.rows for batch in batches] == [1, 2, 4, 8, 12]
    assert not any(batch.required for batch in batches)
    assert batches[-1].tensors[0].dims == (12, 4)
    assert batches[-1].tensors[0].data == bytes(12 * 4 * 4)


def test_made_up_batches_of_every_datatype_have_their_size() -> None:
    for datatype in DataType:
        (batch, *_) = warmups("", inputs=[TensorInfo("X", datatype.value, (-1, 3, -1))])
        size = {"BYTES": 4, "BOOL": 1, "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8}.get(datatype.name)
        size = size or int(datatype.name.removeprefix("U").removeprefix("INT")) // 8
        assert batch.tensors[0].dims == (1, 3, 1)
        assert batch.tensors[0].data == bytes(3 * size)


def test_made_up_batches_stop_before_they_fill_the_memory() -> None:
    batches = warmups("max_batch_size: 1024", inputs=[TensorInfo("X", FLOAT, (-1, 1 << 20))])
    assert [batch.rows for batch in batches] == [1, 2, 4, 8, 16, 32, 64]


def test_a_model_without_batching_is_warmed_by_one_run() -> None:
    (batch,) = warmups("", inputs=[TensorInfo("X", FLOAT, (3, -1))])
    assert (batch.rows, batch.tensors[0].dims) == (1, (3, 1))


def test_zeros_of_a_configured_warm_up() -> None:
    (batch,) = warmups(warm_up_of("zero_data: true"))
    assert (batch.name, batch.rows, batch.count, batch.required) == ("w", 2, 3, True)
    assert batch.tensors[0].dims == (2, 4)
    assert batch.tensors[0].data == bytes(32)


@pytest.mark.parametrize(
    ("elem_type", "code", "size"), [(FLOAT, "f", 4), (FP16, "e", 2), (11, "d", 8), (INT64, "q", 8), (BOOL, "?", 1)]
)
def test_random_data_is_the_same_at_every_load(elem_type: int, code: str, size: int) -> None:
    inputs = [TensorInfo("X", elem_type, (-1, 4))]
    (batch,) = warmups(warm_up_of("random_data: true"), inputs=inputs)
    data = batch.tensors[0].data
    assert len(data) == 8 * size
    assert warmups(warm_up_of("random_data: true"), inputs=inputs)[0].tensors[0].data == data
    values = struct.unpack(f"<8{code}", data)
    assert len(set(values)) > 1
    if code in "fed":
        assert all(0 <= value < 1.001 for value in values)


def test_random_strings_and_large_random_data() -> None:
    (batch,) = warmups(warm_up_of("random_data: true"), inputs=[TensorInfo("X", STRING, (-1, 4))])
    assert len(batch.tensors[0].data) == 8 * (4 + 8)
    (batch,) = warmups(warm_up_of("random_data: true", "10001", 1), inputs=[TensorInfo("X", BF16, (-1, -1))])
    assert len(batch.tensors[0].data) == 2 * 10001


def test_data_files_of_a_batch_or_of_one_row(tmp_path: Path) -> None:
    folder = tmp_path / "warmup" / "sub"
    folder.mkdir(parents=True)
    row = struct.pack("<4f", 1, 2, 3, 4)
    text = warm_up_of("input_data_file: 'sub/x'")
    (folder / "x").write_bytes(row * 2)
    assert warmups(text, tmp_path)[0].tensors[0].data == row * 2
    (folder / "x").write_bytes(row)
    assert warmups(text, tmp_path)[0].tensors[0].data == row * 2
    (folder / "x").write_bytes(row[:-1])
    (problem,) = problems(warmups, text, tmp_path)
    assert problem == (
        "model_warmup[0].inputs['X'].input_data_file: 'sub/x' has 15 bytes, "
        "the batch needs 32 bytes (or those of one row)"
    )


def test_data_files_of_strings(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    file = tmp_path / "warmup" / "x"
    text, inputs = warm_up_of("input_data_file: 'x'"), [TensorInfo("X", STRING, (-1, 4))]
    one = struct.pack("<I", 2) + b"ab"
    file.write_bytes(one * 8)
    assert warmups(text, tmp_path, inputs=inputs)[0].tensors[0].data == one * 8
    file.write_bytes(one * 4)
    assert warmups(text, tmp_path, inputs=inputs)[0].tensors[0].data == one * 8
    file.write_bytes(one * 3)
    assert "has 3 strings" in problems(warmups, text, tmp_path, inputs=inputs)[0]
    file.write_bytes(one * 8 + b"\1")
    assert "has malformed strings" in problems(warmups, text, tmp_path, inputs=inputs)[0]
    file.write_bytes(struct.pack("<I", 2**32 - 1))
    assert "has malformed strings" in problems(warmups, text, tmp_path, inputs=inputs)[0]


def test_data_files_that_are_not_there_or_lie_outside(tmp_path: Path) -> None:
    (tmp_path / "warmup").mkdir()
    (tmp_path / "secret").write_bytes(bytes(32))
    text = warm_up_of("input_data_file: 'x'")
    assert "is not a file in the model's warmup folder" in problems(warmups, text, tmp_path)[0]
    (tmp_path / "warmup" / "x").symlink_to(tmp_path / "secret")
    assert "is not a file in the model's warmup folder" in problems(warmups, text, tmp_path)[0]
