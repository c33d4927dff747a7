"""The story of `tidegate demo`, in the order it is told.

1. A real `tidegate serve` starts on a fresh repository that holds version 1 of a digit classifier.
2. Every held-out image is classified through tritonclient; accuracy and each single prediction are compared with
   what was recorded when the model was made.
3. Several clients load the server: throughput and latency.
4. Version 2 is copied in and loaded while the load goes on. No request may fail, and each must get the answer that
   the version named in it gives.
5. The held-out images again, on version 2; then the server is asked to stop.

The exit code is 0 only if every figure is as it should be (report.py).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tritonclient.grpc as triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from server.demo.exposition import samples_of
from server.demo.load import MODEL, BackgroundLoad, Digits, Outcome, Sample, classify, latency_ms
from server.demo.process import ServeFailed, ServeProcess
from server.demo.report import Classified, Loaded, Story, Swapped, as_document, checks, tables

DATA = Path(__file__).parent / "data"
CLIENTS = 8
LOAD_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Pace:
    """How long each part of the story lasts, in seconds."""

    warm_up: float = 1.0
    load: float = 6.0
    before_swap: float = 4.0
    after_swap: float = 5.0


QUICK = Pace(warm_up=0.2, load=1.0, before_swap=0.7, after_swap=0.8)


class _Teller:
    """Says what happens: bars on a terminal, one line per step elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    @contextmanager
    def step(self, text: str, total: float, unit: str) -> Iterator[Callable[[float], None]]:
        """Shows a step of `total` units; gives a function that moves its bar on."""
        if not self.console.is_terminal:
            self.say(f"{text} ...")
            yield lambda _done: None
            return
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn(unit))
        with Progress(*columns, TimeElapsedColumn(), console=self.console) as progress:
            task = progress.add_task(text, total=total)
            yield lambda done: progress.advance(task, done)

    def wait(self, text: str, seconds: float) -> None:
        """Lets time pass while a load runs; the bar shows how much."""
        with self.step(text, round(seconds * 10), "tenths of a second") as advance:
            began = time.perf_counter()
            for tenth in range(round(seconds * 10)):
                time.sleep(max(0.0, began + (tenth + 1) / 10 - time.perf_counter()))
                advance(1)


def put_version(repository: Path, version: str) -> None:
    """Copies a version's file into the repository; it appears complete or not at all."""
    target = repository / MODEL / version
    staging = repository.parent / f"incoming-{version}"
    staging.mkdir()
    shutil.copyfile(DATA / f"digits_v{version}.onnx", staging / "model.onnx")
    target.parent.mkdir(exist_ok=True)
    os.rename(staging, target)


def _classified(outcome: Outcome, digits: Digits, version: str) -> Classified:
    return Classified(
        version=version,
        images=len(digits.labels),
        sent=outcome.sent,
        answered=len({sample.image for sample in outcome.samples}),
        own=sum(sample.own and sample.version == version for sample in outcome.samples),
        failed=outcome.failed,
        correct=sum(sample.label == int(digits.labels[sample.image]) for sample in outcome.samples),
        expected_correct=int((digits.expected[version] == digits.labels).sum()),
        served_by=tuple(sorted({sample.version for sample in outcome.samples})),
    )


def _swapped(outcome: Outcome, began: float, ended: float, ready: tuple[str, ...]) -> Swapped:
    before = [sample for sample in outcome.samples if sample.ended_s < began]
    after = [sample for sample in outcome.samples if sample.began_s > ended]
    during = [sample for sample in outcome.samples if sample.ended_s >= began and sample.began_s <= ended]

    def versions(samples: Sequence[Sample]) -> dict[str, int]:
        return dict(sorted(Counter(sample.version for sample in samples).items()))

    return Swapped(
        sent=outcome.sent,
        answered=len(outcome.samples),
        own=sum(sample.own for sample in outcome.samples),
        failed=outcome.failed,
        load_s=round(ended - began, 4),
        versions_before=versions(before),
        versions_during=versions(during),
        versions_after=versions(after),
        latency_before_ms=latency_ms(before),
        latency_during_ms=latency_ms(during),
        latency_after_ms=latency_ms(after),
        ready_at_the_end=ready,
    )


def _ready_versions(client: Any) -> tuple[str, ...]:
    index = client.get_model_repository_index()
    return tuple(sorted(model.version for model in index.models if model.name == MODEL and model.state == "READY"))


def _success(server: ServeProcess, version: str) -> int:
    return int(samples_of(server.metrics_text()).total("nv_inference_request_success", model=MODEL, version=version))


def tell(pace: Pace, console: Console, folder: Path) -> Story:
    """Runs the whole story in `folder`. Raises ServeFailed when there is no server, OSError when it cannot be read."""
    teller = _Teller(console)
    digits = Digits.read(DATA / "digits.npz")
    repository = folder / "models"
    repository.mkdir()
    put_version(repository, "1")
    flags = ["--model-control-mode", "explicit", "--load-model", MODEL]
    with ServeProcess(repository, folder / "server.log", flags=flags) as server:
        teller.say(
            f"[bold]tidegate serve[/] is ready after {server.started_in_s:.1f} s: gRPC {server.grpc_address}, "
            f"metrics http://127.0.0.1:{server.metrics_port}/metrics, process {server.pid}"
        )
        client = triton.InferenceServerClient(server.grpc_address)
        errors: list[str] = []

        def all_images(version: str) -> tuple[Classified, Outcome]:
            what = f"Classifying {len(digits.labels)} held-out images with version {version}"
            with teller.step(what, len(digits.labels), "images") as advance:
                outcome = classify(server.grpc_address, digits, CLIENTS, f"classify-{version}", advance)
            errors.extend(outcome.errors)
            part = _classified(outcome, digits, version)
            teller.say(f"  accuracy {100 * part.correct / part.images:.2f} %, {part.own} predictions as recorded")
            return part, outcome

        def load(name: str, most_s: float) -> BackgroundLoad:
            return BackgroundLoad(server.grpc_address, digits, CLIENTS, name, most_s)

        first, _ = all_images("1")

        warm_up = load("warm-up", pace.warm_up)
        time.sleep(pace.warm_up)
        errors += warm_up.finish().errors
        counted = _success(server, "1")
        began = time.perf_counter()
        running = load("load", pace.load + 30)
        teller.wait(f"Load on version 1 by {CLIENTS} clients", pace.load)
        outcome = running.finish()
        seconds = time.perf_counter() - began
        loaded = Loaded(
            clients=CLIENTS,
            seconds=round(seconds, 3),
            sent=outcome.sent,
            answered=len(outcome.samples),
            own=sum(sample.own for sample in outcome.samples),
            failed=outcome.failed,
            per_s=round(len(outcome.samples) / seconds, 1),
            latency_ms=latency_ms(outcome.samples),
            server_counted=_success(server, "1") - counted,
        )
        errors += outcome.errors
        teller.say(
            f"  {loaded.per_s:,.0f} requests/s, p50 {loaded.latency_ms['p50']:.2f} ms, "
            f"p99 {loaded.latency_ms['p99']:.2f} ms (the Python clients are the limit, not the server)"
        )

        running = load("swap", pace.before_swap + pace.after_swap + LOAD_TIMEOUT_S)
        try:
            teller.wait("Load goes on", pace.before_swap)
            swap_began = time.perf_counter()
            put_version(repository, "2")
            client.load_model(MODEL, client_timeout=LOAD_TIMEOUT_S)
            swap_ended = time.perf_counter()
            teller.say(
                f"  version 2 copied in, loaded, warmed up and routed in {1e3 * (swap_ended - swap_began):.0f} ms"
            )
            teller.wait("Load goes on with version 2", pace.after_swap)
        finally:
            outcome = running.finish()
        errors += outcome.errors
        swapped = _swapped(outcome, swap_began, swap_ended, _ready_versions(client))
        teller.say(
            f"  {swapped.failed} of {swapped.sent:,} requests failed; answers by version: {_by_version(outcome)}"
        )

        second, again = all_images("2")
        metrics = samples_of(server.metrics_text())
        client.close()
        exit_status = server.stop()
        teller.say(f"SIGTERM: the server drained and ended with status {exit_status}")

    def from_metrics(name: str) -> float:
        return metrics.total(name, model=MODEL, version="2")

    return Story(
        server_started_s=round(server.started_in_s, 3),
        classified=(first, second),
        loaded=loaded,
        swapped=swapped,
        server_counted_version_2=int(from_metrics("nv_inference_request_success")),
        answered_by_version_2=sum(sample.version == "2" for part in (outcome, again) for sample in part.samples),
        rows_per_batch=round(from_metrics("nv_inference_count") / max(1.0, from_metrics("nv_inference_exec_count")), 2),
        exit_status=exit_status,
        errors=tuple(errors[:5]),
    )


def _by_version(outcome: Outcome) -> str:
    counts = Counter(sample.version for sample in outcome.samples)
    return ", ".join(f"{version}: {count:,}" for version, count in sorted(counts.items()))


def _next_steps() -> str:
    model = DATA / "digits_v1.onnx"
    return (
        "\nWhere to look next:\n"
        f"  mkdir -p models/digits/1 && cp {model} models/digits/1/model.onnx\n"
        "  tidegate serve --model-repository models --model-control-mode poll --repository-poll-secs 1\n"
        "  gRPC for any KServe v2 client on 127.0.0.1:8001, Prometheus metrics on http://127.0.0.1:8002/metrics\n"
        "  Copy a folder models/digits/2 in and watch it being served; `make bench` measures the server itself.\n"
    )


def run(*, json_output: bool = False, quick: bool = False) -> int:
    """Runs the demo and returns its exit code: 0 when every check holds, 1 when one does not or no server starts.

    With `json_output` stdout gets one JSON document, and what people read goes to stderr. `quick` shortens the loads.
    """
    console = Console(stderr=json_output)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160  # a log has no width; folded tables are hard to read
    with tempfile.TemporaryDirectory(prefix="tidegate-demo-") as name:
        folder = Path(name)
        try:
            story = tell(QUICK if quick else Pace(), console, folder)
        except KeyboardInterrupt:
            console.print("interrupted")
            return 130
        except ServeFailed as why:
            return _failed(console, folder, str(why), json_output)
        except (OSError, triton.InferenceServerException) as why:
            return _failed(console, folder, f"{type(why).__name__}: {why}", json_output)
        document = as_document(story)
        for table in tables(story):
            console.print(table)
        if json_output:
            json.dump(document, sys.stdout)
            sys.stdout.write("\n")
        if not document["ok"]:
            for error in story.errors:
                console.print(f"a failed request: {error}", markup=False)
            _show_log(console, folder)
            console.print(f"[bold red]{sum(not check.ok for check in checks(story))} checks failed[/]")
            return 1
    console.print(_next_steps(), highlight=False, soft_wrap=True)
    return 0


def _failed(console: Console, folder: Path, why: str, json_output: bool) -> int:
    _show_log(console, folder)
    console.print(f"the demo could not be told to its end: {why}", markup=False)
    if json_output:
        json.dump({"ok": False, "error": why}, sys.stdout)
        sys.stdout.write("\n")
    return 1


def _show_log(console: Console, folder: Path) -> None:
    log = folder / "server.log"
    if not log.exists():
        return
    kept = Path(tempfile.mkdtemp(prefix="tidegate-demo-log-")) / "server.log"
    shutil.copyfile(log, kept)
    console.print(f"the end of the server's log (all of it: {kept}):", markup=False, soft_wrap=True)
    for line in log.read_text(errors="replace").splitlines()[-30:]:
        console.print(line, markup=False, highlight=False, soft_wrap=True)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of `tidegate demo`; their names are the parameters of run()."""
    parser.add_argument("--json", dest="json_output", action="store_true", help="one JSON document on stdout")
    parser.add_argument("--quick", action="store_true", help="short loads: some 8 s instead of 25 s")


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m server.demo.main`."""
    parser = argparse.ArgumentParser(prog="tidegate demo", description=__doc__.splitlines()[0] if __doc__ else None)
    add_arguments(parser)
    return run(**vars(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
