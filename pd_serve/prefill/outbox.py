"""The outbox of a prefill node: leased requests, and the decode nodes that read them.

The main thread opens, publishes and cancels keys and frees blocks when ``LeaseEnded`` says so; all
else happens on the transfer thread: handshakes, claims, checksums, heartbeats, releases, expiry. The outbox never
writes to a block. Published blocks must stay as they are until the lease has ended.

A *session* is one connection of one decode node, opened by a handshake in which it proved the secret. When the
connection ends, the same node opens another session, or it says ``Bye``, the leases that the session claimed end.
"""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from dataclasses import dataclass
from functools import partial

import msgspec

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.prefill.leases import Claimed, Ended, Holder, LeaseBook, Party
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.poller import look_s
from pd_serve.transfer.session import probe
from pd_serve.transfer.session.connection import MAX_FRAME_BYTES, Connection, Listener
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Identity, Reception, check_protocol, shortened
from pd_serve.transfer.session.reader_session import Session
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.slices import counterparts
from pd_serve.transfer.worker import Clock, TransferWorker
from pd_serve.wire import peer as wire

log = logging.getLogger(__name__)

MAX_PEERS = 256
MAX_STRANGERS = 64  # connections without a session; a newer one ends the oldest
MAX_STRANGER_FRAMES = 16  # a handshake takes three

# Beside a GPU the thread stays awake for so long after an announcement, to confirm the lease when the blocks were read:
# waking up can take as long as reading them.
ANSWER_S = 2e-3


@dataclass(frozen=True)
class LeaseEnded:
    """To the main thread, once for each key it opened and did not cancel: free the blocks, stop computing."""

    key: str
    why: str  # "released" | "expired" | "peer_lost" | "declined"


class Outbox:
    """Owns the transfer thread of a prefill engine. ``host``: the address to bind; the port is any free one."""

    def __init__(
        self,
        identity: Identity,
        lanes: Lanes,
        *,
        host: str,
        lease_s: float,
        handshake_s: float = HANDSHAKE_S,
        tls: Tls | None = None,
        unclaimed_s: float | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._identity = identity
        self._lanes = lanes
        self._host = host
        self._tls = tls
        self._handshake_s = handshake_s  # how long a connection may be without a session
        self._clock = clock
        self._book = LeaseBook(lease_s, unclaimed_s=unclaimed_s)
        self._connections: dict[Holder, Connection] = {}
        self._connections_made = 0
        self._strangers: OrderedDict[Holder, float] = OrderedDict()  # until when, the oldest first
        self._receptions: dict[Holder, Reception] = {}  # of strangers that have said Hello
        self._stranger_frames: dict[Holder, int] = {}
        self._sessions: dict[Holder, Session] = {}
        self._refused: set[tuple[str, str]] = set()  # logged once
        self._awake_until_s = float("-inf")
        self._events: Mailbox[LeaseEnded] = Mailbox()
        self._counters: dict[str, float] = dict.fromkeys(
            (
                "leases_opened",
                "leases_released",
                "leases_expired",
                "leases_peer_lost",
                "leases_declined",
                "leases_cancelled",
                "handshakes",
                "handshakes_refused",
                "handshakes_unproved",
                "handshakes_unfinished",
                "garbage_frames",
                "forged_frames",
                "checksum_bytes",
            ),
            0.0,
        )
        self._worker = TransferWorker(self, lanes, clock)
        self.address = ""  # once ready: what a decode node dials

    # --- main thread

    def open(self, key: str) -> None:
        """The request is admitted here; its lease starts."""
        self._worker.call(self._open, key)

    def publish(self, key: str, num_tokens: int, blocks: list[wire.Blocks], first: int | None) -> None:
        """These blocks of an open key are computed, ``num_tokens`` in all from 0.

        ``first``, with the last chunk: the token sampled from the prompt.
        """
        ready = wire.Ready(key, num_tokens, blocks, None if first is None else wire.First(first))
        self._worker.call(self._publish, ready)

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
        return {**self._counters, "transfer_faults": float(self._worker.internal_errors)}

    @property
    def num_leases(self) -> int:
        return len(self._book)

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of those that started, preferred first; once ready."""
        return self._lanes.names

    def begin(self) -> None:
        """Starts the transfer thread."""
        self._worker.start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once peers can connect to ``address``. Raises TransferError."""
        self._worker.wait_ready(timeout_s)

    def wake(self) -> None:
        """Makes the transfer thread look at its clock again."""
        self._worker.wake()

    def close(self) -> bool:
        """True: the lanes have let go of the pool."""
        closed = self._worker.close()
        self._events.close()
        return closed

    # --- transfer thread: the service

    def start(self, worker: TransferWorker) -> None:
        probe.fill(self._lanes.memory, self._lanes.mover, self._identity.epoch)
        try:
            self._listener = Listener(self._host, self._tls)
        except OSError as error:
            raise TransferError(
                FailureKind.CONNECT, f"cannot listen on {self._host} for decode nodes ({error}); set --peer-host"
            ) from error
        self.address = self._listener.address
        worker.listen(self._listener, self._accept)

    def run_due(self, now_s: float) -> float:
        for ended in self._book.expire(now_s):
            log.warning("the lease of %s ran out without a sign of its decode node", ended.key)
            self._lease_ended(ended)
        due_s = self._book.next_expiry_s()
        for holder, until_s in list(self._strangers.items()):
            if now_s < until_s:
                due_s = min(due_s, until_s)
                break
            self._turn_away(holder)
        soon_s = float("inf")
        for holder, session in list(self._sessions.items()):
            soon_s = min(soon_s, self._announce(holder, session))
        if now_s < self._awake_until_s:
            soon_s = min(soon_s, look_s(self._lanes.memory.device))
        return min(due_s - now_s, soon_s)

    def stop(self) -> None:
        for holder in list(self._sessions):
            self._send(holder, wire.Bye(self._identity.epoch))
        for session in self._sessions.values():
            session.close()
        for connection in self._connections.values():
            connection.close()
        self._listener.close()

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
            self._send(holder, wire.Cancel(key, reason))

    # --- transfer thread: announcements, with the checksums of their blocks

    def _announce_to(self, holder: Holder, ready: wire.Ready) -> None:
        session = self._sessions.get(holder)
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
                    self._send(holder, ready)
                    if self._lanes.memory.device is not None:
                        self._awake_until_s = self._clock() + ANSWER_S
        except TransferError as error:
            log.error("decode node %s: checksums cannot be computed: %s", session.node_id, error)
        except Exception:  # the other sessions go on
            self._worker.fault()
        else:
            return look_s(self._lanes.memory.device) if session.announcing else float("inf")
        self._send(holder, wire.Bye(self._identity.epoch))
        self._end_session(holder, "its blocks cannot be announced")
        return float("inf")

    # --- transfer thread: connections and messages

    def _accept(self) -> None:
        for connection in self._listener.accept():
            self._connections_made += 1
            holder = self._connections_made.to_bytes(8, "little")
            connection.max_frame_bytes = wire.MAX_UNPROVED_BYTES
            connection.changed = partial(self._worker.interest_changed, connection)
            self._connections[holder] = connection
            self._strangers[holder] = self._clock() + self._handshake_s
            self._worker.listen(connection, partial(self._receive, holder))
            if len(self._strangers) > MAX_STRANGERS:
                self._turn_away(next(iter(self._strangers)))

    def _turn_away(self, holder: Holder) -> None:
        """Ends the connection of a stranger who does not finish a handshake."""
        self._counters["handshakes_unfinished"] += 1
        self._hang_up(holder)

    def _hang_up(self, holder: Holder) -> None:
        self._strangers.pop(holder, None)
        self._receptions.pop(holder, None)
        self._stranger_frames.pop(holder, None)
        connection = self._connections.pop(holder, None)
        if connection is not None:
            self._worker.unlisten(connection)
            connection.close()

    def _receive(self, holder: Holder) -> None:
        connection = self._connections[holder]
        # what was said before the connection ended still counts
        for frame in connection.advance():
            if holder in self._strangers and self._talks_too_much(holder):
                self._turn_away(holder)
                return
            try:
                message = self._decode(holder, frame)
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of %s: %s", connection.peer, error)
                continue
            match message:
                case None:
                    pass
                case wire.Hello():
                    self._hello(holder, message, frame)
                case wire.Proof():
                    self._proof(holder, message)
                case wire.Introduction():
                    self._introduced(holder, message)
                case wire.Refused():
                    self._rejected(holder, message)
                case _ if holder in self._sessions:
                    self._handle(holder, message)
                # else its session has ended, or it never had one: nothing it says can matter
            if holder not in self._connections:
                return
        if connection.ended:
            self._counters["garbage_frames"] += connection.nonsense
            if connection.untrusted:
                self._counters["handshakes_unproved"] += 1
                self._log_once(holder, f"turned away: {connection.ended}")
            if connection.forged:
                self._counters["forged_frames"] += 1
                session = self._sessions.get(holder)
                who = "(it has not said which)" if session is None else session.node_id
                log.warning("decode node %s (from %s) is cut off: %s", who, connection.peer, connection.ended)
            self._lost(holder, connection.ended)

    def _talks_too_much(self, holder: Holder) -> bool:
        said = self._stranger_frames[holder] = self._stranger_frames.get(holder, 0) + 1
        return said > MAX_STRANGER_FRAMES

    def _lost(self, holder: Holder, why: str) -> None:
        if holder in self._sessions:
            self._end_session(holder, why)
        else:
            if holder in self._receptions:
                self._counters["handshakes_unfinished"] += 1
            self._hang_up(holder)

    def _decode(self, holder: Holder, frame: bytes) -> wire.ToPrefill | None:
        """A message; None for the ``Hello`` of another protocol, which is answered here."""
        try:
            message: wire.ToPrefill = wire.decode_to_prefill(frame)
            return message
        except msgspec.DecodeError:
            if holder in self._sessions:
                raise
            version = wire.decode_version(frame)  # raises what is no Hello at all
            try:
                check_protocol(self._identity, version)
            except HandshakeError as error:
                self._refuse(holder, str(error))
                return None
            raise

    # --- transfer thread: the handshake

    def _hello(self, holder: Holder, hello: wire.Hello, frame: bytes) -> None:
        if holder not in self._strangers or holder in self._receptions:
            self._counters["garbage_frames"] += 1  # a connection greets once
            return
        try:
            reception = self._receptions[holder] = Reception(self._identity, hello, frame)
        except HandshakeError as error:
            self._refuse(holder, str(error))
            return
        self._send(holder, reception.challenge)

    def _rejected(self, holder: Holder, refused: wire.Refused) -> None:
        """The decode node found that this end does not know its secret."""
        if self._receptions.pop(holder, None) is not None:
            self._counters["handshakes_unproved"] += 1
            self._log_once(holder, f"a decode node left: {refused.reason!r}")

    def _proof(self, holder: Holder, proof: wire.Proof) -> None:
        reception = self._receptions.get(holder)
        if reception is None or reception.proved:
            self._counters["garbage_frames"] += 1
            return
        connection = self._connections[holder]
        try:
            reception.check(proof)
        except HandshakeError as error:
            del self._receptions[holder]
            self._counters["handshakes_unproved"] += 1
            self._log_once(holder, f"refused who says it is a decode node: {error}")
            self._send(holder, wire.Refused("this node could not prove that it knows the prefill node's secret"))
            return
        connection.seal(reception.outgoing, reception.incoming)
        connection.max_frame_bytes = wire.MAX_INTRODUCTION_BYTES

    def _introduced(self, holder: Holder, them: wire.Introduction) -> None:
        """It knows the secret: what it says is true, as far as it knows."""
        reception = self._receptions.get(holder)
        if reception is None or not reception.proved:
            self._counters["garbage_frames"] += 1
            return
        del self._receptions[holder]
        for other in [h for h, s in self._sessions.items() if s.is_replaced_by(them)]:
            self._end_session(other, "it connected anew")
        memory = self._lanes.memory
        try:
            pair = reception.pair(them, memory.regions)
            if len(self._sessions) >= MAX_PEERS:
                raise HandshakeError(f"prefill node {self._identity.node_id} has {MAX_PEERS} decode nodes already")
            session = Session(them, pair, self._lanes, lambda m: self._send(holder, m))
            described = session.serve()
        except HandshakeError as error:
            self._refuse(holder, str(error), them.node_id)
            return
        session.sums = self._identity.checksums and them.checksums
        self._counters["handshakes"] += 1
        self._sessions[holder] = session
        self._strangers.pop(holder, None)
        self._stranger_frames.pop(holder, None)
        self._connections[holder].max_frame_bytes = MAX_FRAME_BYTES
        self._send(holder, reception.welcome(them, memory.regions, described, session.why_not, self._book.lease_s))
        session.welcomed()

    def _refuse(self, holder: Holder, reason: str, node_id: str = "") -> None:
        """The connection stays for the answer to be read; it is a stranger's."""
        self._counters["handshakes_refused"] += 1
        self._log_once(holder, f"refused decode node {node_id or '(it did not say which)'}: {reason}")
        self._send(holder, wire.Refused(reason))

    def _log_once(self, holder: Holder, text: str) -> None:
        address, text = self._connections[holder].peer, shortened(text)
        if (address, text) not in self._refused and len(self._refused) < MAX_PEERS:
            self._refused.add((address, text))
            log.warning("%s (from %s)", text, address)

    # --- transfer thread: what a session says

    def _handle(self, holder: Holder, message: wire.ToPrefill) -> None:
        now_s = self._clock()
        self.run_due(now_s)  # so that a lease that has just run out is not taken for a valid one
        if holder not in self._sessions:
            return
        match message:
            case wire.Claim():
                self._claim(holder, message.key, now_s)
            case wire.Heartbeat():
                gone = self._book.heartbeat(message.keys, holder, now_s)
                self._send(holder, wire.HeartbeatAck(message.seq, gone))
            case wire.Release():
                release = self._book.release(message.key, holder, done=message.done)
                if message.done:
                    self._send(holder, wire.Released(message.key, release.valid))
                if release.ended is not None:
                    self._lease_ended(release.ended)
            case wire.LaneMessage():
                self._lane_says(holder, message)
            case wire.Chosen():
                session = self._sessions[holder]
                if not session.choose(message):
                    self._counters["garbage_frames"] += 1
            case wire.Bye():
                self._end_session(holder, "it left")

    def _lane_says(self, holder: Holder, message: wire.LaneMessage) -> None:
        session = self._sessions[holder]
        try:
            session.receive(message)
        except TransferError as error:
            log.warning("decode node %s, transport %s: %s", session.node_id, message.lane, error)
            if session.lane == message.lane:
                self._send(holder, wire.Bye(self._identity.epoch))
                self._end_session(holder, f"its transport failed ({error})")

    def _claim(self, holder: Holder, key: str, now_s: float) -> None:
        match self._book.claim(key, holder, now_s, self._party(self._sessions[holder])):
            case Claimed.OPEN:
                for ready in self._book.published(key):
                    self._announce_to(holder, ready)
            case Claimed.GONE:
                self._send(holder, wire.Cancel(key, self._book.why_ended(key)))

    def _party(self, session: Session) -> Party:
        me = self._identity
        return Party((session.node_id, session.epoch), len(counterparts(me.rank, me.ranks, session.ranks)))

    def _send(self, holder: Holder, message: wire.ToDecode) -> None:
        connection = self._connections.get(holder)
        if connection is not None:
            connection.send(wire.encoder.encode(message))
            if connection.ended:
                self._lost(holder, connection.ended)

    # --- transfer thread: ends

    def _end_session(self, holder: Holder, why: str) -> None:
        session = self._sessions.pop(holder, None)
        if session is None:
            return
        session.close()
        self._hang_up(holder)
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
            self._send(holder, wire.Cancel(ended.key, ended.why))
