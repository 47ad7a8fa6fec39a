"""Which nodes are likely to have which prefixes cached: hints, by the names of :mod:`pd_serve.wire.chunks`.

Plain data, bounded. A node that is named wrongly computes what it was thought to have; one that is forgotten is found
by its load. Prefixes are evicted tail first, so that whoever has a chunk is taken to have those before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pd_serve.wire.chunks import CHUNK_TOKENS

MAX_NAMES = 2_000_000  # of all nodes together, about 200 bytes each: 1,000 nodes of a million tokens
_OWNERS = 4  # of one name that are found by it; more would not be looked at


class Prefixes:
    def __init__(self, most: int = MAX_NAMES) -> None:
        self._most = most
        self._held: dict[str, dict[int, None]] = {}  # by node id: names, the least recently used first
        self._owners: dict[int, list[str]] = {}  # by name: the last to have said so

    def __len__(self) -> int:
        return sum(map(len, self._held.values()))

    def stored(self, id: str, names: Sequence[int]) -> None:
        """``names``: a chain or a part of one, in order."""
        if not names:
            return
        held = self._held.setdefault(id, {})
        for name in reversed(names):  # the head is needed by most: it is forgotten last
            if name in held:
                del held[name]
            else:
                owners = self._owners.setdefault(name, [])
                owners.append(id)
                del owners[:-_OWNERS]
            held[name] = None
        for name in [name for name, _ in zip(held, range(len(held) - self._most // len(self._held)), strict=False)]:
            self._drop(id, held, name)

    def evicted(self, id: str, names: Iterable[int]) -> None:
        held = self._held.get(id)
        if held is not None:
            for name in names:
                if name in held:
                    self._drop(id, held, name)

    def found(self, id: str, names: Sequence[int], cached_tokens: int) -> None:
        """What the node had of a prompt when it computed it: what it was thought to have beyond is not there."""
        self.evicted(id, names[-(-cached_tokens // CHUNK_TOKENS) :])

    def forget(self, id: str) -> None:
        held = self._held.get(id, {})
        for name in list(held):
            self._drop(id, held, name)
        self._held.pop(id, None)

    def count(self, id: str) -> int:
        return len(self._held.get(id, ()))

    def names(self, id: str) -> set[int]:
        return set(self._held.get(id, ()))

    def _drop(self, id: str, held: dict[int, None], name: int) -> None:
        del held[name]
        owners = self._owners[name]
        if id in owners:
            owners.remove(id)
        if not owners:
            del self._owners[name]  # others that had it are no longer found by it

    def owners(self, names: Sequence[int]) -> Sequence[str]:
        """Those that have most of the chain."""
        depth = _depth(self._owners, names)
        return self._owners[names[depth - 1]] if depth else ()

    def tokens(self, id: str, names: Sequence[int]) -> int:
        """How much of the chain the node has."""
        held = self._held.get(id)
        return _depth(held, names) * CHUNK_TOKENS if held else 0


def _depth(known: dict[int, None] | dict[int, list[str]], names: Sequence[int]) -> int:
    """How many of ``names`` are known, by bisection: those before one that is are, too."""
    if not names or names[0] not in known:
        return 0
    low, high = 1, len(names)  # so many are known; more than so many are not
    while low < high:
        middle = (low + high + 1) // 2
        if names[middle - 1] in known:
            low = middle
        else:
            high = middle - 1
    return low
