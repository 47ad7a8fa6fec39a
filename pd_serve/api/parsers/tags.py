"""Calls whose arguments are tags, one a parameter (GLM, Qwen3-Coder, Seed-OSS); values become JSON by its schema."""

from __future__ import annotations

import json
import re
from abc import abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from pd_serve.api.parsers.pieces import Parser, Piece, first_of

_LONGEST = len("</seed:tool_call>")
Parameters = Mapping[str, Mapping[str, Any]]  # by function: its parameters' JSON schema


class _Tags(Parser):
    """A parameter is told when it is whole, the name of the function when it has come."""

    _begin: ClassVar[str] = "<tool_call>"
    _end: ClassVar[str] = "</tool_call>"
    markers: ClassVar[tuple[str, ...]] = (_begin, _end)

    def __init__(self, parameters: Parameters) -> None:
        super().__init__()
        self._parameters = parameters
        self._name: str | None = None  # of the call under way
        self._inside = False
        self._given = 0
        self._looked = 0  # so much of a parameter has come and is not whole
        self._closing = False  # spaces behind a call are the format's

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = dict(vars(self))
            if self._name is not None:
                yield from self._in_call(self._name)
            elif self._inside:
                yield from self._in_head()
            else:
                if self._closing:
                    self._skip_spaces()
                    self._closing = not self._held
                yield from self._say_until((self._begin,))
                self._inside = self._take(self._begin) is True
            if vars(self) == before:
                break
        if self._ended and self._name is not None:
            self._held, self._name = "", None  # what was cut off is half a parameter
        if self._ended and self._inside:
            self._held = self._begin + self._held

    def _in_head(self) -> Iterator[Piece]:
        found = self._function()
        if found is None:
            return
        self._inside = False
        name, rest = found
        if not name or "<" in name:
            yield from self._say(self._begin)
            return
        self._name, self._held, self._given = name, rest, 0
        yield self._call(name)

    def _in_call(self, function: str) -> Iterator[Piece]:
        # Values may be long: only what can end one is worth a look at all of it.
        looked, self._looked = self._looked, len(self._held)
        if looked and first_of(self._held[max(0, looked - _LONGEST) :], (self._end, self._parameter_end))[0] < 0:
            return
        at, marker = first_of(self._held, (self._end, self._parameter_begin))
        if at < 0:
            return
        if marker == self._end:
            self._looked = 0
            self._held = self._held[at + len(marker) :]
            self._name = None
            yield Piece("arguments", "}" if self._given else "{}")
            self._spaces, self._closing = "", True
            return
        end = self._held.find(self._end, at)
        end = len(self._held) if end < 0 else end
        found = self._parameter(self._held[at:end])
        if found is None:
            if end < len(self._held):  # one that was not closed
                text, self._held, self._looked = self._held[at:end], self._held[end:], 0
                yield from self._say(text)
            return
        name, text, rest = found
        self._held, self._looked = rest + self._held[end:], 0
        value = json_of(text, self._parameters.get(function, {}).get("properties", {}).get(name))
        opening = ", " if self._given else "{"
        self._given += 1
        yield Piece("arguments", f"{opening}{json.dumps(name, ensure_ascii=False)}: {value}")

    _parameter_begin: str
    _parameter_end: str

    @abstractmethod
    def _function(self) -> tuple[str, str] | None:
        """The function's name (empty: this is no call) and what follows; None: more has to come."""

    @abstractmethod
    def _parameter(self, text: str) -> tuple[str, str, str] | None:
        """A parameter's name, its value's text, and what follows; None: more has to come."""


class Glm(_Tags):
    """``<tool_call>name\\n<arg_key>k</arg_key>\\n<arg_value>v</arg_value>\\n</tool_call>``: GLM 4.5 to 4.7."""

    markers = (*_Tags.markers, "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>")
    _parameter_begin, _parameter_end = "<arg_key>", "</arg_value>"
    _whole = re.compile(r"<arg_key>(.*?)</arg_key>\s*<arg_value>(.*?)</arg_value>", re.DOTALL)

    def _function(self) -> tuple[str, str] | None:
        at, _ = first_of(self._held.lstrip(), ("\n", "<arg_key>", self._end))
        text = self._held.lstrip()
        return None if at < 0 else (text[:at].strip(), text[at:])

    def _parameter(self, text: str) -> tuple[str, str, str] | None:
        found = self._whole.match(text)
        return None if found is None else (found[1].strip(), found[2], text[found.end() :])


class QwenCoder(_Tags):
    """``<tool_call><function=name><parameter=k>v</parameter></function></tool_call>``, a line each: Qwen3-Coder."""

    _parameter_begin, _parameter_end = "<parameter=", "</parameter>"
    _head = re.compile(r"\s*<function=([^>\n]*)>")
    _whole = re.compile(r"<parameter=([^>\n]*)>\n?(.*?)\n?</parameter>", re.DOTALL)

    def _function(self) -> tuple[str, str] | None:
        found = self._head.match(self._held)
        if found is not None:
            return found[1].strip(), self._held[found.end() :]
        text = self._held.lstrip()
        may_be = "<function=".startswith(text) or (text.startswith("<function=") and "\n" not in text)
        return None if may_be else ("", "")

    def _parameter(self, text: str) -> tuple[str, str, str] | None:
        found = self._whole.match(text)
        return None if found is None else (found[1].strip(), found[2], text[found.end() :])


class SeedOss(QwenCoder):
    """The same between ``<seed:tool_call>`` and ``</seed:tool_call>``: Seed-OSS."""

    _begin, _end = "<seed:tool_call>", "</seed:tool_call>"
    markers = (_begin, _end)


def json_of(text: str, schema: Any) -> str:
    """JSON of a value: text where the schema says so, else what it is as JSON, if it is."""
    kind = schema.get("type") if isinstance(schema, Mapping) else None
    if kind != "string":
        try:
            return json.dumps(json.loads(text, parse_constant=_no_json), ensure_ascii=False)
        except (ValueError, RecursionError):
            pass
        words = {"true": "true", "false": "false", "none": "null", "null": "null"}
        if kind in ("boolean", "null") and (word := words.get(text.strip().lower())):
            return word
    return json.dumps(text, ensure_ascii=False)


def _no_json(constant: str) -> None:
    """NaN and Infinity are Python's."""
    raise ValueError(constant)
