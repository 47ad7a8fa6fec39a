"""One choice of a request: its stream's tokens as text, events or a part of the document, in the client's shape.

The sink of a stream. Called for every step, so the common case (a stream of text and nothing else) joins
bytes and does nothing more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from pd_serve.api.detokenizer import Detokenizer, StopMatcher
from pd_serve.api.errors import APIError
from pd_serve.api.logprobs import CompletionLogprobs, chat_logprobs, merge, prompt_logprobs
from pd_serve.api.outputs import ParserNames
from pd_serve.api.parsers.message import MessageParser
from pd_serve.api.responses import Finish, Format, Usage
from pd_serve.api.restrictions import salt_of
from pd_serve.api.schemas import ChatCompletionRequest, CompletionRequest
from pd_serve.api.text_model import Prompt, TextModel
from pd_serve.config import RouterConfig
from pd_serve.router.groups import Group
from pd_serve.router.spans import RequestSpan
from pd_serve.router.stream import Shared, Stream
from pd_serve.wire.link import Output, SamplingParams, TokenLogprob


class Answer(Protocol):
    """What a choice is a part of: its request's answer (see :mod:`pd_serve.router.writer`)."""

    request: CompletionRequest | ChatCompletionRequest
    text: TextModel
    group: Group
    format: Format
    chat: bool
    streamed: bool
    started: bool
    span: RequestSpan | None

    def first_token(self, now_s: float) -> None: ...

    def observe_itl(self, seconds: float) -> None: ...

    def emit(self, event: bytes) -> None: ...

    def choice_ended(self) -> None: ...

    def choice_failed(self, error: APIError) -> None: ...

    def usage(self) -> Usage: ...


class Choice:
    """One stream's output, as text in the client's shape. Sink of its stream."""

    def __init__(
        self,
        answer: Answer,
        index: int,
        prompt: Prompt,
        sampling: SamplingParams,
        shared: Shared,
        request_id: str,
    ) -> None:
        request = answer.request
        text_model = answer.text
        self._answer = answer
        self._index = index
        self._prompt = prompt
        self._tokenizer = text_model.tokenizer
        self._parser, shown = _parser(request, prompt, text_model, shared)
        skip = request.skip_special_tokens is not False
        self._detokenizer = Detokenizer(self._tokenizer, prompt.ids, skip_special_tokens=skip, shown=shown)
        self._include_stop = bool(request.include_stop_str_in_output)
        stops = request.stop_strings
        self._matcher = StopMatcher(stops, include=self._include_stop) if stops else None
        self._min_tokens = sampling.min_tokens
        self._return_ids = bool(request.return_token_ids)
        echo = isinstance(request, CompletionRequest) and bool(request.echo)
        self._echo = self._prompt_text(request) if echo else None
        # Scoring: the engine has to sample one token, the client asked for none.
        self._discard = isinstance(request, CompletionRequest) and request.max_tokens == 0
        self._logprobs: CompletionLogprobs | None = None
        self._ranked = request.ranked
        self._score = 0.0  # log-probabilities of its tokens, where some choices are to be chosen
        self._scored = request.logprobs is not None and request.logprobs is not False  # the client wants to see them
        self._as_ids = bool(request.return_tokens_as_token_ids)
        if not answer.chat and self._scored:
            self._logprobs = self._completion_logprobs(request, sampling.logprobs)
        # One step's text without anything else: the common case, made of bytes alone.
        self._running_usage = answer.streamed and request.wants_running_usage
        self._plain = answer.streamed and sampling.logprobs < 0 and not self._return_ids and not self._running_usage
        self._fresh = True  # nothing was emitted yet
        self._quick = False  # what comes next is text and nothing else, unless it ends
        self._last_s = 0.0
        self._texts: list[str] = []
        self._ids: list[int] = []
        self._scores: list[Any] = []
        self._finish: Finish | None = None
        self.num_tokens = 0
        self.stream = Stream(
            shared,
            answer.group,
            prompt.ids,
            sampling,
            self,
            request_id,
            priority=request.priority or 0,
            salt=salt_of(request.cache_salt),
            span=answer.span,
        )

    def _completion_logprobs(self, request: CompletionRequest | ChatCompletionRequest, tops: int) -> CompletionLogprobs:
        return CompletionLogprobs(
            self._tokenizer,
            tops=tops,
            skip_special_tokens=request.skip_special_tokens is not False,
            prompt_text=self._prompt.text,
            as_ids=self._as_ids,
        )

    def _prompt_text(self, request: CompletionRequest | ChatCompletionRequest) -> str:
        if self._prompt.text is not None:
            return self._prompt.text
        return self._tokenizer.decode(self._prompt.ids, skip_special_tokens=request.skip_special_tokens is not False)

    def let_go(self) -> None:
        """It and its stream, which has ended, hold each other no more."""
        del self.stream

    # --- sink -----------------------------------------------------------------------------------------

    @property
    def started(self) -> bool:
        return self._answer.started

    def failed(self, error: APIError) -> None:
        self._answer.choice_failed(error)

    def received(self, output: Output, now_s: float) -> None:
        answer = self._answer
        if self._last_s:
            answer.observe_itl(now_s - self._last_s)
        else:
            answer.first_token(now_s)
        self._last_s = now_s
        tokens, logprobs = output.tokens, output.logprobs
        if self._quick and output.finish is None:
            self.num_tokens += len(tokens)
            answer.emit(answer.format.text(self._index, self._detokenizer.push(tokens)))
            return
        end = None if output.finish is None else Finish(output.finish, output.stop_token)
        if self._discard:
            tokens, logprobs, end = [], [] if logprobs is not None else None, Finish("length", None)
        if self._matcher is None or len(tokens) <= 1:
            self._step(tokens, logprobs, end)
            return
        # Token by token, so that what counts as output ends where the stop string does.
        for place, token in enumerate(tokens):
            last = place == len(tokens) - 1
            self._step([token], None if logprobs is None else [logprobs[place]], end if last else None)
            if self._finish is not None:
                return

    @property
    def finish(self) -> Finish:
        """Of a choice that has ended well."""
        assert self._finish is not None
        return self._finish

    def _step(self, tokens: list[int], logprobs: list[TokenLogprob] | None, finish: Finish | None) -> None:
        self.num_tokens += len(tokens)
        # The token that stopped it (EOS or a stop token) is no text, unless asked for.
        silent = finish is not None and finish.reason == "stop" and not self._include_stop
        delta = self._detokenizer.push(tokens[:-1] if silent else tokens)
        if finish is not None:
            delta += self._detokenizer.finish()
        matcher = self._matcher
        if matcher is not None:
            delta = matcher.push(delta, armed=self.num_tokens >= self._min_tokens)
            if matcher.matched is not None:
                finish = Finish("stop", matcher.matched)
                self.stream.stop("stop_string")
            elif finish is not None:
                delta += matcher.finish()
        if self._parser is not None:
            self._parsed(self._parser, delta, tokens, logprobs, finish)
        elif self._plain and finish is None and not self._fresh:  # with stop strings: see received
            self._answer.emit(self._answer.format.text(self._index, delta))
            return
        else:
            self._keep_or_emit(delta, tokens, logprobs, finish)
            self._quick = self._plain and matcher is None and not self._discard
        if finish is not None:
            self._finish = finish
            self._answer.choice_ended()

    def _parsed(
        self,
        parser: MessageParser,
        text: str,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        finish: Finish | None,
    ) -> None:
        """A step whose text may be reasoning or calls: none, one or several parts of the message."""
        deltas = parser.feed(text, len(tokens))
        if finish is not None:
            deltas += parser.finish()
        if deltas or finish is not None or not self._plain:
            self._keep_or_emit("", tokens, logprobs, self._as_told(finish), deltas)

    def _as_told(self, finish: Finish | None) -> Finish | None:
        if self._parser is not None and self._parser.called and finish is not None and finish.reason == "stop":
            return Finish("tool_calls", finish.stop)
        return finish

    def _keep_or_emit(
        self,
        delta: str,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        finish: Finish | None,
        messages: Sequence[dict[str, Any]] | None = None,
    ) -> None:
        """``messages``: what a parser made of the text; None: there is none, and it is content."""
        answer = self._answer
        fresh, self._fresh = self._fresh, False
        scores: Any = None
        if self._ranked:
            self._score += sum(entry.logprob for entry in logprobs or ())
            logprobs = logprobs if self._scored else None
        if fresh and self._echo is not None:
            delta = self._echo + delta
        if self._logprobs is not None:
            parts = []
            if fresh and self._echo is not None:
                parts.append(self._logprobs.add(self._prompt.ids, self.stream.prompt_logprobs or []))
            if fresh:
                self._logprobs.after_prompt(self._prompt.ids, len(self._echo or ""))
            parts.append(self._logprobs.add(tokens, logprobs or []))
            scores = merge(parts)
        elif logprobs is not None:
            scores = chat_logprobs(self._tokenizer, logprobs, as_ids=self._as_ids)
        if not answer.streamed:
            self._texts.append(delta)
            self._ids.extend(tokens)
            if scores is not None:
                self._scores.append(scores)
            return
        prompt_ids = self._prompt.ids if fresh and self._return_ids else None
        event = b""
        usage = answer.usage() if self._running_usage else None
        if answer.chat:
            if fresh:
                event = answer.format.first(self._index, prompt_ids, usage=usage)
            prompt_ids = None
            scores = {"content": scores} if scores is not None else None
        if fresh and self._plain and finish is None and messages is None:
            answer.emit(event + answer.format.text(self._index, delta))
            return
        *before, message = [None] if messages is None else messages or [{}]
        for part in before:
            event += answer.format.chunk(self._index, "", message=part)
        event += answer.format.chunk(
            self._index,
            delta,
            message=message,
            logprobs=scores,
            finish=finish,
            token_ids=tokens if self._return_ids else None,
            prompt_token_ids=prompt_ids,
            usage=usage,
        )
        answer.emit(event)

    @property
    def reasoning_tokens(self) -> int:
        return 0 if self._parser is None else self._parser.reasoning_tokens

    def prompt_scores(self) -> list[dict[str, dict[str, Any]] | None] | None:
        """``prompt_logprobs``, where they were asked for."""
        wanted = self._answer.request.prompt_logprobs
        if wanted is None:
            return None
        return prompt_logprobs(self._tokenizer, self.stream.prompt_logprobs or [], wanted)

    @property
    def likelihood(self) -> float:
        """Log-probability a token, of a choice that has ended; the first of OpenAI's ``best_of`` has the highest."""
        return self._score / max(1, self.num_tokens)

    def document(self, index: int) -> dict[str, Any]:
        """The whole choice, of a request that is not streamed; ``index``: its place in the answer."""
        chat = self._answer.chat
        scores: Any = None
        if self._scores:
            scores = {"content": [e for part in self._scores for e in part]} if chat else merge(self._scores)
        return self._answer.format.final(
            index,
            "".join(self._texts),
            message=None if self._parser is None else self._parser.message(),
            logprobs=scores,
            finish=self._as_told(self.finish) or self.finish,
            token_ids=self._ids if self._return_ids else None,
            prompt_token_ids=self._prompt.ids if self._return_ids and not chat else None,
            prompt_logprobs=None if chat else self.prompt_scores(),
        )


def _parser(
    request: CompletionRequest | ChatCompletionRequest, prompt: Prompt, text: TextModel, shared: Shared
) -> tuple[MessageParser | None, frozenset[int]]:
    """What tells a chat's output apart, where anything does, and the special tokens that it has to see."""
    if not isinstance(request, ChatCompletionRequest):
        return None, frozenset()
    names = parser_names(shared.settings)
    parser = text.outputs.message_parser(request, prompt.ids, names)
    return parser, frozenset() if parser is None else text.outputs.shown_specials(names)


def parser_names(settings: RouterConfig) -> ParserNames:
    return ParserNames(settings.tool_call_parser, settings.reasoning_parser)
