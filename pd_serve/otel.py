"""OpenTelemetry's SDK as routers and nodes use it: one provider a process, spans with times of our clock, export.

Imported by :mod:`pd_serve.tracing` alone where traces are wanted, and by tests. Spans are exported by a thread of the
SDK, in batches; whoever makes one never waits. Samplers, limits, resource and the exporter's headers, certificates
and times are those of the standard OTEL_* variables.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Sequence

from opentelemetry.context import Context
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from pd_serve import __version__

log = logging.getLogger(__name__)

FLUSH_S = 2.0  # at the end of a process, for what is not exported yet
_KEPT = 8192  # spans, while the collector is away or slow: about 10 MB
_BATCH = 512

_propagator = TraceContextTextMapPropagator()


class Tracing:
    """Owns the provider. ``tracer`` makes spans; ``context_of`` and ``traceparent`` are how they cross processes."""

    def __init__(self, processor: SpanProcessor, service: str, instance: str) -> None:
        self._processor = processor
        own = {"service.name": service, "service.instance.id": instance, "service.version": __version__}
        resource = Resource.create().merge(Resource(own)).merge(OTELResourceDetector().detect())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self.tracer = self._provider.get_tracer("pd_serve", __version__)

    def context_of(self, traceparent: str, tracestate: str = "") -> Context:
        """Of what another process said; empty where that cannot be read."""
        return _propagator.extract({"traceparent": traceparent, "tracestate": tracestate}, Context())

    async def close(self) -> None:
        """Exports what is left, for ``FLUSH_S`` at most."""
        # A daemon: it may hang in a collector that does not answer, and nobody waits for it at the process's end.
        last = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        last.start()
        await asyncio.to_thread(last.join, FLUSH_S)
        if last.is_alive():
            log.warning("the last spans could not be exported within %g s", FLUSH_S)
        if isinstance(self._processor, Export):
            self._processor.account()


def traceparent(span: Span) -> str:
    """W3C's words for it."""
    at = span.get_span_context()
    return f"00-{at.trace_id:032x}-{at.span_id:016x}-{at.trace_flags:02x}"


def wall_ns(monotonic_s: float) -> int:
    """A time of this machine's monotonic clock as spans have it."""
    return time.time_ns() - int((time.monotonic() - monotonic_s) * 1e9)


def exporting(endpoint: str) -> Export:
    """``endpoint``: empty: what the variables name."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

    for name in ("opentelemetry.exporter", "opentelemetry.sdk._shared_internal"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # one line a batch; ours say it once
    log.info("traces go to %s", endpoint or "the collector that OTEL_* variables name")
    return Export(OTLPSpanExporter(endpoint or None))


class Export(BatchSpanProcessor):
    """The one bound on spans that wait, wherever they do: those that end beyond it are dropped, counted and told of.

    Spans end on one thread.
    """

    def __init__(self, exporter: SpanExporter) -> None:
        self._patient = Patient(exporter)
        super().__init__(self._patient, max_queue_size=_KEPT)
        self._taken = 0
        self._dropping = False
        self.dropped = 0

    @property
    def waiting(self) -> int:
        return self._taken - self._patient.exported

    def on_end(self, span: ReadableSpan) -> None:
        if span.context is None or not span.context.trace_flags.sampled:
            return
        if self.waiting >= _KEPT:
            self.dropped += 1
            if not self._dropping:
                self._dropping = True
                log.warning("spans are dropped: %d wait for the collector already", _KEPT)
            return
        if self._dropping and self.waiting < _KEPT // 2:
            self._dropping = False
            log.warning("spans are exported again; %d were dropped since the start", self.dropped)
        self._taken += 1
        super().on_end(span)

    def account(self) -> None:
        """Of what never reached the collector, in the log."""
        if lost := self.dropped + self.waiting:
            log.warning("%d spans did not reach the collector, %d of them dropped before the end", lost, self.dropped)


class Patient(SpanExporter):
    """Keeps what could not be exported for the next time, and says once that it could not."""

    def __init__(self, exporter: SpanExporter) -> None:
        self._exporter = exporter
        self._kept: deque[ReadableSpan] = deque()  # whoever hands spans over bounds them
        self._failing = False
        self.exported = 0

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._kept.extend(spans)
        while self._kept:
            batch = [self._kept[place] for place in range(min(_BATCH, len(self._kept)))]
            if self._exporter.export(batch) is not SpanExportResult.SUCCESS:
                if not self._failing:
                    self._failing = True
                    log.warning("traces cannot be exported: up to %d spans are kept until they can", _KEPT)
                return SpanExportResult.FAILURE
            for _ in batch:
                self._kept.popleft()
            self.exported += len(batch)
        if self._failing:
            self._failing = False
            log.info("traces are exported again")
        return SpanExportResult.SUCCESS

    def shutdown(self) -> None:
        self._exporter.shutdown()

    def force_flush(self, timeout_millis: int = 30000) -> bool:
        return True
