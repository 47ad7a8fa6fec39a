"""The router's part of a request's trace: a span of the request, of its wait for nodes, and of each attempt at it.

Made where traces are wanted and this request is sampled, and nowhere else: a request without costs one comparison at
each place. Nodes add spans of their own below an attempt's (:mod:`pd_serve.node.spans`). Says nothing of what a
request says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.api.responses import Usage
from pd_serve.router.middleware import COMPLETIONS, request_id

if TYPE_CHECKING:
    from opentelemetry.trace import Span

    from pd_serve.otel import Tracing
    from pd_serve.router.attempt import Attempt

_SCOPE = "pd_serve.span"


def span_of(scope: Scope) -> RequestSpan | None:
    """None: no traces are wanted, or not of this request."""
    found: RequestSpan | None = scope.get(_SCOPE)
    return found


class Traced:
    """ASGI middleware, inside of :class:`pd_serve.router.middleware.Edge`: who has no key makes no spans."""

    def __init__(self, app: ASGIApp, tracing: Tracing) -> None:
        self._app = app
        self._tracing = tracing

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] not in COMPLETIONS:
            await self._app(scope, receive, send)
            return
        span = RequestSpan(self._tracing, scope)
        if span.sampled:
            scope[_SCOPE] = span

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                span.answered(message["status"])
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            span.answered(500)
            raise
        finally:
            span.end()


class RequestSpan:
    def __init__(self, tracing: Tracing, scope: Scope) -> None:
        from opentelemetry.trace import SpanKind, set_span_in_context

        headers = {name: value for name, value in scope["headers"] if name in (b"traceparent", b"tracestate")}
        given = [headers.get(name, b"").decode("latin-1") for name in (b"traceparent", b"tracestate")]
        self._tracer = tracing.tracer
        self._span = self._tracer.start_span(
            f"{scope['method']} {scope['path']}",
            tracing.context_of(*given),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": scope["method"],
                "url.path": scope["path"],
                "pd_serve.request_id": request_id(scope),
            },
        )
        self.sampled = self._span.is_recording()
        self._context = set_span_in_context(self._span)
        self._queue: Span | None = self._child("queue") if self.sampled else None

    def _child(self, name: str, **attributes: Any) -> Span:
        return self._tracer.start_span(name, self._context, attributes=attributes)

    def attempt(self, attempt: Attempt, prompt_tokens: int) -> AttemptSpan:
        """Its nodes are asked now."""
        if self._queue is not None:
            self._queue.end()
            self._queue = None
        nodes = {"prefill": attempt.prefill, "decode": attempt.decode}
        said = {f"pd_serve.{role}_node": node.id for role, node in nodes.items() if node is not None}
        numbers = {"pd_serve.prompt_tokens": prompt_tokens, "pd_serve.resumed_after_tokens": attempt.base}
        return AttemptSpan(self._child("attempt", **{"pd_serve.attempt_id": attempt.id, **said, **numbers}))

    def first_token(self) -> None:
        self._span.add_event("first token")

    def answered(self, status: int) -> None:
        self._span.set_attribute("http.response.status_code", status)
        if status >= 500:
            _fail(self._span, str(status), "")

    def finish(self, model: str, usage: Usage, error: APIError | None, *, left: bool) -> None:
        """How it ended, which the status line may have been too early to say."""
        self._span.set_attributes(
            {
                "gen_ai.request.model": model,
                "gen_ai.usage.input_tokens": usage.prompt_tokens,
                "gen_ai.usage.output_tokens": usage.completion_tokens,
                "pd_serve.cached_tokens": usage.cached_tokens,
            }
        )
        if left:
            self._span.add_event("the client left")
        if error is not None and error.status >= 500:
            _fail(self._span, error.code or str(error.status), error.message)
        elif error is not None:  # the client's, or it is to come again: no error of a server
            self._span.set_attribute("error.type", error.code or str(error.status))

    def end(self) -> None:
        if self._queue is not None:
            self._queue.end()
        self._span.end()


class AttemptSpan:
    def __init__(self, span: Span) -> None:
        from pd_serve.otel import traceparent

        self._span = span
        self.traceparent = traceparent(span)

    def event(self, name: str, **attributes: str) -> None:
        self._span.add_event(name, attributes)

    def fail(self, kind: str, why: str) -> None:
        """What follows is another attempt, or the request's error."""
        _fail(self._span, kind, why)

    def end(self, tokens: int) -> None:
        self._span.set_attribute("pd_serve.output_tokens", tokens)
        self._span.end()


def _fail(span: Span, kind: str, why: str) -> None:
    from opentelemetry.trace import StatusCode

    span.set_attribute("error.type", kind)
    span.set_status(StatusCode.ERROR, why or None)
