"""SGLang, unmodified, with ``--disaggregation-mode prefill`` and ``decode``.

Both servers get the same request at once, with the address of the prefill server's bootstrap and a room of their own;
what is between them is theirs. The prefill server's answer has the first token, which the decode server tells again:
whichever comes first goes to the client. A prefill that fails ends the attempt, and with it its decode, which would
wait: SGLang's own router leaves that to a time-out.

Written after SGLang's documentation and its own load balancer; tokens go in and come out over ``/generate``.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import msgspec

from pd_serve.router.backends import texts
from pd_serve.router.backends.base import Place, Unfit
from pd_serve.router.backends.events import StreamAnswer
from pd_serve.router.backends.http import Server
from pd_serve.router.backends.served import (
    Facts,
    Served,
    ServedLink,
    Unable,
    Work,
    headers_of,
    load_of,
    tokens_of,
    why_not,
)
from pd_serve.wire import link as wire

_GENERATE = "/generate"
_BOOTSTRAP_PORT = 8998  # SGLang's default
# What SGLang's own warm-up asks a prefill server with: nobody is to read the KV.
_NOBODY = "2.2.2.2"
_MODES = {"prefill": "prefill", "decode": "decode", "both": "null"}


class _Info(msgspec.Struct):
    """Of the server's settings."""

    version: str = ""
    disaggregation_mode: str = ""
    disaggregation_bootstrap_port: int = _BOOTSTRAP_PORT
    model_path: str = ""
    context_length: int | None = None


class _Finish(msgspec.Struct):
    type: str
    matched: int | str | list[int] | None = None
    message: str = ""


_Logprob = tuple[float | None, int, str | None]


class _Meta(msgspec.Struct):
    finish_reason: _Finish | None = None
    completion_tokens: int = 0
    cached_tokens: int = 0
    output_token_logprobs: list[_Logprob] = []
    output_top_logprobs: list[list[_Logprob] | None] = []
    input_token_logprobs: list[_Logprob] = []
    input_top_logprobs: list[list[_Logprob] | None] = []


class _Event(msgspec.Struct):
    output_ids: list[int] = []
    meta_info: _Meta = msgspec.field(default_factory=_Meta)
    error: msgspec.Raw = msgspec.Raw()


_event = msgspec.json.Decoder(_Event).decode


class SGLang(Served):
    kind = "sglang"
    title = "SGLang"

    async def greet(self, server: Server, place: Place) -> tuple[Facts, Callable[[wire.Hello, texts.Text], SGLangLink]]:
        model = await self.models(server)
        info = _Info()
        for path in ("/server_info", "/get_server_info"):  # the newer name first
            status, body = await server.get(path, self.settings.connect_timeout_s)
            if status == 200:
                info = msgspec.json.decode(body, type=_Info)
                break
        if info.disaggregation_mode and info.disaggregation_mode != _MODES[place.role]:
            raise Unfit(
                f"it was started with --disaggregation-mode {info.disaggregation_mode}, and is listed for {place.role}"
            )
        limit = model.max_model_len or info.context_length or 0
        facts = Facts(model.id, limit, info.model_path or model.root or "", info.version)

        def make(hello: wire.Hello, text: texts.Text) -> SGLangLink:
            return SGLangLink(self, server, hello, text, info.disaggregation_bootstrap_port)

        return facts, make


class SGLangLink(ServedLink):
    def __init__(self, backend: SGLang, server: Server, hello: wire.Hello, text: texts.Text, port: int) -> None:
        super().__init__(backend, server, hello, text)
        self.bootstrap = urlsplit(hello.url).hostname or "", port

    def cannot(self, sampling: wire.SamplingParams) -> str:
        for name in ("bad_words", "allowed_token_ids"):
            if getattr(sampling, name):
                return f"'{name}' are not passed on to SGLang: leave them out"
        return why_not(sampling.grammar)

    def work(self, submit: wire.Submit) -> Work:
        if submit.handoff:
            return Prefill(self, submit, self.bootstrap)
        if submit.source is not None:
            source = self.backend.links.get(submit.source.node_id)
            if isinstance(source, SGLangLink):
                return Decode(self, submit, source.bootstrap)
            return Unable(self, submit, "its prefill server has left", kind="internal")
        if self.hello.role == "decode":
            return Unable(self, submit, "it computes no prompts, and no prefill server is there", kind="refused")
        return Answer(self, submit, (_NOBODY, self.bootstrap[1]) if self.hello.role == "prefill" else None)

    def load(self, samples: Mapping[str, float]) -> wire.Load:
        waiting, running = (int(samples.get(f"sglang:num_{what}_reqs", 0)) for what in ("queue", "running"))
        total = int(samples.get("sglang:max_total_num_tokens", 0))
        return load_of(waiting, running, total, samples.get("sglang:token_usage", 0.0))


class Answer(Work, StreamAnswer):
    """A request, and its answer token by token. Each event tells all tokens, or new ones alone, as the server was
    started; which, their count says."""

    link: SGLangLink

    def __init__(self, link: SGLangLink, submit: wire.Submit, bootstrap: tuple[str, int] | None) -> None:
        Work.__init__(self, link, submit)
        StreamAnswer.__init__(self)
        self._bootstrap = bootstrap
        self.made = 0

    def start(self) -> None:
        submit = self.submit
        asked = submit.sampling
        document: dict[str, Any] = {
            "rid": f"{submit.id}-{self.link.hello.role}",
            "input_ids": tokens_of(submit),
            "sampling_params": _sampling(submit),
            "stream": True,
        }
        if asked.logprobs >= 0 or asked.prompt_logprobs >= 0:
            document["return_logprob"] = True
            document["top_logprobs_num"] = max(asked.logprobs, asked.prompt_logprobs, 0)
            document["logprob_start_len"] = 0 if asked.prompt_logprobs >= 0 else -1
        if self._bootstrap is not None:
            host, port = self._bootstrap
            document |= {"bootstrap_host": host, "bootstrap_port": port, "bootstrap_room": _room(submit.id)}
        body = msgspec.json.encode(document)
        self.exchange = self.link.server.post(_GENERATE, body, self, headers_of(submit))

    def take(self, event: bytes) -> str | None:
        try:
            said = _event(event)
        except msgspec.DecodeError as error:
            return f"an event that cannot be read: {error}"
        if bytes(said.error) not in (b"", b"null"):
            return event[:300].decode(errors="replace")
        finish = said.meta_info.finish_reason
        if finish is not None and finish.type not in ("stop", "length"):
            return finish.message or f"it ended the request: {finish.type}"
        self.told(self._output(said, finish))
        return None

    @property
    def ends(self) -> set[int]:
        """Tokens that end it."""
        asked = self.submit.sampling
        return {*asked.stop_token_ids, *(() if asked.ignore_eos else self.link.hello.model.eos_token_ids)}

    def told(self, output: wire.Output) -> None:
        self.complete = output.finish is not None
        if self.complete and output.tokens and output.tokens[-1] in self.ends:
            output.finish = "stop"  # a prefill server says "length" of all
        if output.tokens or self.complete:
            self.say(output)
        if self.complete:
            self.finished()

    def failed(self, kind: str, message: str, *, lost: bool) -> None:
        self.fail(kind, message)

    def _output(self, said: _Event, finish: _Finish | None) -> wire.Output:
        meta, asked = said.meta_info, self.submit.sampling
        known = self.made if len(said.output_ids) == meta.completion_tokens else 0
        tokens = said.output_ids[known:]
        matched = finish.matched if finish is not None and isinstance(finish.matched, int) else None
        logprobs = None
        if asked.logprobs >= 0:
            skip = known if len(meta.output_token_logprobs) == len(said.output_ids) else 0
            logprobs = _logprobs(meta.output_token_logprobs[skip:], meta.output_top_logprobs[skip:], asked.logprobs)
            logprobs = (logprobs + [_unknown(token) for token in tokens[len(logprobs) :]])[: len(tokens)]
        if matched is not None and (not tokens or tokens[-1] != matched):  # some versions leave it out
            tokens = [*tokens, matched]
            logprobs = [*logprobs, _unknown(matched)] if logprobs is not None else None
        output = wire.Output(self.submit.id, self.submit.num_output + self.made, tokens, logprobs)
        if not self.made:
            output.num_cached = meta.cached_tokens
            if asked.prompt_logprobs >= 0:
                output.prompt_logprobs = _prompt_logprobs(meta, self.submit)
        output.finish = finish.type if finish is not None else None
        output.stop_token = matched if matched in asked.stop_token_ids else None
        self.made += len(tokens)
        return output


class Prefill(Answer):
    """Its one token; that its request ends means nothing."""

    computing = True

    def told(self, output: wire.Output) -> None:
        self.complete = output.finish is not None
        self.computing = False
        output.tokens, output.finish = output.tokens[:1], None
        output.logprobs = output.logprobs[:1] if output.logprobs is not None else None
        if output.tokens and output.tokens[0] not in self.ends:  # else the decode server tells of the end
            self.say(output)
        if self.complete:
            self.finished()


class Decode(Answer):
    def start(self) -> None:
        self.say_soon(wire.Output(self.submit.id, self.submit.num_output, [], event="accepted"))
        super().start()

    def told(self, output: wire.Output) -> None:
        if output.index == self.submit.num_output:
            output.event = "arrived"
        super().told(output)

    def failed(self, kind: str, message: str, *, lost: bool) -> None:
        self.fail("internal" if kind == "refused" else kind, message)  # it was taken to have accepted


def _room(key: str) -> int:
    """Unique as the key is; both servers have to get the same."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") >> 1


def _sampling(submit: wire.Submit) -> dict[str, Any]:
    asked, made = submit.sampling, submit.num_output
    count = asked.max_tokens - made
    found: dict[str, Any] = {
        "max_new_tokens": count,
        "temperature": asked.temperature,
        "top_k": asked.top_k or -1,
        "top_p": asked.top_p,
        "min_p": asked.min_p,
        "repetition_penalty": asked.repetition_penalty,
        "presence_penalty": asked.presence_penalty,
        "frequency_penalty": asked.frequency_penalty,
        "min_new_tokens": max(0, min(asked.min_tokens - made, count)),
        "ignore_eos": asked.ignore_eos,
    }
    if asked.stop_token_ids:
        found["stop_token_ids"] = asked.stop_token_ids
    if asked.logit_bias:
        found["logit_bias"] = {str(id): bias for id, bias in asked.logit_bias.items()}
    return found | ({} if asked.grammar is None else _structured(asked.grammar))


def _structured(grammar: wire.Grammar) -> dict[str, Any]:
    match grammar.kind:
        case "json_schema" | "json_object":
            return {"json_schema": grammar.text or '{"type": "object"}'}
        case "choice":
            return {"regex": "|".join(f"({re.escape(one)})" for one in msgspec.json.decode(grammar.text))}
        case "regex" | "structural_tag":
            return {grammar.kind: grammar.text}
    return {"ebnf": grammar.text}


def _unknown(token: int) -> wire.TokenLogprob:
    return wire.TokenLogprob(token, -9999.0, 0, [])


def _logprobs(own: list[_Logprob], tops: list[list[_Logprob] | None], count: int) -> list[wire.TokenLogprob]:
    found = []
    for place, (logprob, token, _) in enumerate(own):
        given = (tops[place] if place < len(tops) else None) or []
        top = [(id, value) for value, id, _ in given if value is not None]
        ranks = {id: rank for rank, (id, _) in enumerate(top, 1)}
        value = -9999.0 if logprob is None else logprob
        found.append(wire.TokenLogprob(token, value, ranks.get(token, len(top) + 1), top[: max(0, count)]))
    return found


def _prompt_logprobs(meta: _Meta, submit: wire.Submit) -> list[wire.TokenLogprob | None]:
    found: list[wire.TokenLogprob | None] = list(
        _logprobs(meta.input_token_logprobs, meta.input_top_logprobs, submit.sampling.prompt_logprobs)
    )
    count = len(submit.tokens) // 4
    found = [None, *found[1:]] if found else []
    return (found + [None] * count)[:count]
