"""What the host and this process use: text of /proc in, numbers out. Nothing here blocks or keeps a thread."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

PROC = Path("/proc")

# Below this the difference of two readings is noise: the kernel counts in hundredths of a second.
_LEAST_WINDOW_S = 0.25

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


class CpuTimes(NamedTuple):
    """CPU time of all cores since boot, in ticks."""

    busy: int
    total: int


def cpu_times(proc: Path = PROC) -> CpuTimes:
    """The first line of /proc/stat: user nice system idle iowait irq softirq steal; guest time is inside user."""
    ticks = [int(word) for word in (proc / "stat").read_text().split("\n", 1)[0].split()[1:9]]
    idle = sum(ticks[3:5])
    return CpuTimes(sum(ticks) - idle, sum(ticks))


class CpuUsage:
    """How busy the host's cores were since somebody last asked. Any thread."""

    def __init__(self, read: Callable[[], CpuTimes] = cpu_times, clock: Callable[[], float] = time.monotonic) -> None:
        self._read = read
        self._clock = clock
        self._lock = threading.Lock()
        self._last = read()
        self._last_at = clock()
        self._value = 0.0

    def utilization(self) -> float:
        """From 0 to 1. Who asks again within a quarter of a second gets the same answer."""
        with self._lock:
            now = self._clock()
            if now - self._last_at >= _LEAST_WINDOW_S:
                times = self._read()
                total = times.total - self._last.total
                if total > 0:
                    self._value = min(1.0, max(0.0, (times.busy - self._last.busy) / total))
                self._last, self._last_at = times, now
            return self._value


class Memory(NamedTuple):
    """The host's memory, in bytes. What the kernel can give back at once does not count as used."""

    total: int
    used: int


def memory(proc: Path = PROC) -> Memory:
    """Reads /proc/meminfo."""
    kib = {}
    for line in (proc / "meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        kib[name] = int(rest.split()[0])
    total = kib["MemTotal"]
    return Memory(1024 * total, 1024 * (total - kib.get("MemAvailable", kib["MemFree"])))


class Process(NamedTuple):
    """This process. Times in seconds, sizes in bytes; `started_s` is wall-clock time."""

    cpu_s: float
    resident: int
    virtual: int
    started_s: float
    threads: int
    open_files: int
    most_files: int


def process(proc: Path = PROC) -> Process:
    """Reads /proc/self."""
    own = proc / "self"
    # The name in parentheses may hold blanks; what follows it begins with the state, field 3.
    fields = (own / "stat").read_text().rpartition(")")[2].split()
    booted = next(int(line.split()[1]) for line in (proc / "stat").read_text().splitlines() if line.startswith("btime"))
    limits = (own / "limits").read_text().splitlines()
    most_files = next(line.split()[3] for line in limits if line.startswith("Max open files"))
    return Process(
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        resident=int(fields[21]) * _PAGE_BYTES,
        virtual=int(fields[20]),
        started_s=booted + int(fields[19]) / _TICKS_PER_S,
        threads=int(fields[17]),
        open_files=len(os.listdir(own / "fd")),
        most_files=int(most_files) if most_files.isdigit() else 0,
    )
