"""JSON that is still being written: where a value ends, and calls told while their arguments come."""

from __future__ import annotations

import json

from pd_serve.api.parsers.pieces import Piece

_NAMES = ("name", "function", "tool_name")
_ARGUMENTS = ("arguments", "parameters", "args", "input")
_BARE = frozenset("0123456789+-.truefalsnNIiyE \t\r\n:,")  # outside of strings and brackets


class Value:
    """Finds the end of one JSON value, character by character. It checks brackets and strings, nothing finer."""

    def __init__(self) -> None:
        self._closing: list[str] = []
        self._string = self._escaped = False
        self.begun = False
        self.done = False
        self.broken = False  # no JSON: the character that said so is not a part of it

    def feed(self, text: str) -> int:
        """How many characters of ``text`` are the value's; fewer than there are where it is ``done`` or ``broken``."""
        for place, character in enumerate(text):
            if self._string:
                if self._escaped:
                    self._escaped = False
                elif character == "\\":
                    self._escaped = True
                elif character == '"':
                    self._string = False
                    if not self._closing:
                        self.done = True
                        return place + 1
            elif character == '"':
                self._string = self.begun = True
            elif character in "{[":
                self._closing.append("}" if character == "{" else "]")
                self.begun = True
            elif character in "}]":
                if not self._closing and self.begun:  # the end of a number or word, in somebody else's brackets
                    self.done = True
                    return place
                if not self._closing or self._closing.pop() != character:
                    self.broken = True
                    return place
                if not self._closing:
                    self.done = True
                    return place + 1
            elif character not in _BARE:
                self.broken = True
                return place
            elif not self._closing:
                if self.begun and character in " \t\r\n,":
                    self.done = True
                    return place
                if character in ":,":
                    self.broken = True
                    return place
                self.begun = self.begun or not character.isspace()
        return len(text)


class Calls:
    """``{"name": ..., "arguments": {...}}``, or an array of those: a call is told as soon as its name is known.

    Until then nothing is: ``failed`` is the text, where it turns out to be no call.
    """

    def __init__(self) -> None:
        self._text = ""  # of the array's brackets and the object under way, as it came
        self._in_array = False
        self._object: _Call | None = None
        self.told = 0
        self.done = False
        self.failed: str | None = None

    def feed(self, text: str) -> tuple[list[Piece], str]:
        """Pieces, and what comes behind the calls."""
        pieces: list[Piece] = []
        while text and not self.done:
            if self._object is not None:
                used = self._object.feed(text, pieces)
                if not self._object.told:
                    self._text += text[:used]
                text = text[used:]
                if self._object.done:
                    self._close(self._object)
                continue
            character, text = text[0], text[1:]
            self._text += character
            if character == "{":
                self._object = _Call()
                used = self._object.feed("{", pieces)
            elif character == "[" and not self._in_array and not self.told:
                self._in_array = True
            elif character == "]" and self._in_array:
                self.done = True
                if not self.told:
                    self.failed = self._text
            elif not character.isspace() and not (character == "," and self._in_array and self.told):
                text = self._give_up(text, character)
        return pieces, text

    def finish(self) -> str | None:
        """The output has ended: text that never became a call; None: there is none."""
        if self.done or self.told or (self._object is not None and self._object.told):
            return None  # half a call behind others is no text
        return self._text

    def _close(self, call: _Call) -> None:
        self._object = None
        if call.told:
            self.told += 1
            self._text = ""
            self.done = not self._in_array or call.broken
        else:
            self.failed, self.done = self._text, True

    def _give_up(self, text: str, character: str) -> str:
        """A character that belongs to no call."""
        self.done = True
        if self.told:
            return character + text
        self.failed = self._text[:-1]
        return character + text


class _Call:
    """One object. Arguments are handed on as they come, once the name has."""

    def __init__(self) -> None:
        self._value = Value()
        self._key = ""
        self._part = ""  # a key or a value under way
        self._member: Value | None = None
        self._reading: str = "open"  # open | key | name | colon | value | comma
        self._streamed = False  # the value under way is the arguments', told as it comes
        self._waiting = ""  # arguments that came before the name
        self._had_arguments = False
        self.told = False
        self.done = False
        self.broken = False

    def feed(self, text: str, pieces: list[Piece]) -> int:
        """How many characters were this object's."""
        for place, character in enumerate(text):
            if not self._next(character, pieces):
                self.done = self.broken = True
                if not self._streamed:
                    self._end(pieces)
                return place
            if self.done:
                return place + 1
        return len(text)

    def _next(self, character: str, pieces: list[Piece]) -> bool:
        match self._reading:
            case "open":
                self._reading = "key"
            case "key":
                return self._key_next(character, pieces)
            case "name":
                self._part += character
                assert self._member is not None
                self._member.feed(character)
                if self._member.done:
                    self._key, self._reading = _string(self._part), "colon"
            case "colon":
                if character == ":":
                    self._part, self._member, self._reading = "", Value(), "value"
                    return True
                return character.isspace()
            case "value":
                return self._value_next(character, pieces)
            case _:
                return self._comma_next(character, pieces)
        return True

    def _key_next(self, character: str, pieces: list[Piece]) -> bool:
        if character == '"':
            self._part, self._member, self._reading = character, Value(), "name"
            self._member.feed(character)
            return True
        if character == "}":
            self._end(pieces)
            return True
        return character.isspace()

    def _value_next(self, character: str, pieces: list[Piece]) -> bool:
        member = self._member
        assert member is not None
        if not self._part:
            if character.isspace():
                return True
            # arguments that are a string of JSON are told when it is whole
            self._streamed = self._key in _ARGUMENTS and character == "{" and not self._had_arguments
        used = member.feed(character)
        if member.broken:
            return False
        if used and self._streamed:
            self._part = character  # it may be long, and is told already
            self._argue(character, pieces)
        elif used:
            self._part += character
        if member.done:
            self._reading = "comma"
            self._had(pieces)
            if not used:
                return self._comma_next(character, pieces)
        return True

    def _comma_next(self, character: str, pieces: list[Piece]) -> bool:
        if character == ",":
            self._reading = "key"
            return True
        if character == "}":
            self._end(pieces)
            return True
        return character.isspace()

    def _had(self, pieces: list[Piece]) -> None:
        """A member is whole."""
        if self._key in _NAMES and not self.told and (name := _string(self._part)):
            self.told = True
            pieces.append(Piece("call", name))
            if self._waiting:
                pieces.append(Piece("arguments", self._waiting))
        elif self._key in _ARGUMENTS and not self._had_arguments:
            self._had_arguments = True
            if not self._streamed:
                self._argue(_string(self._part) or self._part, pieces)
        self._streamed = False

    def _argue(self, text: str, pieces: list[Piece]) -> None:
        if self.told:
            pieces.append(Piece("arguments", text))
        else:
            self._waiting += text

    def _end(self, pieces: list[Piece]) -> None:
        self.done = True
        if self.told and not self._had_arguments:
            pieces.append(Piece("arguments", "{}"))


def _string(text: str) -> str:
    """Of a JSON string; empty for other values, and for what is none."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    return found if isinstance(found, str) else ""
