"""Calls as a list in Python's notation: Llama 3.2 and 4, ToolACE."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from pd_serve.api.parsers.pieces import Parser, Piece

_START, _END = "<|python_start|>", "<|python_end|>"
_OPEN, _CLOSE = "([{", ")]}"


class Pythonic(Parser):
    """``[f(a=1, b="x"), g()]`` as the whole answer. A call is told when it is whole."""

    markers = (_START, _END)

    def __init__(self) -> None:
        super().__init__()
        self._reading = "start"  # start | calls | text
        self._opened = ""
        self._told = 0
        self._brackets = _Brackets()

    def _parse(self) -> Iterator[Piece]:
        if self._reading == "start":
            text = self._held.lstrip()
            if not self._opened and text.startswith(_START):
                text = text.removeprefix(_START).lstrip()
                self._opened = _START
            if text.startswith("["):
                self._opened += self._held[: len(self._held) - len(text)].replace(_START, "") + "["
                self._held, self._reading = text[1:], "calls"
            elif text and (self._ended or self._opened or not _START.startswith(text)):
                self._reading = "text"
        if self._reading == "calls":
            yield from self._in_calls()
        if self._reading == "text":
            text, self._held = self._held, ""
            yield from self._say(text)

    def _in_calls(self) -> Iterator[Piece]:
        while True:
            if self._told and (text := self._held.lstrip(", \t\r\n")) != self._held:
                self._held, self._brackets = text, _Brackets()
            end = self._brackets.end_of_call(self._held)
            call = _call(self._held[:end]) if end >= 0 else None
            if call is None:
                break
            self._held, self._told, self._brackets = self._held[end:], self._told + 1, _Brackets()
            yield self._call(call[0])
            yield Piece("arguments", call[1])
        if self._told and self._held.startswith("]"):
            self._held = self._held[1:].lstrip().removeprefix(_END)
            self._reading = "text"
        elif end >= 0 or self._ended or _is_no_call(self._held):
            self._held = ("" if self._told else self._opened) + self._held
            self._reading = "text"


class _Brackets:
    """Counts them in a text that grows, every character once."""

    def __init__(self) -> None:
        self._place = self._depth = 0
        self._quote = ""
        self._escaped = False

    def end_of_call(self, text: str) -> int:
        """Behind the bracket that closes the first call; -1: it has not come."""
        for place in range(self._place, len(text)):
            character = text[place]
            if self._quote:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == self._quote:
                    self._quote = ""
            elif character in "\"'":
                self._quote = character
            elif character in _OPEN:
                self._depth += 1
            elif character in _CLOSE:
                if self._depth <= 1:
                    self._place = place  # it is found again
                    return place + 1 if self._depth else -1
                self._depth -= 1
        self._place = len(text)
        return -1


def _is_no_call(text: str) -> bool:
    """Whether no more text can make it one: a name of dotted words comes first."""
    name, bracket, _ = text.lstrip(", \n").partition("(")
    return (
        not all(part.isidentifier() for part in name.strip().split("."))
        if bracket
        else any(not (character.isalnum() or character in "_. \n") for character in name)
    )


def _call(text: str) -> tuple[str, str] | None:
    """Name and arguments as JSON."""
    try:
        found = ast.parse(text.strip(), mode="eval").body
        if not isinstance(found, ast.Call) or found.args:
            return None
        name = ast.unparse(found.func)
        arguments = {str(keyword.arg): _literal(keyword.value) for keyword in found.keywords}
        return name, json.dumps(arguments, ensure_ascii=False)
    except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
        return None


_WORDS = {"true": True, "false": False, "null": None}


def _literal(node: ast.expr) -> Any:
    """JSON's own words are taken, too."""
    if isinstance(node, ast.Name) and node.id in _WORDS:
        return _WORDS[node.id]
    if isinstance(node, ast.List):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        keys = [_literal(key) for key in node.keys if key is not None]
        return dict(zip(keys, map(_literal, node.values), strict=True))
    return ast.literal_eval(node)
