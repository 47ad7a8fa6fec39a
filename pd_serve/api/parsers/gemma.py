"""Calls in Gemma's own notation, ``call:name{key:value,...}``: strings between marks of their own, keys bare."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import ClassVar

from pd_serve.api.parsers.pieces import Parser, Piece, first_of, overlap
from pd_serve.api.parsers.tags import json_of

_SPACES = " \t\r\n"
_LONGEST_NAME = 256  # characters


class _Gemma(Parser):
    """Arguments are told as they come, as JSON. What closes a call closes what it left open, too."""

    _begin: ClassVar[str]
    _end: ClassVar[str]
    _quote: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.markers = (cls._begin, cls._end, cls._quote)
        quoted, end = r'"(?:[^"\\]|\\.)*"', re.escape(cls._end)
        # a bare word, where what ends it has come
        cls._key = re.compile(rf'((?:{quoted}|(?!{end})[^":,{{}}\[\]])*)(?=[:,{{}}\[\]]|{end})', re.DOTALL)
        cls._word = re.compile(rf'((?:{quoted}|(?!{end})[^",{{}}\[\]])*)(?=[,{{}}\[\]]|{end})', re.DOTALL)

    _key: ClassVar[re.Pattern[str]]
    _word: ClassVar[re.Pattern[str]]

    def __init__(self) -> None:
        super().__init__()
        self._reading = "text"  # text | head | item | colon | value | string | key string | closing
        self._open: list[str] = []  # brackets of the arguments that are to be closed
        self._first = True  # nothing stands in the innermost of them

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = self._held, self._reading
            match self._reading:
                case "text":
                    yield from self._say_until((self._begin,))
                    if self._take(self._begin):
                        self._reading = "head"
                case "head":
                    yield from self._in_head()
                case "closing":
                    self._close()
                case "string" | "key string":
                    yield from self._in_string()
                case _:
                    yield from self._in_arguments()
            if before == (self._held, self._reading):
                break
        if self._ended and self._reading == "head":
            self._held = self._begin + self._held
        elif self._ended and self._reading != "text":
            self._held = ""  # half a word of arguments

    def _in_head(self) -> Iterator[Piece]:
        text = self._held.lstrip(_SPACES)
        name, bracket, rest = text.removeprefix("call:").partition("{")
        name = name.strip()
        is_call = text.startswith("call:") and len(name) <= _LONGEST_NAME and not set(name) & set("<>\n")
        if bracket and is_call and name:
            self._held, self._reading, self._open, self._first = rest, "item", ["}"], True
            yield self._call(name)
            yield Piece("arguments", "{")
        elif bracket or not (is_call or "call:".startswith(text)):
            self._reading = "text"
            yield from self._say(self._begin)

    def _in_arguments(self) -> Iterator[Piece]:
        """One step: a bracket, a mark, or a bare word."""
        self._held = self._held.lstrip(_SPACES + (",:" if self._reading in ("item", "colon") else ""))
        if not self._held or (not self._ended and self._may_become((self._quote, self._end))):
            return
        if self._take(self._end):
            missing = "" if self._reading == "item" else "null"
            yield Piece("arguments", missing + "".join(reversed(self._open)))
            self._open, self._reading = [], "closing"
            self._held = self._end + self._held
        elif self._held[0] in "}]" and self._reading == "item":
            yield from self._close_bracket()
        elif self._reading == "item" and self._open[-1] == "}":
            yield from self._at_key()
        else:
            yield from self._at_value()

    def _at_key(self) -> Iterator[Piece]:
        separator = "" if self._first else ", "
        if self._take(self._quote):
            self._reading = "key string"
            yield Piece("arguments", separator + '"')
        elif self._held[0] in "{[":  # a value without a key
            self._reading, self._first = "value", False
            yield Piece("arguments", separator + '"": ')
        elif (found := self._key.match(self._held)) is not None:
            self._held, self._first, self._reading = self._held[found.end() :], False, "value"
            key = found[1].strip().strip('"')
            yield Piece("arguments", f"{separator}{json.dumps(key, ensure_ascii=False)}: ")
            self._held = self._held.removeprefix(":")

    def _at_value(self) -> Iterator[Piece]:
        separator = ", " if self._reading == "item" and not self._first else ""
        if self._held[0] in "{[":
            self._open.append("}" if self._held[0] == "{" else "]")
            yield Piece("arguments", separator + self._held[0])
            self._held, self._reading, self._first = self._held[1:], "item", True
        elif self._take(self._quote):
            self._reading = "string"
            yield Piece("arguments", separator + '"')
        elif (found := self._word.match(self._held)) is not None:
            self._held, self._reading, self._first = self._held[found.end() :], "item", False
            yield Piece("arguments", separator + json_of(found[1].strip(), {"type": "boolean"}))

    def _in_string(self) -> Iterator[Piece]:
        at, _ = first_of(self._held, (self._quote,))
        whole = at >= 0
        if not whole:
            at = len(self._held) - (0 if self._ended else overlap(self._held, (self._quote,)))
        text, self._held = self._held[:at], self._held[at:]
        yield Piece("arguments", json.dumps(text, ensure_ascii=False)[1:-1])
        if whole:
            self._take(self._quote)
            is_key = self._reading == "key string"
            self._reading, self._first = "colon" if is_key else "item", False
            yield Piece("arguments", '": ' if is_key else '"')

    def _close_bracket(self) -> Iterator[Piece]:
        self._held, self._first = self._held[1:], False
        yield Piece("arguments", self._open.pop())
        if not self._open:
            self._reading = "closing"

    def _close(self) -> None:
        """What follows a call: spaces, and the mark of its end."""
        self._skip_spaces()
        if self._held and self._take(self._end) is not None:
            self._reading = "text"

    def _may_become(self, markers: tuple[str, ...]) -> bool:
        return any(marker != self._held and marker.startswith(self._held) for marker in markers)


class Gemma4(_Gemma):
    """``<|tool_call>call:name{a:<|"|>text<|"|>,b:[1,true]}<tool_call|>``."""

    _begin, _end, _quote = "<|tool_call>", "<tool_call|>", '<|"|>'


class FunctionGemma(_Gemma):
    """``<start_function_call>call:name{a:<escape>text<escape>}<end_function_call>``."""

    _begin, _end, _quote = "<start_function_call>", "<end_function_call>", "<escape>"
