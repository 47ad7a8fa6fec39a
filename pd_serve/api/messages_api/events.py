"""Answers of the Messages API: a chat's parts as its content blocks and events, and errors in its shape.

https://docs.anthropic.com/en/docs/build-with-claude/streaming. A step of text joins bytes that were made when its
block began.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import msgspec

from pd_serve.api.errors import APIError
from pd_serve.api.messages_api.errors import document
from pd_serve.api.responses import Usage
from pd_serve.api.translated import Part, TranslatedFormat

_json = msgspec.json.encode
# Clients send thinking back with its signature, and some only what has one; nobody here looks at it.
_SIGNATURE = "unsigned"
_DELTAS = {"text": ("text_delta", "text"), "reasoning": ("thinking_delta", "thinking")} | {
    "call": ("input_json_delta", "partial_json")
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}


class MessageFormat(TranslatedFormat):
    def __init__(self, max_tokens: int, *, id: str, created_s: int, model: str, usage: Callable[[], Usage]) -> None:
        """``max_tokens``: what the request asked for, which may be more than the model takes."""
        super().__init__(id=id, created_s=created_s, model=model, usage=usage)
        self._max_tokens = max_tokens
        self._content: list[dict[str, Any]] = []
        self._pieces: list[str] = []
        self._delta = b""

    def begin(self) -> bytes:
        self._message: dict[str, Any] = {
            "id": f"msg_{self.id}",
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": self._content,
            "stop_reason": None,
            "stop_sequence": None,
            "usage": self._counts(),
        }
        return _event("message_start", message=self._message)

    def start(self, part: Part) -> bytes:
        index = len(self._content)
        self._pieces = []
        kind, field = _DELTAS[part.kind]
        fixed = {"type": "content_block_delta", "index": index, "delta": {"type": kind}}
        self._delta = b"event: content_block_delta\ndata: %b" % (_json(fixed)[:-2] + b',"%b":' % field.encode())
        return _event("content_block_start", index=index, content_block=_block(part, ""))

    def more(self, text: str, scores: list[Any] | None = None) -> bytes:
        self._pieces.append(text)
        return self._delta + _json(text) + b"}}\n\n"

    def stop(self, *, cut: bool) -> bytes:
        assert self.part is not None
        index = len(self._content)
        events = b""
        if self.part.kind == "reasoning":
            delta = {"type": "signature_delta", "signature": _SIGNATURE}
            events = _event("content_block_delta", index=index, delta=delta)
        block = _block(self.part, "".join(self._pieces))
        if self.part.kind == "reasoning":
            block["signature"] = _SIGNATURE
        self._content.append(block)
        return events + _event("content_block_stop", index=index)

    def finish(self, reason: str, stop: str | int | None) -> bytes:
        events = b"" if self._content else self.empty_text()
        ended: dict[str, Any] = {"stop_reason": _REASONS.get(reason, reason), "stop_sequence": None}
        if reason == "stop" and isinstance(stop, str):
            ended = {"stop_reason": "stop_sequence", "stop_sequence": stop}
        elif reason == "length" and self.usage().completion_tokens < self._max_tokens:
            ended["stop_reason"] = "model_context_window_exceeded"
        self._message |= ended | {"usage": self._counts()}
        return events + _event("message_delta", delta=ended, usage=self._counts()) + _event("message_stop")

    def result(self) -> dict[str, Any]:
        return self._message

    def keep_alive(self) -> bytes:
        return _event("ping") if self.begun else super().keep_alive()

    def error(self, error: APIError, request_id: str) -> bytes:
        return document(error, request_id)

    def error_event(self, error: APIError, request_id: str) -> bytes:
        return b"event: error\ndata: %b\n\n" % document(error, request_id)

    def _counts(self) -> dict[str, Any]:
        """There, the prompt's tokens that were cached are not counted again as its input."""
        usage = self.usage()
        return {
            "input_tokens": usage.prompt_tokens - usage.cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": usage.cached_tokens,
            "output_tokens": usage.completion_tokens,
        }


def _block(part: Part, text: str) -> dict[str, Any]:
    if part.kind == "call":
        return {"type": "tool_use", "id": part.id, "name": part.name, "input": _arguments(text)}
    if part.kind == "reasoning":
        return {"type": "thinking", "thinking": text, "signature": ""}
    return {"type": "text", "text": text}


def _arguments(text: str) -> dict[str, Any]:
    """A model may write what is no object, and a client wants one."""
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError):
        found = text
    return found if isinstance(found, dict) else {"arguments": found}


def _event(type: str, **fields: Any) -> bytes:
    return b"event: %b\ndata: %b\n\n" % (type.encode(), _json({"type": type, **fields}))
