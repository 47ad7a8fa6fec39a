"""The reader's book of sources: whom routers and requests name is dialled, kept for as long as it may be needed, told
of when it cannot be read from.

Runs on the transfer thread, on behalf of its *owner*, who knows which requests need which source, and is told by the
peers themselves what they say.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Protocol

from pd_serve.errors import FailureKind
from pd_serve.transfer.session.handshake import Identity
from pd_serve.transfer.session.probe import Prober
from pd_serve.transfer.session.source_peer import Listener, SourcePeer, State
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.slices import counterparts
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Source

FORGET_S = 60.0  # a peer that cannot be reached and that nobody names is dropped after so long
FORGET_MISFIT_S = 600.0  # one that routers keep away from because of what this node told them
MAX_SOURCES = 256  # at once, as many as a source has readers; one more ends the one not named for longest

COUNTERS = (
    "slow_lanes",
    "self_test_failures",
    "handshakes",
    "handshakes_refused",
    "garbage_frames",
    "forged_frames",
)


class Owner(Listener, Protocol):
    """The inbox."""

    def addresses_in_use(self) -> Iterable[str]:
        """Those that requests read from, or may still."""

    def keys_at(self, peer: SourcePeer) -> list[str]:
        """Whose leases are to be kept alive there."""


class Peers:
    """``anywhere``: whether addresses other than loopback are dialled. ``handshake_s``: from dialling one to the end of
    its self-test. ``counters``: the owner's, for ``COUNTERS`` to be counted in."""

    def __init__(
        self,
        identity: Identity,
        worker: TransferWorker,
        owner: Owner,
        counters: dict[str, float],
        *,
        anywhere: bool,
        handshake_s: float,
        tls: Tls | None,
        changed: Callable[[], None],
    ) -> None:
        self.misfits: dict[str, str] = {}  # replaced, never changed: the main thread reads it
        self._identity = identity
        self._worker = worker
        self._owner = owner
        self._counters = counters
        self._anywhere = anywhere
        self._handshake_s = handshake_s
        self._tls = tls
        self._changed = changed
        self._peers: dict[str, SourcePeer] = {}  # by address

    def start(self) -> None:
        lanes = self._worker.lanes
        self._prober = Prober(lanes.memory, lanes.mover)
        for name in lanes.names:
            for counter in ("lane_chosen", "self_test_bytes", "self_test_seconds"):
                self._counters[f"{counter}_{name}"] = 0.0

    def run_due(self, now_s: float) -> float:
        """Dials, tests, keeps alive, forgets; returns in how many seconds it wants to be called again."""
        due_s = float("inf")
        for peer in list(self._peers.values()):
            if peer.state is State.PAUSED and now_s >= peer.named_s + (FORGET_MISFIT_S if peer.misfit else FORGET_S):
                self._forget(peer)
                continue
            due_s = min(due_s, peer.run_due(now_s, partial(self._owner.keys_at, peer)))
        return min(due_s - now_s, self._prober.run())

    def close(self) -> bool:
        """Says goodbye. False: a self-test may still write into the probe region."""
        for peer in self._peers.values():
            peer.close()
        return self._prober.idle

    def __getitem__(self, address: str) -> SourcePeer:
        return self._peers[address]

    def __iter__(self) -> Iterator[str]:
        return iter(self._peers)

    def __len__(self) -> int:
        return len(self._peers)

    def get(self, address: str) -> SourcePeer | None:
        return self._peers.get(address)

    def ranks(self, source: Source) -> range:
        """Those of the source that hold heads of this rank's."""
        return counterparts(self._identity.rank, self._identity.ranks, len(source.addresses))

    def connect(self, source: Source) -> None:
        """Ahead of use."""
        for rank in self.ranks(source):
            peer = self.named(source, source.addresses[rank])
            if peer is not None:
                peer.hurry()

    def named(self, source: Source, address: str) -> SourcePeer | None:
        """None where there are as many as can be, all of them in use."""
        peer = self._peers.get(address)
        if peer is None:
            if len(self._peers) >= MAX_SOURCES and not self._make_room():
                return None
            # at another address it has started anew
            for old in [p for p in self._peers.values() if p.named == source.node_id and p.misfit]:
                if old.address not in source.addresses:
                    self._forget(old)
            peer = self._peers[address] = SourcePeer(
                source,
                address,
                self._identity,
                self._worker,
                self._prober,
                self._owner,
                self._counters,
                self._misfits_changed,
                anywhere=self._anywhere,
                handshake_s=self._handshake_s,
                tls=self._tls,
            )
        peer.name(source)
        return peer

    def _make_room(self) -> bool:
        """Ends the peer that was not named for longest, of those that no request needs."""
        used = set(self._owner.addresses_in_use())
        idle = [peer for peer in self._peers.values() if peer.address not in used]
        if idle:
            self._forget(min(idle, key=lambda peer: peer.named_s))
        return bool(idle)

    def _forget(self, peer: SourcePeer) -> None:
        self._owner.peer_lost(peer, FailureKind.PEER_LOST, f"prefill node {peer.named} is at {peer.address} no more")
        del self._peers[peer.address]
        peer.close()
        self._misfits_changed()

    def _misfits_changed(self) -> None:
        found = {peer.named: peer.misfit for peer in self._peers.values() if peer.misfit}
        if found != self.misfits:
            self.misfits = found
            self._changed()
