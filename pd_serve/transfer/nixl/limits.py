"""What travels packed, and how much staging memory that may take: measured constants, one set a kind of memory."""

from __future__ import annotations

from dataclasses import dataclass

GROWTH = 2

UNIT_BYTES = 128 << 10  # staging memory is described in units; a packed read is rounded up to them


@dataclass(frozen=True)
class Limits:
    # Read directly where descriptors are at least so large on average, or so few that packing would not pay.
    direct_bytes: int
    direct_descriptors: int
    # A staging ring; a node has one as a source and one as a reader, from the first packed pull on.
    slot_bytes: int
    slots: int
    slots_per_peer: int  # one slow peer does not take all
    # The first chunk while nothing is under way: small, for nothing is read before it is packed. Each further one is
    # GROWTH times as large, up to a slot.
    first_chunk_bytes: int
    patience_s: float  # how long a source waits for one chunk before it packs the next
    awake_s: float  # for how long to look for the other end's next message before sleeping: waking up takes as long
    # A source takes a slot back that its reader keeps for longer; that reader's pull then fails.
    reclaim_s: float = 30.0


# On two busy cores, where one long read runs at 19 GB/s: pieces of 8 KiB directly 3.7, packed 6.7; of 16 KiB 5.7 and
# 7.1; of 32 KiB 8.9 and 7.4.
HOST = Limits(
    direct_bytes=24 << 10,
    direct_descriptors=64,
    slot_bytes=2 << 20,
    slots=16,
    slots_per_peer=8,
    first_chunk_bytes=512 << 10,
    patience_s=0.0,
    awake_s=0.0,
)

# A descriptor costs what 2.7 MiB cost at the rate of NVLink; a read of 16 MiB reaches a third of it, four at once all.
DEVICE = Limits(
    direct_bytes=4 << 20,
    direct_descriptors=4,
    slot_bytes=64 << 20,
    slots=10,
    slots_per_peer=8,
    first_chunk_bytes=32 << 20,
    patience_s=100e-6,
    awake_s=1e-3,
)


def limits_of(device: int | None) -> Limits:
    return HOST if device is None else DEVICE
