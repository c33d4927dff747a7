"""What the server and its models are: liveness, readiness, metadata, configuration, statistics."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protos.gen import grpc_service_pb2 as pb
from server.settings import TensorSettings
from server.statistics import model_statistics

if TYPE_CHECKING:
    from server.manager import Manager
    from server.placement import Placement
    from server.rpc.health import Health

# What clients look for in the config and metadata of an ONNX model.
PLATFORM = "onnxruntime_onnx"

# The protocol extensions that work here, under the protocol's names. What is refused or switched off is not listed.
EXTENSIONS = (
    "model_repository",
    "model_repository(unload_dependents)",
    "schedule_policy",
    "model_configuration",
    "parameters",
    "statistics",
    "logging",
)


class Metadata:
    """Answers from the manager's state of the moment. Methods may be called from any thread."""

    def __init__(self, manager: Manager, health: Health, version: str) -> None:
        self._manager = manager
        self._health = health
        self._version = version

    def server_live(self, _request: pb.ServerLiveRequest) -> pb.ServerLiveResponse:
        """ServerLive: a process that answers is alive."""
        return pb.ServerLiveResponse(live=True)

    def server_ready(self, _request: pb.ServerReadyRequest) -> pb.ServerReadyResponse:
        """ServerReady: the start is done (each initial model READY or failed) and nobody has said stop."""
        return pb.ServerReadyResponse(ready=self._health.is_ready)

    def model_ready(self, request: pb.ModelReadyRequest) -> pb.ModelReadyResponse:
        """ModelReady. A model nobody knows is not ready, which is an answer and not an error."""
        return pb.ModelReadyResponse(ready=self._manager.ready(request.name, request.version))

    def server_metadata(self, _request: pb.ServerMetadataRequest) -> pb.ServerMetadataResponse:
        """ServerMetadata: name, version and the protocol extensions that work."""
        return pb.ServerMetadataResponse(name="tidegate", version=self._version, extensions=EXTENSIONS)

    def model_metadata(self, request: pb.ModelMetadataRequest) -> pb.ModelMetadataResponse:
        """ModelMetadata. With no version asked for, `versions` lists every READY one. Raises ServingError."""
        placement = self._manager.resolve(request.name, request.version)
        versions = [placement.version] if request.version else self._manager.versions(request.name)
        return pb.ModelMetadataResponse(
            name=placement.name,
            versions=versions,
            platform=PLATFORM,
            inputs=[_tensor(tensor) for tensor in placement.settings.inputs],
            outputs=[_tensor(tensor) for tensor in placement.settings.outputs],
        )

    def model_config(self, request: pb.ModelConfigRequest) -> pb.ModelConfigResponse:
        """ModelConfig: the configuration in force, completed from the ONNX file. Raises ServingError."""
        return pb.ModelConfigResponse(config=self._manager.resolve(request.name, request.version).config)

    def model_statistics(self, request: pb.ModelStatisticsRequest) -> pb.ModelStatisticsResponse:
        """ModelStatistics of one version, all versions of a model (no version), or everything (no name)."""
        return pb.ModelStatisticsResponse(
            model_stats=[
                model_statistics(placement, counted)
                for placement in self._counted(request.name, request.version)
                if (counted := self._manager.ledger.total(placement.name, placement.version)) is not None
            ]
        )

    def _counted(self, name: str, version: str) -> list[Placement]:
        if version:
            return [self._manager.resolve(name, version)]
        loaded = [placement for placement in self._manager.placements() if name in ("", placement.name)]
        if name and not loaded:
            self._manager.resolve(name, "")  # Says why there is nothing: unknown, or known and not ready.
        return sorted(loaded, key=lambda placement: placement.name)


def _tensor(tensor: TensorSettings) -> pb.ModelMetadataResponse.TensorMetadata:
    return pb.ModelMetadataResponse.TensorMetadata(name=tensor.name, datatype=tensor.datatype.name, shape=tensor.dims)
