"""The book of leases: which requests' blocks this node promised to keep, to whom, and for how long.

Pure bookkeeping on a clock that the caller passes in; the outbox does the talking. A key goes through
here once: *open* until it ends, then remembered for a while so that latecomers get an answer.

A key is read by one decode node, by those of its ranks that hold heads of this one's: its *party*. Each rank claims,
keeps alive and releases for itself; the lease ends well when all have released, and ends for all when it ends for one.

A lease's time starts when its key is opened. As long as a rank has not claimed it, every published chunk starts that
rank's time anew; from the claim on only the rank's claim and heartbeats do. Claims that come before their key is open
(this node is in a long step) live by heartbeats, too.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from enum import Enum

from pd_serve.wire.peer import Ready

Holder = bytes  # the session of a decode node's rank that claimed a key


@dataclass(frozen=True)
class Party:
    """The ranks of a decode node that read from here. ``node``: its name and epoch."""

    node: tuple[str, str] = ("", "")
    size: int = 1


ALONE = Party()


class Claimed(Enum):
    OPEN = "open"  # the claimant now holds the lease, or its part of it
    WAITING = "waiting"  # the key is not open yet; the claim is kept
    GONE = "gone"  # the lease has ended, or somebody else holds it


@dataclass
class _Claims:
    party: Party
    until_s: dict[Holder, float] = field(default_factory=dict)  # of those who have claimed and not released
    released: set[Holder] = field(default_factory=set)

    @property
    def missing(self) -> int:
        """Ranks that have not claimed yet."""
        return self.party.size - len(self.until_s) - len(self.released)

    def admits(self, holder: Holder, party: Party) -> bool:
        return party == self.party and (holder in self.until_s or (self.missing > 0 and holder not in self.released))


@dataclass
class Lease:
    expires_s: float  # as long as a rank has not claimed it
    claims: _Claims | None = None
    ready: list[Ready] = field(default_factory=list)  # everything published so far
    complete: bool = False

    @property
    def holders(self) -> tuple[Holder, ...]:
        """Who has claimed it and not released."""
        return tuple(self.claims.until_s) if self.claims else ()

    @property
    def due_s(self) -> float:
        """When it runs out, unless somebody is heard of."""
        if self.claims is None:
            return self.expires_s
        heard_s = min(self.claims.until_s.values(), default=float("inf"))
        return min(heard_s, self.expires_s) if self.claims.missing else heard_s


@dataclass(frozen=True)
class Ended:
    """``others``: who had claimed the key, has not released it and does not know yet. ``leased``: it was open."""

    key: str
    why: str
    others: tuple[Holder, ...] = ()
    leased: bool = True


@dataclass(frozen=True)
class Release:
    """``valid``: whether the one who released may use what it has read."""

    valid: bool
    ended: Ended | None = None


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
        self._waiting: OrderedDict[str, _Claims] = OrderedDict()  # of keys not open yet
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
        lease = self._leases[key] = Lease(now_s + self._unclaimed_s, self._waiting.pop(key, None))
        if lease.claims is not None:
            lease.claims.until_s = dict.fromkeys(lease.claims.until_s, now_s + self.lease_s)
        return True

    def publish(self, key: str, ready: Ready, now_s: float) -> Lease | None:
        """Records what became ready. None when the lease has ended."""
        lease = self._leases.get(key)
        if lease is not None:
            lease.ready.append(ready)
            lease.complete |= ready.first is not None
            lease.expires_s = now_s + self._unclaimed_s
        return lease

    def claim(self, key: str, holder: Holder, now_s: float, party: Party = ALONE) -> Claimed:
        lease = self._leases.get(key)
        if lease is None and key in self._ended:
            return Claimed.GONE
        claims = self._waiting.get(key) if lease is None else lease.claims
        if claims is None or (lease is None and not claims.admits(holder, party)):
            claims = _Claims(party)
        if not claims.admits(holder, party):
            return Claimed.GONE
        claims.until_s[holder] = now_s + self.lease_s
        if lease is not None:
            lease.claims = claims
            return Claimed.OPEN
        self._waiting[key] = claims
        if len(self._waiting) > self._max_waiting:
            self._waiting.popitem(last=False)
        return Claimed.WAITING

    def published(self, key: str) -> list[Ready]:
        """All that was published of an open key."""
        return self._leases[key].ready

    def holds(self, key: str, holder: Holder) -> bool:
        lease = self._leases.get(key)
        return lease is not None and holder in lease.holders

    def why_ended(self, key: str) -> str:
        return self._ended.get(key, "another decode node holds it")

    def heartbeat(self, keys: list[str], holder: Holder, now_s: float) -> list[str]:
        """Extends the leases and claims of ``keys``; returns those that ``holder`` does not hold (any more).

        A claim whose request never comes ends with it: the router takes the request back from the decode node.
        """
        gone = []
        for key in keys:
            claims = self._claims(key)
            if claims is not None and holder in claims.until_s:
                claims.until_s[holder] = now_s + self.lease_s
            else:
                gone.append(key)
        return gone

    def release(self, key: str, holder: Holder, *, done: bool) -> Release:
        """Its holder needs the key no more: ``done``, or it declines, which ends the lease for all who share it."""
        claims, lease = self._claims(key), self._leases.get(key)
        if claims is None or holder not in claims.until_s:
            return Release(valid=False)
        del claims.until_s[holder]
        if lease is None or not done:
            return Release(valid=False, ended=self._end(key, "declined"))
        claims.released.add(holder)
        over = len(claims.released) == claims.party.size or not lease.complete
        return Release(valid=lease.complete, ended=self._end(key, "released") if over else None)

    def cancel(self, key: str, reason: str) -> tuple[Holder, ...]:
        """Ends the lease, or what may still come of it, from this side; returns who has to be told."""
        if key in self._ended:
            return ()
        return self._end(key, reason).others

    def drop(self, holder: Holder) -> list[Ended]:
        """Ends everything a session holds and has not released; returns the leases among it."""
        for key, claims in list(self._waiting.items()):
            claims.until_s.pop(holder, None)
            if not claims.until_s:
                del self._waiting[key]
        keys = [key for key, lease in self._leases.items() if holder in lease.holders]
        return [self._end(key, "peer_lost", knows=holder) for key in keys]

    def expire(self, now_s: float) -> list[Ended]:
        """Ends what has run out; returns the leases among it."""
        for key, claims in list(self._waiting.items()):
            _drop_silent(claims, now_s)
            if not claims.until_s:
                del self._waiting[key]
        due = [(key, lease) for key, lease in self._leases.items() if lease.due_s <= now_s]
        for _, lease in due:
            if lease.claims is not None:
                _drop_silent(lease.claims, now_s)  # they learn it from their heartbeats, if at all
        return [self._end(key, "expired") for key, _ in due]

    def next_expiry_s(self) -> float:
        """When the next lease or waiting claim runs out; ``inf`` without any."""
        leases = min((lease.due_s for lease in self._leases.values()), default=float("inf"))
        claims = min((s for claims in self._waiting.values() for s in claims.until_s.values()), default=float("inf"))
        return min(leases, claims)

    def _claims(self, key: str) -> _Claims | None:
        lease = self._leases.get(key)
        return self._waiting.get(key) if lease is None else lease.claims

    def _end(self, key: str, why: str, knows: Holder | None = None) -> Ended:
        claims = self._claims(key)
        others = tuple(holder for holder in claims.until_s if holder != knows) if claims else ()
        leased = self._leases.pop(key, None) is not None
        self._waiting.pop(key, None)
        self._ended[key] = why
        if len(self._ended) > self._max_ended:
            self._ended.popitem(last=False)
        return Ended(key, why, others, leased)


def _drop_silent(claims: _Claims, now_s: float) -> None:
    claims.until_s = {holder: until_s for holder, until_s in claims.until_s.items() if until_s > now_s}
