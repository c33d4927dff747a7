"""A bounded closed-loop load: several clients, each sends its next image when the last answer is back.

Every request carries an id and an image whose label is known per version, so an answer can be told to be the one of
that request and of that version.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tritonclient.grpc as triton

MODEL = "digits"
CLIENT_TIMEOUT_S = 20.0
# A load ends by its clock; this bound only keeps a mistake in the clock from filling memory.
MOST_REQUESTS_PER_CLIENT = 500_000
KEPT_ERRORS = 5


@dataclass(frozen=True, slots=True)
class Digits:
    """The held-out set: images FP32 [n, 64], true labels [n], and what each version must answer [n]."""

    images: npt.NDArray[np.float32]
    labels: npt.NDArray[np.uint8]
    expected: Mapping[str, npt.NDArray[np.uint8]]

    @staticmethod
    def read(path: Path) -> Digits:
        """Reads the file that make_data.py wrote."""
        with np.load(path) as data:
            return Digits(
                images=data["images"].astype(np.float32),
                labels=data["labels"],
                expected={"1": data["expected_1"], "2": data["expected_2"]},
            )


@dataclass(frozen=True, slots=True)
class Sample:
    """One request as its client saw it. Times are time.perf_counter() seconds; `version` is "" when it failed."""

    image: int
    began_s: float
    ended_s: float
    version: str
    label: int
    own: bool  # the answer carries this request's id and is what that version says about this image


@dataclass(slots=True)
class Outcome:
    """What came of a load: one sample per request that was answered, and the failures."""

    samples: list[Sample] = field(default_factory=list)
    sent: int = 0
    failed: int = 0
    errors: list[str] = field(default_factory=list)  # the first few, one text each

    def add(self, other: Outcome) -> None:
        """Takes over what another client saw."""
        self.samples += other.samples
        self.sent += other.sent
        self.failed += other.failed
        self.errors = (self.errors + other.errors)[:KEPT_ERRORS]


class _Client:
    def __init__(self, address: str, digits: Digits, name: str) -> None:
        self._client = triton.InferenceServerClient(address)
        self._digits = digits
        self._name = name
        self.outcome = Outcome()

    def close(self) -> None:
        self._client.close()

    def ask(self, image: int) -> None:
        outcome, request_id = self.outcome, f"{self._name}-{self.outcome.sent}"
        tensor = triton.InferInput("image", [1, self._digits.images.shape[1]], "FP32")
        tensor.set_data_from_numpy(self._digits.images[image : image + 1])
        outcome.sent += 1
        began = time.perf_counter()
        try:
            reply = self._client.infer(MODEL, [tensor], request_id=request_id, client_timeout=CLIENT_TIMEOUT_S)
            label = int(reply.as_numpy("label").item())
        except Exception as why:  # any failure of a request is a figure of the report, and ends nothing
            outcome.failed += 1
            if len(outcome.errors) < KEPT_ERRORS:
                outcome.errors.append(f"{type(why).__name__}: {why}")
            return
        ended = time.perf_counter()
        message: Any = reply.get_response()
        expected = self._digits.expected.get(message.model_version)
        own = message.id == request_id and expected is not None and label == int(expected[image])
        outcome.samples.append(Sample(image, began, ended, message.model_version, label, own))


def _in_threads(address: str, digits: Digits, clients: int, name: str, work: Callable[[_Client, int], None]) -> Outcome:
    total = Outcome()
    workers = [_Client(address, digits, f"{name}-{number}") for number in range(clients)]
    threads = [threading.Thread(target=work, args=(worker, number)) for number, worker in enumerate(workers)]
    for thread in threads:
        thread.start()
    for thread, worker in zip(threads, workers, strict=True):
        thread.join()
        worker.close()
        total.add(worker.outcome)
    return total


def classify(address: str, digits: Digits, clients: int, name: str, progress: Callable[[int], None]) -> Outcome:
    """Sends every held-out image once, shared out among `clients`; `progress` gets the count of each step."""

    def work(client: _Client, number: int) -> None:
        for image in range(number, len(digits.labels), clients):
            client.ask(image)
            progress(1)

    return _in_threads(address, digits, clients, name, work)


class BackgroundLoad:
    """A closed-loop load that runs until `finish()`, or until its bound in seconds."""

    def __init__(self, address: str, digits: Digits, clients: int, name: str, most_s: float) -> None:
        self._until = time.perf_counter() + most_s
        self._stop = threading.Event()
        self._outcome = Outcome()
        self._thread = threading.Thread(target=self._run, args=(address, digits, clients, name))
        self._thread.start()

    def _run(self, address: str, digits: Digits, clients: int, name: str) -> None:
        self._outcome = _in_threads(address, digits, clients, name, self._work)

    def _work(self, client: _Client, number: int) -> None:
        # Clients start at different images, so that concurrent requests differ.
        n_images = len(client._digits.labels)
        for count in range(MOST_REQUESTS_PER_CLIENT):
            if self._stop.is_set() or time.perf_counter() > self._until:
                return
            client.ask((number * 101 + count) % n_images)

    def finish(self) -> Outcome:
        """Lets every client end its request in flight and returns what all of them saw."""
        self._stop.set()
        self._thread.join()
        return self._outcome


def latency_ms(samples: Sequence[Sample]) -> dict[str, float]:
    """p50, p99 and the largest latency of the samples in ms, with their count; zeros where there is none."""
    if not samples:
        return {"count": 0, "p50": 0.0, "p99": 0.0, "max": 0.0}
    took = np.array([sample.ended_s - sample.began_s for sample in samples]) * 1e3
    p50, p99 = np.percentile(took, [50, 99])
    return {
        "count": len(samples),
        "p50": round(float(p50), 3),
        "p99": round(float(p99), 3),
        "max": round(float(took.max()), 3),
    }
