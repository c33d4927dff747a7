"""grpc.health.v1 and the readiness of this server.

Services: "" and `inference.GRPCInferenceService` mean the whole server, `NAME` a model (some version of it can answer),
`NAME@VERSION` one version. The server is SERVING once its start is done, that is, each initial model is READY or has
failed: one broken model must not keep the others from being called. It is NOT_SERVING from the moment it is told to
stop.

Check and List read the state of the moment. Watchers are told by one thread, which the manager's listener only wakes:
the manager never waits for a watcher, and two changes in a row may be told as one.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from enum import Enum
from typing import TYPE_CHECKING

from google.protobuf.message import DecodeError

from protos.gen import health_pb2
from server.errors import Reason, ServingError

if TYPE_CHECKING:
    from server._native import SlowCall
    from server.manager import Manager

INFERENCE = "inference.GRPCInferenceService"

# The health protocol's own bound: a longer list is refused, so that nobody builds on it at scale.
MOST_LISTED = 100

# Every watcher costs a status per change; a fleet of sidecars watches a handful of services each.
MOST_WATCHERS = 1024

Status = health_pb2.HealthCheckResponse.ServingStatus


class Phase(Enum):
    """The life of the process, in order."""

    STARTING = 1
    SERVING = 2
    STOPPING = 3


class Health:
    """What health checks, readiness and watchers are told. Methods may be called from any thread.

    Lock: `_telling` is held while the manager is asked and calls are answered, so the manager's listener must never
    take it; it only sets `_changed`.
    """

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._phase = Phase.STARTING
        self._telling = threading.Lock()
        self._watches: set[Watch] = set()
        self._changed = threading.Event()
        self._ended = False
        self._teller = threading.Thread(target=self._tell_changes, name="health-watch", daemon=True)

    def start(self) -> None:
        """Starts telling watchers about changes."""
        self._manager.add_listener(lambda *_: self._changed.set())
        self._teller.start()

    def stop(self) -> None:
        """Ends the thread. Watches still open are no longer told anything."""
        self._ended = True
        self._changed.set()
        if self._teller.is_alive():
            self._teller.join()

    @property
    def is_ready(self) -> bool:
        """Whether the server wants requests: started, and not about to stop."""
        return self._phase is Phase.SERVING

    def enter(self, phase: Phase) -> None:
        """Moves to a phase. When this returns every watcher has been told."""
        self._phase = phase
        self._tell()

    # -- the RPCs ------------------------------------------------------------------------------------------------------

    def check(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckResponse:
        """Check. Raises ServingError(MODEL_NOT_FOUND) for a service nobody has heard of."""
        status = self.status(request.service)
        if status == Status.SERVICE_UNKNOWN:
            raise ServingError(
                Reason.MODEL_NOT_FOUND,
                f'unknown service "{request.service}": ask for "", "{INFERENCE}", a model or MODEL@VERSION',
            )
        return health_pb2.HealthCheckResponse(status=status)

    def list(self, _request: health_pb2.HealthListRequest) -> health_pb2.HealthListResponse:
        """List. Raises ServingError(QUEUE_FULL) when there are more than MOST_LISTED services."""
        names = list(self._services())
        if len(names) > MOST_LISTED:
            raise ServingError(
                Reason.QUEUE_FULL,
                f"there are {len(names)} services and at most {MOST_LISTED} are listed: check them by name",
            )
        response = health_pb2.HealthListResponse()
        for name in names:
            response.statuses[name].status = self.status(name)
        return response

    def watch(self, call: SlowCall) -> Watch:
        """A new Watch call."""
        return Watch(self, call)

    # -- the state -----------------------------------------------------------------------------------------------------

    def status(self, service: str) -> health_pb2.HealthCheckResponse.ServingStatus:
        """The status of a service; SERVICE_UNKNOWN when there is none of that name."""
        if service in ("", INFERENCE):
            return _serving(self.is_ready)
        if self._manager.ready(service, ""):
            return _serving(self._phase is not Phase.STOPPING)
        name, at, version = service.rpartition("@")
        if at and version and self._manager.ready(name, version):
            return _serving(self._phase is not Phase.STOPPING)
        known = service in self._services()
        return Status.NOT_SERVING if known else Status.SERVICE_UNKNOWN

    def _services(self) -> Iterator[str]:
        yield ""
        yield INFERENCE
        # What is known already: a health check reads no disk.
        for name, versions in self._manager.known().items():
            yield name
            yield from (f"{name}@{version}" for version in versions)

    # -- watchers ------------------------------------------------------------------------------------------------------

    def _tell_changes(self) -> None:
        while True:
            self._changed.wait()
            self._changed.clear()
            if self._ended:
                return
            self._tell()

    def _tell(self) -> None:
        with self._telling:
            for watch in self._watches:
                watch.tell(self.status(watch.service))

    def add(self, watch: Watch) -> None:
        """Begins to tell a watcher, with the current status first. Raises ServingError when there are too many."""
        with self._telling:
            if len(self._watches) >= MOST_WATCHERS:
                raise ServingError(Reason.QUEUE_FULL, f"{MOST_WATCHERS} watches are open already: use Check")
            self._watches.add(watch)
            watch.tell(self.status(watch.service))

    def remove(self, watch: Watch) -> None:
        """Forgets a watcher."""
        with self._telling:
            self._watches.discard(watch)


class Watch:
    """One Watch call: stays open, also for a service that is unknown, until the client goes or the server stops."""

    def __init__(self, health: Health, call: SlowCall) -> None:
        self._health = health
        self._call = call
        self._last: health_pb2.HealthCheckResponse.ServingStatus | None = None
        self._asked = False
        self.service = ""

    def message(self, payload: bytes) -> None:
        """The request. Raises ServingError for a message that cannot be read or is not the only one."""
        if self._asked:
            raise ServingError(
                Reason.MALFORMED_MESSAGE, "Watch takes one request: open another call for another service"
            )
        self._asked = True
        try:
            self.service = health_pb2.HealthCheckRequest.FromString(payload).service
        except DecodeError as error:
            raise ServingError(Reason.MALFORMED_MESSAGE, "the message is not a HealthCheckRequest") from error
        self._health.add(self)

    def half_close(self) -> bool:
        """The client has said everything; the answers go on. Raises ServingError when it has asked for nothing."""
        if not self._asked:
            raise ServingError(Reason.MALFORMED_MESSAGE, "Watch got no request")
        return True

    def closed(self) -> None:
        """The call is over."""
        self._health.remove(self)

    def tell(self, status: health_pb2.HealthCheckResponse.ServingStatus) -> None:
        """Sends a status unless it is the one sent last."""
        if status != self._last:
            self._last = status
            self._call.send(health_pb2.HealthCheckResponse(status=status).SerializeToString())


def _serving(is_serving: bool) -> health_pb2.HealthCheckResponse.ServingStatus:
    return Status.SERVING if is_serving else Status.NOT_SERVING
