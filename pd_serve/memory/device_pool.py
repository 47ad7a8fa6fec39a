"""The KV pool of a rank on a GPU: zeroed, divided as on a host (:func:`pd_serve.memory.pool.extents`).

From the cumem allocator it is one handle that peers can map and NICs can register; without that it is plain memory of
torch's. Its addresses never change. A pool that is to be resized reserves addresses for the most blocks it may have,
for each group of layers a range and a handle of its own, so that no group moves when another grows: CUDA graphs that
were captured over a small pool replay over the final one. Registered with the transport, in its final size, for as
long as it is awake.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.cumem import CumemAllocator
from pd_serve.memory.pool import Extent, extents
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.memory.usage import KV_CACHE


@dataclass(frozen=True)
class _Part:
    """One allocation: where in it which regions lie, in the order of the pool's."""

    extents: tuple[Extent, ...]
    size_bytes: int


class DevicePool:
    """``allocator``: of the same device; None: torch's own. Raises OutOfDeviceMemory, DriverError.

    ``max_blocks``: the most that :meth:`resize` may be asked for, of each group; None: it is never called.
    """

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: tuple[int, ...],
        device: int,
        allocator: CumemAllocator | None,
        *,
        max_blocks: tuple[int, ...] | None = None,
    ) -> None:
        if max_blocks is not None and allocator is None:
            raise ValueError("a pool of torch's memory cannot be resized")
        self.device = device
        self._layout = layout
        self._allocator = allocator
        self._max_blocks = max_blocks
        self._parts = self._divide(num_blocks)
        self._most = self._parts if max_blocks is None else self._divide(max_blocks)
        self._addresses: list[int] = []
        self._bytes: list[Tensor] = []
        try:
            if allocator is None:
                self._bytes = [
                    torch.zeros(p.size_bytes, dtype=torch.uint8, device=f"cuda:{device}") for p in self._parts
                ]
                self._addresses = [part.data_ptr() for part in self._bytes]
            else:
                with allocator.tagged(KV_CACHE):
                    for part, most in zip(self._parts, self._most, strict=True):
                        self._addresses.append(allocator.malloc(part.size_bytes, reserve=most.size_bytes))
                self._look()
                self.clear()
        except BaseException:
            self.close()
            raise

    @property
    def size_bytes(self) -> int:
        return sum(part.size_bytes for part in self._parts)

    def resize(self, num_blocks: tuple[int, ...]) -> None:
        """Gives each group this many blocks, all zero, at the addresses where its first ones are.

        Nothing may run on the pool, and no peer or NIC may know it. Raises what :meth:`CumemAllocator.resize` does:
        then the pool has its old size, and anything in its blocks until :meth:`clear`. Views of before stay valid
        for the blocks that there are.
        """
        if self._allocator is None or self._max_blocks is None:
            raise ValueError("the pool was made without max_blocks")
        parts = self._divide(num_blocks)
        sizes = {address: part.size_bytes for address, part in zip(self._addresses, parts, strict=True)}
        self._allocator.resize(sizes)
        self._parts = parts
        self._look()
        self.clear()

    def clear(self) -> None:
        """Zeroes it: after waking it holds anything, and a NaN in a block that is only padding would spread."""
        for part in self._bytes:
            part.zero_()
        torch.cuda.synchronize(self.device)

    def tensors(self) -> list[Tensor]:
        """A uint8 tensor a group, ``[num_blocks * block_bytes]``. They are valid again after sleep and waking."""
        views = [
            whole[e.offset : e.offset + e.size_bytes]
            for whole, part in zip(self._bytes, self._parts, strict=True)
            for e in part.extents
        ]
        return views[:-1]

    def reserved_tensors(self) -> list[Tensor]:
        """As :meth:`tensors`, but ``[max_blocks * block_bytes]``: blocks that are not there yet must not be touched.

        For CUDA graphs: kernels that are told the number of blocks when they are captured (such as by a TMA
        descriptor) would take blocks beyond it for absent after the pool has grown.
        """
        if self._allocator is None or self._max_blocks is None:
            return self.tensors()
        places = [
            (address + e.offset, e.size_bytes)
            for address, part in zip(self._addresses, self._most, strict=True)
            for e in part.extents
        ]
        return [tensor_at(address, size, self.device) for address, size in places[:-1]]

    def memory(self) -> PoolMemory:
        """What the transport registers: ask anew after every sleep, whose handles are others, and after resizing."""
        regions = tuple(
            Region(address + e.offset, e.block_bytes, e.num_blocks)
            for address, part in zip(self._addresses, self._parts, strict=True)
            for e in part.extents
        )
        allocator = self._allocator
        segments = () if allocator is None else tuple(allocator.segment_of(address) for address in self._addresses)
        return PoolMemory(self.device, regions, segments)

    def close(self) -> None:
        """Frees it; its tensors must not be used any more. Idempotent."""
        self._bytes = []
        while self._addresses:
            if self._allocator is not None:
                self._allocator.free(self._addresses[-1])
            self._addresses.pop()

    def _look(self) -> None:
        self._bytes = [
            tensor_at(address, part.size_bytes, self.device)
            for address, part in zip(self._addresses, self._parts, strict=True)
        ]

    def _divide(self, num_blocks: tuple[int, ...]) -> list[_Part]:
        if self._max_blocks is None:
            return [_Part(*extents(self._layout, num_blocks))]
        for count, most in zip(num_blocks, self._max_blocks, strict=True):
            if count > most:
                raise ValueError(f"{count} blocks are more than the {most} that addresses are reserved for")
        alone = [
            extents(replace(self._layout, groups=(group,)), (count,))
            for group, count in zip(self._layout.groups, num_blocks, strict=True)
        ]
        parts = [_Part(found[:1], found[1].offset) for found, _ in alone]  # without a probe region each
        return [*parts[:-1], _Part(*alone[-1])]


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
