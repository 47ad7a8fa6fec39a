"""Output tokens to text, as they come: one of each for every choice of a request.

``Detokenizer`` turns tokens into text deltas without ever showing half a character; ``StopMatcher`` finds stop
strings in the deltas and holds back exactly the text that may still become one. Both give the same text
however the tokens are split into steps. Called by the router for every step; no I/O, no logging.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from pd_serve.api.tokenizer import TextTokenizer

_UTF8 = codecs.getincrementaldecoder("utf-8")
_CONTEXT_TOKENS = 8  # enough for any decoder that looks at neighbours


class Detokenizer:
    """``prompt_tail`` gives the last prompt tokens, for tokenizers whose words depend on what comes before."""

    __slots__ = ("_decoder", "_ids", "_read", "_shown", "_skip", "_table", "_texts", "_tokenizer")

    def __init__(
        self,
        tokenizer: TextTokenizer,
        prompt_tail: Sequence[int] = (),
        *,
        skip_special_tokens: bool = True,
        shown: frozenset[int] = frozenset(),
    ) -> None:
        """``shown``: special tokens that are text in any case."""
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids - shown if skip_special_tokens else frozenset()
        self._table = tokenizer.token_bytes
        self._texts = tokenizer.texts
        self._decoder = _UTF8("replace") if tokenizer.exact else None
        # Only for tokenizers that are not exact: ids[_shown:_read] were decoded and delivered.
        self._ids: list[int] = list(prompt_tail[-_CONTEXT_TOKENS:]) if not tokenizer.exact else []
        self._shown = 0
        self._read = len(self._ids)

    def push(self, tokens: Sequence[int]) -> str:
        """The text that these tokens complete; a character that is not complete yet is kept back."""
        skip = self._skip
        if self._decoder is None:
            self._ids.extend(token for token in tokens if token not in skip)
            return self._from_context(final=False)
        table = self._table
        if len(tokens) == 1:
            token = tokens[0]
            if token in skip:
                return ""
            text = self._texts.get(token)
            return self._decoder.decode(table(token)) if text is None or self._decoder.buffer else text
        return self._decoder.decode(b"".join([table(token) for token in tokens if token not in skip]))

    def finish(self) -> str:
        """What was kept back: bytes that never became a character are shown as U+FFFD."""
        if self._decoder is None:
            return self._from_context(final=True)
        return self._decoder.decode(b"", True)

    def _from_context(self, *, final: bool) -> str:
        decode = self._tokenizer.decode
        before = decode(self._ids[self._shown : self._read], skip_special_tokens=False)
        after = decode(self._ids[self._shown :], skip_special_tokens=False)
        if len(after) <= len(before) or (after.endswith("\ufffd") and not final):
            return ""
        self._shown, self._read = self._read, len(self._ids)
        return after[len(before) :]


class StopMatcher:
    """Finds the stop string whose end comes first; of those that end together, the longest.

    That rule depends on the text alone, never on where tokens begin and end.
    """

    __slots__ = ("_firsts", "_held", "_include", "_longest", "_stops", "matched")

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stops)
        self._firsts = frozenset(stop[0] for stop in stops)
        self._longest = max((len(stop) for stop in stops), default=0)
        self._include = include
        self._held = ""
        self.matched: str | None = None

    def push(self, delta: str, *, armed: bool = True) -> str:
        """The text that may be shown now. After a match (see ``matched``) it is the last of it.

        ``armed`` is False while min_tokens is not reached: stop strings that end inside of such a delta do not count.
        """
        if not delta:
            return ""
        text = self._held + delta
        if armed:
            old = len(self._held)
            best: tuple[int, int] | None = None  # end, start
            for stop in self._stops:
                start = text.find(stop, max(0, old - len(stop) + 1))
                if start >= 0 and (best is None or (start + len(stop), start) < best):
                    best, self.matched = (start + len(stop), start), stop
            if best is not None:
                self._held = ""
                return text[: best[0] if self._include else best[1]]
        kept = self._kept(text)
        self._held = text[len(text) - kept :]
        return text[: len(text) - kept]

    def finish(self) -> str:
        """The output ended without a match: what was held back is text after all."""
        held, self._held = self._held, ""
        return held

    def _kept(self, text: str) -> int:
        """Length of the longest suffix that a stop string could begin with."""
        for start in range(max(0, len(text) - self._longest + 1), len(text)):
            if text[start] in self._firsts:
                suffix = text[start:]
                if any(stop.startswith(suffix) for stop in self._stops):
                    return len(suffix)
        return 0
