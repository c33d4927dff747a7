"""The GPUs of this machine as the driver's management library (NVML) sees them. Without the library there are none."""

from __future__ import annotations

import ctypes
import logging
from typing import NamedTuple

_LOG = logging.getLogger(__name__)

_LIBRARY = "libnvidia-ml.so.1"
_UUID_BYTES = 96


class Gpu(NamedTuple):
    """One device. Sizes in bytes, power in watts, energy in joules since the driver was loaded. What the device does
    not tell is 0."""

    uuid: str
    utilization: float  # 0 to 1
    memory_total: int
    memory_used: int
    power_w: float
    power_limit_w: float
    energy_j: float


class _Utilization(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


class Gpus:
    """Reads the devices' state. Calls of it must not overlap with close(); any thread otherwise."""

    def __init__(self, library: str = _LIBRARY) -> None:
        """Opens the library. Without it, or without a driver, read() gives nothing."""
        self._devices: list[tuple[ctypes.c_void_p, str]] = []
        try:
            self._nvml = ctypes.CDLL(library)
        except OSError:
            return
        count = ctypes.c_uint(0)
        if self._nvml.nvmlInit_v2() != 0 or self._nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            _LOG.warning("NVML is here and cannot be used: /metrics will have no GPU gauges")
            return
        for index in range(count.value):
            device = ctypes.c_void_p()
            uuid = ctypes.create_string_buffer(_UUID_BYTES)
            if (
                self._nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0
                and self._nvml.nvmlDeviceGetUUID(device, uuid, ctypes.c_uint(_UUID_BYTES)) == 0
            ):
                self._devices.append((device, uuid.value.decode("ascii", "replace")))

    def read(self) -> list[Gpu]:
        """The state of each device now."""
        return [self._read(device, uuid) for device, uuid in self._devices]

    def _read(self, device: ctypes.c_void_p, uuid: str) -> Gpu:
        utilization, memory = _Utilization(), _Memory()
        power_mw, limit_mw, energy_mj = ctypes.c_uint(0), ctypes.c_uint(0), ctypes.c_ulonglong(0)
        # A call that the device does not support leaves the zeros.
        self._nvml.nvmlDeviceGetUtilizationRates(device, ctypes.byref(utilization))
        self._nvml.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory))
        self._nvml.nvmlDeviceGetPowerUsage(device, ctypes.byref(power_mw))
        self._nvml.nvmlDeviceGetEnforcedPowerLimit(device, ctypes.byref(limit_mw))
        self._nvml.nvmlDeviceGetTotalEnergyConsumption(device, ctypes.byref(energy_mj))
        return Gpu(
            uuid,
            utilization.gpu / 100,
            memory.total,
            memory.used,
            power_mw.value / 1000,
            limit_mw.value / 1000,
            energy_mj.value / 1000,
        )
