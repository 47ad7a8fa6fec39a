"""A collector of OpenTelemetry traces: takes what exporters send by OTLP over HTTP, and tells the spans."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest


class Seen(NamedTuple):
    """A span as it came. ``parent``: empty for a root. Times in nanoseconds."""

    name: str
    service: str
    instance: str
    trace: str
    id: str
    parent: str
    start: int
    end: int
    failed: bool
    attributes: dict[str, Any]
    events: list[str]


class Collector:
    """Serves until ``close``. ``port``: 0: a free one. ``hanging``: it answers from ``go_on`` to ``hang`` only."""

    def __init__(self, port: int = 0, *, hanging: bool = False) -> None:
        self.spans: list[Seen] = []
        self._answers = threading.Event()
        self.hang, self.go_on = self._answers.clear, self._answers.set
        if not hanging:
            self.go_on()
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                request = ExportTraceServiceRequest.FromString(self.rfile.read(int(self.headers["Content-Length"])))
                collector._answers.wait()
                collector.spans += [seen for resource in request.resource_spans for seen in _spans(resource)]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}/v1/traces"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()

    def close(self) -> None:
        self.go_on()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _spans(resource: Any) -> list[Seen]:
    of = _plain(resource.resource.attributes)
    return [
        Seen(
            span.name,
            of["service.name"],
            of["service.instance.id"],
            span.trace_id.hex(),
            span.span_id.hex(),
            span.parent_span_id.hex(),
            span.start_time_unix_nano,
            span.end_time_unix_nano,
            span.status.code == 2,
            _plain(span.attributes),
            [event.name for event in span.events],
        )
        for scope in resource.scope_spans
        for span in scope.spans
    ]


def _plain(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}
