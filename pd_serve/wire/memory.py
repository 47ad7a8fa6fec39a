"""What a node's memory holds: carried to the status and the metrics by whoever asks."""

from __future__ import annotations

import msgspec


class TagUsage(msgspec.Struct, frozen=True):
    """What one tag (``weights``, ``kv_cache``, ...) holds. All in bytes."""

    bytes: int  # asked for and not freed
    peak_bytes: int  # the most that ``bytes`` has been
    reserved_bytes: int  # physical memory that stands behind it now: 0 while it sleeps


class MemoryReport(msgspec.Struct, frozen=True):
    """The memory of one device, or of the host."""

    device: str  # "cuda:0" | "cpu"
    tags: dict[str, TagUsage] = {}
    fragmentation: float = 0.0  # share of the physical memory that nobody asked for, 0 to 1
    asleep: list[str] = []  # tags without physical memory


# How nodes and routers name this in their metrics: the field of TagUsage, the name, what it means.
USAGE_METRICS = {
    "bytes": ("memory_bytes", "Bytes asked for and not freed"),
    "peak_bytes": ("memory_peak_bytes", "The most bytes that were asked for at once"),
    "reserved_bytes": ("memory_reserved_bytes", "Physical memory behind it, 0 while it sleeps"),
}
FRAGMENTATION_METRIC = ("memory_fragmentation_ratio", "Share of the physical memory that nobody asked for")
