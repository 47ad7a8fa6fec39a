"""Where a layer group's blocks lie in memory: what the pool owns and a transport registers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Region:
    """One layer group's blocks in this node's pool: ``num_blocks`` ranges of ``block_bytes`` at ``address``."""

    address: int
    block_bytes: int
    num_blocks: int

    @property
    def size_bytes(self) -> int:
        return self.block_bytes * self.num_blocks
