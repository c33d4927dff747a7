"""A model that fails on some rows: whoever sent good ones is answered, whoever sent bad ones is told."""

from __future__ import annotations

import random
from typing import Any

import grpc
import numpy as np
import pytest

from tests.conformance import onnx_models as models
from tests.conformance.harness import (
    PATIENCE_S,
    Code,
    Served,
    array_of,
    assert_discloses_nothing,
    infer_request,
    metric,
)


@pytest.fixture(scope="module")
def served(serve_module: Any, tmp_path_factory: pytest.TempPathFactory) -> Served:
    root = tmp_path_factory.mktemp("models")
    # A batch is held until it is full, so that 32 requests are one batch.
    held = "max_batch_size: 32 dynamic_batching { max_queue_delay_microseconds: 20000000 preferred_batch_size: 32 }"
    models.put(root, "table", models.look_up(), config=held)
    models.put(root, "free", models.look_up())
    return serve_module(root)


def send(stub: Any, model: str, rows: list[list[int]]) -> list[tuple[grpc.StatusCode, Any]]:
    """All at once; code and answer, or message, of each."""
    futures = []
    for number, indices in enumerate(rows):
        array = np.array(indices, np.int64).reshape(-1, 1)
        request = infer_request(model, ("index", "INT64", array), request_id=str(number))
        futures.append(stub.ModelInfer.future(request, timeout=PATIENCE_S))
    outcomes = []
    for number, future in enumerate(futures):
        if future.code() is Code.OK:
            assert future.result().id == str(number)
            outcomes.append((Code.OK, array_of(future.result(), "y", np.int64).ravel().tolist()))
        else:
            outcomes.append((future.code(), future.details()))
    return outcomes


def test_31_good_rows_of_a_batch_of_32_succeed_and_the_bad_one_is_internal(served: Served) -> None:
    stub = served.stub()
    labels = {"model": "table", "version": "1"}
    for bad in (0, 13, 31):
        before = served.metrics()
        rows = [[99 if number == bad else number % 10] for number in range(32)]
        for number, (code, answer) in enumerate(send(stub, "table", rows)):
            if number == bad:
                assert code is Code.INTERNAL
                assert "'table' failed" in answer
                assert_discloses_nothing(answer)
            else:
                assert (code, answer) == (Code.OK, [number % 10 * 100])
        after = served.metrics()

        def grown(name: str, **more: str) -> float:
            return metric(after, name, **labels, **more) - metric(before, name, **labels, **more)  # noqa: B023

        assert grown("nv_inference_request_success") == 31
        assert grown("nv_inference_request_failure", reason="BACKEND") == 1
        # Halves of 32 until the bad one stands alone.
        assert grown("tidegate_batch_bisections_total") == 5


def test_a_batch_of_bad_rows_only_fails_each_with_its_own_reason(served: Served) -> None:
    outcomes = send(served.stub(), "table", [[1000 + number] for number in range(32)])
    for number, (code, message) in enumerate(outcomes):
        assert code is Code.INTERNAL
        assert f"idx={1000 + number} " in message, "nobody is told of another's row"
        assert_discloses_nothing(message, *(f"idx={1000 + other} " for other in range(32) if other != number))


def test_requests_of_several_rows_fail_as_a_whole(served: Served) -> None:
    rows = [[number % 10] * 4 for number in range(8)]
    rows[5][2] = -11
    outcomes = send(served.stub(), "table", rows)
    assert [code for code, _ in outcomes] == [Code.INTERNAL if number == 5 else Code.OK for number in range(8)]
    assert all(
        answer == [row[0] * 100] * 4 for (code, answer), row in zip(outcomes, rows, strict=True) if code is Code.OK
    )


def test_any_mixture_of_good_and_bad_is_told_apart(served: Served) -> None:
    source, stub = random.Random(7), served.stub()
    for share in (0.02, 0.2, 0.7):
        rows = [
            [source.randrange(10, 1000) if source.random() < share else source.randrange(10) for _ in range(n_rows)]
            for n_rows in (source.randrange(1, 5) for _ in range(300))
        ]
        for row, (code, answer) in zip(rows, send(stub, "free", rows), strict=True):
            if max(row) < 10:
                assert (code, answer) == (Code.OK, [index * 100 for index in row])
            else:
                assert code is Code.INTERNAL
