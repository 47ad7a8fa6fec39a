"""The memory of an engine on a GPU without the cumem allocator: torch's own, which cannot sleep nor grow in place.

The counterpart of :class:`pd_serve.memory.sleep.DeviceMemory` where the driver offers no virtual memory (virtual GPUs,
WSL) or ``--no-enable-cumem-allocator`` asks for it. Peers read such a pool by cudaIpc, or through staging memory.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.device_pool import DevicePool
from pd_serve.memory.usage import KV_CACHE, Counter, fragmentation
from pd_serve.wire.memory import MemoryReport


class PlainDeviceMemory:
    """See :class:`pd_serve.memory.sleep.DeviceMemory`."""

    asleep: list[str] = []

    def __init__(self, device: int) -> None:
        self._device = device
        self._tags: dict[str, Counter] = {}
        self._pool: DevicePool | None = None

    @contextmanager
    def use_memory_pool(self, tag: str) -> Iterator[None]:
        """What torch has allocated more of at the end belongs to ``tag``, for good."""
        used, reserved = torch.cuda.memory_allocated(self._device), torch.cuda.memory_reserved(self._device)
        yield
        counter = self._tags.setdefault(tag, Counter())
        counter.add(torch.cuda.memory_allocated(self._device) - used)
        counter.reserved += torch.cuda.memory_reserved(self._device) - reserved

    def kv_pool(
        self, layout: KVLayout, num_blocks: tuple[int, ...], *, max_blocks: tuple[int, ...] | None = None
    ) -> DevicePool:
        """In place of the one before, if there was one: nobody uses it any more. It has no ``max_blocks``."""
        if self._pool is not None:
            self._pool.close()
            torch.cuda.empty_cache()
        self._tags.pop(KV_CACHE, None)
        with self.use_memory_pool(KV_CACHE):
            self._pool = DevicePool(layout, num_blocks, self._device, None)
        return self._pool

    def outside_torch(self) -> int:
        return 0

    def sleep(self, level: int) -> None:
        raise NotImplementedError("settings that put this memory to sleep are refused (memory/switches.py)")

    def wake(self, tags: Collection[str] | None = None) -> None:
        """It never sleeps."""

    def report(self) -> MemoryReport:
        used = sum(counter.used for counter in self._tags.values())
        reserved = sum(counter.reserved for counter in self._tags.values())
        tags = {tag: counter.usage() for tag, counter in self._tags.items()}
        return MemoryReport(f"cuda:{self._device}", tags, fragmentation=fragmentation(used, reserved))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
