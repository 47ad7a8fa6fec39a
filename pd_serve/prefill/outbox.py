"""The outbox of a prefill node: leased requests, and the decode nodes that read them.

The main thread opens, publishes and cancels keys and frees blocks when ``LeaseEnded`` says so; all
else happens on the transfer thread: handshakes, claims, heartbeats, releases, expiry. The outbox never
touches a block. Published blocks must stay as they are until the lease has ended.

A *session* is one connection of one decode node, opened by its ``Hello``. When the connection ends, a new
``Hello`` of the same node arrives, or it says ``Bye``, the leases that the session claimed end.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import msgspec
import zmq

from pd_serve.errors import TransferError
from pd_serve.memory.region import Region
from pd_serve.prefill.leases import Claimed, Holder, LeaseBook
from pd_serve.transfer.base import Transport
from pd_serve.transfer.handshake import Identity, answer
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.sockets import Monitored
from pd_serve.transfer.worker import Clock, TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.peer import FailureKind

log = logging.getLogger(__name__)

MAX_PEERS = 256


@dataclass(frozen=True)
class LeaseEnded:
    """To the main thread, once for each key it opened and did not cancel: free the blocks, stop computing."""

    key: str
    why: str  # "released" | "expired" | "peer_lost" | "declined"


@dataclass
class Session:
    node_id: str
    epoch: str
    fd: int  # of its connection


class Outbox:
    """Owns the transfer thread of a prefill engine. ``host``: the address to bind; the port is any free one."""

    def __init__(
        self,
        identity: Identity,
        make_transport: Callable[[], Transport],
        regions: Sequence[Region],
        *,
        host: str,
        lease_s: float,
        clock: Clock = time.monotonic,
    ) -> None:
        self._identity = identity
        self._host = host
        self._clock = clock
        self._book = LeaseBook(lease_s)
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
                "garbage_frames",
            ),
            0.0,
        )
        self._worker = TransferWorker(self, make_transport, regions, clock)
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

    def begin(self) -> None:
        """Starts the transfer thread."""
        self._worker.start()

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once peers can connect to ``address``. Raises TransferError."""
        self._worker.wait_ready(timeout_s)

    def wake(self) -> None:
        """Makes the transfer thread look at its clock again."""
        self._worker.wake()

    def close(self) -> None:
        self._worker.close()
        self._events.close()

    # --- transfer thread: the service

    def start(self, worker: TransferWorker) -> None:
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
        self._endpoint = worker.transport.describe()

    def run_due(self, now_s: float) -> float:
        for key in self._book.expire(now_s):
            log.warning("the lease of %s ran out after %g s without a sign of its decode node", key, self._book.lease_s)
            self._ended(key, "expired")
        return self._book.next_expiry_s() - now_s

    def stop(self) -> None:
        for holder in list(self._sessions):
            self._send(holder, wire.Bye(self._identity.epoch))
        self._router.close(linger_ms=100)

    # --- transfer thread: calls of the main thread

    def _open(self, key: str) -> None:
        self._counters["leases_opened"] += 1
        if not self._book.open(key, self._clock()):
            self._ended(key, "declined")  # the decode node gave up before the request came to be admitted

    def _publish(self, ready: wire.Ready) -> None:
        lease = self._book.publish(ready.key, ready, self._clock())
        if lease is not None and lease.holder is not None:
            self._send(lease.holder, ready)

    def _cancel(self, key: str, reason: str) -> None:
        held = len(self._book)
        holder = self._book.cancel(key, reason)
        self._counters["leases_cancelled"] += held - len(self._book)
        if holder is not None:
            self._send(holder, wire.Cancel(key, reason))

    # --- transfer thread: messages

    def _receive(self) -> None:
        self._connections_lost()
        while True:
            try:
                frames = self._router.socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return
            holder = frames[0].bytes
            try:
                if len(frames) != 2:
                    raise msgspec.DecodeError(f"{len(frames)} frames")
                message = wire.decode_to_prefill(frames[1].buffer)
            except msgspec.DecodeError as error:
                self._counters["garbage_frames"] += 1
                log.debug("dropped a frame of connection %s: %s", holder.hex(), error)
                continue
            if isinstance(message, wire.Hello):
                self._hello(holder, message, frames[1].get(zmq.SRCFD))
            elif holder in self._sessions:
                self._handle(holder, message)
            # else its session has ended, or it never had one: nothing it says can matter

    def _hello(self, holder: Holder, hello: wire.Hello, fd: int) -> None:
        for other in [h for h, s in self._sessions.items() if s.node_id == hello.node_id]:
            self._end_session(other, "it connected anew")
        reply = answer(self._identity, hello, self._endpoint, self._book.lease_s)
        if isinstance(reply, wire.Welcome) and len(self._sessions) >= MAX_PEERS:
            reply = wire.Refused(f"prefill node {self._identity.node_id} has {MAX_PEERS} decode nodes already")
        if isinstance(reply, wire.Refused):
            self._counters["handshakes_refused"] += 1
            if (hello.node_id, reply.reason) not in self._refused and len(self._refused) < MAX_PEERS:
                self._refused.add((hello.node_id, reply.reason))
                log.warning("refused decode node %s: %s", hello.node_id, reply.reason)
        else:
            self._counters["handshakes"] += 1
            self._sessions[holder] = Session(hello.node_id, hello.epoch, fd)
            log.info("decode node %s (epoch %s) reads over %s", hello.node_id, hello.epoch, reply.transport)
        self._send(holder, reply)

    def _handle(self, holder: Holder, message: wire.ToPrefill) -> None:
        now_s = self._clock()
        self.run_due(now_s)  # so that a lease that has just run out is not taken for a valid one
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
            case wire.Bye():
                self._end_session(holder, "it left")

    def _claim(self, holder: Holder, key: str, now_s: float) -> None:
        match self._book.claim(key, holder, now_s):
            case Claimed.OPEN:
                for ready in self._book.published(key):
                    self._send(holder, ready)
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
        for lost in self._router.lost():
            for holder in [h for h, s in self._sessions.items() if s.fd == lost.fd]:
                self._end_session(holder, "its connection ended")

    def _end_session(self, holder: Holder, why: str) -> None:
        session = self._sessions.pop(holder, None)
        if session is None:
            return
        keys = self._book.drop(holder)
        log.info("decode node %s: %s; %d leases end with it", session.node_id, why, len(keys))
        for key in keys:
            self._ended(key, "peer_lost")

    def _ended(self, key: str, why: str) -> None:
        self._counters[f"leases_{why}"] += 1
        self._events.put(LeaseEnded(key, why))
