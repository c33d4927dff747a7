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
from typing import Any

from loadtests import machine, report
from loadtests.rig import Bench, BenchError
from server.demo.process import ServeFailed

RESULTS = Path(__file__).parent / "results"
# In the order of the time they take.
SCENARIOS = ("wire", "payload", "compute", "overload", "disturb", "identity_ids", "perf_analyzer", "reload")


def run_scenario(name: str, *, quick: bool, options: dict[str, Any], when: str) -> dict[str, Any]:
    """Runs one scenario in a folder of its own and returns its document; a failure is a document with `error`."""
    module = importlib.import_module(f"loadtests.scenarios.{name}")
    described = machine.describe()
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix=f"tidegate-bench-{name}-") as folder:
        bench = Bench(Path(folder), quick, options)
        try:
            result = module.run(bench)
        except ServeFailed as why:
            return _failure(name, module.QUESTION, described, when, f"{why}\n{why.log_tail}")
        except (BenchError, OSError) as why:
            return _failure(name, module.QUESTION, described, when, f"{type(why).__name__}: {why}")
        except Exception:  # one scenario's mistake must not cost the others their results
            return _failure(name, module.QUESTION, described, when, traceback.format_exc())
    shown = {"quick": quick, **{key: value for key, value in options.items() if value is not None}}
    document = report.document(name, module.QUESTION, result, described, when, shown)
    return {**document, "took_s": round(time.monotonic() - began, 1)}


def _failure(name: str, question: str, described: dict[str, Any], when: str, error: str) -> dict[str, Any]:
    print(error, file=sys.stderr)
    return {
        "scenario": name,
        "question": question,
        "when": when,
        "ok": False,
        "error": error.strip().splitlines()[0],
        "machine": described,
        "goals": [],
        "figures": {},
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs what was asked for and prints the table."""
    parser = argparse.ArgumentParser(prog="python -m loadtests.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="short runs: they show that all works, not how fast")
    parser.add_argument("--scenario", action="append", choices=SCENARIOS, help="run these alone; repeatable")
    parser.add_argument("--count", type=int, help="reload: how many reloads; identity_ids: how many requests")
    parser.add_argument("--plant-leak", action="store_true", help="reload: keep a model each round; the check must fail")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results")
    args = parser.parse_args(argv)
    if len(os.sched_getaffinity(0)) < machine.CORES_NEEDED:
        parser.error("two cores are needed: one for the server, one for its clients")
    now = datetime.now(UTC)
    when = now.strftime("%Y-%m-%d %H:%M UTC")
    options = {"count": args.count, "plant_leak": args.plant_leak or None}
    documents = []
    for name in args.scenario or SCENARIOS:
        print(f"{name}: {importlib.import_module(f'loadtests.scenarios.{name}').QUESTION}", file=sys.stderr, flush=True)
        document = run_scenario(name, quick=args.quick, options=options, when=when)
        suffix = "-quick" if args.quick else ""
        report.write(args.results, f"{now:%Y-%m-%d}-{name}{suffix}", document)
        documents.append(document)
        print(report.markdown([document]).split("\n\n")[0], file=sys.stderr, flush=True)
    table = report.markdown(documents)
    print(table)
    (args.results / f"{now:%Y-%m-%d}-summary{'-quick' if args.quick else ''}.md").write_text(table)
    return 0 if all(document["ok"] for document in documents) else 1


if __name__ == "__main__":
    sys.exit(main())
