"""Every request is answered once, with its own rows, whatever is published and retired meanwhile."""

from __future__ import annotations

import itertools
import random
import threading
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import grpc
import numpy as np
import pytest

from tests.wire.harness import (
    INFER,
    OK,
    STREAM_INFER,
    Http2,
    Server,
    eventually,
    framed,
    infer_request,
    model_settings,
    pb,
)


def numbered_request(number: int, rows: int) -> pb.ModelInferRequest:
    """Rows that nobody else sends."""
    rows_of = [[number, row, rows, 0.5] for row in range(rows)]
    return infer_request(values=rows_of, id=f"request-{number}")


def check_answer(message: bytes, number: int, rows: int) -> str:
    """It is this request's own. Returns the version that ran it."""
    response = pb.ModelInferResponse.FromString(message)
    assert response.id == f"request-{number}"
    values = np.frombuffer(response.raw_output_contents[0], "<f4").reshape(rows, 4)
    assert values.tolist() == [[number, row, rows, 0.5] for row in range(rows)]
    return str(response.model_version)


class Swapper:
    """Publishes version after version and retires the one before, until it is stopped."""

    def __init__(self, server: Server, script: str, **settings: Any) -> None:
        self._server, self._script, self._settings = server, script, settings
        self._stop = threading.Event()
        self.served: Counter[str] = Counter()  # answers by version, as the versions counted them
        self._current = self._add(1)
        self.swaps = 0
        self._thread = threading.Thread(target=self._run)

    def _add(self, number: int) -> Any:
        return self._server.add(model_settings(version=str(number), **self._settings), self._script)

    def _run(self) -> None:
        for number in itertools.count(2):
            if self._stop.wait(0.02):
                return
            previous, self._current = self._current, self._add(number)
            assert self._server.retire("echo", str(number - 1)), "the old version ends in time"
            statistics = previous.statistics()
            assert statistics.fail_count == 0
            self.served[str(number - 1)] = statistics.success_count
            self.swaps += 1

    def __enter__(self) -> Swapper:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        last = max(self._server.versions, key=lambda key: int(key[1]))[1]
        statistics = self._current.statistics()
        assert statistics.fail_count == 0
        self.served[last] = statistics.success_count


def ask_with_grpcio(server: Server, numbers: range, at_least_until: Callable[[], bool]) -> Counter[str]:
    """Sends every number once from a channel of its own, up to 32 at a time. Returns answers by version."""
    seen: Counter[str] = Counter()
    rng = random.Random(numbers.start)
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.insecure_channel(f"127.0.0.1:{server.port}", options) as channel:
        infer = channel.unary_unary(INFER)
        for start in range(numbers.start, numbers.stop, 32):
            some = [(number, rng.randint(1, 8)) for number in range(start, min(start + 32, numbers.stop))]
            calls = [infer.future(numbered_request(*one).SerializeToString(), timeout=30) for one in some]
            for call, one in zip(calls, some, strict=True):
                seen[check_answer(call.result(), *one)] += 1
    assert at_least_until is not None
    return seen


def run(server: Server, swapper: Swapper, clients: int, each: int) -> None:
    """Sends `clients` times `each` requests under swaps and compares who says what."""
    with swapper, ThreadPoolExecutor(clients) as pool:
        futures: list[Future[Counter[str]]] = [
            pool.submit(ask_with_grpcio, server, range(i * each, (i + 1) * each), lambda: True) for i in range(clients)
        ]
        seen = sum((future.result() for future in as_completed(futures)), Counter())
    assert seen.total() == clients * each
    assert swapper.swaps >= 3
    assert seen == +swapper.served
    assert server.count("calls") == clients * each


def test_every_request_is_answered_once_with_its_own_rows_under_swaps(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)
    run(server, Swapper(server, "echo", instances=2), clients=4, each=1000)


def test_the_same_when_runs_take_a_while(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)
    run(server, Swapper(server, "sleep:300", instances=2), clients=4, each=500)


def test_the_same_with_answers_in_order(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)
    run(server, Swapper(server, "sleep:200", instances=3, preserve_ordering=True), clients=4, each=500)


@pytest.mark.slow
def test_a_hundred_thousand_requests_under_swaps(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)
    run(server, Swapper(server, "echo", instances=2), clients=4, each=25_000)


def test_pipelined_raw_calls_are_each_answered_once(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2, max_streams=1000)

    def ask(base: int) -> int:
        answered = 0
        with Http2(server.port) as client:
            for start in range(base, base + 3000, 300):
                streams = {
                    client.call(numbered_request(number, 1 + number % 3)): number
                    for number in range(start, start + 300)
                }
                for stream_id, number in streams.items():
                    reply = client.reply(stream_id).expect(OK)
                    (message,) = reply.messages
                    check_answer(message, number, 1 + number % 3)
                    assert reply.shape.count("HEADERS+END") == 1
                    answered += 1
                client.replies.clear()
                client.frames.clear()
        return answered

    with Swapper(server, "echo") as swapper, ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(ask, [0, 100_000, 200_000])) == 9000
    assert swapper.served.total() == 9000


def test_streams_under_swaps_keep_their_order(serve: Callable[..., Server]) -> None:
    server = serve(io_threads=2)

    def ask(base: int) -> int:
        with Http2(server.port) as client:
            stream_id = client.open(STREAM_INFER)
            for number in range(base, base + 1000):
                client.data(stream_id, framed(numbered_request(number, 1)))
            client.data(stream_id, b"", end=True)
            messages = client.reply(stream_id).expect(OK).messages
            for number, message in zip(range(base, base + 1000), messages, strict=True):
                response = pb.ModelStreamInferResponse.FromString(message)
                assert response.error_message == ""
                check_answer(response.infer_response.SerializeToString(), number, 1)
            return len(messages)

    with Swapper(server, "sleep:100", instances=2) as swapper, ThreadPoolExecutor(3) as pool:
        assert sum(pool.map(ask, [0, 100_000, 200_000])) == 3000
    assert swapper.served.total() == 3000


def test_who_cancels_at_random_disturbs_nobody(serve: Callable[..., Server]) -> None:
    """Half of the calls are reset at some moment; each of the others is answered; all of them are accounted for."""
    server = serve(io_threads=2)
    version = server.add(model_settings(instances=2), script="sleep:100")

    def ask(base: int) -> tuple[int, int]:
        rng = random.Random(base)
        kept = dropped = 0
        with Http2(server.port) as client:
            for start in range(base, base + 2000, 100):
                streams = {}
                for number in range(start, start + 100):
                    stream_id = client.call(numbered_request(number, 1))
                    if rng.random() < 0.5:
                        streams[stream_id] = number
                    else:
                        client.reset(stream_id)
                        dropped += 1
                for stream_id, number in streams.items():
                    check_answer(client.reply(stream_id).expect(OK).messages[0], number, 1)
                    kept += 1
        return kept, dropped

    with ThreadPoolExecutor(3) as pool:
        outcomes = list(pool.map(ask, [0, 100_000, 200_000]))
    kept, dropped = (sum(numbers) for numbers in zip(*outcomes, strict=True))
    eventually(lambda: server.count("requests_live") == 0, "all requests have come back")
    statistics = version.statistics()
    assert kept + dropped == 6000
    assert kept <= statistics.success_count <= kept + dropped
    assert statistics.success_count + statistics.fail_count <= kept + dropped
    assert statistics.fail_count == statistics.failures["CANCELED"]
    assert statistics.pending == 0
