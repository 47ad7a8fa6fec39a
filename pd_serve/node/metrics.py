"""The node's metrics in Prometheus' text format, made of the engine's last status when asked for."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, InfoMetricFamily, Metric

from pd_serve.wire.counted import counted_metrics
from pd_serve.wire.engine import EngineReady
from pd_serve.wire.link import Status
from pd_serve.wire.memory import memory_metrics

PREFIX = "pd_serve_node_"
_LOAD = {
    "waiting": "Requests admitted that hold no KV blocks yet",
    "running": "Sequences being computed",
    "waiting_tokens": "Prompt tokens not computed yet",
    "leases": "Requests whose blocks are leased to decode nodes",
    "queued": "Requests that wait for memory, wherever they wait",
    "max_queue": "Requests that may wait for memory",
    "queue_wait_seconds": "How long a request that comes now is expected to wait for memory",
    "pulling": "Requests whose blocks are being pulled from prefill nodes",
}


class _Collector:
    def __init__(
        self, status: Status | None, ready: EngineReady | None, links: int, draining: bool, sleeping: bool, stuck: bool
    ) -> None:
        self._status = status
        self._ready = ready
        self._links = links
        self._draining = draining
        self._sleeping = sleeping
        self._stuck = stuck

    def collect(self) -> Iterator[Metric]:
        yield GaugeMetricFamily(PREFIX + "links", "Routers linked", value=self._links)
        yield GaugeMetricFamily(PREFIX + "draining", "1 while the node takes nothing new", value=self._draining)
        yield GaugeMetricFamily(PREFIX + "sleeping", "1 while the node sleeps", value=self._sleeping)
        yield GaugeMetricFamily(PREFIX + "stuck", "1 while the engine is silent, or hangs in a step", value=self._stuck)
        if self._ready is not None:
            info = {
                "model": self._ready.model.name,
                "transport": self._ready.transport,
                "layout": self._ready.layout,
                "epoch": self._ready.epoch,
            }
            yield InfoMetricFamily(PREFIX + "engine", "What the engine serves, and how", value=info)
        if self._status is None:
            return
        load = self._status.load
        for name, text in _LOAD.items():
            yield GaugeMetricFamily(PREFIX + name, text, value=getattr(load, name.replace("_seconds", "_s")))
        for name, text, groups in (
            ("kv_blocks", "KV blocks by layer group and state", load.groups),
            ("host_kv_blocks", "Blocks of the host tier; used: copies are on their way", load.host_groups),
        ):
            blocks = GaugeMetricFamily(PREFIX + name, text, labels=["group", "state"])
            for number, group in enumerate(groups):
                for state in ("used", "cached", "free"):
                    blocks.add_metric([str(number), state], getattr(group, state))
            yield blocks
        if (memory := self._status.memory) is not None:
            yield from memory_metrics(PREFIX, [], [([], memory)])
        yield from counted_metrics(PREFIX, [], [([], self._status.counters)])


def render(
    status: Status | None, ready: EngineReady | None, *, links: int, draining: bool, sleeping: bool, stuck: bool
) -> bytes:
    """The body of ``GET /metrics``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Collector(status, ready, links, draining, sleeping, stuck))
    return generate_latest(registry)
