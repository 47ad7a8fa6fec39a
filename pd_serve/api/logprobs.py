"""Log-probabilities in the shapes of the two APIs. Pure functions of the wire's TokenLogprob and a tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

from pd_serve.api.detokenizer import Detokenizer
from pd_serve.api.tokenizer import TextTokenizer
from pd_serve.wire.link import TokenLogprob

_FLOOR = -9999.0  # JSON has no minus infinity


class CompletionLogprobs:
    """The legacy shape: parallel lists. Text offsets count characters of the choice's text, over all calls of ``add``:
    a token that is no text (EOS), or a part of a character, begins where the next character will.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        *,
        tops: int,
        skip_special_tokens: bool,
        prompt_text: str | None = None,
        as_ids: bool = False,
    ) -> None:
        """``tops``: how many alternatives are listed. ``prompt_text``: of the prompt, as the client wrote it.
        ``as_ids``: tokens are called ``token_id:7``."""
        self._name = _by_id if as_ids else lambda id: _name(tokenizer, id)
        self._tokenizer = tokenizer
        self._tops = tops
        self._skip_special_tokens = skip_special_tokens
        self._prompt_text = prompt_text
        self._text = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens and prompt_text is None)
        self._offset = 0

    def after_prompt(self, prompt: Sequence[int], offset: int) -> None:
        """The output begins, ``offset`` characters into the text; called before its first token."""
        self._text = Detokenizer(self._tokenizer, prompt, skip_special_tokens=self._skip_special_tokens)
        self._offset = offset
        self._prompt_text = None

    def add(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> dict[str, list[Any]]:
        """Tokens beyond ``entries`` are listed without values."""
        tokens: list[str] = []
        values: list[float | None] = []
        tops: list[dict[str, float] | None] = []
        offsets: list[int] = []
        for id, entry in zip_longest(ids, entries[: len(ids)]):
            text = self._name(id)
            tokens.append(text)
            offsets.append(self._offset)
            self._offset += self._length(id)
            if entry is None:
                values.append(None)
                tops.append(None)
                continue
            values.append(max(entry.logprob, _FLOOR))
            top = {self._name(other): max(value, _FLOOR) for other, value in entry.top[: self._tops]}
            top.setdefault(text, max(entry.logprob, _FLOOR))
            tops.append(top)
        return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}

    def _length(self, id: int) -> int:
        text = self._text.push([id])
        prompt = self._prompt_text
        # A token that the tokenizer added by itself (BOS) is not in the text that the client wrote.
        if prompt is not None and id in self._tokenizer.special_ids and not prompt.startswith(text, self._offset):
            return 0
        return len(text)


def merge(parts: Sequence[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    names = ("text_offset", "token_logprobs", "tokens", "top_logprobs")
    return {name: [value for part in parts for value in part[name]] for name in names}


def chat_logprobs(
    tokenizer: TextTokenizer, entries: Sequence[TokenLogprob], *, as_ids: bool = False
) -> list[dict[str, Any]]:
    """``as_ids``: tokens are called ``token_id:7``; their bytes stay what they are."""
    return [
        {
            **_chat_entry(tokenizer, entry.token, entry.logprob, as_ids),
            "top_logprobs": [_chat_entry(tokenizer, id, value, as_ids) for id, value in entry.top],
        }
        for entry in entries
    ]


def prompt_logprobs(
    tokenizer: TextTokenizer, entries: Sequence[TokenLogprob | None], tops: int
) -> list[dict[str, dict[str, Any]] | None]:
    """vLLM's shape: for each token of the prompt but the first, the likeliest and itself, by token id."""

    def described(id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": max(logprob, _FLOOR), "rank": rank, "decoded_token": tokenizer.token_text(id)}

    found: list[dict[str, dict[str, Any]] | None] = []
    for entry in entries:
        if entry is None:
            found.append(None)
            continue
        listed = {str(id): described(id, value, rank) for rank, (id, value) in enumerate(entry.top[:tops], 1)}
        listed.setdefault(str(entry.token), described(entry.token, entry.logprob, entry.rank))
        found.append(listed)
    return found


def _chat_entry(tokenizer: TextTokenizer, id: int, logprob: float, as_ids: bool) -> dict[str, Any]:
    return {
        "token": _by_id(id) if as_ids else tokenizer.token_text(id),
        "logprob": max(logprob, _FLOOR),
        "bytes": list(tokenizer.token_bytes(id)),
    }


def _by_id(id: int) -> str:
    """As vLLM spells it: tokens that have the same text stay apart."""
    return f"token_id:{id}"


def _name(tokenizer: TextTokenizer, id: int) -> str:
    """The token's text; where it is a part of a character, its bytes as OpenAI spells them (they stay distinct)."""
    raw = tokenizer.token_bytes(id)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)
