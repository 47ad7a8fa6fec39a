"""The source's door: readers connect to it, prove themselves, and have sessions until they leave.

Runs on the transfer thread. It owns the listening socket and all connections: strangers, who have said little and
proved nothing, and sessions. What sessions say of keys it passes on to its *keeper*, who knows what was promised to
whom; lanes, choices and goodbyes are its own business. A *holder* is the name of one connection, and of its session.

A reader that connects anew replaces its older session. When a session ends, for whatever reason, the keeper is told.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from functools import partial
from typing import Protocol

import msgspec

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.transfer.session.connection import MAX_FRAME_BYTES, Connection, Listener
from pd_serve.transfer.session.handshake import Identity, Reception, check_protocol, shortened
from pd_serve.transfer.session.reader_session import Session
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire

log = logging.getLogger(__name__)

MAX_READERS = 256
MAX_STRANGERS = 64  # connections without a session; a newer one ends the oldest
MAX_STRANGER_FRAMES = 16  # a handshake takes three

COUNTERS = (
    "handshakes",
    "handshakes_refused",
    "handshakes_unproved",
    "handshakes_unfinished",
    "garbage_frames",
    "forged_frames",
)

Holder = bytes  # a reader's connection


class Keeper(Protocol):
    """The outbox."""

    def session_says(self, holder: Holder, message: wire.Claim | wire.Heartbeat | wire.Release) -> None: ...

    def session_ended(self, holder: Holder, session: Session, why: str) -> None: ...


class Door:
    """``host``: the address to bind; the port is any free one. ``handshake_s``: how long a connection may be without a
    session. ``lease_s``: told to readers. ``counters``: the keeper's, for ``COUNTERS`` to be counted in."""

    def __init__(
        self,
        identity: Identity,
        worker: TransferWorker,
        keeper: Keeper,
        counters: dict[str, float],
        *,
        host: str,
        lease_s: float,
        handshake_s: float,
        tls: Tls | None,
    ) -> None:
        self.address = ""  # once open: what a reader dials
        self.sessions: dict[Holder, Session] = {}
        self._identity = identity
        self._worker = worker
        self._lanes = worker.lanes
        self._clock = worker.clock
        self._keeper = keeper
        self._counters = counters
        self._host = host
        self._lease_s = lease_s
        self._handshake_s = handshake_s
        self._tls = tls
        self._listener: Listener | None = None
        self._connections: dict[Holder, Connection] = {}
        self._connections_made = 0
        self._strangers: OrderedDict[Holder, float] = OrderedDict()  # until when, the oldest first
        self._receptions: dict[Holder, Reception] = {}  # of strangers that have said Hello
        self._stranger_frames: dict[Holder, int] = {}
        self._refused: set[tuple[str, str]] = set()  # logged once

    def open(self) -> str:
        """Lets readers in; returns the address. Does nothing where it is open. Raises TransferError."""
        if self._listener is None:
            try:
                self._listener = Listener(self._host, self._tls)
            except OSError as error:
                raise TransferError(
                    FailureKind.CONNECT, f"cannot listen on {self._host} for decode nodes ({error}); set --peer-host"
                ) from error
            self.address = self._listener.address
            self._worker.listen(self._listener, self._accept)
        return self.address

    def run_due(self, now_s: float) -> float:
        """Turns strangers away whose time is over; returns when the next one's is (on the worker's clock)."""
        for holder, until_s in list(self._strangers.items()):
            if now_s < until_s:
                return until_s
            self._turn_away(holder)
        return float("inf")

    def send(self, holder: Holder, message: wire.ToReader) -> None:
        connection = self._connections.get(holder)
        if connection is not None:
            connection.send(wire.encoder.encode(message))
            if connection.ended:
                self._lost(holder, connection.ended)

    def dismiss(self, holder: Holder, why: str) -> None:
        """Says goodbye and ends the session."""
        self.send(holder, wire.Bye(self._identity.epoch))
        self._end_session(holder, why)

    def close(self) -> None:
        """Without telling the keeper."""
        for holder in list(self.sessions):
            self.send(holder, wire.Bye(self._identity.epoch))
        for session in self.sessions.values():
            session.close()
        for connection in self._connections.values():
            connection.close()
        if self._listener is not None:
            self._listener.close()

    # --- connections

    def _accept(self) -> None:
        assert self._listener is not None
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
                case _ if holder in self.sessions:
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
                session = self.sessions.get(holder)
                who = "(it has not said which)" if session is None else session.node_id
                log.warning("decode node %s (from %s) is cut off: %s", who, connection.peer, connection.ended)
            self._lost(holder, connection.ended)

    def _talks_too_much(self, holder: Holder) -> bool:
        said = self._stranger_frames[holder] = self._stranger_frames.get(holder, 0) + 1
        return said > MAX_STRANGER_FRAMES

    def _lost(self, holder: Holder, why: str) -> None:
        if holder in self.sessions:
            self._end_session(holder, why)
        else:
            if holder in self._receptions:
                self._counters["handshakes_unfinished"] += 1
            self._hang_up(holder)

    def _end_session(self, holder: Holder, why: str) -> None:
        session = self.sessions.pop(holder, None)
        if session is None:
            return
        session.close()
        self._hang_up(holder)
        self._keeper.session_ended(holder, session, why)

    def _decode(self, holder: Holder, frame: bytes) -> wire.ToSource | None:
        """A message; None for the ``Hello`` of another protocol, which is answered here."""
        try:
            message: wire.ToSource = wire.decode_to_source(frame)
            return message
        except msgspec.DecodeError:
            if holder in self.sessions:
                raise
            version = wire.decode_version(frame)  # raises what is no Hello at all
            try:
                check_protocol(self._identity, version)
            except HandshakeError as error:
                self._refuse(holder, str(error))
                return None
            raise

    # --- the handshake

    def _hello(self, holder: Holder, hello: wire.Hello, frame: bytes) -> None:
        if holder not in self._strangers or holder in self._receptions:
            self._counters["garbage_frames"] += 1  # a connection greets once
            return
        try:
            reception = self._receptions[holder] = Reception(self._identity, hello, frame)
        except HandshakeError as error:
            self._refuse(holder, str(error))
            return
        self.send(holder, reception.challenge)

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
            self.send(holder, wire.Refused("this node could not prove that it knows the prefill node's secret"))
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
        for other in [h for h, s in self.sessions.items() if s.is_replaced_by(them)]:
            self._end_session(other, "it connected anew")
        memory = self._lanes.memory
        try:
            pair = reception.pair(them, memory.regions)
            if len(self.sessions) >= MAX_READERS:
                raise HandshakeError(f"prefill node {self._identity.node_id} has {MAX_READERS} decode nodes already")
            session = Session(them, pair, self._lanes, lambda m: self.send(holder, m))
            described = session.serve()
        except HandshakeError as error:
            self._refuse(holder, str(error), them.node_id)
            return
        session.sums = self._identity.checksums and them.checksums
        self._counters["handshakes"] += 1
        self.sessions[holder] = session
        self._strangers.pop(holder, None)
        self._stranger_frames.pop(holder, None)
        self._connections[holder].max_frame_bytes = MAX_FRAME_BYTES
        self.send(holder, reception.welcome(them, memory.regions, described, session.why_not, self._lease_s))
        session.welcomed()

    def _refuse(self, holder: Holder, reason: str, node_id: str = "") -> None:
        """The connection stays for the answer to be read; it is a stranger's."""
        self._counters["handshakes_refused"] += 1
        self._log_once(holder, f"refused decode node {node_id or '(it did not say which)'}: {reason}")
        self.send(holder, wire.Refused(reason))

    def _log_once(self, holder: Holder, text: str) -> None:
        address, text = self._connections[holder].peer, shortened(text)
        if (address, text) not in self._refused and len(self._refused) < MAX_READERS:
            self._refused.add((address, text))
            log.warning("%s (from %s)", text, address)

    # --- what a session says

    def _handle(self, holder: Holder, message: wire.ToSource) -> None:
        match message:
            case wire.Claim() | wire.Heartbeat() | wire.Release():
                self._keeper.session_says(holder, message)
            case wire.LaneMessage():
                self._lane_says(holder, message)
            case wire.Chosen():
                if not self.sessions[holder].choose(message):
                    self._counters["garbage_frames"] += 1
            case wire.Bye():
                self._end_session(holder, "it left")

    def _lane_says(self, holder: Holder, message: wire.LaneMessage) -> None:
        session = self.sessions[holder]
        try:
            session.receive(message)
        except TransferError as error:
            log.warning("decode node %s, transport %s: %s", session.node_id, message.lane, error)
            if session.lane == message.lane:
                self.dismiss(holder, f"its transport failed ({error})")
