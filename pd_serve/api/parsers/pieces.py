"""Pieces of a message, and the ground of all parsers: text that has come and is not told apart yet."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import ClassVar, Literal, NamedTuple

Kind = Literal["reasoning", "content", "call", "arguments"]


class Piece(NamedTuple):
    """``call``: a new call, ``text`` its function's name. ``arguments``: more of the last call's JSON."""

    kind: Kind
    text: str


class Parser(ABC):
    """Text in, pieces out. A subclass says in :meth:`_parse` what the held text is, as far as it can tell by now."""

    # Texts that may be special tokens of the model: they have to be seen here.
    markers: ClassVar[tuple[str, ...]] = ()

    def __init__(self) -> None:
        self._held = ""
        self._spaces = ""  # the end of the content so far: dropped where a call follows
        self._ended = False

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        return joined(self._parse())

    def finish(self) -> list[Piece]:
        """The output has ended: what was held is what it looks like now."""
        self._ended = True
        pieces = [*self._parse(), *self._say(self._held)]
        self._held = ""
        return joined(pieces)

    @abstractmethod
    def _parse(self) -> Iterator[Piece]: ...

    # --- for subclasses -----------------------------------------------------------------------------------

    def _say(self, text: str) -> Iterator[Piece]:
        """As content, but for spaces at its end, which wait for more."""
        text = self._spaces + text
        shown = text if self._ended else text.rstrip()
        self._spaces = text[len(shown) :]
        if shown:
            yield Piece("content", shown)

    def _say_until(self, markers: Sequence[str]) -> Iterator[Piece]:
        """Content up to the first of these; the held text begins with it then, or cannot tell yet."""
        at, _ = first_of(self._held, markers)
        if at < 0:
            at = len(self._held) - (0 if self._ended else overlap(self._held, markers))
        text, self._held = self._held[:at], self._held[at:]
        yield from self._say(text)

    def _call(self, name: str) -> Piece:
        self._spaces = ""
        return Piece("call", name)

    def _skip_spaces(self) -> None:
        self._held = self._held.lstrip()

    def _take(self, marker: str) -> bool | None:
        """Whether the held text begins with it, which is taken then; None: it may, when more has come."""
        if self._held.startswith(marker):
            self._held = self._held[len(marker) :]
            return True
        return None if marker.startswith(self._held) and not self._ended else False


def first_of(text: str, markers: Sequence[str]) -> tuple[int, str]:
    """Where the first of these begins, and which; -1 where there is none."""
    found = [(at, -len(marker), marker) for marker in markers if (at := text.find(marker)) >= 0]
    if not found:
        return -1, ""
    at, _, marker = min(found)
    return at, marker


def overlap(text: str, markers: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that one of these, which have more than a character, begins with.

    None of them is in the text in whole.
    """
    longest = 0
    for marker in markers:
        tail = text[1 - len(marker) :]
        at = tail.find(marker[0])
        while at >= 0 and not marker.startswith(tail[at:]):
            at = tail.find(marker[0], at + 1)
        if at >= 0:
            longest = max(longest, len(tail) - at)
    return longest


def joined(pieces: Iterator[Piece] | list[Piece]) -> list[Piece]:
    """Neighbours of a kind as one; calls are each their own."""
    found: list[Piece] = []
    for piece in pieces:
        if found and found[-1].kind == piece.kind != "call":
            found[-1] = Piece(piece.kind, found[-1].text + piece.text)
        elif piece.text or piece.kind == "call":
            found.append(piece)
    return found
