"""One request's answer: its streams' tokens become text, events or one document, and reach the client.

Created by the HTTP handlers when a request is valid; it is the ASGI response. The status line waits for the first
token or the final failure, so that errors keep their status codes; a stream that waits longer than
``sse_keep_alive_s`` begins with a comment. When the client leaves, or does not read what it asked for, at any
moment, the streams end on their nodes at once.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable

import msgspec
from starlette.types import Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.api.responses import Format, Usage
from pd_serve.api.sampling import choice_seed, sampling_params
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest
from pd_serve.api.text_model import Prompt, TextModel
from pd_serve.api.translated import MakeFormat
from pd_serve.http import Together, abort, chunks, leaves
from pd_serve.router.choice import Choice
from pd_serve.router.groups import Group
from pd_serve.router.line import Timer
from pd_serve.router.metrics import Metrics
from pd_serve.router.spans import RequestSpan
from pd_serve.router.stream import Shared
from pd_serve.wire.link import Grammar

log = logging.getLogger(__name__)
access = logging.getLogger("pd_serve.access")
# The access log's values, as JSON names them.
_SAID = ("path", "status", "model", "prompt_tokens", "cached_tokens", "output_tokens", "ttft_ms", "e2e_ms")

# Sequences of one request that run at a time: a list of 1,000 prompts neither fills the nodes' queues nor fails.
_WINDOW = 64
_LOOK_S = 10.0  # between looks at a stream's client, where no comments are sent
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect tokens
]


class Writer:
    def __init__(
        self,
        *,
        request: CompletionRequest | ChatCompletionRequest,
        prompts: list[Prompt],
        group: Group,
        text: TextModel,
        shared: Shared,
        metrics: Metrics,
        request_id: str,
        arrived_s: float,
        format_of: MakeFormat | None = None,
        grammar: Grammar | None = None,
        span: RequestSpan | None = None,
    ) -> None:
        """``text``: what made the prompts. ``format_of``: of another API's answer. ``grammar``: of each output.
        ``span``: where it is traced.

        Raises APIError(400) where the sampling fields do not fit the model.
        """
        self.request = request
        self.group = group
        self.text = text
        self.chat = isinstance(request, ChatCompletionRequest)
        self.streamed = bool(request.stream)
        self.started = False  # the client has a status, or will at once
        # Clients may send one X-Request-Id with many requests.
        id, now_s = f"{request_id[:48]}-{random.getrandbits(64):016x}", int(time.time())
        if format_of is None:
            self.format = _format(request, id=id, created_s=now_s, model=text.info.name)
        else:
            self.format = format_of(id=id, created_s=now_s, model=text.info.name, usage=self.usage)
        self.span = span
        self.choices: list[Choice] = []
        for prompt in prompts:
            sampling = sampling_params(request, text, len(prompt.ids))
            if grammar is not None:
                sampling = msgspec.structs.replace(sampling, grammar=grammar)
            for number in range(request.choices):
                own = msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, number)) if number else sampling
                self.choices.append(Choice(self, len(self.choices), prompt, own, shared, request_id))
        self._prompts = prompts
        self._shared = shared
        self._metrics = metrics
        self._own = metrics.models[text.info.name]
        self.observe_itl = self._own.itl.observe
        self._request_id = request_id
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._events: list[bytes] = []
        self._chunk: Callable[[bytes], bool] | None = None  # writes an event at once; there once the status is sent
        self._backlog_bytes = 0  # of events that came while the client's connection took no more
        self._task: asyncio.Task[None] | None = None
        self._timer: Timer | None = None
        self._cut = False  # the client did not read
        self._error: APIError | None = None
        self._left = False  # the client is gone
        self._open = len(self.choices)
        self._next = 0

    # --- called by choices ----------------------------------------------------------------------------

    def first_token(self, now_s: float) -> None:
        """Called for the first token of every choice."""
        self.started = True
        if self._first_s is None:
            self._first_s = now_s
            self._own.ttft.observe(now_s - self._arrived_s)
            self._queued(now_s)
            if self.span is not None:
                self.span.first_token()

    def _queued(self, now_s: float) -> None:
        """Once a request: at its first token, or at its end where it never got one."""
        asked = [at_s for choice in self.choices if (at_s := choice.stream.submitted_s) is not None]
        self._own.queue.observe(min(asked, default=now_s) - self._arrived_s)

    def emit(self, event: bytes) -> None:
        waiter = self._waiter
        if waiter is not None and not waiter.done() and self._chunk is not None and self._chunk(event):
            return  # nothing is in front of it
        self._events.append(event)
        if waiter is None:
            self._backlog_bytes += len(event)
            if self._backlog_bytes > self._shared.settings.max_stream_backlog:
                self._cut_off(f"it left more than {self._backlog_bytes} bytes of its stream unread")
        elif not waiter.done():
            waiter.set_result(None)

    def choice_ended(self) -> None:
        self._open -= 1
        if self._next < len(self.choices):
            self._start_next()
        elif not self._open:
            self._wake()

    def choice_failed(self, error: APIError) -> None:
        """The first failure is the request's."""
        if self._error is None:
            self._error = error
            self._stop("failed")
            self._wake()

    # --- ASGI -------------------------------------------------------------------------------------------

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._task = asyncio.current_task()
        watch = None if leaves(scope, self._client_left) else self._watch(receive)
        self._own.in_flight += 1
        status = 500
        try:
            for _ in range(min(_WINDOW, len(self.choices))):
                self._start_next()
            status = await (self._stream(scope, send) if self.streamed else self._document(scope, send))
        except asyncio.CancelledError:
            if not self._cut:
                raise
            assert self._error is not None and self._task is not None
            self._task.uncancel()
            status = self._error.status
            if abort(scope):
                await self._gone()  # returning before, uvicorn would miss the end of the answer
        finally:
            if self._timer is not None:
                self._timer.cancel()
            self._stop("client")
            leaves(scope, None)
            if watch is not None:
                watch.cancel()
            self._own.in_flight -= 1
            self._finish(499 if self._left and not self._cut else status, scope)
            self._let_go()

    async def _stream(self, scope: Scope, send: Send) -> int:
        self._look_later(self._events)
        if not await self._progress():
            return 499
        if not self._events:
            return await self._send_error(scope, send)
        with Together(scope):
            await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS + self._warnings()})
            await self._send_events(send)
        self._chunk = chunks(scope)
        while True:
            if self._events:
                await self._send_events(send)
                continue
            if self._error is not None or not self._open:
                break
            if not await self._progress():
                return 499
        if self._error is not None:
            await send({"type": "http.response.body", "body": self.format.error_event(self._error, self._request_id)})
            return self._error.status
        await send({"type": "http.response.body", "body": self.format.end(self.usage())})
        return 200

    async def _send_events(self, send: Send) -> None:
        events, self._events, self._backlog_bytes = self._events, [], 0
        body = events[0] if len(events) == 1 else b"".join(events)
        await send({"type": "http.response.body", "body": body, "more_body": True})

    async def _document(self, scope: Scope, send: Send) -> int:
        while self._open and self._error is None:
            if not await self._progress():
                return 499
        if self._error is not None:
            return await self._send_error(scope, send)
        ids = self._prompts[0].ids if self.chat and self.request.return_token_ids else None
        scores = self.choices[0].prompt_scores() if self.chat else None
        choices = [choice.document(index) for index, choice in enumerate(self._wanted())]
        body = self.format.document(choices, self.usage(), prompt_token_ids=ids, prompt_logprobs=scores)
        await _send_json(scope, send, 200, body, self._warnings())
        return 200

    def _wanted(self) -> list[Choice]:
        """The choices of the answer: all, or the likeliest ``n`` of each prompt's."""
        if not self.request.ranked:
            return self.choices
        made, n, found = self.request.choices, self.request.n or 1, []
        for first in range(0, len(self.choices), made):
            ranked = sorted(self.choices[first : first + made], key=lambda choice: choice.likelihood, reverse=True)
            found += ranked[:n]
        return found

    async def _send_error(self, scope: Scope, send: Send) -> int:
        assert self._error is not None
        body = self.format.error(self._error, self._request_id)
        await _send_json(scope, send, self._error.status, body, _raw(self._error.headers()))
        return self._error.status

    def _warnings(self) -> list[tuple[bytes, bytes]]:
        warning = self._prompts[0].warning
        return [] if warning is None else _raw({"X-Warning": warning})

    # --- while nothing happens --------------------------------------------------------------------------

    def _look_later(self, events: list[bytes], unread_s: float = 0.0) -> None:
        """A timer a stream: it costs tokens nothing. The list of events is another one after every send."""
        wait_s = self._shared.settings.sse_keep_alive_s or _LOOK_S
        tokens = sum(choice.num_tokens for choice in self.choices)

        def look() -> None:
            self._look(events, tokens, unread_s + wait_s)

        self._timer = self._shared.clock.call_later(wait_s, look)

    def _look(self, events: list[bytes], tokens: int, unread_s: float) -> None:
        settings = self._shared.settings
        if self._waiter is not None:
            if settings.sse_keep_alive_s and tokens == sum(choice.num_tokens for choice in self.choices):
                self.started = True
                self.emit(self.format.keep_alive())
            unread_s = 0.0
        elif self._events is not events:
            unread_s = 0.0
        elif unread_s >= settings.request_timeout_s:
            self._cut_off(f"it read nothing of its stream for {unread_s:g} s")
            return
        self._look_later(self._events, unread_s)

    def _cut_off(self, why: str) -> None:
        """Ends a stream that its client does not read; there is no way to tell it."""
        if self._cut or self._task is None:
            return
        log.warning("%s: the client is cut off: %s", self._request_id, why, extra={"request_id": self._request_id})
        self._cut = True
        if self._error is None:
            self._error = APIError(408, f"the client is cut off: {why}", code="slow_client")
        self._stop("slow_client")
        self._events.clear()
        self._task.cancel()

    async def _progress(self) -> bool:
        """Returns when there are events, an end, or an error; False when the client is gone."""
        if not (self._events or self._error is not None or self._left or not self._open):
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return not self._left

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _gone(self) -> None:
        """Returns when the client is."""
        while not self._left:
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter

    def _watch(self, receive: Receive) -> asyncio.Task[None]:
        """For the client's leaving, where the connection does not tell of it."""
        watch = asyncio.create_task(_until_disconnect(receive))
        watch.add_done_callback(lambda done: None if done.cancelled() else self._client_left())
        return watch

    def _client_left(self) -> None:
        self._left = True
        self._stop("client")
        self._wake()

    def _start_next(self) -> None:
        if self._next < len(self.choices) and self._error is None and not self._left:
            choice = self.choices[self._next]
            self._next += 1
            choice.stream.start()

    def _stop(self, reason: str) -> None:
        for choice in self.choices:
            choice.stream.stop(reason)

    def _let_go(self) -> None:
        """Of all that holds it: no request is left to the garbage collector."""
        self._task = self._waiter = None
        for choice in self.choices:
            choice.let_go()
        self.choices = []

    def usage(self) -> Usage:
        """So far."""
        per_prompt = self.choices[:: self.request.choices]
        return Usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.stream.num_cached for choice in per_prompt),
            sum(choice.reasoning_tokens for choice in self.choices),
        )

    def _finish(self, status: int, scope: Scope) -> None:
        now_s = self._shared.clock.now_s()
        usage = self.usage()
        own = self._own
        own.e2e.observe(now_s - self._arrived_s)
        if self._first_s is None:
            self._queued(now_s)
        if status == 200:
            for choice in self.choices:
                own.succeeded[choice.finish.reason] += 1
        own.prompt_tokens.observe(usage.prompt_tokens)
        own.generation_tokens.observe(usage.completion_tokens)
        own.cached_tokens += usage.cached_tokens
        self._metrics.count("requests", scope["path"], str(status))
        if self._error is not None:
            self._metrics.count("errors", self._error.code or str(status))
        if self.span is not None:
            self.span.finish(self.text.info.name, usage, self._error, left=self._left)
        if access.isEnabledFor(logging.INFO):
            self._log(status, scope["path"], usage, now_s)

    def _log(self, status: int, path: str, usage: Usage, now_s: float) -> None:
        ttft_ms = None if self._first_s is None else round(1000 * (self._first_s - self._arrived_s), 1)
        said = (
            path,
            status,
            self.text.info.name,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            "-" if ttft_ms is None else ttft_ms,
            round(1000 * (now_s - self._arrived_s), 1),
        )
        error = None if self._error is None else self._error.message
        fields = dict(zip(_SAID, said, strict=True)) | {"ttft_ms": ttft_ms, "error": error}
        access.info(
            "%s %s %d model=%s prompt=%d cached=%d output=%d ttft_ms=%s e2e_ms=%s%s",
            self._request_id,
            *said,
            f" error={error!r}" if error is not None else "",
            extra={"request_id": self._request_id, "fields": fields},
        )


def _format(request: CompletionRequest | ChatCompletionRequest, *, id: str, created_s: int, model: str) -> Format:
    chat = isinstance(request, ChatCompletionRequest)
    return Format(
        id=f"{'chatcmpl' if chat else 'cmpl'}-{id}",
        created_s=created_s,
        model=model,
        chat=chat,
        stream=bool(request.stream),
        usage_in_stream=request.wants_usage,
    )


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(scope: Scope, send: Send, status: int, body: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    with Together(scope):
        await send({"type": "http.response.start", "status": status, "headers": raw + headers})
        await send({"type": "http.response.body", "body": body})


def _raw(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.lower().encode(), value.encode("ascii", "replace")) for name, value in headers.items()]
