"""Liveness, readiness, metadata, configuration and statistics of models, over a real manager."""

from __future__ import annotations

import pytest

from protos.gen import grpc_service_pb2 as pb
from server.config import ControlMode
from server.errors import Reason, ServingError
from server.manager import Manager
from server.rpc.health import Health, Phase
from server.rpc.metadata import Metadata
from tests.server.fakes import FLOAT, TensorInfo, counts_of
from tests.server.world import World

ALL = "version_policy { all { } }"


@pytest.fixture
def manager(world: World) -> Manager:
    world.put("a", "1", config=ALL)
    world.put("a", "2.1.0")
    world.put("b")
    return world.started(ControlMode.EXPLICIT, load_models=["a"])


@pytest.fixture
def health(manager: Manager) -> Health:
    return Health(manager)


@pytest.fixture
def metadata(manager: Manager, health: Health) -> Metadata:
    return Metadata(manager, health, "1.2.3")


def refused(reason: Reason, call: object, request: object) -> None:
    with pytest.raises(ServingError) as raised:
        call(request)  # type: ignore[operator]
    assert raised.value.reason is reason


def test_who_answers_is_live(metadata: Metadata) -> None:
    assert metadata.server_live(pb.ServerLiveRequest()).live


def test_ready_follows_the_health_of_the_server(metadata: Metadata, health: Health) -> None:
    assert not metadata.server_ready(pb.ServerReadyRequest()).ready
    health.enter(Phase.SERVING)
    assert metadata.server_ready(pb.ServerReadyRequest()).ready
    health.enter(Phase.STOPPING)
    assert not metadata.server_ready(pb.ServerReadyRequest()).ready


@pytest.mark.parametrize(
    ("name", "version", "ready"),
    [("a", "", True), ("a", "1", True), ("a", "^2", True), ("a", "9", False), ("b", "", False), ("c", "", False)],
)
def test_model_ready_is_an_answer_for_everybody(metadata: Metadata, name: str, version: str, ready: bool) -> None:
    assert metadata.model_ready(pb.ModelReadyRequest(name=name, version=version)).ready is ready


def test_the_server_says_what_it_is_and_only_what_works(metadata: Metadata) -> None:
    answer = metadata.server_metadata(pb.ServerMetadataRequest())
    assert (answer.name, answer.version) == ("tidegate", "1.2.3")
    assert "statistics" in answer.extensions
    assert not {"classification", "sequence", "trace", "system_shared_memory", "cuda_shared_memory"} & set(
        answer.extensions
    )


def test_model_metadata_lists_every_version_unless_one_is_asked_for(metadata: Metadata) -> None:
    answer = metadata.model_metadata(pb.ModelMetadataRequest(name="a"))
    assert list(answer.versions) == ["1", "2.1.0"]
    assert answer.platform == "onnxruntime_onnx"
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.inputs] == [("X", "FP32", [-1, 4])]
    assert [(one.name, one.datatype, list(one.shape)) for one in answer.outputs] == [("Y", "FP32", [-1, 4])]
    assert list(metadata.model_metadata(pb.ModelMetadataRequest(name="a", version="^2")).versions) == ["2.1.0"]


def test_a_model_without_batching_has_its_own_shape(world: World) -> None:
    world.native.tensors[""] = ([TensorInfo("X", FLOAT, (2, -1))], [TensorInfo("Y", FLOAT, (3,))])
    world.put("a")
    manager = world.started()
    answer = Metadata(manager, Health(manager), "1").model_metadata(pb.ModelMetadataRequest(name="a"))
    assert list(answer.inputs[0].shape) == [2, -1]


def test_the_configuration_is_the_completed_one(metadata: Metadata) -> None:
    config = metadata.model_config(pb.ModelConfigRequest(name="a")).config
    assert (config.name, config.platform, config.backend) == ("a", "onnxruntime_onnx", "onnxruntime")
    assert config.max_batch_size == 64
    assert config.HasField("dynamic_batching")
    assert list(config.input[0].dims) == [4]


def test_statistics_of_one_version_of_a_model_and_of_everything(
    metadata: Metadata, manager: Manager, world: World
) -> None:
    manager.load("b")
    world.native.serving("a-1").counts = counts_of(5)

    def asked(**request: str) -> list[tuple[str, str, int]]:
        answer = metadata.model_statistics(pb.ModelStatisticsRequest(**request))
        return [(one.name, one.version, one.inference_stats.success.count) for one in answer.model_stats]

    assert asked(name="a", version="1") == [("a", "1", 5)]
    assert asked(name="a", version="^2") == [("a", "2.1.0", 0)]
    assert asked(name="a") == [("a", "1", 5), ("a", "2.1.0", 0)]
    assert asked() == [("a", "1", 5), ("a", "2.1.0", 0), ("b", "1", 0)]


def test_statistics_go_on_through_a_reload(metadata: Metadata, manager: Manager, world: World) -> None:
    world.native.serving("a-1").counts = counts_of(5)
    manager.load("a")
    world.settle()
    world.native.serving("a-1").counts = counts_of(1)
    answer = metadata.model_statistics(pb.ModelStatisticsRequest(name="a", version="1"))
    assert answer.model_stats[0].inference_count == 6


def test_what_is_unknown_or_not_ready_is_refused_with_the_reason(metadata: Metadata) -> None:
    for call, message in (
        (metadata.model_metadata, pb.ModelMetadataRequest),
        (metadata.model_config, pb.ModelConfigRequest),
        (metadata.model_statistics, pb.ModelStatisticsRequest),
    ):
        refused(Reason.MODEL_NOT_FOUND, call, message(name="c"))
        refused(Reason.VERSION_NOT_FOUND, call, message(name="a", version="7"))
        refused(Reason.VERSION_NOT_READY, call, message(name="b"))
