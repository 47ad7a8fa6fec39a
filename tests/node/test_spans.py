"""Spans that a node makes of its engine's word: the phases of an attempt, and how it ended."""

from __future__ import annotations

import time
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import StatusCode

from pd_serve.node.spans import Spans
from pd_serve.otel import Tracing
from pd_serve.wire.engine import Timeline

TRACE = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
FULL: dict[str, Any] = {
    "id": "r~1",
    "trace": TRACE,
    "admitted_s": 1.0,
    "placed_s": 0.0,
    "started_s": 2.0,
    "first_token_s": 4.0,
    "ended_s": 7.0,
    "end": "finished",
    "failed": False,
    "pulled": False,
    "handoff": False,
    "tokens": 100,
    "cached": 16,
    "made": 9,
}


def spans(**changes: Any) -> list[ReadableSpan]:
    exporter, now_s = InMemorySpanExporter(), time.monotonic()
    timeline = Timeline(**FULL | changes)
    for name in ("admitted_s", "placed_s", "started_s", "first_token_s", "ended_s"):
        if at_s := getattr(timeline, name):
            setattr(timeline, name, now_s - 10 + at_s)
    Spans(Tracing(SimpleSpanProcessor(exporter), "node", "n")).record(timeline)
    for span in exporter.get_finished_spans():
        assert span.parent is not None and f"{span.parent.span_id:016x}" == TRACE[36:52]
        assert span.start_time is not None and abs(span.start_time / 1e9 - time.time()) < 15
    return list(exporter.get_finished_spans())


def phases(**changes: Any) -> list[tuple[str, float]]:
    """Names and seconds."""
    return [(s.name, round((s.end_time - s.start_time) / 1e9, 2)) for s in spans(**changes)]  # type: ignore[operator]


def test_phases_of_all_kinds_of_attempts() -> None:
    assert phases() == [("queue", 1.0), ("prefill", 2.0), ("decode", 3.0)]
    assert phases(handoff=True, ended_s=4.0, end="handed over") == [("queue", 1.0), ("prefill", 2.0)]
    pulled = {"pulled": True, "placed_s": 1.5, "first_token_s": 2.0}
    assert phases(**pulled) == [("wait for KV", 0.5), ("transfer", 0.5), ("decode", 5.0)]
    # Cut short in each phase.
    assert phases(started_s=0.0, first_token_s=0.0) == [("queue", 6.0)]
    assert phases(first_token_s=0.0) == [("queue", 1.0), ("prefill", 5.0)]
    assert phases(pulled=True, started_s=0.0) == [("wait for KV", 6.0)]
    assert phases(pulled=True, placed_s=2.0, started_s=0.0) == [("wait for KV", 1.0), ("transfer", 5.0)]


def test_what_spans_say() -> None:
    _, prefill, decode = spans()
    assert dict(prefill.attributes or {})["pd_serve.cached_tokens"] == 16
    assert dict(decode.attributes or {})["pd_serve.output_tokens"] == 9
    assert decode.status.status_code is StatusCode.UNSET and dict(decode.attributes or {})["pd_serve.end"] == "finished"
    wait, transfer = spans(pulled=True, placed_s=2.0, started_s=0.0, end="transfer: the source left", failed=True)
    assert wait.status.status_code is StatusCode.UNSET
    assert transfer.status.status_code is StatusCode.ERROR and "the source left" in (transfer.status.description or "")
    assert not spans(trace="nonsense") and not spans(trace=TRACE[:-1] + "0")  # unreadable, and not sampled
