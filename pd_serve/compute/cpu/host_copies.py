"""Copies between the pool and a host tier on this machine's memory: a :class:`pd_serve.compute.copies.Mover`."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pd_serve.jit import kernel, load_int, move
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.region import PoolMemory

I64 = npt.NDArray[np.int64]

_I64 = np.int64(0)


class HostMover:
    """All blocks of a call go in one, which lets other threads run: with a call for each block, copying would wait
    for the interpreter's lock twice a block, beside a main thread that computes."""

    def __init__(self, pool: PoolMemory, memory: TierMemory) -> None:
        self.num_slots = memory.num_slots
        self._regions = pool.regions
        self._memory = memory
        _copy(0, 0, 0, 0)  # is compiled, or found, here

    def load(self, copies: list[Copy]) -> None:
        pool, tier, sizes = self._memory.places(copies, self._regions)
        _copy(pool.ctypes.data, tier.ctypes.data, sizes.ctypes.data, len(copies))

    def store(self, copies: list[Copy]) -> None:
        pool, tier, sizes = self._memory.places(copies, self._regions)
        _copy(tier.ctypes.data, pool.ctypes.data, sizes.ctypes.data, len(copies))

    def discard(self) -> None:
        self._memory.discard()

    def close(self) -> None:
        self._memory.close()


@kernel
def _copy(targets: int, sources: int, sizes: int, count: int) -> None:
    """All are addresses of int64 arrays."""
    for n in range(count):
        move(load_int(_I64, targets, n), load_int(_I64, sources, n), load_int(_I64, sizes, n))
