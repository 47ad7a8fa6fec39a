"""One request's generation: its sequences' tokens become text, events or one document, and reach the client.

Created by the HTTP handlers when a request is valid; it is the ASGI response. The status line waits for the first
token or the final failure, so that errors keep their status codes. When the client leaves, at any
moment, the sequences end on their nodes at once.
"""

from __future__ import annotations

import asyncio
import logging
import time

import msgspec
from starlette.types import Receive, Scope, Send

from pd_serve.api.errors import APIError
from pd_serve.api.responses import DONE, Format, Usage, error_event
from pd_serve.api.sampling import choice_seed, sampling_params
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest
from pd_serve.api.text_model import Prompt
from pd_serve.router.choice import Choice
from pd_serve.router.metrics import Metrics
from pd_serve.router.nodes import Group
from pd_serve.router.sequence import Shared

access = logging.getLogger("pd_serve.access")

# Sequences of one request that run at a time: a list of 1,000 prompts neither fills the nodes' queues nor fails.
_WINDOW = 64
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # proxies must not collect tokens
]


class Generation:
    def __init__(
        self,
        *,
        request: CompletionRequest | ChatCompletionRequest,
        prompts: list[Prompt],
        group: Group,
        shared: Shared,
        metrics: Metrics,
        request_id: str,
        arrived_s: float,
    ) -> None:
        """Raises APIError(400) when the sampling fields do not fit the model."""
        self.request = request
        self.group = group
        self.chat = isinstance(request, ChatCompletionRequest)
        self.stream = bool(request.stream)
        self.started = False  # the client has a token, or will at once
        self.format = Format(
            id=f"{'chatcmpl' if self.chat else 'cmpl'}-{request_id}",
            created_s=int(time.time()),
            model=group.info.name,
            chat=self.chat,
            stream=self.stream,
            usage_in_stream=request.wants_usage,
        )
        self.choices: list[Choice] = []
        for prompt in prompts:
            sampling = sampling_params(request, group.text, len(prompt.ids))
            for number in range(request.choices):
                own = msgspec.structs.replace(sampling, seed=choice_seed(sampling.seed, number)) if number else sampling
                self.choices.append(Choice(self, len(self.choices), prompt, own, shared, request_id))
        self._prompts = prompts
        self._shared = shared
        self._metrics = metrics
        self._own = metrics.models[group.info.name]
        self.observe_itl = self._own.itl.observe
        self._request_id = request_id
        self._arrived_s = arrived_s
        self._first_s: float | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._events: list[bytes] = []
        self._error: APIError | None = None
        self._left = False  # the client is gone
        self._open = len(self.choices)
        self._next = 0

    # --- called by choices ----------------------------------------------------------------------------

    def first_token(self, now_s: float) -> None:
        self.started = True
        self._first_s = now_s
        self._own.ttft.observe(now_s - self._arrived_s)

    def emit(self, event: bytes) -> None:
        self._events.append(event)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

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
        watch = asyncio.create_task(_until_disconnect(receive))
        watch.add_done_callback(self._client_left)
        self._own.in_flight += 1
        status = 500
        try:
            for _ in range(min(_WINDOW, len(self.choices))):
                self._start_next()
            status = await (self._stream(send) if self.stream else self._document(send))
        finally:
            self._stop("client")
            watch.cancel()
            self._own.in_flight -= 1
            self._finish(499 if self._left else status, scope)

    async def _stream(self, send: Send) -> int:
        if not await self._progress():
            return 499
        if not self._events:
            return await self._send_error(send)
        await send({"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS})
        while True:
            if self._events:
                events, self._events = self._events, []
                body = events[0] if len(events) == 1 else b"".join(events)
                await send({"type": "http.response.body", "body": body, "more_body": True})
                continue
            if self._error is not None or not self._open:
                break
            if not await self._progress():
                return 499
        if self._error is not None:
            await send({"type": "http.response.body", "body": error_event(self._error.body(self._request_id))})
            return self._error.status
        tail = self.format.usage(self._usage()) + DONE if self.request.wants_usage else DONE
        await send({"type": "http.response.body", "body": tail})
        return 200

    async def _document(self, send: Send) -> int:
        while self._open and self._error is None:
            if not await self._progress():
                return 499
        if self._error is not None:
            return await self._send_error(send)
        extra = self._prompts[0].ids if self.chat and self.request.return_token_ids else None
        choices = [choice.document() for choice in self.choices]
        await _send_json(send, 200, self.format.document(choices, self._usage(), prompt_token_ids=extra), {})
        return 200

    async def _send_error(self, send: Send) -> int:
        assert self._error is not None
        await _send_json(send, self._error.status, self._error.body(self._request_id), self._error.headers())
        return self._error.status

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

    def _client_left(self, watch: asyncio.Task[None]) -> None:
        if not watch.cancelled():
            self._left = True
            self._stop("client")
            self._wake()

    def _start_next(self) -> None:
        if self._next < len(self.choices) and self._error is None and not self._left:
            choice = self.choices[self._next]
            self._next += 1
            choice.sequence.start()

    def _stop(self, reason: str) -> None:
        for choice in self.choices:
            choice.sequence.stop(reason)

    def _usage(self) -> Usage:
        per_prompt = self.choices[:: self.request.choices]
        return Usage(
            sum(len(prompt.ids) for prompt in self._prompts),
            sum(choice.num_tokens for choice in self.choices),
            sum(choice.sequence.num_cached for choice in per_prompt),
        )

    def _finish(self, status: int, scope: Scope) -> None:
        now_s = self._shared.clock.now_s()
        usage = self._usage()
        own = self._own
        own.e2e.observe(now_s - self._arrived_s)
        own.prompt_tokens.observe(usage.prompt_tokens)
        own.generation_tokens.observe(usage.completion_tokens)
        own.cached_tokens += usage.cached_tokens
        self._metrics.count("requests", scope["path"], str(status))
        if self._error is not None:
            self._metrics.count("errors", self._error.code or str(status))
        ttft = "-" if self._first_s is None else f"{1000 * (self._first_s - self._arrived_s):.1f}"
        access.info(
            "%s %s %d model=%s prompt=%d cached=%d output=%d ttft_ms=%s e2e_ms=%.1f%s",
            self._request_id,
            scope["path"],
            status,
            self.group.info.name,
            usage.prompt_tokens,
            usage.cached_tokens,
            usage.completion_tokens,
            ttft,
            1000 * (now_s - self._arrived_s),
            f" error={self._error.message!r}" if self._error is not None else "",
        )


async def _until_disconnect(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _send_json(send: Send, status: int, body: bytes, headers: dict[str, str]) -> None:
    raw = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    raw += [(name.lower().encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
