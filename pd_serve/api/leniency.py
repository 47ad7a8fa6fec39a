"""What happens to fields that a request may leave out without another answer: accepted, and logged once each.

One for a router; :mod:`pd_serve.api.parsing` hands it to every check. ``strict`` makes unknown fields errors.
"""

from __future__ import annotations

import difflib
import logging

log = logging.getLogger(__name__)

_MOST = 256  # names that are remembered: clients choose them, and memory must not grow with them


class Leniency:
    """Methods may be called from several threads."""

    def __init__(self, *, strict: bool) -> None:
        self.strict = strict
        self._seen: set[str] = set()

    def without_effect(self, name: str) -> None:
        if self._is_new(name):
            log.info("the field '%s' of a request has no effect here (said once)", name)

    def unknown(self, name: str, known: list[str]) -> None:
        if self._is_new(name[:80]):
            log.warning("unknown field %r of a request is ignored%s (said once)", name[:80], nearest(name, known))

    def _is_new(self, name: str) -> bool:
        if name in self._seen or len(self._seen) >= _MOST:
            return False
        self._seen.add(name)
        return True


def nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name[:80].lower(), known, n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
