"""Where a result comes from: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGES = ("tidegate", "onnxruntime", "onnxruntime-gpu", "onnx", "numpy", "grpcio", "protobuf", "tritonclient")
# As this process found them: `bench` moves itself to the client's core afterwards.
CORES = frozenset(os.sched_getaffinity(0))


def _output(*command: str) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else ""


def _cpu_model() -> str:
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        match = None
    return match[1] if match else platform.processor()


def _tool_version(command: str) -> str:
    try:
        return _output(command, "--version").partition("\n")[0]
    except FileNotFoundError:
        return "not installed"


def _package_versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


class Others:
    """How much of these cores other people's processes used since this was made."""

    def __init__(self) -> None:
        self._at = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float]:
        # User, nice and system only: time in interrupts belongs to nobody, and much of it is our own traffic.
        ticks = sum(
            sum(map(int, line.split()[1:4]))
            for line in Path("/proc/stat").read_text().splitlines()
            if re.match(r"cpu\d", line) and int(line.split()[0][3:]) in CORES
        )
        return time.monotonic(), ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])

    def share(self) -> float:
        """From 0 to 1, to be asked once our own processes have ended: only then is their time known."""
        began, busy_before, own_before = self._at
        now, busy, own = self._now()
        others = busy - busy_before - (own - own_before)
        # Ticks are 10 ms: over less than that the share is not known and could be anything.
        return round(min(1.0, max(0.0, others) / (len(CORES) * max(1e-9, now - began))), 3)


def describe() -> dict[str, Any]:
    """Everything that a reader needs to place a result."""
    return {
        "commit": _output("git", "rev-parse", "--short=12", "HEAD") or "unknown",
        "uncommitted_changes": bool(_output("git", "status", "--porcelain")),
        "cpu": _cpu_model(),
        "cores": len(CORES),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "packages": _package_versions(),
        "h2load": _tool_version("h2load"),
        "nghttpd": _tool_version("nghttpd"),
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }
