"""The router's metrics, in Prometheus' text format.

Counting is a list increment, because it happens for every token; prometheus_client only renders what was
counted, when it is asked to, and is imported then.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from pd_serve.router.groups import Registry
from pd_serve.router.status import state as state_of
from pd_serve.router.vllm_names import Aliases
from pd_serve.wire.counted import counted_metrics
from pd_serve.wire.link import ROLES
from pd_serve.wire.memory import memory_metrics

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

# What a router has heard of its nodes. Nodes say the same of themselves, after ``pd_serve_node_`` and without a label
# for the node: whoever collects both and sums must not count anything twice.
PREFIX_NODES = "pd_serve_router_node_"
_LATENCY_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_ITL_S = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.4, 0.8, 1.6, 5.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)


class Histogram:
    """Counts by upper bound; the last count is of values above all bounds."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def cumulative(self) -> list[tuple[str, float]]:
        found, count = [], 0
        for bound, here in zip((*map(str, self.bounds), "+Inf"), self.counts, strict=True):
            count += here
            found.append((bound, float(count)))
        return found


class ModelMetrics:
    """Of one served name. All times in seconds."""

    def __init__(self) -> None:
        self.ttft = Histogram(_LATENCY_S)
        self.queue = Histogram(_LATENCY_S)
        self.itl = Histogram(_ITL_S)
        self.e2e = Histogram(_LATENCY_S)
        self.prompt_tokens = Histogram(_TOKENS)
        self.generation_tokens = Histogram(_TOKENS)
        self.cached_tokens = 0
        self.in_flight = 0
        self.succeeded: defaultdict[str, int] = defaultdict(int)  # choices, by their finish reason


_HISTOGRAMS = {
    "ttft": ("time_to_first_token_seconds", "From the request's arrival to its first token"),
    "queue": ("queue_time_seconds", "From a request's arrival to its first attempt on nodes"),
    "itl": ("inter_token_latency_seconds", "Between two steps of a stream that brought tokens"),
    "e2e": ("request_seconds", "From a request's arrival to its end"),
    "prompt_tokens": ("request_prompt_tokens", "Prompt tokens of a request"),
    "generation_tokens": ("request_generation_tokens", "Output tokens of a request, all its choices"),
}
_COUNTERS = {
    "requests": (("endpoint", "status"), "Requests by HTTP status (499: the client left)"),
    "errors": (("kind",), "Requests that ended with an error, by its code"),
    "attempts": (("placement",), "Attempts at streams: on a pair, or on one node alone"),
    "retries": (("reason",), "Attempts that were followed by another one, and why"),
    "trips": (("what",), "Nodes and pairs of nodes that failed too often and get single trials only"),
    "aborts": (("reason",), "Streams that the router ended on their nodes, and why"),
}
_LOAD = {
    "waiting": "Requests admitted that hold no KV blocks yet",
    "running": "Sequences being computed",
    "waiting_tokens": "Prompt tokens not computed yet",
    "leases": "Requests whose blocks are leased to decode nodes",
    "pulling": "Requests whose blocks are being pulled",
    "queued": "Requests admitted without KV blocks, wherever they wait",
}


_STATES = ("ready", "draining", "misfit", "failing")


class Metrics:
    """``vllm_names``: whether what vLLM has a name for is exported under that name, too."""

    def __init__(self, *, vllm_names: bool = False) -> None:
        self._vllm_names = vllm_names
        self.models: defaultdict[str, ModelMetrics] = defaultdict(ModelMetrics)
        self.counters: dict[str, defaultdict[tuple[str, ...], int]] = {name: defaultdict(int) for name in _COUNTERS}

    def count(self, name: str, *labels: str) -> None:
        self.counters[name][labels] += 1

    def render(self, registry: Registry) -> bytes:
        from prometheus_client import CollectorRegistry, generate_latest  # 60 ms that the start need not pay

        collector = CollectorRegistry(auto_describe=False)
        collector.register(_Collector(self, registry))
        if self._vllm_names:
            collector.register(Aliases(self.models, registry))
        return generate_latest(collector)


class _Collector:
    def __init__(self, metrics: Metrics, registry: Registry) -> None:
        self._metrics = metrics
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        yield from self._of_requests()
        yield from self._of_nodes()

    def _of_requests(self) -> Iterable[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

        models = self._metrics.models
        for field, (name, text) in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"pd_serve_{name}", text, labels=["model"])
            for model, values in models.items():
                own: Histogram = getattr(values, field)
                histogram.add_metric([model], own.cumulative(), own.total)
            yield histogram
        totals: dict[str, tuple[str, dict[str, float]]] = {
            "prompt_tokens": ("Prompt tokens received", {m: own.prompt_tokens.total for m, own in models.items()}),
            "generation_tokens": ("Output tokens sent", {m: own.generation_tokens.total for m, own in models.items()}),
            "cached_prompt_tokens": (
                "Prompt tokens found in caches",
                {m: own.cached_tokens for m, own in models.items()},
            ),
        }
        for name, (text, sums) in totals.items():
            counter = CounterMetricFamily(f"pd_serve_{name}", text, labels=["model"])
            for model, value in sums.items():
                counter.add_metric([model], value)
            yield counter
        gauge = GaugeMetricFamily("pd_serve_requests_in_flight", "Requests being served", labels=["model"])
        for model, values in models.items():
            gauge.add_metric([model], values.in_flight)
        yield gauge
        for name, (labels, text) in _COUNTERS.items():
            counter = CounterMetricFamily(f"pd_serve_{name}", text, labels=labels)
            for key, count in self._metrics.counters[name].items():
                counter.add_metric(list(key), count)
            yield counter

    def _of_nodes(self) -> Iterable[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        nodes = sorted(self._registry.nodes(), key=lambda node: (node.role, node.id))
        groups = self._registry.groups.values()
        troubles = {id: trouble for group in groups for id, trouble in group.troubles().items()}
        states: dict[tuple[str, str], int] = {(r, s): 0 for r in ROLES for s in _STATES}
        for node in nodes:
            states[node.role, state_of(node, troubles)[0]] += 1
        gauge = GaugeMetricFamily("pd_serve_nodes", "Linked nodes", labels=["role", "state"])
        for key, count in states.items():
            gauge.add_metric(list(key), count)
        yield gauge
        gauge = GaugeMetricFamily(
            "pd_serve_unfit_pair", "Pairs of nodes that cannot exchange KV now (1 each)", labels=["prefill", "decode"]
        )
        for pair in {pair for group in groups for pair in group.unfit(due=True)}:
            gauge.add_metric(list(pair), 1)
        yield gauge
        for name, text in _LOAD.items():
            gauge = GaugeMetricFamily(PREFIX_NODES + name, text, labels=["node", "role"])
            for node in nodes:
                gauge.add_metric([node.id, node.role], getattr(node.load, name))
            yield gauge
        gauge = GaugeMetricFamily(
            PREFIX_NODES + "attempts", "Attempts of this router that the node works on", labels=["node", "role"]
        )
        blocks = GaugeMetricFamily(
            PREFIX_NODES + "kv_blocks", "KV blocks by layer group and state", labels=["node", "role", "group", "state"]
        )
        for node in nodes:
            gauge.add_metric([node.id, node.role], len(node.attempts))
            for place, group in enumerate(node.load.groups):
                for state in ("used", "cached", "free"):
                    blocks.add_metric([node.id, node.role, str(place), state], getattr(group, state))
        yield gauge
        yield blocks
        reports = [([node.id, node.role], node.memory) for node in nodes if node.memory is not None]
        yield from memory_metrics(PREFIX_NODES, ["node", "role"], reports)
        yield from counted_metrics(
            PREFIX_NODES,
            ["node", "role", "transport"],
            [([node.id, node.role, node.hello.transport], node.counters) for node in nodes],
        )
