"""Where a layer group's blocks lie in memory: what a pool owns and a transport registers. No torch here."""

from __future__ import annotations

from dataclasses import dataclass

from pd_serve.memory.driver import HandleType

# The region behind the groups': what a start-up self-test reads, and nothing else.
PROBE_BLOCK_BYTES = 64 << 10
PROBE_BLOCKS = 64


@dataclass(frozen=True)
class Region:
    """One layer group's blocks in this node's pool: ``num_blocks`` ranges of ``block_bytes`` at ``address``.

    ``places``: where another engine keeps each layer of a group by itself, a block lies in parts, ``block_bytes`` at
    each of these distances from ``address``, in the order of layers; ``address`` is the lowest.
    """

    address: int
    block_bytes: int
    num_blocks: int
    places: tuple[int, ...] = (0,)

    @property
    def size_bytes(self) -> int:
        """At one place."""
        return self.block_bytes * self.num_blocks

    @property
    def whole_bytes(self) -> int:
        """Of a block, at all places together."""
        return self.block_bytes * len(self.places)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """Address and size of each place."""
        return [(self.address + place, self.size_bytes) for place in self.places]


@dataclass(frozen=True)
class Segment:
    """One cumem allocation behind a pool: what can be exported to a peer."""

    address: int
    size_bytes: int
    handle: int  # the driver's
    handle_type: HandleType


@dataclass(frozen=True)
class PoolMemory:
    """A rank's KV pool, as transports see it."""

    device: int | None  # CUDA ordinal; None: host memory
    regions: tuple[Region, ...]  # one a group, then the probe region
    segments: tuple[Segment, ...] = ()  # where it is cumem memory: together they cover all regions

    @property
    def closed_to_ucx(self) -> bool:
        """UCX up to 1.23 maps no other process's cumem memory by file descriptor: inside one machine it would fall back
        to the host, in silence, at a hundredth of the rate. NICs read such memory, so other machines are not concerned.
        """
        return any(segment.handle_type is not HandleType.FABRIC for segment in self.segments)
