"""The router's metrics under the names that vLLM gives them, for boards and autoscalers that read those.

Called where metrics are rendered, and only with ``--vllm-metric-names``. Names, types and labels are those of vLLM's
``vllm/v1/metrics/loggers.py``; both names are exported where vLLM has changed one and boards read either. Values are of
all nodes of a model together, which are one engine to whoever reads them. Must not count anything itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from pd_serve.router.groups import Registry

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric

    from pd_serve.router.metrics import ModelMetrics

_HISTOGRAMS = {
    "time_to_first_token_seconds": "ttft",
    "time_per_output_token_seconds": "itl",  # until vLLM 0.10
    "inter_token_latency_seconds": "itl",
    "e2e_request_latency_seconds": "e2e",
    "request_queue_time_seconds": "queue",
    "request_prompt_tokens": "prompt_tokens",
    "request_generation_tokens": "generation_tokens",
}
_USAGE = ("kv_cache_usage_perc", "gpu_cache_usage_perc")  # the latter until vLLM 0.10; hidden in 0.11, gone in 0.12
_LABELS = ("model_name", "engine")
_ENGINE = "0"  # vLLM numbers its data parallel ranks


class Aliases:
    """A collector for prometheus_client."""

    def __init__(self, models: Mapping[str, ModelMetrics], registry: Registry) -> None:
        self._models = models
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import CounterMetricFamily, HistogramMetricFamily

        for name, field in _HISTOGRAMS.items():
            histogram = HistogramMetricFamily(f"vllm:{name}", f"pd-serve: {field}", labels=_LABELS)
            for model, own in self._models.items():
                values = getattr(own, field)
                histogram.add_metric([model, _ENGINE], values.cumulative(), values.total)
            yield histogram
        counters: dict[str, dict[str, float]] = {
            "prompt_tokens": {model: own.prompt_tokens.total for model, own in self._models.items()},
            "generation_tokens": {model: own.generation_tokens.total for model, own in self._models.items()},
            # of whole prompts, as clients see them: nodes that share a prompt would count it twice
            "prefix_cache_queries": {model: own.prompt_tokens.total for model, own in self._models.items()},
            "prefix_cache_hits": {model: own.cached_tokens for model, own in self._models.items()},
            "prompt_tokens_cached": {model: own.cached_tokens for model, own in self._models.items()},
        }
        for name, sums in counters.items():
            counter = CounterMetricFamily(f"vllm:{name}", f"pd-serve: {name}", labels=_LABELS)
            for model, value in sums.items():
                counter.add_metric([model, _ENGINE], value)
            yield counter
        success = CounterMetricFamily(
            "vllm:request_success", "pd-serve: choices that finished", labels=[*_LABELS, "finished_reason"]
        )
        for model, own in self._models.items():
            for reason, count in own.succeeded.items():
                success.add_metric([model, _ENGINE, reason], count)
        yield success
        yield from self._of_nodes()

    def _of_nodes(self) -> Iterator[Metric]:
        from prometheus_client.metrics_core import GaugeMetricFamily

        running = GaugeMetricFamily("vllm:num_requests_running", "pd-serve: being computed", labels=_LABELS)
        waiting = GaugeMetricFamily(
            "vllm:num_requests_waiting", "pd-serve: at nodes without blocks, and at the router", labels=_LABELS
        )
        usages = [
            GaugeMetricFamily(f"vllm:{name}", "pd-serve: used of all KV blocks, 0 to 1", labels=_LABELS)
            for name in _USAGE
        ]
        for name in self._registry.names():
            groups = [group for (other, _), group in self._registry.groups.items() if other == name]
            nodes = [node for node in self._registry.nodes() if node.hello.model.name == name]
            running.add_metric([name, _ENGINE], sum(node.load.running for node in nodes))
            here = sum(len(group.waiting) + len(group.line) for group in groups)
            waiting.add_metric([name, _ENGINE], here + sum(node.load.queued for node in nodes))
            pools = [pool for node in nodes for pool in node.load.groups]
            total = sum(pool.total for pool in pools)
            for usage in usages:
                usage.add_metric([name, _ENGINE], sum(pool.used for pool in pools) / total if total else 0.0)
        yield running
        yield waiting
        yield from usages
