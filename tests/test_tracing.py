"""Traces: when they are wanted, what a collector that is away costs, and that nothing needs the packages."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time

import pytest

from pd_serve import tracing
from pd_serve.errors import ConfigError
from pd_serve.otel import Tracing, exporting, traceparent, wall_ns
from tests.collector import Collector
from tests.ports import free_port


def test_traces_are_wanted_by_flag_or_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT"):
        monkeypatch.delenv(name, raising=False)
    assert tracing.begin("", "s", "i") is None
    monkeypatch.setenv("OTEL_SDK_DISABLED", "true")
    assert tracing.begin("http://127.0.0.1:1/v1/traces", "s", "i") is None
    monkeypatch.delenv("OTEL_SDK_DISABLED")
    collector = Collector()
    try:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint.removesuffix("/v1/traces"))
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER", "traceidratio")
        monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.5")
        found = tracing.begin("", "pd-serve-router", "host:1")
        assert found is not None
        spans = [found.tracer.start_span(str(n)) for n in range(200)]
        sampled = [span for span in spans if span.is_recording()]
        for span in sampled:
            span.end()
        asyncio.run(found.close())
    finally:
        collector.close()
    assert 50 < len(sampled) < 150 and len(collector.spans) == len(sampled)
    assert {(span.service, span.instance) for span in collector.spans} == {("mine", "host:1")}


def test_a_collector_that_is_away_costs_nothing_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "0.1")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    port = free_port()
    traces = Tracing(exporting(f"http://127.0.0.1:{port}/v1/traces"), "s", "i")
    begun_s = time.monotonic()
    for number in range(1000):
        traces.tracer.start_span(str(number)).end()
    assert time.monotonic() - begun_s < 2.0
    deadline_s = time.monotonic() + 10

    def warnings() -> int:  # other lines are there where another test has set the level
        return len([record for record in caplog.records if record.levelname == "WARNING"])

    while not warnings():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    traces.tracer.start_span("later").end()
    time.sleep(0.5)
    assert warnings() == 1
    collector = Collector(port)
    try:
        traces.tracer.start_span("last").end()
        asyncio.run(traces.close())
    finally:
        collector.close()
    assert sorted(span.name for span in collector.spans) == sorted([*map(str, range(1000)), "later", "last"])
    assert warnings() == 1


def test_a_collector_that_hangs_loses_what_is_counted_and_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("pd_serve.otel._KEPT", 600)
    monkeypatch.setattr("pd_serve.otel.FLUSH_S", 0.2)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "20")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "30")

    def said() -> str:
        return "\n".join(record.getMessage() for record in caplog.records if record.levelname == "WARNING")

    collector = Collector(hanging=True)
    try:
        export = exporting(collector.endpoint)
        traces = Tracing(export, "s", "i")
        for number in range(1000):
            traces.tracer.start_span(str(number)).end()
        assert (export.dropped, export.waiting) == (400, 600)
        assert said() == "spans are dropped: 600 wait for the collector already"
        collector.go_on()
        deadline_s = time.monotonic() + 10
        while export.waiting:
            assert time.monotonic() < deadline_s
            time.sleep(0.01)
        collector.hang()
        traces.tracer.start_span("late").end()
        assert said().endswith("spans are exported again; 400 were dropped since the start")
        asyncio.run(traces.close())
        assert said().endswith("401 spans did not reach the collector, 400 of them dropped before the end")
    finally:
        collector.close()
    # those that had come first
    assert {span.name for span in collector.spans} >= set(map(str, range(600)))


def test_contexts_cross_processes_as_w3c_says() -> None:
    from opentelemetry.sdk.trace.export import SimpleSpanProcessor
    from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
    from opentelemetry.trace import get_current_span

    given = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    traces = Tracing(SimpleSpanProcessor(InMemorySpanExporter()), "s", "i")
    span = traces.tracer.start_span("child", traces.context_of(given))
    assert traceparent(get_current_span(traces.context_of(given))) == given
    assert traceparent(span).startswith(given[:36]) and traceparent(span)[36:] != given[36:]
    for wrong in ("", "00-zz", given[:-1], "00-" + "0" * 32 + given[35:]):
        assert not get_current_span(traces.context_of(wrong)).get_span_context().is_valid
    assert abs(wall_ns(time.monotonic() - 3) / 1e9 - (time.time() - 3)) < 0.5


WITHOUT = """
import sys
sys.modules["opentelemetry.sdk"] = sys.modules["opentelemetry.exporter"] = None
from pd_serve import tracing
from pd_serve.config import RouterConfig
from pd_serve.router.app import create_app
import pd_serve.node.server, pd_serve.router.main
assert tracing.begin("", "s", "i") is None
create_app(RouterConfig())
try:
    tracing.check("http://127.0.0.1:4318/v1/traces")
except Exception as error:
    print(type(error).__name__, error)
assert "pd_serve.otel" not in sys.modules and "pd_serve.node.spans" not in sys.modules
"""


def test_nothing_needs_the_packages_but_an_endpoint() -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(ConfigError.__name__) and "pip install 'pd-serve[otel]'" in done.stdout
