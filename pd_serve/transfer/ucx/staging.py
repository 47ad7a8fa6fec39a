"""Bounded memory for messages on their way: slots of one size, shared by all sessions of a transport.

A slot is taken when a message is packed or asked for, and given back when neither UCX nor the mover uses it any more.
"""

from __future__ import annotations

from pd_serve.transfer.movers.base import Mover


class Staging:
    """At most ``num_slots`` of ``slot_bytes``, allocated when first needed, alive as long as the mover."""

    def __init__(self, mover: Mover, slot_bytes: int, num_slots: int) -> None:
        self._mover = mover
        self.slot_bytes = slot_bytes
        self.num_slots = num_slots
        self._free: list[int] = []
        self._allocated = 0

    @property
    def in_use(self) -> int:
        return self._allocated - len(self._free)

    def take(self) -> int | None:
        """The address of a free slot, if there is one."""
        if self._free:
            return self._free.pop()
        if self._allocated == self.num_slots:
            return None
        self._allocated += 1
        return self._mover.allocate(self.slot_bytes)

    def give(self, slot: int) -> None:
        self._free.append(slot)
