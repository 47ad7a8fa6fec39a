"""Reasoning between two marks, before the answer: DeepSeek-R1, Qwen3, Magistral, Granite 3.2, Seed-OSS, Gemma 4."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from pd_serve.api.parsers.pieces import Parser, Piece, first_of, overlap


class Marks(NamedTuple):
    """Ways to write each, none the beginning of another. ``always``: the model thinks though nothing opens it."""

    open: tuple[str, ...]
    close: tuple[str, ...]
    always: bool = False


class Thinking(Parser):
    """``begun``: the prompt has opened it, or the model always thinks; else it does where its output opens it."""

    def __init__(self, marks: Marks, *, begun: bool) -> None:
        super().__init__()
        self._open, self._close = marks.open, marks.close
        self._reading = "inside" if begun else "start"
        self._fresh = True  # nothing of the reasoning was told
        self._opened = False
        self._pause = ""  # spaces at the end of the reasoning so far

    @property
    def thinks(self) -> bool:
        return self._reading == "inside"

    def _parse(self) -> Iterator[Piece]:
        if self._reading == "start":
            text = self._held.lstrip()
            mark = next((mark for mark in self._open if text.startswith(mark)), None)
            if mark is not None:
                self._held, self._reading, self._opened = text[len(mark) :], "inside", True
            elif self._ended or (text and not any(mark.startswith(text) for mark in self._open)):
                self._reading = "after"
        if self._reading == "inside":
            yield from self._inside()
        if self._reading == "before the answer":
            self._skip_spaces()
            if self._held:
                self._reading = "after"
        if self._reading == "after":
            text, self._held = self._held, ""
            yield Piece("content", text)

    def _inside(self) -> Iterator[Piece]:
        if self._fresh:
            self._skip_spaces()
            if not self._opened:  # some models open once more what the prompt has opened
                taken = [self._take(mark) for mark in self._open]
                if True not in taken and None in taken:
                    return
                self._opened = True
                self._skip_spaces()
            if not self._held:
                return
            self._fresh = False
        _, mark = first_of(self._held, self._close)
        reasoning, _, rest = self._held.partition(mark) if mark else (self._held, "", "")
        if not mark:
            kept = 0 if self._ended else overlap(reasoning, self._close)
            reasoning, rest = reasoning[: len(reasoning) - kept], reasoning[len(reasoning) - kept :]
        self._held = rest
        reasoning = self._pause + reasoning
        shown = reasoning if self._ended and not mark else reasoning.rstrip()
        self._pause = reasoning[len(shown) :]
        yield Piece("reasoning", shown)
        if mark:
            self._pause, self._reading = "", "before the answer"
