"""The host tier's books: which blocks have a copy in host memory, and which copies are on their way.

A block's place is the prefix tree's business: one node has its block on the device, in the host tier, in both, or in
neither (then it goes). So both tiers are found by the same exact tokens. Used by the engine's main thread
through :class:`pd_serve.kv.tiered.TieredKVManager`. Never copies a byte, and knows no memory: whoever copies says when
a copy has ended.

A slot of the tier is in one of these states:

- *free*;
- *storing*: a copy to it is on its way. It holds no block of the device for that: where the block is given up
  meanwhile, what arrives may be another's, and is dropped;
- *stored*: the copy is complete. Only then it is served. Given up in least-recently-used order;
- *loading*: stored, and being read: never given up before all reads have ended.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pd_serve.kv.pool import BlockPool
from pd_serve.kv.prefix import PrefixNode
from pd_serve.wire.link import GroupUsage

Place = tuple[PrefixNode, int]  # a node and the group

MAX_STORING = 256  # copies to the tier on their way at a time, of each group
MAX_BEGUN = 64  # of these begun at once, of each group: about 0.2 ms of the engine's thread
MAX_FRESH = 65_536  # blocks that wait to be copied; what is beyond is copied when its block is about to be given up


class Copy(NamedTuple):
    """One block's way between ``block`` of the device's pool and ``slot`` of the host tier, in a layer group."""

    group: int
    block: int
    slot: int


@dataclass
class Counts:
    """Since the tier began."""

    stored: int = 0  # blocks copied
    spoiled: int = 0  # copies that were dropped, because their block was given up meanwhile
    loaded: int = 0
    evicted: int = 0  # copies given up for others


class HostTier:
    """``num_slots[group]`` counts slot 0, which is never used. ``prune(node)`` is told when a node may be empty now,
    ``told(node, group, there)`` when a block is served from now on, or no more.

    ``eager``: every block is copied when it is full. Else it is copied only when it is about to be given up, which is
    done in any case, for what was missed or what the tier has given up since.
    """

    def __init__(
        self,
        num_slots: Sequence[int],
        eager: bool,
        prune: Callable[[PrefixNode], None],
        told: Callable[[PrefixNode, int, bool], None],
    ) -> None:
        self.eager = eager
        self.counts = Counts()
        self._prune = prune
        self._told = told
        self._slots: list[BlockPool[Place]] = [BlockPool(n, self._evicted) for n in num_slots]
        self._storing: dict[tuple[int, int], Place | None] = {}  # by group and slot; None: it will be dropped
        self._fresh: list[deque[PrefixNode]] = [deque(maxlen=MAX_FRESH) for _ in num_slots]
        # Of each group: how many blocks that the device gives up next have been looked at, when so many had passed, so
        # many were cached and so many free.
        self._looked = [(0, (0, 0, 0))] * len(num_slots)
        self._due = [0] * len(num_slots)  # when that many have passed, all are to be looked at again

    def restarted(self) -> None:
        """The device's pools are new."""
        self._looked = [(0, (0, 0, 0))] * len(self._due)
        self._due = [0] * len(self._due)

    # --- what is there

    def slot(self, node: PrefixNode, group: int) -> int:
        """Where the node's block is stored; 0: nowhere, or not yet."""
        slot = 0 if node.host is None else node.host[group]
        return slot if slot and self._slots[group].owner(slot) is not None else 0

    def usage(self) -> list[GroupUsage]:
        """``used``: storing or loading; ``cached``: stored."""
        return [slots.usage() for slots in self._slots]

    # --- stores

    def filled(self, node: PrefixNode, group: int) -> None:
        """A block of the device has this content from now on."""
        if self.eager and not (node.host and node.host[group]):
            self._fresh[group].append(node)

    def stores(self, pools: Sequence[BlockPool[Place]], horizon: int) -> list[Copy]:
        """Begins copies to the tier: of what is new (eager), and of what the next ``horizon`` blocks taken would
        give up. Each ends with :meth:`stored`."""
        begun: list[Copy] = []
        for group, (pool, slots) in enumerate(zip(pools, self._slots, strict=True)):
            half = max(1, (slots.num_blocks - 1) // 2)
            storing = sum(of == group for of, _ in self._storing)
            room = min(MAX_BEGUN, min(MAX_STORING, half) - storing, slots.available)
            if room <= 0:
                continue
            wanted = self._wanted(group, pool, room, horizon, pool.num_free + half)
            for node, slot in zip(wanted, slots.take(len(wanted)), strict=True):
                if node.host is None:
                    node.host = [0] * len(self._slots)
                node.host[group] = slot
                self._storing[group, slot] = node, group
                begun.append(Copy(group, node.blocks[group], slot))
        return begun

    def _wanted(self, group: int, pool: BlockPool[Place], room: int, horizon: int, most: int) -> dict[PrefixNode, None]:
        """Looks twice as far as the horizon, at what has come into sight, and at all again when half of that has
        passed: the tier may have given copies up. ``most``: no more than the tier has room for, or they would push
        each other out at every step anew."""
        wanted: dict[PrefixNode, None] = {}
        fresh = self._fresh[group]
        while fresh and len(wanted) < room:
            node = fresh.popleft()
            if node.blocks[group] and not (node.host and node.host[group]):
                wanted[node] = None
        now = pool.passed, pool.num_cached, pool.num_free
        looked, then = self._looked[group]
        again = pool.passed >= self._due[group]
        if now == then and not again:
            return wanted
        seen = 0 if again else max(0, looked - (now[0] - then[0]))
        ahead = min(2 * horizon, most)
        blocks = pool.evicted_next(ahead, seen)
        for block in blocks:
            if len(wanted) >= room:
                return wanted
            node, _ = pool.owner(block)  # type: ignore[misc]  # cached blocks have one
            if node.host is None or not node.host[group]:
                wanted[node] = None
        self._looked[group] = seen + len(blocks), now
        if again:
            self._due[group] = pool.passed + max(1, ahead - min(horizon, most))
        return wanted

    def lost(self, node: PrefixNode, group: int) -> None:
        """The device's block has been given up, and what is copied from it now may be another's."""
        if node.host is None:
            return
        slot = node.host[group]
        if (group, slot) in self._storing:
            self._storing[group, slot] = None
            self._clear(node, group)

    def stored(self, copies: Iterable[Copy], *, whole: bool = True) -> None:
        """Copies to the tier have ended. ``whole``: and arrived."""
        for group, _, slot in copies:
            place = self._storing.pop((group, slot))
            slots = self._slots[group]
            if place is not None and whole:
                slots.own(slot, place)
                self._told(*place, True)
                self.counts.stored += 1
            elif place is not None:
                self._clear(*place)
                self._prune(place[0])
            else:
                self.counts.spoiled += 1
            slots.release([slot])

    # --- loads

    def hold(self, node: PrefixNode, group: int) -> int:
        """The slot of a stored block, which stays until :meth:`loaded`."""
        slot = self.slot(node, group)
        self._slots[group].hold(slot)
        return slot

    def loaded(self, copies: Iterable[Copy], *, whole: bool = True) -> None:
        """Copies from the tier have ended. Not ``whole``: what is stored there cannot be read, and goes."""
        for group, _, slot in copies:
            slots = self._slots[group]
            if whole:
                self.counts.loaded += 1
            else:
                slots.disown(slot)
            slots.release([slot])

    def used(self, node: PrefixNode | None) -> None:
        """A sequence that ends stood here: its blocks are needed again after those of others, its first ones most."""
        while node is not None:
            if node.host is not None:
                for slots, slot in zip(self._slots, node.host, strict=True):
                    if slot:
                        slots.touch(slot)
            node = node.parent

    # --- ends

    def forget(self) -> None:
        """Gives everything up, also what is on its way; slots come back when their copies end."""
        for fresh in self._fresh:
            fresh.clear()
        evicted = self.counts.evicted
        for key, place in self._storing.items():
            if place is not None:
                self._storing[key] = None
                self._clear(*place)
                self._prune(place[0])
        for slots in self._slots:
            slots.forget()
        self.counts.evicted = evicted

    def _evicted(self, place: Place) -> None:
        self.counts.evicted += 1
        self._told(*place, False)
        self._clear(*place)
        self._prune(place[0])

    def _clear(self, node: PrefixNode, group: int) -> None:
        assert node.host is not None
        node.host[group] = 0
        if not any(node.host):
            node.host = None

    def check(self, nodes: Iterable[PrefixNode], *, idle: bool = False) -> None:
        """Raises ValueError where the books do not balance; ``idle``: also where something is still being loaded."""
        held = 0
        for node in nodes:
            for group, slot in enumerate(node.host or ()):
                if slot and (node, group) not in (self._slots[group].owner(slot), self._storing.get((group, slot))):
                    raise ValueError(f"prefix node and host tier disagree on slot {slot} of group {group}")
                held += slot > 0
        owned = sum(slots.owner(slot) is not None for slots in self._slots for slot in range(1, slots.num_blocks))
        if held != owned + sum(place is not None for place in self._storing.values()):
            raise ValueError("the host tier has blocks that no prefix node knows of")
        for group, slots in enumerate(self._slots):
            slots.check()
            loading = slots.usage().used - sum(of == group for of, _ in self._storing)
            if idle and loading:
                raise ValueError(f"{loading} slots of the host tier's group {group} are held although nothing runs")
