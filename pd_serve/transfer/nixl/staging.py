"""A ring of staging slots in registered memory, and how pieces lie in one. Both ends have one, for their own side."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.movers.base import I64, Mover
from pd_serve.transfer.nixl.bindings import I32, U64, Agent
from pd_serve.transfer.nixl.limits import UNIT_BYTES, Limits
from pd_serve.transfer.slices import Slicing

PART_ALIGNMENT = 256  # bytes: copies on a GPU use wide words


class Ring:
    """Slots of ``slot_bytes`` at ``address``; allocated once, for the life of its mover. Raises TransferError."""

    def __init__(self, mover: Mover, agent: Agent, limits: Limits, largest_block_bytes: int) -> None:
        # a piece is a block at most, and travels in one slot
        self.slot_bytes = round_up(max(limits.slot_bytes, largest_block_bytes), UNIT_BYTES)
        self.slots = limits.slots
        size = self.slot_bytes * self.slots
        try:
            self.address = mover.allocate(size)
        except (TransferError, OSError, MemoryError) as error:
            raise TransferError(
                FailureKind.TRANSFER,
                f"no memory for a staging ring of {size >> 20} MiB ({error}); leave more memory beside the KV cache",
            ) from error
        agent.register([(self.address, size)], mover.device)
        self._free = list(range(self.slots))

    def take(self) -> int | None:
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        assert slot not in self._free, "a staging slot was given back twice"
        self._free.append(slot)

    @property
    def num_free(self) -> int:
        return len(self._free)

    def at(self, slot: int) -> int:
        return self.address + slot * self.slot_bytes


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def units(address: int, size_bytes: int) -> U64:
    """Descriptors of a ring, ``[n, 3]``: one a unit, so that a read takes about as much as was packed."""
    count = size_bytes // UNIT_BYTES
    rows = np.zeros((count, 3), dtype=np.uint64)
    rows[:, 0] = np.uint64(address) + np.arange(count, dtype=np.uint64) * np.uint64(UNIT_BYTES)
    rows[:, 1] = UNIT_BYTES
    return rows


def unit_ids(slot: int, slot_bytes: int, size_bytes: int) -> I32:
    """Which units hold the first ``size_bytes`` of a slot."""
    first = slot * (slot_bytes // UNIT_BYTES)
    return np.arange(first, first + -(-size_bytes // UNIT_BYTES), dtype=np.int32)


def lay_out(slicings: Sequence[Slicing], parts: Sequence[tuple[int, I64]]) -> tuple[list[int], int]:
    """Where each part begins in a slot, and where the last one ends. The same on both ends."""
    offsets, at = [], 0
    for group, pieces in parts:
        offsets.append(at)
        at = round_up(at + slicings[group].piece_bytes * len(pieces), PART_ALIGNMENT)
    return offsets, at
