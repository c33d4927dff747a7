"""Where a result comes from: commit, machine, versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
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
