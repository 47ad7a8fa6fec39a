"""Which nodes are likely to have which prefixes cached: hints, by the names of :mod:`pd_serve.wire.chunks`.

Plain data, bounded. Names may be in a node's KV cache, in its host tier, or in both: what has to be brought back counts
for a little less. A node that is named wrongly computes what it was thought to have; one that is forgotten is found
by its load. Prefixes are evicted tail first, so that whoever has a chunk is taken to have those before it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

from pd_serve.wire.chunks import CHUNK_TOKENS

HOST_WORTH = 0.9  # of a token that is cached: bringing it back takes some of the time that computing it would
MAX_NAMES = 2_000_000  # of all nodes together, about 200 bytes each: 1,000 nodes of a million tokens
_OWNERS = 4  # of one name that are found by it; more would not be looked at


class Prefixes:
    def __init__(self, most: int = MAX_NAMES) -> None:
        self._most = most
        self.held: dict[str, dict[int, None]] = {}  # by node id: names, the least recently used first; to be read only
        self._owners: dict[int, list[str]] = {}  # by name: the last to have said so
        # By node id, where there is a host tier: names in it, and whether they are in the KV cache as well.
        self._host: dict[str, dict[int, bool]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.held.values()))

    def stored(self, id: str, names: Sequence[int]) -> None:
        """``names``: a chain or a part of one, in order."""
        if not names:
            return
        held, host = self.held.setdefault(id, {}), self._host.get(id, {})
        for name in host.keys() & names if host else ():
            host[name] = True
        for name in reversed(names):  # the head is needed by most: it is forgotten last
            if name in held:
                del held[name]
            else:
                owners = self._owners.setdefault(name, [])
                owners.append(id)
                del owners[:-_OWNERS]
            held[name] = None
        for name in [name for name, _ in zip(held, range(len(held) - self._most // len(self.held)), strict=False)]:
            self._drop(id, held, name)

    def evicted(self, id: str, names: Iterable[int]) -> None:
        held, host = self.held.get(id), self._host.get(id, {})
        if held is not None:
            for name in names:
                if name in host:
                    host[name] = False
                elif name in held:
                    self._drop(id, held, name)

    def put_by(self, id: str, names: Sequence[int]) -> None:
        """They are in the node's host tier from now on."""
        held, host = self.held.get(id, {}), self._host.setdefault(id, {})
        here = {name for name in names if name in held}
        self.stored(id, names)
        host.update({name: name in here for name in names})

    def dropped(self, id: str, names: Iterable[int]) -> None:
        """They are in its host tier no more."""
        held, host = self.held.get(id, {}), self._host.get(id, {})
        for name in names:
            if host.pop(name, True) is False and name in held:
                self._drop(id, held, name)

    def found(self, id: str, names: Sequence[int], cached_tokens: int) -> None:
        """What the node had of a prompt when it computed it: what it was thought to have beyond is not there."""
        self.evicted(id, names[-(-cached_tokens // CHUNK_TOKENS) :])

    def forget(self, id: str) -> None:
        held = self.held.get(id, {})
        for name in list(held):
            self._drop(id, held, name)
        self.held.pop(id, None)
        self._host.pop(id, None)

    def count(self, id: str) -> int:
        return len(self.held.get(id, ()))

    def names(self, id: str) -> set[int]:
        return set(self.held.get(id, ()))

    def _drop(self, id: str, held: dict[int, None], name: int) -> None:
        del held[name]
        self._host.get(id, {}).pop(name, None)
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
        """How much of the chain the node has; what is in its host tier alone counts for less."""
        depth = _depth(self.held.get(id, {}), names)
        if self._host and (host := self._host.get(id)):
            far = sum(host.get(name) is False for name in names[:depth])
            return int((depth - (1 - HOST_WORTH) * far) * CHUNK_TOKENS)
        return depth * CHUNK_TOKENS


def _depth(known: dict[int, None] | dict[int, list[str]], names: Sequence[int]) -> int:
    """How many of ``names`` are known, by bisection: those before one that is are, too."""
    return len(names) - bisect_left(names[::-1], True, key=known.__contains__)
