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
        self._head = False  # the head of a call is awaited, in whole
        self._value: Value | None = None

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = self._held
            if self._value is not None:
                if not self._value.begun:
                    self._skip_spaces()
                used = self._value.feed(self._held)
                yield Piece("arguments", self._held[:used])
                self._held = self._held[used:]
                if self._value.done or self._value.broken:
                    self._value = None
            elif self._head:
                yield from self._in_head()
            elif self._inside:
                self._between()
            else:
                yield from self._say_until((self._begin, self._call_begin))
                if self._held.startswith(self._call_begin) or self._take(self._begin):
                    self._inside = True
            if self._held == before:
                break
        if self._ended and self._head:
            self._held = self._call_begin + self._held

    def _between(self) -> None:
        """Up to the next call, or the end of all; what stands between is the format's."""
        at, marker = first_of(self._held, (self._call_begin, self._end))
        if at < 0:
            if self._ended:
                self._held = ""
            return
        self._held = self._held[at + len(marker) :]
        self._head = marker == self._call_begin
        self._inside = self._head

    def _in_head(self) -> Iterator[Piece]:
        found = self._function()
        if found is None:
            if first_of(self._held, (self._call_end, self._end))[0] >= 0:  # a call without arguments' begin
                self._head, text = False, self._call_begin + self._held
                self._inside, self._held = False, ""
                yield from self._say(text)
            return
        name, self._held = found
        self._head, self._inside, self._value = False, True, Value()
        yield self._call(name)

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
