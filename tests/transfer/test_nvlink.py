"""The nvlink transport on memfd memory: two real processes, descriptors over real sockets, real deaths."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from pd_serve.errors import HandshakeError, TransferError
from pd_serve.kv.layout import KVLayout, LayerGroup
from pd_serve.memory.driver import HandleType
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.base import PullState
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.nvlink import NvlinkTransport, messages, sources
from pd_serve.transfer.nvlink import peer as peer_module
from pd_serve.transfer.nvlink import transport as transport_module
from pd_serve.transfer.session.handshake import pair_of as session_pair
from tests.memory.memfd import MemfdDriver
from tests.transfer.namespaces import PID, USER_AND_PID, unshare
from tests.transfer.nvlink_ends import (
    End,
    Link,
    NumpyMover,
    Pool,
    SourceProcess,
    as_kv,
    blocks,
    finished,
    layout,
    open_fds,
    pair_of,
    pull_random_blocks,
    settled,
    until,
)


def link(reader: End, source: End) -> Link:
    pair = pair_of(source.pool.layout, source.pool.regions, reader.pool.layout, reader.pool.regions)
    return Link(reader.transport, source.transport, pair)


@pytest.fixture
def ends(tmp_path: Path) -> Iterator[tuple[End, End]]:
    """``(source, reader)`` in one process; nothing may be left of them."""
    before = open_fds()
    source = End(tmp_path, layout(), 24, seed=3)
    reader = End(tmp_path, layout(), 20)
    yield source, reader
    reader.close()
    source.close()
    assert open_fds() == before
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[SourceProcess, Path]]:
    """A source in its own process, its pool in three segments."""
    directory = tmp_path_factory.mktemp("sockets")
    process = SourceProcess(layout(), 40, directory, cuts=2)
    yield process, directory
    process.close()


# --- reading


@pytest.mark.parametrize("seed", range(3))
def test_random_maps_bring_the_right_bytes_from_another_process(served: tuple[SourceProcess, Path], seed: int) -> None:
    source, directory = served
    before = open_fds()
    end = End(directory, layout(), 30, HostMover())
    peer = source.connect(end.transport, layout(), end.pool.regions)
    source.offer(peer)
    pull_random_blocks(end, source, peer, seed)
    peer.close()
    end.close()
    assert open_fds() == before


class Scattered:
    """A pool as another engine makes it: each of three layers by itself, in the order of ``places``."""

    def __init__(self, directory: Path, num_blocks: int, places: tuple[int, ...], seed: int) -> None:
        self.kv = KVLayout(16, "float32", (LayerGroup((0,), opaque_bytes=3 * 4096),), "another engine")
        self.driver = MemfdDriver()
        pools = [Pool(self.driver, layout(layers=1), 64, seed=seed + i) for i in range(4)]  # only their memory is used
        *self.pools, probe = sorted(pools, key=lambda pool: pool.base)
        low = self.pools[0].base
        region = Region(low, 4096, num_blocks, tuple(self.pools[i].base - low for i in places))
        self.layers = [self.pools[i].bytes[: num_blocks * 4096].reshape(num_blocks, 4096) for i in places]
        self.regions = [region, probe.regions[-1]]
        self.transport = NvlinkTransport(self.driver, HostMover(), directory)
        segments = tuple(segment for pool in (*self.pools, probe) for segment in pool.segments)
        self.transport.register(PoolMemory(0, tuple(self.regions), segments))

    def close(self) -> None:
        self.transport.close()


def test_blocks_of_another_engine_lie_in_several_places(tmp_path: Path) -> None:
    source, reader = Scattered(tmp_path, 20, (2, 0, 1), 7), Scattered(tmp_path, 30, (0, 1, 2), 17)
    pair = session_pair((source.kv, tuple(source.regions)), (reader.kv, tuple(reader.regions)))
    session = Link(reader.transport, source.transport, pair).pump()
    remote, local = [19, 3, 4], [2, 29, 1]
    pull = reader.transport.pull(session.peer, [blocks(0, remote, local)])
    assert finished(pull) is PullState.DONE and pull.close()
    assert pull.size_bytes == 3 * 3 * 4096
    for theirs, ours in zip(source.layers, reader.layers, strict=True):
        assert np.array_equal(ours[local], theirs[remote])
    slicing, ids = pair.slicings[0], (np.array(remote, dtype=np.int64), np.array(local, dtype=np.int64))
    sums = [
        HostMover().checksums(rows)
        for rows in (slicing.source_rows(source.regions[0], ids[0]), slicing.reader_rows(reader.regions[0], ids[1]))
    ]
    until(lambda: all(each.done() for each in sums))
    assert np.array_equal(*(each.result() for each in sums))
    session.close()
    for end in (reader, source):
        end.close()


HETERO = [
    # source and reader: block size, first head, heads
    ((4, 0, 4), (16, 0, 4)),
    ((16, 0, 4), (4, 0, 4)),
    ((4, 0, 2), (4, 0, 4)),  # TP 2 to 1
    ((4, 2, 2), (4, 0, 4)),
    ((4, 0, 4), (4, 2, 2)),  # 1 to 2
    ((16, 1, 1), (4, 0, 2)),  # 4 to 2
]


@pytest.mark.parametrize(("ours", "theirs"), HETERO)
def test_other_block_sizes_and_slices_of_heads(
    tmp_path: Path, ours: tuple[int, int, int], theirs: tuple[int, int, int]
) -> None:
    kv, other = layout(*ours), layout(*theirs)
    source, reader = End(tmp_path, kv, 48 // ours[0], seed=5), End(tmp_path, other, 48 // theirs[0])
    session = link(reader, source).pump()
    step = min(ours[0], theirs[0])
    pieces = 48 // step
    rng = np.random.default_rng(0)
    first, last = max(ours[1], theirs[1]), min(ours[1] + ours[2], theirs[1] + theirs[2])
    for group in range(2):
        remote, local = rng.permutation(pieces)[:9], rng.permutation(pieces)[:9]
        expected = as_kv(reader.pool.group(group), other, group).copy()
        held = as_kv(source.pool.group(group), kv, group)
        for r, t in zip(remote, local, strict=True):
            (rb, rt), (tb, tt) = divmod(int(r) * step, ours[0]), divmod(int(t) * step, theirs[0])
            expected[tb, :, :, first - theirs[1] : last - theirs[1], tt : tt + step] = held[
                rb, :, :, first - ours[1] : last - ours[1], rt : rt + step
            ]
        pull = reader.transport.pull(session.peer, [blocks(group, remote, local)])
        assert finished(pull) is PullState.DONE
        assert np.array_equal(as_kv(reader.pool.group(group), other, group), expected)
        assert pull.num_descriptors >= 9
    session.close()
    reader.close()
    source.close()


def test_all_pulls_of_a_turn_are_one_copy(ends: tuple[End, End]) -> None:
    source, reader = ends
    session = link(reader, source)
    # before the mapping is there, too
    pulls = [reader.transport.pull(session.peer, [blocks(0, [n], [n]), blocks(1, [n], [n])]) for n in range(3)]
    assert all(pull.poll() is PullState.RUNNING for pull in pulls)
    assert reader.transport.progress() < 1
    assert reader.mover.calls == []
    session.pump()
    assert all(finished(pull) is PullState.DONE for pull in pulls)
    assert reader.mover.calls == [6]
    more = [reader.transport.pull(session.peer, [blocks(0, [n], [n])]) for n in range(3, 8)]
    reader.transport.progress()
    assert reader.mover.calls == [6, 5]
    assert all(pull.poll() is PullState.DONE and pull.close() for pull in pulls + more)
    assert np.array_equal(reader.pool.group(0)[:8], source.pool.group(0)[:8])
    session.close()


def test_neighbours_count_as_one_descriptor(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transport_module, "SORTED_FROM_BYTES", 0)  # blocks are small here
    source, reader = ends
    session = link(reader, source).pump()
    remote = np.concatenate([np.arange(9, 4, -1), np.arange(12, 16)])
    pull = reader.transport.pull(session.peer, [blocks(0, remote, remote)])
    assert pull.num_descriptors == 2
    assert finished(pull) is PullState.DONE
    assert np.array_equal(reader.pool.group(0)[remote], source.pool.group(0)[remote])
    nothing = reader.transport.pull(session.peer, [blocks(0, [], [])])
    assert nothing.poll() is PullState.DONE
    assert nothing.close()
    session.close()


def test_blocks_outside_of_the_pools_are_refused(ends: tuple[End, End]) -> None:
    source, reader = ends
    session = link(reader, source).pump()
    for group, remote, local in ((0, [24], [1]), (0, [1], [20]), (0, [-1], [1]), (1, [1], [-1]), (3, [0], [0])):
        with pytest.raises(TransferError, match=r"outside|makes no sense"):
            reader.transport.pull(session.peer, [blocks(group, remote, local)])
    with pytest.raises(TransferError, match="makes no sense"):
        reader.transport.pull(session.peer, [blocks(0, [1, 2], [1])])
    assert reader.mover.calls == []
    session.close()


# --- mapping


def test_sessions_of_one_source_share_its_mapping(ends: tuple[End, End]) -> None:
    source, reader = ends
    first, second = link(reader, source).pump(), link(reader, source).pump()
    for session in (first, second):
        assert finished(reader.transport.pull(session.peer, [blocks(0, [1], [1])])) is PullState.DONE
    assert reader.mapped == 1
    first.close()
    settled(reader.transport)
    assert reader.mapped == 1
    assert finished(reader.transport.pull(second.peer, [blocks(0, [2], [2])])) is PullState.DONE
    second.close()
    settled(reader.transport)
    assert reader.mapped == 0
    with pytest.raises(TransferError, match="ended"):
        reader.transport.pull(second.peer, [blocks(0, [2], [2])])
    again = link(reader, source).pump()
    assert finished(reader.transport.pull(again.peer, [blocks(0, [3], [3])])) is PullState.DONE
    again.close()


def test_a_mapping_stays_while_a_copy_reads_it(ends: tuple[End, End]) -> None:
    source, reader = ends
    reader.mover.hold = True
    session = link(reader, source).pump()
    pull = reader.transport.pull(session.peer, [blocks(0, [5], [6])])
    until(lambda: pull.poll() is PullState.RUNNING and reader.mover.calls)
    late = reader.transport.pull(session.peer, [blocks(0, [7], [7])])
    session.close()
    for _ in range(20):
        assert reader.transport.progress() < 1
        assert not pull.close()
        time.sleep(0.001)
    assert reader.mapped == 1
    assert late.poll() is PullState.FAILED
    assert late.error().kind == "peer_lost"
    assert late.close()
    reader.mover.let_go()
    assert pull.poll() is PullState.DONE
    assert pull.close()
    settled(reader.transport)
    assert reader.mapped == 0
    assert np.array_equal(reader.pool.group(0)[6], source.pool.group(0)[5])


def test_a_transport_closed_while_it_reads_ends_the_copy_first(ends: tuple[End, End]) -> None:
    source, reader = ends
    reader.mover.hold = True
    session = link(reader, source).pump()
    pull = reader.transport.pull(session.peer, [blocks(0, [5], [6])])
    until(lambda: pull.poll() is PullState.RUNNING and reader.mover.calls)
    queued = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
    held, polls = reader.mover.held[0][0], []

    def done() -> bool:
        polls.append(reader.mapped)
        if len(polls) == 3:
            reader.mover.let_go()
        return held.ended

    held.done = done
    reader.transport.close()
    assert set(polls) == {1}, "it was unmapped before the copy had ended"
    assert reader.mapped == 0
    assert pull.poll() is PullState.DONE
    assert queued.poll() is PullState.FAILED
    assert queued.close()
    session.close()


def test_a_source_that_withdraws_is_read_no_more_by_new_readers(ends: tuple[End, End]) -> None:
    source, reader = ends
    session, late = link(reader, source).pump(), link(reader, source)
    assert finished(reader.transport.pull(session.peer, [blocks(0, [1], [1])])) is PullState.DONE
    source.transport.close()
    assert finished(reader.transport.pull(session.peer, [blocks(0, [2], [2])])) is PullState.DONE  # memory lives on
    late.pump()
    with pytest.raises(TransferError, match="withdrawn"):
        reader.transport.pull(late.peer, [blocks(0, [1], [1])])
    session.close()
    late.close()
    settled(reader.transport)
    assert reader.mapped == 0


@pytest.mark.parametrize("call", ["import_fd", "granularity", "reserve", "map"])
@pytest.mark.parametrize("nth", [0, 1])
def test_a_driver_that_fails_half_way_leaves_nothing(tmp_path: Path, call: str, nth: int) -> None:
    before = open_fds()
    source, reader = End(tmp_path, layout(), 24, seed=3, cuts=1), End(tmp_path, layout(), 20)
    counts = (reader.driver.live_handles, reader.driver.live_reservations, reader.driver.live_mappings)
    reader.driver.fail(call, *[""] * nth, "CUDA_ERROR_INVALID_DEVICE")
    session = link(reader, source).pump()
    pull = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
    if nth and call in ("granularity", "reserve"):  # called once
        assert finished(pull) is PullState.DONE
        reader.driver.fail_next.clear()
    else:
        assert finished(pull) is PullState.FAILED
        assert pull.error().kind == "connect"
        assert "CUDA_ERROR_INVALID_DEVICE" in str(pull.error())
        assert pull.close()
        assert (reader.driver.live_handles, reader.driver.live_reservations, reader.driver.live_mappings) == counts
        with pytest.raises(TransferError, match="INVALID_DEVICE"):
            reader.transport.pull(session.peer, [blocks(0, [1], [1])])
        again = link(reader, source).pump()  # beside the one that failed
        assert finished(reader.transport.pull(again.peer, [blocks(0, [1], [1])])) is PullState.DONE
        again.close()
    session.close()
    reader.close()
    source.close()
    assert open_fds() == before


def test_sources_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "MAX_SOURCES", 2)
    reader = End(tmp_path, layout(), 20)
    many = [End(tmp_path, layout(), 8, seed=n) for n in range(3)]
    sessions = [link(reader, source).pump() for source in many]
    with pytest.raises(TransferError, match="2 sources are mapped already"):
        reader.transport.pull(sessions[2].peer, [blocks(0, [1], [1])])
    sessions[0].close()
    settled(reader.transport)
    sessions[2] = link(reader, many[2]).pump()
    assert finished(reader.transport.pull(sessions[2].peer, [blocks(0, [1], [1])])) is PullState.DONE
    assert reader.mapped == 2
    for session in sessions:
        session.close()
    for end in (reader, *many):
        end.close()


# --- deaths


@pytest.mark.parametrize("where", ["in the same PID namespace", "in another"])
def test_a_source_killed_in_the_middle_of_a_pull(tmp_path: Path, where: str) -> None:
    before = open_fds()
    kv = layout(block_size=64, layers=16)  # 512 KiB a block
    under = unshare(PID, USER_AND_PID) if where == "in another" else []
    with closing(SourceProcess(kv, 128, tmp_path, under=under)) as source:
        end = End(tmp_path, kv, 128, HostMover())
        peer = source.connect(end.transport, kv, end.pool.regions)
        source.offer(peer)
        assert finished(end.transport.pull(peer, [blocks(0, [0], [0])])) is PullState.DONE
        pull = end.transport.pull(peer, [blocks(0, np.arange(1, 128), np.arange(1, 128))])
        assert pull.poll() is PullState.RUNNING  # a part is copied
        source.kill()
        assert not Path(f"/proc/{source.pid}").exists()
        peer.close()  # as the inbox does when the connection ends
        assert not pull.close()
        assert end.mapped == 1
        assert finished(pull) is PullState.DONE  # no fault: the lease says that it counts for nothing
        assert pull.close()
        settled(end.transport)
        assert end.mapped == 0
        assert np.array_equal(end.pool.group(0), source.group(0))
        end.close()
    assert open_fds() == before


def test_a_source_killed_before_it_was_mapped(tmp_path: Path) -> None:
    before = open_fds()
    source, end = SourceProcess(layout(), 8, tmp_path), End(tmp_path, layout(), 8)
    counts = (end.driver.live_handles, end.driver.live_reservations)
    peer = source.connect(end.transport, layout(), end.pool.regions)
    assert source.pipe.poll(10)
    source.kill()
    source.offer(peer)
    pull = end.transport.pull(peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert pull.error().kind == "connect"
    assert "gone" in str(pull.error())
    peer.close()
    settled(end.transport)
    assert (end.driver.live_handles, end.driver.live_reservations) == counts
    source.close()
    end.close()
    assert open_fds() == before


def test_a_source_that_does_not_answer(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_module, "OFFER_TIMEOUT_S", 0.05)
    source, reader = ends
    session = link(reader, source)
    pull = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert "did not answer" in str(pull.error())
    session.pump()  # too late
    session.close()
    assert reader.transport.progress() == float("inf")


def test_a_session_that_ends_while_it_is_being_mapped(ends: tuple[End, End]) -> None:
    source, reader = ends
    with reader.transport._opener.lock:  # the mapping waits for it
        session = link(reader, source).pump()
        pull = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
        session.close()
        assert reader.transport.progress() < 1
        assert pull.poll() is PullState.FAILED
    settled(reader.transport)
    assert reader.mapped == 0


# --- what a device reports


def test_a_device_error_fails_the_pulls_of_its_copy(ends: tuple[End, End]) -> None:
    source, reader = ends
    reader.mover.hold = True
    session = link(reader, source).pump()
    pulls = [reader.transport.pull(session.peer, [blocks(0, [n], [n])]) for n in range(2)]
    until(lambda: pulls[0].poll() is PullState.RUNNING and reader.mover.held)
    reader.mover.held[0][0].error = TransferError("transfer", "an illegal address")
    for pull in pulls:
        assert pull.poll() is PullState.FAILED
        assert "illegal address" in str(pull.error())
        assert pull.close()
    session.close()


@pytest.mark.parametrize("error", [TransferError("transfer", "no memory"), ValueError("a fault")])
def test_a_copy_that_does_not_start(ends: tuple[End, End], monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    source, reader = ends

    def refuse(items: object) -> None:
        raise error

    monkeypatch.setattr(reader.mover, "copy", refuse)
    session = link(reader, source).pump()
    pull = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert str(error) in str(pull.error())
    assert reader.driver.synchronized == 1, "a part of it may have been under way"
    assert pull.close()
    session.close()


# --- other ways to hand memory over, and none


def test_fabric_handles_travel_in_the_offer(tmp_path: Path) -> None:
    source = End(tmp_path, layout(), 24, seed=3, cuts=1, handle_type=HandleType.FABRIC)
    reader = End(tmp_path, layout(), 20)
    session = link(reader, source).pump()
    assert finished(reader.transport.pull(session.peer, [blocks(1, [4], [5])])) is PullState.DONE
    assert np.array_equal(reader.pool.group(1)[5], source.pool.group(1)[4])
    assert list(tmp_path.iterdir()) == [], "no socket is needed"
    session.close()
    reader.close()
    source.close()


def test_memory_that_cannot_be_exported_can_read_but_not_be_read(tmp_path: Path) -> None:
    closed, open_ = End(tmp_path, layout(), 20, handle_type=HandleType.NONE), End(tmp_path, layout(), 20, seed=2)
    session = link(closed, open_).pump()
    assert finished(closed.transport.pull(session.peer, [blocks(0, [4], [5])])) is PullState.DONE
    session.close()
    pair = pair_of(layout(), closed.pool.regions, layout(), open_.pool.regions)
    with pytest.raises(TransferError, match="cannot be exported"):
        open_.transport.connect(closed.transport.describe(), pair, lambda _: None)
    with pytest.raises(TransferError, match="cannot be exported"):
        closed.transport.serve(open_.transport.describe(), pair, lambda _: None)
    closed.close()
    open_.close()


def test_host_memory_is_refused(tmp_path: Path) -> None:
    transport = NvlinkTransport(MemfdDriver(), NumpyMover(), tmp_path)
    with pytest.raises(TransferError, match="host's"):
        transport.register(PoolMemory(None, (Region(4096, 4096, 1),)))
    transport.close()


def test_another_machine_is_refused_at_once(ends: tuple[End, End]) -> None:
    source, reader = ends
    pair = pair_of(layout(), source.pool.regions, layout(), reader.pool.regions)
    elsewhere = messages.encode(messages.Description(messages.Kind.POSIX_FD, "another"))
    with pytest.raises(TransferError, match="not on this machine") as caught:
        reader.transport.connect(elsewhere, pair, lambda _: None)
    assert caught.value.kind == "connect"
    with pytest.raises(TransferError, match="not on this machine"):
        source.transport.serve(elsewhere, pair, lambda _: None)
    fabric = messages.encode(messages.Description(messages.Kind.FABRIC, "another"))
    reader.transport.connect(fabric, pair, lambda _: None).close()


def test_layouts_that_do_not_fit_the_pools_are_refused(ends: tuple[End, End]) -> None:
    source, reader = ends
    theirs, ours = source.pool.regions, reader.pool.regions
    smaller = [Region(r.address, r.block_bytes // 2, r.num_blocks) for r in theirs]
    for pair in (
        pair_of(layout(), smaller, layout(), ours),
        pair_of(layout(), theirs, layout(), theirs),
        pair_of(layout(), theirs[:1], layout(), ours),
    ):
        with pytest.raises(HandshakeError):
            reader.transport.connect(source.transport.describe(), pair, lambda _: None)


def test_regions_outside_of_what_was_handed_over_are_refused(ends: tuple[End, End]) -> None:
    source, reader = ends
    moved = [Region(r.address + source.pool.size, r.block_bytes, r.num_blocks) for r in source.pool.regions]
    session = Link(reader.transport, source.transport, pair_of(layout(), moved, layout(), reader.pool.regions)).pump()
    pull = reader.transport.pull(session.peer, [blocks(0, [1], [1])])
    assert finished(pull) is PullState.FAILED
    assert "not in the memory" in str(pull.error())
    settled(reader.transport)
    assert reader.mapped == 0
    session.close()


def test_messages_that_make_no_sense(ends: tuple[End, End]) -> None:
    source, reader = ends
    session = link(reader, source)
    with pytest.raises(HandshakeError):
        reader.transport.connect(b"\x93\x01", session.peer.pair, lambda _: None)  # type: ignore[attr-defined]
    for garbage in (b"", b"\xc1", b"\x81\xa4type\xa5offer"):
        with pytest.raises(TransferError, match="makes no sense"):
            session.peer.receive(garbage)
        with pytest.raises(TransferError, match="makes no sense"):
            session.reader_end.receive(garbage)
    offer = messages.Offer(b"s", messages.Kind.FABRIC, [messages.Range(4096, 4096, bytes(64))])
    with pytest.raises(TransferError, match="not asked for"):
        session.peer.receive(messages.encode(offer))
    session.pump()
    assert finished(reader.transport.pull(session.peer, [blocks(0, [1], [1])])) is PullState.DONE
    session.close()
