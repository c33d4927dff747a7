"""Server reflection: what a client without our .proto files learns from it."""

from __future__ import annotations

import pytest
from google.protobuf.descriptor_pb2 import FileDescriptorProto
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

from protos.gen import reflection_pb2, reflection_v1alpha_pb2
from server.errors import ServingError
from server.rpc.reflection import Reflection
from server.slow_rpc import SERVICES
from tests.server.fakes import FakeCall

Request = reflection_pb2.ServerReflectionRequest
Response = reflection_pb2.ServerReflectionResponse
NOT_FOUND, INVALID_ARGUMENT = 5, 3


@pytest.fixture
def reflection() -> Reflection:
    return Reflection(SERVICES)


def files(response: Response) -> list[FileDescriptorProto]:
    return [FileDescriptorProto.FromString(one) for one in response.file_descriptor_response.file_descriptor_proto]


def test_every_service_is_listed(reflection: Reflection) -> None:
    response = reflection.answer(Request(host="h", list_services="*"))
    assert [service.name for service in response.list_services_response.service] == [
        "grpc.health.v1.Health",
        "grpc.reflection.v1.ServerReflection",
        "grpc.reflection.v1alpha.ServerReflection",
        "inference.GRPCInferenceService",
    ]
    assert response.valid_host == "h"
    assert response.original_request.list_services == "*"


@pytest.mark.parametrize("symbol", SERVICES)
def test_a_client_can_build_its_messages_from_what_it_gets(reflection: Reflection, symbol: str) -> None:
    pool = DescriptorPool()
    # The file asked for comes first, what it imports after it.
    for file in reversed(files(reflection.answer(Request(file_containing_symbol=symbol)))):
        pool.Add(file)
    service = pool.FindServiceByName(symbol)
    assert service.methods
    for method in service.methods:
        GetMessageClass(method.input_type)().SerializeToString()


@pytest.mark.parametrize(
    "request_",
    [
        Request(file_containing_symbol="inference.ModelInferRequest"),
        Request(file_containing_symbol="inference.GRPCInferenceService"),
        Request(file_containing_symbol="inference.GRPCInferenceService.ModelInfer"),
        Request(file_containing_symbol="inference.ModelInferRequest.model_name"),
        Request(file_containing_symbol="inference.ModelInferRequest.InferInputTensor"),
        Request(file_by_filename="grpc_service.proto"),
    ],
)
def test_files_are_found_by_name_and_by_symbol_with_their_imports(reflection: Reflection, request_: Request) -> None:
    assert [file.name for file in files(reflection.answer(request_))] == ["grpc_service.proto", "model_config.proto"]


def test_questions_without_an_answer_are_errors_inside_the_stream(reflection: Reflection) -> None:
    for request in (
        Request(file_containing_symbol="no.Such"),
        Request(file_containing_symbol=""),
        Request(file_containing_symbol="inference.GRPCInferenceService.NoSuch"),
        Request(file_containing_symbol="inference.ModelInferRequest.no_such"),
        Request(file_by_filename="none.proto"),
        Request(file_containing_extension={"containing_type": "no.Such", "extension_number": 1}),
        Request(file_containing_extension={"containing_type": "inference.ModelConfig", "extension_number": 1}),
        Request(all_extension_numbers_of_type="no.Such"),
    ):
        response = reflection.answer(request)
        assert response.error_response.error_code == NOT_FOUND
        assert response.original_request == request
    assert reflection.answer(Request()).error_response.error_code == INVALID_ARGUMENT


def test_a_message_has_no_extensions(reflection: Reflection) -> None:
    response = reflection.answer(Request(all_extension_numbers_of_type="inference.ModelConfig"))
    assert response.all_extension_numbers_response.base_type_name == "inference.ModelConfig"
    assert list(response.all_extension_numbers_response.extension_number) == []


def test_one_reply_per_request_in_order(reflection: Reflection) -> None:
    call = FakeCall()
    stream = reflection.stream(call)  # type: ignore[arg-type]
    requests = [Request(list_services=str(number)) for number in range(5)]
    for request in requests:
        stream.message(request.SerializeToString())
    assert [Response.FromString(message).original_request for message in call.sent] == requests
    assert not stream.half_close()
    stream.closed()


def test_a_message_that_cannot_be_read_ends_the_call(reflection: Reflection) -> None:
    with pytest.raises(ServingError, match="MALFORMED_MESSAGE"):
        reflection.stream(FakeCall()).message(b"\xff")  # type: ignore[arg-type]


def test_both_versions_of_the_protocol_have_the_same_messages() -> None:
    v1alpha = reflection_v1alpha_pb2.ServerReflectionResponse
    sent = Response(valid_host="h", list_services_response={"service": [{"name": "s"}]})
    assert v1alpha.FromString(sent.SerializeToString()).list_services_response.service[0].name == "s"
