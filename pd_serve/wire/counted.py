"""What engines count, as a status carries it and as ``/metrics`` shows it: counters, and histograms made of counters.

A histogram is a handful of counters of one dict: ``NAME:BOUND`` (values up to the bound and above the one before it),
``NAME:sum``. So it travels, is summed over ranks and outlives sleep as every counter does. Must not import
prometheus_client before somebody asks for metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# Pulls take a fraction of a millisecond, queues minutes: half a decade a bucket.
BOUNDS_S = (0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
_BUCKETS = (*map(str, BOUNDS_S), "+Inf")

# Steps, how long the device was busy with them, and their tokens: what routers learn a node's speed from.
STEPS, STEP_SECONDS, COMPUTED_TOKENS = "steps", "step_seconds", "computed_tokens"
QUEUE = "queue_time_seconds"
TRANSFER = "transfer_time_seconds"
_TEXTS = {
    QUEUE: "From an attempt's admission to the first step that computes it",
    TRANSFER: "How long a read of a prompt's KV took, from its start to its last byte",
}


def no_times(name: str) -> dict[str, float]:
    """The counters of an empty histogram of seconds."""
    return dict.fromkeys([f"{name}:{bucket}" for bucket in (*_BUCKETS, "sum")], 0.0)


def observe(counters: MutableMapping[str, float], name: str, seconds: float) -> None:
    counters[f"{name}:{_BUCKETS[bisect_left(BOUNDS_S, seconds)]}"] += 1
    counters[f"{name}:sum"] += seconds


def counted_metrics(
    prefix: str, labels: list[str], reports: Sequence[tuple[list[str], Mapping[str, float]]]
) -> Iterator[Metric]:
    """How nodes and routers show them. ``labels``, and their values for each report: which node it is of."""
    from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily  # 50 ms, see memory

    for name in sorted({name for _, counters in reports for name in counters if ":" not in name}):
        counter = CounterMetricFamily(prefix + name, "Counted by the engine since it started", labels=labels)
        for values, counters in reports:
            if name in counters:
                counter.add_metric(values, counters[name])
        yield counter
    for name, text in _TEXTS.items():
        histogram = HistogramMetricFamily(prefix + name, text, labels=labels)
        for values, counters in reports:
            if f"{name}:sum" in counters:
                count, cumulative = 0.0, []
                for bucket in _BUCKETS:
                    count += counters.get(f"{name}:{bucket}", 0.0)
                    cumulative.append((bucket, count))
                histogram.add_metric(values, cumulative, counters[f"{name}:sum"])
        yield histogram
