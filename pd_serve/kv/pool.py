"""The blocks of one layer group: who holds each, what can be taken.

Owned by :class:`pd_serve.kv.manager.KVManager`. Knows nothing of tokens or bytes. Every block except
block 0 (the null block) is in exactly one state:

- *used*: at least one holder;
- *cached*: no holder, content kept for prefix hits, taken in least-recently-used order;
- *free*: no holder, no content.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import islice
from typing import Generic, TypeVar

from pd_serve.errors import PoolExhausted
from pd_serve.wire.link import GroupUsage

Owner = TypeVar("Owner")


class BlockPool(Generic[Owner]):
    """``num_blocks`` counts the null block. ``on_evict(owner)`` is told when cached content is given up."""

    def __init__(self, num_blocks: int, on_evict: Callable[[Owner], None]) -> None:
        self.num_blocks = num_blocks
        self._on_evict = on_evict
        self._holders = [0] * num_blocks
        self._owner: list[Owner | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, 0, -1))
        # Least recently used first. A dict would do but for its time: it looks for its first entry anew behind all
        # that were taken since it last grew.
        self._cached: OrderedDict[int, None] = OrderedDict()
        self.passed = 0  # cached blocks that have left the order in which they are taken, since the pool began

    @property
    def available(self) -> int:
        """Blocks that :meth:`take` can give."""
        return len(self._free) + len(self._cached)

    def take(self, count: int) -> list[int]:
        """``count`` blocks with one holder each and no content; evicts cached content where needed.

        Raises PoolExhausted, and takes nothing, when fewer are available.
        """
        if count > self.available:
            raise PoolExhausted(f"{count} KV blocks wanted, {self.available} of {self.num_blocks - 1} available")
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.pop()
            else:
                block, _ = self._cached.popitem(last=False)
                self.passed += 1
                self.disown(block)
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def hold(self, block: int) -> None:
        """One more holder of a used or cached block."""
        if self._holders[block] == 0:
            self.passed += 1
            del self._cached[block]
        self._holders[block] += 1

    def release(self, blocks: Iterable[int]) -> None:
        """One holder less of each; blocks named first are evicted first."""
        for block in blocks:
            holders = self._holders[block] - 1
            if holders < 0:
                raise ValueError(f"block {block} is released more often than it was held")
            self._holders[block] = holders
            if holders == 0:
                if self._owner[block] is None:
                    self._free.append(block)
                else:
                    self._cached[block] = None

    def own(self, block: int, owner: Owner) -> None:
        """Ties a used block's content to ``owner``, for prefix hits."""
        self._owner[block] = owner

    def owner(self, block: int) -> Owner | None:
        return self._owner[block]

    def touch(self, block: int) -> None:
        """A cached block counts as used most recently."""
        if block in self._cached:
            self.passed += 1
            self._cached.move_to_end(block)

    @property
    def num_free(self) -> int:
        """Blocks that can be taken and give up nothing."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        return len(self._cached)

    def evicted_next(self, count: int, skip: int = 0) -> list[int]:
        """The cached blocks that the next ``count`` taken would be, first to last, without the first ``skip``."""
        return list(islice(self._cached, skip, max(skip, count - len(self._free))))

    def forget(self) -> None:
        """Gives all content up; blocks that are held stay so."""
        self.passed += len(self._cached)
        self._free += self._cached
        self._cached.clear()
        for block in range(1, self.num_blocks):
            self.disown(block)

    def disown(self, block: int) -> None:
        """Its content is nobody's any more."""
        owner, self._owner[block] = self._owner[block], None
        if owner is not None:
            self._on_evict(owner)

    def usage(self) -> GroupUsage:
        total = self.num_blocks - 1
        return GroupUsage(total=total, used=total - self.available, cached=len(self._cached), free=len(self._free))

    def check(self) -> None:
        """Raises ValueError where a block is in two hands or in none."""
        free, cached = set(self._free), set(self._cached)
        if len(free) != len(self._free):
            raise ValueError("a free block is listed twice")
        for block in range(1, self.num_blocks):
            states = (self._holders[block] > 0) + (block in free) + (block in cached)
            if states != 1:
                raise ValueError(f"block {block} is in {states} states: holders {self._holders[block]}")
            if block in cached and self._owner[block] is None:
                raise ValueError(f"cached block {block} has no owner")
            if block in free and self._owner[block] is not None:
                raise ValueError(f"free block {block} has an owner")
        if 0 in free or 0 in cached or self._holders[0]:
            raise ValueError("the null block was given out")
