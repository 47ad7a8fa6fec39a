"""A request's spans as the router makes them, and the context that nodes are given."""

from __future__ import annotations

import asyncio
from typing import Any

from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from pd_serve.otel import Tracing
from pd_serve.wire import link
from tests.router.conftest import Running, StartNode, StartRouter, until

TRACE, CLIENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


class Traces:
    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracing = Tracing(SimpleSpanProcessor(self._exporter), "pd-serve-router", "test")

    async def tree(self) -> tuple[ReadableSpan, list[ReadableSpan]]:
        """The request's span, when it has ended, and what is below it in order of time."""

        def roots() -> list[ReadableSpan]:
            return [span for span in self._exporter.get_finished_spans() if span.kind is SpanKind.SERVER]

        await until(roots, "the request's span")
        (root,) = roots()
        rest = [span for span in self._exporter.get_finished_spans() if span is not root]
        for span in rest:
            assert span.parent is not None and span.parent.span_id == root.context.span_id
            assert root.start_time <= span.start_time <= span.end_time <= root.end_time  # type: ignore[operator]
        self._exporter.clear()
        return root, sorted(rest, key=lambda span: span.start_time or 0)

    def none(self) -> bool:
        return not self._exporter.get_finished_spans()


async def ask(running: Running, flags: str = "01", **body: object) -> Any:
    headers = {"traceparent": f"00-{TRACE}-{CLIENT}-{flags}", "X-Request-Id": "mine"}
    asked = {"model": "tiny", "prompt": "the fox", "max_tokens": 8, "temperature": 0, **body}
    return await running.http.post("/v1/completions", json=asked, headers=headers)


async def test_a_request_is_one_tree_below_its_clients_span(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    traces = Traces()
    running = await start_router(prefill, decode, tracing=traces.tracing)
    answer = await ask(running, stream=True)
    assert answer.status_code == 200 and "data: [DONE]" in answer.text
    root, (queue, attempt) = await traces.tree()
    assert root.parent is not None and f"{root.parent.span_id:016x}" == CLIENT
    assert {f"{span.context.trace_id:032x}" for span in (root, queue, attempt)} == {TRACE}
    assert root.name == "POST /v1/completions" and root.status.status_code is StatusCode.UNSET
    said = dict(root.attributes or {})
    assert said["http.response.status_code"] == 200 and said["pd_serve.request_id"] == "mine"
    assert said["gen_ai.request.model"] == "tiny" and said["gen_ai.usage.output_tokens"] == 8
    assert [event.name for event in root.events] == ["first token"]
    assert (queue.name, attempt.name) == ("queue", "attempt") and queue.end_time <= attempt.start_time  # type: ignore[operator]
    assert [event.name for event in attempt.events] == ["accepted", "KV arrived"]
    of = dict(attempt.attributes or {})
    assert (of["pd_serve.prefill_node"], of["pd_serve.decode_node"]) == (prefill.id, decode.id)
    told = f"00-{TRACE}-{attempt.context.span_id:016x}-01"
    assert [submit.trace for node in (prefill, decode) for submit in node.submits] == [told, told]
    # A client that does not sample decides for all.
    assert (await ask(running, flags="00")).status_code == 200
    assert traces.none() and prefill.submits[-1].trace == ""


async def test_a_resumed_attempt_is_a_sibling(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, first, second = [await start_node(role) for role in ("prefill", "decode", "decode")]
    traces = Traces()
    running = await start_router(prefill, first, second, tracing=traces.tracing)
    first.hold_after = second.hold_after = 4
    asked = asyncio.create_task(ask(running))
    stuck = await until(lambda: next((n for n in (first, second) if n.running and not n.hold.is_set()), None), "held")
    for node in (first, second):
        node.hold_after = None
    stuck.cut()
    assert (await asked).status_code == 200
    root, (_, lost, resumed) = await traces.tree()
    assert root.status.status_code is StatusCode.UNSET
    assert lost.status.status_code is StatusCode.ERROR and dict(lost.attributes or {})["error.type"] == "lost"
    assert stuck.id in (lost.status.description or "")
    assert resumed.status.status_code is StatusCode.UNSET
    assert dict(resumed.attributes or {})["pd_serve.resumed_after_tokens"] == 4
    stuck.hold.set()


async def test_errors_set_the_status(start_node: StartNode, start_router: StartRouter) -> None:
    prefill, decode = await start_node("prefill"), await start_node("decode")
    traces = Traces()
    running = await start_router(prefill, decode, tracing=traces.tracing)
    prefill.fail = decode.fail = [link.Failure("internal", "out of luck")] * 20
    assert (await ask(running)).status_code == 502
    root, (_, *attempts) = await traces.tree()
    assert root.status.status_code is StatusCode.ERROR and "out of luck" in (root.status.description or "")
    assert len(attempts) > 1 and {span.status.status_code for span in attempts} == {StatusCode.ERROR}
    # What is the client's is no error of ours, and has no attempt.
    assert (await ask(running, temperature=-1)).status_code == 400
    root, (queue,) = await traces.tree()
    assert root.status.status_code is StatusCode.UNSET and queue.name == "queue"
    assert dict(root.attributes or {})["http.response.status_code"] == 400
    assert (await running.http.get("/health")).status_code == 200 and traces.none()
