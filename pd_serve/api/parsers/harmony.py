"""gpt-oss: channels of messages. ``analysis`` is reasoning, ``final`` the answer, ``to=functions.NAME`` a call."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pd_serve.api.parsers.pieces import Kind, Parser, Piece, first_of, overlap

_ENDS = ("<|end|>", "<|call|>", "<|return|>", "<|start|>", "<|channel|>")
_FUNCTION = re.compile(r"to=functions\.([^\s<]+)")


class Harmony(Parser):
    """Reasoning and calls are one format here: it is both parsers."""

    markers = (*_ENDS, "<|message|>", "<|constrain|>")

    def __init__(self) -> None:
        super().__init__()
        self._kind: Kind | None = None  # of the message under way
        self._outside = True  # nothing of the format was seen: all is the answer

    @property
    def thinks(self) -> bool:
        return self._kind == "reasoning"

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = dict(vars(self))
            if self._kind is not None:
                yield from self._in_message(self._kind)
            elif self._outside:
                yield from self._say_until(("<|channel|>", "<|start|>"))
                self._outside = not self._held.startswith(("<|channel|>", "<|start|>"))
            else:
                yield from self._in_head()
            if vars(self) == before:
                break
        if self._ended and not self._outside and self._kind is None:
            self._held = ""  # a head without a message

    def _in_head(self) -> Iterator[Piece]:
        head, mark, rest = self._held.partition("<|message|>")
        if not mark:
            return
        self._held = rest
        channel = head.rpartition("<|channel|>")[2]
        function = _FUNCTION.search(head)
        if function is not None:
            self._kind = "arguments"
            yield self._call(function[1])
        else:
            self._kind = "reasoning" if channel.strip().startswith("analysis") else "content"

    def _in_message(self, kind: Kind) -> Iterator[Piece]:
        at, mark = first_of(self._held, _ENDS)
        end = at if at >= 0 else len(self._held) - (0 if self._ended else overlap(self._held, _ENDS))
        text, self._held = self._held[:end], self._held[end:]
        yield Piece(kind, text)
        if at >= 0:
            self._kind = None
            if mark not in ("<|start|>", "<|channel|>"):
                self._held = self._held[len(mark) :]
