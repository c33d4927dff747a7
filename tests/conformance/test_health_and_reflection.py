"""grpc.health.v1 and server reflection, with the stubs and the client of their own packages."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy as np
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2 as v1alpha
from grpc_reflection.v1alpha import reflection_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from protos.gen import health_pb2 as own_health_pb2
from tests.conformance import onnx_models as models
from tests.conformance.harness import INFER, PATIENCE_S, Code, Served, int64_rows, refused, triton_input

Status = health_pb2.HealthCheckResponse.ServingStatus

SERVICES = [
    "grpc.health.v1.Health",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
    "inference.GRPCInferenceService",
]


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    for version in ("1", "2.1.0"):
        models.put(root, "add", models.add(int(version[0])), version=version, config="version_policy { all {} }")
    models.put(root, "toggled", models.add(1))
    models.put(root, "reloaded", models.add(1))
    models.put(root, "broken", b"no model")
    return serve_module(root, "--model-control-mode", "explicit", "--load-model", "*")


@pytest.fixture(scope="module")
def health(served: Served) -> Any:
    return health_pb2_grpc.HealthStub(served.channel())


class Watch:
    """A Watch call; next() gives the statuses as they come."""

    def __init__(self, served: Served, service: str) -> None:
        stub = health_pb2_grpc.HealthStub(served.channel())
        self.call = stub.Watch(health_pb2.HealthCheckRequest(service=service))
        self._got: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for answer in self.call:
                self._got.put(Status.Name(answer.status))
        except grpc.RpcError as error:
            self._got.put(error.code().name)

    def next(self) -> str:
        return self._got.get(timeout=PATIENCE_S)

    def nothing_for(self, seconds: float) -> bool:
        try:
            self._got.get(timeout=seconds)
        except queue.Empty:
            return True
        return False


def check(health: Any, service: str) -> str:
    return Status.Name(health.Check(health_pb2.HealthCheckRequest(service=service), timeout=PATIENCE_S).status)


# -- health ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("service", "status"),
    [
        ("", "SERVING"),
        ("inference.GRPCInferenceService", "SERVING"),
        ("add", "SERVING"),
        ("add@1", "SERVING"),
        ("add@2.1.0", "SERVING"),
        ("broken", "NOT_SERVING"),
        ("broken@1", "NOT_SERVING"),
    ],
)
def test_check_answers_for_the_server_each_model_and_each_version(health: Any, service: str, status: str) -> None:
    assert check(health, service) == status


@pytest.mark.parametrize("service", ["nobody", "add@3", "grpc.health.v1.Health ", "@", "add@"])
def test_check_of_what_nobody_knows_is_not_found(health: Any, service: str) -> None:
    refused(Code.NOT_FOUND, lambda: check(health, service), service)


def test_list_has_every_service(served: Served) -> None:
    # The package's stubs do not have this RPC yet.
    call = served.channel().unary_unary(
        "/grpc.health.v1.Health/List", response_deserializer=own_health_pb2.HealthListResponse.FromString
    )
    statuses = call(b"", timeout=PATIENCE_S).statuses
    assert {name: Status.Name(answer.status) for name, answer in statuses.items()} == {
        "": "SERVING",
        "inference.GRPCInferenceService": "SERVING",
        "add": "SERVING",
        "add@1": "SERVING",
        "add@2.1.0": "SERVING",
        "toggled": "SERVING",
        "toggled@1": "SERVING",
        "reloaded": "SERVING",
        "reloaded@1": "SERVING",
        "broken": "NOT_SERVING",
        "broken@1": "NOT_SERVING",
    }


def test_watch_tells_every_change_of_a_model(served: Served) -> None:
    client = served.triton()
    model, version, server = Watch(served, "toggled"), Watch(served, "toggled@1"), Watch(served, "")
    assert [watch.next() for watch in (model, version, server)] == ["SERVING"] * 3
    for _ in range(3):
        client.unload_model("toggled")
        assert [watch.next() for watch in (model, version)] == ["NOT_SERVING"] * 2
        client.load_model("toggled")
        assert [watch.next() for watch in (model, version)] == ["SERVING"] * 2
    assert server.nothing_for(0.05), "the server as a whole has not changed"
    for watch in (model, version, server):
        watch.call.cancel()
        assert watch.next() == "CANCELLED"


def test_watch_of_an_unknown_service_says_so_and_waits_for_it(served: Served) -> None:
    watch = Watch(served, "appears")
    assert watch.next() == "SERVICE_UNKNOWN"
    models.put(served.repository, "appears", models.add(1))
    served.triton().load_model("appears")
    # It may be told as known and loading before.
    statuses = [watch.next()]
    while statuses[-1] != "SERVING":
        statuses.append(watch.next())
    assert statuses in (["SERVING"], ["NOT_SERVING", "SERVING"])
    watch.call.cancel()
    served.triton().unload_model("appears")


def test_watch_does_not_see_a_reload_because_the_model_serves_through_it(served: Served) -> None:
    watch = Watch(served, "reloaded")
    assert watch.next() == "SERVING"
    client = served.triton()
    for _ in range(3):
        client.load_model("reloaded")
    assert watch.nothing_for(0.1)
    watch.call.cancel()


def test_many_watches_stay_open_side_by_side(served: Served, health: Any) -> None:
    channel = served.channel()
    stub = health_pb2_grpc.HealthStub(channel)
    calls = [stub.Watch(health_pb2.HealthCheckRequest(service="add")) for _ in range(200)]
    assert [Status.Name(next(call).status) for call in calls] == ["SERVING"] * 200
    assert check(health, "") == "SERVING"
    for call in calls:
        call.cancel()


def test_health_answers_while_every_thread_of_the_general_lane_is_busy(served: Served, health: Any) -> None:
    # Loads that wait for each other, and questions that walk the repository.
    client = served.triton()
    stop = threading.Event()

    def keep_busy() -> None:
        own = served.triton()
        while not stop.is_set():
            own.get_model_repository_index()
            own.get_inference_statistics()

    threads = [threading.Thread(target=keep_busy) for _ in range(6)]
    for thread in threads:
        thread.start()
    try:
        slowest_s = 0.0
        for _ in range(100):
            began = time.monotonic()
            assert check(health, "") == "SERVING"
            assert client.is_server_live()
            slowest_s = max(slowest_s, time.monotonic() - began)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert slowest_s < 2.0, "far above what a busy machine needs, far below what waiting in line would take"


# -- reflection --------------------------------------------------------------------------------------------------------


@pytest.fixture
def database(served: Served) -> Iterator[ProtoReflectionDescriptorDatabase]:
    return ProtoReflectionDescriptorDatabase(served.channel())


def test_reflection_lists_the_services(database: Any) -> None:
    assert sorted(database.get_services()) == SERVICES


def test_a_client_with_nothing_but_reflection_calls_every_kind_of_rpc(served: Served, database: Any) -> None:
    pool = DescriptorPool(database)
    service = pool.FindServiceByName("inference.GRPCInferenceService")
    assert len(service.methods) == 20
    method = service.FindMethodByName("ModelInfer")
    request = GetMessageClass(method.input_type)(model_name="add", model_version="^2", id="reflected")
    request.inputs.add(name="x", datatype="INT64", shape=[2, 1])
    request.inputs[0].contents.int64_contents.extend([10, 20])
    request.parameters["timeout"].int64_param = 10_000_000
    reply_type = GetMessageClass(method.output_type)
    call = served.channel().unary_unary(
        INFER,
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=reply_type.FromString,
    )
    reply = call(request, timeout=PATIENCE_S)
    assert (reply.model_version, reply.id) == ("2.1.0", "reflected")
    assert np.frombuffer(reply.raw_output_contents[0], np.int64).tolist() == [12, 22]
    config_type = GetMessageClass(service.FindMethodByName("ModelConfig").output_type)
    config = served.channel().unary_unary(
        "/inference.GRPCInferenceService/ModelConfig", response_deserializer=config_type.FromString
    )(b"\x0a\x03add", timeout=PATIENCE_S)
    assert config.config.max_batch_size == 64


@pytest.mark.parametrize("service", SERVICES)
def test_the_files_of_every_service_and_all_they_import_can_be_had(database: Any, service: str) -> None:
    pool = DescriptorPool(database)
    found = pool.FindServiceByName(service)
    for method in found.methods:
        assert pool.FindMessageTypeByName(method.input_type.full_name)
        assert pool.FindMessageTypeByName(method.output_type.full_name)


@pytest.mark.parametrize("package", ["v1", "v1alpha"])
def test_both_packages_answer_every_kind_of_question(served: Served, package: str) -> None:
    # The messages of the two are the same; grpcio-reflection brings those of v1alpha.
    call = served.channel().stream_stream(
        f"/grpc.reflection.{package}.ServerReflection/ServerReflectionInfo",
        request_serializer=lambda message: message.SerializeToString(),
        response_deserializer=v1alpha.ServerReflectionResponse.FromString,
    )
    questions = [
        v1alpha.ServerReflectionRequest(host="h", list_services=""),
        v1alpha.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService.ModelInfer"),
        v1alpha.ServerReflectionRequest(file_containing_symbol="inference.ModelInferRequest.InferInputTensor"),
        v1alpha.ServerReflectionRequest(file_containing_symbol="inference.ModelInferRequest.model_name"),
        v1alpha.ServerReflectionRequest(file_containing_symbol="no.such.Thing"),
        v1alpha.ServerReflectionRequest(file_containing_symbol="inference.GRPCInferenceService.NoSuch"),
        v1alpha.ServerReflectionRequest(file_by_filename="no_such.proto"),
        v1alpha.ServerReflectionRequest(all_extension_numbers_of_type="inference.ModelInferRequest"),
        v1alpha.ServerReflectionRequest(
            file_containing_extension=v1alpha.ExtensionRequest(
                containing_type="inference.ModelInferRequest", extension_number=5
            )
        ),
        v1alpha.ServerReflectionRequest(),
    ]
    answers = list(call(iter(questions), timeout=PATIENCE_S))
    assert [answer.original_request for answer in answers] == questions
    kinds = [answer.WhichOneof("message_response") for answer in answers]
    assert kinds == [
        "list_services_response",
        *["file_descriptor_response"] * 3,
        *["error_response"] * 3,
        "all_extension_numbers_response",
        "error_response",
        "error_response",
    ]
    assert answers[0].valid_host == "h"
    assert [service.name for service in answers[0].list_services_response.service] == SERVICES
    assert len(answers[1].file_descriptor_response.file_descriptor_proto) == 2, "the service and what it imports"
    codes = [answer.error_response.error_code for answer in answers]
    assert codes == [0, 0, 0, 0, 5, 5, 5, 0, 5, 3]


def test_a_long_reflection_call_answers_question_by_question(served: Served) -> None:
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel())
    turns: queue.SimpleQueue[Any] = queue.SimpleQueue()
    call = stub.ServerReflectionInfo(iter(turns.get, None), timeout=PATIENCE_S)
    for _ in range(20):
        turns.put(v1alpha.ServerReflectionRequest(list_services=""))
        assert len(next(call).list_services_response.service) == 4
    turns.put(None)
    assert list(call) == []


def test_a_model_answers_after_all_that(served: Served) -> None:
    result = served.triton().infer("add", [triton_input("x", int64_rows(1), "INT64")])
    assert result.as_numpy("y").tolist() == [[3]]
