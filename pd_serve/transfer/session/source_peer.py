"""A prefill node's rank as a decode node sees it: one address, dialled, greeted, tested, listened to, dialled again.

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

from pd_serve import auth
from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.transfer.base import Pair
from pd_serve.transfer.session.connection import MAX_FRAME_BYTES, TLS_ADVICE, Connection, Resolved, dial
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Greeting, Identity, shortened
from pd_serve.transfer.session.peer_lanes import PeerLanes
from pd_serve.transfer.session.probe import Lane, Prober
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import TransferWorker
from pd_serve.trust import is_loopback
from pd_serve.wire import peer as wire
from pd_serve.wire.link import Source

log = logging.getLogger(__name__)

# Pauses between trials double. A misfit is tried again seldom: it takes a restart, or somebody, to change anything.
RETRY_MIN_S, RETRY_MISFIT_S, RETRY_MAX_S = 0.1, 1.0, 60.0
WAIT_S = 3.0  # a request waits for a trial that is due so soon; before a later one it fails at once
# So many failures in a row, over so long, and the node counts as one that cannot be read from. One that starts anew
# fails for as long as it takes routers to notice.
FAILURES_TOLERATED = 3
UNREACHABLE_S = 5.0
MAX_UNPROVED_FRAMES = 16  # of who was dialled; two are due
HEARTBEATS_PER_LEASE = 6
MIN_SILENCE_S = 2.0  # a busy machine may keep a healthy peer from answering for so long


class Listener(Protocol):
    """The inbox."""

    def peer_ready(self, peer: SourcePeer) -> None: ...

    def peer_lost(self, peer: SourcePeer, kind: FailureKind, message: str) -> None: ...

    def peer_says(self, peer: SourcePeer, message: wire.ToReader) -> None: ...


class State(Enum):
    PAUSED = "paused"
    GREETING = "greeting"
    TESTING = "testing"  # the handshake is done; lanes are measured
    READY = "ready"


class SourcePeer:
    """``anywhere``: whether addresses other than loopback are dialled."""

    def __init__(
        self,
        source: Source,
        address: str,
        identity: Identity,
        worker: TransferWorker,
        prober: Prober,
        listener: Listener,
        counters: dict[str, float],
        misfits_changed: Callable[[], None],  # ``misfit`` of this one has
        *,
        anywhere: bool = True,
        handshake_s: float = HANDSHAKE_S,
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self.named = source.node_id  # what routers call it
        self.misfit = ""  # why nothing can be read from it, as long as that is so
        self.state = State.PAUSED
        self.node_id = ""  # what it said of itself, from TESTING on
        self.epoch = ""
        self.rank, self.ranks = 0, 1
        self.slow_pulls = 0
        self.failed_pulls = 0  # in a row, over sessions
        self.named_s = worker.clock()  # when a router or a request last named it
        self._named_epoch = source.epoch
        self._anywhere = anywhere
        self._handshake_s = handshake_s
        self._tls = tls
        self._identity = identity
        self._worker = worker
        self._prober = prober
        self._listener = listener
        self._counters = counters
        self._misfits_changed = misfits_changed
        self._wire: Connection | None = None
        self._attempts = 0
        self._greeting: Greeting | None = None
        self._welcomed: wire.Welcome | None = None
        self._lanes: PeerLanes | None = None
        self._retry_s = RETRY_MIN_S
        self._failures = 0  # in a row, to become ready
        self._failing_since_s = 0.0
        self._frames = 0  # of this connection, until its source has proved itself
        self._why = ""  # the last one
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
    def bytes_per_s(self) -> float:
        """What the lane reached in its self-test; while READY. 0: it was not measured."""
        assert self._lanes is not None
        return self._lanes.rate

    @property
    def pair(self) -> Pair:
        """While READY."""
        assert self._lanes is not None
        return self._lanes.pair

    @property
    def layout(self) -> KVLayout:
        """While READY."""
        assert self._welcomed is not None
        return self._welcomed.layout

    @property
    def checksums(self) -> bool:
        """Whether announced blocks come with checksums; while READY."""
        assert self._welcomed is not None
        return self._welcomed.checksums

    def name(self, source: Source) -> None:
        """A router or a request names it. Where its engine is another one now, what failed before says nothing."""
        self.named_s = self._worker.clock()
        if (source.node_id, source.epoch) != (self.named, self._named_epoch):
            self.named, self._named_epoch = source.node_id, source.epoch
            self._fits()
            if self.state is State.PAUSED:
                self._due_s = 0.0

    def hurry(self) -> None:
        """Somebody names it: dial, unless it has failed just now. Then the pause goes on, whoever asks."""
        if self.state is State.PAUSED and self._worker.clock() >= self._due_s:
            self._dial()

    def refusal(self) -> str:
        """Why a request should not wait for the next trial; empty where it may."""
        left_s = self._due_s - self._worker.clock()
        if self.state is not State.PAUSED or left_s <= WAIT_S:
            return ""
        return f"{self._why}; it is tried again in {left_s:.0f} s"

    def send(self, message: wire.ToSource) -> None:
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
                    self.lose(FailureKind.CONNECT, f"no answer to the handshake within {self._handshake_s:g} s")
            case State.TESTING:
                if now_s >= self._due_s:
                    self._lose_misfit(
                        FailureKind.CONNECT, f"no transport has passed its test within {self._handshake_s:g} s"
                    )
            case State.READY:
                return self._heartbeat(now_s, keys())
        return self._due_s

    def lose(self, kind: FailureKind, message: str) -> None:
        """Ends the connection and dials again later. What waited for the peer fails with ``kind``."""
        self._hang_up()
        now_s = self._worker.clock()
        if not self._failures:
            self._failing_since_s = now_s
        self._failures += 1
        self._due_s = now_s + self._retry_s
        self._retry_s = min(RETRY_MAX_S, 2 * self._retry_s)
        text = self._why = f"prefill node {self.node_id or self.named or '(unknown)'} at {self.address}: {message}"
        if text != self._logged:  # a peer that stays away is no news
            self._logged = text
            log.warning("%s", text)
        if self._failures >= FAILURES_TOLERATED and now_s >= self._failing_since_s + UNREACHABLE_S:
            self._sets_misfit(shortened(message))
        self._listener.peer_lost(self, kind, text)

    def pull_failed(self, message: str) -> None:
        """An endpoint with a failed read serves no other read either: connect anew, after a pause that grows."""
        self.failed_pulls += 1
        if self.failed_pulls < FAILURES_TOLERATED:
            self.lose(FailureKind.PEER_LOST, message)
            return
        self._retry_s = min(RETRY_MAX_S, RETRY_MISFIT_S * 2 ** min(10, self.failed_pulls - FAILURES_TOLERATED))
        self._lose_misfit(FailureKind.PEER_LOST, f"{self.failed_pulls} pulls in a row have failed, the last: {message}")

    def _lose_misfit(self, kind: FailureKind, message: str) -> None:
        """Loses one that nothing can be read from as the two nodes are."""
        self._retry_s = max(self._retry_s, RETRY_MISFIT_S)
        self._sets_misfit(shortened(message))
        self.lose(kind, message)

    def _sets_misfit(self, why: str) -> None:
        if why != self.misfit:
            self.misfit = why
            self._misfits_changed()

    def _fits(self) -> None:
        self._failures = 0
        self._retry_s = RETRY_MIN_S
        self._logged = ""
        self._sets_misfit("")

    def close(self) -> None:
        if self._greeting is not None and self._greeting.challenged:  # others are told nothing
            self.send(wire.Bye(self._identity.epoch))
        self._hang_up()

    # --- the connection

    def _dial(self) -> None:
        self.state = State.GREETING
        self._due_s = self._worker.clock() + self._handshake_s
        self._attempts += 1
        self._worker.resolve(self.address, partial(self._resolved, self._attempts))

    def _resolved(self, attempt: int, resolved: Resolved | OSError) -> None:
        if attempt != self._attempts or self.state is not State.GREETING:
            return
        if isinstance(resolved, OSError):
            self.lose(FailureKind.CONNECT, f"cannot be dialled ({resolved})")
            return
        if not self._anywhere and not is_loopback(str(resolved[0][1][0])):
            self._lose_misfit(
                FailureKind.HANDSHAKE,
                "without a secret only nodes of this machine (loopback addresses) are dialled; "
                f"{auth.SECRET_ADVICE}, or this one with --allow-insecure-nodes",
            )
            return
        try:
            connection = dial(resolved, self._tls)
        except OSError as error:
            self.lose(FailureKind.CONNECT, f"cannot be dialled ({error})")
            return
        self._wire = connection
        self._frames = 0
        connection.max_frame_bytes = wire.MAX_UNPROVED_BYTES
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
            if self._talks_too_much():
                self.lose(FailureKind.CONNECT, "what answers there does not speak this protocol")
                return
            try:
                message = wire.decode_to_reader(frame)
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of %s: %s", self.address, error)
                continue
            self._take(message)
            if connection is not self._wire:
                return
        if connection.ended:
            self._counters["forged_frames"] += connection.forged
            self._ended(connection)

    def _ended(self, connection: Connection) -> None:
        greeting, why = self._greeting, connection.ended
        unheard = greeting is not None and not greeting.challenged and not connection.refused
        if unheard and not connection.untrusted:
            why = f"{why} instead of an answer; {TLS_ADVICE}"
        if connection.untrusted or (unheard and connection.nonsense):
            self._counters["handshakes_refused"] += 1
            self._lose_misfit(FailureKind.HANDSHAKE, why)
        else:
            self.lose(FailureKind.CONNECT if connection.refused else FailureKind.PEER_LOST, why)

    def _talks_too_much(self) -> bool:
        if self._greeting is not None and not self._greeting.challenged:
            self._frames += 1
        return self._frames > MAX_UNPROVED_FRAMES

    def _take(self, message: wire.ToReader) -> None:
        match message:
            case wire.Refused():
                self._counters["handshakes_refused"] += 1
                self._lose_misfit(FailureKind.HANDSHAKE, shortened(message.reason))
            case wire.Bye():
                self.lose(FailureKind.PEER_LOST, "it left")
            case _ if self.state is State.GREETING:
                self._greeted(message)
            case wire.LaneMessage():
                self._lane_says(message)
            case wire.Challenge() | wire.Welcome():  # once is enough
                self._counters["garbage_frames"] += 1
            case _ if self.state is not State.READY:
                self._counters["garbage_frames"] += 1  # nothing was claimed yet
            case wire.HeartbeatAck():
                if message.seq == self._seq:
                    self._unanswered_s = None
                self._listener.peer_says(self, message)
            case _:
                self._listener.peer_says(self, message)

    def _greeted(self, message: wire.ToReader) -> None:
        greeting = self._greeting
        assert greeting is not None
        try:
            if isinstance(message, wire.Challenge) and not greeting.challenged:
                self._prove(greeting, message)
            elif isinstance(message, wire.Welcome) and greeting.challenged:
                self._welcome(message, greeting.accept(message))
            else:
                self._counters["garbage_frames"] += 1
        except HandshakeError as error:
            self._counters["handshakes_refused"] += 1
            self._lose_misfit(FailureKind.HANDSHAKE, shortened(str(error)))

    def _prove(self, greeting: Greeting, challenge: wire.Challenge) -> None:
        """Proves the secret to who has proved it, and says what this node is."""
        try:
            proof = greeting.prove(challenge)
        except HandshakeError:
            # so that its log tells of it too; why is nobody's business there
            self.send(wire.Refused("the prefill node could not prove that it knows the decode node's secret"))
            raise
        self.send(proof)
        if self._wire is not None:
            self._wire.seal(greeting.outgoing, greeting.incoming)
            self._wire.max_frame_bytes = MAX_FRAME_BYTES
            self.send(greeting.introduction())

    # --- lanes

    def _welcome(self, welcome: wire.Welcome, pair: Pair) -> None:
        """Connects each lane that both have, and has them tested. Raises HandshakeError where there is none."""
        self.node_id, self.epoch, self._welcomed = welcome.node_id, welcome.epoch, welcome
        self.rank, self.ranks = welcome.rank, welcome.ranks
        self.state = State.TESTING
        self._lanes = PeerLanes(welcome, pair, self._worker.lanes, self._prober, self.send)
        self._lanes.connect(self._tested)

    def _tested(self) -> None:
        """The self-test is over."""
        lanes = self._lanes
        assert lanes is not None and self._welcomed is not None
        self._counters["self_test_failures"] += len(lanes.verdict.why_not)
        for name, (size_bytes, seconds) in lanes.verdict.timed.items():
            self._counters[f"self_test_bytes_{name}"] += size_bytes
            self._counters[f"self_test_seconds_{name}"] += seconds
        if lanes.chosen is None:
            why = "; ".join(f"{name}: {text}" for name, text in lanes.why_not.items())
            self._lose_misfit(FailureKind.CONNECT, f"no transport has passed its test ({why})")
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
        self._heartbeat_due_s = self._worker.clock() + self._welcomed.lease_s / HEARTBEATS_PER_LEASE
        self._unanswered_s = None
        self.state = State.READY
        self._fits()
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
        assert self._welcomed is not None
        interval_s = self._welcomed.lease_s / HEARTBEATS_PER_LEASE
        if not keys:
            self._unanswered_s = None
            return float("inf")
        silence_s = max(self._welcomed.lease_s, MIN_SILENCE_S)  # a pause shorter than the lease harms nothing
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
