"""The inbox: it pulls leased prompts out of prefill nodes, chunk by chunk.

The main thread names the keys it expects, sets blocks aside when ``Offered`` comes, and may run a request
only after ``Arrived``. All else happens on the transfer thread. A key ends in exactly one way:

- ``Arrived``: every byte is here, sums to what was announced, *and* each rank of the prefill node confirmed, after the
  last byte of its part had come, that its lease had never ended;
- ``Failed`` then ``Drained``;
- ``Drained``, after ``cancel`` (where ``Arrived`` was already on its way, that is the end instead).

Until ``Arrived`` or ``Drained`` the blocks set aside for a key must not be given to anybody: a transfer
may still write them, even long after a failure.
"""

from __future__ import annotations

import logging
import time

import msgspec

from pd_serve.decode.incoming import I32, Check, Incoming, Part, Place, Stage
from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.transfer.base import Pull, PullState
from pd_serve.transfer.mailbox import Mailbox
from pd_serve.transfer.movers.base import Work
from pd_serve.transfer.poller import look_s
from pd_serve.transfer.session.handshake import HANDSHAKE_S, Identity
from pd_serve.transfer.session.peers import COUNTERS, Peers
from pd_serve.transfer.session.probe import FLOOR_BYTES_PER_S
from pd_serve.transfer.session.source_peer import SourcePeer, State
from pd_serve.transfer.session.tls import Tls
from pd_serve.transfer.slices import needed
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.counted import TRANSFER, no_times, observe
from pd_serve.wire.link import Source

log = logging.getLogger(__name__)

# A pull may take so long for its bytes beside ``pull_timeout_s``; at a lower rate computing anew is sooner done.
SLOWEST_BYTES_PER_S = 20e6

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


class Offered(msgspec.Struct, frozen=True, tag=True):
    """The first blocks are ready: set blocks aside and call ``accept``."""

    key: str
    num_tokens: int  # ready so far


class Arrived(msgspec.Struct, frozen=True, tag=True):
    """The prompt's KV is in the blocks set aside and may be used."""

    key: str
    first_token: int
    size_bytes: int
    seconds: float  # during which bytes moved
    whole_from: tuple[int, ...] = ()  # a group: blocks before it may not be whole and must not be offered to others
    num_tokens: int = 0  # of the prompt, as the prefill node had it


class Failed(msgspec.Struct, frozen=True, tag=True):
    """Nothing of what was pulled may be used. ``Drained`` follows."""

    key: str
    kind: FailureKind
    message: str


class Drained(msgspec.Struct, frozen=True, tag=True):
    """No transfer can write the key's blocks any more."""

    key: str


Event = Offered | Arrived | Failed | Drained


class Inbox:
    """A service of ``worker``.

    ``allow_insecure``: without a secret, dial sources on other machines too. ``handshake_s``: from dialling one to the
    end of its self-test.
    """

    def __init__(
        self,
        identity: Identity,
        worker: TransferWorker,
        *,
        pull_timeout_s: float,
        handshake_s: float = HANDSHAKE_S,
        allow_insecure: bool = False,
        tls: Tls | None = None,
    ) -> None:
        self._layout = layout = identity.layout
        self._token_bytes = sum(map(layout.block_bytes, range(len(layout.groups)))) / layout.block_size
        self._rates: dict[str, float] = {}  # replaced, never changed: the main thread reads it
        self._worker = worker
        self._lanes = worker.lanes
        self._clock = worker.clock
        self._on_gpu = worker.lanes.memory.device is not None
        self._look_s = look_s(worker.lanes.memory.device)
        self._look_part = 0.01 if self._on_gpu else 0.1  # of a transfer's age
        self._pull_timeout_s = pull_timeout_s
        self._keys: dict[str, Incoming] = {}
        self._draining: list[Incoming] = []
        self._events: Mailbox[Event] = Mailbox()
        self._counters: dict[str, float] = dict.fromkeys(
            (
                "pulls",
                "pull_bytes",
                "pull_seconds",
                "pull_descriptors",
                "slow_pulls",
                "checksum_bytes",
                *(f"pull_failures_{kind}" for kind in FailureKind),
                *COUNTERS,
            ),
            0.0,
        ) | no_times(TRANSFER)
        self._peers = Peers(
            identity,
            worker,
            self,
            self._counters,
            anywhere=bool(identity.secret) or allow_insecure,
            handshake_s=handshake_s,
            tls=tls,
            changed=self._events.wake,
        )
        worker.add(self)

    # --- main thread

    def connect(self, source: Source) -> None:
        """Connects ahead of use."""
        self._worker.call(self._peers.connect, source)

    def expect(self, key: str, source: Source, place: Place | None = None) -> None:
        """Claims ``key`` at its prefill node's ranks; ``Offered`` follows when blocks are ready there.

        ``place``: where to pull to, where blocks are set aside already. Then nobody need ``accept``.
        """
        self._worker.call(self._expect, key, source, place)

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
        return dict(self._counters)

    def misfits(self) -> dict[str, str]:
        """Node ids of sources that nothing can be read from, and why. ``fileno`` is readable when it has changed."""
        return self._peers.misfits

    def lanes(self) -> dict[str, float]:
        """For node ids of sources: this rank's share of so many prompt tokens comes in a second."""
        return self._rates

    def close(self) -> None:
        """After the thread has ended."""
        self._events.close()

    # --- transfer thread: the service

    def start(self) -> None:
        self._peers.start()
        self._counters |= {f"pull_bytes_{name}": 0.0 for name in self._lanes.names}

    def run_due(self, now_s: float) -> float:
        due_s = float("inf")
        for part in self._parts():
            if self._on_gpu and part.awaits_answer and now_s < part.moved_s + ANSWER_S:
                due_s = min(due_s, now_s + self._look_s)
                continue
            since_s, allowed_s = self._patience(part)
            if now_s >= since_s + allowed_s:
                self._fail(part.whole, FailureKind.TIMEOUT, f"nothing moved for {allowed_s:.1f} s")
            else:
                due_s = min(due_s, since_s + allowed_s)
        return min(due_s - now_s, self._peers.run_due(now_s), self._look_at_pulls())

    def _patience(self, part: Part) -> tuple[float, float]:
        """Since when a part has not moved, and for how long it need not."""
        if part.pull is not None:
            return part.moved_s, self._pull_timeout_s + part.pull.size_bytes / SLOWEST_BYTES_PER_S
        if part.stage is Stage.RELEASING:
            return part.moved_s, self._pull_timeout_s
        # the prefill node queues or computes, which may take long; heartbeats tell whether it lives. Its ranks compute
        # side by side: when one is done, so are the others
        return max(part.moved_s, part.whole.announced_s), self._pull_timeout_s if part.awaited else float("inf")

    def stop(self) -> bool:
        tested = self._peers.close()
        running = [part.pull for part in [*self._parts(), *self._drained_parts()] if part.pull is not None]
        closed = [pull.close() for pull in running]
        return all(closed) and tested

    def gave_up(self) -> None:
        self._events.wake()

    # --- transfer thread: calls of the main thread

    def _expect(self, key: str, source: Source, place: Place | None = None) -> None:
        if key in self._keys:
            log.error("key %s is expected twice", key)
            return
        job = self._keys[key] = Incoming(key, source, self._peers.ranks(source), place)
        for part in job.parts:
            peer = self._peers.named(source, part.address)
            if peer is None:
                self._fail(job, FailureKind.CONNECT, f"this node reads from {len(self._peers)} prefill nodes already")
            elif refusal := peer.refusal():
                self._fail(job, FailureKind.HANDSHAKE if peer.misfit else FailureKind.CONNECT, refusal)
            else:
                peer.hurry()
        self._claim(job)

    def _accept(self, key: str, tables: list[I32], first_block: list[int]) -> None:
        job = self._keys.get(key)
        for part in job.parts if job is not None else ():
            if part.stage is Stage.CLAIMED and self._lives(part):  # else another part has just failed
                try:
                    part.accept(tables, first_block)
                except Exception as error:
                    self._failed(part, error)
                    return
                part.moved_s = self._clock()
                self._advance(part)

    def _cancel(self, key: str) -> None:
        job = self._keys.get(key)
        if job is not None:
            self._give_up(job)

    # --- transfer thread: what peers say

    def peer_ready(self, peer: SourcePeer) -> None:
        if peer.bytes_per_s:
            self._rates = {**self._rates, peer.node_id: peer.bytes_per_s / self._token_bytes}
        for part in self._at(peer):
            self._claim(part.whole)

    def peer_lost(self, peer: SourcePeer, kind: FailureKind, message: str) -> None:
        if peer.node_id in self._rates:
            self._rates = {id: rate for id, rate in self._rates.items() if id != peer.node_id}
        for part in self._at(peer):
            self._fail(part.whole, kind, message)

    def peer_says(self, peer: SourcePeer, message: wire.ToReader) -> None:
        if isinstance(message, wire.HeartbeatAck):
            for key in message.gone:
                part = self._known(key, peer)
                if part is not None and part.held:
                    why = "the prefill node holds no lease for it (any more)"
                    self._fail(part.whole, FailureKind.EXPIRED, why)
            return
        if isinstance(message, wire.Ready | wire.Released | wire.Cancel):
            part = self._known(message.key, peer)
            if part is None:  # it ended here meanwhile
                return
            match message:
                case wire.Ready():
                    self._ready(part, message)
                case wire.Released():
                    self._released(part, message.valid)
                case wire.Cancel():
                    why = f"the prefill node ended the request: {message.reason}"
                    kind = FailureKind.EXPIRED if message.reason == "expired" else FailureKind.CANCELLED
                    self._fail(part.whole, kind, why)

    def _known(self, key: str, peer: SourcePeer) -> Part | None:
        job = self._keys.get(key)
        return next((part for part in job.parts if part.address == peer.address), None) if job is not None else None

    def _at(self, peer: SourcePeer) -> list[Part]:
        return [part for part in self._parts() if part.address == peer.address]

    def keys_at(self, peer: SourcePeer) -> list[str]:
        return [part.key for part in self._at(peer) if part.held]

    def addresses_in_use(self) -> set[str]:
        return {part.address for part in [*self._parts(), *self._drained_parts()]}

    def _parts(self) -> list[Part]:
        return [part for job in self._keys.values() for part in job.parts]

    def _lives(self, part: Part) -> bool:
        return self._keys.get(part.key) is part.whole

    def _drained_parts(self) -> list[Part]:
        return [part for job in self._draining for part in job.parts]

    # --- transfer thread: a request's way

    def _claim(self, job: Incoming) -> None:
        """Claims all parts once all source ranks can be read from."""
        peers = [self._peers.get(part.address) for part in job.parts]
        ready = [peer for peer in peers if peer is not None and peer.state is State.READY]
        if job.key not in self._keys or not job.connecting or len(ready) < len(job.parts):
            return
        source = job.source
        for part, peer in zip(job.parts, ready, strict=True):
            named = (source.node_id, source.epoch, part.rank, len(source.addresses))
            if (found := (peer.node_id, peer.epoch, peer.rank, peer.ranks)) != named:
                why = f"prefill node {_text(*named)} is gone; at {peer.address} there is now {_text(*found)}"
                self._fail(job, FailureKind.PEER_LOST, why)
                return
        try:
            reads = needed([peer.layout for peer in ready], self._layout)
        except HandshakeError as error:
            self._fail(job, FailureKind.HANDSHAKE, str(error))
            return
        for part, peer, groups in zip(job.parts, ready, reads, strict=True):
            part.claimed(peer.pair, peer.checksums, groups)
        for peer in ready:
            if job.key in self._keys:  # else a connection has just ended
                peer.send(wire.Claim(job.key))

    def _ready(self, part: Part, ready: wire.Ready) -> None:
        if not part.held:
            return
        try:
            part.announce(ready)
        except Exception as error:
            self._failed(part, error)
            return
        part.moved_s = self._clock()
        if part.first_token is not None:
            part.announced_s = min(part.announced_s, part.moved_s)
        if not part.whole.offered:
            part.whole.offered = True
            self._events.put(Offered(part.key, part.num_tokens))
            self._lanes.mover.rouse()  # while the main thread chooses blocks
            if part.whole.place is not None:
                self._accept(part.key, *part.whole.place)
        if part.stage is Stage.PULLING:
            self._advance(part)

    def _advance(self, part: Part) -> None:
        """Pulls what is pending, releases when all is here, and books what has arrived."""
        peer = self._peers[part.address]
        try:
            part.open_checks()
            while part.stage is Stage.PULLING:
                pull = part.pull or self._start(part, peer)
                if pull is not None and not self._arrived(part, peer, pull):
                    return
                if part.all_taken:
                    self._release(part, peer)  # before all else: its answer takes longest
                if pull is None:
                    break
                if self._lives(part):  # else the connection ended just now
                    self._book(part, peer, pull)
            if not part.open_checks():
                self._finish(part.whole)
        except Exception as error:
            self._failed(part, error)

    def _start(self, part: Part, peer: SourcePeer) -> Pull | None:
        """Starts to pull what is pending, if anything is. Raises TransferError."""
        part.pulled = part.take()
        if not part.pulled:
            return None
        part.pull_started_s = time.perf_counter()
        part.moved_s = self._clock()
        pull = part.pull = peer.lane.transport.pull(peer.lane.peer, [blocks for blocks, _ in part.pulled])
        pull.poll()  # starts it
        if pull.work is not None:
            self._sum(part, peer, pull.work)
        if part.all_taken:
            part.check_complete(self._layout)  # while bytes move
        return pull

    def _release(self, part: Part, peer: SourcePeer) -> None:
        """Asks whether the lease was valid until now. Raises TransferError where something was never announced."""
        part.check_complete(self._layout)
        part.stage = Stage.RELEASING
        part.moved_s = self._clock()
        peer.send(wire.Release(part.key, done=True))

    def _failed(self, part: Part, error: Exception) -> None:
        """Ends a request for the error being handled: a TransferError, or a fault of ours, which ends no other."""
        if not isinstance(error, TransferError):
            self._worker.fault()
            error = TransferError(FailureKind.TRANSFER, f"a fault of this node ({error!r}); see its log")
        elif error.kind == FailureKind.CHECKSUM:
            lane = self._peers[part.address].lane.name
            log.error("%s from prefill node %s over %s: %s", part.key, part.whole.source.node_id, lane, error)
        self._fail(part.whole, FailureKind(error.kind), str(error))

    def _arrived(self, part: Part, peer: SourcePeer, pull: Pull) -> bool:
        """Whether the pull under way has ended well."""
        state = pull.poll()
        if state is PullState.RUNNING:
            return False
        if state is PullState.FAILED:
            error = pull.error()
            self._fail(part.whole, FailureKind(error.kind), str(error))
            peer.pull_failed(str(error))
            return False
        pull.close()
        part.pull = None
        return True

    def _book(self, part: Part, peer: SourcePeer, pull: Pull) -> None:
        seconds = time.perf_counter() - part.pull_started_s
        self._sum(part, peer, None)
        part.size_bytes += pull.size_bytes
        part.seconds += seconds
        part.moved_s = self._clock()
        peer.failed_pulls = 0
        self._counters["pulls"] += 1
        self._counters["pull_bytes"] += pull.size_bytes
        self._counters[f"pull_bytes_{peer.lane.name}"] += pull.size_bytes
        self._counters["pull_seconds"] += seconds
        observe(self._counters, TRANSFER, seconds)
        self._counters["pull_descriptors"] += pull.num_descriptors
        if pull.size_bytes >= JUDGED_BYTES and pull.size_bytes < SLOW_BYTES_PER_S * seconds:
            self._slow(peer, pull.size_bytes / seconds)

    def _sum(self, part: Part, peer: SourcePeer, after: Work | None) -> None:
        """Starts to sum what was pulled last, ``after`` it has arrived, unless that is done already."""
        if peer.checksums:
            for blocks, announced in part.pulled:
                slicing, region = peer.pair.slicings[blocks.group], peer.pair.reader[blocks.group]
                rows = slicing.reader_rows(region, blocks.local)
                part.checks.append(Check(self._lanes.mover.checksums(rows, after), announced))
                self._counters["checksum_bytes"] += rows.size_bytes
        part.pulled = []

    def _slow(self, peer: SourcePeer, bytes_per_s: float) -> None:
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
        for part in [p for p in self._parts() if p.pull is not None or p.checks]:
            if self._lives(part):  # else another part has just failed
                self._advance(part)
            if part.checks and self._lives(part):
                soon_s = min(soon_s, self._look_s)
            if part.pull is not None:
                soon_s = min(soon_s, self._look_in(part, LOOK_MAX_S))
        waiting, self._draining = self._draining, []
        for job in waiting:
            self._drain(job)
        for part in self._drained_parts():
            if part.pull is not None:
                soon_s = min(soon_s, self._look_in(part, LOOK_DRAINING_MAX_S))
        return soon_s

    def _look_in(self, part: Part, most_s: float) -> float:
        age_s = time.perf_counter() - part.pull_started_s
        return max(self._look_s, min(most_s, age_s * self._look_part))

    def _released(self, part: Part, valid: bool) -> None:
        if part.stage is not Stage.RELEASING:
            return
        if not valid:
            self._fail(part.whole, FailureKind.EXPIRED, "its lease had ended when the bytes arrived")
            return
        part.stage = Stage.VALID
        self._advance(part)

    def _finish(self, job: Incoming) -> None:
        """Ends the job when all parts are confirmed. Raises TransferError where they do not fit together."""
        if job.key in self._keys and (arrived := job.arrived()) is not None:
            first_token, whole_from = arrived
            del self._keys[job.key]
            num_tokens = job.parts[0].num_tokens
            self._events.put(Arrived(job.key, first_token, job.size_bytes, job.seconds, whole_from, num_tokens))

    # --- transfer thread: ends

    def _fail(self, job: Incoming, kind: FailureKind, message: str) -> None:
        if job.key not in self._keys:
            return
        self._counters[f"pull_failures_{kind}"] += 1
        self._events.put(Failed(job.key, kind, message))
        self._give_up(job)

    def _give_up(self, job: Incoming) -> None:
        del self._keys[job.key]
        for part in job.parts:
            while part.checks:
                self._lanes.abandon(part.checks.pop().sums)
            peer = self._peers.get(part.address)
            if part.stage is not Stage.CONNECTING and peer is not None and peer.state is State.READY:
                peer.send(wire.Release(job.key, done=False))
        self._drain(job)

    def _drain(self, job: Incoming) -> None:
        """Ends the key once no transfer of any part can write its blocks."""
        for part in job.parts:
            if part.pull is not None and part.pull.close():
                part.pull = None
        if any(part.pull is not None for part in job.parts):
            self._draining.append(job)
        else:
            self._events.put(Drained(job.key))


def _text(node_id: str, epoch: str, rank: int, ranks: int) -> str:
    return f"{node_id} (epoch {epoch}{f', rank {rank} of {ranks}' if ranks > 1 else ''})"
