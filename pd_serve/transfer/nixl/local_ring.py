"""The reader's staging ring: slots that the sources of this node share, handed out in turn."""

from __future__ import annotations

from collections import deque
from typing import Protocol

from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.nixl.bindings import Agent
from pd_serve.transfer.nixl.limits import Limits
from pd_serve.transfer.nixl.staging import Ring, units


class Asker(Protocol):
    """What waits for slots: the packed pulls from one source."""

    @property
    def wants(self) -> bool:
        """It could use a slot now."""

    def ask(self, slot: int) -> None:
        """Takes the slot. Only if it ``wants`` one."""

    def flush(self) -> None:
        """Sends what it asks for."""


class LocalRing:
    """This node's slots, handed to the peers that wait for one in turn."""

    def __init__(self, mover: Mover, agent: Agent, limits: Limits, largest_block_bytes: int) -> None:
        self.mover = mover
        self.agent = agent
        self.limits = limits
        self._largest_block_bytes = largest_block_bytes
        self._ring: Ring | None = None
        self._list: int | None = None
        self._waiting: deque[Asker] = deque()

    def open(self) -> None:
        """Raises TransferError where there is no memory for it."""
        if self._ring is None:
            ring = Ring(self.mover, self.agent, self.limits, self._largest_block_bytes)
            self._list = self.agent.prepare(units(ring.address, ring.slots * ring.slot_bytes), self.mover.device)
            self._ring = ring

    @property
    def ring(self) -> Ring:
        assert self._ring is not None, "not opened"
        return self._ring

    @property
    def descriptors(self) -> int:
        assert self._list is not None, "not opened"
        return self._list

    def wait(self, asker: Asker) -> None:
        if asker not in self._waiting:
            self._waiting.append(asker)

    def hand_out(self) -> None:
        asked: list[Asker] = []
        while self._waiting and self.ring.num_free:
            asker = self._waiting.popleft()
            if asker.wants:
                slot = self.ring.take()
                assert slot is not None
                asker.ask(slot)
                asked.append(asker)
                if len(asked) == 1:
                    asker.flush()  # nothing is under way before this was packed
                if asker.wants:
                    self._waiting.append(asker)
        for asker in asked:
            asker.flush()

    def close(self) -> None:
        if self._list is not None:
            self.agent.release_list(self._list)
            self._list = None
