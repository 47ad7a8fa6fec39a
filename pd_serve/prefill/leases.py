"""The book of leases: which requests' blocks this node promised to keep, to whom, and for how long.

Pure bookkeeping on a clock that the caller passes in; the outbox does the talking. A key goes through
here once: *open* until it ends, then remembered for a while so that latecomers get an answer.

A lease's time starts when its key is opened. As long as nobody has claimed it, every published chunk
starts it anew; from the claim on only the claimant's claim and heartbeats do. Claims that come before their key is open
(this node is in a long step) live by heartbeats, too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from pd_serve.wire.peer import Ready

Holder = bytes  # the session of the decode node that claimed a key


class Claimed(Enum):
    OPEN = "open"  # the claimant now holds the lease
    WAITING = "waiting"  # the key is not open yet; the claim is kept
    GONE = "gone"  # the lease has ended, or somebody else holds it


@dataclass
class Lease:
    expires_s: float
    holder: Holder | None = None
    ready: list[Ready] = field(default_factory=list)  # everything published so far
    complete: bool = False


class LeaseBook:
    """``unclaimed_s``: how long blocks are kept for a decode node that has not claimed them yet, which may be in a long
    step; not given: ``lease_s``."""

    def __init__(
        self, lease_s: float, *, unclaimed_s: float | None = None, max_waiting: int = 4096, max_ended: int = 4096
    ) -> None:
        self.lease_s = lease_s
        self._unclaimed_s = unclaimed_s or lease_s
        self._max_waiting = max_waiting
        self._max_ended = max_ended
        self._leases: dict[str, Lease] = {}
        self._waiting: OrderedDict[str, tuple[Holder, float]] = OrderedDict()  # claims of keys not open yet
        self._ended: OrderedDict[str, str] = OrderedDict()  # why

    def __len__(self) -> int:
        return len(self._leases)

    def open(self, key: str, now_s: float) -> bool:
        """Starts the key's lease, held by who has claimed it already. False: it has ended before.

        A lease that ends before it opens (its claimant declined) leaves nothing to free.
        """
        if key in self._leases:
            return True
        if key in self._ended:
            return False
        lease = self._leases[key] = Lease(expires_s=now_s + self._unclaimed_s)
        if key in self._waiting:
            lease.holder = self._waiting.pop(key)[0]
            lease.expires_s = now_s + self.lease_s
        return True

    def publish(self, key: str, ready: Ready, now_s: float) -> Lease | None:
        """Records what became ready. None when the lease has ended."""
        lease = self._leases.get(key)
        if lease is not None:
            lease.ready.append(ready)
            lease.complete |= ready.first is not None
            if lease.holder is None:
                lease.expires_s = now_s + self._unclaimed_s
        return lease

    def claim(self, key: str, holder: Holder, now_s: float) -> Claimed:
        lease = self._leases.get(key)
        if lease is None:
            if key in self._ended:
                return Claimed.GONE
            self._waiting[key] = (holder, now_s + self.lease_s)
            if len(self._waiting) > self._max_waiting:
                self._waiting.popitem(last=False)
            return Claimed.WAITING
        if lease.holder not in (None, holder):
            return Claimed.GONE
        lease.holder = holder
        lease.expires_s = now_s + self.lease_s
        return Claimed.OPEN

    def published(self, key: str) -> list[Ready]:
        """All that was published of an open key."""
        return self._leases[key].ready

    def holds(self, key: str, holder: Holder) -> bool:
        lease = self._leases.get(key)
        return lease is not None and lease.holder == holder

    def why_ended(self, key: str) -> str:
        return self._ended.get(key, "another decode node holds it")

    def heartbeat(self, keys: list[str], holder: Holder, now_s: float) -> list[str]:
        """Extends the leases and claims of ``keys``; returns those that ``holder`` does not hold (any more).

        A claim whose request never comes ends with it: the router takes the request back from the decode node.
        """
        gone = []
        for key in keys:
            lease = self._leases.get(key)
            if lease is not None and lease.holder == holder:
                lease.expires_s = now_s + self.lease_s
            elif self._waiting.get(key, (None,))[0] == holder:
                self._waiting[key] = (holder, now_s + self.lease_s)
            else:
                gone.append(key)
        return gone

    def release(self, key: str, holder: Holder, *, done: bool) -> bool | None:
        """Ends the lease at its holder's wish. None: it held none; otherwise whether its blocks may be used."""
        waiting = self._waiting.get(key)
        if waiting is not None and waiting[0] == holder:
            del self._waiting[key]
            self._remember(key, "declined")
            return None
        lease = self._leases.get(key)
        if lease is None or lease.holder != holder:
            return None
        self._end(key, "released" if done else "declined")
        return done and lease.complete

    def cancel(self, key: str, reason: str) -> Holder | None:
        """Ends the lease, or what may still come of it, from this side; returns who has to be told."""
        lease = self._leases.get(key)
        if lease is not None:
            self._end(key, reason)
            return lease.holder
        if key in self._waiting:
            holder = self._waiting.pop(key)[0]
            self._remember(key, reason)
            return holder
        if key not in self._ended:
            self._remember(key, reason)
        return None

    def drop(self, holder: Holder) -> list[str]:
        """Ends everything a session holds; returns the keys of its leases."""
        for key in [k for k, (h, _) in self._waiting.items() if h == holder]:
            del self._waiting[key]
        keys = [key for key, lease in self._leases.items() if lease.holder == holder]
        for key in keys:
            self._end(key, "peer_lost")
        return keys

    def expire(self, now_s: float) -> list[str]:
        """Ends what has run out; returns the keys of its leases."""
        for key in [k for k, (_, expires_s) in self._waiting.items() if expires_s <= now_s]:
            del self._waiting[key]
        keys = [key for key, lease in self._leases.items() if lease.expires_s <= now_s]
        for key in keys:
            self._end(key, "expired")
        return keys

    def next_expiry_s(self) -> float:
        """When the next lease or waiting claim runs out; ``inf`` without any."""
        leases = min((lease.expires_s for lease in self._leases.values()), default=float("inf"))
        claims = min((expires_s for _, expires_s in self._waiting.values()), default=float("inf"))
        return min(leases, claims)

    def _end(self, key: str, why: str) -> None:
        del self._leases[key]
        self._remember(key, why)

    def _remember(self, key: str, why: str) -> None:
        self._ended[key] = why
        if len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)
