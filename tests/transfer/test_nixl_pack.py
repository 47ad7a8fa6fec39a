"""Packed pulls with real NIXL: other block sizes and tensor parallelism, bounded rings, ends that die or misbehave."""

from __future__ import annotations

import dataclasses
import signal
import time
from collections.abc import Iterator

import numpy as np
import pytest

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import PROBE_BLOCKS, PoolMemory, Region
from pd_serve.transfer.base import Pair, PullState
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.movers.host import HostMover, HostWork
from pd_serve.transfer.nixl import Limits, messages
from pd_serve.transfer.nixl.limits import DEVICE, HOST, UNIT_BYTES
from tests.transfer.harness import LARGE, SMALL, Clock, until
from tests.transfer.nixl_ends import DIRECT, PACKED, Node, Session, Target, blocks, check, everything, expected


def layout(block_size: int, tp: int = 1, rank: int = 0) -> KVLayout:
    heads = 4 // tp
    return KVLayout(
        block_size,
        "float16",
        (kv_group((0, 2), heads, 16, None, rank * heads, 4), kv_group((1,), heads, 16, 40, rank * heads, 4)),
    )


class Slow(HostMover):
    """Copies that are done when the test says so."""

    def __init__(self) -> None:
        super().__init__()
        self.held = False
        self.broken = False
        self.copies = 0

    def copy(self, items: list[tuple[Rows, Rows]]) -> HostWork:
        self.copies += 1
        return _Held(self, super().copy(items))  # type: ignore[return-value]


class _Held:
    def __init__(self, mover: Slow, work: HostWork) -> None:
        self.mover, self.work = mover, work

    def done(self) -> bool:
        if self.mover.broken:
            raise TransferError("transfer", "the device is on fire")
        return not self.mover.held and self.work.done()


@pytest.fixture(scope="module")
def nodes() -> Iterator[dict]:
    """Nodes that tests leave as they found them: starting one takes a quarter of a second."""
    kept: dict[tuple[object, ...], Node] = {}
    yield kept
    for node in kept.values():
        node.close()


@pytest.fixture
def make(nodes: dict) -> Iterator:
    """Makes a session of two nodes, new ones (``fresh``, or with a mover or clock) or kept ones."""
    sessions: list[tuple[Session, bool]] = []

    def session(
        a: KVLayout, b: KVLayout, limits: Limits | None = PACKED, count: int = 24, fresh: bool = False, **source: object
    ) -> Session:
        fresh = fresh or bool(source)
        ends = []
        for layout, seed, options in ((a, 3, source), (b, None, {})):
            key = (layout, seed, limits, count)
            node = None if fresh else nodes.get(key)
            if node is None:
                node = Node(layout, count, seed, limits, **options)  # type: ignore[arg-type]
                if not fresh:
                    nodes[key] = node
            ends.append(node)
        for group in ends[1].groups:
            group[:] = 7
        sessions.append((Session(*ends), fresh))
        return sessions[-1][0]

    yield session
    for made, fresh in sessions:
        made.close()
        if fresh:
            made.reader.close()
            made.source.close()


def rings_are_free(session: Session) -> None:
    """Soon: a read that nobody waits for any more keeps its slot until it has ended."""

    def free() -> bool:
        session.turn()
        rings = session.source.transport._packer.ring, session.reader.transport._ring._ring
        return all(ring is not None and ring.num_free == ring.slots for ring in rings)

    until(free)


PAIRS = [
    (layout(16), layout(16)),
    (layout(16), layout(64)),
    (layout(64), layout(16)),
    (layout(16, 2, 1), layout(16)),
    (layout(16), layout(16, 4, 2)),
    (layout(32, 2, 0), layout(16, 4, 1)),
    (layout(16, 4, 3), layout(64, 2, 1)),
]


@pytest.mark.parametrize("limits", [PACKED, DIRECT, None], ids=["packed", "direct", "as measured"])
@pytest.mark.parametrize(("a", "b"), PAIRS, ids=lambda kv: f"{kv.block_size}x{kv.groups[0].planes[0].heads}")
def test_any_two_layouts_exchange_what_they_share(make, a: KVLayout, b: KVLayout, limits: Limits | None) -> None:
    session = make(a, b, limits)
    for seed in range(2):
        before = [group.copy() for group in session.reader.groups]
        maps = everything(session.pair, seed)
        pull = session.pull(*maps)
        assert session.finish(pull) == [PullState.DONE]
        assert pull.close()
        check(session.pair, session.source.groups, before, session.reader.groups, maps)
        assert pull.size_bytes == sum(session.pair.slicings[m.group].piece_bytes * len(m.local) for m in maps)
    if limits is PACKED:
        rings_are_free(session)
    if limits is DIRECT:
        assert session.source.transport._packer.ring is None, "staging memory that nobody needs"


def test_several_sources_fill_one_block(make) -> None:
    """TP 2 to 1: each half of a block's heads comes from another rank."""
    one, two = make(layout(16, 2, 0), layout(32)), Node(layout(16, 2, 1), 24, 4, PACKED)
    other = Session(two, one.reader)
    before = [group.copy() for group in one.reader.groups]
    maps = everything(one.pair, 1)
    pulls = one.pull(*maps), other.pull(*maps)
    while any(pull.poll() is PullState.RUNNING for pull in pulls):
        one.turn()
        other.turn()
    assert all(pull.poll() is PullState.DONE and pull.close() for pull in pulls)
    half = [group.copy() for group in before]
    for item in maps:
        half[item.group] = expected(
            one.pair.slicings[item.group], one.source.groups[item.group], half[item.group], item
        )
    check(other.pair, two.groups, half, one.reader.groups, maps)
    other.close()
    two.close()


def test_few_or_large_descriptors_are_read_directly_and_many_small_ones_packed(make) -> None:
    session = make(layout(16), layout(16), HOST, count=300)
    everywhere = np.arange(0, 300, 2)
    few = session.pull(blocks(0, everywhere[:60], everywhere[:60]))
    assert few.num_descriptors == 60
    neighbours = session.pull(blocks(0, np.arange(1, 300), np.arange(1, 300)))
    assert neighbours.num_descriptors == 1
    assert session.finish(few, neighbours) == [PullState.DONE] * 2
    assert session.source.transport._packer.ring is None
    many = session.pull(blocks(0, everywhere, everywhere), blocks(1, [5], [6]))
    assert many.num_descriptors > 1, "the single block, directly, and chunks"
    assert session.finish(many) == [PullState.DONE]
    rings_are_free(session)
    assert np.array_equal(session.reader.groups[0][1:], session.source.groups[0][1:])
    assert np.array_equal(session.reader.groups[1][6], session.source.groups[1][5])
    assert all(pull.close() for pull in (few, neighbours, many))


def test_many_pulls_share_bounded_rings(make) -> None:
    """Two readers of one source: slots, and what waits for them, never exceed the limits."""
    first = make(layout(16), layout(64))
    reader = Node(layout(64), 24, None, PACKED)
    second = Session(first.source, reader)
    maps = everything(first.pair, 2, 1.0)
    pulls = [s.pull(*maps) for s in (first, second) for _ in range(4)]
    most = 0
    while any(pull.poll() is PullState.RUNNING for pull in pulls):
        for session in (first, second):
            # one message at a time, so that there is something to see between them
            if session.to_source:
                session.served.receive(session.to_source.popleft())
            if session.to_reader:
                session.peer.receive(session.to_reader.popleft())
            session.reader.transport.progress()
            ring = first.source.transport._packer.ring
            assert len(session.served.jobs) <= PACKED.slots_per_peer
            most = max(most, ring.slots - ring.num_free) if ring else 0
    assert 2 < most <= PACKED.slots
    assert [pull.poll() for pull in pulls] == [PullState.DONE] * 8
    assert all(pull.close() for pull in pulls)
    rings_are_free(first)
    rings_are_free(second)
    for node in (first.reader, reader):
        check(first.pair, first.source.groups, [np.full_like(g, 7) for g in node.groups], node.groups, maps)
    second.close()
    reader.close()


def test_a_pull_given_up_leaves_nothing_behind_and_writes_nothing(make) -> None:
    session = make(layout(16), layout(64))
    maps = everything(session.pair, 3, 1.0)
    for turns in range(6):
        pull = session.pull(*maps)
        for _ in range(turns):
            if session.to_source:
                session.served.receive(session.to_source.popleft())
            if session.to_reader:
                session.peer.receive(session.to_reader.popleft())
        until(pull.close)
        after = [group.copy() for group in session.reader.groups]
        for _ in range(20):
            session.turn()
        assert all(np.array_equal(a, b) for a, b in zip(after, session.reader.groups, strict=True))
        rings_are_free(session)
        assert not session.served.jobs
    pull = session.pull(*maps)
    assert session.finish(pull) == [PullState.DONE]


def test_a_reader_that_leaves_in_mid_pull_frees_its_slots_once_they_are_packed(make) -> None:
    mover = Slow()
    session = make(layout(16), layout(64), mover=mover)
    mover.held = True
    pull = session.pull(*everything(session.pair, 3, 1.0))
    session.turn()
    session.turn()
    ring = session.source.transport._packer.ring
    assert ring.num_free == PACKED.slots - PACKED.slots_per_peer
    session.served.close()
    session.source.transport.progress()
    assert ring.num_free == PACKED.slots - PACKED.slots_per_peer, "a copy is still writing into them"
    mover.held = False
    session.source.transport.progress()
    assert ring.num_free == PACKED.slots
    session.peer.close()
    assert pull.poll() is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    assert pull.close()


def test_a_slot_taken_back_fails_the_pull(make) -> None:
    """Whatever the slot held when it was read: its source says that it was not the reader's all the time."""
    clock = Clock()
    session = make(layout(16), layout(64), clock=clock)
    pull = session.pull(*everything(session.pair, 3, 1.0))
    while not session.served.jobs:
        while session.to_source:
            session.served.receive(session.to_source.popleft())
        if session.served.jobs:
            break
        while session.to_reader:
            session.peer.receive(session.to_reader.popleft())
    assert 0 < session.source.transport.progress() <= PACKED.reclaim_s
    clock.now_s += PACKED.reclaim_s + 1
    session.source.transport.progress()
    assert not session.served.jobs
    assert session.finish(pull) == [PullState.FAILED]
    assert "used the staging slot again" in str(pull.error())
    until(pull.close)
    rings_are_free(session)
    again = session.pull(*everything(session.pair, 4))
    assert session.finish(again) == [PullState.DONE]


@pytest.mark.parametrize("side", ["source", "reader"])
def test_a_device_that_fails_is_a_typed_error(make, side: str) -> None:
    session = make(layout(16), layout(64), fresh=True)
    mover = Slow()
    part = session.source.transport._packer if side == "source" else session.reader.transport._ring
    setattr(part, "_mover" if side == "source" else "mover", mover)
    mover.broken = True
    pull = session.pull(*everything(session.pair, 3))
    assert session.finish(pull) == [PullState.FAILED]
    assert pull.error().kind == "transfer"
    assert "on fire" in str(pull.error())
    until(pull.close)
    rings_are_free(session)
    mover.broken = False
    again = session.pull(*everything(session.pair, 3))
    assert session.finish(again) == [PullState.DONE]


def test_no_memory_for_a_ring_says_what_to_do(make, monkeypatch: pytest.MonkeyPatch) -> None:
    session = make(layout(16), layout(64), fresh=True)

    def allocate(size_bytes: int) -> int:
        raise MemoryError("none left")

    monkeypatch.setattr(session.source.mover, "allocate", allocate)
    pull = session.pull(*everything(session.pair, 3))
    assert session.finish(pull) == [PullState.FAILED]
    assert "leave more memory" in str(pull.error())
    assert pull.close()
    monkeypatch.undo()
    again = session.pull(*everything(session.pair, 3))
    assert session.finish(again) == [PullState.DONE]
    monkeypatch.setattr(session.reader.mover, "allocate", allocate)
    other = Session(session.source, Node(layout(64), 8, None, PACKED))
    monkeypatch.setattr(other.reader.mover, "allocate", allocate)
    with pytest.raises(TransferError, match="leave more memory"):
        other.pull(*everything(other.pair, 3))
    other.close()
    other.reader.close()


def test_the_probe_region_is_read_like_any_other(make) -> None:
    session = make(layout(16), layout(64), None)
    group = len(session.pair.slicings) - 1
    local = np.arange(16, 32)
    pull = session.pull(*[blocks(group, local + 16, local)] * 32)
    assert session.finish(pull) == [PullState.DONE]
    assert pull.num_descriptors == 32
    assert np.array_equal(session.reader.groups[-1][local], session.source.groups[-1][local + 16])
    assert pull.close()
    with pytest.raises(TransferError, match="outside"):
        session.pull(blocks(group, [PROBE_BLOCKS], [0]))


def test_a_pull_of_nothing_is_done(make) -> None:
    session = make(layout(16), layout(64))
    pull = session.pull(blocks(0, [], []))
    assert pull.poll() is PullState.DONE
    assert pull.close()


# --- what makes no sense


def pack(ticket: int, pieces: list[int], group: int = 0) -> messages.Pack:
    return messages.Pack(ticket, [messages.Part(group, np.array(pieces, dtype="<i4").tobytes())])


@pytest.mark.parametrize(
    "frame",
    [
        b"",
        b"\xc1",
        b"\x93\x01\x02\x03",
        messages.encode([messages.Freed(1, True)]),
        messages.encode([pack(0, [24])]),
        messages.encode([pack(0, [-1])]),
        messages.encode([pack(0, [0], group=9)]),
        messages.encode([pack(0, [])]),
        messages.encode([messages.Pack(0, [])]),
        messages.encode([messages.Pack(0, [messages.Part(0, b"abc")])]),
        messages.encode([pack(0, [1] * 100_000)]),
        messages.encode([pack(0, [1]), pack(0, [1])]),
        messages.encode([pack(n, [1]) for n in range(4)]),
    ],
)
def test_what_a_reader_may_not_say(make, frame: bytes) -> None:
    session = make(layout(16), layout(16))
    session.served.receive(messages.encode([messages.Open()]))
    with pytest.raises(TransferError):
        session.served.receive(frame)
    session.served.close()
    session.source.transport.progress()
    ring = session.source.transport._packer.ring
    assert ring.num_free == ring.slots


def test_packing_needs_an_open_ring(make) -> None:
    with pytest.raises(TransferError, match="opened"):
        make(layout(16), layout(16), fresh=True).served.receive(messages.encode([pack(0, [1])]))


@pytest.mark.parametrize(
    "frame",
    [
        b"\xc1",
        messages.encode([messages.Open()]),
        messages.encode([messages.Opened(b"", 4096, 1 << 20, 4, 3)]),
        messages.encode([messages.Packed(99, 0)]),
        messages.encode([messages.NotPacked(99, "no")]),
        messages.encode([messages.Freed(99, True)]),
    ],
)
def test_what_a_source_may_not_say(make, frame: bytes) -> None:
    session = make(layout(16), layout(16))
    with pytest.raises(TransferError):
        session.peer.receive(frame)


@pytest.mark.parametrize(
    ("slot_bytes", "slots"), [(UNIT_BYTES - 1, 4), (1 << 39, 1000), (UNIT_BYTES, 8)], ids=["odd", "huge", "too small"]
)
def test_a_ring_that_does_not_fit_is_refused(make, slot_bytes: int, slots: int) -> None:
    session = make(LARGE, LARGE, PACKED, 4)
    session.pull(blocks(0, [1, 3], [1, 2]))
    with pytest.raises(TransferError, match="do not fit"):
        session.peer.receive(messages.encode([messages.Opened(b"", 4096, slot_bytes, slots, 3)]))


def test_a_slot_that_is_not_there_fails_the_pull(make) -> None:
    session = make(layout(16), layout(64))
    pull = session.pull(*everything(session.pair, 3))
    session.served.receive(session.to_source.popleft())
    session.peer.receive(session.to_reader.popleft())
    session.peer.receive(messages.encode([messages.Packed(0, 4)]))
    assert pull.poll() is PullState.FAILED
    until(pull.close)


def test_pools_that_are_not_of_their_layouts_are_refused(make) -> None:
    session = make(layout(16), layout(64))
    source, reader = session.source, session.reader
    wrong = PoolMemory(None, (Region(4096, 100, 24), *source.memory.regions[1:]))
    pair = Pair(session.pair.slicings, wrong.regions, reader.memory.regions)
    with pytest.raises(HandshakeError, match="100"):
        reader.transport.connect(source.transport.describe(), pair, session.to_source.append)
    with pytest.raises(HandshakeError, match="100"):
        source.transport.serve(reader.transport.describe(), pair, session.to_reader.append)
    for broken in (b"", b"\x93\x01\x02\x03"):
        with pytest.raises(HandshakeError, match="cannot be read"):
            reader.transport.connect(broken, session.pair, session.to_source.append)
        with pytest.raises(HandshakeError, match="cannot be read"):
            source.transport.serve(broken, session.pair, session.to_reader.append)


def test_a_pool_outside_of_what_was_registered_is_refused(make) -> None:
    session = make(layout(16), layout(16))
    first, *rest = session.source.memory.regions
    moved = (Region(first.address + (1 << 40), first.block_bytes, first.num_blocks), *rest)
    with pytest.raises(TransferError, match="cannot read memory"):
        session.reader.transport.connect(
            session.source.transport.describe(),
            Pair(session.pair.slicings, moved, session.reader.memory.regions),
            session.to_source.append,
        )
    pull = session.pull(*everything(session.pair, 1))
    assert session.finish(pull) == [PullState.DONE]


def test_gpus_have_limits_of_their_own() -> None:
    assert DEVICE.slot_bytes * DEVICE.slots <= 1 << 30
    assert DEVICE.direct_bytes >= HOST.direct_bytes
    assert dataclasses.asdict(HOST).keys() == dataclasses.asdict(DEVICE).keys()


# --- a source in its own process


def test_a_source_killed_in_the_middle_of_a_packed_pull() -> None:
    target, reader = Target(SMALL, 400, PACKED), Node(SMALL, 400, None, PACKED)
    peer = target.connect(reader)
    maps = [blocks(0, np.arange(1, 400), np.arange(399, 0, -1))]
    pull = reader.transport.pull(peer, maps)
    assert target.finish(pull) is PullState.DONE
    assert pull.close()
    check(target.pair, target.groups, [np.full_like(g, 7) for g in reader.groups], reader.groups, maps)
    target.signal(signal.SIGSTOP)  # so that it certainly dies in the middle
    pull = reader.transport.pull(peer, maps)
    for _ in range(10):
        target.turn()
        time.sleep(0.005)
    assert pull.poll() is PullState.RUNNING
    target.kill()
    peer.close()  # as the inbox does when the session is lost
    assert pull.poll() is PullState.FAILED
    assert pull.error().kind == "peer_lost"
    until(pull.close, 2.0)
    ring = reader.transport._ring.ring

    def free() -> bool:
        reader.transport.progress()
        return ring.num_free == ring.slots

    until(free, 2.0)
    assert not reader.transport._peers
    reader.close()
