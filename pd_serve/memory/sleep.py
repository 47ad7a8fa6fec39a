"""The memory of an engine on a GPU, as one thing that can sleep: allocator, torch's pools, KV pools, host copies.

Made at engine start where the cumem allocator is used, and used on the engine's main thread. Before ``sleep`` nothing
may run on the device and no peer or NIC may know the memory; after ``wake`` everything lies where it lay.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import AbstractContextManager

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.cumem import CumemAllocator
from pd_serve.memory.device_pool import DevicePool
from pd_serve.memory.host_buffers import HostBuffers
from pd_serve.memory.torch_pool import TorchPools
from pd_serve.memory.usage import KV_CACHE, WEIGHTS
from pd_serve.wire.memory import MemoryReport


class DeviceMemory:
    """``pin``: see :func:`pd_serve.memory.pinned.should_pin_memory`. Raises DriverError."""

    def __init__(self, device: int, *, pin: bool) -> None:
        self._driver = CudaDriver()
        self._host = HostBuffers(self._driver if pin else None, keep=pin)
        self.allocator = CumemAllocator(self._driver, device, self._host)
        self._pools = TorchPools(self.allocator)
        self._kv_pools: list[DevicePool] = []
        self._kv_undefined = False

    def use_memory_pool(self, tag: str) -> AbstractContextManager[None]:
        """What torch allocates inside, on this thread, belongs to ``tag`` (:class:`TorchPools`)."""
        return self._pools.use_memory_pool(tag)

    def kv_pool(
        self, layout: KVLayout, num_blocks: tuple[int, ...], *, max_blocks: tuple[int, ...] | None = None
    ) -> DevicePool:
        """``max_blocks``: what it may be resized to (:class:`DevicePool`). Raises OutOfDeviceMemory, DriverError."""
        pool = DevicePool(layout, num_blocks, self.allocator.device, self.allocator, max_blocks=max_blocks)
        self._kv_pools.append(pool)
        return pool

    def prepare(self) -> None:
        """Makes the host memory of level 1 ahead: pinning it takes longer than copying to it."""
        self.allocator.prepare([WEIGHTS])

    @property
    def asleep(self) -> list[str]:
        return self.allocator.asleep

    def sleep(self, level: int) -> None:
        """Level 1: weights are kept in host memory; level 2: they are dropped, and loaded anew by whoever wakes them.

        Every other tag is dropped. Raises PDServeError, OSError or MemoryError; see :meth:`CumemAllocator.sleep`.
        """
        self._kv_undefined = True
        self.allocator.sleep([WEIGHTS] if level == 1 else [])

    def wake(self, tags: Collection[str] | None = None) -> None:
        """KV pools are zero afterwards. Raises PDServeError; what was not reached still sleeps."""
        try:
            self.allocator.wake(tags)
        finally:
            if self._kv_undefined and KV_CACHE not in self.asleep:
                for pool in self._kv_pools:
                    pool.clear()
                self._kv_undefined = False

    def outside_torch(self) -> int:
        """Bytes of the device that this holds and that torch does not count."""
        return sum(tag.reserved_bytes for tag in self.report().tags.values())

    def report(self) -> MemoryReport:
        return self._pools.report()

    def close(self) -> None:
        """Frees all that no tensor holds."""
        for pool in self._kv_pools:
            pool.close()
        self._kv_pools.clear()
        self._pools.close()
        self._host.close()
