"""vLLM, unmodified, with NixlConnector, pd-serve's connector, or another one that speaks ``kv_transfer_params``.

Prefill, then decode: the prefill server is asked for one token and answers with ``kv_transfer_params``, which go to the
decode server as they are. With NixlConnector that one computes the last prompt token again and samples the first token
itself; the prefill server's token is dropped, and never part of the decode server's prompt: at a multiple of its block
size that would end its engine. Where the params have a key ``pd_serve``, the connector is pd-serve's: the first token
goes to the client at once, and decoding goes on after it.

Tokens go in and come out over ``/inference/v1/generate``, or over ``/v1/completions`` where a server lacks it; which,
a request for one token at the begin of a link says.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from pd_serve.router.backends import texts
from pd_serve.router.backends.base import Place, Unfit
from pd_serve.router.backends.events import Events, StreamAnswer
from pd_serve.router.backends.handover import Handed
from pd_serve.router.backends.http import Server, Whole
from pd_serve.router.backends.served import (
    Facts,
    Served,
    ServedLink,
    Work,
    failure_of,
    headers_of,
    load_of,
    tokens_of,
    why_not,
)
from pd_serve.router.backends.vllm_words import (
    KEEP,
    Answered,
    Choice,
    Params,
    answered,
    is_ours,
    logprobs_of,
    prompt_logprobs_of,
    raw_of,
    sampling_of,
)
from pd_serve.wire import link as wire

log = logging.getLogger(__name__)

GENERATE, COMPLETIONS = "/inference/v1/generate", "/v1/completions"
_PROBE_S = 60.0  # a first token may compile something
_RELEASE_S = 30.0  # vLLM's lease
# A request that is left before its first token is waited for so long: the engine has it then, and gives back what the
# prefill server keeps for it. vLLM forgets one that it has not handed to its engine yet.
_GRACE_S = 0.5
_SUSPECT = 3
_LINGER_S = 0.25  # what a prefill that nobody wants may go on, because its answer may be under way


class VLLM(Served):
    kind = "vllm"
    title = "vLLM"

    async def greet(self, server: Server, place: Place) -> tuple[Facts, Callable[[wire.Hello, texts.Text], VLLMLink]]:
        model = await self.models(server)
        status, body = await server.get("/version", self.settings.connect_timeout_s)
        version = str(msgspec.json.decode(body).get("version", "")) if status == 200 else ""
        facts = Facts(model.id, model.max_model_len or 0, model.root or "", version)
        whole, streamed = await _doors(server, facts.name)

        def make(hello: wire.Hello, text: texts.Text) -> VLLMLink:
            return VLLMLink(self, server, hello, text, whole, streamed)

        return facts, make


async def _doors(server: Server, model: str) -> tuple[str, str]:
    """Paths for whole answers and for streamed ones. Raises OSError, Unfit."""
    body = msgspec.json.encode(
        {"model": model, "token_ids": [1], "sampling_params": {"max_tokens": 1, "temperature": 0.0}, "stream": True}
    )
    status, kind, answer = await server.ask(GENERATE, body, _PROBE_S)
    if status == 200:
        if kind != "text/event-stream":
            return GENERATE, COMPLETIONS
        events = [answered(event) for event in Events().feed(answer) if event != b"[DONE]"]
        if any(choice.token_ids for event in events for choice in event.choices):
            return GENERATE, GENERATE
    body = msgspec.json.encode({"model": model, "prompt": [1], "max_tokens": 1, "return_token_ids": True})
    status, _, answer = await server.ask(COMPLETIONS, body, _PROBE_S)
    if status != 200:
        raise Unfit(f"{COMPLETIONS}: {failure_of(status, answer)[1]}")
    if not all(choice.token_ids for choice in answered(answer).choices):
        raise Unfit(f"neither {GENERATE} nor {COMPLETIONS} tells token ids: it needs vLLM 0.11 or later")
    return COMPLETIONS, COMPLETIONS


class VLLMLink(ServedLink):
    def __init__(
        self, backend: VLLM, server: Server, hello: wire.Hello, text: texts.Text, whole: str, streamed: str
    ) -> None:
        super().__init__(backend, server, hello, text)
        self.whole = whole
        self.streamed = streamed
        self._kept_nothing = 0  # answers in a row

    def keeps(self, params: bytes) -> None:
        """Of each prompt that it was to keep: without a connector every prompt would be computed twice, in silence."""
        self._kept_nothing = 0 if params else self._kept_nothing + 1
        if self._kept_nothing == _SUSPECT:
            log.warning(
                "the prefill server at %s keeps no KV for decode servers (%d answers without kv_transfer_params): "
                "they compute every prompt again. Was it started with --kv-transfer-config?",
                self.server.url,
                _SUSPECT,
            )

    def cannot(self, sampling: wire.SamplingParams) -> str:
        if sampling.bad_words:
            return "'bad_words' are not passed on to vLLM: leave them out"
        return why_not(sampling.grammar)

    def work(self, submit: wire.Submit) -> Work:
        if submit.handoff:
            return Prefill(self, submit)
        return Decode(self, submit) if submit.source is not None else Alone(self, submit)

    def load(self, samples: Mapping[str, float]) -> wire.Load:
        waiting, running = (int(samples.get(f"vllm:num_requests_{what}", 0)) for what in ("waiting", "running"))
        blocks = int(samples.get("vllm:cache_config_info:num_gpu_blocks", 0))
        share = samples.get("vllm:kv_cache_usage_perc", samples.get("vllm:gpu_cache_usage_perc", 0.0))
        return load_of(waiting, running, blocks, share)

    def body(
        self,
        path: str,
        submit: wire.Submit,
        *,
        extra: tuple[int, ...] = (),
        limit: int = 0,
        stream: bool,
        params: bytes,
    ) -> bytes:
        """A request. ``extra``: tokens after the submit's; ``limit``: of its output tokens, 0: what is left of it;
        ``params``: ``kv_transfer_params`` in JSON, empty: none."""
        tokens = [*tokens_of(submit), *extra]
        sampling = sampling_of(submit, len(extra), limit)
        document: dict[str, Any] = {"model": self.hello.model.name, "stream": stream}
        if path == GENERATE:
            if params:  # before vllm #42644 (so 0.24 and 0.28) what stands at the top is left aside
                sampling["extra_args"] = {"kv_transfer_params": msgspec.Raw(params)}
            document |= {"token_ids": tokens, "sampling_params": {**sampling, "detokenize": False}}
        else:
            document |= {"prompt": tokens, "return_token_ids": True, **sampling}
            if submit.sampling.logprobs >= 0:
                document["return_tokens_as_token_ids"] = True
        if submit.salt:
            document["cache_salt"] = submit.salt.hex()
        if params:
            document["kv_transfer_params"] = msgspec.Raw(params)
        return msgspec.json.encode(document)


class _VLLMWork(Work):
    link: VLLMLink

    def outputs_of(self, choice: Choice, index: int, num_cached: int) -> wire.Output:
        tokens = choice.token_ids or []
        sampling = self.submit.sampling
        logprobs = None
        if sampling.logprobs >= 0:
            logprobs = logprobs_of(choice.logprobs, tokens, sampling.logprobs)
        stop = choice.stop_reason if isinstance(choice.stop_reason, int) else None
        return wire.Output(
            self.submit.id, index, tokens, logprobs, choice.finish_reason, stop_token=stop, num_cached=num_cached
        )


class Prefill(_VLLMWork):
    """Computes the prompt and keeps its KV; one token comes with it."""

    computing = True

    def start(self) -> None:
        self._handover = self.link.backend.handovers.of(self.submit.id)
        self._handover.join()
        body = self.link.body(self.link.whole, self.submit, limit=1, stream=False, params=msgspec.json.encode(KEEP))
        whole = Whole()
        whole.done.add_done_callback(self._answered)
        self._begun_s = time.monotonic()
        self._only = sum(work.computing for work in self.link.works.values()) == 1
        self.exchange = self.link.server.post(self.link.whole, body, whole, headers_of(self.submit))

    def stop(self) -> None:
        """An answer that is under way says what is kept: only then can it be set free."""
        if self.computing and not self.link.closed.done():
            asyncio.get_running_loop().call_later(_LINGER_S, self._end)
        else:
            self._end()

    def _end(self) -> None:
        super().stop()
        self._leave()

    def _leave(self) -> None:
        if self.computing:
            self.computing = False
            self._handover.leave()

    def _answered(self, whole: asyncio.Future[tuple[int, str, bytes]]) -> None:
        if not self.computing:
            return
        error = whole.exception()
        if error is not None:
            self.fail("internal", str(error))
        else:
            status, _, body = whole.result()
            if status != 200:
                self.fail(*failure_of(status, body))
            else:
                try:
                    self._take(answered(body))
                except (msgspec.DecodeError, IndexError) as wrong:
                    self.fail("internal", f"an answer that cannot be read: {wrong}")
        self._leave()

    def _take(self, answer: Answered) -> None:
        choice = answer.choices[0]
        base, prompt = self.submit.num_output, self.prompt_tokens
        node, took_s = self.link.node, time.monotonic() - self._begun_s
        params = raw_of(answer.kv_transfer_params)
        read = msgspec.json.decode(params, type=Params) if params else Params()
        cached = read.remote_prefill_cached_tokens or answer.num_cached
        if self._only and node is not None:
            node.computed(prompt - cached, took_s)
        if self.submit.sampling.prompt_logprobs >= 0:
            found = prompt_logprobs_of(answer.prompt_logprobs or choice.prompt_logprobs, self.submit)
            self.say(wire.Output(self.submit.id, base, [], prompt_logprobs=found))
        # an engine that begins after the first token would begin its grammar there, too
        ours = is_ours(read.pd_serve, prompt) and self.submit.sampling.grammar is None
        first = tuple(choice.token_ids or ()) if ours else ()
        ended = choice.finish_reason == "stop" and (ours or not params)
        if ended or first:
            output = self.outputs_of(choice, base, cached)
            output.finish = output.finish if ended else None
            self.say(output)
        if ended:
            self.finished()
            return
        self.link.keeps(params)
        self._handover.hand(Handed(params, first, cached))
        self.finished()


class _Streamed(_VLLMWork, StreamAnswer):
    """An answer that comes token by token."""

    index = 0
    num_cached = 0
    event: str | None = None  # said with the first tokens

    @property
    def known(self) -> bool:
        """Its engine has said something."""
        return self.index > self.began

    def ask(self, extra: tuple[int, ...], params: bytes) -> None:
        StreamAnswer.__init__(self)
        self.began = self.index = self.submit.num_output + len(extra)
        link = self.link
        body = link.body(link.streamed, self.submit, extra=extra, stream=True, params=params)
        self.exchange = link.server.post(link.streamed, body, self, headers_of(self.submit))

    def take(self, event: bytes) -> str | None:
        try:
            answer = answered(event)
        except msgspec.DecodeError as error:
            return f"an event that cannot be read: {error}"
        if raw_of(answer.error):
            return failure_of(200, event)[1].partition(": ")[2]
        if not answer.choices:
            return None
        choice = answer.choices[0]
        if choice.finish_reason not in (None, "stop", "length"):
            return f"it ended the request: {choice.finish_reason}"
        if not choice.token_ids and choice.finish_reason is None:
            return None
        output = self.outputs_of(choice, self.index, self.num_cached if self.index == self.began else 0)
        self.index += len(output.tokens)
        output.event, self.event = self.event, None
        self.complete = choice.finish_reason is not None
        self.say(output)
        if self.complete:
            self.finished()
        return None


class Alone(_Streamed):
    """Everything on one server."""

    computing = True

    def start(self) -> None:
        if self.submit.sampling.prompt_logprobs >= 0:
            self._score()
        else:
            self.ask((), b"")

    def _score(self) -> None:
        """Log-probabilities of the prompt come with whole answers only."""
        body = self.link.body(self.link.whole, self.submit, stream=False, params=b"")
        whole = Whole()
        whole.done.add_done_callback(self._scored)
        self.exchange = self.link.server.post(self.link.whole, body, whole, headers_of(self.submit))

    def _scored(self, whole: asyncio.Future[tuple[int, str, bytes]]) -> None:
        error = whole.exception()
        status, _, body = (0, "", b"") if error is not None else whole.result()
        if error is not None or status != 200:
            self.fail(*(("internal", str(error)) if error is not None else failure_of(status, body)))
            return
        try:
            answer = answered(body)
            output = self.outputs_of(answer.choices[0], self.submit.num_output, answer.num_cached)
            found = answer.prompt_logprobs or answer.choices[0].prompt_logprobs
            output.prompt_logprobs = prompt_logprobs_of(found, self.submit)
        except (msgspec.DecodeError, IndexError) as wrong:
            self.fail("internal", f"an answer that cannot be read: {wrong}")
            return
        self.say(output)
        self.finished()

    def failed(self, kind: str, message: str, *, lost: bool) -> None:
        self.fail(kind, message)

    def take(self, event: bytes) -> str | None:
        self.computing = False
        return super().take(event)


class Decode(_Streamed):
    """Reads the prompt's KV from the prefill server, and goes on."""

    def start(self) -> None:
        self._handover = self.link.backend.handovers.of(self.submit.id)
        self._handover.join(self._release)
        self._joined = True
        self._paired = False  # it was told where the KV is
        self.say_soon(wire.Output(self.submit.id, self.submit.num_output, [], event="accepted"))
        self._handover.wait(self._go)

    def _go(self, handed: Handed) -> None:
        self._handover.taken()
        self._paired = bool(handed.params)
        self.num_cached = handed.num_cached
        self.event = "arrived" if self._paired else "local"
        self.ask(handed.first, handed.params)

    def take(self, event: bytes) -> str | None:
        wrong = super().take(event)
        if self.known or self.complete:
            self._leave()
        return wrong

    def stop(self) -> None:
        exchange, self.exchange = self.exchange, None
        if exchange is not None:
            if self._paired and not self.known and exchange.answer is not None and not self.link.closed.done():
                asyncio.get_running_loop().call_later(_GRACE_S, exchange.give_up)
            else:
                exchange.give_up()
        self._leave()

    def failed(self, kind: str, message: str, *, lost: bool) -> None:
        if kind == "refused" or self.exchange is None or not self.exchange.sent:
            self._handover.taken(False)
        if kind == "refused":
            kind = "internal"  # of this server: it was taken to have accepted
        elif kind == "internal" and self._paired and not self.known and not lost:
            kind = "transfer"
        self.fail(kind, message)
        self._leave()

    def _leave(self) -> None:
        if self._joined:
            self._joined = False
            self._handover.leave()

    def _release(self, handed: Handed) -> None:
        """Nobody wants what the prefill server keeps: a decode server that asks for one token of it sets it free."""
        self.link.backend.background(self._released(handed))

    async def _released(self, handed: Handed) -> None:
        own = self.link.hello
        for link in list(self.link.backend.links.values()):
            same = (link.hello.role, link.hello.model, link.hello.layout) == (own.role, own.model, own.layout)
            if same and isinstance(link, VLLMLink) and not link.closed.done():
                body = link.body(
                    link.whole, self.submit, extra=handed.first, limit=1, stream=False, params=handed.params
                )
                try:
                    if (await link.server.ask(link.whole, body, _RELEASE_S))[0] == 200:
                        return
                except OSError:
                    continue  # to the next
        log.info("%s: no decode server sets its KV free: the end of its lease will", self.submit.id)
