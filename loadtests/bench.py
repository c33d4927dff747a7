"""`make bench`: runs scenarios and writes what they found to loadtests/results/.

    python -m loadtests.bench [--quick] [--scenario NAME ...] [--count N] [--plant-leak] [--results DIR]

The exit code is 0 when every scenario finished and met its goals, 1 when a goal was missed or a scenario failed.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any

from loadtests import machine, report
from loadtests.rig import CLIENT_CORE, SERVER_CORE, Bench, BenchError
from server.demo.process import ServeFailed

RESULTS = Path(__file__).parent / "results"
# The long one comes last.
SCENARIOS = ("wire", "payload", "compute", "overload", "disturb", "identity_ids", "perf_analyzer", "reload")


def scenario(name: str) -> ModuleType:
    """A module of loadtests.scenarios: QUESTION, and run(Bench) -> Result."""
    return importlib.import_module(f"loadtests.scenarios.{name}")


def run_scenario(name: str, *, quick: bool, options: dict[str, Any], when: str) -> dict[str, Any]:
    """Runs one scenario in a folder of its own and returns its document; a failure is a document with `error`."""
    module = scenario(name)
    shown = {"quick": quick, **{key: value for key, value in options.items() if value is not None}}
    origin = report.Origin(name, module.QUESTION, when, machine.describe(), shown)
    began, others = time.monotonic(), machine.Others()
    with tempfile.TemporaryDirectory(prefix=f"tidegate-bench-{name}-") as folder:
        bench = Bench(Path(folder), quick, options)
        try:
            document = report.document(origin, module.run(bench))
        except ServeFailed as why:
            document = report.failure(origin, f"{why}\n{why.log_tail}")
        except BenchError as why:
            document = report.failure(origin, str(why))
        except Exception as why:  # one scenario's mistake must not cost the others their results
            document = report.failure(origin, f"{type(why).__name__}: {why}\n{traceback.format_exc()}")
    return {**document, "took_s": round(time.monotonic() - began, 1), "others_cpu_share": others.share()}


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs: they show that all works, not how fast")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="run these alone; repeatable")
    parser.add_argument("--count", type=int, help="reload: how many reloads; identity_ids: how many requests")
    parser.add_argument("--plant-leak", action="store_true", help="reload: leak a model a round; the check must fail")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    if args.count is not None and args.count < 1:
        parser.error("--count: 1 or more")
    if not {SERVER_CORE, CLIENT_CORE} <= machine.CORES:
        parser.error(f"cores {SERVER_CORE} (for the server) and {CLIENT_CORE} (for its clients) are needed")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for and prints the table."""
    args = _arguments(argv)
    # This process is a client as well: what it does between two looks must not be taken from the server's core.
    os.sched_setaffinity(0, {CLIENT_CORE})
    now = datetime.now(UTC)
    when, suffix = f"{now:%Y-%m-%d %H:%M} UTC", "-quick" if args.quick else ""
    options = {"count": args.count, "plant_leak": args.plant_leak or None}
    chosen = [name for name in SCENARIOS if name in (args.scenario or SCENARIOS)]
    documents = []
    for name in chosen:
        print(f"{name}: {scenario(name).QUESTION}", file=sys.stderr, flush=True)
        document = run_scenario(name, quick=args.quick, options=options, when=when)
        print(document.get("error") or f"took {document['took_s']:.0f} s", file=sys.stderr, flush=True)
        report.write(args.results, f"{now:%Y-%m-%d}-{name}{suffix}", document)
        documents.append(document)
    report.write_summary(args.results, f"{now:%Y-%m-%d}", suffix, SCENARIOS)
    print(report.markdown(documents))
    return 0 if all(document["ok"] for document in documents) else 1


if __name__ == "__main__":
    sys.exit(main())
