"""Small packed pulls that travel in one chunk: with real NIXL, right bytes for each, and ends that only concern one."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.transfer.base import BlockMap, PullState
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.nixl import messages
from pd_serve.transfer.nixl.peer import NixlPull
from tests.transfer.harness import Clock, until
from tests.transfer.nixl_ends import PACKED, Node, Session, blocks, check

# one piece of each of its two groups is 3 KiB; a chunk of 64 KiB holds what twenty pulls of a block want
LAYOUT = KVLayout(16, "float16", (kv_group((0, 2), 1, 16), kv_group((1,), 1, 16, 40)))
ROOMY = dataclasses.replace(PACKED, first_chunk_bytes=64 << 10)
COUNT = 40


class Held:
    """Work that is done when the test says so."""

    def __init__(self, mover: HoldingMover, work: object) -> None:
        self._mover, self._work = mover, work

    def done(self) -> bool:
        return not self._mover.holds and self._work.done()  # type: ignore[attr-defined]


class HoldingMover(HostMover):
    holds = False

    def copy(self, items):  # type: ignore[no-untyped-def]
        return Held(self, super().copy(items)) if self.holds else super().copy(items)


class Ends(Session):
    """With clocks and movers in the test's hands."""

    def __init__(self) -> None:
        self.clock, self.mover = Clock(), HoldingMover()
        super().__init__(
            Node(LAYOUT, COUNT, 3, ROOMY, clock=self.clock), Node(LAYOUT, COUNT, None, ROOMY, mover=self.mover)
        )
        self.finish(self.pull(blocks(0, [1], [39])))  # the rings are open
        self.before = [group.copy() for group in self.reader.groups]

    def one_block_each(self, count: int) -> tuple[list[NixlPull], list[list[BlockMap]]]:
        """Pulls of a block of both groups, to places of their own."""
        places = np.random.default_rng(count).permutation(COUNT - 1)
        maps = [[blocks(g, [7 * n % COUNT], [place]) for g in (0, 1)] for n, place in enumerate(places[:count])]
        return [self.pull(*two) for two in maps], maps

    def asked(self) -> list[int]:
        """Blocks of each chunk that the reader has asked for and the source has not seen yet."""
        said = [item for message in self.to_source for item in messages.decode_to_source(message)]
        packs = [item for item in said if isinstance(item, messages.Pack)]
        assert all(len(pack.parts) == 2 for pack in packs), "a part a group"
        return [len(pack.parts[0].pieces) // 4 for pack in packs]

    def source_hears(self) -> None:
        while self.to_source:
            self.served.receive(self.to_source.popleft())

    def reader_hears(self) -> None:
        while self.to_reader:
            self.peer.receive(self.to_reader.popleft())

    def six_share(self) -> tuple[list[NixlPull], list[list[BlockMap]]]:
        """Eight pulls, of which six have asked for a chunk together; the first two are being unpacked, or done."""
        pulls, maps = self.one_block_each(8)
        self.source_hears()
        self.reader_hears()
        assert self.asked() == [6]
        return pulls, maps

    def check(self, maps: list[list[BlockMap]]) -> None:
        check(self.pair, self.source.groups, self.before, self.reader.groups, [one for two in maps for one in two])

    def is_free(self) -> bool:
        self.turn()
        rings = self.source.transport._packer.ring, self.reader.transport._ring._ring
        return not self.served.jobs and all(ring is not None and ring.num_free == ring.slots for ring in rings)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.mover.holds = False
    made.close()
    made.reader.close()
    made.source.close()


def test_pulls_that_wait_share_a_chunk(ends: Ends) -> None:
    pulls, maps = ends.one_block_each(12)
    assert ends.asked() == [1, 1], "two at once, so that the link need not wait; the others gather"
    ends.source_hears()
    ends.reader_hears()
    assert ends.asked() == [10]
    assert ends.finish(*pulls) == [PullState.DONE] * 12
    ends.check(maps)
    assert all(pull.close() for pull in pulls)
    until(ends.is_free)


def test_many_pulls_are_asked_after_at_once(ends: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    """NIXL is asked for a status once a turn, not once a pull and chunk: that took longer than the reads."""
    agent = ends.reader.transport._agent
    busy, post, asked = agent.nixl.NIXL_IN_PROG, agent.post, []
    with monkeypatch.context() as patch:
        patch.setattr(agent, "post", lambda handle: (post(handle), busy)[1])
        patch.setattr(agent, "status", lambda handle: (asked.append(handle), busy)[1])
        pulls, maps = ends.one_block_each(12)
        until(lambda: (ends.turn(), len(ends.peer.unpacker._active) == ROOMY.slots_per_peer)[1])
        asked.clear()
        ends.reader.transport.progress()
        assert {pull.poll() for pull in pulls} == {PullState.RUNNING}
        assert len(asked) == 1
    assert ends.finish(*pulls) == [PullState.DONE] * 12
    ends.check(maps)


@pytest.mark.parametrize("when", ["asked", "read", "unpacked"])
def test_one_of_them_is_given_up(ends: Ends, when: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pulls, maps = ends.six_share()
    agent = ends.reader.transport._agent
    busy, post = agent.nixl.NIXL_IN_PROG, agent.post
    with monkeypatch.context() as patch:
        if when == "read":
            patch.setattr(agent, "post", lambda handle: (post(handle), busy)[1])
            patch.setattr(agent, "status", lambda handle: busy)
        ends.mover.holds = when == "unpacked"
        if when != "asked":
            ends.source_hears()
            ends.reader_hears()
        [shared] = pulls[4]._packed.chunks
        if when == "unpacked":
            until(lambda: (ends.turn(), shared.work is not None)[1])
        assert (shared.read is not None, shared.work is not None) == (when == "read", when == "unpacked")
        assert pulls[4].close() == (when != "unpacked"), "True: nothing writes to its blocks any more"
    ends.mover.holds = False
    others = pulls[:4] + pulls[5:]
    assert ends.finish(*others) == [PullState.DONE] * 7
    until(pulls[4].close)
    assert pulls[4].poll() is PullState.FAILED and pulls[4].error().kind == "cancelled"
    ends.check(maps if when == "unpacked" else maps[:4] + maps[5:])
    assert all(pull.close() for pull in others)
    until(ends.is_free)


def test_all_of_them_are_given_up(ends: Ends) -> None:
    pulls, _ = ends.six_share()
    for pull in pulls:
        until(pull.close)
    until(ends.is_free)
    ends.before = [group.copy() for group in ends.reader.groups]
    again, maps = ends.one_block_each(5)
    assert ends.finish(*again) == [PullState.DONE] * 5
    ends.check(maps)


def test_a_slot_taken_back_fails_all_that_were_in_it(ends: Ends) -> None:
    pulls, _ = ends.six_share()
    ends.source_hears()
    assert len(ends.served.jobs) == 1, "only the six's"
    ends.clock.now_s += ROOMY.reclaim_s + 1
    ends.source.transport.progress()
    assert ends.finish(*pulls) == [PullState.DONE] * 2 + [PullState.FAILED] * 6
    assert all("used the staging slot again" in str(pull.error()) for pull in pulls[2:])
    for pull in pulls:
        until(pull.close)
    until(ends.is_free)


def test_a_source_that_cannot_pack_fails_all_that_asked_together(ends: Ends) -> None:
    pulls, _ = ends.six_share()
    [pack] = [
        item for message in ends.to_source for item in messages.decode_to_source(message) if hasattr(item, "parts")
    ]
    ends.to_source.clear()
    ends.peer.receive(messages.encode([messages.NotPacked(pack.ticket, "the device is on fire")]))
    assert [pull.poll() for pull in pulls[2:]] == [PullState.FAILED] * 6
    assert all("on fire" in str(pull.error()) and pull.close() for pull in pulls[2:])


def test_a_long_pull_and_short_ones_travel_together(ends: Ends) -> None:
    """Short ones that come later do not wait for all of a long one."""
    where = np.random.default_rng(1).integers(0, COUNT, 400)
    long = [blocks(group, where % COUNT, where % 20) for group in (0, 1)]
    first = ends.pull(*long)
    pulls = [ends.pull(blocks(0, [5], [30 + n])) for n in range(5)]
    while first.poll() is PullState.RUNNING and any(pull.poll() is PullState.RUNNING for pull in pulls):
        ends.turn()
    assert first.poll() is PullState.RUNNING, "the long one ended first"
    assert ends.finish(first, *pulls) == [PullState.DONE] * 6
    assert all((ends.reader.groups[0][30 + n] == ends.source.groups[0][5]).all() for n in range(5))


class Muddle:
    """Pulls that begin, end and are given up while messages, copies and reads get on in any order."""

    def __init__(self, ends: Ends, seed: int) -> None:
        self.ends = ends
        self.random = np.random.default_rng(seed)
        self.free = list(range(COUNT))
        self.running: list[tuple[NixlPull, list[BlockMap]]] = []
        self.leaving: list[tuple[NixlPull, list[BlockMap]]] = []
        self.left: list[tuple[BlockMap, np.ndarray]] = []  # places of pulls given up, and what was there at their end

    def step(self) -> None:
        ends = self.ends
        match self.random.integers(7):
            case 0 if ends.to_source:
                ends.served.receive(ends.to_source.popleft())
            case 1 if ends.to_reader:
                ends.peer.receive(ends.to_reader.popleft())
            case 2:
                ends.source.transport.progress()
            case 3:
                ends.reader.transport.progress()
            case 4 if self.free:
                self.begin()
            case 5 if self.running and self.random.random() < 0.25:
                self.leaving.append(self.running.pop(int(self.random.integers(len(self.running)))))
            case 6:
                ends.mover.holds = bool(self.random.integers(2))
        self.look()

    def begin(self) -> None:
        count = int(self.random.integers(1, min(6, len(self.free)) + 1))
        places = [self.free.pop(int(self.random.integers(len(self.free)))) for _ in range(count)]
        theirs = self.random.integers(0, COUNT, count)
        groups = (0, 1) if self.random.random() < 0.7 else (int(self.random.integers(2)),)
        maps = [blocks(group, theirs, places) for group in groups]
        self.running.append((self.ends.pull(*maps), maps))

    def look(self) -> None:
        source, reader = self.ends.source.groups, self.ends.reader.groups
        for pull, maps in list(self.running):
            if pull.poll() is PullState.DONE:
                assert all((reader[m.group][m.local] == source[m.group][m.remote]).all() for m in maps)
                assert pull.close()
                self.running.remove((pull, maps))
                self.free += maps[0].local.tolist()
            else:
                assert pull.poll() is PullState.RUNNING
        for pull, maps in list(self.leaving):
            if pull.close():
                self.leaving.remove((pull, maps))
                self.left += [(m, reader[m.group][m.local].copy()) for m in maps]

    def end(self) -> None:
        self.ends.mover.holds = False

        def all_have_ended() -> bool:
            self.ends.turn()
            self.look()
            return not self.running and not self.leaving

        until(all_have_ended)
        for m, then in self.left:
            assert np.array_equal(self.ends.reader.groups[m.group][m.local], then), "written after it was given up"


def test_any_order_of_events(ends: Ends) -> None:
    given_up = 0
    for seed in range(60):
        muddle = Muddle(ends, seed)
        for _ in range(400):
            muddle.step()
        muddle.end()
        until(ends.is_free)
        given_up += len(muddle.left)
    assert given_up > 60
    unpacker = ends.peer.unpacker
    assert not unpacker._asked and not unpacker._freeing and unpacker._tickets_out == 0
