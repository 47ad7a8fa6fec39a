"""What a node's memory holds: carried to the status and the metrics by whoever asks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


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
    host: dict[str, TagUsage] = {}  # what of a tag lies in the host's memory for good: weights that are offloaded


_USAGE = {  # field of TagUsage: the metric's name, what it means
    "bytes": ("memory_bytes", "Bytes asked for and not freed"),
    "peak_bytes": ("memory_peak_bytes", "The most bytes that were asked for at once"),
    "reserved_bytes": ("memory_reserved_bytes", "Physical memory behind it, 0 while it sleeps"),
}


def memory_metrics(
    prefix: str, labels: list[str], reports: Sequence[tuple[list[str], MemoryReport]]
) -> Iterator[Metric]:
    """How nodes and routers show it. ``labels``, and their values for each report: which node it is of."""
    from prometheus_client.metrics_core import GaugeMetricFamily  # 50 ms that a start need not pay

    for field, (name, text) in _USAGE.items():
        gauge = GaugeMetricFamily(prefix + name, text, labels=[*labels, "device", "tag"])
        for values, report in reports:
            for device, tags in ((report.device, report.tags), ("host", report.host)):
                for tag, usage in tags.items():
                    gauge.add_metric([*values, device, tag], getattr(usage, field))
        yield gauge
    text = "Share of the physical memory that nobody asked for"
    gauge = GaugeMetricFamily(prefix + "memory_fragmentation_ratio", text, labels=[*labels, "device"])
    for values, report in reports:
        gauge.add_metric([*values, report.device], report.fragmentation)
    yield gauge
