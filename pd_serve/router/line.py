"""Streams that have begun and that every node has refused: they wait in one line, the oldest asks first.

One asks at a time. Where it is accepted the next one asks at once; where it is not, all wait for a moment. Time is
handed in, so that waiting and recovery can be tested without any.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

_PAUSE_S = (0.2, 2.0)  # bounds of the moment


class Timer(Protocol):
    def cancel(self) -> None: ...


class Clock(Protocol):
    def now_s(self) -> float:
        """Monotonic."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> Timer: ...


class Line:
    def __init__(self) -> None:
        self._members: dict[object, tuple[float, Callable[[], None]]] = {}
        self._timer: Timer | None = None

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, member: object) -> bool:
        return member in self._members

    def join(self, member: object, since_s: float, ask: Callable[[], None], clock: Clock, pause_s: float) -> None:
        """``ask`` is called once, when it is the member's turn. Oldest: the smallest ``since_s``."""
        low, high = _PAUSE_S
        self._members[member] = since_s, ask
        if self._timer is None:
            self._start(clock, min(max(pause_s, low), high))

    def leave(self, member: object) -> None:
        self._members.pop(member, None)

    def advance(self) -> None:
        """There is room: the oldest asks now."""
        if self._members:
            oldest = min(self._members, key=lambda member: self._members[member][0])
            _, ask = self._members.pop(oldest)
            ask()

    def _start(self, clock: Clock, pause_s: float) -> None:
        def tick() -> None:
            self._timer = None
            if self._members:
                self._start(clock, pause_s)  # first: whatever the next one meets with, the others have their turn
                self.advance()

        self._timer = clock.call_later(pause_s, tick)
