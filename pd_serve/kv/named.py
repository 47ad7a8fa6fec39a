"""The names of the prefixes that are cached here, and which of them have come or gone since routers were told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable


class Named:
    """``held``: how many blocks a name's prefix ends in; several, where blocks hold tokens behind that end."""

    def __init__(self) -> None:
        self.held: Counter[int] = Counter()
        self._told: set[int] = set()
        self._changed: dict[int, None] = {}

    def stored(self, names: Iterable[int]) -> None:
        for name in names:
            self.held[name] += 1
            self._changed[name] = None

    def evicted(self, names: Iterable[int]) -> None:
        for name in names:
            self.held[name] -= 1
            if not self.held[name]:
                del self.held[name]
            self._changed[name] = None

    def clear(self) -> None:
        self._changed.update(dict.fromkeys(self.held))
        self.held.clear()

    def take(self) -> tuple[list[int], list[int]]:
        """Those that have come and those that have gone since the last call, each once."""
        changed, self._changed = self._changed, {}
        come = [name for name in changed if name in self.held and name not in self._told]
        gone = [name for name in changed if name not in self.held and name in self._told]
        self._told.update(come)
        self._told.difference_update(gone)
        return come, gone
