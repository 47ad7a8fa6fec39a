"""How fast queued requests have been given memory lately, and so how long one more would wait.

Kept by the scheduler, told by whoever gives blocks to queued sequences. Only time in which somebody waited for room
counts: an idle engine places few requests because few come. What was seen fades, so that the past of another load
bounds nothing. Pure arithmetic on a clock that the caller passes in.
"""

from __future__ import annotations

import math

HALF_LIFE_S = 20.0
# Of a placement, after fading: with less than that nothing is known.
LEAST_SEEN = 0.5


class Pace:
    def __init__(self, now_s: float) -> None:
        self._at_s = now_s  # until when everything is booked
        self._blocked = False
        self._blocked_s = 0.0  # both fade
        self._placed = 0.0

    def placed(self, now_s: float) -> None:
        """A sequence was given its blocks."""
        self._book(now_s)
        if self._blocked:
            self._placed += 1.0

    def blocked(self, blocked: bool, now_s: float) -> None:
        """Whether, from now on, anybody waits for room."""
        self._book(now_s)
        self._blocked = blocked

    def wait_s(self, ahead: int, now_s: float) -> float:
        """How long a request waits that comes when ``ahead`` others do; 0 where nothing is known."""
        self._book(now_s)
        if not ahead or self._placed < LEAST_SEEN:
            return 0.0
        return ahead * self._blocked_s / self._placed

    def _book(self, now_s: float) -> None:
        passed_s = max(0.0, now_s - self._at_s)
        self._at_s = now_s
        kept = math.exp2(-passed_s / HALF_LIFE_S)
        self._placed *= kept
        self._blocked_s *= kept
        if self._blocked:
            self._blocked_s += (1.0 - kept) * HALF_LIFE_S / math.log(2)
