"""Calls in JSON: behind a marker (Hermes, Qwen, Granite, older Mistral), bare (Llama 3), or asked for by a grammar."""

from __future__ import annotations

from collections.abc import Iterator

from pd_serve.api.parsers.json_text import Calls, Value
from pd_serve.api.parsers.pieces import Parser, Piece

_LONGEST_NAME = 512  # characters, with an id


class _JsonCalls(Parser):
    """``_begin``: behind which of these texts calls come. ``_end``: what may follow them."""

    _begin: tuple[str, ...]
    _end = ""

    def __init__(self) -> None:
        super().__init__()
        self._calls: Calls | None = None
        self._opened = ""  # what stood before the calls
        self._closing = False

    def _parse(self) -> Iterator[Piece]:
        while self._held:
            before = dict(vars(self))
            if self._calls is not None:
                yield from self._in_calls(self._calls)
            elif self._closing:
                self._close()
            else:
                yield from self._in_text()
            if vars(self) == before:
                break
        if self._ended and self._calls is not None:
            if (text := self._calls.finish()) is not None:
                yield from self._say(self._opened + text)
            self._calls = None

    def _in_text(self) -> Iterator[Piece]:
        yield from self._say_until(self._begin)
        for marker in self._begin:
            if self._take(marker):
                self._open(marker)
                return

    def _open(self, marker: str) -> None:
        self._calls, self._opened = Calls(), marker

    def _in_calls(self, calls: Calls) -> Iterator[Piece]:
        text, self._held = self._held, ""
        pieces, self._held = calls.feed(text)
        for piece in pieces:
            yield self._call(piece.text) if piece.kind == "call" else piece
        if calls.done:
            self._calls = None
            self._closing = calls.failed is None
            if calls.failed is not None:
                yield from self._say(self._opened + calls.failed)

    def _close(self) -> None:
        """What follows calls: spaces, and the mark of their end."""
        self._skip_spaces()
        if not self._held or (self._end and self._take(self._end) is None):
            return
        self._closing = False


class Hermes(_JsonCalls):
    """``<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>``, once a call: Hermes 2, Qwen 2.5 and 3."""

    markers = ("<tool_call>", "</tool_call>")
    _begin = ("<tool_call>",)
    _end = "</tool_call>"


class Granite(_JsonCalls):
    """``<|tool_call|>[{"name": ..., "arguments": {...}}, ...]``: Granite 3; ``<tool_call>`` in its first release."""

    markers = ("<|tool_call|>", "<tool_call>", "</tool_call>")
    _begin = ("<|tool_call|>", "<tool_call>")
    _end = "</tool_call>"


class Mistral(_JsonCalls):
    """``[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]``, and of newer models ``[TOOL_CALLS]name[ARGS]{...}``."""

    markers = ("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]")
    _begin = ("[TOOL_CALLS]",)

    def __init__(self) -> None:
        super().__init__()
        self._newer: Value | None = None
        self._head = False

    def _open(self, marker: str) -> None:
        self._opened, self._head = marker, True

    def _parse(self) -> Iterator[Piece]:
        yield from super()._parse()
        if self._ended and self._head:
            self._head, self._held = False, self._opened + self._held

    def _in_text(self) -> Iterator[Piece]:
        if self._newer is not None:
            yield from self._arguments(self._newer)
        elif self._head:
            yield from self._in_head()
        else:
            yield from super()._in_text()

    def _in_head(self) -> Iterator[Piece]:
        """A list, or a name up to its arguments."""
        head = self._held.lstrip()
        if not head:
            return
        if head[0] in "[{" and not head.startswith(("[ARGS]"[: len(head)], "[CALL_ID]"[: len(head)])):
            self._head, self._calls = False, Calls()
            yield from self._in_calls(self._calls)
            return
        name, brace, _ = head.partition("{")
        wrong = len(name) > _LONGEST_NAME or "\n\n" in name
        if not brace and not wrong:
            return
        self._head = False
        rest = head[len(name) :]
        for marker in ("[CALL_ID]", "[ARGS]"):
            name = name.partition(marker)[0]
        if wrong or not name.strip():
            yield from self._say(self._opened)
            return
        self._held = rest
        self._newer = Value()
        yield self._call(name.strip())
        yield from self._arguments(self._newer)

    def _arguments(self, value: Value) -> Iterator[Piece]:
        used = value.feed(self._held)
        yield Piece("arguments", self._held[:used])
        self._held = self._held[used:]
        if value.done or value.broken:
            self._newer, self._closing = None, True


class Llama3Json(_JsonCalls):
    """``{"name": ..., "parameters": {...}}`` as the whole answer, several parted by ``;``: Llama 3.1 and 3.2."""

    markers = ("<|python_tag|>",)
    _begin = ()

    def __init__(self) -> None:
        super().__init__()
        self._calls_may_begin = True
        self._opening = ""

    def _in_text(self) -> Iterator[Piece]:
        if not self._calls_may_begin:
            text, self._held = self._held, ""
            yield from self._say(text)
            return
        text = self._held.lstrip()
        if text.startswith("<|python_tag|>") and not self._opening:
            self._opening = self._held[: -len(text)] + "<|python_tag|>"
            self._held = text.removeprefix("<|python_tag|>")
        elif text.startswith("{"):
            self._calls_may_begin = False
            self._opening, opened = "", self._opening + self._held[: -len(text)]
            self._held = text
            self._open(opened)
        elif text and not ("<|python_tag|>".startswith(text) and not self._ended and not self._opening):
            self._calls_may_begin = False
            self._held, self._opening = self._opening + self._held, ""

    def _close(self) -> None:
        """Another call, behind a semicolon or a line break, or text."""
        text = self._held.lstrip()
        if text.startswith(";"):
            text = text[1:].lstrip()
        if not text and not self._ended:
            return
        self._closing = False
        if text.startswith("{"):
            self._held = text
            self._open("")


class Forced(_JsonCalls):
    """The whole output is a JSON list of calls, as the grammar of ``tool_choice: "required"`` has it."""

    _begin = ()

    def __init__(self) -> None:
        super().__init__()
        self._open("")

    def _in_text(self) -> Iterator[Piece]:
        text, self._held = self._held, ""
        yield from self._say(text)


class Named(Parser):
    """The whole output is the arguments of one function, as the grammar of a named ``tool_choice`` has it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name

    def _parse(self) -> Iterator[Piece]:
        if self._held and self._name:
            yield self._call(self._name)
            self._name = ""
        yield Piece("arguments", self._held)
        self._held = ""
