"""What both processes are made of: a pool, its bytes as tensors, and a transport registered with it.

The source and the reader process make an :class:`End` each, and use it on their main thread alone.
"""

from __future__ import annotations

import ctypes
import os
import uuid
from typing import Any

import torch
from torch import Tensor

from pd_serve.bench.transfer.job import LIMIT
from pd_serve.bench.transfer.raw import RawNixl
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.pool import HostPool
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.base import Transport
from pd_serve.transfer.choice import lanes_for


class End:
    """Raises PDServeError where memory or transport cannot be had."""

    def __init__(
        self, lane: str, device: int | None, cumem: bool, layout: KVLayout, num_blocks: tuple[int, ...], role: str
    ) -> None:
        self.layout = layout
        self.memory, self._pool = allocate(layout, num_blocks, device, cumem)
        self.transport: Transport
        if lane == LIMIT:
            self.transport = RawNixl(device)
            self.transport.register(self.memory)
        else:
            # new at every start, as NIXL wants it
            name = f"bench-{role}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._lanes = lanes_for(lane, name, self.memory, reads_only=role == "reader")
            self._lanes.start()
            self.transport = self._lanes.transports[lane]

    def tensor(self, group: int) -> Tensor:
        """A group's bytes, or the probe region's (behind the last group)."""
        return as_tensor(self.memory.regions[group], self.memory.device)

    def close(self) -> None:
        if isinstance(self.transport, RawNixl):
            self.transport.close()
        else:
            self._lanes.close()


def allocate(
    layout: KVLayout, num_blocks: tuple[int, ...], device: int | None, cumem: bool
) -> tuple[PoolMemory, object]:
    """A pool as transports see it, and what keeps it alive."""
    if device is None:
        host = HostPool(layout, num_blocks)
        return host.memory(), host
    from pd_serve.memory.cuda_driver import CudaDriver
    from pd_serve.memory.cumem import CumemAllocator
    from pd_serve.memory.device_pool import DevicePool
    from pd_serve.memory.host_buffers import HostBuffers

    torch.cuda.set_device(device)
    torch.cuda.init()  # type: ignore[no-untyped-call]
    allocator = CumemAllocator(CudaDriver(), device, HostBuffers()) if cumem else None
    pool = DevicePool(layout, num_blocks, device, allocator)
    return pool.memory(), (pool, allocator)


def as_tensor(region: Region, device: int | None) -> Tensor:
    """uint8 ``[size_bytes]`` over the region's memory, which it does not keep alive."""
    if device is None:
        array: Any = (ctypes.c_uint8 * region.size_bytes).from_address(region.address)
        return torch.frombuffer(array, dtype=torch.uint8)
    from pd_serve.memory.device_pool import tensor_at

    return tensor_at(region.address, region.size_bytes, device)


def synchronize(device: int | None) -> None:
    """What torch did is there for streams that are not torch's."""
    if device is not None:
        torch.cuda.synchronize(device)
