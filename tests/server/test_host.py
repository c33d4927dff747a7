"""The numbers of /proc, read from files as the kernel writes them, and from this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest

from server import host
from server.gpus import Gpu, Gpus


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


class FakeNvml:
    """The management library with two devices, the second of which tells almost nothing."""

    NOT_SUPPORTED = 3

    def __init__(self, init: int = 0) -> None:
        self._init = init

    def nvmlInit_v2(self) -> int:
        return self._init

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: int, device: Any) -> int:
        device._obj.value = index + 1
        return 0

    def nvmlDeviceGetUUID(self, device: Any, uuid: Any, size: Any) -> int:
        uuid.value = f"GPU-{device.value}".encode()
        return 0

    def nvmlDeviceGetUtilizationRates(self, device: Any, rates: Any) -> int:
        if device.value == 2:
            return self.NOT_SUPPORTED
        rates._obj.gpu = 42
        return 0

    def nvmlDeviceGetMemoryInfo(self, device: Any, memory: Any) -> int:
        memory._obj.total, memory._obj.used = 80 << 30, device.value << 30
        return 0

    def _number(self, device: Any, number: Any, value: int) -> int:
        if device.value == 2:
            return self.NOT_SUPPORTED
        number._obj.value = value
        return 0

    def nvmlDeviceGetPowerUsage(self, device: Any, number: Any) -> int:
        return self._number(device, number, 250_500)

    def nvmlDeviceGetEnforcedPowerLimit(self, device: Any, number: Any) -> int:
        return self._number(device, number, 700_000)

    def nvmlDeviceGetTotalEnergyConsumption(self, device: Any, number: Any) -> int:
        return self._number(device, number, 5_000_000_000_123)


def test_gpus_are_read_in_the_units_of_their_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.gpus.ctypes.CDLL", lambda _name: FakeNvml())
    first, second = Gpus().read()
    assert first == Gpu("GPU-1", 0.42, 80 << 30, 1 << 30, 250.5, 700.0, 5_000_000_000.123)
    assert second == Gpu("GPU-2", 0.0, 80 << 30, 2 << 30, 0.0, 0.0, 0.0), "what it does not tell is 0"


def test_a_library_without_a_driver_is_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("server.gpus.ctypes.CDLL", lambda _name: FakeNvml(init=9))
    assert Gpus().read() == []
    assert "NVML is here and cannot be used" in caplog.text
