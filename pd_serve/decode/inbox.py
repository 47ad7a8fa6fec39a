"""The inbox of a decode node: it pulls leased prompts out of prefill nodes, chunk by chunk.

The main thread names the keys it expects, sets blocks aside when ``Offered`` comes, and may run a request
only after ``Arrived``. All else happens on the transfer thread. A key ends in exactly one way:

- ``Arrived``: every byte is here, sums to what was announced, *and* the prefill node confirmed, after the last byte had
  come, that its lease had never ended;
- ``Failed`` then ``Drained``;
- ``Drained``, after ``cancel`` (where ``Arrived`` was already on its way, that is the end instead).

Until ``Arrived`` or ``Drained`` the blocks set aside for a key must not be given to anybody: a transfer
may still write them, even long after a failure.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from functools import partial

from pd_serve.decode.expected import I32, Check, Expected, Stage
from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pull, PullState
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.movers.base import Work
from pd_serve.transfer.poller import look_s
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Identity
from pd_serve.transfer.session.probe import FLOOR_BYTES_PER_S, Prober
from pd_serve.transfer.session.source_peer import PrefillPeer, State
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.worker import Clock, TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.link import Source

log = logging.getLogger(__name__)

# A pull may take so long for its bytes beside ``pull_timeout_s``; at a lower rate computing anew is sooner done.
SLOWEST_BYTES_PER_S = 20e6

FORGET_S = 60.0  # a peer that cannot be reached and that nobody names is dropped after so long
FORGET_MISFIT_S = 600.0  # one that routers keep away from because of what this node told them
MAX_SOURCES = 256  # at once, as many as a prefill node has readers; one more ends the one not named for longest

# Beside a GPU the thread stays awake for so long to be told where to pull to, and then whether the lease was valid:
# waking up takes as long as the answer.
ANSWER_S = 1e-3

# How soon to look at a transfer again: at a part of its age, so that looking costs and delays little.
LOOK_MAX_S = 20e-3
LOOK_DRAINING_MAX_S = 0.1

# A pull is judged by its rate from so many bytes on; first pulls into fresh pages may be slow.
JUDGED_BYTES = 4 << 20
SLOW_BYTES_PER_S = FLOOR_BYTES_PER_S
SLOW_PULLS_TOLERATED = 5


@dataclass(frozen=True)
class Offered:
    """The first blocks are ready: set blocks aside and call ``accept``."""

    key: str
    num_tokens: int  # ready so far


@dataclass(frozen=True)
class Arrived:
    """The prompt's KV is in the blocks set aside and may be used."""

    key: str
    first_token: int
    size_bytes: int
    seconds: float  # during which bytes moved
    whole_from: tuple[int, ...] = ()  # a group: blocks before it may not be whole and must not be offered to others


@dataclass(frozen=True)
class Failed:
    """Nothing of what was pulled may be used. ``Drained`` follows."""

    key: str
    kind: FailureKind
    message: str


@dataclass(frozen=True)
class Drained:
    """No transfer can write the key's blocks any more."""

    key: str


Event = Offered | Arrived | Failed | Drained


class Inbox:
    """Owns the transfer thread of a decode engine.

    ``allow_insecure``: without a secret, dial sources on other machines too. ``handshake_s``: from dialling one to the
    end of its self-test.
    """

    def __init__(
        self,
        identity: Identity,
        lanes: Lanes,
        *,
        pull_timeout_s: float,
        handshake_s: float = HANDSHAKE_S,
        allow_insecure: bool = False,
        tls: Tls | None = None,
        clock: Clock = time.monotonic,
    ) -> None:
        self._identity = identity
        self._layout = identity.layout
        self._lanes = lanes
        self._on_gpu = lanes.memory.device is not None
        self._look_s = look_s(lanes.memory.device)
        self._look_part = 0.01 if self._on_gpu else 0.1  # of a transfer's age
        self._pull_timeout_s = pull_timeout_s
        self._clock = clock
        self._handshake_s = handshake_s
        self._tls = tls
        self._anywhere = bool(identity.secret) or allow_insecure
        self._peers: dict[str, PrefillPeer] = {}  # by address
        self._misfits: dict[str, str] = {}  # replaced, never changed: the main thread reads it
        self._keys: dict[str, Expected] = {}
        self._draining: list[Expected] = []
        self._events: Mailbox[Event] = Mailbox()
        self._counters: dict[str, float] = dict.fromkeys(
            (
                "pulls",
                "pull_bytes",
                "pull_seconds",
                "pull_descriptors",
                "slow_pulls",
                "slow_lanes",
                "self_test_failures",
                "checksum_bytes",
                *(f"pull_failures_{kind}" for kind in FailureKind),
                "handshakes",
                "handshakes_refused",
                "garbage_frames",
                "forged_frames",
            ),
            0.0,
        )
        self._drained = True  # nothing could write to the pool when the thread ended
        self._worker = TransferWorker(self, lanes, clock)

    # --- main thread

    def connect(self, source: Source) -> None:
        """Connects ahead of use."""
        self._worker.call(self._connect, source)

    def expect(self, key: str, source: Source) -> None:
        """Claims ``key`` at its prefill node; ``Offered`` follows when blocks are ready there."""
        self._worker.call(self._expect, key, source)

    def accept(self, key: str, tables: list[I32], first_block: list[int]) -> None:
        """After ``Offered``: pull into these blocks.

        ``tables``, one a group: logical to local block, for the whole prompt (0: no place). ``first_block``,
        one a group: logical blocks before it are not wanted (cached here, or outside of the window).
        """
        self._worker.call(self._accept, key, tables, first_block)

    def cancel(self, key: str) -> None:
        """The key is not wanted any more; ends with ``Drained``."""
        self._worker.call(self._cancel, key)

    def fileno(self) -> int:
        """Readable while there are events."""
        return self._events.fileno()

    def events(self) -> list[Event]:
        """Raises TransferError where the transfer thread has given up."""
        self._worker.check()
        return self._events.take()

    def counters(self) -> dict[str, float]:
        """Monotonic since the start."""
        return {**self._counters, "transfer_faults": float(self._worker.internal_errors)}

    def misfits(self) -> dict[str, str]:
        """Node ids of sources that nothing can be read from, and why. ``fileno`` is readable when it has changed."""
        return self._misfits

    def begin(self) -> None:
        """Starts the transfer thread."""
        self._worker.start()

    @property
    def lanes(self) -> tuple[str, ...]:
        """Names of those that started, preferred first; once ready."""
        return self._lanes.names

    def wait_ready(self, timeout_s: float = 60.0) -> None:
        """Returns once a lane runs. Raises TransferError."""
        self._worker.wait_ready(timeout_s)

    def wake(self) -> None:
        """Makes the transfer thread look at its clock again."""
        self._worker.wake()

    def close(self) -> bool:
        """True: nothing writes to the pool any more."""
        closed = self._worker.close() and self._drained
        self._events.close()
        return closed

    # --- transfer thread: the service

    def start(self, worker: TransferWorker) -> None:
        self._prober = Prober(self._lanes.memory, self._lanes.mover)
        for name in self._lanes.names:
            for counter in ("pull_bytes", "lane_chosen", "self_test_bytes", "self_test_seconds"):
                self._counters[f"{counter}_{name}"] = 0.0

    def run_due(self, now_s: float) -> float:
        due_s = float("inf")
        for job in list(self._keys.values()):
            if self._on_gpu and job.awaits_answer and now_s < job.moved_s + ANSWER_S:
                due_s = min(due_s, now_s + self._look_s)
            elif job.pull is None and job.stage is not Stage.RELEASING:
                continue  # the prefill node queues or computes, which may take long; heartbeats tell whether it lives
            else:
                size_bytes = job.pull.size_bytes if job.pull is not None else 0
                allowed_s = self._pull_timeout_s + size_bytes / SLOWEST_BYTES_PER_S
                if now_s >= job.moved_s + allowed_s:
                    self._fail(job, FailureKind.TIMEOUT, f"nothing moved for {allowed_s:.1f} s")
                else:
                    due_s = min(due_s, job.moved_s + allowed_s)
        for peer in list(self._peers.values()):
            if peer.state is State.PAUSED and now_s >= peer.named_s + (FORGET_MISFIT_S if peer.misfit else FORGET_S):
                self._forget(peer)
                continue
            due_s = min(due_s, peer.run_due(now_s, partial(self._claimed_at, peer)))
        return min(due_s - now_s, self._prober.run(), self._look_at_pulls())

    def stop(self) -> None:
        for peer in self._peers.values():
            peer.close()
        running = [job.pull for job in [*self._keys.values(), *self._draining] if job.pull is not None]
        closed = [pull.close() for pull in running]
        self._drained = all(closed) and self._prober.idle

    def gave_up(self) -> None:
        self._events.wake()

    # --- transfer thread: calls of the main thread

    def _connect(self, source: Source) -> None:
        peer = self._peer(source)
        if peer is not None:
            peer.hurry()

    def _peer(self, source: Source) -> PrefillPeer | None:
        """None where there are as many as can be, all of them in use."""
        peer = self._peers.get(source.address)
        if peer is None:
            if len(self._peers) >= MAX_SOURCES and not self._make_room():
                return None
            # at another address it has started anew
            for old in [p for p in self._peers.values() if p.named == source.node_id and p.misfit]:
                self._forget(old)
            peer = self._peers[source.address] = PrefillPeer(
                source,
                self._identity,
                self._worker,
                self._prober,
                self,
                self._counters,
                anywhere=self._anywhere,
                handshake_s=self._handshake_s,
                tls=self._tls,
            )
        peer.name(source)
        return peer

    def _make_room(self) -> bool:
        """Ends the peer that was not named for longest, of those that no request needs."""
        used = {job.source.address for job in [*self._keys.values(), *self._draining]}
        idle = [peer for peer in self._peers.values() if peer.address not in used]
        if idle:
            self._forget(min(idle, key=lambda peer: peer.named_s))
        return bool(idle)

    def _forget(self, peer: PrefillPeer) -> None:
        for job in self._at(peer):
            self._fail(job, FailureKind.PEER_LOST, f"prefill node {peer.named} is at {peer.address} no more")
        del self._peers[peer.address]
        peer.close()
        self.misfits_changed()

    def misfits_changed(self) -> None:
        found = {peer.named: peer.misfit for peer in self._peers.values() if peer.misfit}
        if found != self._misfits:
            self._misfits = found
            self._events.wake()

    def _expect(self, key: str, source: Source) -> None:
        if key in self._keys:
            log.error("key %s is expected twice", key)
            return
        job = self._keys[key] = Expected(key, source)
        peer = self._peer(source)
        if peer is None:
            self._fail(job, FailureKind.CONNECT, f"this node reads from {MAX_SOURCES} prefill nodes already")
        elif peer.state is State.READY:
            self._claim(job, peer)
        elif refusal := peer.refusal():
            self._fail(job, FailureKind.HANDSHAKE if peer.misfit else FailureKind.CONNECT, refusal)
        else:
            peer.hurry()

    def _accept(self, key: str, tables: list[I32], first_block: list[int]) -> None:
        job = self._keys.get(key)
        if job is not None and job.stage is Stage.CLAIMED:
            try:
                job.accept(tables, first_block)
            except Exception as error:
                self._failed(job, error)
                return
            job.moved_s = self._clock()
            self._advance(job)

    def _cancel(self, key: str) -> None:
        job = self._keys.get(key)
        if job is not None:
            self._give_up(job)

    # --- transfer thread: what peers say

    def peer_ready(self, peer: PrefillPeer) -> None:
        for job in self._at(peer):
            self._claim(job, peer)

    def peer_lost(self, peer: PrefillPeer, kind: FailureKind, message: str) -> None:
        for job in self._at(peer):
            self._fail(job, kind, message)

    def peer_says(self, peer: PrefillPeer, message: wire.ToDecode) -> None:
        if isinstance(message, wire.HeartbeatAck):
            for key in message.gone:
                job = self._known(key, peer)
                if job is not None and job.stage in (Stage.CLAIMED, Stage.PULLING):
                    self._fail(job, FailureKind.EXPIRED, "the prefill node holds no lease for it (any more)")
            return
        if isinstance(message, wire.Ready | wire.Released | wire.Cancel):
            job = self._known(message.key, peer)
            if job is None:  # it ended here meanwhile
                return
            match message:
                case wire.Ready():
                    self._ready(job, message)
                case wire.Released():
                    self._released(job, message.valid)
                case wire.Cancel():
                    self._fail(job, FailureKind.CANCELLED, f"the prefill node ended the request: {message.reason}")

    def _known(self, key: str, peer: PrefillPeer) -> Expected | None:
        job = self._keys.get(key)
        return job if job is not None and job.source.address == peer.address else None

    def _at(self, peer: PrefillPeer) -> list[Expected]:
        return [job for job in self._keys.values() if job.source.address == peer.address]

    def _claimed_at(self, peer: PrefillPeer) -> list[str]:
        return [job.key for job in self._at(peer) if job.stage in (Stage.CLAIMED, Stage.PULLING)]

    # --- transfer thread: a request's way

    def _claim(self, job: Expected, peer: PrefillPeer) -> None:
        if (peer.node_id, peer.epoch) != (job.source.node_id, job.source.epoch):
            self._fail(
                job,
                FailureKind.PEER_LOST,
                f"prefill node {job.source.node_id} (epoch {job.source.epoch}) is gone; at {peer.address} there is now "
                f"{peer.node_id} (epoch {peer.epoch})",
            )
            return
        job.claimed(peer.pair, peer.checksums)
        peer.send(wire.Claim(job.key))

    def _ready(self, job: Expected, ready: wire.Ready) -> None:
        if job.stage not in (Stage.CLAIMED, Stage.PULLING):
            return
        try:
            job.announce(ready)
        except Exception as error:
            self._failed(job, error)
            return
        job.moved_s = self._clock()
        if not job.offered:
            job.offered = True
            self._events.put(Offered(job.key, job.num_tokens))
            self._lanes.mover.rouse()  # while the main thread chooses blocks
        if job.stage is Stage.PULLING:
            self._advance(job)

    def _advance(self, job: Expected) -> None:
        """Pulls what is pending, releases when all is here, and books what has arrived."""
        peer = self._peers[job.source.address]
        try:
            job.open_checks()
            while job.stage is Stage.PULLING:
                pull = job.pull or self._start(job, peer)
                if pull is not None and not self._arrived(job, peer, pull):
                    return
                if job.all_taken:
                    self._release(job, peer)  # before all else: its answer takes longest
                if pull is None:
                    break
                if job.key in self._keys:  # else the connection ended just now
                    self._book(job, peer, pull)
            self._finish(job)
        except Exception as error:
            self._failed(job, error)

    def _start(self, job: Expected, peer: PrefillPeer) -> Pull | None:
        """Starts to pull what is pending, if anything is. Raises TransferError."""
        job.pulled = job.take()
        if not job.pulled:
            return None
        job.pull_started_s = time.perf_counter()
        job.moved_s = self._clock()
        pull = job.pull = peer.lane.transport.pull(peer.lane.peer, [blocks for blocks, _ in job.pulled])
        pull.poll()  # starts it
        if pull.work is not None:
            self._sum(job, peer, pull.work)
        if job.all_taken:
            job.check_complete(self._layout)  # while bytes move
        return pull

    def _release(self, job: Expected, peer: PrefillPeer) -> None:
        """Asks whether the lease was valid until now. Raises TransferError where something was never announced."""
        job.check_complete(self._layout)
        job.stage = Stage.RELEASING
        job.moved_s = self._clock()
        peer.send(wire.Release(job.key, done=True))

    def _failed(self, job: Expected, error: Exception) -> None:
        """Ends a request for the error being handled: a TransferError, or a fault of ours, which ends no other."""
        if not isinstance(error, TransferError):
            self._worker.fault()
            error = TransferError(FailureKind.TRANSFER, f"a fault of this node ({error!r}); see its log")
        elif error.kind == FailureKind.CHECKSUM:
            lane = self._peers[job.source.address].lane.name
            log.error("%s from prefill node %s over %s: %s", job.key, job.source.node_id, lane, error)
        self._fail(job, FailureKind(error.kind), str(error))

    def _arrived(self, job: Expected, peer: PrefillPeer, pull: Pull) -> bool:
        """Whether the pull under way has ended well."""
        state = pull.poll()
        if state is PullState.RUNNING:
            return False
        if state is PullState.FAILED:
            error = pull.error()
            self._fail(job, FailureKind(error.kind), str(error))
            peer.pull_failed(str(error))
            return False
        pull.close()
        job.pull = None
        return True

    def _book(self, job: Expected, peer: PrefillPeer, pull: Pull) -> None:
        seconds = time.perf_counter() - job.pull_started_s
        self._sum(job, peer, None)
        job.size_bytes += pull.size_bytes
        job.seconds += seconds
        job.moved_s = self._clock()
        peer.failed_pulls = 0
        self._counters["pulls"] += 1
        self._counters["pull_bytes"] += pull.size_bytes
        self._counters[f"pull_bytes_{peer.lane.name}"] += pull.size_bytes
        self._counters["pull_seconds"] += seconds
        self._counters["pull_descriptors"] += pull.num_descriptors
        if pull.size_bytes >= JUDGED_BYTES and pull.size_bytes < SLOW_BYTES_PER_S * seconds:
            self._slow(peer, pull.size_bytes / seconds)

    def _sum(self, job: Expected, peer: PrefillPeer, after: Work | None) -> None:
        """Starts to sum what was pulled last, ``after`` it has arrived, unless that is done already."""
        if peer.checksums:
            for blocks, announced in job.pulled:
                slicing, region = peer.pair.slicings[blocks.group], peer.pair.reader[blocks.group]
                rows = slicing.reader_rows(region, blocks.local)
                job.checks.append(Check(self._lanes.mover.checksums(rows, after), announced))
                self._counters["checksum_bytes"] += rows.size_bytes
        job.pulled = []

    def _slow(self, peer: PrefillPeer, bytes_per_s: float) -> None:
        """Counts a pull at the speed of a fall-back, and says so when they become many: never slow in silence."""
        self._counters["slow_pulls"] += 1
        peer.slow_pulls += 1
        if peer.slow_pulls == SLOW_PULLS_TOLERATED:
            log.warning(
                "pulls from prefill node %s over %s run at %.2f GB/s: it has probably fallen back to TCP. Run pd-serve "
                "doctor; with UCX, UCX_PROTO_INFO=y shows what it uses; check UCX_TLS, RDMA devices, shared memory, "
                "ptrace rights",
                peer.node_id,
                peer.lane.name,
                bytes_per_s / 1e9,
            )

    def _look_at_pulls(self) -> float:
        """Asks after every transfer and checksum under way; returns when to ask again."""
        soon_s = float("inf")
        for job in [j for j in self._keys.values() if j.pull is not None or j.checks]:
            self._advance(job)
            if job.checks and job.key in self._keys:
                soon_s = min(soon_s, self._look_s)
            if job.pull is not None:
                soon_s = min(soon_s, self._look_in(job, LOOK_MAX_S))
        waiting, self._draining = self._draining, []
        for job in waiting:
            self._drain(job)
        for job in self._draining:
            soon_s = min(soon_s, self._look_in(job, LOOK_DRAINING_MAX_S))
        return soon_s

    def _look_in(self, job: Expected, most_s: float) -> float:
        age_s = time.perf_counter() - job.pull_started_s
        return max(self._look_s, min(most_s, age_s * self._look_part))

    def _released(self, job: Expected, valid: bool) -> None:
        if job.stage is not Stage.RELEASING:
            return
        if not valid:
            self._fail(job, FailureKind.EXPIRED, "its lease had ended when the bytes arrived")
            return
        job.released = True
        self._advance(job)

    def _finish(self, job: Expected) -> None:
        """Ends the job when all is confirmed. Raises TransferError where a checksum does not hold."""
        if job.key in self._keys and not job.open_checks() and job.released:
            assert job.first_token is not None and job.whole_from is not None
            del self._keys[job.key]
            self._events.put(Arrived(job.key, job.first_token, job.size_bytes, job.seconds, job.whole_from))

    # --- transfer thread: ends

    def _fail(self, job: Expected, kind: FailureKind, message: str) -> None:
        if job.key not in self._keys:
            return
        self._counters[f"pull_failures_{kind}"] += 1
        self._events.put(Failed(job.key, kind, message))
        self._give_up(job)

    def _give_up(self, job: Expected) -> None:
        del self._keys[job.key]
        while job.checks:
            self._lanes.abandon(job.checks.pop().sums)
        peer = self._peers.get(job.source.address)
        if job.stage is not Stage.CONNECTING and peer is not None and peer.state is State.READY:
            peer.send(wire.Release(job.key, done=False))
        self._drain(job)

    def _drain(self, job: Expected) -> None:
        if job.pull is None or job.pull.close():
            job.pull = None
            self._events.put(Drained(job.key))
        else:
            self._draining.append(job)
