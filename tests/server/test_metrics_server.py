"""GET /metrics over real sockets: answers, refusals, and whoever does not behave."""

from __future__ import annotations

import http.client
import socket
import threading
from collections.abc import Iterator

import pytest

from server.metrics_server import MOST_CONNECTIONS, MetricsServer
from tests.server.fakes import PATIENCE_S, eventually


class World:
    def __init__(self) -> None:
        self.scrapes = 0
        self.server = MetricsServer("127.0.0.1", 0, self.text)
        self.server.start()

    def text(self) -> str:
        self.scrapes += 1
        return "nv_x 1\n"

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.server.port), PATIENCE_S)

    def raw(self, sent: bytes) -> bytes:
        with self.connect() as connection:
            connection.sendall(sent)
            return everything(connection)

    def request(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        client = http.client.HTTPConnection("127.0.0.1", self.server.port, timeout=PATIENCE_S)
        client.request(method, path)
        answer = client.getresponse()
        body = answer.read()
        client.close()
        return answer.status, dict(answer.getheaders()), body


def everything(connection: socket.socket) -> bytes:
    received = b""
    try:
        while chunk := connection.recv(65536):
            received += chunk
    except ConnectionResetError:
        pass
    return received


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.server.close()


def test_metrics_are_answered(world: World) -> None:
    status, headers, body = world.request("GET", "/metrics")
    assert (status, body) == (200, b"nv_x 1\n")
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert headers["Connection"] == "close"
    assert world.request("GET", "/metrics?name[]=x")[2] == b"nv_x 1\n"


def test_the_root_has_a_hint(world: World) -> None:
    status, _, body = world.request("GET", "/")
    assert status == 200
    assert b"/metrics" in body
    assert world.scrapes == 0


def test_head_has_the_length_and_no_body(world: World) -> None:
    status, headers, body = world.request("HEAD", "/metrics")
    assert (status, headers["Content-Length"], body) == (200, "7", b"")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/metricsx", 404), ("GET", "/../etc/passwd", 404), ("POST", "/metrics", 405), ("DELETE", "/", 405)],
)
def test_everything_else_is_refused(world: World, method: str, path: str, status: int) -> None:
    assert world.request(method, path)[0] == status
    assert world.scrapes == 0


@pytest.mark.parametrize("sent", [b"\r\n\r\n", b"hello\r\n\r\n", b"GET /metrics\r\n\r\n", b"PRI * HTTP/2.0\r\n\r\n"])
def test_what_is_no_http_1_is_told_so(world: World, sent: bytes) -> None:
    assert world.raw(sent).startswith(b"HTTP/1.1 400 ")


def test_a_head_may_come_in_pieces(world: World) -> None:
    with world.connect() as connection:
        for byte in b"GET /metrics HTTP/1.0\r\n\r\n":
            connection.sendall(bytes((byte,)))
        assert everything(connection).endswith(b"nv_x 1\n")


def test_a_head_without_an_end_is_cut_off(world: World) -> None:
    assert world.raw(b"GET / HTTP/1.1\r\n" + b"x: y\r\n" * 3000) == b""


def test_whoever_says_nothing_is_sent_away() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda: "", patience_s=0.05)
    server.start()
    with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
        connection.sendall(b"GET /met")
        assert everything(connection) == b""
    server.close()


def test_connections_have_a_bound_and_silent_ones_do_not_hold_it_for_ever() -> None:
    server = MetricsServer("127.0.0.1", 0, lambda: "x", patience_s=PATIENCE_S)
    server.start()
    address = ("127.0.0.1", server.port)
    silent = [socket.create_connection(address, PATIENCE_S) for _ in range(MOST_CONNECTIONS)]
    with socket.create_connection(address, PATIENCE_S) as one_too_many:
        assert everything(one_too_many) == b"", "closed at once"
    for connection in silent:
        connection.close()
    for _ in range(1000):
        with socket.create_connection(address, PATIENCE_S) as connection:
            try:
                connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            except ConnectionError:
                continue
            if everything(connection).endswith(b"x"):
                break
    else:
        raise AssertionError("the places of those who left were never given to anybody")
    server.close()


def test_a_scrape_that_fails_ends_only_itself(caplog: pytest.LogCaptureFixture) -> None:
    def text() -> str:
        if not calls.is_set():
            calls.set()
            raise RuntimeError("a bug")
        return "fine\n"

    calls = threading.Event()
    server = MetricsServer("127.0.0.1", 0, text)
    server.start()
    for expected in (b"", b"fine\n"):
        with socket.create_connection(("127.0.0.1", server.port), PATIENCE_S) as connection:
            connection.sendall(b"GET /metrics HTTP/1.1\r\n\r\n")
            assert everything(connection).endswith(expected)
    server.close()
    eventually(lambda: [record.message for record in caplog.records] == ["a scrape failed"], "the failure is logged")


def test_a_port_that_is_taken_is_told(world: World) -> None:
    with pytest.raises(OSError, match="in use"):
        MetricsServer("127.0.0.1", world.server.port, lambda: "")


def test_after_the_close_nobody_listens(world: World) -> None:
    world.server.close()
    world.server.close()
    assert not world.server._thread.is_alive()
    with pytest.raises(OSError, match="refused"):
        world.connect()


def test_a_server_that_never_started_can_be_closed() -> None:
    MetricsServer("127.0.0.1", 0, lambda: "").close()


def test_a_name_for_the_host_is_looked_up() -> None:
    server = MetricsServer("localhost", 0, lambda: "")
    assert server.port > 0
    server.close()
