"""The node's part of a request's trace: spans of what an engine reports of an attempt when it has ended there.

Called with each :class:`pd_serve.wire.engine.Timeline`. The spans are below the router's span of the attempt: queue and
prefill; where KV comes from another node its wait for that, and the transfer; decode. Must not keep anything.
"""

from __future__ import annotations

from collections.abc import Iterator

from opentelemetry.trace import SpanKind, StatusCode, get_current_span

from pd_serve.otel import Tracing, wall_ns
from pd_serve.wire.engine import Timeline


class Spans:
    def __init__(self, tracing: Tracing) -> None:
        self._tracing = tracing

    def record(self, timeline: Timeline) -> None:
        context = self._tracing.context_of(timeline.trace)
        if not get_current_span(context).get_span_context().is_valid:
            return
        monotonic_ns = wall_ns(0.0)  # once: a phase begins where the one before ends
        phases = [(name, begin_s, end_s) for name, begin_s, end_s in _phases(timeline) if begin_s]
        for number, (name, begin_s, end_s) in enumerate(phases, 1):
            span = self._tracing.tracer.start_span(
                name,
                context,
                kind=SpanKind.SERVER,
                start_time=monotonic_ns + int(begin_s * 1e9),
                attributes=_said(name, timeline),
            )
            if number == len(phases):
                span.set_attribute("pd_serve.end", timeline.end)
                if timeline.failed:
                    span.set_attribute("error.type", "node")
                    span.set_status(StatusCode.ERROR, timeline.end)
            span.end(monotonic_ns + int(end_s * 1e9))


def _phases(at: Timeline) -> Iterator[tuple[str, float, float]]:
    """Names, begins and ends; what began at 0 never did. A phase that is cut short ends where all does."""
    end_s = at.ended_s
    if at.pulled:
        yield "wait for KV", at.admitted_s, at.placed_s or end_s
        yield "transfer", at.placed_s, at.started_s or end_s
        yield "decode", at.started_s, end_s
        return
    yield "queue", at.admitted_s, at.started_s or end_s
    yield "prefill", at.started_s, at.first_token_s or end_s
    if not at.handoff:
        yield "decode", at.first_token_s, end_s


def _said(name: str, timeline: Timeline) -> dict[str, str | int]:
    said: dict[str, str | int] = {"pd_serve.attempt_id": timeline.id}
    if name == "prefill":
        said |= {"pd_serve.prompt_tokens": timeline.tokens, "pd_serve.cached_tokens": timeline.cached}
    elif name == "decode":
        said["pd_serve.output_tokens"] = timeline.made
    return said
