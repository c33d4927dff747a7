"""The numbers of /proc, read from files as the kernel writes them, and from this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from server import host
from server.gpus import Gpus


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    (tmp_path / "stat").write_text("cpu  100 5 50 800 40 3 2 0 7 0\ncpu0 1 2 3 4\nbtime 1700000000\n")
    (tmp_path / "meminfo").write_text(
        "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\nHugePages_Total:       0\n"
    )
    own = tmp_path / "self"
    (own / "fd").mkdir(parents=True)
    for number in range(5):
        (own / "fd" / str(number)).write_text("")
    fields = ["S"] + ["0"] * 40
    fields[11], fields[12], fields[17], fields[19], fields[20], fields[21] = "250", "50", "9", "1000", "8192", "2"
    (own / "stat").write_text("42 (a name) 7 0 with) " + " ".join(fields))
    (own / "limits").write_text(
        "Limit                     Soft Limit           Hard Limit           Units\n"
        "Max open files            1024                 20000                files\n"
    )
    return tmp_path


def test_cpu_times(proc: Path) -> None:
    assert host.cpu_times(proc) == host.CpuTimes(busy=160, total=1000)


def test_memory(proc: Path) -> None:
    assert host.memory(proc) == host.Memory(1000 * 1024, 400 * 1024)


def test_memory_of_a_kernel_that_does_not_say_what_is_available(proc: Path) -> None:
    (proc / "meminfo").write_text("MemTotal: 1000 kB\nMemFree: 100 kB\n")
    assert host.memory(proc) == host.Memory(1000 * 1024, 900 * 1024)


def test_process(proc: Path) -> None:
    ticks = os.sysconf("SC_CLK_TCK")
    found = host.process(proc)
    # The name holds a parenthesis and what looks like fields: what counts begins after the last one.
    assert found._replace(cpu_s=0, started_s=0) == host.Process(0, 2 * os.sysconf("SC_PAGE_SIZE"), 8192, 0, 9, 5, 1024)
    assert found.cpu_s == 300 / ticks
    assert found.started_s == 1_700_000_000 + 1000 / ticks


def test_an_unlimited_number_of_files_is_zero(proc: Path) -> None:
    (proc / "self" / "limits").write_text("Max open files            unlimited            unlimited            files\n")
    assert host.process(proc).most_files == 0


def test_this_machine() -> None:
    assert 0 < host.cpu_times().busy < host.cpu_times().total
    memory = host.memory()
    assert 0 < memory.used < memory.total
    process = host.process()
    assert process.resident < process.virtual
    assert 0 < process.started_s <= time.time()
    assert process.threads >= 1


def test_without_the_management_library_there_are_no_gpus() -> None:
    assert Gpus("libno-such-library.so.1").read() == []
