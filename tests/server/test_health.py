"""grpc.health.v1 over a real manager: the whole server, models and versions, asked and watched."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from protos.gen import health_pb2
from server.config import ControlMode
from server.errors import Reason, ServingError
from server.manager import Manager
from server.rpc import health as health_module
from server.rpc.health import INFERENCE, MOST_LISTED, Health, Phase, Watch
from tests.server.fakes import PATIENCE_S, FakeCall, eventually
from tests.server.world import World

Response = health_pb2.HealthCheckResponse
UNKNOWN, SERVING, NOT_SERVING, SERVICE_UNKNOWN = (
    Response.UNKNOWN,
    Response.SERVING,
    Response.NOT_SERVING,
    Response.SERVICE_UNKNOWN,
)


@pytest.fixture
def manager(world: World) -> Manager:
    world.put("a")
    world.put("b")
    return world.started(ControlMode.EXPLICIT, load_models=["a"])


@pytest.fixture
def health(manager: Manager) -> Iterator[Health]:
    health = Health(manager)
    health.start()
    yield health
    health.stop()


def check(health: Health, service: str) -> int:
    return health.check(health_pb2.HealthCheckRequest(service=service)).status


def watch(health: Health, service: str) -> tuple[Watch, FakeCall]:
    call = FakeCall()
    watch = health.watch(call)  # type: ignore[arg-type]
    watch.message(health_pb2.HealthCheckRequest(service=service).SerializeToString())
    return watch, call


def told(call: FakeCall) -> list[int]:
    return [Response.FromString(message).status for message in call.sent]


@pytest.mark.parametrize("service", ["", INFERENCE])
def test_the_server_serves_between_its_start_and_its_stop(health: Health, service: str) -> None:
    assert check(health, service) == NOT_SERVING
    assert not health.is_ready
    health.enter(Phase.SERVING)
    assert check(health, service) == SERVING
    assert health.is_ready
    health.enter(Phase.STOPPING)
    assert check(health, service) == NOT_SERVING
    assert not health.is_ready


def test_models_and_versions_have_services_of_their_own(health: Health) -> None:
    health.enter(Phase.SERVING)
    assert check(health, "a") == SERVING
    assert check(health, "a@1") == SERVING
    assert check(health, "a@^1") == SERVING
    assert check(health, "b") == NOT_SERVING
    assert check(health, "b@1") == NOT_SERVING
    for unknown in ("c", "a@2", "a@", "@1", "@"):
        with pytest.raises(ServingError) as raised:
            check(health, unknown)
        assert raised.value.reason is Reason.MODEL_NOT_FOUND


def test_a_model_serves_as_soon_as_it_is_ready_and_not_while_the_server_stops(health: Health) -> None:
    assert check(health, "a") == SERVING
    health.enter(Phase.STOPPING)
    assert check(health, "a") == NOT_SERVING
    assert check(health, "a@1") == NOT_SERVING


def test_everything_can_be_listed(health: Health) -> None:
    health.enter(Phase.SERVING)
    statuses = health.list(health_pb2.HealthListRequest()).statuses
    assert {name: one.status for name, one in statuses.items()} == {
        "": SERVING,
        INFERENCE: SERVING,
        "a": SERVING,
        "a@1": SERVING,
        "b": NOT_SERVING,
        "b@1": NOT_SERVING,
    }


def test_a_list_that_is_too_long_is_refused(world: World) -> None:
    for number in range(MOST_LISTED // 2):
        world.put(f"m{number}")
    health = Health(world.started(ControlMode.EXPLICIT))
    with pytest.raises(ServingError, match="there are 102 services and at most 100 are listed"):
        health.list(health_pb2.HealthListRequest())


def test_a_health_check_reads_no_disk(health: Health, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_disk(*_anything: object) -> None:
        raise AssertionError("a health check looked at the repository")

    world.clock.advance(100)
    monkeypatch.setattr("server.source.os.scandir", no_disk)
    health.enter(Phase.SERVING)
    assert check(health, "b") == NOT_SERVING
    with pytest.raises(ServingError):
        check(health, "nobody")
    health.list(health_pb2.HealthListRequest())


def test_a_watcher_hears_the_status_at_once_and_every_change(health: Health, manager: Manager) -> None:
    _, server = watch(health, "")
    _, model = watch(health, "b")
    assert told(server) == [NOT_SERVING]
    assert told(model) == [NOT_SERVING]
    health.enter(Phase.SERVING)
    assert told(server) == [NOT_SERVING, SERVING], "told before enter() returns"
    manager.load("b")
    eventually(lambda: told(model) == [NOT_SERVING, SERVING], "the watcher hears of the load")
    manager.unload("b")
    eventually(lambda: told(model) == [NOT_SERVING, SERVING, NOT_SERVING], "the watcher hears of the unload")
    manager.load("a")
    health.enter(Phase.STOPPING)
    assert told(server) == [NOT_SERVING, SERVING, NOT_SERVING]
    assert told(model) == [NOT_SERVING, SERVING, NOT_SERVING], "the same status is not said twice"


def test_a_watch_of_an_unknown_service_stays_open(health: Health, manager: Manager, world: World) -> None:
    watcher, call = watch(health, "later")
    assert told(call) == [SERVICE_UNKNOWN]
    assert watcher.half_close()
    world.put("later")
    manager.load("later")
    eventually(lambda: told(call)[-1] == SERVING, "the service is there now")
    assert not call.is_finished.is_set()


def test_a_watcher_that_left_hears_nothing_more(health: Health) -> None:
    watcher, call = watch(health, "")
    watcher.closed()
    health.enter(Phase.SERVING)
    assert told(call) == [NOT_SERVING]
    assert not health._watches


def test_watchers_have_a_bound(health: Health, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health_module, "MOST_WATCHERS", 2)
    first, _ = watch(health, "")
    watch(health, "")
    with pytest.raises(ServingError, match="2 watches are open already: use Check"):
        watch(health, "")
    first.closed()
    watch(health, "")


def test_a_watch_takes_one_request(health: Health) -> None:
    watcher, _ = watch(health, "")
    with pytest.raises(ServingError, match="Watch takes one request"):
        watcher.message(b"")
    silent = health.watch(FakeCall())  # type: ignore[arg-type]
    with pytest.raises(ServingError, match="Watch got no request"):
        silent.half_close()
    silent.closed()
    with pytest.raises(ServingError, match="not a HealthCheckRequest"):
        health.watch(FakeCall()).message(b"\xff")  # type: ignore[arg-type]


def test_the_manager_never_waits_for_a_watcher(health: Health, manager: Manager) -> None:
    class Stuck(FakeCall):
        def send(self, message: bytes) -> None:
            super().send(message)
            if len(self.sent) > 1:
                assert may_go_on.wait(PATIENCE_S)

    may_go_on = threading.Event()
    call = Stuck()
    health.watch(call).message(health_pb2.HealthCheckRequest(service="b").SerializeToString())  # type: ignore[arg-type]
    manager.load("b")
    eventually(lambda: len(call.sent) == 2, "the teller is stuck")
    manager.unload("b")
    manager.load("b")
    assert check(health, "b") == SERVING, "a check does not wait for it either"
    may_go_on.set()


def test_stopping_twice_is_no_error(manager: Manager) -> None:
    health = Health(manager)
    health.start()
    health.stop()
    health.stop()
    assert not health._teller.is_alive()
