"""What a large tensor costs: 602,112 bytes of image per request, and how often each byte is copied."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import grpc
import numpy as np
import numpy.typing as npt

from loadtests import models, rig
from loadtests.report import Goal, Result
from loadtests.rig import INFER_PATH, Bench, BenchError, Closed
from server.demo.exposition import Scrape
from server.demo.process import ServeProcess

QUESTION = "How often is the payload of a request copied between the socket and the runtime, and what does that cost?"
MODEL = "image"
SHAPE = (3, 224, 224)
PAYLOAD = 4 * SHAPE[0] * SHAPE[1] * SHAPE[2]
# Read buffer -> body, body -> batch buffer.
COPIES = 2
# A message is larger than its payload by names and shapes; everything else above two copies is a copy too many.
MOST_COPIES = COPIES + 0.01

RECEIVED = "tidegate_bytes_received_total"  # read buffer -> body, whole messages
GATHERED = "tidegate_bytes_gathered_total"  # body -> batch buffer, tensors


@dataclass(frozen=True, slots=True)
class Counted:
    """What the byte counters grew by over `requests` requests of one image each."""

    requests: int
    received: float
    gathered: float

    def copies(self) -> float:
        """Copies of one request's payload."""
        return (self.received + self.gathered) / (self.requests * PAYLOAD)


def run(bench: Bench) -> Result:
    """Counts bytes over requests sent one by one and over parallel ones, then times a closed loop."""
    repository = bench.folder / "models"
    folder = models.put(repository, MODEL, models.image())
    x = rig.random_rows(1, *SHAPE)
    expected = rig.expected_answer(folder / "model.onnx", x)
    body = rig.body_file(bench.folder, MODEL, x)
    with rig.serve(repository, bench.folder / "serve.log") as server:
        rig.check_answer(server.grpc_address, MODEL, x, expected)
        counts = {
            "one by one": _counted(server, x, bench.count(200, 20), in_flight=1),
            "16 in flight": _counted(server, x, bench.count(800, 48), in_flight=16),
        }
        for name, found in counts.items():
            bench.say(f"{name}: {found.copies():.4f} copies of {PAYLOAD:,} bytes")
        before = rig.scrape(server)
        with rig.counted(server, MODEL, 16) as done:
            closed = rig.h2load(
                server.grpc_port,
                INFER_PATH,
                body,
                connections=4,
                streams=4,
                seconds=bench.seconds(10.0, 1.0),
                server_pid=server.pid,
            )
            done.append(closed.done)
        runtime_us = _runtime_us(before, rig.scrape(server))
        rig.check_answer(server.grpc_address, MODEL, x, expected)
    return judge(counts, closed, runtime_us)


def _counted(server: ServeProcess, x: npt.NDArray[np.float32], requests: int, in_flight: int) -> Counted:
    """Sends exactly `requests` requests, none of which is dropped, and reads the counters around them."""
    message = rig.request_message(MODEL, {"x": x})
    before = rig.scrape(server)
    with grpc.insecure_channel(server.grpc_address) as channel:
        infer = channel.unary_unary(INFER_PATH)
        waiting: deque[Any] = deque()
        for _ in range(requests):
            if len(waiting) == in_flight:
                waiting.popleft().result()
            waiting.append(infer.future(message, timeout=60))
        for call in waiting:
            call.result()
    after = rig.settled(server, MODEL)
    answered = rig.needed(after, rig.SUCCESSES, model=MODEL) - before.total(rig.SUCCESSES, model=MODEL)
    if answered != requests:
        raise BenchError(f"{requests} images were sent and the server answered {answered:g}")
    grown = {name: rig.needed(after, name) - before.total(name) for name in (RECEIVED, GATHERED)}
    return Counted(requests, grown[RECEIVED], grown[GATHERED])


def _runtime_us(before: Scrape, after: Scrape) -> float:
    """Mean us of a request inside the runtime, between two readings."""
    duration, count = "nv_inference_compute_infer_duration_us", rig.SUCCESSES
    grown = {name: rig.needed(after, name, model=MODEL) - before.total(name, model=MODEL) for name in (duration, count)}
    return grown[duration] / grown[count]


def judge(counts: Mapping[str, Counted], closed: Closed, runtime_us: float) -> Result:
    """The goals: two copies, and counters that count."""
    goals = []
    for name, found in counts.items():
        goals += [
            Goal(f"copies of a 602,112-byte payload, {name}", round(found.copies(), 4), "<=", MOST_COPIES),
            # Without this a counter that stands still would meet the goal.
            Goal(
                f"payload seen by the counter of received bytes, {name}",
                round(found.received / (found.requests * PAYLOAD), 4),
                ">=",
                1.0,
            ),
        ]
    figures = {
        "copies": {name: round(found.copies(), 4) for name, found in counts.items()},
        "received_per_payload": {name: round(c.received / (c.requests * PAYLOAD), 4) for name, c in counts.items()},
        "gathered_per_payload": {name: round(c.gathered / (c.requests * PAYLOAD), 4) for name, c in counts.items()},
        "requests_per_s": round(closed.per_s, 1),
        "mb_per_s": round(closed.per_s * PAYLOAD / 1e6, 1),
        "server_cpu_us_per_request": closed.server_cpu_us,
        "runtime_us_per_request": round(runtime_us, 1),
    }
    return Result(goals, figures, {"counted": {n: asdict(c) for n, c in counts.items()}, "closed": asdict(closed)})
