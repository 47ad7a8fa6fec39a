"""The last minutes of what the router counts: a copy of the counts each second, and what their differences say.

Sampled by the router's sweep, watched or not, so that a page that is opened now begins with minutes of plots. A
sample is some dozens of integers; a router that does nothing keeps the same ones. Quantiles are worked out when asked
for.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import NamedTuple

from pd_serve.router.metrics import Histogram, Metrics
from pd_serve.router.middleware import COMPLETIONS

KEPT_S = 300
WINDOW_S = 10  # of the plotted quantiles: those of one second of few requests jump
TILE_S = 60  # of the quantiles that are shown as numbers
_LEFT = "499"  # the client left: no error of ours
_NOTHING = (0,)

Counts = tuple[int, ...]


class Counted(NamedTuple):
    """Since the router started, over all models."""

    ttft: Counts
    itl: Counts
    requests: int  # completions that have their status
    errors: int  # those with a status of 400 and more


class Sample(NamedTuple):
    time_s: float  # of the wall clock
    counted: Counted
    streams: int  # open then


class Recent:
    """``start_s`` and all times: of the wall clock."""

    def __init__(self, metrics: Metrics, start_s: float) -> None:
        self._metrics = metrics
        empty = Counted(_NOTHING, _NOTHING, 0, 0)
        # one more than is shown: a point is a difference
        self._samples: deque[Sample] = deque([Sample(start_s, empty, 0)], maxlen=KEPT_S + WINDOW_S + 1)
        self._bounds: tuple[Sequence[float], Sequence[float]] = (), ()  # of TTFT and ITL; none before the first model

    def sample(self, now_s: float, streams: int) -> None:
        """Called once a second."""
        models = self._metrics.models.values()
        if models:
            own = next(iter(models))
            self._bounds = own.ttft.bounds, own.itl.bounds
        requests = errors = 0
        for (path, status), count in self._metrics.counters["requests"].items():
            if path in COMPLETIONS:
                requests += count
                errors += count if status >= "400" and status != _LEFT else 0
        counted = Counted(_total(m.ttft for m in models), _total(m.itl for m in models), requests, errors)
        last = self._samples[-1].counted
        self._samples.append(Sample(now_s, last if counted == last else counted, streams))

    def points(self, count: int = KEPT_S) -> list[list[float | None]]:
        """The last ``count`` seconds, oldest first, each as: time, TTFT p50 and p99, ITL p50 and p99 (seconds, of the
        ``WINDOW_S`` before it; None: there were none), requests and errors a second, open streams."""
        samples = list(islice(self._samples, max(0, len(self._samples) - count - WINDOW_S), None))
        found: list[list[float | None]] = []
        for place in range(max(1, len(samples) - count), len(samples)):
            here, before = samples[place], samples[place - 1]
            since = samples[max(0, place - WINDOW_S)]
            took_s = max(here.time_s - before.time_s, 1e-3)
            found.append(
                [
                    here.time_s,
                    *self._quantiles(since.counted, here.counted),
                    (here.counted.requests - before.counted.requests) / took_s,
                    (here.counted.errors - before.counted.errors) / took_s,
                    here.streams,
                ]
            )
        return found

    def last_minute(self) -> list[float | None]:
        """TTFT p50 and p99, ITL p50 and p99, requests and errors a second."""
        here = self._samples[-1]
        since = self._samples[max(0, len(self._samples) - 1 - TILE_S)]
        took_s = max(here.time_s - since.time_s, 1.0)
        return [
            *self._quantiles(since.counted, here.counted),
            (here.counted.requests - since.counted.requests) / took_s,
            (here.counted.errors - since.counted.errors) / took_s,
        ]

    def _quantiles(self, since: Counted, here: Counted) -> list[float | None]:
        if since is here:
            return [None] * 4
        return [
            quantile(bounds, _less(mine, its), share)
            for bounds, mine, its in zip(self._bounds, here[:2], since[:2], strict=True)
            for share in (0.5, 0.99)
        ]


def _total(histograms: Iterable[Histogram]) -> Counts:
    found = [histogram.counts for histogram in histograms]
    return tuple(map(sum, zip(*found, strict=True))) if found else _NOTHING


def _less(here: Counts, since: Counts) -> Sequence[int]:
    return here if len(since) != len(here) else [mine - its for mine, its in zip(here, since, strict=True)]


def quantile(bounds: Sequence[float], counts: Sequence[int], share: float) -> float | None:
    """Linear within a bucket, as Prometheus' histogram_quantile; None of nothing. Values above all bounds count as the
    last bound."""
    total = sum(counts)
    if not total or not bounds:
        return None
    wanted, below, lower = share * total, 0, 0.0
    for bound, count in zip(bounds, counts, strict=False):
        if count and below + count >= wanted:
            return lower + (bound - lower) * (wanted - below) / count
        below, lower = below + count, bound
    return bounds[-1]
