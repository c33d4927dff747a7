"""Clients that ask without a pause while a test does something to the server."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import tritonclient.grpc as triton

from tests.conformance.harness import PATIENCE_S, Served, eventually, int64_rows, triton_input


class Traffic:
    """Asks models that add the number of their version to x; every answer must be its own, and of the version it names.

    Use as a context manager: the end of the block waits for the last answers and raises when one was missing or wrong.
    """

    def __init__(self, served: Served, model: str, clients: int = 2) -> None:
        self.answers: dict[str, int] = {}  # version -> how many
        self.failures: list[str] = []
        self._model = model
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask, args=(served.grpc_address, i)) for i in range(clients)]

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        self.wait_for_more()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(PATIENCE_S)
        if error is None:
            assert not any(thread.is_alive() for thread in self._threads)
            assert self.failures == []

    @property
    def count(self) -> int:
        """Answers so far."""
        with self._lock:
            return sum(self.answers.values())

    def wait_for_more(self, answers: int = 20) -> None:
        """Returns when so many more requests have been answered."""
        wanted = self.count + answers
        eventually(lambda: self.count >= wanted or self.failures, f"{answers} more answers")

    def _ask(self, address: str, client: int) -> None:
        with triton.InferenceServerClient(address) as own:
            number = client * 1_000_000_000
            while not self._stop.is_set():
                number += 1000
                try:
                    result = own.infer(
                        self._model,
                        [triton_input("x", int64_rows(number), "INT64")],
                        request_id=str(number),
                        client_timeout=PATIENCE_S,
                    )
                except Exception as error:  # whatever it is, a request was lost
                    self._fail(f"{number}: {error!r}")
                    continue
                self._note(number, result)

    def _note(self, number: int, result: Any) -> None:
        response = result.get_response()
        added = int(result.as_numpy("y").item()) - number
        if response.id != str(number) or str(added) != response.model_version.split(".", 1)[0]:
            self._fail(f"{number}: version {response.model_version} answered {response.id} with {added} added")
        with self._lock:
            self.answers[response.model_version] = self.answers.get(response.model_version, 0) + 1

    def _fail(self, message: str) -> None:
        with self._lock:
            self.failures.append(message)
        if len(self.failures) > 10:
            self._stop.set()
