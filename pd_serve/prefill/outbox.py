"""The outbox: leased requests, what is announced of them, and when their leases end.

The main thread opens, publishes and cancels keys and frees blocks when ``LeaseEnded`` says so; all
else happens on the transfer thread: claims, checksums, heartbeats, releases, expiry. The outbox never
writes to a block. Published blocks must stay as they are until the lease has ended.

Readers come in through the door (:mod:`pd_serve.transfer.session.door`). When a session ends, the leases that it
claimed end with it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable

import msgspec

from pd_serve.errors import FailureKind, TransferError
from pd_serve.prefill.leases import Claimed, Ended, Holder, LeaseBook, Party
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.poller import look_s
from pd_serve.transfer.session import probe
from pd_serve.transfer.session.door import COUNTERS, Door
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Identity
from pd_serve.transfer.session.reader_session import Session
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.slices import counterparts
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire

log = logging.getLogger(__name__)

# Beside a GPU the thread stays awake for so long after an announcement, to confirm the lease when the blocks were read:
# waking up can take as long as reading them.
ANSWER_S = 2e-3

COMPUTED_LOOK_S = 0.2e-3  # how soon to ask again whether a device has computed what is to be announced


class LeaseEnded(msgspec.Struct, frozen=True):
    """To the main thread, once for each key it opened and did not cancel: free the blocks, stop computing."""

    key: str
    why: str  # "released" | "expired" | "peer_lost" | "declined"


class Outbox:
    """A service of ``worker``. ``host``: the address that the door binds; the port is any free one."""

    def __init__(
        self,
        identity: Identity,
        worker: TransferWorker,
        *,
        host: str,
        lease_s: float,
        handshake_s: float = HANDSHAKE_S,
        tls: Tls | None = None,
        unclaimed_s: float | None = None,
    ) -> None:
        self._identity = identity
        self._worker = worker
        self._lanes = worker.lanes
        self._clock = worker.clock
        self._book = LeaseBook(lease_s, unclaimed_s=unclaimed_s)
        self._awake_until_s = float("-inf")
        self._uncomputed: deque[tuple[wire.Ready, Callable[[], bool]]] = deque()
        self._events: Mailbox[LeaseEnded] = Mailbox()
        self._counters: dict[str, float] = dict.fromkeys(
            (
                "leases_opened",
                "leases_released",
                "leases_expired",
                "leases_peer_lost",
                "leases_declined",
                "leases_cancelled",
                "checksum_bytes",
                *COUNTERS,
            ),
            0.0,
        )
        self._door = Door(
            identity,
            worker,
            self,
            self._counters,
            host=host,
            lease_s=lease_s,
            handshake_s=handshake_s,
            tls=tls,
        )
        worker.add(self)

    # --- main thread

    def listen(self, timeout_s: float) -> tuple[str, ...]:
        """Lets readers in, from now on: the address that they dial. Idempotent. Raises TransferError."""
        try:
            return (self._worker.ask(self._door.open).result(timeout_s),)
        except TimeoutError:
            raise TransferError(FailureKind.TRANSFER, f"readers could not be let in within {timeout_s:g} s") from None

    def open(self, key: str) -> None:
        """The request is admitted here; its lease starts."""
        self._worker.call(self._open, key)

    def publish(
        self,
        key: str,
        num_tokens: int,
        blocks: list[wire.Blocks],
        first: int | None,
        computed: Callable[[], bool] | None = None,
    ) -> None:
        """These blocks of an open key are computed, ``num_tokens`` in all from 0.

        ``first``, with the last chunk: the token sampled from the prompt. ``computed``: for who runs ahead of its
        device, asked on the transfer thread until it is so; it never blocks. Those that have one keep their order.
        """
        ready = wire.Ready(key, num_tokens, blocks, None if first is None else wire.First(first))
        if computed is None:
            self._worker.call(self._publish, ready)
        else:
            self._worker.call(self._uncomputed.append, (ready, computed))

    def cancel(self, key: str, reason: str) -> None:
        """The request ended here. No ``LeaseEnded`` follows, but one may be on its way already."""
        self._worker.call(self._cancel, key, reason)

    def fileno(self) -> int:
        """Readable while there are events."""
        return self._events.fileno()

    def events(self) -> list[LeaseEnded]:
        """Raises TransferError where the transfer thread has given up."""
        self._worker.check()
        return self._events.take()

    def counters(self) -> dict[str, float]:
        """Monotonic since the start."""
        return dict(self._counters)

    @property
    def num_leases(self) -> int:
        return len(self._book)

    def close(self) -> None:
        """After the thread has ended."""
        self._events.close()

    # --- transfer thread: the service

    def start(self) -> None:
        probe.fill(self._lanes.memory, self._lanes.mover, self._identity.epoch)

    def run_due(self, now_s: float) -> float:
        for ended in self._book.expire(now_s):
            log.warning("the lease of %s ran out without a sign of its decode node", ended.key)
            self._lease_ended(ended)
        due_s = min(self._book.next_expiry_s(), self._door.run_due(now_s))
        soon_s = float("inf")
        for holder, session in list(self._door.sessions.items()):
            soon_s = min(soon_s, self._announce(holder, session))
        if now_s < self._awake_until_s:
            soon_s = min(soon_s, look_s(self._lanes.memory.device))
        while self._uncomputed and self._uncomputed[0][1]():
            self._publish(self._uncomputed.popleft()[0])
        if self._uncomputed:
            soon_s = min(soon_s, COMPUTED_LOOK_S)
        return min(due_s - now_s, soon_s)

    def stop(self) -> bool:
        self._door.close()
        return True  # nothing here writes

    def gave_up(self) -> None:
        self._events.wake()

    # --- transfer thread: calls of the main thread

    def _open(self, key: str) -> None:
        self._counters["leases_opened"] += 1
        if not self._book.open(key, self._clock()):
            self._lease_ended(Ended(key, "declined"))  # the decode node gave up before the request came to be admitted

    def _publish(self, ready: wire.Ready) -> None:
        lease = self._book.publish(ready.key, ready, self._clock())
        for holder in lease.holders if lease is not None else ():
            self._announce_to(holder, ready)

    def _cancel(self, key: str, reason: str) -> None:
        held = len(self._book)
        holders = self._book.cancel(key, reason)
        self._counters["leases_cancelled"] += held - len(self._book)
        for holder in holders:
            self._door.send(holder, wire.Cancel(key, reason))

    # --- transfer thread: announcements, with the checksums of their blocks

    def _announce_to(self, holder: Holder, ready: wire.Ready) -> None:
        session = self._door.sessions.get(holder)
        if session is not None:
            self._announce(holder, session, ready)

    def _announce(self, holder: Holder, session: Session, new: wire.Ready | None = None) -> float:
        """Sends what has its checksums, in order; returns when to look again. A session that cannot is ended."""
        try:
            if new is not None:
                session.announce(new)
            while (ready := session.next_ready()) is not None:
                # where the lease has ended meanwhile its blocks are not the request's any more, nor are their checksums
                if self._book.holds(ready.key, holder):
                    self._counters["checksum_bytes"] += session.summed_bytes(ready)
                    self._door.send(holder, ready)
                    if self._lanes.memory.device is not None:
                        self._awake_until_s = self._clock() + ANSWER_S
        except TransferError as error:
            log.error("decode node %s: checksums cannot be computed: %s", session.node_id, error)
        except Exception:  # the other sessions go on
            self._worker.fault()
        else:
            return look_s(self._lanes.memory.device) if session.announcing else float("inf")
        self._door.dismiss(holder, "its blocks cannot be announced")
        return float("inf")

    # --- transfer thread: what sessions say, and their ends

    def session_says(self, holder: Holder, message: wire.Claim | wire.Heartbeat | wire.Release) -> None:
        now_s = self._clock()
        self.run_due(now_s)  # so that a lease that has just run out is not taken for a valid one
        if holder not in self._door.sessions:
            return
        match message:
            case wire.Claim():
                self._claim(holder, message.key, now_s)
            case wire.Heartbeat():
                gone = self._book.heartbeat(message.keys, holder, now_s)
                self._door.send(holder, wire.HeartbeatAck(message.seq, gone))
            case wire.Release():
                release = self._book.release(message.key, holder, done=message.done)
                if message.done:
                    self._door.send(holder, wire.Released(message.key, release.valid))
                if release.ended is not None:
                    self._lease_ended(release.ended)

    def _claim(self, holder: Holder, key: str, now_s: float) -> None:
        match self._book.claim(key, holder, now_s, self._party(self._door.sessions[holder])):
            case Claimed.OPEN:
                for ready in self._book.published(key):
                    self._announce_to(holder, ready)
            case Claimed.GONE:
                self._door.send(holder, wire.Cancel(key, self._book.why_ended(key)))

    def _party(self, session: Session) -> Party:
        me = self._identity
        return Party((session.node_id, session.epoch), len(counterparts(me.rank, me.ranks, session.ranks)))

    def session_ended(self, holder: Holder, session: Session, why: str) -> None:
        leases = self._book.drop(holder)
        log.info("decode node %s: %s; %d leases end with it", session.node_id, why, len(leases))
        for ended in leases:
            self._lease_ended(ended)

    def _lease_ended(self, ended: Ended) -> None:
        """Tells the main thread, and the other ranks of the decode node that share it: it has ended for them too."""
        if ended.leased:
            self._counters[f"leases_{ended.why}"] += 1
            self._events.put(LeaseEnded(ended.key, ended.why))
        for holder in ended.others:
            self._door.send(holder, wire.Cancel(ended.key, ended.why))
