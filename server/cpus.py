"""How many cores this process may really use: CPU affinity and the quota of its control groups, v1 and v2.

`os.cpu_count()` counts the machine; in a container with a quota of one core it would start one I/O thread per core of
the host, and they would throttle each other.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

PROC = Path("/proc/self/cgroup")
CGROUP = Path("/sys/fs/cgroup")


def available_cores(proc: Path = PROC, cgroup: Path = CGROUP) -> int:
    """Cores for this process, at least 1."""
    return cores(len(os.sched_getaffinity(0)), quota_cores(proc, cgroup))


def cores(affinity: int, quota: float | None) -> int:
    """The smaller of both. A quota of 1.5 counts as 2: two threads at 75 % beat one at 100 %."""
    allowed = affinity if quota is None else min(affinity, math.ceil(quota))
    return max(1, allowed)


def quota_cores(proc: Path = PROC, cgroup: Path = CGROUP) -> float | None:
    """The tightest CPU quota, in cores, of this process's control group and its ancestors. None: unlimited."""
    quotas = [quota for folder in _folders(proc, cgroup) if (quota := _quota(folder)) is not None]
    return min(quotas, default=None)


def _folders(proc: Path, cgroup: Path) -> Iterator[Path]:
    """Folders that may limit this process. Inside a container the path may not exist below the mount; its root does."""
    for line in _read(proc).splitlines():
        parts = line.split(":", 2)
        if len(parts) != 3:
            continue
        hierarchy, controllers, path = parts
        if hierarchy == "0" and not controllers:
            mount = cgroup / "unified" if (cgroup / "unified").is_dir() else cgroup
        elif "cpu" in controllers.split(","):
            mount = next((m for m in (cgroup / controllers, cgroup / "cpu") if m.is_dir()), cgroup)
        else:
            continue
        relative = PurePosixPath(path.lstrip("/"))
        yield from (mount / folder for folder in (relative, *relative.parents))


def _quota(folder: Path) -> float | None:
    v2 = _read(folder / "cpu.max").split()
    if len(v2) == 2:
        return _ratio(v2[0], v2[1])
    return _ratio(_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip())


def _ratio(quota: str, period: str) -> float | None:
    # "max" (v2) and -1 (v1) mean no limit.
    if not quota.isdigit() or not period.isdigit() or int(quota) == 0 or int(period) == 0:
        return None
    return int(quota) / int(period)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""  # Not there: this kind of control group is not in use, so it limits nothing.
