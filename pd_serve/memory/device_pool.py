"""The KV pool of a rank on a GPU: one allocation, zeroed, divided as on a host (:func:`pd_serve.memory.pool.extents`).

Allocated once at engine start. From the cumem allocator it is one handle that peers can map and NICs can register;
without that it is plain memory of torch's. Registered with the transport for as long as it is awake.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.cumem import CumemAllocator
from pd_serve.memory.pool import extents
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.memory.usage import KV_CACHE


class DevicePool:
    """``allocator``: of the same device; None: torch's own. Raises OutOfDeviceMemory, DriverError."""

    def __init__(
        self, layout: KVLayout, num_blocks: tuple[int, ...], device: int, allocator: CumemAllocator | None
    ) -> None:
        self.device = device
        self._extents, self.size_bytes = extents(layout, num_blocks)
        self._allocator = allocator
        if allocator is None:
            self._bytes = torch.zeros(self.size_bytes, dtype=torch.uint8, device=f"cuda:{device}")
        else:
            with allocator.tagged(KV_CACHE):
                address = allocator.malloc(self.size_bytes)
            self._bytes = tensor_at(address, self.size_bytes, device)
            self.clear()
        self._address = self._bytes.data_ptr()

    def clear(self) -> None:
        """Zeroes it: after waking it holds anything, and a NaN in a block that is only padding would spread."""
        self._bytes.zero_()
        torch.cuda.synchronize(self.device)

    def tensors(self) -> list[Tensor]:
        """A uint8 tensor a group, ``[num_blocks * block_bytes]``. They are valid again after sleep and waking."""
        return [self._bytes[e.offset : e.offset + e.size_bytes] for e in self._extents[:-1]]

    def memory(self) -> PoolMemory:
        """What the transport registers: ask anew after every sleep, whose handles are others."""
        regions = tuple(Region(self._address + e.offset, e.block_bytes, e.num_blocks) for e in self._extents)
        segments = () if self._allocator is None else (self._allocator.segment_of(self._address),)
        return PoolMemory(self.device, regions, segments)

    def close(self) -> None:
        """Frees it; its tensors must not be used any more."""
        del self._bytes
        if self._allocator is not None:
            self._allocator.free(self._address)


class _Bytes:
    """Device memory at an address, as torch takes it."""

    def __init__(self, address: int, size: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": (size,),
            "typestr": "|u1",
            "version": 3,
        }


def tensor_at(address: int, size: int, device: int) -> Tensor:
    """A uint8 tensor over memory of this device that it does not own."""
    return torch.as_tensor(_Bytes(address, size), device=f"cuda:{device}")
