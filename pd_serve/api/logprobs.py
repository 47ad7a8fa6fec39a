"""Log-probabilities in the shapes of the two APIs. Pure functions of the wire's TokenLogprob and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire.link import TokenLogprob

_FLOOR = -9999.0  # JSON has no minus infinity


class CompletionLogprobs:
    """The legacy shape: parallel lists. Text offsets count on from ``offset`` over all calls of ``add``."""

    def __init__(self, tokenizer: TextTokenizer, offset: int = 0) -> None:
        self._tokenizer = tokenizer
        self.offset = offset

    def add(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Tokens beyond ``entries`` are listed without values."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for id, entry in zip_longest(ids, entries[: len(ids)]):
            text = _name(self._tokenizer, id)
            tokens.append(text)
            offsets.append(self.offset)
            self.offset += len(text)
            if entry is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(max(entry.logprob, _FLOOR))
            top = {_name(self._tokenizer, other): max(value, _FLOOR) for other, value in entry.top}
            top.setdefault(text, max(entry.logprob, _FLOOR))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}


def merge(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return {name: [value for part in parts for value in part[name]] for name in names}


def chat_logprobs(tokenizer: TextTokenizer, entries: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {
            **_chat_entry(tokenizer, entry.token, entry.logprob),
            "top_logprobs": [_chat_entry(tokenizer, id, value) for id, value in entry.top],
        }
        for entry in entries
    ]


def _chat_entry(tokenizer: TextTokenizer, id: int, logprob: float) -> dict[str, Any]:
    return {
        "token": tokenizer.token_text(id),
        "logprob": max(logprob, _FLOOR),
        "bytes": list(tokenizer.token_bytes(id)),
    }


def _name(tokenizer: TextTokenizer, id: int) -> str:
    """The token's text; where it is a part of a character, its bytes as OpenAI spells them (they stay distinct)."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
