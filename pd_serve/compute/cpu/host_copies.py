"""Copies between the pool and a host tier on this machine's memory: a :class:`pd_serve.compute.copies.Mover`."""

from __future__ import annotations

import ctypes

from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.region import PoolMemory


class HostMover:
    """``ctypes.memmove`` lets other threads run."""

    def __init__(self, pool: PoolMemory, memory: TierMemory) -> None:
        self.num_slots = memory.num_slots
        self._regions = pool.regions
        self._memory = memory

    def load(self, copies: list[Copy]) -> None:
        for group, block, slot in copies:
            region = self._regions[group]
            at = region.address + block * region.block_bytes
            ctypes.memmove(at, self._memory.place(group, slot), region.block_bytes)

    def store(self, copies: list[Copy]) -> None:
        for group, block, slot in copies:
            region = self._regions[group]
            at = region.address + block * region.block_bytes
            ctypes.memmove(self._memory.place(group, slot), at, region.block_bytes)

    def discard(self) -> None:
        self._memory.discard()

    def close(self) -> None:
        self._memory.close()
