"""Counting memory by tag: the arithmetic behind :class:`pd_serve.wire.memory.MemoryReport`.

Used by the allocator and the pools. No torch, no locks: whoever counts holds its own.
"""

from __future__ import annotations

from dataclasses import dataclass

from pd_serve.wire.memory import TagUsage

# The tags of an engine. A tag is what sleeps and wakes as one.
WEIGHTS, KV_CACHE = "weights", "kv_cache"


@dataclass
class Counter:
    """One tag's bytes: asked for, the most of it so far, and the physical memory behind it."""

    used: int = 0
    peak: int = 0
    reserved: int = 0

    def add(self, used: int) -> None:
        self.used += used
        self.peak = max(self.peak, self.used)

    def usage(self) -> TagUsage:
        return TagUsage(self.used, self.peak, self.reserved)


def fragmentation(used: int, reserved: int) -> float:
    """The share of ``reserved`` bytes that holds nothing of anyone's."""
    return 1.0 - min(used, reserved) / reserved if reserved else 0.0
