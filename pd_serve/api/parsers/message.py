"""One choice's message as it comes: text through its parsers, pieces as a chat's deltas, and all of it in the end."""

from __future__ import annotations

import secrets
from typing import Any

from pd_serve.api.parsers.harmony import Harmony
from pd_serve.api.parsers.pieces import Parser, Piece
from pd_serve.api.parsers.reasoning import Thinking

Delta = dict[str, Any]


class MessageParser:
    """``calls``: None where no call can come. ``several``: whether more than one call is told.

    ``with_reasoning``: whether reasoning is told; it is told apart in any case.
    """

    def __init__(
        self,
        reasoning: Thinking | Harmony | None,
        calls: Parser | None,
        *,
        several: bool = True,
        with_reasoning: bool = True,
    ) -> None:
        self._reasoning = reasoning
        self._calls = calls
        self._several = several
        self._with_reasoning = with_reasoning
        self._said: dict[str, list[str]] = {"reasoning": [], "content": []}
        self._made: list[dict[str, Any]] = []  # calls
        self._arguments: list[list[str]] = []  # of each
        self.reasoning_tokens = 0

    @property
    def called(self) -> bool:
        return bool(self._made)

    def feed(self, text: str, num_tokens: int) -> list[Delta]:
        """``num_tokens``: of which the text is made."""
        if self._reasoning is None:
            return self._deltas(self._calls.feed(text) if self._calls is not None else [Piece("content", text)])
        thought = self._reasoning.thinks
        pieces = self._reasoning.feed(text)
        if thought or self._reasoning.thinks:
            self.reasoning_tokens += num_tokens
        return self._deltas(self._told(pieces))

    def finish(self) -> list[Delta]:
        pieces = self._told(self._reasoning.finish()) if self._reasoning is not None else []
        return self._deltas(pieces + (self._calls.finish() if self._calls is not None else []))

    def message(self) -> Delta:
        """The whole, when it is finished."""
        content = "".join(self._said["content"])
        found: Delta = {"role": "assistant", "content": content}
        if self._made:
            calls = [
                {**call, "function": {**call["function"], "arguments": "".join(parts)}}
                for call, parts in zip(self._made, self._arguments, strict=True)
            ]
            found |= {"content": content or None, "tool_calls": calls}
        if text := "".join(self._said["reasoning"]):
            found |= {"reasoning": text, "reasoning_content": text}
        return found

    def _told(self, pieces: list[Piece]) -> list[Piece]:
        """Content has calls in it."""
        if self._calls is None:
            return pieces
        found: list[Piece] = []
        for piece in pieces:
            found += self._calls.feed(piece.text) if piece.kind == "content" else [piece]
        return found

    def _deltas(self, pieces: list[Piece]) -> list[Delta]:
        return [delta for piece in pieces if (delta := self._delta(piece)) is not None]

    def _delta(self, piece: Piece) -> Delta | None:
        match piece.kind:
            case "content":
                self._said["content"].append(piece.text)
                return {"content": piece.text}
            case "reasoning":
                if not self._with_reasoning:
                    return None
                self._said["reasoning"].append(piece.text)
                return {"reasoning": piece.text, "reasoning_content": piece.text}
            case "call":
                self._open = self._several or not self._made
                if not self._open:
                    return None
                function = {"name": piece.text, "arguments": ""}
                call = {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": function}
                self._made.append(call)
                self._arguments.append([])
                return {"tool_calls": [{"index": len(self._made) - 1, **call, "function": dict(function)}]}
            case _:
                if not self._open:
                    return None
                self._arguments[-1].append(piece.text)
                return {"tool_calls": [{"index": len(self._made) - 1, "function": {"arguments": piece.text}}]}

    _open = False  # whether the last call is told
