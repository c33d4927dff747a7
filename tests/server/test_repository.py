"""RepositoryIndex, Load and Unload as clients send them."""

from __future__ import annotations

import json

import pytest

from protos.gen import grpc_service_pb2 as pb
from server.config import ControlMode
from server.errors import Reason, ServingError
from server.manager import Manager
from server.rpc.repository import Repository
from server.rpc.shared_memory import refuse
from tests.server.fakes import onnx_bytes
from tests.server.world import World

Parameter = pb.ModelRepositoryParameter


@pytest.fixture
def manager(world: World) -> Manager:
    world.put("a")
    world.put("b")
    return world.started(ControlMode.EXPLICIT, load_models=["a"])


@pytest.fixture
def repository(manager: Manager) -> Repository:
    return Repository(manager)


def load(repository: Repository, name: str, **parameters: Parameter) -> None:
    repository.load(pb.RepositoryModelLoadRequest(model_name=name, parameters=parameters))


def refused(reason: Reason, call: object, request: object) -> str:
    with pytest.raises(ServingError) as raised:
        call(request)  # type: ignore[operator]
    assert raised.value.reason is reason
    return raised.value.message


def test_the_index_shows_all_or_only_what_is_ready(repository: Repository) -> None:
    rows = repository.index(pb.RepositoryIndexRequest()).models
    assert [(row.name, row.version, row.state, row.reason) for row in rows] == [
        ("a", "1", "READY", ""),
        ("b", "1", "UNAVAILABLE", "not loaded"),
    ]
    assert [row.name for row in repository.index(pb.RepositoryIndexRequest(ready=True)).models] == ["a"]


def test_load_and_unload(repository: Repository, manager: Manager) -> None:
    load(repository, "b")
    assert manager.ready("b")
    repository.unload(
        pb.RepositoryModelUnloadRequest(model_name="b", parameters={"unload_dependents": Parameter(bool_param=True)})
    )
    assert not manager.ready("b")


def test_a_load_with_config_and_files(repository: Repository, manager: Manager, world: World) -> None:
    repository.load(
        pb.RepositoryModelLoadRequest(
            model_name="new",
            parameters={
                "config": Parameter(string_param=json.dumps({"max_batch_size": 3})),
                "file:1/model.onnx": Parameter(bytes_param=onnx_bytes("sent")),
            },
        )
    )
    assert world.native.routed()["new"] == {"1": "sent"}
    assert manager.resolve("new").settings.max_batch_size == 3


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"confg": Parameter(string_param="{}")}, 'unknown load parameter "confg"'),
        ({"config": Parameter(bytes_param=b"{}")}, 'parameter "config" must be a string_param'),
        ({"config": Parameter()}, 'parameter "config" must be a string_param'),
        ({"config": Parameter(string_param="{")}, "parameter config: config: not JSON"),
        ({"file:1/model.onnx": Parameter(bytes_param=b"x")}, 'load parameters "file:…" need "config"'),
        (
            {"config": Parameter(string_param="{}"), "file:1/model.onnx": Parameter(string_param="x")},
            'parameter "file:1/model.onnx" must be a bytes_param',
        ),
        (
            {"config": Parameter(string_param="{}"), "file:../x": Parameter(bytes_param=b"x")},
            "write file:<version>/<file>",
        ),
    ],
)
def test_load_parameters_that_are_wrong(
    repository: Repository, manager: Manager, parameters: dict[str, Parameter], message: str
) -> None:
    request = pb.RepositoryModelLoadRequest(model_name="a", parameters=parameters)
    assert message in refused(Reason.INVALID_TENSOR, repository.load, request)
    assert manager.ready("a")


def test_unload_parameters_that_are_wrong(repository: Repository, manager: Manager) -> None:
    for parameters, message in (
        ({"force": Parameter(bool_param=True)}, 'unknown unload parameter "force"'),
        ({"unload_dependents": Parameter(int64_param=1)}, 'parameter "unload_dependents" must be a bool_param'),
    ):
        request = pb.RepositoryModelUnloadRequest(model_name="a", parameters=parameters)
        assert message in refused(Reason.INVALID_TENSOR, repository.unload, request)
    assert manager.ready("a")


def test_a_model_must_be_named_and_a_repository_not(repository: Repository) -> None:
    for call, message in (
        (repository.load, pb.RepositoryModelLoadRequest),
        (repository.unload, pb.RepositoryModelUnloadRequest),
    ):
        assert "model_name is empty" in refused(Reason.INVALID_TENSOR, call, message())
        refused(Reason.NOT_SUPPORTED, call, message(repository_name="r", model_name="a"))
        refused(Reason.MODEL_NOT_FOUND, call, message(model_name="nobody"))
    refused(Reason.NOT_SUPPORTED, repository.index, pb.RepositoryIndexRequest(repository_name="r"))


def test_shared_memory_is_refused_and_said_so() -> None:
    assert "send tensors in raw_input_contents" in refused(
        Reason.NOT_SUPPORTED, refuse, pb.SystemSharedMemoryStatusRequest()
    )
