"""The native codec: it reads what the official protobuf parser reads, refuses what a model cannot take, and writes
answers that the official parser understands."""

from __future__ import annotations

import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from random import Random
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message
from google.protobuf.unknown_fields import UnknownFieldSet
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from protos.gen import grpc_service_pb2 as pb
from server import _native
from server.settings import BatchSettings, DataType, ModelSettings, TensorSettings
from tests.ext.wire_writer import DELIMITED, VARINT, WireWriter, delimited, groups, mutate, tag, varint

MOST_INPUTS = 64
MOST_OUTPUTS = 64
MOST_DIMS = 8

NUMPY_TYPES = {
    DataType.FP32: "<f4",
    DataType.UINT8: "u1",
    DataType.INT8: "i1",
    DataType.UINT16: "<u2",
    DataType.INT16: "<i2",
    DataType.INT32: "<i4",
    DataType.INT64: "<i8",
    DataType.BOOL: "?",
    DataType.FP16: "<f2",
    DataType.FP64: "<f8",
    DataType.UINT32: "<u4",
    DataType.UINT64: "<u8",
    DataType.BF16: "<u2",  # numpy has no such type; its bytes are what counts
}
CONTENTS = {
    DataType.BOOL: "bool_contents",
    DataType.INT8: "int_contents",
    DataType.INT16: "int_contents",
    DataType.INT32: "int_contents",
    DataType.INT64: "int64_contents",
    DataType.UINT8: "uint_contents",
    DataType.UINT16: "uint_contents",
    DataType.UINT32: "uint_contents",
    DataType.UINT64: "uint64_contents",
    DataType.FP32: "fp32_contents",
    DataType.FP64: "fp64_contents",
    DataType.BYTES: "bytes_contents",
}


def tensor(name: str, datatype: DataType, *dims: int, model_dims: tuple[int, ...] | None = None) -> TensorSettings:
    return TensorSettings(name, datatype, dims, dims if model_dims is None else model_dims)


def model(
    inputs: tuple[TensorSettings, ...], outputs: tuple[TensorSettings, ...] | None = None, max_batch_size: int = 64
) -> ModelSettings:
    return ModelSettings(
        name="model",
        version="1.2.3",
        max_batch_size=max_batch_size,
        inputs=inputs,
        outputs=inputs if outputs is None else outputs,
        batching=BatchSettings(),
        instance_groups=(),
        warmup=(),
    )


def strings(*elements: bytes) -> bytes:
    """Raw form of BYTES."""
    return b"".join(struct.pack("<I", len(element)) + element for element in elements)


def add_input(
    request: pb.ModelInferRequest, name: str, datatype: str, shape: tuple[int, ...], raw: bytes | None = None
) -> pb.ModelInferRequest.InferInputTensor:
    added = request.inputs.add(name=name, datatype=datatype, shape=shape)
    if raw is not None:
        request.raw_input_contents.append(raw)
    return added


# -- the same fields as the official parser ----------------------------------------------------------------------------

texts = st.text(max_size=12)
names = st.sampled_from(["x", "y", "", "ü", "a" * 200]) | texts
uint64s = st.integers(0, 2**64 - 1)
int64s = st.integers(-(2**63), 2**63 - 1)


@st.composite
def parameters(draw: st.DrawFn) -> pb.InferParameter:
    member = draw(st.sampled_from(["bool_param", "int64_param", "string_param", "double_param", "uint64_param", None]))
    if member is None:
        return pb.InferParameter()
    values: dict[str, st.SearchStrategy[Any]] = {
        "bool_param": st.booleans(),
        "int64_param": st.sampled_from([-1, 0, 1, 5]) | int64s,
        "string_param": texts,
        "double_param": st.floats(),
        "uint64_param": st.sampled_from([0, 2]) | uint64s,
    }
    return pb.InferParameter(**{member: draw(values[member])})


# What the table of parameters says of each name: which members it takes.
REQUEST_PARAMETERS: dict[str, Callable[[pb.InferParameter, str | None], bool]] = {
    "priority": lambda p, kind: kind == "uint64_param" or (kind == "int64_param" and p.int64_param >= 0),
    "timeout": lambda p, kind: kind == "int64_param" and p.int64_param >= 0,
    "sticky_key": lambda p, kind: kind in ("string_param", "int64_param"),
    "sequence_id": lambda p, kind: kind in ("string_param", "int64_param"),
    "sequence_start": lambda p, kind: kind == "bool_param",
    "sequence_end": lambda p, kind: kind == "bool_param",
    "triton_enable_empty_final_response": lambda p, kind: kind == "bool_param",
}
INPUT_PARAMETERS: dict[str, Callable[[pb.InferParameter, str | None], bool]] = {
    "shared_memory_region": lambda p, kind: kind == "string_param",
    "shared_memory_offset": lambda p, kind: kind == "int64_param",
    "shared_memory_byte_size": lambda p, kind: kind == "int64_param",
}
OUTPUT_PARAMETERS = {
    **INPUT_PARAMETERS,
    "classification": lambda p, kind: kind == "int64_param" and p.int64_param > 0,
}
GOOD_PARAMETERS = {
    "priority": pb.InferParameter(uint64_param=2),
    "timeout": pb.InferParameter(int64_param=1000),
    "sticky_key": pb.InferParameter(int64_param=-7),
    "sequence_id": pb.InferParameter(string_param=""),
    "sequence_start": pb.InferParameter(bool_param=True),
    "sequence_end": pb.InferParameter(bool_param=False),
    "triton_enable_empty_final_response": pb.InferParameter(bool_param=True),
    "shared_memory_region": pb.InferParameter(string_param="r"),
    "shared_memory_offset": pb.InferParameter(int64_param=0),
    "shared_memory_byte_size": pb.InferParameter(int64_param=16),
    "classification": pb.InferParameter(int64_param=3),
}


def parameter_maps(known: dict[str, Any], extra: tuple[str, ...] = ()) -> st.SearchStrategy[dict[str, Message]]:
    """Mostly what is accepted, so that a message with several of them often is."""
    good = st.sampled_from(sorted(known)).map(lambda name: (name, GOOD_PARAMETERS[name]))
    custom = st.tuples(names, parameters().filter(lambda p: p.WhichOneof("parameter_choice") is not None))
    wild = st.tuples(st.sampled_from([*sorted(known), *extra]) | names, parameters())
    return st.lists(st.one_of(good, good, custom, wild), max_size=3).map(dict)


def fill(target: Any, values: dict[str, Message]) -> None:
    for name, value in values.items():
        target[name].CopyFrom(value)


@st.composite
def contents(draw: st.DrawFn) -> pb.InferTensorContents:
    fields: dict[str, st.SearchStrategy[Any]] = {
        "bool_contents": st.booleans(),
        "int_contents": st.integers(-(2**31), 2**31 - 1),
        "int64_contents": int64s,
        "uint_contents": st.integers(0, 2**32 - 1),
        "uint64_contents": uint64s,
        "fp32_contents": st.floats(width=32),
        "fp64_contents": st.floats(),
        "bytes_contents": st.binary(max_size=8),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=2, unique=True))
    return pb.InferTensorContents(**{name: draw(st.lists(fields[name], max_size=6)) for name in chosen})


@st.composite
def requests(draw: st.DrawFn) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name=draw(names), model_version=draw(names), id=draw(texts))
    fill(request.parameters, draw(parameter_maps(REQUEST_PARAMETERS, ("triton_other",))))
    for _ in range(draw(st.integers(0, 3))):
        added = request.inputs.add(name=draw(names), datatype=draw(st.sampled_from(["FP32", "BYTES", ""]) | texts))
        added.shape.extend(draw(st.lists(st.integers(0, 9) | int64s, max_size=10)))
        fill(added.parameters, draw(st.just({}) | parameter_maps(INPUT_PARAMETERS)))
        if draw(st.booleans()):
            added.contents.CopyFrom(draw(contents()))
    for _ in range(draw(st.integers(0, 2))):
        output = request.outputs.add(name=draw(names))
        fill(output.parameters, draw(st.just({}) | parameter_maps(OUTPUT_PARAMETERS)))
    request.raw_input_contents.extend(draw(st.lists(st.binary(max_size=40), max_size=3)))
    return request


def member_of(parameter: pb.InferParameter) -> str | None:
    chosen: str | None = parameter.WhichOneof("parameter_choice")
    return chosen


def bad_parameter(request: pb.ModelInferRequest) -> bool:
    """Whether the table of parameters refuses one of this request."""
    for name, value in request.parameters.items():
        kind = member_of(value)
        known = REQUEST_PARAMETERS.get(name)
        if known is not None:
            if not known(value, kind):
                return True
        elif kind is None or name.startswith("triton_"):
            return True
    sides = ((request.inputs, INPUT_PARAMETERS), (request.outputs, OUTPUT_PARAMETERS))
    return any(
        name in known and not known[name](value, member_of(value))
        for tensors, known in sides
        for one in tensors
        for name, value in one.parameters.items()
    )


def expected_of(request: pb.ModelInferRequest) -> dict[str, object]:
    """What the native parser should see, from what the official one saw."""
    given_parameters = request.parameters
    sticky = given_parameters["sticky_key"] if "sticky_key" in given_parameters else pb.InferParameter()
    sticky_text = str(sticky.int64_param) if member_of(sticky) == "int64_param" else sticky.string_param
    priority = given_parameters["priority"] if "priority" in given_parameters else pb.InferParameter()
    sequence = given_parameters["sequence_id"] if "sequence_id" in given_parameters else pb.InferParameter()
    final = "triton_enable_empty_final_response"
    return {
        "model_name": request.model_name.encode(),
        "model_version": request.model_version.encode(),
        "id": request.id.encode(),
        "sticky_key": sticky_text.encode(),
        "inputs": [
            {
                "name": one.name.encode(),
                "datatype": one.datatype.encode(),
                "shape": tuple(one.shape[:MOST_DIMS]),
                "shape_too_long": len(one.shape) > MOST_DIMS,
                "has_contents": one.HasField("contents"),
                "uses_shared_memory": any(name in one.parameters for name in INPUT_PARAMETERS),
            }
            for one in request.inputs
        ],
        "n_inputs": len(request.inputs),
        "outputs": [
            {
                "name": one.name.encode(),
                "uses_shared_memory": any(name in one.parameters for name in INPUT_PARAMETERS),
                "uses_classification": "classification" in one.parameters,
            }
            for one in request.outputs
        ],
        "raw": list(request.raw_input_contents),
        "n_raw": len(request.raw_input_contents),
        "priority": priority.uint64_param or priority.int64_param,
        "timeout_us": given_parameters["timeout"].int64_param if "timeout" in given_parameters else 0,
        "empty_final_response": final in given_parameters and given_parameters[final].bool_param,
        "in_sequence": bool(sequence.int64_param or sequence.string_param),
    }


def drops_entries(request: pb.ModelInferRequest) -> bool:
    """Whether the official parser put an entry of a map aside.

    Its C core does so with an entry that has unknown fields of its own, unlike its C++ and Java siblings; ours ignores
    such fields, so the parameters of these messages cannot be compared.
    """
    maps = ((request, 4), *((one, 4) for one in request.inputs), *((one, 2) for one in request.outputs))
    return any(
        unknown.field_number == number and unknown.wire_type == DELIMITED
        for message, number in maps
        for unknown in UnknownFieldSet(message)
    )


def require_same(body: bytes) -> str:
    """Compares the two parsers. Says what became of the message: "malformed", "refused" or "read"."""
    try:
        request = pb.ModelInferRequest.FromString(body)
    except DecodeError:
        with pytest.raises(_native.NativeError) as malformed:
            _native.parse_infer_request(body)
        assert malformed.value.reason == "MALFORMED_MESSAGE"
        return "malformed"
    if drops_entries(request):
        with suppress(_native.NativeError):
            assert _native.parse_infer_request(body)["raw"] == list(request.raw_input_contents)
        return "read"
    if bad_parameter(request):
        with pytest.raises(_native.NativeError) as refused_parameter:
            _native.parse_infer_request(body)
        assert refused_parameter.value.reason == "INVALID_TENSOR"
        assert "parameter '" in refused_parameter.value.message
        return "refused"
    assert _native.parse_infer_request(body) == expected_of(request)
    return "read"


@given(requests(), st.integers(0, 2**32))
def test_a_message_is_read_the_same_in_every_form_of_the_wire(request: pb.ModelInferRequest, seed: int) -> None:
    body = WireWriter(Random(seed)).write(request)
    read = pb.ModelInferRequest.FromString(body)
    read.DiscardUnknownFields()
    # The writer itself: compared as text, in which a NaN equals itself.
    assert str(read) == str(request)
    require_same(body)


@given(requests())
def test_a_message_is_read_as_the_official_library_writes_it(request: pb.ModelInferRequest) -> None:
    require_same(request.SerializeToString())


@given(requests(), st.integers(0, 2**32))
def test_a_damaged_message_is_read_or_refused_as_by_the_official_parser(
    request: pb.ModelInferRequest, seed: int
) -> None:
    random = Random(seed)
    body = WireWriter(random).write(request)
    for _ in range(20):
        require_same(mutate(body, random))


@given(st.binary(max_size=64))
def test_any_bytes_are_read_or_refused_as_by_the_official_parser(body: bytes) -> None:
    require_same(body)


def sample_bodies() -> list[bytes]:
    """Messages with one of everything."""
    request = pb.ModelInferRequest(model_name="model", model_version="^1.2", id="7")
    fill(request.parameters, {name: GOOD_PARAMETERS[name] for name in REQUEST_PARAMETERS})
    one = add_input(request, "x", "FP32", (1, 16), bytes(64))
    fill(one.parameters, {name: GOOD_PARAMETERS[name] for name in INPUT_PARAMETERS})
    two = add_input(request, "ÿ€𝄞", "BYTES", (2, 300))
    two.contents.int_contents.extend([1, -1, 2**31 - 1])
    two.contents.fp64_contents.extend([1.0, 2.0])
    two.contents.bytes_contents.extend([b"", b"abc"])
    fill(request.outputs.add(name="y").parameters, {name: GOOD_PARAMETERS[name] for name in OUTPUT_PARAMETERS})
    bare = pb.ModelInferRequest(model_name="model")
    add_input(bare, "x", "FP32", (1, 16), bytes(64))
    return [request.SerializeToString(), bare.SerializeToString()]


def compare_damaged(seed: int, count: int) -> dict[str, int]:
    random = Random(seed)
    bodies = sample_bodies()
    outcomes = {"malformed": 0, "refused": 0, "read": 0}
    for _ in range(count):
        outcomes[require_same(mutate(random.choice(bodies), random))] += 1
    return outcomes


def test_thousands_of_damaged_messages_are_read_or_refused_as_by_the_official_parser() -> None:
    outcomes = compare_damaged(seed=20, count=20_000)
    # Each side of the comparison was really there: the rarest comes some 100 times, more or less as maps are ordered.
    assert min(outcomes.values()) > 40, outcomes


@pytest.mark.slow
def test_a_million_damaged_messages_are_read_or_refused_as_by_the_official_parser() -> None:
    outcomes = compare_damaged(seed=21, count=1_000_000)
    assert min(outcomes.values()) > 5_000, outcomes


def test_every_cut_of_a_message_is_read_or_refused_as_by_the_official_parser() -> None:
    for body in sample_bodies():
        outcomes = {require_same(body[:end]) for end in range(len(body) + 1)}
        assert {"malformed", "read"} <= outcomes


def test_every_single_byte_changed_is_read_or_refused_as_by_the_official_parser() -> None:
    for body in sample_bodies():
        for at in range(len(body)):
            for value in b"\x00\x01\x7f\x80\xff":
                require_same(body[:at] + bytes([value]) + body[at + 1 :])


WIRE_FORMS = {
    "empty": b"",
    "field number 0": b"\x00",
    "wire type 6": b"\x0e",
    "wire type 7": b"\x0f",
    "a tag of five bytes": bytes.fromhex("8a80808000") + b"\x01a",
    "a tag of six bytes": bytes.fromhex("8a8080808000") + b"\x01a",
    "a tag beyond 32 bits": bytes.fromhex("8a80808010") + b"\x01a",
    "a tag that does not end": b"\x8a",
    "a length of ten bytes": b"\x0a" + varint(1, 9) + b"a",
    "a length of eleven bytes": b"\x0a" + bytes.fromhex("8180808080808080808000") + b"a",
    "a length past the end": b"\x0a\x02a",
    "a length beyond 32 bits": b"\x0a" + varint(2**32 + 1) + b"a",
    "a length beyond 31 bits": b"\x7a" + varint(2**31) + b"a",
    "a number whose tenth byte is too large": delimited(5, b"\x18" + b"\xff" * 9 + b"\x7f"),
    "a number of eleven bytes": delimited(5, b"\x18" + b"\x80" * 10 + b"\x00"),
    "a packed number that does not end": delimited(5, delimited(3, b"\x01\x80")),
    "packed floats that do not fill their field": delimited(5, delimited(5, delimited(6, b"123"))),
    "packed doubles that do not fill their field": delimited(5, delimited(5, delimited(7, bytes(12)))),
    "a known field as another type": tag(1, VARINT) + b"\x05" + tag(5, VARINT) + b"\x05",
    "a known field as a group": groups(1, 1) + groups(5, 1),
    "a group that does not end": b"\x7b",
    "a group that ends as another": b"\x7b\x84\x01",
    "the end of a group that did not begin": b"\x7c",
    "a broken field in a group": b"\x7b\x0a\x05\x7c",
    "a cut fixed64": b"\x79" + bytes(7),
    "a cut fixed32": b"\x7d" + bytes(3),
    "an overlong character": delimited(1, b"\xc0\x80"),
    "a surrogate": delimited(1, b"\xed\xa0\x80"),
    "beyond the last character": delimited(1, b"\xf4\x90\x80\x80"),
    "the last character": delimited(1, b"\xf4\x8f\xbf\xbf"),
    "half a character": delimited(1, b"aaaaaaaaaaaaaaa\xe2\x82"),
    "a name that is not UTF-8 and is replaced": delimited(1, b"\xff") + delimited(1, b"a"),
    "a parameter's name that is not UTF-8": delimited(4, delimited(1, b"\xff")),
    "a parameter's text that is not UTF-8": delimited(4, delimited(2, delimited(3, b"\xff"))),
    "a version that is not UTF-8": delimited(2, b"\xff"),
    "an id that is not UTF-8": delimited(3, b"\xff"),
    "an input's name that is not UTF-8": delimited(5, delimited(1, b"\xff")),
    "a datatype that is not UTF-8": delimited(5, delimited(2, b"\xff")),
    "an output's name that is not UTF-8": delimited(6, delimited(1, b"\xff")),
    "bytes are free": delimited(7, b"\xff") + delimited(5, delimited(5, delimited(8, b"\xff"))),
    "an entry with neither name nor value": delimited(4, b""),
    "an entry without a value": delimited(4, delimited(1, b"a")),
    "an entry without a value that is replaced": delimited(4, delimited(1, b"a"))
    + delimited(4, delimited(1, b"a") + delimited(2, b"\x08\x01")),
    "an entry that loses its value": delimited(4, delimited(1, b"a") + delimited(2, b"\x08\x01"))
    + delimited(4, delimited(1, b"a")),
    "a value in two pieces": delimited(
        4, delimited(1, b"timeout") + delimited(2, b"\x08\x01") + delimited(2, b"\x10\x05") + delimited(2, b"")
    ),
    "a bool beyond 32 bits": delimited(4, delimited(1, b"sequence_end") + delimited(2, b"\x08" + varint(2**32))),
}


@pytest.mark.parametrize("form", WIRE_FORMS)
def test_an_odd_form_of_the_wire_is_read_or_refused_as_by_the_official_parser(form: str) -> None:
    require_same(WIRE_FORMS[form])


@pytest.mark.parametrize(
    ("place", "wrap"),
    [
        ("the request", lambda inner: inner),
        ("an input", lambda inner: delimited(5, inner)),
        ("contents", lambda inner: delimited(5, delimited(5, inner))),
        ("a parameter", lambda inner: delimited(4, delimited(1, b"a") + delimited(2, b"\x08\x01" + inner))),
        ("an input's parameter", lambda inner: delimited(5, delimited(4, delimited(2, inner)))),
        ("an output's parameter", lambda inner: delimited(6, delimited(2, delimited(2, inner)))),
    ],
)
def test_unknown_groups_may_be_nested_as_deep_as_the_official_parser_allows(
    place: str, wrap: Callable[[bytes], bytes]
) -> None:
    outcomes = [require_same(wrap(groups(15, depth))) for depth in range(90, 110)]
    assert {"malformed", "read"} == set(outcomes), place
    require_same(wrap(groups(15, 100_000)))


def test_unknown_fields_of_a_map_entry_leave_the_entry_as_it_is() -> None:
    entry = delimited(1, b"timeout") + b"\x78\x01" + delimited(2, b"\x10\x05" + b"\x78\x01")
    assert _native.parse_infer_request(delimited(4, entry))["timeout_us"] == 5


def test_many_parameters_that_lose_and_regain_their_values_are_decided_in_bounded_time() -> None:
    without = b"".join(delimited(4, delimited(1, b"p%d" % i)) for i in range(20_000))
    regained = b"".join(delimited(4, delimited(1, b"p%d" % i) + delimited(2, b"\x08\x01")) for i in range(20_000))
    with pytest.raises(_native.NativeError, match="INVALID_TENSOR"):
        _native.parse_infer_request(without)
    with pytest.raises(_native.NativeError, match="INVALID_TENSOR"):
        _native.parse_infer_request(without + regained)


def test_a_malformed_message_is_named_with_its_fault() -> None:
    with pytest.raises(_native.NativeError) as refused:
        _native.parse_infer_request(delimited(5, delimited(1, b"\xff")))
    assert refused.value.message == "the message is not a ModelInferRequest: the name of an input is not UTF-8"


@pytest.mark.parametrize("name", [*REQUEST_PARAMETERS, *OUTPUT_PARAMETERS, "triton_other", "mine"])
@pytest.mark.parametrize("side", ["request", "input", "output"])
def test_a_parameter_takes_the_members_of_its_table_and_no_others(name: str, side: str) -> None:
    values = [
        pb.InferParameter(),
        pb.InferParameter(bool_param=True),
        *(pb.InferParameter(int64_param=value) for value in (-(2**63), -1, 0, 1, 2**63 - 1)),
        *(pb.InferParameter(string_param=value) for value in ("", "text")),
        pb.InferParameter(double_param=1.5),
        *(pb.InferParameter(uint64_param=value) for value in (0, 1, 2**64 - 1)),
    ]
    for value in values:
        request = pb.ModelInferRequest(model_name="model")
        target = {"request": request, "input": request.inputs.add(name="x"), "output": request.outputs.add(name="y")}
        fill(target[side].parameters, {name: value})
        require_same(request.SerializeToString())


def test_a_refused_parameter_is_named_with_its_place_and_its_members() -> None:
    request = pb.ModelInferRequest(model_name="model")
    request.outputs.add(name="y").parameters["classification"].int64_param = 0
    with pytest.raises(_native.NativeError) as refused:
        _native.parse_infer_request(request.SerializeToString())
    assert (
        refused.value.message == "model 'model', output 'y': parameter 'classification' must be an int64_param above 0"
    )


# -- checked against the model -----------------------------------------------------------------------------------------

PAIR = model((tensor("x", DataType.FP32, -1, 4), tensor("y", DataType.INT64, -1, -1)), max_batch_size=8)
WORDS = model((tensor("w", DataType.BYTES, -1, 2),), max_batch_size=8)
SINGLE = model((tensor("x", DataType.FP32, 2, -1),), max_batch_size=0)


def pair_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="model", id="id-7")
    add_input(request, "x", "FP32", (2, 4), bytes(range(32)))
    add_input(request, "y", "INT64", (2, 3), bytes(48))
    return request


def words_request() -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="model")
    add_input(request, "w", "BYTES", (1, 2), strings(b"ab", b""))
    return request


def checked(request: pb.ModelInferRequest, settings: ModelSettings) -> dict[str, Any]:
    result: dict[str, Any] = _native.check_infer_request(request.SerializeToString(), settings)
    return result


def refusal(request: pb.ModelInferRequest, settings: ModelSettings) -> _native.NativeError:
    with pytest.raises(_native.NativeError) as refused:
        checked(request, settings)
    return refused.value


def test_a_good_request_is_seen_in_the_models_order() -> None:
    request = pair_request()
    request.parameters["priority"].uint64_param = 2
    request.parameters["timeout"].int64_param = 5000
    request.parameters["triton_enable_empty_final_response"].bool_param = True
    expected = checked(request, PAIR)
    assert expected.pop("shape_key") != 0
    assert expected == {
        "id": b"id-7",
        "inputs": [((2, 4), bytes(range(32))), ((2, 3), bytes(48))],
        "outputs_wanted": 0b11,
        "rows": 2,
        "priority": 2,
        "timeout_us": 5000,
        "empty_final_response": True,
    }
    swapped = pb.ModelInferRequest()
    swapped.CopyFrom(request)
    del swapped.inputs[:], swapped.raw_input_contents[:]
    swapped.inputs.extend(reversed(request.inputs))
    swapped.raw_input_contents.extend(reversed(request.raw_input_contents))
    found = checked(swapped, PAIR)
    found.pop("shape_key")
    assert found == expected


def change(action: Callable[[pb.ModelInferRequest], object]) -> Callable[[], pb.ModelInferRequest]:
    def make() -> pb.ModelInferRequest:
        request = pair_request()
        action(request)
        return request

    return make


def drop_input(request: pb.ModelInferRequest) -> None:
    del request.inputs[1], request.raw_input_contents[1]


def set_shape(index: int, *shape: int) -> Callable[[pb.ModelInferRequest], object]:
    def action(request: pb.ModelInferRequest) -> None:
        request.inputs[index].shape[:] = shape

    return action


def set_raw(index: int, raw: bytes) -> Callable[[pb.ModelInferRequest], object]:
    def action(request: pb.ModelInferRequest) -> None:
        request.raw_input_contents[index] = raw

    return action


def mix_contents(request: pb.ModelInferRequest) -> None:
    request.inputs[1].contents.int64_contents.extend([0] * 6)


def give_shared_memory(request: pb.ModelInferRequest) -> None:
    request.inputs[0].parameters["shared_memory_region"].string_param = "r"
    del request.raw_input_contents[0]


REFUSALS: dict[str, tuple[Callable[[pb.ModelInferRequest], object], str, str]] = {
    "a missing input": (
        drop_input,
        "INVALID_TENSOR",
        "model 'model', input 'y': it is missing; expected INT64 [-1,-1]",
    ),
    "no input at all": (
        lambda r: r.Clear(),
        "INVALID_TENSOR",
        "model 'model', input 'x': it is missing; expected FP32 [-1,4]",
    ),
    "an extra input": (
        lambda r: add_input(r, "z", "FP32", (2, 4), bytes(32)),
        "INVALID_TENSOR",
        "model 'model': input 'z' is not known; expected 'x', 'y'",
    ),
    "a duplicate input": (
        lambda r: add_input(r, "x", "FP32", (2, 4), bytes(32)),
        "INVALID_TENSOR",
        "model 'model', input 'x': it is given twice; expected once",
    ),
    "a wrong datatype": (
        lambda r: setattr(r.inputs[0], "datatype", "FP64"),
        "INVALID_TENSOR",
        "model 'model', input 'x': its datatype is 'FP64'; expected FP32 [-1,4]",
    ),
    "no datatype": (
        lambda r: setattr(r.inputs[0], "datatype", ""),
        "INVALID_TENSOR",
        "model 'model', input 'x': its datatype is ''; expected FP32 [-1,4]",
    ),
    "a rank too high": (
        set_shape(0, 2, 4, 1),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is [2,4,1]; expected [-1,4], 2 dimensions",
    ),
    "a rank too low": (
        set_shape(0, 8),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is [8]; expected [-1,4], 2 dimensions",
    ),
    "no shape": (
        set_shape(0),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is []; expected [-1,4], 2 dimensions",
    ),
    "more dimensions than any model has": (
        set_shape(0, *range(1, 100)),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is [1,2,3,4,5,6,7,8,...]; expected [-1,4], 2 dimensions",
    ),
    "a wrong dimension": (
        set_shape(0, 2, 5),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is [2,5]; expected [-1,4] with the rows first",
    ),
    "a negative dimension": (
        set_shape(1, 2, -3),
        "INVALID_TENSOR",
        "model 'model', input 'y': its shape is [2,-3]; expected [-1,-1] with a size for each -1",
    ),
    "the model's mark for a free dimension": (
        set_shape(1, 2, -1),
        "INVALID_TENSOR",
        "model 'model', input 'y': its shape is [2,-1]; expected [-1,-1] with a size for each -1",
    ),
    "negative rows": (
        set_shape(0, -1, 4),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape is [-1,4]; expected [-1,4] with a size for each -1",
    ),
    "an overflowing shape": (
        set_shape(1, 2, 2**62),
        "INVALID_TENSOR",
        "model 'model', input 'y': its shape [2,4611686018427387904] is too large to count; expected INT64 [-1,-1]",
    ),
    "zero rows": (
        set_shape(0, 0, 4),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape [0,4] has 0 rows; expected 1 to 8",
    ),
    "too many rows": (
        set_shape(0, 9, 4),
        "INVALID_TENSOR",
        "model 'model', input 'x': its shape [9,4] has 9 rows; expected 1 to 8",
    ),
    "different rows": (
        set_shape(1, 3, 2),
        "INVALID_TENSOR",
        "model 'model', input 'y': it has 3 rows where input 'x' has 2; expected as many in each input",
    ),
    "too few bytes": (
        set_raw(0, bytes(31)),
        "INVALID_TENSOR",
        "model 'model', input 'x': it has 31 bytes; expected 32 for FP32 [2,4]",
    ),
    "too many bytes": (
        set_raw(0, bytes(33)),
        "INVALID_TENSOR",
        "model 'model', input 'x': it has 33 bytes; expected 32 for FP32 [2,4]",
    ),
    "an empty tensor": (
        set_raw(0, b""),
        "INVALID_TENSOR",
        "model 'model', input 'x': it has 0 bytes; expected 32 for FP32 [2,4]",
    ),
    "too few raw contents": (
        lambda r: r.raw_input_contents.pop(),
        "INVALID_TENSOR",
        "model 'model': there are 1 raw_input_contents for 2 inputs; expected one for each of 'x', 'y'",
    ),
    "too many raw contents": (
        lambda r: r.raw_input_contents.append(b""),
        "INVALID_TENSOR",
        "model 'model': there are 3 raw_input_contents for 2 inputs; expected one for each of 'x', 'y'",
    ),
    "no contents": (
        lambda r: r.ClearField("raw_input_contents"),
        "INVALID_TENSOR",
        "model 'model', input 'x': it has 0 values; expected 8 for FP32 [2,4], raw or in fp32_contents",
    ),
    "both raw and typed contents": (
        mix_contents,
        "INVALID_TENSOR",
        "model 'model', input 'y': it has contents beside raw_input_contents; expected one of the two",
    ),
    "empty contents beside raw ones": (
        lambda r: r.inputs[1].contents.SetInParent(),
        "INVALID_TENSOR",
        "model 'model', input 'y': it has contents beside raw_input_contents; expected one of the two",
    ),
    "an unknown requested output": (
        lambda r: r.outputs.add(name="z"),
        "INVALID_TENSOR",
        "model 'model': output 'z' is not known; expected 'x', 'y'",
    ),
    "an output requested twice": (
        lambda r: [r.outputs.add(name="y"), r.outputs.add(name="y")],
        "INVALID_TENSOR",
        "model 'model': output 'y' is requested twice; expected once",
    ),
    "an input in shared memory": (
        give_shared_memory,
        "NOT_SUPPORTED",
        "model 'model', input 'x': shared memory is not supported; send the tensor in the message",
    ),
    "an output in shared memory": (
        lambda r: fill(
            r.outputs.add(name="y").parameters, {"shared_memory_region": GOOD_PARAMETERS["shared_memory_region"]}
        ),
        "NOT_SUPPORTED",
        "model 'model', output 'y': shared memory is not supported; leave its parameters out",
    ),
    "classification": (
        lambda r: fill(r.outputs.add(name="y").parameters, {"classification": GOOD_PARAMETERS["classification"]}),
        "NOT_SUPPORTED",
        "model 'model', output 'y': classification is not supported; leave the parameter out",
    ),
    "a sequence by number": (
        lambda r: fill(r.parameters, {"sequence_id": pb.InferParameter(int64_param=5)}),
        "NOT_SUPPORTED",
        "model 'model': parameter 'sequence_id' names a sequence; sequences are not supported, leave it out",
    ),
    "a sequence by name": (
        lambda r: fill(r.parameters, {"sequence_id": pb.InferParameter(string_param="a")}),
        "NOT_SUPPORTED",
        "model 'model': parameter 'sequence_id' names a sequence; sequences are not supported, leave it out",
    ),
}


@pytest.mark.parametrize("fault", REFUSALS)
def test_a_request_that_does_not_fit_is_refused_with_what_was_expected(fault: str) -> None:
    action, reason, message = REFUSALS[fault]
    error = refusal(change(action)(), PAIR)
    assert (error.reason, error.message) == (reason, message)


@pytest.mark.parametrize("raw", [strings(b"ab", b"c"), strings(b"", b""), strings(b"\x00\xff" * 500, b"x")])
def test_strings_are_taken_as_they_are(raw: bytes) -> None:
    request = words_request()
    request.raw_input_contents[0] = raw
    assert checked(request, WORDS)["inputs"] == [((1, 2), raw)]


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it has 0 strings; expected 2 for BYTES [1,2]"),
        (strings(b"ab"), "it has 1 strings; expected 2 for BYTES [1,2]"),
        (strings(b"ab", b"c", b"d"), "5 bytes are left over after 2 strings; expected 2 for BYTES [1,2]"),
        (strings(b"ab", b"c") + b"\x00", "1 bytes are left over after 2 strings; expected 2 for BYTES [1,2]"),
        (
            strings(b"ab") + b"\x00\x00",
            "string 1 has 2 bytes; expected a length of 4 bytes before each string",
        ),
        (
            strings(b"ab") + struct.pack("<I", 4) + b"abc",
            "string 1 is said to have 4 bytes; expected at most the 3 that are left",
        ),
        (
            struct.pack("<I", 2**32 - 1) + b"ab",
            "string 0 is said to have 4294967295 bytes; expected at most the 2 that are left",
        ),
    ],
)
def test_strings_whose_lengths_lie_are_refused(raw: bytes, message: str) -> None:
    request = words_request()
    request.raw_input_contents[0] = raw
    error = refusal(request, WORDS)
    assert (error.reason, error.message) == ("INVALID_TENSOR", f"model 'model', input 'w': {message}")


def test_a_model_without_a_batch_dimension_takes_one_request_as_one_row() -> None:
    request = pb.ModelInferRequest(model_name="model")
    add_input(request, "x", "FP32", (2, 3), bytes(24))
    assert checked(request, SINGLE)["rows"] == 1
    request.inputs[0].shape[:] = [3, 2]
    assert refusal(request, SINGLE).message == "model 'model', input 'x': its shape is [3,2]; expected [2,-1]"


def test_a_scalar_has_an_empty_shape() -> None:
    settings = model((tensor("x", DataType.FP64),), max_batch_size=0)
    request = pb.ModelInferRequest()
    add_input(request, "x", "FP64", (), bytes(8))
    assert checked(request, settings)["inputs"] == [((), bytes(8))]


@pytest.mark.parametrize("shape", [(2, 0), (2, 1)])
def test_a_free_dimension_may_be_zero(shape: tuple[int, int]) -> None:
    request = pair_request()
    request.inputs[1].shape[:] = shape
    request.raw_input_contents[1] = bytes(8 * shape[0] * shape[1])
    assert checked(request, PAIR)["inputs"][1] == (shape, request.raw_input_contents[1])


def test_a_zero_does_not_hide_an_overflow() -> None:
    settings = model((tensor("x", DataType.FP32, -1, -1, -1),))
    request = pb.ModelInferRequest()
    add_input(request, "x", "FP32", (1, 0, 2**62), b"")
    assert "is too large to count" in refusal(request, settings).message


def test_the_shape_on_the_wire_counts_where_the_configuration_reshapes() -> None:
    settings = model((tensor("x", DataType.FP32, -1, 2, -1, model_dims=(-1, -1, 2, 1)),))
    request = pb.ModelInferRequest()
    add_input(request, "x", "FP32", (1, 2, 3), bytes(24))
    assert checked(request, settings)["inputs"] == [((1, 2, 3), bytes(24))]
    request.inputs[0].shape[:] = [1, 3, 2, 1]
    assert "expected [-1,2,-1], 3 dimensions" in refusal(request, settings).message


def test_a_raw_bool_is_handed_on_as_it_is() -> None:
    settings = model((tensor("x", DataType.BOOL, -1, 4),))
    request = pb.ModelInferRequest()
    add_input(request, "x", "BOOL", (1, 4), b"\x00\x01\x02\xff")
    assert checked(request, settings)["inputs"] == [((1, 4), b"\x00\x01\x02\xff")]


@pytest.mark.parametrize("wanted", [["y"], ["x"], ["y", "x"], []])
def test_requested_outputs_are_marked_in_the_models_order(wanted: list[str]) -> None:
    request = pair_request()
    for name in wanted:
        request.outputs.add(name=name)
    expected = sum(1 << "xy".index(name) for name in wanted) or 0b11
    assert checked(request, PAIR)["outputs_wanted"] == expected


def test_shapes_decide_the_key_and_rows_do_not() -> None:
    def key(rows: int, free: int) -> int:
        request = pb.ModelInferRequest()
        add_input(request, "x", "FP32", (rows, 4), bytes(16 * rows))
        add_input(request, "y", "INT64", (rows, free), bytes(8 * rows * free))
        found: int = checked(request, PAIR)["shape_key"]
        return found

    assert key(1, 3) == key(5, 3) != 0
    assert len({key(1, free) for free in range(50)}) == 50


def test_a_model_whose_shapes_are_fixed_has_no_key() -> None:
    assert checked(words_request(), WORDS)["shape_key"] == 0


def test_a_priority_beyond_32_bits_counts_as_the_largest() -> None:
    request = pair_request()
    request.parameters["priority"].uint64_param = 2**40
    assert checked(request, PAIR)["priority"] == 2**32 - 1


LONG = "ü" * 50_000


@pytest.mark.parametrize(
    "action",
    [
        lambda r: setattr(r.inputs[0], "name", LONG),
        lambda r: setattr(r.inputs[0], "datatype", LONG),
        lambda r: r.outputs.add(name=LONG),
        lambda r: fill(r.parameters, {"triton_" + LONG: pb.InferParameter(bool_param=True)}),
        lambda r: fill(r.parameters, {LONG: pb.InferParameter()}),
        lambda r: [
            setattr(r, "model_name", LONG),
            setattr(r.inputs[0], "name", LONG),
            fill(r.inputs[0].parameters, {"shared_memory_region": pb.InferParameter(bool_param=True)}),
        ],
        set_shape(0, *([2**63 - 1] * 10_000)),
    ],
)
def test_a_refusal_is_short_however_long_the_names_are(action: Callable[[pb.ModelInferRequest], object]) -> None:
    request = pair_request()
    action(request)
    long_named = replace(
        PAIR, name=LONG, inputs=tuple(replace(PAIR.inputs[i % 2], name=f"{i}{LONG}") for i in range(MOST_INPUTS))
    )
    for settings in (PAIR, long_named):
        message = refusal(request, settings).message
        assert len(message.encode()) < 1500
        assert "\N{REPLACEMENT CHARACTER}" not in message  # cut between characters


@pytest.mark.parametrize(
    ("settings", "fragment"),
    [
        (replace(PAIR, outputs=()), "1 to 64 outputs"),
        (replace(PAIR, inputs=PAIR.inputs[:1] * (MOST_INPUTS + 1)), "at most 64 inputs"),
        (replace(PAIR, outputs=PAIR.outputs[:1] * (MOST_OUTPUTS + 1)), "1 to 64 outputs"),
        (model((tensor("x", DataType.FP32, -1, *[1] * MOST_DIMS),)), "'x' has 9 dimensions"),
        (model((tensor("x", DataType.FP32, -1, -2),)), "'x' has a dimension -2"),
        (model((tensor("x", DataType.FP32, 4),)), "'x' of a model that batches must begin with -1"),
        (model((tensor("x", DataType.FP32),)), "'x' of a model that batches must begin with -1"),
    ],
)
def test_settings_that_the_core_cannot_hold_are_refused(settings: ModelSettings, fragment: str) -> None:
    error = refusal(pair_request(), settings)
    assert error.reason == "LOAD_FAILED"
    assert fragment in error.message


# -- typed contents ----------------------------------------------------------------------------------------------------


def numbers_of(datatype: DataType) -> st.SearchStrategy[Any]:
    if datatype is DataType.BOOL:
        return st.booleans()
    if datatype in (DataType.FP32, DataType.FP64):
        return st.floats(width=32 if datatype is DataType.FP32 else 64, allow_nan=False)
    limits = np.iinfo(NUMPY_TYPES[datatype])
    return st.integers(int(limits.min), int(limits.max)) | st.sampled_from([int(limits.min), int(limits.max)])


@pytest.mark.parametrize("datatype", [one for one in CONTENTS if one is not DataType.BYTES])
@given(data=st.data())
@hypothesis_settings(max_examples=30)
def test_typed_numbers_become_their_raw_form(datatype: DataType, data: st.DataObject) -> None:
    rows, width = data.draw(st.integers(1, 4)), data.draw(st.integers(0, 40))
    values = data.draw(st.lists(numbers_of(datatype), min_size=rows * width, max_size=rows * width))
    settings = model((tensor("x", datatype, -1, -1), tensor("y", DataType.UINT8, -1)))
    request = pb.ModelInferRequest()
    add_input(request, "x", datatype.name, (rows, width)).contents.MergeFrom(
        pb.InferTensorContents(**{CONTENTS[datatype]: values})
    )
    add_input(request, "y", "UINT8", (rows,)).contents.uint_contents.extend(range(rows))
    body = WireWriter(Random(data.draw(st.integers(0, 2**32)))).write(request)
    assert _native.check_infer_request(body, settings)["inputs"] == [
        ((rows, width), np.array(values, NUMPY_TYPES[datatype]).tobytes()),
        ((rows,), bytes(range(rows))),
    ]


@given(
    st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=3)), min_size=1, max_size=8), st.integers(0, 2**32)
)
def test_typed_strings_become_their_raw_form(rows: list[tuple[bytes, bytes]], seed: int) -> None:
    elements = [element for row in rows for element in row]
    request = pb.ModelInferRequest()
    add_input(request, "w", "BYTES", (len(rows), 2)).contents.bytes_contents.extend(elements)
    body = WireWriter(Random(seed)).write(request)
    assert _native.check_infer_request(body, WORDS)["inputs"] == [((len(rows), 2), strings(*elements))]


@pytest.mark.parametrize(
    ("datatype", "value", "fits"),
    [
        (DataType.INT8, 127, True),
        (DataType.INT8, 128, False),
        (DataType.INT8, -128, True),
        (DataType.INT8, -129, False),
        (DataType.INT16, 2**15 - 1, True),
        (DataType.INT16, 2**15, False),
        (DataType.INT16, -(2**15) - 1, False),
        (DataType.INT32, -(2**31), True),
        (DataType.UINT8, 255, True),
        (DataType.UINT8, 256, False),
        (DataType.UINT16, 2**16 - 1, True),
        (DataType.UINT16, 2**16, False),
        (DataType.UINT32, 2**32 - 1, True),
    ],
)
def test_a_typed_number_must_be_in_the_range_of_its_type(datatype: DataType, value: int, fits: bool) -> None:
    settings = model((tensor("x", datatype, -1, 3),))
    request = pb.ModelInferRequest()
    added = add_input(request, "x", datatype.name, (1, 3))
    getattr(added.contents, CONTENTS[datatype]).extend([1, 2, value])
    if fits:
        raw = np.array([1, 2, value], NUMPY_TYPES[datatype]).tobytes()
        assert checked(request, settings)["inputs"] == [((1, 3), raw)]
    else:
        assert (
            refusal(request, settings).message
            == f"model 'model', input 'x': element 2 is {value}; expected what {datatype.name} can hold"
        )


@pytest.mark.parametrize("datatype", list(DataType))
@pytest.mark.parametrize("field", sorted(set(CONTENTS.values())))
def test_typed_contents_in_the_field_of_another_type_are_refused(datatype: DataType, field: str) -> None:
    request = pb.ModelInferRequest()
    added = add_input(request, "x", datatype.name, (1, 1))
    getattr(added.contents, field).append(b"a" if field == "bytes_contents" else 1)
    settings = model((tensor("x", datatype, -1, 1),))
    want = CONTENTS.get(datatype, "raw_input_contents")
    if field == want:
        assert checked(request, settings)["rows"] == 1
    else:
        assert (
            refusal(request, settings).message
            == f"model 'model', input 'x': it has {field}; expected {want} for {datatype.name}"
        )


@pytest.mark.parametrize("count", [0, 7, 9])
def test_typed_contents_must_be_as_many_as_the_shape_says(count: int) -> None:
    request = pair_request()
    request.ClearField("raw_input_contents")
    request.inputs[0].contents.fp32_contents.extend([0.0] * count)
    request.inputs[1].contents.int64_contents.extend([0] * 6)
    assert (
        refusal(request, PAIR).message
        == f"model 'model', input 'x': it has {count} values; expected 8 for FP32 [2,4], raw or in fp32_contents"
    )


@pytest.mark.parametrize("datatype", [DataType.FP16, DataType.BF16])
def test_half_precision_travels_raw(datatype: DataType) -> None:
    settings = model((tensor("x", datatype, -1, 2),))
    request = pb.ModelInferRequest()
    add_input(request, "x", datatype.name, (2, 2), b"\x00\x3c\x00\xbc\x01\x02\x03\x04")
    assert checked(request, settings)["inputs"] == [((2, 2), b"\x00\x3c\x00\xbc\x01\x02\x03\x04")]
    request.ClearField("raw_input_contents")
    assert (
        refusal(request, settings).message
        == f"model 'model', input 'x': it has 0 values; expected 4 for {datatype.name} [2,2], raw"
    )


def test_requests_are_gathered_one_behind_the_other() -> None:
    raw = pair_request()
    typed = pair_request()
    typed.ClearField("raw_input_contents")
    typed.inputs[0].contents.fp32_contents.extend([1.0] * 8)
    typed.inputs[1].contents.int64_contents.extend(range(6))
    bodies = [one.SerializeToString() for one in (raw, typed, raw)]
    ones = np.ones(8, "<f4").tobytes()
    assert _native.gather_input(bodies, PAIR, 0) == bytes(range(32)) + ones + bytes(range(32))
    assert _native.gather_input(bodies, PAIR, 1) == bytes(48) + np.arange(6, dtype="<i8").tobytes() + bytes(48)


# -- answers -----------------------------------------------------------------------------------------------------------


def unwrapped(message: bytes) -> bytes:
    """The content of one gRPC message."""
    flag, length = struct.unpack(">BI", message[:5])
    assert flag == 0
    assert length == len(message) - 5
    return message[5:]


@st.composite
def batches(draw: st.DrawFn) -> tuple[ModelSettings, list[Any], int, int, int]:
    """A model, the outputs of a batch of it, and where in the batch the request stood."""
    batch_rows = draw(st.integers(1, 9))
    first_row = draw(st.integers(0, batch_rows - 1))
    rows = draw(st.integers(1, batch_rows - first_row))
    tensors, outputs = [], []
    for i in range(draw(st.integers(1, 4))):
        datatype = draw(st.sampled_from(list(DataType)))
        dims = draw(st.lists(st.integers(0, 3) | st.just(130), max_size=2))
        free = tuple(-1 if draw(st.booleans()) else dim for dim in dims)
        tensors.append(tensor(draw(st.sampled_from(["", "ü", "n" * 130])) + str(i), datatype, -1, *free))
        count = batch_rows * int(np.prod(dims))
        content: bytes | list[bytes]
        if datatype is DataType.BYTES:
            content = [draw(st.binary(max_size=3)) for _ in range(min(count, 8))]
            content += [b"w" * (i % 5) for i in range(count - len(content))]
        else:
            size = np.dtype(NUMPY_TYPES[datatype]).itemsize
            content = Random(draw(st.integers(0, 2**32))).randbytes(count * size)
        outputs.append((datatype.value, (batch_rows, *dims), content))
    settings = model((tensor("x", DataType.INT8, -1),), tuple(tensors))
    return settings, outputs, batch_rows, first_row, rows


@given(batches(), texts, st.booleans(), st.data())
def test_an_answer_holds_the_rows_of_its_request(
    batch: tuple[ModelSettings, list[Any], int, int, int], request_id: str, in_stream: bool, data: st.DataObject
) -> None:
    settings, outputs, batch_rows, first_row, rows = batch
    wanted = data.draw(st.lists(st.sampled_from(range(len(outputs))), unique=True))
    request = pb.ModelInferRequest(id=request_id)
    add_input(request, "x", "INT8", (rows,), bytes(rows))
    for index in wanted:
        request.outputs.add(name=settings.outputs[index].name)
    content = unwrapped(
        _native.encode_infer_response(request.SerializeToString(), settings, outputs, batch_rows, first_row, in_stream)
    )
    expected = pb.ModelInferResponse(model_name="model", model_version="1.2.3", id=request_id)
    for index in sorted(wanted) or range(len(outputs)):
        _, dims, values = outputs[index]
        spec = settings.outputs[index]
        expected.outputs.add(name=spec.name, datatype=spec.datatype.name, shape=(rows, *dims[1:]))
        per_row = len(values) // batch_rows
        slice_ = values[first_row * per_row : (first_row + rows) * per_row]
        expected.raw_output_contents.append(slice_ if isinstance(slice_, bytes) else strings(*slice_))
    if in_stream:
        expected.parameters["triton_final_response"].bool_param = True
        streamed = pb.ModelStreamInferResponse.FromString(content)
        assert streamed == pb.ModelStreamInferResponse(infer_response=expected)
        # As short as the official library writes it, so nothing is there twice.
        assert len(content) == streamed.ByteSize()
    else:
        assert pb.ModelInferResponse.FromString(content) == expected
        assert len(content) == expected.ByteSize()


def test_a_model_without_a_batch_dimension_answers_with_all_it_gave() -> None:
    settings = model(
        (tensor("x", DataType.FP32, 2),), (tensor("y", DataType.INT16, 3), tensor("z", DataType.FP64)), max_batch_size=0
    )
    request = pb.ModelInferRequest()
    add_input(request, "x", "FP32", (2,), bytes(8))
    outputs = [(DataType.INT16.value, (3,), b"abcdef"), (DataType.FP64.value, (), b"12345678")]
    content = unwrapped(_native.encode_infer_response(request.SerializeToString(), settings, outputs, 1, 0, False))
    found = pb.ModelInferResponse.FromString(content)
    assert [(one.name, tuple(one.shape)) for one in found.outputs] == [("y", (3,)), ("z", ())]
    assert list(found.raw_output_contents) == [b"abcdef", b"12345678"]


OUTPUT = DataType.FP32.value
GIVES = model((tensor("x", DataType.INT8, -1),), (tensor("y", DataType.FP32, -1, 2),))
GIVES_WORDS = model((tensor("x", DataType.INT8, -1),), (tensor("y", DataType.BYTES, -1, -1),))


@pytest.mark.parametrize(
    ("settings", "outputs", "message"),
    [
        (GIVES, [], "model 'model': it gave 0 outputs; expected 1"),
        (GIVES, [(OUTPUT, (3, 2), bytes(24))] * 2, "model 'model': it gave 2 outputs; expected 1"),
        (
            GIVES,
            [(DataType.INT32.value, (3, 2), bytes(24))],
            "model 'model', output 'y': the model gave INT32 [3,2]; expected FP32 [-1,2] with 3 rows",
        ),
        (
            GIVES,
            [(OUTPUT, (3, 2, 1), bytes(24))],
            "model 'model', output 'y': the model gave FP32 [3,2,1]; expected FP32 [-1,2] with 3 rows",
        ),
        (
            GIVES,
            [(OUTPUT, (3, 3), bytes(36))],
            "model 'model', output 'y': the model gave FP32 [3,3]; expected FP32 [-1,2] with 3 rows",
        ),
        (
            GIVES,
            [(OUTPUT, (2, 2), bytes(16))],
            "model 'model', output 'y': the model gave FP32 [2,2]; expected FP32 [-1,2] with 3 rows",
        ),
        (
            GIVES,
            [(OUTPUT, (3, 2), bytes(20))],
            "model 'model', output 'y': the model gave 20 bytes; expected the elements of FP32 [3,2]",
        ),
        (
            GIVES_WORDS,
            [(DataType.BYTES.value, (3, 2), [b"a"] * 5)],
            "model 'model', output 'y': the model gave 25 bytes; expected the elements of BYTES [3,2]",
        ),
        (
            GIVES_WORDS,
            [(DataType.BYTES.value, (3, -1), [b"a"] * 6)],
            "model 'model', output 'y': the model gave BYTES [3,-1]; expected BYTES [-1,-1] with 3 rows",
        ),
    ],
)
def test_outputs_that_break_the_models_promise_are_refused(
    settings: ModelSettings, outputs: list[Any], message: str
) -> None:
    request = pb.ModelInferRequest()
    add_input(request, "x", "INT8", (1,), b"\x00")
    with pytest.raises(_native.NativeError) as refused:
        _native.encode_infer_response(request.SerializeToString(), settings, outputs, 3, 0, False)
    assert (refused.value.reason, refused.value.message) == ("MODEL_OUTPUT_INVALID", message)


@given(texts, texts, texts, texts)
def test_an_error_of_a_stream_travels_beside_the_names(name: str, version: str, request_id: str, message: str) -> None:
    content = unwrapped(
        _native.encode_stream_error(name.encode(), version.encode(), request_id.encode(), message.encode())
    )
    expected = pb.ModelStreamInferResponse(error_message=message)
    answer = expected.infer_response
    answer.model_name, answer.model_version, answer.id = name, version, request_id
    answer.parameters["triton_final_response"].bool_param = True
    assert pb.ModelStreamInferResponse.FromString(content) == expected
    assert len(content) == expected.ByteSize()


def test_an_error_that_is_not_utf8_does_not_break_the_stream() -> None:
    content = unwrapped(_native.encode_stream_error(b"model", b"1", b"7", b"caf\xe9 \xff!"))
    assert pb.ModelStreamInferResponse.FromString(content).error_message == "caf? ?!"
