"""Whether replacing a model for days leaves anything behind: 1,000 reloads of one model of some 90 MB.

Two files take turns in the version's folder, so that every reload loads other weights, and the answer shows which.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from loadtests import models, rig
from loadtests.report import Goal, Result
from loadtests.rig import Bench, BenchError
from server.demo.exposition import Scrape
from server.demo.process import ServeProcess

QUESTION = "Is memory flat, and every native object freed, over 1,000 reloads of a model of 90 MB?"
MODEL = "big"
BIASES = (0.25, 0.75)
RELOADS = 1_000
# A tenth in, what is made once and kept has been made.
SETTLED_SHARE = 0.1
MOST_GROWTH = 1.02
LIVE = "tidegate_live_objects"
REQUESTS_IN_USE = "tidegate_requests_live"
CHECK_EVERY = 25


def run(bench: Bench) -> Result:
    """Reloads and looks at memory and live objects; with --plant-leak a small model more stays loaded each round."""
    count = bench.options.get("count") or bench.count(RELOADS, 20)
    leaks = bool(bench.options.get("plant_leak"))
    repository, files = bench.folder / "models", []
    for bias in BIASES:
        files.append(bench.folder / f"big-{bias}.onnx")
        onnx.save(models.big(bias), files[-1])
    served = repository / MODEL / "1" / "model.onnx"
    served.parent.mkdir(parents=True)
    _replace(served, files[0])
    x = rig.random_rows(1, 16)
    expected = [rig.expected_answer(file, x) for file in files]
    flags = ("--model-control-mode", "explicit", "--load-model", MODEL)
    with rig.serve(repository, bench.folder / "serve.log", *flags) as server:
        rig.check_answer(server.grpc_address, MODEL, x, expected[0])
        before = _quiet(server)
        rss, took_s = [], []
        with rig.client_of(server.grpc_address) as client:
            for number in range(1, count + 1):
                turn = number % 2
                _replace(served, files[turn])
                began = time.monotonic()
                client.load_model(MODEL, client_timeout=120)
                took_s.append(time.monotonic() - began)
                if leaks:
                    _leak(client, repository, number)
                if number % CHECK_EVERY == 0 or number == count:
                    _check(server, x, expected, turn)
                rss.append(_rss_when_freed(server, before, number if leaks else 0))
                if number % max(1, count // 20) == 0:
                    bench.say(f"{number} reloads: {rss[-1] / 2**20:.1f} MiB, {np.median(took_s):.2f} s each")
        after = _quiet(server, before)
    return judge(rss, took_s, live_by_kind(before), live_by_kind(after), os.path.getsize(files[0]))


def _replace(target: Path, source: Path) -> None:
    """Puts a file in place at once, under another inode than the one before."""
    incoming = target.parent.parent / "incoming.onnx"
    os.link(source, incoming)
    incoming.replace(target)


def _leak(client: Any, repository: Path, number: int) -> None:
    name = f"leaked-{number}"
    models.put(repository, name, models.stack(1, seed=number))
    client.load_model(name, client_timeout=60)


def _check(server: ServeProcess, x: npt.NDArray[Any], expected: Sequence[npt.NDArray[Any]], turn: int) -> None:
    rig.check_answer(server.grpc_address, MODEL, x, expected[turn])
    if np.abs(expected[0] - expected[1]).max() <= 1e-3 * np.abs(expected[0]).max():
        raise BenchError("the two files answer alike: the check shows nothing")


def live_by_kind(found: Scrape) -> dict[str, int]:
    """Live native objects by kind. Raises BenchError when the server does not tell.

    Requests are kept for the next ones, so what counts is how many of them are in use.
    """
    series = found.matching(LIVE)
    if not series:
        raise BenchError(f"/metrics has no {LIVE}")
    by_kind = {one.labels["kind"]: int(one.value) for one in series}
    return {**by_kind, "request": int(rig.needed(found, REQUESTS_IN_USE))}


def _quiet(server: ServeProcess, wanted: Scrape | None = None, timeout_s: float = 10.0) -> Scrape:
    """A reading once the live objects are as in `wanted`, without one once they are alike twice in a row.

    What was replaced is freed in the background; what is still there at the timeout is left over.
    """
    until = time.monotonic() + timeout_s
    last = live_by_kind(wanted) if wanted is not None else {}
    now = rig.scrape(server)
    while live_by_kind(now) != last and time.monotonic() < until:
        if wanted is None:
            last = live_by_kind(now)
        time.sleep(0.2)
        now = rig.scrape(server)
    return now


def _rss_when_freed(server: ServeProcess, before: Scrape, planted: int, timeout_s: float = 20.0) -> int:
    """Resident bytes once the replaced version is gone: two models are there for a moment, which is no growth."""
    until = time.monotonic() + timeout_s
    wanted = live_by_kind(before)["session"] + planted
    while live_by_kind(rig.scrape(server))["session"] > wanted and time.monotonic() < until:
        time.sleep(0.01)
    return server.rss_bytes()


def judge(
    rss: Sequence[int], took_s: Sequence[float], before: Mapping[str, int], after: Mapping[str, int], file_bytes: int
) -> Result:
    """The goals: memory as after the first tenth, and no object that was not there at the start."""
    settled_at = max(1, round(SETTLED_SHARE * len(rss)))
    # The largest of a few readings: one alone may fall on a moment when pages have just been given back.
    early, late = max(rss[max(0, settled_at - 5) : settled_at + 5]), max(rss[-10:])
    left_over = {kind: after.get(kind, 0) - before.get(kind, 0) for kind in sorted({*before, *after})}
    goals = [
        Goal(
            f"memory after {len(rss)} reloads / after {settled_at}",
            round(late / early, 4),
            "<=",
            MOST_GROWTH,
            note=f"{late / 2**20:.1f} of {early / 2**20:.1f} MiB",
        )
    ]
    goals += [Goal(f"live native objects left over: {kind}", count, "==", 0) for kind, count in left_over.items()]
    figures = {
        "reloads": len(rss),
        "file_mb": round(file_bytes / 1e6, 1),
        "rss_mib": {
            "first": _mib(rss[0]),
            f"after_{settled_at}": _mib(early),
            "last": _mib(late),
            "most": _mib(max(rss)),
        },
        "reload_s": {"median": round(float(np.median(took_s)), 3), "most": round(max(took_s), 3)},
        "live_before": dict(before),
        "live_after": dict(after),
    }
    return Result(goals, figures, {"rss_mib": [_mib(one) for one in rss]})


def _mib(size: int) -> float:
    return round(size / 2**20, 2)
