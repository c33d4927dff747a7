"""Every request has an id and an answer of its own, while the model is replaced under it again and again.

Version v of the model adds v to its input, so an answer tells which version gave it, which request it belongs to, and
whether the reply names that version.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
import numpy.typing as npt
from tritonclient.grpc import service_pb2 as pb

from loadtests import models, rig
from loadtests.report import Goal, Result
from loadtests.rig import INFER_PATH, Bench, BenchError
from server.demo.exposition import Scrape
from server.demo.process import ServeProcess

QUESTION = "Is every request answered once, with its own answer, while the model is swapped ten times?"
MODEL = "plus"
SWAPS = 10
REQUESTS = 100_000
LEAST_REQUESTS = 1_000
WIDTH = 16
CHANNELS, IN_FLIGHT = 4, 64
TIMEOUT_S = 30.0
KEPT_ERRORS = 5


@dataclass(slots=True)
class Outcome:
    """What came of the requests."""

    answers: Counter[str] = field(default_factory=Counter)  # request id -> how many answers
    versions: Counter[str] = field(default_factory=Counter)
    foreign: int = 0  # answers with another id than their request's, or that are not that version's answer to it
    failed: int = 0
    errors: list[str] = field(default_factory=list)  # the first few

    def note_error(self, text: str) -> None:
        """Keeps the first few texts."""
        if len(self.errors) < KEPT_ERRORS:
            self.errors.append(text)

    def take(self, number: int, reply: pb.ModelInferResponse) -> None:
        """Looks at the answer to request `number`."""
        self.answers[reply.id] += 1
        self.versions[reply.model_version] += 1
        if not is_own(number, reply):
            self.foreign += 1
            self.note_error(f"request {number} got id {reply.id!r} of version {reply.model_version!r}")


def request_id(number: int) -> str:
    """The id of a request."""
    return f"request-{number}"


def row_of(number: int) -> npt.NDArray[np.float32]:
    """The input of a request, FP32 [1, 16]: its number in steps of 32, so that no version turns it into another's."""
    row = np.empty((1, WIDTH), np.float32)
    row[:, 0::2] = 32 * (number % 1000)
    row[:, 1::2] = 32 * (number // 1000)
    return row


def is_own(number: int, reply: pb.ModelInferResponse) -> bool:
    """Whether a reply has the id of the request and what the version it names answers to it."""
    if reply.id != request_id(number) or not reply.model_version.isdigit() or len(reply.raw_output_contents) != 1:
        return False
    expected = row_of(number) + np.float32(int(reply.model_version))
    return bytes(reply.raw_output_contents[0]) == expected.tobytes()


@dataclass(frozen=True, slots=True)
class Stage:
    """Where a request stands among the swaps: so many have begun, and so many must be done before it is sent."""

    swaps: int
    swaps_done: int
    starts_swap: bool  # it is the first since its last swap began


def stage_of(number: int, count: int) -> Stage:
    """The stage of request `number` of `count`.

    The swaps begin at equal distances. In the first half of each distance the swap is under way; in the second it is
    done, waited for if need be, so that every version answers some requests however long a swap takes.
    """
    swaps, half = divmod(2 * number * (SWAPS + 1) // count, 2)
    is_under_way = swaps > 0 and half == 0
    starts_swap = number > 0 and swaps > (number - 1) * (SWAPS + 1) // count
    return Stage(swaps, swaps - is_under_way, starts_swap)


def run(bench: Bench) -> Result:
    """Sends the requests and swaps the model at equal distances between them."""
    count = bench.options.get("count") or bench.count(REQUESTS, 5_000)
    if count < LEAST_REQUESTS:
        raise BenchError(f"--count {count}: at least {LEAST_REQUESTS} requests are needed around {SWAPS} swaps")
    repository = bench.folder / "models"
    models.put(repository, MODEL, models.plus(1, WIDTH), version="1")
    flags = ("--model-control-mode", "explicit", "--load-model", MODEL)
    with rig.serve(repository, bench.folder / "serve.log", *flags) as server:
        began = time.monotonic()
        outcome, swaps_s = asyncio.run(_all(bench, server, repository, count))
        took = time.monotonic() - began
        # Versions that are gone are still shown for some minutes, so this has all of them.
        counted = successes_by_version(rig.settled(server, MODEL))
    return judge(count, outcome, swaps_s, took, counted)


def successes_by_version(found: Scrape) -> dict[str, int]:
    """What the server counted, by version."""
    return {one.labels["version"]: int(one.value) for one in found.matching(rig.SUCCESSES, model=MODEL)}


async def _all(bench: Bench, server: ServeProcess, repository: Path, count: int) -> tuple[Outcome, list[float]]:
    outcome, swaps_s = Outcome(), []
    numbers = iter(range(count))
    swaps: asyncio.Queue[int] = asyncio.Queue()
    is_swapped = [asyncio.Event() for _ in range(SWAPS)]
    # Channels of one process share a connection unless told otherwise.
    options = [("grpc.use_local_subchannel_pool", 1)]
    channels = [grpc.aio.insecure_channel(server.grpc_address, options=options) for _ in range(CHANNELS)]
    calls = [
        channel.unary_unary(INFER_PATH, response_deserializer=pb.ModelInferResponse.FromString) for channel in channels
    ]

    async def client(call: Any) -> None:
        for number in numbers:
            stage = stage_of(number, count)
            if stage.starts_swap:
                swaps.put_nowait(stage.swaps)
            if stage.swaps_done:
                await is_swapped[stage.swaps_done - 1].wait()
            message = rig.request_message(MODEL, {"x": row_of(number)}, request_id(number))
            try:
                reply = await call(message, timeout=TIMEOUT_S)
            except grpc.aio.AioRpcError as why:
                outcome.failed += 1
                outcome.note_error(f"request {number}: {why.code().name}: {why.details()}")
                continue
            outcome.take(number, reply)

    async def swapper() -> None:
        try:
            for _ in range(SWAPS):
                swap = await swaps.get()
                began = time.monotonic()
                await asyncio.to_thread(_swap, server.grpc_address, repository, 1 + swap)
                swaps_s.append(time.monotonic() - began)
                answers = sum(outcome.versions.values())
                bench.say(f"version {1 + swap} serves after {swaps_s[-1]:.2f} s, {answers} answers")
                is_swapped[swap - 1].set()
        finally:
            # Nobody waits for a swap that has failed.
            for event in is_swapped:
                event.set()

    swapping = asyncio.create_task(swapper())
    try:
        await asyncio.gather(*(client(calls[worker % CHANNELS]) for worker in range(IN_FLIGHT)))
        await swapping
    finally:
        swapping.cancel()
        for channel in channels:
            await channel.close()
    return outcome, swaps_s


def _swap(address: str, repository: Path, version: int) -> None:
    """Puts the next version beside the one that serves and has it loaded; the version policy retires the old one."""
    models.put(repository, MODEL, models.plus(version, WIDTH), version=str(version))
    with rig.client_of(address) as client:
        client.load_model(MODEL, client_timeout=60)


def judge(count: int, outcome: Outcome, swaps_s: Sequence[float], took_s: float, counted: Mapping[str, int]) -> Result:
    """The goals: nothing lost, nothing twice, nothing foreign, and every version took part.

    `counted` are the server's successes by version.
    """
    differing = [
        version for version in {*outcome.versions, *counted} if counted.get(version, 0) != outcome.versions[version]
    ]
    wanted = {request_id(number) for number in range(count)}
    goals = [
        Goal("requests that failed", outcome.failed, "==", 0),
        Goal("ids that got no answer", len(wanted - outcome.answers.keys()), "==", 0),
        Goal("ids that got more than one answer", sum(n > 1 for n in outcome.answers.values()), "==", 0),
        Goal("answers that are not the request's own", outcome.foreign, "==", 0),
        Goal("hot swaps done", len(swaps_s), "==", SWAPS),
        Goal("versions that answered", len(outcome.versions), "==", SWAPS + 1),
        # A request that is run twice gets one answer and is counted twice.
        Goal("versions of which the server counted other answers than its clients", len(differing), "==", 0),
    ]
    figures = {
        "requests": count,
        "requests_per_s": round(count / took_s, 1),
        "answers_by_version": dict(outcome.versions),
        "counted_by_version": dict(counted),
        "swap_s": [round(one, 3) for one in swaps_s],
        "errors": outcome.errors,
    }
    return Result(goals, figures)
