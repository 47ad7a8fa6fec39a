"""Answers of the Responses API: a chat's parts as its items and events, in its order, numbered.

https://platform.openai.com/docs/api-reference/responses-streaming. A step of text joins bytes that were made when
its item began.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from pd_serve.api.errors import APIError
from pd_serve.api.responses import Usage
from pd_serve.api.translated import Part, TranslatedFormat

_json = msgspec.json.encode
# Of a part: the item's id, the event of its deltas, and of its end.
_KINDS = {
    "text": ("msg", "response.output_text"),
    "reasoning": ("rs", "response.reasoning_text"),
    "call": ("fc", "response.function_call_arguments"),
}


class ResponsesFormat(TranslatedFormat):
    def __init__(
        self, echo: dict[str, Any], *, id: str, created_s: int, model: str, usage: Callable[[], Usage]
    ) -> None:
        """``echo``: the fields that repeat the request."""
        super().__init__(id=id, created_s=created_s, model=model, usage=usage)
        self._ids = id.rpartition("-")[2]
        self._response: dict[str, Any] = {
            "id": f"resp_{id}",
            "object": "response",
            "created_at": created_s,
            "model": model,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "previous_response_id": None,
            **echo,
            "output": [],
            "usage": None,
        }
        self._output: list[dict[str, Any]] = self._response["output"]  # items that are complete
        self._number = 0
        self._item: dict[str, Any] = {}
        self._place: dict[str, Any] = {}
        self._pieces: list[str] = []
        self._scores: list[Any] = []
        self._delta = b""

    def begin(self) -> bytes:
        return self._event("response.created", response=self._response) + self._event(
            "response.in_progress", response=self._response
        )

    def start(self, part: Part) -> bytes:
        prefix, name = _KINDS[part.kind]
        index = len(self._output)
        self._item = {"id": f"{prefix}_{self._ids}{index}", **_item(part), "status": "in_progress"}
        self._place = {"item_id": self._item["id"], "output_index": index}
        self._pieces, self._scores = [], []
        events = self._event("response.output_item.added", output_index=index, item=self._item)
        if part.kind != "call":
            self._place["content_index"] = 0
            events += self._event("response.content_part.added", **self._place, part=_content(part, "", []))
        fixed = {"type": f"{name}.delta", **self._place} | ({"logprobs": []} if part.kind == "text" else {})
        self._delta = b"event: %b.delta\ndata: %b" % (name.encode(), _json(fixed)[:-1] + b',"delta":')
        return events

    def more(self, text: str, scores: list[Any] | None = None) -> bytes:
        self._pieces.append(text)
        if scores:
            self._scores += scores
            return self._event("response.output_text.delta", **self._place, delta=text, logprobs=scores)
        self._number += 1
        return self._delta + _json(text) + b',"sequence_number":%d}\n\n' % (self._number - 1)

    def stop(self, *, cut: bool) -> bytes:
        assert self.part is not None
        part, text = self.part, "".join(self._pieces)
        name = _KINDS[part.kind][1] + ".done"
        if part.kind == "call":
            self._item["arguments"] = text
            events = self._event(name, **self._place, name=part.name, arguments=text)
        else:
            content = _content(part, text, self._scores)
            self._item["content"] = [content]
            more = {"logprobs": content["logprobs"]} if part.kind == "text" else {}
            events = self._event(name, **self._place, text=text, **more)
            events += self._event("response.content_part.done", **self._place, part=content)
        self._item["status"] = "incomplete" if cut else "completed"
        events += self._event("response.output_item.done", output_index=len(self._output), item=self._item)
        self._output.append(self._item)
        return events

    def finish(self, reason: str, stop: str | int | None) -> bytes:
        events = b"" if self._output else self.empty_text()
        status = "incomplete" if reason == "length" else "completed"
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        self._response |= {"status": status, "usage": _usage(self.usage())}
        return events + self._event(f"response.{status}", response=self._response)

    def result(self) -> dict[str, Any]:
        return self._response

    def error_event(self, error: APIError, request_id: str) -> bytes:
        events = b"" if self.begun else self._begin()
        if self.part is not None:
            events += self._stop(cut=True)
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        self._response |= {"status": "failed", "error": {"code": code, "message": error.message}}
        return events + self._event("response.failed", response=self._response)

    def _event(self, type: str, **fields: Any) -> bytes:
        document = {"type": type, "sequence_number": self._number, **fields}
        self._number += 1
        return b"event: %b\ndata: %b\n\n" % (type.encode(), _json(document))


def _item(part: Part) -> dict[str, Any]:
    if part.kind == "call":
        return {"type": "function_call", "call_id": part.id, "name": part.name, "arguments": ""}
    if part.kind == "reasoning":
        return {"type": "reasoning", "summary": [], "content": [], "encrypted_content": None}
    return {"type": "message", "role": "assistant", "content": []}


def _content(part: Part, text: str, scores: list[Any]) -> dict[str, Any]:
    if part.kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": scores}


def _usage(usage: Usage) -> dict[str, Any]:
    given = usage.document()
    return {
        "input_tokens": given["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": given["prompt_tokens_details"]["cached_tokens"]},
        "output_tokens": given["completion_tokens"],
        "output_tokens_details": {
            "reasoning_tokens": (given.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
        },
        "total_tokens": given["total_tokens"],
    }
