"""Every wrong tensor gets a status and a message that names model, tensor and expectation, and disturbs nobody.

The messages are tritonclient's. After each refusal a good request on the same connection gets its answer.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from tritonclient.grpc import service_pb2 as triton

from server.settings import DataType
from tests.wire.harness import (
    INTERNAL,
    INVALID_ARGUMENT,
    NOT_FOUND,
    OK,
    STREAM_INFER,
    UNIMPLEMENTED,
    Http2,
    Server,
    check_works,
    framed,
    model_settings,
    pb,
    tensor,
)

A = np.arange(8, dtype="<f4").reshape(2, 4)
B = np.array([[1, 2], [3, 4]], "<i8")


def strings(*some: bytes) -> bytes:
    """BYTES in raw form."""
    return b"".join(struct.pack("<I", len(one)) + one for one in some)


def good_request() -> Any:
    """Two rows for the model "wide": A FP32 [-1,4], B INT64 [-1,2], T BYTES [-1,1], F FP32 [-1,-1]."""
    request = triton.ModelInferRequest(model_name="wide", id="good")
    request.inputs.add(name="A", datatype="FP32", shape=[2, 4])
    request.inputs.add(name="B", datatype="INT64", shape=[2, 2])
    request.inputs.add(name="T", datatype="BYTES", shape=[2, 1])
    request.inputs.add(name="F", datatype="FP32", shape=[2, 3])
    request.raw_input_contents.extend([A.tobytes(), B.tobytes(), strings(b"one", b""), bytes(24)])
    return request


def typed_request() -> Any:
    """The same with typed contents."""
    request = good_request()
    del request.raw_input_contents[:]
    request.inputs[0].contents.fp32_contents.extend(A.ravel())
    request.inputs[1].contents.int64_contents.extend(B.ravel())
    request.inputs[2].contents.bytes_contents.extend([b"one", b""])
    request.inputs[3].contents.fp32_contents.extend([0] * 6)
    return request


@pytest.fixture
def wide(server: Server) -> Server:
    """The server with the model "wide"."""
    inputs = (
        tensor("A", (-1, 4)),
        tensor("B", (-1, 2), DataType.INT64),
        tensor("T", (-1, 1), DataType.BYTES),
        tensor("F", (-1, -1)),
    )
    outputs = (tensor("Y", (-1, 4)), tensor("Z", (-1, 2), DataType.INT64))
    server.add(model_settings("wide", max_batch_size=4, inputs=inputs, outputs=outputs))
    return server


def check_good(client: Http2, request: Any = None) -> None:
    """The good request, answered by the right rows."""
    reply = client.infer((request or good_request()).SerializeToString()).expect(OK)
    response = triton.ModelInferResponse.FromString(reply.messages[0])
    assert [output.name for output in response.outputs] == ["Y", "Z"]
    assert response.raw_output_contents[0] == A.tobytes()
    assert response.raw_output_contents[1] == B.tobytes()
    assert (response.model_name, response.model_version, response.id) == ("wide", "1", "good")


def test_the_good_requests_are_good(wide: Server, client: Http2) -> None:
    check_good(client)
    check_good(client, typed_request())


Change = Callable[[Any], object]

# What is done to the good request, and what the refusal has to say beside the model's name.
WRONG: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "unknown model": (lambda r: setattr(r, "model_name", "wild"), NOT_FOUND, ("'wild'",)),
    "unknown version": (lambda r: setattr(r, "model_version", "9"), NOT_FOUND, ("'wide'", "'9'", "live: 1")),
    "no model": (lambda r: r.ClearField("model_name"), NOT_FOUND, ("''",)),
    "missing input": (
        lambda r: (r.inputs.pop(1), r.raw_input_contents.pop(1)),
        INVALID_ARGUMENT,
        ("'B'", "missing", "INT64 [-1,2]"),
    ),
    "no inputs at all": (
        lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents")),
        INVALID_ARGUMENT,
        ("'A'", "missing"),
    ),
    "extra input": (
        lambda r: (r.inputs.add(name="Q", datatype="FP32", shape=[2, 1]), r.raw_input_contents.append(bytes(8))),
        INVALID_ARGUMENT,
        ("'Q'", "not known", "'A', 'B', 'T', 'F'"),
    ),
    "duplicate input": (
        lambda r: (r.inputs.append(r.inputs[0]), r.raw_input_contents.append(A.tobytes())),
        INVALID_ARGUMENT,
        ("'A'", "twice"),
    ),
    "wrong datatype": (lambda r: setattr(r.inputs[0], "datatype", "FP64"), INVALID_ARGUMENT, ("'A'", "FP64", "FP32")),
    "unknown datatype": (lambda r: setattr(r.inputs[0], "datatype", "fp32"), INVALID_ARGUMENT, ("'A'", "fp32", "FP32")),
    "no datatype": (lambda r: r.inputs[1].ClearField("datatype"), INVALID_ARGUMENT, ("'B'", "''", "INT64")),
    "too few dimensions": (
        lambda r: r.inputs[0].shape.pop(),
        INVALID_ARGUMENT,
        ("'A'", "[2]", "[-1,4]", "2 dimensions"),
    ),
    "too many dimensions": (lambda r: r.inputs[0].shape.append(1), INVALID_ARGUMENT, ("'A'", "[2,4,1]", "[-1,4]")),
    "a hundred dimensions": (lambda r: r.inputs[0].shape.extend([1] * 98), INVALID_ARGUMENT, ("'A'", "[-1,4]")),
    "no shape": (lambda r: r.inputs[0].ClearField("shape"), INVALID_ARGUMENT, ("'A'", "[]", "[-1,4]")),
    "wrong dimension": (lambda r: set_shape(r, 0, [2, 5]), INVALID_ARGUMENT, ("'A'", "[2,5]", "[-1,4]")),
    "negative dimension": (lambda r: set_shape(r, 3, [2, -1]), INVALID_ARGUMENT, ("'F'", "[2,-1]", "[-1,-1]")),
    "negative rows": (lambda r: set_shape(r, 0, [-2, 4]), INVALID_ARGUMENT, ("'A'", "[-2,4]")),
    "overflowing product": (lambda r: set_shape(r, 3, [2, 2**62]), INVALID_ARGUMENT, ("'F'", "too large")),
    "overflowing bytes": (lambda r: set_shape(r, 3, [4, 2**60]), INVALID_ARGUMENT, ("'F'",)),
    "product that wraps to the right size": (
        lambda r: set_shape(r, 3, [2, 2**63 - 1]),
        INVALID_ARGUMENT,
        ("'F'", "too large"),
    ),
    "zero rows": (
        lambda r: (
            [set_shape(r, i, [0, *r.inputs[i].shape[1:]]) for i in range(4)],
            r.ClearField("raw_input_contents"),
            r.raw_input_contents.extend([b""] * 4),
        ),
        INVALID_ARGUMENT,
        ("'A'", "0 rows", "1 to 4"),
    ),
    "more rows than the model takes": (
        lambda r: [set_shape(r, i, [5, *r.inputs[i].shape[1:]]) for i in range(4)],
        INVALID_ARGUMENT,
        ("'A'", "5 rows", "1 to 4"),
    ),
    "rows that differ": (lambda r: set_shape(r, 1, [1, 2]), INVALID_ARGUMENT, ("'B'", "1 row", "2")),
    "too few bytes": (
        lambda r: set_raw(r, 0, A.tobytes()[:-1]),
        INVALID_ARGUMENT,
        ("'A'", "31 bytes", "expected 32", "FP32 [2,4]"),
    ),
    "too many bytes": (lambda r: set_raw(r, 0, A.tobytes() + b"x"), INVALID_ARGUMENT, ("'A'", "33 bytes", "32")),
    "no bytes": (lambda r: set_raw(r, 1, b""), INVALID_ARGUMENT, ("'B'", "0 bytes", "32")),
    "too few raw contents": (lambda r: r.raw_input_contents.pop(), INVALID_ARGUMENT, ("3 raw_input_contents", "4")),
    "too many raw contents": (
        lambda r: r.raw_input_contents.append(b""),
        INVALID_ARGUMENT,
        ("5 raw_input_contents", "4"),
    ),
    "both raw and typed": (
        lambda r: r.inputs[0].contents.fp32_contents.append(1),
        INVALID_ARGUMENT,
        ("'A'", "contents", "raw_input_contents"),
    ),
    "neither raw nor typed": (lambda r: r.ClearField("raw_input_contents"), INVALID_ARGUMENT, ("'A'", "0 values", "8")),
    "a string longer than what is left": (
        lambda r: set_raw(r, 2, struct.pack("<I", 4) + b"abc" + strings(b"")),
        INVALID_ARGUMENT,
        ("'T'", "string 1"),
    ),
    "a string of 4 GiB": (
        lambda r: set_raw(r, 2, strings(b"one") + b"\xff\xff\xff\xff"),
        INVALID_ARGUMENT,
        ("'T'", "string 1", "4294967295 bytes"),
    ),
    "a string without its length": (
        lambda r: set_raw(r, 2, strings(b"one") + b"\0\0"),
        INVALID_ARGUMENT,
        ("'T'", "string 1", "2 bytes", "4 bytes"),
    ),
    "too few strings": (lambda r: set_raw(r, 2, strings(b"one")), INVALID_ARGUMENT, ("'T'", "1 strings", "expected 2")),
    "too many strings": (
        lambda r: set_raw(r, 2, strings(b"", b"", b"")),
        INVALID_ARGUMENT,
        ("'T'", "left over", "expected 2"),
    ),
    "unknown requested output": (lambda r: r.outputs.add(name="W"), INVALID_ARGUMENT, ("'W'", "not known", "'Y', 'Z'")),
    "output requested twice": (
        lambda r: (r.outputs.add(name="Y"), r.outputs.add(name="Y")),
        INVALID_ARGUMENT,
        ("'Y'", "twice"),
    ),
    "an input in shared memory": (
        lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(triton.InferParameter(string_param="r")),
        UNIMPLEMENTED,
        ("'A'", "shared memory"),
    ),
    "an output in shared memory": (
        lambda r: (
            r.outputs.add(name="Y")
            .parameters["shared_memory_region"]
            .MergeFrom(triton.InferParameter(string_param="r"))
        ),
        UNIMPLEMENTED,
        ("'Y'", "shared memory"),
    ),
    "a priority that is text": (
        lambda r: setattr(r.parameters["priority"], "string_param", "high"),
        INVALID_ARGUMENT,
        ("'priority'",),
    ),
    "a timeout that is text": (
        lambda r: setattr(r.parameters["timeout"], "string_param", "soon"),
        INVALID_ARGUMENT,
        ("'timeout'",),
    ),
    "a parameter without a value": (
        lambda r: r.parameters["mine"].SetInParent(),
        INVALID_ARGUMENT,
        ("'mine'",),
    ),
    "a reserved parameter": (
        lambda r: setattr(r.parameters["triton_secret"], "bool_param", True),
        INVALID_ARGUMENT,
        ("'triton_secret'",),
    ),
}

WRONG_TYPED: dict[str, tuple[Change, int, tuple[str, ...]]] = {
    "too few values": (
        lambda r: r.inputs[0].contents.fp32_contents.pop(),
        INVALID_ARGUMENT,
        ("'A'", "7 values", "expected 8"),
    ),
    "too many values": (
        lambda r: r.inputs[1].contents.int64_contents.append(1),
        INVALID_ARGUMENT,
        ("'B'", "5 values", "4"),
    ),
    "the wrong field": (
        lambda r: (r.inputs[1].contents.Clear(), r.inputs[1].contents.int_contents.extend([1, 2, 3, 4])),
        INVALID_ARGUMENT,
        ("'B'", "int_contents", "int64_contents"),
    ),
    "two fields": (
        lambda r: r.inputs[0].contents.bytes_contents.append(b"x"),
        INVALID_ARGUMENT,
        ("'A'", "bytes_contents", "fp32_contents"),
    ),
    "too few strings": (
        lambda r: r.inputs[2].contents.bytes_contents.pop(),
        INVALID_ARGUMENT,
        ("'T'", "1 values", "2"),
    ),
    "one input without": (lambda r: r.inputs[3].contents.Clear(), INVALID_ARGUMENT, ("'F'", "0 values", "6")),
}


def set_shape(request: Any, index: int, shape: list[int]) -> None:
    request.inputs[index].shape[:] = shape


def set_raw(request: Any, index: int, raw: bytes) -> None:
    request.raw_input_contents[index] = raw


ALL_WRONG = {
    **{name: (good_request, *rest) for name, rest in WRONG.items()},
    **{f"typed: {name}": (typed_request, *rest) for name, rest in WRONG_TYPED.items()},
}


@pytest.mark.parametrize("wrong", ALL_WRONG)
def test_a_wrong_request_is_refused_with_words_and_the_next_one_is_answered(
    wide: Server, client: Http2, wrong: str
) -> None:
    make, change, status, texts = ALL_WRONG[wrong]
    request = make()
    change(request)
    reply = client.infer(request.SerializeToString())
    reply.expect(status, *texts)
    assert reply.trailers_only
    if status != NOT_FOUND:
        assert "'wide'" in reply.message
    assert len(reply.message) < 400
    check_good(client)
    # The same words inside a stream, which goes on.
    stream_id = client.open(STREAM_INFER)
    body = framed(request.SerializeToString()) + framed(good_request().SerializeToString())
    client.data(stream_id, body, end=True)
    refused, answered = map(triton.ModelStreamInferResponse.FromString, client.reply(stream_id).expect(OK).messages)
    assert refused.error_message == reply.message
    assert answered.infer_response.raw_output_contents[0] == A.tobytes()


# Bytes that are no ModelInferRequest.
MALFORMED: dict[str, bytes] = {
    "truncated": good_request().SerializeToString()[:-1],
    "cut inside an input": good_request().SerializeToString()[:14],
    "a group that does not end": b"\x0b",
    "a group end alone": b"\x0c",
    "wire type 6": b"\x0e",
    "field number 0": b"\x00\x00",
    "a varint of eleven bytes": b"\x08" + b"\xff" * 10 + b"\x01",
    "a length of 2 GiB": b"\x0a\xff\xff\xff\xff\x07",
    "a name that is not UTF-8": b"\x0a\x02\xff\xfe",
    "an id that is not UTF-8": good_request().SerializeToString() + b"\x1a\x01\xc0",
    "an input name that is not UTF-8": b"\x2a\x03\x0a\x01\xff",
    "trailing garbage": good_request().SerializeToString() + b"\xff",
    "text": b"hello, this is not protobuf",
    "deep groups": b"\x0b" * 200 + b"\x0c" * 200,
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_message_that_is_none_is_internal_and_never_the_models_fault(wide: Server, client: Http2, what: str) -> None:
    reply = client.infer(MALFORMED[what])
    reply.expect(INTERNAL, "ModelInferRequest")
    assert reply.trailers_only
    statistics = wide.versions["wide", "1"].statistics()
    assert statistics.failures == dict.fromkeys(statistics.failures, 0)
    check_good(client)


def test_unknown_fields_are_ignored(wide: Server, client: Http2) -> None:
    unknown = (
        b"\xc8\x3e\x2a" + b"\xca\x3e\x05hello" + b"\xcd\x3e1234" + b"\xc9\x3e12345678" + b"\xcb\x3e\x08\x01\xcc\x3e"
    )
    request = triton.ModelInferRequest.FromString(good_request().SerializeToString() + unknown)
    check_good(client, request)


def test_names_of_any_text_come_back_as_text(wide: Server, client: Http2) -> None:
    request = good_request()
    request.model_name = "Modell-ü-\U0001f600-%41-\n"
    client.infer(request.SerializeToString()).expect(NOT_FOUND, "Modell-ü-\U0001f600-%41-\n")
    request = good_request()
    request.inputs[0].name = "größe" * 100
    reply = client.infer(request.SerializeToString()).expect(INVALID_ARGUMENT, "größe", "...'")
    assert len(reply.message) < 200
    check_good(client)


def test_refusals_are_counted_for_the_version_and_never_run(wide: Server, client: Http2) -> None:
    request = good_request()
    request.inputs[0].datatype = "FP64"
    for _ in range(5):
        client.infer(request.SerializeToString()).expect(INVALID_ARGUMENT)
    statistics = wide.versions["wide", "1"].statistics()
    assert statistics.fail_count == statistics.failures["OTHER"] == 5
    assert statistics.execution_count == 0


def test_a_bad_row_fails_alone_in_its_batch(server: Server, client: Http2) -> None:
    held = server.add(model_settings("mixed", max_batch_size=1), script="hold")
    server.add(model_settings("fails", max_batch_size=8), script="fail-on:1")
    streams = {}
    for i in range(30):
        request = pb.ModelInferRequest(model_name="fails", id=str(i))
        request.inputs.add(name="X", datatype="FP32", shape=[1, 4])
        request.raw_input_contents.append(bytes([1 if i % 10 == 3 else 2, i]) + bytes(14))
        streams[client.call(request)] = i
    for stream_id, i in streams.items():
        reply = client.reply(stream_id)
        if i % 10 == 3:
            reply.expect(INTERNAL, "told to fail")
        else:
            response = pb.ModelInferResponse.FromString(reply.expect(OK).messages[0])
            assert (response.id, response.raw_output_contents[0][1]) == (str(i), i)
    assert held.statistics().execution_count == 0
    check_works(client)


@pytest.mark.parametrize("datatype", [datatype for datatype in DataType if datatype is not DataType.BYTES])
def test_every_numeric_datatype_goes_through_unchanged(server: Server, client: Http2, datatype: DataType) -> None:
    size = {"64": 8, "32": 4, "16": 2, "T8": 1, "OL": 1}[datatype.name[-2:]]
    inputs = (tensor("X", (-1, 3), datatype),)
    server.add(model_settings("typed", inputs=inputs, outputs=(tensor("Y", (-1, 3), datatype),)))
    request = triton.ModelInferRequest(model_name="typed")
    request.inputs.add(name="X", datatype=datatype.name, shape=[2, 3])
    raw = bytes(i % 2 for i in range(6 * size)) if datatype is DataType.BOOL else bytes(range(200, 200 + 6 * size))
    request.raw_input_contents.append(raw)
    reply = client.infer(request.SerializeToString()).expect(OK)
    response = triton.ModelInferResponse.FromString(reply.messages[0])
    assert (response.outputs[0].datatype, list(response.outputs[0].shape)) == (datatype.name, [2, 3])
    assert response.raw_output_contents[0] == raw
    request.raw_input_contents[0] = raw[:-1]
    client.infer(request.SerializeToString()).expect(INVALID_ARGUMENT, f"expected {6 * size} for {datatype.name} [2,3]")


def test_only_the_outputs_that_were_asked_for_come(wide: Server, client: Http2) -> None:
    for names in (["Z"], ["Z", "Y"]):
        request = good_request()
        for name in names:
            request.outputs.add(name=name)
        reply = client.infer(request.SerializeToString()).expect(OK)
        response = triton.ModelInferResponse.FromString(reply.messages[0])
        assert {output.name for output in response.outputs} == set(names)
        assert len(response.raw_output_contents) == len(names)


def test_no_refusal_tells_of_the_inside(wide: Server, client: Http2) -> None:
    """No path, no source file, no address: over every refusal of this file."""
    for make, change, *_ in ALL_WRONG.values():
        request = make()
        change(request)
        message = client.infer(request.SerializeToString()).message
        assert not any(word in message for word in ("/", "\\", ".cc", ".h:", ".py", "0x", "std::", "tidegate")), message
    for body in MALFORMED.values():
        message = client.infer(body).message
        assert not any(word in message for word in ("/", "\\", ".cc", ".h:", ".py", "0x", "std::", "tidegate")), message


def test_typed_contents_count_as_what_they_become(serve: Callable[..., Server]) -> None:
    """An INT64 of one byte on the wire has eight in raw form: that is what the limit on bytes in flight must see."""
    server = serve(max_inflight_bytes=16 << 20)
    int64 = DataType.INT64
    server.add(
        model_settings(
            "long",
            max_batch_size=0,
            inputs=(tensor("X", (-1,), int64),),
            outputs=(tensor("Y", (-1,), int64),),
        )
    )
    request = pb.ModelInferRequest(model_name="long")
    request.inputs.add(name="X", datatype="INT64", shape=[3 << 20])
    request.inputs[0].contents.int64_contents.extend([1] * (3 << 20))
    with Http2(server.port) as client:
        client.infer(request).expect(8, "in flight")
        request.inputs[0].shape[0] = 1000
        del request.inputs[0].contents.int64_contents[1000:]
        client.infer(request).expect(OK)
