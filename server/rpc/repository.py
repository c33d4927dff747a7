"""The model repository from outside: index, load, unload."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from protos.gen import grpc_service_pb2 as pb
from server.errors import Reason, ServingError

if TYPE_CHECKING:
    from server.manager import Manager

FILE_PREFIX = "file:"


class Repository:
    """Translates; the manager decides. Load and unload take as long as the work takes."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    def index(self, request: pb.RepositoryIndexRequest) -> pb.RepositoryIndexResponse:
        """RepositoryIndex: every version known here with its state and, when it cannot serve, the reason."""
        _refuse_repository_name(request.repository_name)
        return pb.RepositoryIndexResponse(
            models=[
                pb.RepositoryIndexResponse.ModelIndex(
                    name=row.name, version=row.version, state=row.state, reason=row.reason
                )
                for row in self._manager.index(ready_only=request.ready)
            ]
        )

    def load(self, request: pb.RepositoryModelLoadRequest) -> pb.RepositoryModelLoadResponse:
        """RepositoryModelLoad: returns once the model is READY. Raises ServingError and changes nothing otherwise.

        Parameters: `config` (string, the ModelConfig as JSON) instead of the repository's, and with it
        `file:<version>/<name>` (bytes) instead of the repository's files.
        """
        _refuse_repository_name(request.repository_name)
        _require_name(request.model_name)
        config: str | None = None
        files: dict[str, bytes] = {}
        for key, parameter in request.parameters.items():
            if key == "config":
                config = _value(key, parameter, "string_param")
            elif key.startswith(FILE_PREFIX):
                files[key.removeprefix(FILE_PREFIX)] = _value(key, parameter, "bytes_param")
            else:
                raise ServingError(
                    Reason.INVALID_TENSOR, f'unknown load parameter "{key}": there are config and file:<version>/<name>'
                )
        if files and config is None:
            raise ServingError(
                Reason.INVALID_TENSOR, 'load parameters "file:…" need "config": files replace the whole model folder'
            )
        self._manager.load(request.model_name, config, files)
        return pb.RepositoryModelLoadResponse()

    def unload(self, request: pb.RepositoryModelUnloadRequest) -> pb.RepositoryModelUnloadResponse:
        """RepositoryModelUnload: returns once no new request reaches the model. Raises ServingError."""
        _refuse_repository_name(request.repository_name)
        _require_name(request.model_name)
        unload_dependents = False
        for key, parameter in request.parameters.items():
            if key != "unload_dependents":
                raise ServingError(
                    Reason.INVALID_TENSOR, f'unknown unload parameter "{key}": there is unload_dependents only'
                )
            unload_dependents = _value(key, parameter, "bool_param")
        self._manager.unload(request.model_name, unload_dependents)
        return pb.RepositoryModelUnloadResponse()


def _refuse_repository_name(name: str) -> None:
    if name:
        raise ServingError(
            Reason.NOT_SUPPORTED,
            f'repository "{name}": there is one repository here and it has no name, leave it empty',
        )


def _require_name(name: str) -> None:
    if not name:
        raise ServingError(Reason.INVALID_TENSOR, "model_name is empty: name the model")


def _value(key: str, parameter: pb.ModelRepositoryParameter, member: str) -> Any:
    if parameter.WhichOneof("parameter_choice") != member:
        raise ServingError(Reason.INVALID_TENSOR, f'parameter "{key}" must be a {member}')
    return getattr(parameter, member)
