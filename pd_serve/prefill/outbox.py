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

import msgspec
import zmq

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.prefill.leases import Claimed, Holder, LeaseBook
from pd_serve.prefill.session import Session
from pd_serve.transfer import probe
from pd_serve.transfer.handshake import Identity, Reception, check_protocol, shortened
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.sockets import Monitored
from pd_serve.transfer.worker import Clock, TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import FailureKind

log = logging.getLogger(__name__)

MAX_PEERS = 256
MAX_HANDSHAKES = 64  # unfinished ones; a newer one ends the oldest
HANDSHAKE_S = 5.0  # from Hello to Proof


@dataclass(frozen=True)
class LeaseEnded:
    """To the main thread, once for each key it opened and did not cancel: free the blocks, stop computing."""

    key: str
    why: str  # "released" | "expired" | "peer_lost" | "declined"


@dataclass(frozen=True)
class Guest:
    """A connection whose handshake has not ended."""

    reception: Reception
    fd: int
    address: str
    due_s: float


class Outbox:
    """Owns the transfer thread of a prefill engine. ``host``: the address to bind; the port is any free one."""

    def __init__(
        self, identity: Identity, lanes: Lanes, *, host: str, lease_s: float, clock: Clock = time.monotonic
    ) -> None:
        self._identity = identity
        self._lanes = lanes
        self._host = host
        self._clock = clock
        self._book = LeaseBook(lease_s)
        self._guests: OrderedDict[Holder, Guest] = OrderedDict()
        self._sessions: dict[Holder, Session] = {}
        self._refused: set[tuple[str, str]] = set()  # logged once
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
        self._router = Monitored(worker.context, zmq.ROUTER)
        self._router.socket.set(zmq.ROUTER_MANDATORY, 1)
        try:
            port = self._router.socket.bind_to_random_port(f"tcp://{self._host}")
        except zmq.ZMQError as error:
            raise TransferError(
                FailureKind.CONNECT, f"cannot listen on {self._host} for decode nodes ({error}); set --peer-host"
            ) from error
        self.address = f"tcp://{self._host}:{port}"
        worker.listen(self._router.socket, self._receive)
        worker.listen(self._router.monitor, self._connections_lost)

    def run_due(self, now_s: float) -> float:
        for key in self._book.expire(now_s):
            log.warning("the lease of %s ran out after %g s without a sign of its decode node", key, self._book.lease_s)
            self._ended(key, "expired")
        due_s = self._book.next_expiry_s()
        for holder, guest in list(self._guests.items()):  # the oldest first
            if now_s < guest.due_s:
                due_s = min(due_s, guest.due_s)
                break
            del self._guests[holder]
            self._counters["handshakes_unfinished"] += 1
        look_s = float("inf")
        for holder, session in list(self._sessions.items()):
            look_s = min(look_s, self._announce(holder, session))
        return min(due_s - now_s, look_s)

    def stop(self) -> None:
        for holder in list(self._sessions):
            self._send(holder, wire.Bye(self._identity.epoch))
        for session in self._sessions.values():
            session.close()
        self._router.close(linger_ms=100)

    # --- transfer thread: calls of the main thread

    def _open(self, key: str) -> None:
        self._counters["leases_opened"] += 1
        if not self._book.open(key, self._clock()):
            self._ended(key, "declined")  # the decode node gave up before the request came to be admitted

    def _publish(self, ready: wire.Ready) -> None:
        lease = self._book.publish(ready.key, ready, self._clock())
        if lease is not None and lease.holder is not None:
            self._announce_to(lease.holder, ready)

    def _cancel(self, key: str, reason: str) -> None:
        held = len(self._book)
        holder = self._book.cancel(key, reason)
        self._counters["leases_cancelled"] += held - len(self._book)
        if holder is not None:
            self._send(holder, wire.Cancel(key, reason))

    # --- transfer thread: announcements, with the checksums of their blocks

    def _announce_to(self, holder: Holder, ready: wire.Ready) -> None:
        session = self._sessions.get(holder)
        if session is not None:
            session.announce(ready)
            self._announce(holder, session)

    def _announce(self, holder: Holder, session: Session) -> float:
        """Sends what has its checksums, in order; returns when to look again."""
        try:
            while (ready := session.next_ready()) is not None:
                # where the lease has ended meanwhile its blocks are not the request's any more, nor are their checksums
                if self._book.holds(ready.key, holder):
                    self._counters["checksum_bytes"] += session.summed_bytes(ready)
                    self._send(holder, ready)
        except TransferError as error:
            log.error("decode node %s: checksums cannot be computed: %s", session.node_id, error)
            self._send(holder, wire.Bye(self._identity.epoch))
            self._end_session(holder, "its blocks cannot be announced")
        return probe.LOOK_S if session.announcing else float("inf")

    # --- transfer thread: messages

    def _receive(self) -> None:
        self._connections_lost()
        while True:
            try:
                frames = self._router.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            holder = frames[0].bytes
            known = holder in self._sessions
            try:
                if len(frames) != 2:
                    raise msgspec.DecodeError(f"{len(frames)} frames")
                if not known and len(frames[1].buffer) > wire.MAX_HELLO_BYTES:
                    raise msgspec.DecodeError(f"{len(frames[1].buffer)} bytes before the handshake")
                message = self._decode(holder, frames[1])
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of connection %s: %s", holder.hex(), error)
                continue
            match message:
                case None:
                    pass
                case wire.Hello():
                    self._hello(holder, message, frames[1])
                case wire.Proof():
                    self._proof(holder, message)
                case wire.Refused():
                    self._rejected(holder, message)
                case _ if known:
                    self._handle(holder, message)
                # else its session has ended, or it never had one: nothing it says can matter

    def _decode(self, holder: Holder, frame: zmq.Frame) -> wire.ToPrefill | None:
        """A message; None for the ``Hello`` of another protocol, which is answered here."""
        try:
            message: wire.ToPrefill = wire.decode_to_prefill(frame.buffer)
            return message
        except msgspec.DecodeError:
            if holder in self._sessions:
                raise
            version = wire.decode_version(frame.buffer)  # raises what is no Hello at all
            try:
                check_protocol(self._identity, version)
            except HandshakeError as error:
                self._refuse(holder, _address(frame), str(error))
                return None
            raise

    # --- transfer thread: the handshake

    def _hello(self, holder: Holder, hello: wire.Hello, frame: zmq.Frame) -> None:
        if holder in self._sessions or holder in self._guests:
            self._counters["garbage_frames"] += 1  # a connection greets once
            return
        try:
            check_protocol(self._identity, hello)
        except HandshakeError as error:
            self._refuse(holder, _address(frame), str(error))
            return
        reception = Reception(self._identity, hello, frame.bytes)
        now_s = self._clock()
        self._guests[holder] = Guest(reception, int(frame.get(zmq.SRCFD)), _address(frame), now_s + HANDSHAKE_S)
        if len(self._guests) > MAX_HANDSHAKES:
            self._guests.popitem(last=False)
            self._counters["handshakes_unfinished"] += 1
        self._send(holder, reception.challenge)

    def _rejected(self, holder: Holder, refused: wire.Refused) -> None:
        """The decode node found that this end does not know its secret."""
        guest = self._guests.pop(holder, None)
        if guest is not None:
            self._counters["handshakes_unproved"] += 1
            claimed = guest.reception.hello.node_id
            self._log_once(guest.address, f"a decode node that says it is {claimed!r} left: {refused.reason!r}")

    def _proof(self, holder: Holder, proof: wire.Proof) -> None:
        guest = self._guests.pop(holder, None)
        if guest is None:
            self._counters["garbage_frames"] += 1
            return
        try:
            guest.reception.check(proof)
        except HandshakeError as error:
            self._counters["handshakes_unproved"] += 1
            claimed = guest.reception.hello.node_id
            self._log_once(guest.address, f"refused who says it is decode node {claimed!r}: {error}")
            self._send(holder, wire.Refused("this node could not prove that it knows the prefill node's secret"))
            return
        self._admit(holder, guest)

    def _admit(self, holder: Holder, guest: Guest) -> None:
        """It knows the secret: what it says is true, as far as it knows."""
        hello = guest.reception.hello
        for other in [h for h, s in self._sessions.items() if s.node_id == hello.node_id]:
            self._end_session(other, "it connected anew")
        memory = self._lanes.memory
        try:
            pair = guest.reception.pair(memory.regions)
            if len(self._sessions) >= MAX_PEERS:
                raise HandshakeError(f"prefill node {self._identity.node_id} has {MAX_PEERS} decode nodes already")
            session = Session(hello, guest.fd, pair, self._lanes, lambda m: self._send(holder, m))
            described = session.serve()
        except HandshakeError as error:
            self._refuse(holder, guest.address, str(error), hello.node_id)
            return
        session.sums = self._identity.checksums and hello.checksums
        self._counters["handshakes"] += 1
        self._sessions[holder] = session
        self._send(holder, guest.reception.welcome(memory.regions, described, session.why_not, self._book.lease_s))
        session.welcomed()

    def _refuse(self, holder: Holder, address: str, reason: str, node_id: str = "") -> None:
        self._counters["handshakes_refused"] += 1
        self._log_once(address, f"refused decode node {node_id or f'at {address}'}: {reason}")
        self._send(holder, wire.Refused(reason))

    def _log_once(self, address: str, text: str) -> None:
        text = shortened(text)
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
                valid = self._book.release(message.key, holder, done=message.done)
                if message.done:
                    self._send(holder, wire.Released(message.key, bool(valid)))
                if valid is not None:
                    self._ended(message.key, "released" if message.done else "declined")
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
        match self._book.claim(key, holder, now_s):
            case Claimed.OPEN:
                for ready in self._book.published(key):
                    self._announce_to(holder, ready)
            case Claimed.GONE:
                self._send(holder, wire.Cancel(key, self._book.why_ended(key)))

    def _send(self, holder: Holder, message: wire.ToDecode) -> None:
        try:
            self._router.socket.send_multipart([holder, wire.encoder.encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self._end_session(holder, "it does not read its messages")
        except zmq.ZMQError:
            self._end_session(holder, "its connection is gone")

    # --- transfer thread: ends

    def _connections_lost(self) -> None:
        """Guests are left to their time-out: why they went may still be among the messages."""
        for lost in self._router.lost():
            for holder in [h for h, s in self._sessions.items() if s.fd == lost.fd]:
                self._end_session(holder, "its connection ended")

    def _end_session(self, holder: Holder, why: str) -> None:
        session = self._sessions.pop(holder, None)
        if session is None:
            return
        session.close()
        keys = self._book.drop(holder)
        log.info("decode node %s: %s; %d leases end with it", session.node_id, why, len(keys))
        for key in keys:
            self._ended(key, "peer_lost")

    def _ended(self, key: str, why: str) -> None:
        self._counters[f"leases_{why}"] += 1
        self._events.put(LeaseEnded(key, why))


def _address(frame: zmq.Frame) -> str:
    """Where a frame came from."""
    try:
        return str(frame.get("Peer-Address"))
    except zmq.ZMQError:
        return "an unknown address"
