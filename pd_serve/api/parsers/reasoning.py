"""Reasoning between two marks, before the answer: DeepSeek-R1, Qwen3, Magistral."""

from __future__ import annotations

from collections.abc import Iterator

from pd_serve.api.parsers.pieces import Parser, Piece, overlap


class Thinking(Parser):
    """``begun``: the prompt has opened it, or the model always thinks; else it does where its output opens it."""

    def __init__(self, open_mark: str, close_mark: str, *, begun: bool) -> None:
        super().__init__()
        self._open, self._close = open_mark, close_mark
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
            if text.startswith(self._open):
                self._held, self._reading, self._opened = text[len(self._open) :], "inside", True
            elif self._ended or (text and not self._open.startswith(text)):
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
                if self._take(self._open) is None:
                    return
                self._opened = True
                self._skip_spaces()
            if not self._held:
                return
            self._fresh = False
        reasoning, mark, rest = self._held.partition(self._close)
        if not mark:
            kept = 0 if self._ended else overlap(reasoning, (self._close,))
            reasoning, rest = reasoning[: len(reasoning) - kept], reasoning[len(reasoning) - kept :]
        self._held = rest
        reasoning = self._pause + reasoning
        shown = reasoning if self._ended and not mark else reasoning.rstrip()
        self._pause = reasoning[len(shown) :]
        yield Piece("reasoning", shown)
        if mark:
            self._pause, self._reading = "", "before the answer"
