"""How much of a GPU's memory is used, and by whom: the readings of :class:`pd_serve.memory.ledger.Ledger`.

The CUDA driver says what is free, and opens a context to say it. NVML needs none, and where this process sees itself in
NVML's list (not in a container with process numbers of its own) it says what belongs to others.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
from typing import Any

from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.ledger import Reading

log = logging.getLogger(__name__)


class DeviceGauge:
    """Of one device; ``nvml``: the module pynvml, None: what is installed."""

    def __init__(self, driver: CudaDriver, device: int, nvml: Any = None) -> None:
        self._driver = driver
        self._device = device
        self._nvml, self._handle = _open(driver.device_facts(device).uuid, nvml)

    def before_context(self) -> Reading | None:
        """Before this process has used the device: all that is used is others'. None where NVML is not there."""
        if self._nvml is None:
            return None
        try:
            free = int(self._nvml.nvmlDeviceGetMemoryInfo(self._handle).free)
        except self._nvml.NVMLError as error:
            log.info("NVML does not say what is free: %s", error)
            return None
        total = self._driver.device_facts(self._device).total_bytes
        return Reading(free, total, total - free)

    def read(self) -> Reading:
        """Waits for the device's work. Raises DriverError."""
        self._driver.synchronize(self._device)
        free, total = self._driver.memory_info(self._device)
        own = self._own()
        return Reading(free, total, None if own is None else max(0, total - free - own))

    def close(self) -> None:
        if self._nvml is not None:
            nvml, self._nvml = self._nvml, None
            with contextlib.suppress(nvml.NVMLError):
                nvml.nvmlShutdown()

    def _own(self) -> int | None:
        if self._nvml is None:
            return None
        try:
            processes = self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle)
        except self._nvml.NVMLError:
            return None
        sizes = [process.usedGpuMemory for process in processes if process.pid == os.getpid()]
        return int(sizes[0]) if sizes and sizes[0] else None


def _open(uuid: str, nvml: Any) -> tuple[Any, Any]:
    """NVML and the device in it, or two Nones. ``uuid``: 32 hex digits; NVML counts devices differently from CUDA."""
    if nvml is None:
        try:
            nvml = importlib.import_module("pynvml")
        except ImportError:
            return None, None
    try:
        nvml.nvmlInit()
        parts = (uuid[:8], uuid[8:12], uuid[12:16], uuid[16:20], uuid[20:])
        return nvml, nvml.nvmlDeviceGetHandleByUUID(f"GPU-{'-'.join(parts)}")
    except nvml.NVMLError as error:
        log.info("NVML is not usable: %s", error)
        return None, None
