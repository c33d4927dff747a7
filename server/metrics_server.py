"""GET /metrics over HTTP, and nothing else.

Threads    One accepts; each connection gets a thread of its own, a few at a time. Whoever comes on top of that is
           closed at once: scrapers come one by one, and come again.
Bounds     A request's head has 8 KiB and five seconds; an answer has five seconds to be taken. Each connection carries
           one request.
"""

from __future__ import annotations

import contextlib
import logging
import socket
import threading
import time
from collections.abc import Callable

from server.metrics import CONTENT_TYPE

_LOG = logging.getLogger(__name__)

MOST_CONNECTIONS = 8
_MOST_HEAD_BYTES = 8192
_PATIENCE_S = 5.0

_HINT = b"Tidegate: metrics for Prometheus are at /metrics, inference is gRPC on another port.\n"


class MetricsServer:
    """Answers scrapers with what `text()` says."""

    def __init__(self, host: str, port: int, text: Callable[[], str], *, patience_s: float = _PATIENCE_S) -> None:
        """Binds; port 0 picks one. Raises OSError when the address cannot be had. Serves from start() on."""
        self._text = text
        self._patience_s = patience_s
        self._slots = threading.BoundedSemaphore(MOST_CONNECTIONS)
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self._listener = socket.create_server(address[:2], family=family, backlog=MOST_CONNECTIONS)
        self.port: int = self._listener.getsockname()[1]  # where it listens
        self._is_closing = False
        self._thread = threading.Thread(target=self._accept, name="metrics", daemon=True)

    def start(self) -> None:
        """Starts answering."""
        self._thread.start()

    def close(self) -> None:
        """Takes no more connections. Those under way end by themselves. Idempotent."""
        self._is_closing = True
        with contextlib.suppress(OSError):
            # Wakes the accepting thread; closing alone would leave it waiting.
            self._listener.shutdown(socket.SHUT_RDWR)
        if self._thread.is_alive():
            self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._is_closing:
            try:
                connection, _ = self._listener.accept()
            except OSError as error:
                if not self._is_closing:
                    # Out of files, most likely: the next moment may be better.
                    _LOG.warning("a connection to /metrics could not be accepted: %s", error.strerror)
                    threading.Event().wait(0.1)
                continue
            if not self._slots.acquire(blocking=False):
                connection.close()
                continue
            threading.Thread(target=self._serve, args=(connection,), name="metrics-scrape", daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        try:
            with connection:
                head = self._head(connection)
                if head is not None:
                    connection.settimeout(self._patience_s)
                    connection.sendall(self._answer(head))
        except OSError:
            pass  # The scraper has gone or is too slow; it will come again.
        except Exception:
            _LOG.exception("a scrape failed")
        finally:
            self._slots.release()

    def _head(self, connection: socket.socket) -> bytes | None:
        """The request up to the blank line; None when it does not come, or not soon, or is too long."""
        deadline = time.monotonic() + self._patience_s
        head = b""
        while b"\r\n\r\n" not in head:
            left = deadline - time.monotonic()
            if left <= 0 or len(head) > _MOST_HEAD_BYTES:
                return None
            connection.settimeout(left)
            received = connection.recv(4096)
            if not received:
                return None
            head += received
        return head

    def _answer(self, head: bytes) -> bytes:
        words = head.split(b"\r\n", 1)[0].split(b" ")
        if len(words) != 3 or not words[2].startswith(b"HTTP/1."):
            return _response("400 Bad Request", b"this is not HTTP/1\n")
        method, path = words[0], words[1].split(b"?", 1)[0]
        if path not in (b"/metrics", b"/"):
            return _response("404 Not Found", b"there is only /metrics\n")
        if method not in (b"GET", b"HEAD"):
            return _response("405 Method Not Allowed", b"only GET\n", "Allow: GET, HEAD\r\n")
        body = self._text().encode() if path == b"/metrics" else _HINT
        kind = CONTENT_TYPE if path == b"/metrics" else "text/plain; charset=utf-8"
        return _response("200 OK", body, kind=kind, has_body=method == b"GET")


def _response(
    status: str, body: bytes, more: str = "", *, kind: str = "text/plain; charset=utf-8", has_body: bool = True
) -> bytes:
    head = (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n{more}Connection: close\r\n\r\n"
    )
    return head.encode() + (body if has_body else b"")
