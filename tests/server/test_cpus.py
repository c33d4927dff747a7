"""How many cores may be used, read from control groups as they are laid out on real machines."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from server.cpus import available_cores, cores, quota_cores


def groups(tmp_path: Path, memberships: str, files: dict[str, str]) -> tuple[Path, Path]:
    proc, mount = tmp_path / "cgroup-of-self", tmp_path / "cgroup"
    proc.write_text(memberships)
    for name, text in files.items():
        (mount / name).parent.mkdir(parents=True, exist_ok=True)
        (mount / name).write_text(text)
    return proc, mount


@pytest.mark.parametrize(
    ("memberships", "files", "quota"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, None),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/a/b\n", {"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2.0),
        ("0::/pod/container\n", {"cpu.max": "100000 100000"}, 1.0),  # a container that sees only its own group
        ("0::/\n1:name=systemd:/\n", {"unified/cpu.max": "50000 100000"}, 0.5),
        (
            "4:cpu,cpuacct:/x\n",
            {"cpu,cpuacct/x/cpu.cfs_quota_us": "300000", "cpu,cpuacct/x/cpu.cfs_period_us": "100000"},
            3.0,
        ),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "300000", "cpu/x/cpu.cfs_period_us": "100000"}, 3.0),
        ("4:cpu:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1", "cpu/x/cpu.cfs_period_us": "100000"}, None),
        ("3:memory:/x\n", {"memory/x/cpu.cfs_quota_us": "100000", "memory/x/cpu.cfs_period_us": "100000"}, None),
        ("nonsense\n", {"cpu.max": "100000 100000"}, None),
        ("0::/\n", {"cpu.max": "what is this"}, None),
        ("0::/\n", {"cpu.max": "100000 0"}, None),
        ("0::/\n", {}, None),
        ("", {}, None),
    ],
)  # fmt: skip
def test_the_tightest_quota_counts(
    tmp_path: Path, memberships: str, files: dict[str, str], quota: float | None
) -> None:
    assert quota_cores(*groups(tmp_path, memberships, files)) == quota


@pytest.mark.parametrize(
    ("affinity", "quota", "expected"),
    [(8, None, 8), (8, 2.0, 2), (8, 1.5, 2), (8, 0.1, 1), (2, 4.0, 2), (1, None, 1), (0, None, 1)],
)
def test_affinity_and_quota_together(affinity: int, quota: float | None, expected: int) -> None:
    assert cores(affinity, quota) == expected


def test_this_machine_has_a_core() -> None:
    assert 1 <= available_cores() <= len(os.sched_getaffinity(0))


def test_a_machine_without_control_groups_counts_by_affinity(tmp_path: Path) -> None:
    assert quota_cores(tmp_path / "no", tmp_path / "none") is None
    assert available_cores(tmp_path / "no", tmp_path / "none") == len(os.sched_getaffinity(0))
