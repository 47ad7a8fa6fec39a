"""Answers as bytes: whole JSON documents, and server-sent events whose fixed parts are encoded once a request.

Called by the router's generation for every step of every choice, so ``chunk`` does nothing but join bytes in
the common case. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import msgspec

from pd_serve.api.errors import APIError

_json = msgspec.json.encode
_DONE = b"data: [DONE]\n\n"


class Usage(NamedTuple):
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int = 0

    def document(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }
        if self.reasoning_tokens:
            found["completion_tokens_details"] = {"reasoning_tokens": self.reasoning_tokens}
        return found


class Finish(NamedTuple):
    reason: str  # "stop" | "length" | "tool_calls"
    stop: str | int | None = None  # the stop string or stop token that ended it; None: EOS or length


class Format:
    """The events and the final document of one request. ``chat`` chooses the shape."""

    def __init__(
        self, *, id: str, created_s: int, model: str, chat: bool, stream: bool, usage_in_stream: bool = False
    ) -> None:
        self._chat = chat
        kind = ("chat.completion.chunk" if stream else "chat.completion") if chat else "text_completion"
        self._head = {"id": id, "object": kind, "created": created_s, "model": model}
        self._open = b"data: " + _json(self._head)[:-1]
        self._null_usage = b',"usage":null' if usage_in_stream else b""
        self._plain: dict[int, bytes] = {}
        text = b'{"index":%d,"delta":{"content":' if chat else b'{"index":%d,"text":'
        self._choice = b',"choices":[' + text
        self._tail = (
            (b"}" if chat else b"")
            + b',"logprobs":null,"finish_reason":null,"stop_reason":null}]'
            + self._null_usage
            + b"}\n\n"
        )

    def first(self, index: int, prompt_token_ids: Sequence[int] | None = None, *, usage: Usage | None = None) -> bytes:
        """Chat only: the event that names the role, before a choice's first text."""
        extra = b"" if prompt_token_ids is None else b',"prompt_token_ids":' + _json(prompt_token_ids)
        choice = b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}' % index
        return self._open + b',"choices":[' + choice + b"]" + self._usage(usage) + extra + b"}\n\n"

    def text(self, index: int, text: str) -> bytes:
        """One step's text and nothing else."""
        prefix = self._plain.get(index)
        if prefix is None:
            prefix = self._plain[index] = self._open + self._choice % index
        return prefix + _json(text) + self._tail

    def chunk(
        self,
        index: int,
        text: str,
        *,
        message: dict[str, Any] | None = None,
        logprobs: Any = None,
        finish: Finish | None = None,
        token_ids: Sequence[int] | None = None,
        prompt_token_ids: Sequence[int] | None = None,
        usage: Usage | None = None,
    ) -> bytes:
        """The general form. ``message``: a chat's delta, where it is more than text. ``usage``: so far.

        ``prompt_token_ids``: only with a completion's first event.
        """
        choice = self._make_choice(index, text, logprobs, finish, "delta", message)
        if token_ids is not None:
            choice["token_ids"] = token_ids
        if prompt_token_ids is not None:
            choice["prompt_token_ids"] = prompt_token_ids
        return self._open + b',"choices":[' + _json(choice) + b"]" + self._usage(usage) + b"}\n\n"

    def _usage(self, usage: Usage | None) -> bytes:
        return self._null_usage if usage is None else b',"usage":' + _json(usage.document())

    def end(self, usage: Usage) -> bytes:
        """After the last event of all choices."""
        if not self._null_usage:
            return _DONE
        return self._open + b',"choices":[],"usage":' + _json(usage.document()) + b"}\n\n" + _DONE

    def keep_alive(self) -> bytes:
        """While there is nothing to say."""
        return KEEP_ALIVE

    def error(self, error: APIError, request_id: str) -> bytes:
        """The document of an answer that did not begin."""
        return error.body(request_id)

    def error_event(self, error: APIError, request_id: str) -> bytes:
        """An error in the middle of a stream; the stream ends after it."""
        return b"data: " + self.error(error, request_id) + b"\n\n"

    def final(
        self,
        index: int,
        text: str,
        *,
        logprobs: Any,
        finish: Finish,
        token_ids: Sequence[int] | None,
        prompt_token_ids: Sequence[int] | None,
        prompt_logprobs: Any = None,
        message: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        """One choice of the whole document. ``message``: a chat's, where it is more than text."""
        choice = self._make_choice(index, text, logprobs, finish, "message", message)
        if token_ids is not None:
            choice["token_ids"] = token_ids
        if prompt_token_ids is not None:
            choice["prompt_token_ids"] = prompt_token_ids
        if prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs
        return choice

    def document(self, choices: list[dict[str, Any]], usage: Usage, **of_prompt: Any) -> bytes:
        """``of_prompt``: fields about the prompt, of chats, where all choices have the same; None: not given."""
        extra = {name: value for name, value in of_prompt.items() if value is not None}
        return _json({**self._head, "choices": choices, "usage": usage.document(), **extra})

    def _make_choice(
        self,
        index: int,
        text: str,
        logprobs: Any,
        finish: Finish | None,
        field: str,
        message: dict[str, Any] | None = None,
    ) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": index}
        if not self._chat:
            choice["text"] = text
        elif message is not None:
            choice[field] = message
        elif field == "delta":
            choice["delta"] = {"content": text}
        else:
            choice["message"] = {"role": "assistant", "content": text}
        choice["logprobs"] = logprobs
        choice["finish_reason"] = finish.reason if finish else None
        choice["stop_reason"] = finish.stop if finish else None
        return choice


KEEP_ALIVE = b": keep-alive\n\n"  # a comment: clients ignore it, proxies see that the stream lives
