"""vLLM's KV memory as the transfer takes it, with a probe region beside it; and when a step has ended on its device."""

from __future__ import annotations

import ctypes
import logging
import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pd_serve.errors import ConfigError, PDServeError
from pd_serve.memory.cuda_driver import CudaDriver, reason
from pd_serve.memory.cumem import CumemAllocator
from pd_serve.memory.driver import DriverError, HandleType, MemoryKind
from pd_serve.memory.host_buffers import HostBuffers
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region, Segment
from pd_serve.memory.torch_pool import TorchPools
from pd_serve.memory.usage import KV_CACHE

log = logging.getLogger(__name__)

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
    """See :class:`Memory`. On a GPU: torch's memory, which peers open by cudaIpc, or memory of virtual memory calls
    (vLLM's cumem allocator, or ours: :func:`supplied`), which they open by its handles.
    """

    def __init__(self, regions: tuple[Region, ...], device: int) -> None:
        import torch

        self._torch = torch
        # Steps that were launched, counted by the device, and its count where it can be read without asking the driver:
        # that waits while another thread launches into a full queue, for as long as the step before still takes.
        self._launched = 0
        self._count = torch.zeros(1, dtype=torch.int64, device=f"cuda:{device}")
        self._counted = torch.zeros(1, dtype=torch.int64, pin_memory=True)
        self.step_ended()  # its kernel is loaded now: that waits for the device
        self._probe: torch.Tensor | None = None
        segments = _segments(regions)
        if segments:
            start, probe = _mapped_probe(device, segments[0].handle_type)
            segments.append(probe)
        else:
            self._probe = torch.zeros(PROBE_BYTES + PAGE_BYTES, dtype=torch.uint8, device=f"cuda:{device}")
            start = -(-self._probe.data_ptr() // PAGE_BYTES) * PAGE_BYTES
        self.memory = PoolMemory(device, (*regions, Region(start, PROBE_BLOCK_BYTES, PROBE_BLOCKS)), tuple(segments))

    def step_ended(self) -> Callable[[], bool] | None:
        self._launched = step = self._launched + 1
        with self._torch.inference_mode():  # as vLLM's steps
            self._count.add_(1)
            self._counted.copy_(self._count, non_blocking=True)
        counted = self._counted.numpy()
        return lambda: int(counted[0]) >= step


def _segments(regions: tuple[Region, ...]) -> list[Segment]:
    """What the regions are mapped from; nothing where it is plain memory, or nobody here can ask."""
    try:
        found = _mapped_under(CudaDriver(), regions)
    except DriverError as error:
        log.warning("GPU memory cannot be looked at, and is taken for torch's own: %s", reason(error))
        return []
    if any(segment.handle_type is HandleType.NONE for segment in found):
        log.warning("vLLM's allocator makes memory that no other process can open: nvlink is left out")
    return found


def _mapped_under(driver: CudaDriver, regions: tuple[Region, ...]) -> list[Segment]:
    """Raises DriverError."""
    found: dict[int, Segment] = {}
    for at, size_bytes in (place for region in regions for place in region.ranges):
        end = at + size_bytes
        while at < end:
            mapping = driver.mapping_of(at)
            if mapping is None:
                return []
            at = mapping.address + mapping.size_bytes
            if mapping.address not in found:
                found[mapping.address] = Segment(
                    mapping.address, mapping.size_bytes, mapping.handle, mapping.handle_type
                )
    return list(found.values())


def _mapped_probe(device: int, handle_type: HandleType) -> tuple[int, Segment]:
    """A probe region of the same kind of memory: where it begins, and what is behind it. For the process's life."""
    driver = CudaDriver()
    kind = MemoryKind(device, handle_type, driver.rdma_supported(device))
    granularity = driver.granularity(kind)
    size = -(-PROBE_BYTES // granularity) * granularity
    handle, address = driver.create(size, kind), driver.reserve(size, granularity)
    driver.map(address, size, handle, device)
    return address, Segment(address, size, handle, handle_type)


def supplied(device: int) -> AbstractContextManager[None] | None:
    """What vLLM's KV cache is to be allocated in: memory of our cumem allocator. None where there is none."""
    try:
        allocator = CumemAllocator(CudaDriver(), device, HostBuffers())
        log.info("vLLM's KV cache is memory of pd-serve's allocator (handles: %s)", allocator.kind.handle_type)
        return TorchPools(allocator).use_memory_pool(KV_CACHE)
    except PDServeError as error:
        log.warning("vLLM's own memory is used for its KV cache: %s", error)
        return None


def device_memory(regions: tuple[Region, ...], device: Any) -> Memory:
    """``device``: torch's. Raises ConfigError for kinds that the transfer cannot read."""
    if device.type == "cpu":
        return HostMemory(regions)
    if device.type == "cuda":
        return DeviceMemory(regions, device.index or 0)
    raise ConfigError(f"pd-serve's transfer knows host memory and NVIDIA GPUs, not {device.type}")
