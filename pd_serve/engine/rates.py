"""Whether a prefix is sooner here from the host tier or by computing it: by what both took lately, a token.

Asked by :mod:`pd_serve.engine.arrivals`. Both are measured as requests see them, with all that they waited for, so that
a busy device makes loads worth more and a busy bus makes them worth less.
"""

from __future__ import annotations

_FADING = 0.9  # what a measurement weighs after each later one
_TRY_AGAIN = 16  # so many refusals later a load is tried all the same: what it takes may have changed


class Rate:
    """Seconds a token."""

    def __init__(self) -> None:
        self._seconds = self._tokens = 0.0

    def add(self, tokens: int, seconds: float) -> None:
        self._seconds = self._seconds * _FADING + seconds
        self._tokens = self._tokens * _FADING + tokens

    @property
    def known(self) -> bool:
        return self._tokens > 0

    @property
    def token_s(self) -> float:
        return self._seconds / self._tokens


class Rates:
    def __init__(self) -> None:
        self.load = Rate()
        self.compute = Rate()
        self._refused = 0

    def load_pays(self) -> bool:
        """Also where one of both has not been seen yet."""
        if not (self.load.known and self.compute.known) or self.load.token_s <= self.compute.token_s:
            self._refused = 0
            return True
        self._refused = (self._refused + 1) % _TRY_AGAIN
        return not self._refused
