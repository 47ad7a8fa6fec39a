"""A prefill node as a decode node sees it: one address, dialled, greeted, tested, listened to, dialled again.

Runs on the transfer thread under the inbox, which it tells what comes in. It knows nothing of requests
but their keys in heartbeats. Every connection is a new session with its own handshake and its own choice of lane; when
one ends, for whatever reason, the inbox gives up what depended on it, and the peer is dialled again after a pause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from functools import partial
from typing import Protocol

import msgspec

from pd_serve.decode.lane import PeerLanes
from pd_serve.errors import HandshakeError, TransferError
from pd_serve.transfer.base import Pair
from pd_serve.transfer.connection import Connection, Resolved, dial
from pd_serve.transfer.handshake import Greeting, Identity, shortened
from pd_serve.transfer.probe import Lane, Prober
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import FailureKind

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0  # from dialling to the end of the self-test
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
HEARTBEATS_PER_LEASE = 6
MIN_SILENCE_S = 2.0  # a busy machine may keep a healthy peer from answering for so long


class Listener(Protocol):
    """The inbox."""

    def peer_ready(self, peer: PrefillPeer) -> None: ...

    def peer_lost(self, peer: PrefillPeer, kind: FailureKind, message: str) -> None: ...

    def peer_says(self, peer: PrefillPeer, message: wire.ToDecode) -> None: ...


class State(Enum):
    PAUSED = "paused"
    GREETING = "greeting"
    TESTING = "testing"  # the handshake is done; lanes are measured
    READY = "ready"


class PrefillPeer:
    def __init__(
        self,
        address: str,
        identity: Identity,
        worker: TransferWorker,
        prober: Prober,
        listener: Listener,
        counters: dict[str, float],
    ) -> None:
        self.address = address
        self.state = State.PAUSED
        self.node_id = ""  # what it said of itself, from TESTING on
        self.epoch = ""
        self.slow_pulls = 0
        self.named_s = worker.clock()  # when a router or a request last named it
        self._identity = identity
        self._worker = worker
        self._prober = prober
        self._listener = listener
        self._counters = counters
        self._wire: Connection | None = None
        self._attempts = 0
        self._greeting: Greeting | None = None
        self._about: wire.About | None = None
        self._lanes: PeerLanes | None = None
        self._retry_s = RETRY_MIN_S
        self._due_s = 0.0  # when to dial again (PAUSED), to give up (GREETING, TESTING)
        self._logged = ""
        self._heartbeat_due_s = 0.0
        self._unanswered_s: float | None = None  # when the oldest unanswered heartbeat was sent
        self._seq = 0

    # --- asked by the inbox

    @property
    def lane(self) -> Lane:
        """What to pull over; while READY."""
        assert self._lanes is not None and self._lanes.chosen is not None
        return self._lanes.chosen

    @property
    def pair(self) -> Pair:
        """While READY."""
        assert self._lanes is not None
        return self._lanes.pair

    @property
    def checksums(self) -> bool:
        """Whether announced blocks come with checksums; while READY."""
        assert self._about is not None
        return self._about.checksums

    def hurry(self) -> None:
        """Somebody waits: dial now instead of after the pause."""
        if self.state is State.PAUSED:
            self._dial()

    def send(self, message: wire.ToPrefill) -> None:
        """Sends, or gives the connection up where it does not take messages any more."""
        self._send_frame(wire.encoder.encode(message))

    def run_due(self, now_s: float, keys: Callable[[], list[str]]) -> float:
        """Dials, gives up, sends heartbeats for ``keys``; returns when it is due again."""
        match self.state:
            case State.PAUSED:
                if now_s >= self._due_s:
                    self._dial()
            case State.GREETING:
                if now_s >= self._due_s:
                    self.lose(FailureKind.CONNECT, f"no answer to the handshake within {CONNECT_TIMEOUT_S:g} s")
            case State.TESTING:
                if now_s >= self._due_s:
                    self.lose(FailureKind.CONNECT, f"no transport has passed its test within {CONNECT_TIMEOUT_S:g} s")
            case State.READY:
                return self._heartbeat(now_s, keys())
        return self._due_s

    def lose(self, kind: FailureKind, message: str) -> None:
        """Ends the connection and dials again later. What waited for the peer fails with ``kind``."""
        self._hang_up()
        self._due_s = self._worker.clock() + self._retry_s
        self._retry_s = min(RETRY_MAX_S, 2 * self._retry_s)
        text = f"prefill node {self.node_id or '(unknown)'} at {self.address}: {message}"
        if text != self._logged:  # a peer that stays away is no news
            self._logged = text
            log.warning("%s", text)
        self._listener.peer_lost(self, kind, text)

    def close(self) -> None:
        if self.state is not State.PAUSED:
            self.send(wire.Bye(self._identity.epoch))
        self._hang_up()

    # --- the connection

    def _dial(self) -> None:
        self.state = State.GREETING
        self._due_s = self._worker.clock() + CONNECT_TIMEOUT_S
        self._attempts += 1
        self._worker.resolve(self.address, partial(self._resolved, self._attempts))

    def _resolved(self, attempt: int, resolved: Resolved | OSError) -> None:
        if attempt != self._attempts or self.state is not State.GREETING:
            return
        if isinstance(resolved, OSError):
            self.lose(FailureKind.CONNECT, f"cannot be dialled ({resolved})")
            return
        try:
            connection = dial(resolved)
        except OSError as error:
            self.lose(FailureKind.CONNECT, f"cannot be dialled ({error})")
            return
        self._wire = connection
        connection.changed = partial(self._worker.interest_changed, connection)
        self._worker.listen(connection, self._receive)
        lanes = self._worker.lanes
        self._greeting = Greeting(self._identity, lanes.memory.regions, lanes.describe())
        self._send_frame(self._greeting.hello)

    def _send_frame(self, frame: bytes) -> None:
        if self._wire is not None:
            self._wire.send(frame)
            if self._wire.ended:
                self.lose(FailureKind.PEER_LOST, self._wire.ended)

    def _hang_up(self) -> None:
        self.state = State.PAUSED
        self._greeting = None
        lanes, self._lanes = self._lanes, None
        if lanes is not None:
            lanes.close()
        if self._wire is not None:
            self._worker.unlisten(self._wire)
            self._wire.close()
            self._wire = None

    def _receive(self) -> None:
        connection = self._wire
        if connection is None:
            return
        # what was sent before the connection ended still counts
        for frame in connection.advance():
            try:
                message = wire.decode_to_decode(frame)
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of %s: %s", self.address, error)
                continue
            self._take(message)
            if connection is not self._wire:
                return
        if connection.ended:
            self.lose(FailureKind.CONNECT if connection.refused else FailureKind.PEER_LOST, connection.ended)

    def _take(self, message: wire.ToDecode) -> None:
        match message:
            case wire.Refused():
                self._counters["handshakes_refused"] += 1
                self._retry_s = RETRY_MAX_S  # it takes a restart of either end to change this
                self.lose(FailureKind.HANDSHAKE, shortened(message.reason))
            case wire.Bye():
                self.lose(FailureKind.PEER_LOST, "it left")
            case _ if self.state is State.GREETING:
                self._greeted(message)
            case wire.LaneMessage():
                self._lane_says(message)
            case wire.Challenge() | wire.Welcome():
                self._counters["garbage_frames"] += 1
            case _ if self.state is not State.READY:
                self._counters["garbage_frames"] += 1  # nothing was claimed yet
            case wire.HeartbeatAck():
                if message.seq == self._seq:
                    self._unanswered_s = None
                self._listener.peer_says(self, message)
            case _:
                self._listener.peer_says(self, message)

    def _greeted(self, message: wire.ToDecode) -> None:
        greeting = self._greeting
        assert greeting is not None
        try:
            if isinstance(message, wire.Challenge) and not greeting.challenged:
                self.send(self._proof(greeting, message))
            elif isinstance(message, wire.Welcome) and greeting.challenged:
                self._welcome(*greeting.accept(message))
            else:
                self._counters["garbage_frames"] += 1
        except HandshakeError as error:
            self._counters["handshakes_refused"] += 1
            self._retry_s = RETRY_MAX_S
            self.lose(FailureKind.HANDSHAKE, shortened(str(error)))

    def _proof(self, greeting: Greeting, challenge: wire.Challenge) -> wire.Proof:
        try:
            return greeting.prove(challenge)
        except HandshakeError:
            # so that its log tells of it too; why is nobody's business there
            self.send(wire.Refused("the prefill node could not prove that it knows the decode node's secret"))
            raise

    # --- lanes

    def _welcome(self, about: wire.About, pair: Pair) -> None:
        """Connects each lane that both have, and has them tested. Raises HandshakeError where there is none."""
        self.node_id, self.epoch, self._about = about.node_id, about.epoch, about
        self.state = State.TESTING
        self._lanes = PeerLanes(about, pair, self._worker.lanes, self._prober, self.send)
        self._lanes.connect(self._tested)

    def _tested(self) -> None:
        """The self-test is over."""
        lanes = self._lanes
        assert lanes is not None and self._about is not None
        self._counters["self_test_failures"] += len(lanes.verdict.why_not)
        for name, (size_bytes, seconds) in lanes.verdict.timed.items():
            self._counters[f"self_test_bytes_{name}"] += size_bytes
            self._counters[f"self_test_seconds_{name}"] += seconds
        if lanes.chosen is None:
            why = "; ".join(f"{name}: {text}" for name, text in lanes.why_not.items())
            self._retry_s = RETRY_MAX_S
            self.lose(FailureKind.CONNECT, f"no transport has passed its test ({why})")
            return
        name = lanes.chosen.name
        self._counters["handshakes"] += 1
        self._counters[f"lane_chosen_{name}"] += 1
        if lanes.slow:
            self._counters["slow_lanes"] += 1
            log.warning("%s", lanes.complaint(self.node_id))
        self.send(wire.Chosen(name, lanes.rate, {k: shortened(v) for k, v in lanes.why_not.items()}))
        if self.state is not State.TESTING:
            return  # lost just now
        self._heartbeat_due_s = self._worker.clock() + self._about.lease_s / HEARTBEATS_PER_LEASE
        self._unanswered_s = None
        self._retry_s = RETRY_MIN_S
        self._logged = ""
        self.state = State.READY
        log.info("reads from prefill node %s (epoch %s) over %s", self.node_id, self.epoch, lanes.summary())
        self._listener.peer_ready(self)

    def _lane_says(self, message: wire.LaneMessage) -> None:
        assert self._lanes is not None
        try:
            self._lanes.receive(message)
        except TransferError as error:
            self.lose(FailureKind(error.kind), f"transport {message.lane}: {error}")

    # --- heartbeats

    def _heartbeat(self, now_s: float, keys: list[str]) -> float:
        assert self._about is not None
        interval_s = self._about.lease_s / HEARTBEATS_PER_LEASE
        if not keys:
            self._unanswered_s = None
            return float("inf")
        silence_s = max(self._about.lease_s, MIN_SILENCE_S)  # a pause shorter than the lease harms nothing
        if self._unanswered_s is not None and now_s >= self._unanswered_s + silence_s:
            self.lose(FailureKind.PEER_LOST, f"no answer to heartbeats for {silence_s:g} s")
            return self._due_s
        if now_s >= self._heartbeat_due_s:
            self._heartbeat_due_s = now_s + interval_s
            self._seq += 1
            if self._unanswered_s is None:
                self._unanswered_s = now_s
            self.send(wire.Heartbeat(self._seq, keys))
        return self._heartbeat_due_s
