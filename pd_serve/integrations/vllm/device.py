"""vLLM's KV memory as the transfer takes it, with a probe region beside it; and when a step has ended on its device."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Callable
from typing import Any, Protocol

from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region

PROBE_BYTES = PROBE_BLOCK_BYTES * PROBE_BLOCKS
PAGE_BYTES = 4096


class Memory(Protocol):
    """Alive as long as the transfer."""

    memory: PoolMemory

    def step_ended(self) -> Callable[[], bool] | None:
        """Whether what was launched until now has ended, to be asked on any thread; None: it has."""


class HostMemory:
    """See :class:`Memory`."""

    def __init__(self, regions: tuple[Region, ...]) -> None:
        self._mapping = mmap.mmap(-1, PROBE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._probe = ctypes.c_char.from_buffer(self._mapping)
        probe = Region(ctypes.addressof(self._probe), PROBE_BLOCK_BYTES, PROBE_BLOCKS)
        self.memory = PoolMemory(None, (*regions, probe))

    def step_ended(self) -> Callable[[], bool] | None:
        return None


class DeviceMemory:
    """See :class:`Memory`. On a GPU."""

    def __init__(self, regions: tuple[Region, ...], device: int) -> None:
        import torch

        self._torch = torch
        self._probe = torch.zeros(PROBE_BYTES + PAGE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
        start = -(-self._probe.data_ptr() // PAGE_BYTES) * PAGE_BYTES
        self.memory = PoolMemory(device, (*regions, Region(start, PROBE_BLOCK_BYTES, PROBE_BLOCKS)))

    def step_ended(self) -> Callable[[], bool] | None:
        event = self._torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        return event.query


def device_memory(regions: tuple[Region, ...], device: Any) -> Memory:
    """``device``: torch's. Raises ConfigError for kinds that the transfer cannot read."""
    if device.type == "cpu":
        return HostMemory(regions)
    if device.type == "cuda":
        return DeviceMemory(regions, device.index or 0)
    from pd_serve.errors import ConfigError

    raise ConfigError(f"pd-serve's transfer knows host memory and NVIDIA GPUs, not {device.type}")
