"""Bad input over the wire: the right status, a message that names model, tensor and expectation and nothing else, and
the next request is served as if nothing had been.

What a well-behaved HTTP/2 client cannot send is in tests/wire.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import numpy as np
import pytest
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2 as pb

from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    INFER,
    PATIENCE_S,
    Code,
    Served,
    array_of,
    assert_discloses_nothing,
    eventually,
    infer_request,
    metric,
    refused,
    status_of,
    triton_input,
)

# What another caller says all the time, and no refusal may tell.
WHISPER = "for-the-neighbour-alone"

A = np.arange(4, dtype=np.int32).reshape(1, 4)


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    models.put(root, "sum", models.sum_and_difference())
    models.put(root, "text", models.identity("BYTES", ("batch", 2)))
    models.put(root, "picture", models.row_sums())
    models.put(root, "fixed", models.add(1, (2, 3)))
    models.put(root, "small", models.identity("INT8", ("batch", 3)))
    models.put(root, "broken", models.perceptron().SerializeToString()[:1000])
    return serve_module(root, "--max-message-bytes", "1MiB")


@pytest.fixture(scope="module", autouse=True)
def neighbour(served: Served) -> Iterator[None]:
    """Another caller, who sends good requests with a secret in everything that is theirs, all the time."""
    stop = threading.Event()
    failures: list[str] = []

    def ask() -> None:
        stub = served.stub()
        texts = np.array([[WHISPER.encode(), b"\xff"]], object)
        tensor = triton_input("x", texts, "BYTES")
        request = pb.ModelInferRequest(model_name="text", id=WHISPER, raw_input_contents=[tensor._get_content()])
        request.inputs.append(tensor._get_tensor())
        request.parameters[WHISPER].string_param = WHISPER
        while not stop.wait(0.002):
            answer = stub.ModelInfer(request, timeout=PATIENCE_S, metadata=[("authorization", WHISPER)])
            if answer.id != WHISPER or answer.raw_output_contents[0] != tensor._get_content():
                failures.append(str(answer)[:200])

    thread = threading.Thread(target=ask)
    thread.start()
    yield
    stop.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert failures == []


@pytest.fixture(scope="module")
def stub(served: Served) -> Any:
    return served.stub()


@pytest.fixture
def good(stub: Any) -> Iterator[None]:
    """A good request on the same connection is answered after the test's bad ones."""
    yield
    reply = stub.ModelInfer(good_request(), timeout=PATIENCE_S)
    assert array_of(reply, "SUM", np.int32).tolist() == (2 * A).tolist()


def good_request() -> pb.ModelInferRequest:
    return infer_request("sum", ("A", "INT32", A), ("B", "INT32", A))


def changed(change: Callable[[pb.ModelInferRequest], Any]) -> pb.ModelInferRequest:
    """The good request after a change."""
    request = good_request()
    change(request)
    return request


def shape(*dims: int) -> Callable[[pb.ModelInferRequest], None]:
    """Input A gets another shape; its bytes stay."""

    def change(request: pb.ModelInferRequest) -> None:
        request.inputs[0].ClearField("shape")
        request.inputs[0].shape.extend(dims)

    return change


def text_request(raw: bytes, *dims: int) -> pb.ModelInferRequest:
    request = pb.ModelInferRequest(model_name="text", raw_input_contents=[raw])
    request.inputs.add(name="x", datatype="BYTES", shape=dims)
    return request


def check_refused(stub: Any, code: grpc.StatusCode, request: pb.ModelInferRequest, *words: str) -> None:
    """A unary call, and the same in a stream, are refused with the same words."""
    call = lambda: stub.ModelInfer(request, timeout=PATIENCE_S)  # noqa: E731
    message = refused(code, call, *words)
    assert WHISPER not in message
    (answer,) = stub.ModelStreamInfer(iter([request]), timeout=PATIENCE_S)
    assert answer.error_message == message


# -- tensors -----------------------------------------------------------------------------------------------------------

INVALID = Code.INVALID_ARGUMENT


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("change", "code", "words"),
    [
        pytest.param(lambda r: r.MergeFrom(pb.ModelInferRequest(model_name="nobody")), Code.NOT_FOUND,
                     ["'nobody'"], id="unknown model"),
        pytest.param(lambda r: r.ClearField("model_name"), Code.NOT_FOUND, ["''"], id="no model"),
        pytest.param(lambda r: r.MergeFrom(pb.ModelInferRequest(model_version="9")), Code.NOT_FOUND,
                     ["'sum'", "'9'", "live: 1"], id="unknown version"),
        pytest.param(lambda r: r.MergeFrom(pb.ModelInferRequest(model_version="^^1")), Code.NOT_FOUND,
                     ["'sum'", "'^^1'"], id="senseless range"),
        pytest.param(lambda r: r.MergeFrom(pb.ModelInferRequest(model_name="broken")), Code.UNAVAILABLE,
                     ["'broken'", "not ready"], id="failed model"),
        pytest.param(lambda r: (r.inputs.pop(), r.raw_input_contents.pop()), INVALID,
                     ["'sum'", "'B'", "missing", "INT32 [-1,4]"], id="missing input"),
        pytest.param(lambda r: (r.inputs.add(name="C", datatype="INT32", shape=[1, 4]),
                                r.raw_input_contents.append(bytes(16))), INVALID,
                     ["'sum'", "'C'", "'A', 'B'"], id="extra input"),
        pytest.param(lambda r: (r.inputs.add(name="A", datatype="INT32", shape=[1, 4]),
                                r.raw_input_contents.append(bytes(16))), INVALID,
                     ["'sum'", "'A'", "twice"], id="duplicate input"),
        pytest.param(lambda r: (r.ClearField("inputs"), r.ClearField("raw_input_contents")), INVALID,
                     ["'sum'", "'A'", "missing"], id="no inputs"),
        pytest.param(lambda r: setattr(r.inputs[0], "datatype", "FP32"), INVALID,
                     ["'sum'", "'A'", "'FP32'", "INT32"], id="wrong datatype"),
        pytest.param(lambda r: setattr(r.inputs[0], "datatype", "int32"), INVALID,
                     ["'sum'", "'A'", "'int32'", "INT32"], id="datatype in lower case"),
        pytest.param(lambda r: setattr(r.inputs[0], "datatype", ""), INVALID,
                     ["'sum'", "'A'", "INT32"], id="no datatype"),
        pytest.param(shape(4), INVALID, ["'sum'", "'A'", "[4]", "[-1,4]", "2 dimensions"], id="rank too low"),
        pytest.param(shape(1, 1, 4), INVALID, ["'sum'", "'A'", "[1,1,4]", "[-1,4]"], id="rank too high"),
        pytest.param(shape(*[1] * 100), INVALID, ["'sum'", "'A'", "[-1,4]"], id="rank of a hundred"),
        pytest.param(shape(), INVALID, ["'sum'", "'A'", "[-1,4]"], id="no shape"),
        pytest.param(shape(1, 3), INVALID, ["'sum'", "'A'", "[1,3]", "[-1,4]"], id="wrong dimension"),
        pytest.param(shape(1, -4), INVALID, ["'sum'", "'A'", "[1,-4]", "[-1,4]"], id="negative dimension"),
        pytest.param(shape(-1, 4), INVALID, ["'sum'", "'A'", "[-1,4]"], id="free dimension"),
        pytest.param(shape(2**63 - 1, 4), INVALID, ["'sum'", "'A'", "1 to 64"], id="rows without end"),
        pytest.param(shape(0, 4), INVALID, ["'sum'", "'A'", "0 rows", "1 to 64"], id="zero rows"),
        pytest.param(shape(65, 4), INVALID, ["'sum'", "'A'", "65 rows", "1 to 64"], id="more rows than a batch"),
        pytest.param(shape(2, 4), INVALID, ["'sum'", "'A'", "16 bytes", "32"], id="fewer bytes than the shape"),
        pytest.param(lambda r: r.raw_input_contents.__setitem__(0, bytes(17)), INVALID,
                     ["'sum'", "'A'", "17 bytes", "expected 16"], id="more bytes than the shape"),
        pytest.param(lambda r: r.raw_input_contents.__setitem__(0, b""), INVALID,
                     ["'sum'", "'A'", "0 bytes", "expected 16"], id="no bytes"),
        pytest.param(lambda r: r.raw_input_contents.pop(), INVALID,
                     ["'sum'", "1 raw_input_contents", "2 inputs"], id="too few raw contents"),
        pytest.param(lambda r: r.raw_input_contents.append(b"x"), INVALID,
                     ["'sum'", "3 raw_input_contents", "2 inputs"], id="too many raw contents"),
        pytest.param(lambda r: r.inputs[1].contents.int_contents.extend([1] * 4), INVALID,
                     ["'sum'", "'B'", "contents beside raw_input_contents"], id="raw and typed contents"),
        pytest.param(lambda r: r.ClearField("raw_input_contents"), INVALID,
                     ["'sum'", "'A'", "0 values", "expected 4", "int_contents"], id="no contents at all"),
        pytest.param(lambda r: (r.ClearField("raw_input_contents"),
                                [one.contents.fp32_contents.extend([1] * 4) for one in r.inputs]), INVALID,
                     ["'sum'", "'A'", "fp32_contents", "int_contents"], id="typed contents of another type"),
        pytest.param(lambda r: (r.ClearField("raw_input_contents"),
                                [one.contents.int_contents.extend([1] * 5) for one in r.inputs]), INVALID,
                     ["'sum'", "'A'", "5 values", "expected 4"], id="typed contents too long"),
        pytest.param(lambda r: r.outputs.add(name="PRODUCT"), INVALID,
                     ["'sum'", "'PRODUCT'", "'SUM', 'DIFF'"], id="unknown output"),
        pytest.param(lambda r: (r.outputs.add(name="SUM"), r.outputs.add(name="SUM")), INVALID,
                     ["'sum'", "'SUM'", "twice"], id="duplicate output"),
        pytest.param(lambda r: r.outputs.add(name="SUM").parameters["classification"].MergeFrom(
                         pb.InferParameter(int64_param=3)), Code.UNIMPLEMENTED,
                     ["'sum'", "'SUM'", "classification"], id="classification"),
        pytest.param(lambda r: r.inputs[0].parameters["shared_memory_region"].MergeFrom(
                         pb.InferParameter(string_param="region")), Code.UNIMPLEMENTED,
                     ["'sum'", "'A'", "shared memory"], id="shared memory input"),
        pytest.param(lambda r: r.outputs.add(name="SUM").parameters["shared_memory_region"].MergeFrom(
                         pb.InferParameter(string_param="region")), Code.UNIMPLEMENTED,
                     ["'sum'", "'SUM'", "shared memory"], id="shared memory output"),
        pytest.param(lambda r: r.parameters["timeout"].MergeFrom(pb.InferParameter(string_param="1s")), INVALID,
                     ["'sum'", "'timeout'", "int64_param"], id="timeout of the wrong kind"),
        pytest.param(lambda r: r.parameters["timeout"].MergeFrom(pb.InferParameter(int64_param=-1)), INVALID,
                     ["'sum'", "'timeout'", "not negative"], id="negative timeout"),
        pytest.param(lambda r: r.parameters["priority"].MergeFrom(pb.InferParameter(bool_param=True)), INVALID,
                     ["'sum'", "'priority'", "uint64_param"], id="priority of the wrong kind"),
        pytest.param(lambda r: r.parameters["triton_secret"].MergeFrom(pb.InferParameter(bool_param=True)), INVALID,
                     ["'sum'", "'triton_secret'", "reserved"], id="reserved parameter"),
    ],
)  # fmt: skip
def test_a_request_that_does_not_fit_is_refused(stub: Any, change: Any, code: Any, words: list[str]) -> None:
    check_refused(stub, code, changed(change), *words)


@pytest.mark.usefixtures("good")
def test_rows_of_all_inputs_must_be_as_many(stub: Any) -> None:
    request = infer_request("sum", ("A", "INT32", A), ("B", "INT32", np.zeros((2, 4), np.int32)))
    check_refused(stub, INVALID, request, "'sum'", "'B'", "2 rows", "'A'", "1")


@pytest.mark.usefixtures("good")
def test_products_of_dimensions_that_overflow_are_refused(stub: Any) -> None:
    for dims in ((1, 2**62, 2), (1, 2**32, 2**32), (1, 2**63 - 1, 2**63 - 1), (64, 2**40, 2**40)):
        request = pb.ModelInferRequest(model_name="picture", raw_input_contents=[b"1234"])
        request.inputs.add(name="x", datatype="FP32", shape=dims)
        check_refused(stub, INVALID, request, "'picture'", "'x'", "FP32")


@pytest.mark.usefixtures("good")
def test_values_that_a_narrow_type_cannot_hold_are_refused(stub: Any) -> None:
    request = pb.ModelInferRequest(model_name="small")
    request.inputs.add(name="x", datatype="INT8", shape=[1, 3]).contents.int_contents.extend([1, -129, 2])
    check_refused(stub, INVALID, request, "'small'", "'x'", "element 1", "-129", "INT8")


@pytest.mark.usefixtures("good")
def test_a_model_without_a_batch_dimension_takes_its_own_shape_only(stub: Any) -> None:
    request = infer_request("fixed", ("x", "INT64", np.zeros((1, 2, 3), np.int64)))
    check_refused(stub, INVALID, request, "'fixed'", "'x'", "[1,2,3]", "[2,3]")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("raw", "dims", "words"),
    [
        (b"\x05\0\0\0abc", (1, 2), ["string 0", "5 bytes", "3"]),
        (b"\xff\xff\xff\xffabc", (1, 2), ["string 0", "4294967295 bytes"]),
        (b"\x01\0\0\0a\x01\0", (1, 2), ["string 1", "2 bytes", "length of 4 bytes"]),
        (b"\x01\0\0\0a", (1, 2), ["1 strings", "expected 2"]),
        (b"\0\0\0\0" * 3, (1, 2), ["4 bytes are left over", "2 strings"]),
        (b"", (1, 2), ["0 strings", "expected 2"]),
        (b"\0\0\0\0\0\0\0\0", (64, 2), ["2 strings", "expected 128"]),
    ],
)
def test_strings_whose_lengths_lie_are_refused(stub: Any, raw: bytes, dims: tuple[int, ...], words: list[str]) -> None:
    check_refused(stub, INVALID, text_request(raw, *dims), "'text'", "'x'", *words)


@pytest.mark.usefixtures("good")
def test_the_client_of_many_reports_what_it_was_told(served: Served) -> None:
    client = served.triton()
    wrong = triton.InferInput("A", [1, 3], "INT32").set_data_from_numpy(np.zeros((1, 3), np.int32))
    right = triton_input("B", A, "INT32")
    refused(INVALID, lambda: client.infer("sum", [wrong, right]), "'sum'", "'A'", "[1,3]", "[-1,4]")
    refused(INVALID, lambda: client.infer("sum", [right]), "'sum'", "'A'", "missing")
    no_data = triton.InferInput("A", [1, 4], "INT32")
    refused(INVALID, lambda: client.infer("sum", [no_data, right]), "'sum'", "1 raw_input_contents")
    output = [triton.InferRequestedOutput("NONE")]
    a = triton_input("A", A, "INT32")
    refused(INVALID, lambda: client.infer("sum", [a, right], outputs=output), "'sum'", "'NONE'", "'SUM', 'DIFF'")


# -- messages ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def send(served: Served) -> Any:
    """Sends bytes as a ModelInferRequest."""
    call = served.channel().unary_unary(INFER, response_deserializer=pb.ModelInferResponse.FromString)
    return lambda message, **options: call(message, timeout=PATIENCE_S, **options)


@pytest.mark.usefixtures("good")
def test_a_message_cut_anywhere_is_refused_or_a_request_of_its_own(send: Any) -> None:
    whole = good_request().SerializeToString()
    for end in range(len(whole)):
        code, message = status_of(lambda end=end: send(whole[:end]))
        assert code in (Code.INTERNAL, INVALID, Code.NOT_FOUND), (end, code)
        assert_discloses_nothing(message, WHISPER)


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    "tail",
    [b"\x0a", b"\xff", b"\x0a\x7fab", b"\x00", b"\x07", b"\x0b", b"\x3a\xff\xff\xff\xff\x0f", b"\x80" * 12],
    ids=["tag only", "half a tag", "short text", "tag 0", "wire type 7", "open group", "4 GiB", "endless number"],
)
def test_bytes_after_a_good_message_that_are_no_field_are_refused(send: Any, tail: bytes) -> None:
    refused(Code.INTERNAL, lambda: send(good_request().SerializeToString() + tail), "not a ModelInferRequest")


@pytest.mark.usefixtures("good")
@pytest.mark.parametrize(
    ("field", "words"),
    [
        (b"\x0a\x02\xff\xfe", "model_name"),
        (b"\x12\x02\xc3\x28", "model_version"),
        (b"\x1a\x03\xed\xa0\x80", "id"),
        (b"\x2a\x04\x0a\x02\xff\xfe", "input"),
        (b"\x32\x04\x0a\x02\xff\xfe", "output"),
        (b"\x22\x05\x0a\x01\xff\x12\x00", "parameter"),
    ],
)
def test_names_that_are_no_utf8_are_refused(send: Any, field: bytes, words: str) -> None:
    refused(Code.INTERNAL, lambda: send(good_request().SerializeToString() + field), words, "UTF-8")


def test_fields_that_nobody_knows_are_ignored(send: Any) -> None:
    message = (
        good_request().SerializeToString() + b"\xfa\x3f\x03abc\xf8\x3f\x01\xf9\x3f12345678\xfd\x3f1234\xfb\x3f\xfc\x3f"
    )
    assert array_of(send(message), "DIFF", np.int32).tolist() == [[0, 0, 0, 0]]


@pytest.mark.usefixtures("good")
def test_no_message_and_an_empty_message(served: Served, send: Any) -> None:
    refused(Code.NOT_FOUND, lambda: send(b""), "''")
    nothing = served.channel().stream_unary(INFER)
    code, message = status_of(lambda: nothing(iter([]), timeout=PATIENCE_S))
    assert code in (Code.INTERNAL, INVALID, Code.UNIMPLEMENTED)
    assert_discloses_nothing(message)


@pytest.mark.usefixtures("good")
def test_two_messages_in_a_unary_call_are_refused(served: Served) -> None:
    call = served.channel().stream_unary(INFER)
    message = good_request().SerializeToString()
    code, text = status_of(lambda: call(iter([message, message]), timeout=PATIENCE_S))
    assert code in (Code.INTERNAL, INVALID, Code.UNIMPLEMENTED)
    assert_discloses_nothing(text)


@pytest.mark.usefixtures("good")
def test_a_message_over_the_limit_is_refused_without_being_read(served: Served, send: Any) -> None:
    small = served.metrics()
    large = np.zeros((1, 1 << 18), np.float32)
    request = infer_request("picture", ("x", "FP32", large.reshape(1, 512, 512)))
    for compression in (grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate):
        call = lambda c=compression: send(request.SerializeToString(), compression=c)  # noqa: E731
        refused(Code.RESOURCE_EXHAUSTED, call, "1048576")
    stub = served.stub()
    code, message = status_of(lambda: list(stub.ModelStreamInfer(iter([request]), timeout=PATIENCE_S)))
    assert code is Code.RESOURCE_EXHAUSTED
    assert_discloses_nothing(message)
    assert metric(served.metrics(), "tidegate_protocol_errors_total") == metric(small, "tidegate_protocol_errors_total")


def test_a_message_just_under_the_limit_is_served(send: Any) -> None:
    sent = np.ones((1, 500, 500), np.float32)
    assert (
        array_of(send(infer_request("picture", ("x", "FP32", sent)).SerializeToString()), "total", np.float32) == 250000
    )


@pytest.mark.usefixtures("good")
def test_a_method_that_does_not_exist_is_unimplemented(served: Served) -> None:
    channel = served.channel()
    for path in (
        "/inference.GRPCInferenceService/ModelInfers",
        "/inference.GRPCInferenceService/modelinfer",
        "/inference.GRPCInferenceService/",
        "/nobody.Knows/It",
        "/",
        "/a",
    ):
        call = channel.unary_unary(path)
        refused(Code.UNIMPLEMENTED, lambda call=call: call(b"", timeout=PATIENCE_S), given=path)


# -- clients that do not stay ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("good")
def test_calls_that_are_cut_leave_nothing_behind(served: Served) -> None:
    before = metric(served.metrics(), "tidegate_requests_live")
    for _ in range(20):
        channel = grpc.insecure_channel(served.grpc_address, [("grpc.use_local_subchannel_pool", 1)])
        call = channel.unary_unary(INFER)
        futures = [call.future(good_request().SerializeToString()) for _ in range(20)]
        for future in futures[::2]:
            future.cancel()
        channel.close()
    # The neighbour's request may be under way.
    eventually(lambda: metric(served.metrics(), "tidegate_requests_live") <= before + 1, "no request is left")
    eventually(lambda: metric(served.metrics(), "tidegate_calls_open") <= 1, "no call is left")


# -- what was counted --------------------------------------------------------------------------------------------------


def test_what_the_door_refused_is_counted_as_a_failure_of_the_model_and_not_of_the_runtime(served: Served) -> None:
    metrics = served.metrics()

    def failures(reason: str) -> float:
        return metric(metrics, "nv_inference_request_failure", model="sum", version="1", reason=reason)

    assert failures("OTHER") > 50
    assert failures("BACKEND") == 0
    assert metric(metrics, "nv_inference_count", model="text", version="1") > 0


def test_the_log_discloses_nothing_of_requests_either(served: Served) -> None:
    assert WHISPER not in served.log.read_text()
