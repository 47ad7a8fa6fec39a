"""A prefill node as a decode node sees it: one address, dialled, greeted, listened to, dialled again.

Runs on the transfer thread under the inbox, which it tells what comes in. It knows nothing of requests
but their keys in heartbeats. Every connection is a new session with its own handshake; when one ends,
for whatever reason, the inbox gives up what depended on it, and the peer is dialled again after a pause.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from enum import Enum
from typing import Protocol

import msgspec
import zmq

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.transfer.base import Peer
from pd_serve.transfer.handshake import Identity, hello
from pd_serve.transfer.sockets import Monitored
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import FailureKind

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0  # from dialling to the end of the handshake
RETRY_MIN_S, RETRY_MAX_S = 0.1, 5.0
HEARTBEATS_PER_LEASE = 6
MISSED_HEARTBEATS = 3
MIN_SILENCE_S = 2.0  # a busy machine may keep a healthy peer from answering for so long


class Listener(Protocol):
    """The inbox."""

    def peer_ready(self, peer: PrefillPeer) -> None: ...

    def peer_lost(self, peer: PrefillPeer, kind: FailureKind, message: str) -> None: ...

    def peer_says(self, peer: PrefillPeer, message: wire.ToDecode) -> None: ...


class State(Enum):
    PAUSED = "paused"
    GREETING = "greeting"
    READY = "ready"


class PrefillPeer:
    def __init__(
        self,
        address: str,
        identity: Identity,
        worker: TransferWorker,
        listener: Listener,
        counters: dict[str, float],
    ) -> None:
        self.address = address
        self.state = State.PAUSED
        self.node_id = ""  # what it said of itself, once READY
        self.epoch = ""
        self.remote: Peer | None = None
        self.slow_pulls = 0
        self.named_s = worker.clock()  # when a router or a request last named it
        self._identity = identity
        self._worker = worker
        self._listener = listener
        self._counters = counters
        self._wire: Monitored | None = None
        self._retry_s = RETRY_MIN_S
        self._due_s = 0.0  # when to dial again (PAUSED), to give up (GREETING)
        self._logged = ""
        self._lease_s = 0.0
        self._heartbeat_due_s = 0.0
        self._unanswered_s: float | None = None  # when the oldest unanswered heartbeat was sent
        self._seq = 0

    # --- asked by the inbox

    def hurry(self) -> None:
        """Somebody waits: dial now instead of after the pause."""
        if self.state is State.PAUSED:
            self._dial()

    def send(self, message: wire.ToPrefill) -> None:
        """Sends, or gives the connection up where it does not take messages any more."""
        if self._wire is None:
            return
        try:
            self._wire.socket.send(wire.encoder.encode(message), zmq.NOBLOCK)
        except zmq.ZMQError:
            self.lose(FailureKind.PEER_LOST, "it does not read its messages")

    def run_due(self, now_s: float, keys: Callable[[], list[str]]) -> float:
        """Dials, gives up, sends heartbeats for ``keys``; returns when it is due again."""
        if self.state is State.PAUSED:
            if now_s >= self._due_s:
                self._dial()
        elif self.state is State.GREETING:
            if now_s >= self._due_s:
                self.lose(FailureKind.CONNECT, f"no answer to the handshake within {CONNECT_TIMEOUT_S:g} s")
        else:
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
        self._hang_up(linger_ms=100)

    # --- the connection

    def _dial(self) -> None:
        self.state = State.GREETING
        self._due_s = self._worker.clock() + CONNECT_TIMEOUT_S
        self._wire = Monitored(self._worker.context, zmq.DEALER)
        try:
            self._wire.socket.connect(self.address)
        except zmq.ZMQError as error:
            self.lose(FailureKind.CONNECT, f"cannot be dialled ({error})")
            return
        self._worker.listen(self._wire.socket, self._receive)
        self._worker.listen(self._wire.monitor, self._receive)
        self.send(hello(self._identity))

    def _hang_up(self, linger_ms: int = 0) -> None:
        self.state = State.PAUSED
        if self._wire is not None:
            self._worker.unlisten(self._wire.socket)
            self._worker.unlisten(self._wire.monitor)
            self._wire.close(linger_ms)
            self._wire = None
        if self.remote is not None:
            self.remote.close()
            self.remote = None

    def _receive(self) -> None:
        connection = self._wire
        # what was sent before the connection ended still counts, so messages first
        while connection is not None and connection is self._wire:
            try:
                frames = connection.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if len(frames) != 1:
                    raise msgspec.DecodeError(f"{len(frames)} frames")
                message = wire.decode_to_decode(frames[0])
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of %s: %s", self.address, error)
                continue
            self._take(message)
        if connection is None or connection is not self._wire:
            return
        for lost in connection.lost():
            if lost.refused:
                self.lose(FailureKind.CONNECT, "nobody listens there")
            else:
                self.lose(FailureKind.PEER_LOST, "its connection ended")
            return

    def _take(self, message: wire.ToDecode) -> None:
        match message:
            case wire.Welcome():
                self._welcome(message)
            case wire.Refused():
                self._counters["handshakes_refused"] += 1
                self._retry_s = RETRY_MAX_S  # it takes a restart of either end to change this
                self.lose(FailureKind.HANDSHAKE, message.reason)
            case wire.Bye():
                self.lose(FailureKind.PEER_LOST, "it left")
            case wire.HeartbeatAck():
                if message.seq == self._seq:
                    self._unanswered_s = None
                self._listener.peer_says(self, message)
            case _:
                self._listener.peer_says(self, message)

    def _welcome(self, welcome: wire.Welcome) -> None:
        if self.state is not State.GREETING:
            self._counters["garbage_frames"] += 1
            return
        me = self._identity
        self.node_id, self.epoch = welcome.node_id, welcome.epoch
        if not me.protocol_min <= welcome.protocol <= me.protocol_max or welcome.transport not in me.transports:
            self.lose(
                FailureKind.HANDSHAKE,
                f"it settled on protocol {welcome.protocol} over {welcome.transport}; this node speaks "
                f"{me.protocol_min}..{me.protocol_max} over {', '.join(me.transports)}",
            )
            return
        try:
            self.remote = self._worker.transport.connect(welcome.endpoint)
        except HandshakeError as error:
            self.lose(FailureKind.HANDSHAKE, str(error))
            return
        except TransferError as error:
            self.lose(FailureKind(error.kind), str(error))
            return
        self._counters["handshakes"] += 1
        self._lease_s = welcome.lease_s
        self._heartbeat_due_s = self._worker.clock() + self._lease_s / HEARTBEATS_PER_LEASE
        self._unanswered_s = None
        self._retry_s = RETRY_MIN_S
        self._logged = ""
        self.state = State.READY
        log.info("reads from prefill node %s (epoch %s) over %s", self.node_id, self.epoch, welcome.transport)
        self._listener.peer_ready(self)

    def _heartbeat(self, now_s: float, keys: list[str]) -> float:
        interval_s = self._lease_s / HEARTBEATS_PER_LEASE
        if not keys:
            self._unanswered_s = None
            return float("inf")
        silence_s = max(MISSED_HEARTBEATS * interval_s, MIN_SILENCE_S)
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
