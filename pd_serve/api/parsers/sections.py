"""Calls in sections of special tokens: DeepSeek V3 and its kind, Kimi K2."""

from __future__ import annotations

from collections.abc import Iterator

from pd_serve.api.parsers.json_text import Value
from pd_serve.api.parsers.pieces import Parser, Piece, first_of


class _Sections(Parser):
    """``begin``, then for each call ``call`` head ``middle`` JSON ``call end``, then ``end``."""

    _begin: str
    _end: str
    _call_begin: str
    _middle: str
    _call_end: str

    def __init__(self) -> None:
        super().__init__()
        self._inside = False
        self._opened = ""  # what has begun the section: content, where no call comes
        self._head = False  # the head of a call is awaited, in whole
        self._value: Value | None = None

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = dict(vars(self))
            if self._value is not None:
                yield from self._arguments(self._value)
            elif self._head:
                yield from self._in_head()
            elif self._inside:
                yield from self._between()
            else:
                yield from self._say_until((self._begin, self._call_begin))
                if self._held.startswith(self._call_begin):
                    self._inside = True
                elif self._take(self._begin):
                    self._inside, self._opened = True, self._begin
            if vars(self) == before:
                break
        if self._ended:
            self._held = self._opened + (self._call_begin if self._head else "") + self._held
            self._opened, self._head = "", False

    def _arguments(self, value: Value) -> Iterator[Piece]:
        if not value.begun:
            self._skip_spaces()
        used = value.feed(self._held)
        yield Piece("arguments", self._held[:used])
        self._held = self._held[used:]
        if value.done or value.broken:
            self._value = None

    def _between(self) -> Iterator[Piece]:
        """Up to the next call, or the end of all. Spaces and fences are the format's, other text is content."""
        text = self._held.lstrip(" \t\r\n`")
        markers = (self._call_begin, self._call_end, self._end)
        marker = next((marker for marker in markers if text.startswith(marker)), None)
        if marker == self._call_end:
            self._held = text[len(marker) :]
        elif marker is not None:
            self._held = text[len(marker) :]
            self._head = self._inside = marker == self._call_begin
            if marker == self._end and self._opened:
                yield from self._no_call(marker)
        elif text and (self._ended or not any(marker.startswith(text) for marker in markers)):
            self._inside = False
            yield from self._no_call("")
        elif self._ended and not self._opened:
            self._held = ""

    def _in_head(self) -> Iterator[Piece]:
        at, marker = first_of(self._held, (self._middle, self._call_begin, self._call_end, self._end))
        if at < 0:
            return
        if marker == self._middle:
            found = self._function()
            if found is None:
                return
            name, rest = found
            if name and "<" not in name:
                self._head, self._value, self._opened, self._held = False, Value(), "", rest
                yield self._call(name)
                return
            at += len(marker)
        text, self._held = self._held[:at], self._held[at:]
        self._head = self._inside = False
        yield from self._no_call(self._call_begin + text)

    def _no_call(self, text: str) -> Iterator[Piece]:
        opened, self._opened = self._opened, ""
        yield from self._say(opened + text)

    def _function(self) -> tuple[str, str] | None:
        """The name in a call's head and what follows it; None: not all of it has come."""
        name, middle, rest = self._held.partition(self._middle)
        return (self._name_in(name), rest) if middle else None

    def _name_in(self, head: str) -> str:
        return head.strip()


class DeepSeek(_Sections):
    """V3 and R1 (``function``, then the name, then JSON in a fence), and V3.1 (the name, then JSON)."""

    _begin, _end = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
    _call_begin, _middle, _call_end = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
    markers = (_begin, _end, _call_begin, _middle, _call_end)

    def _function(self) -> tuple[str, str] | None:
        found = super()._function()
        if found is None or found[0] != "function":
            return found
        name, fence, rest = found[1].partition("\n")
        if not fence:
            return None
        opening = rest.lstrip()
        if not opening or "```json".startswith(opening):
            return None
        return name.strip(), opening.removeprefix("```json")


class KimiK2(_Sections):
    """``functions.name:0``, then JSON."""

    _begin, _end = "<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"
    _call_begin, _middle = "<|tool_call_begin|>", "<|tool_call_argument_begin|>"
    _call_end = "<|tool_call_end|>"
    markers = (_begin, _end, _call_begin, _middle, _call_end)

    def _name_in(self, head: str) -> str:
        return head.strip().removeprefix("functions.").partition(":")[0]
