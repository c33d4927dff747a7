"""What disturbs a server while something else is measured; a process of its own, so that it can be held off the scale.

    python -m loadtests.disturber look --grpc-port P --metrics-port P [--per-second 20]
    python -m loadtests.disturber load --grpc-port P --model NAME

`look` scrapes /metrics and calls RepositoryIndex, each so many times a second; `load` loads a model again as soon as it
is loaded. Prints {"event": "started"} when it has done so once, and at SIGTERM what it has done:
{"done": ..., "slowest_ms": ..., "seconds": ...}.
"""

from __future__ import annotations

import argparse
import json
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence

import tritonclient.grpc as triton

# A disturber is ended by who started it; this bound is for when that one has died.
MOST_SECONDS = 600.0


def repeat(step: Callable[[], None], per_second: float | None, stop: threading.Event) -> dict[str, float]:
    """Does `step` until `stop`, at a rate or one after the other, and counts. A step that is late makes none up."""
    began, done, slowest_s = time.monotonic(), 0, 0.0
    due = began
    while not stop.is_set() and (at := time.monotonic()) - began < MOST_SECONDS:
        step()
        took = time.monotonic() - at
        done, slowest_s = done + 1, max(slowest_s, took)
        if per_second is not None:
            due = max(due + 1.0 / per_second, time.monotonic())
            stop.wait(due - time.monotonic())
    return {
        "done": done,
        "slowest_ms": round(1e3 * slowest_s, 2),
        "seconds": round(time.monotonic() - began, 3),
    }


def _look(client: triton.InferenceServerClient, metrics_port: int) -> None:
    with urllib.request.urlopen(f"http://127.0.0.1:{metrics_port}/metrics", timeout=30) as answer:
        answer.read()
    client.get_model_repository_index(client_timeout=30)


def main(argv: Sequence[str] | None = None) -> None:
    """Disturbs until SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.disturber", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=["look", "load"])
    parser.add_argument("--grpc-port", type=int, required=True)
    parser.add_argument("--metrics-port", type=int)
    parser.add_argument("--model")
    parser.add_argument("--per-second", type=float, default=20.0)
    args = parser.parse_args(argv)
    if args.what == "look" and args.metrics_port is None:
        parser.error("look needs --metrics-port")
    if args.what == "load" and args.model is None:
        parser.error("load needs --model")
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    client = triton.InferenceServerClient(f"127.0.0.1:{args.grpc_port}")

    def look() -> None:
        _look(client, args.metrics_port)

    def load() -> None:
        client.load_model(args.model, client_timeout=120)

    step, per_second = (look, args.per_second) if args.what == "look" else (load, None)
    try:
        step()
        print(json.dumps({"event": "started"}), flush=True)
        print(json.dumps(repeat(step, per_second, stop)), flush=True)
    finally:
        client.close()


if __name__ == "__main__":
    main()
