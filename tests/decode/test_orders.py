"""An inbox against one to three source ranks, in random orders of all that can happen: without threads and sockets.

Each rank is a real book of leases behind two queues of messages; a pull ends when the test says so.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pd_serve.decode.inbox import Arrived, Drained, Failed, Inbox, Offered
from pd_serve.errors import FailureKind, TransferError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.prefill.leases import Claimed, Ended, LeaseBook
from pd_serve.transfer.base import BlockMap, Pair, PullState
from pd_serve.transfer.session.probe import Lane
from pd_serve.transfer.session.source_peer import State
from pd_serve.transfer.slices import slicings
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire import peer as wire
from pd_serve.wire.link import Source
from tests.transfer.harness import Clock, Pool, identity
from tests.transfer.scripted import copy_lanes

HEADS, BLOCKS = 6, 80  # heads: of one, two or three ranks
PROMPT_BLOCKS, LEASE_S, PATIENCE_S = 3, 10.0, 20.0
US = b"d"  # the inbox's session at each rank
HARMS = ["abort", "fail", "break", "lose", "cancel", "wait", "silence", "long silence"]
KEYS = [f"k{i}" for i in range(10)]


def share(rank: int, ranks: int) -> KVLayout:
    heads = HEADS // ranks
    return KVLayout(4, "float32", (kv_group((0, 1), heads, 8, None, rank * heads, HEADS),))


class Pull:
    size_bytes, num_descriptors, work = 1, 1, None

    def __init__(self, blocks: Sequence[BlockMap]) -> None:
        self.blocks = {int(block) for one in blocks for block in one.local}
        self.state = PullState.RUNNING

    def poll(self) -> PullState:
        return self.state

    def error(self) -> TransferError:
        return TransferError(FailureKind.TRANSFER, "it broke")

    def close(self) -> bool:
        return self.state is not PullState.RUNNING


class Rank:
    """A source rank, the connection to it, and its peer as the inbox sees it."""

    named, node_id, epoch, misfit = "P", "P", "e", ""
    checksums, failed_pulls, slow_pulls, bytes_per_s = False, 0, 0, 0.0

    def __init__(self, rank: int, ranks: int, inbox: Inbox, pool: Pool, clock: Clock) -> None:
        self.rank, self.ranks, self.address = rank, ranks, f"rank {rank}"
        self.inbox, self.clock = inbox, clock
        self.layout = share(rank, ranks)
        memory = Pool(self.layout, BLOCKS).memory()
        self.pair = Pair(slicings(self.layout, pool.layout), memory.regions, pool.memory().regions)
        self.lane = Lane("copy", self, self)  # type: ignore[arg-type]
        self.state = State.PAUSED
        self.broken = False
        self.book = LeaseBook(LEASE_S)
        self.to_source: deque[wire.ToSource] = deque()
        self.to_reader: deque[wire.ToReader] = deque()
        self.pulls: list[Pull] = []
        self.opened: dict[str, int] = {}  # keys, and how many of their blocks are announced
        self.over: dict[str, str] = {}  # leases that ended here, and why
        self.unread: dict[str, set[int]] = {}  # blocks that a key's pulls have not brought yet

    # --- the peer, and its transport

    def send(self, message: wire.ToSource) -> None:
        assert self.state is State.READY
        if isinstance(message, wire.Release) and message.done:
            assert not self.unread[message.key], "released before all was here"
        self.to_source.append(message)

    def hurry(self) -> None:
        pass

    def refusal(self) -> str:
        return ""

    def pull(self, peer: object, blocks: Sequence[BlockMap]) -> Pull:
        assert peer is self and self.state is State.READY
        if self.broken:
            self.broken = False
            raise TransferError(FailureKind.TRANSFER, "it cannot even start")
        self.pulls.append(Pull(blocks))
        return self.pulls[-1]

    def pull_failed(self, message: str) -> None:
        self.lose(FailureKind.PEER_LOST, message)

    # --- what happens

    def connect(self) -> None:
        self.state = State.READY
        self.inbox.peer_ready(self)  # type: ignore[arg-type]

    def lose(self, kind: FailureKind = FailureKind.PEER_LOST, message: str = "lost") -> None:
        if self.state is State.READY:
            self.state = State.PAUSED
            self.to_source.clear()
            self.to_reader.clear()
            self.end(self.book.drop(US))
            self.inbox.peer_lost(self, kind, message)  # type: ignore[arg-type]

    def end(self, ended: Sequence[Ended]) -> None:
        for one in ended:
            self.over[one.key] = one.why

    def source_hears(self) -> None:
        match self.to_source.popleft():
            case wire.Claim(key):
                match self.book.claim(key, US, self.clock()):
                    case Claimed.OPEN:
                        self.to_reader.extend(self.book.published(key))
                    case Claimed.GONE:
                        self.to_reader.append(wire.Cancel(key, "gone"))
            case wire.Heartbeat(seq, keys):
                self.to_reader.append(wire.HeartbeatAck(seq, self.book.heartbeat(keys, US, self.clock())))
            case wire.Release(key, done):
                release = self.book.release(key, US, done=done)
                self.end([release.ended] if release.ended else [])
                if done:
                    self.to_reader.append(wire.Released(key, release.valid))

    def reader_hears(self) -> None:
        self.inbox.peer_says(self, self.to_reader.popleft())  # type: ignore[arg-type]

    def computes(self, key: str) -> bool:
        return key not in self.over and self.opened.get(key, 0) < PROMPT_BLOCKS

    def publish(self, key: str) -> None:
        """The next block; with the last one the first token."""
        if key not in self.opened:
            self.opened[key] = 0
            if not self.book.open(key, self.clock()):
                self.over[key] = "declined"
        else:
            at = self.opened[key]
            self.opened[key] = at + 1
            blocks = wire.Blocks(0, at, np.array([1 + 3 * KEYS.index(key) + at], "<i4").tobytes())
            token = wire.First(7) if at + 1 == PROMPT_BLOCKS else None
            ready = wire.Ready(key, 4 * (at + 1), [blocks], token)
            lease = self.book.publish(key, ready, self.clock())
            if lease is not None and US in lease.holders:
                self.to_reader.append(ready)


class Peers:
    """The inbox's book of sources."""

    def __init__(self) -> None:
        self.ends: list[Rank] = []
        self.misfits: dict[str, str] = {}

    def ranks(self, source: Source) -> range:
        return range(len(source.addresses))

    def named(self, source: Source, address: str) -> Rank:
        return self[address]

    def __getitem__(self, address: str) -> Rank:
        return next(end for end in self.ends if end.address == address)

    get = __getitem__

    def run_due(self, now_s: float) -> float:
        return float("inf")


class Orders(RuleBasedStateMachine):
    seeds = st.integers(0, 1 << 32)

    @initialize(ranks=st.integers(1, 3))
    def begin(self, ranks: int) -> None:
        self.clock = Clock()
        self.pool = Pool(share(0, 1), BLOCKS)
        worker = TransferWorker(copy_lanes(self.pool.memory()), self.clock)
        worker.lanes.start()
        self.inbox = Inbox(identity("D", self.pool.layout), worker, pull_timeout_s=PATIENCE_S)
        self.inbox.start()
        self.peers = self.inbox._peers = Peers()  # type: ignore[assignment]
        self.ranks = self.peers.ends = [Rank(i, ranks, self.inbox, self.pool, self.clock) for i in range(ranks)]
        for rank in self.ranks:
            rank.connect()
        self.said: dict[str, list[type]] = {}  # the ends of each key
        self.offered: list[str] = []

    def collect(self) -> None:
        for event in self.inbox._events.take():
            key, kind = event.key, type(event)
            if kind is Offered:
                self.offered.append(key)
                continue
            before = self.said[key]
            assert before == ([Failed] if kind is Drained and before else []), f"{before} and then {kind}"
            self.said[key].append(kind)
            if kind in (Arrived, Drained):
                assert not any(self.writing(key)), "a pull may still write"
            if kind is Arrived:
                for rank in self.ranks:
                    assert rank.over.get(key) == "released" and not rank.unread[key]

    def writing(self, key: str) -> list[Pull]:
        mine = set(self.table(key).tolist())
        running = [pull for rank in self.ranks for pull in rank.pulls if pull.state is PullState.RUNNING]
        return [pull for pull in running if pull.blocks & mine]

    def table(self, key: str) -> np.ndarray:
        return (40 + 3 * KEYS.index(key) + np.arange(PROMPT_BLOCKS)).astype(np.int32)

    def live(self) -> list[str]:
        return [key for key, said in self.said.items() if not said]

    # --- what goes well

    @precondition(lambda self: len(self.said) < len(KEYS))
    @rule()
    def expect(self) -> None:
        key = KEYS[len(self.said)]
        self.said[key] = []
        for rank in self.ranks:
            rank.unread[key] = set(self.table(key).tolist())
        self.inbox._expect(key, Source("P", "e", tuple(rank.address for rank in self.ranks)))

    @rule(seed=seeds, steps=st.integers(1, 120))
    def progress(self, seed: int, steps: int) -> None:
        """Some of all that can happen next, each time one thing."""
        chance = random.Random(seed)
        for _ in range(steps):
            doable = self.doable()
            if not doable:
                return
            chance.choice(doable)()
            self.collect()

    def doable(self) -> list[Callable[[], None]]:
        found: list[Callable[[], None]] = [self.accept] if self.offered else []
        for rank in self.ranks:
            if rank.state is State.PAUSED:
                found.append(rank.connect)
            if rank.to_source:
                found.append(rank.source_hears)
            if rank.to_reader:
                found.append(rank.reader_hears)
            found += [partial(rank.publish, key) for key in self.live() if rank.computes(key)]
            found += [partial(self.pull_ends, rank, pull, PullState.DONE) for pull in self.running(rank)]
        return found

    def accept(self) -> None:
        key = self.offered.pop(0)
        self.inbox._accept(key, [self.table(key)], [0])

    def running(self, rank: Rank) -> list[Pull]:
        return [pull for pull in rank.pulls if pull.state is PullState.RUNNING]

    def pull_ends(self, rank: Rank, pull: Pull, state: PullState) -> None:
        pull.state = state
        if state is PullState.DONE:
            for blocks in rank.unread.values():
                blocks -= pull.blocks
        self.inbox.run_due(self.clock())

    # --- and what does not

    @precondition(lambda self: self.live())
    @rule(seed=seeds)
    def harm(self, seed: int) -> None:
        chance = random.Random(seed)
        kind, key, rank = chance.choice(HARMS), chance.choice(self.live()), chance.choice(self.ranks)
        match kind:
            case "abort":
                self.inbox._cancel(key)
            case "fail":
                for pull in self.running(rank)[:1]:
                    self.pull_ends(rank, pull, PullState.FAILED)
            case "lose":
                rank.lose()
            case "cancel" if key not in rank.over:
                rank.over[key] = "aborted"
                if US in rank.book.cancel(key, "aborted"):
                    rank.to_reader.append(wire.Cancel(key, "aborted"))
            case "break":
                rank.broken = True
            case "wait":  # what has been released, but not confirmed, runs out
                for _ in range(3):
                    self.time_passes(4.0)
            case "silence" | "long silence":
                self.time_passes(11.0 if kind == "silence" else 25.0, silent=rank)

    def time_passes(self, seconds: float, silent: Rank | None = None) -> None:
        self.clock.now_s += seconds
        for rank in self.ranks:
            if rank is not silent:
                keys = self.inbox.keys_at(rank)  # type: ignore[arg-type]
                rank.to_reader.append(wire.HeartbeatAck(1, rank.book.heartbeat(keys, US, self.clock())))
            rank.end(rank.book.expire(self.clock()))
        self.inbox.run_due(self.clock())

    @invariant()
    def nothing_ends_twice_or_too_early(self) -> None:
        if hasattr(self, "said"):
            self.collect()

    def teardown(self) -> None:
        if not hasattr(self, "said"):
            return
        for key in self.said:
            self.inbox._cancel(key)
        self.inbox.run_due(self.clock())
        self.collect()
        for key, said in self.said.items():
            done = said and said[-1] in (Arrived, Drained)
            assert done or self.writing(key), f"{key} has neither ended nor a pull that runs: {said}"
        for rank in self.ranks:
            for pull in self.running(rank):
                pull.state = PullState.DONE
        self.inbox.run_due(self.clock())
        self.collect()
        assert all(said[-1:] in ([Arrived], [Drained]) for said in self.said.values())
        assert self.inbox.counters().get("transfer_faults", 0) == self.inbox._worker.internal_errors == 0


TestOrders = Orders.TestCase
TestOrders.settings = settings(max_examples=80, stateful_step_count=40, deadline=None)
