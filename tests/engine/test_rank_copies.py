"""Copies of an engine with several ranks: ended when they have at all, whole when they are at all, in any order."""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Iterator

import pytest

from pd_serve.compute import copies
from pd_serve.compute.copies import Ended, HostCopies
from pd_serve.engine.line import Kind
from pd_serve.engine.rank_copies import RankedCopies, obey, tell_by
from pd_serve.errors import PDServeError
from pd_serve.kv.tiers import Copy


class Gated:
    """A mover whose copies wait for their turn. Block 13 cannot be copied."""

    num_slots = (8,)

    def __init__(self) -> None:
        self.turns = threading.Semaphore(0)
        self.moved: list[tuple[str, Copy]] = []
        self.discarded = 0

    def _move(self, way: str, copies: list[Copy]) -> None:
        assert self.turns.acquire(timeout=10)
        self.moved += [(way, copy) for copy in copies]
        if any(copy.block == 13 for copy in copies):
            raise OSError("this one not")

    def load(self, copies: list[Copy]) -> None:
        self._move("load", copies)

    def store(self, copies: list[Copy]) -> None:
        self._move("store", copies)

    def discard(self) -> None:
        self.discarded += 1

    def close(self) -> None:
        pass


class Three:
    """Rank 0's copies of all, and each rank's mover."""

    def __init__(self) -> None:
        self.movers = [Gated() for _ in range(3)]
        pairs = [socket.socketpair(type=socket.SOCK_SEQPACKET) for _ in range(2)]
        self.others = [HostCopies(m, tell_by(theirs)) for m, (_, theirs) in zip(self.movers[1:], pairs, strict=True)]
        self.copies = RankedCopies(HostCopies(self.movers[0]), self._tell, [ours for ours, _ in pairs])

    def _tell(self, kind: Kind, payload: bytes) -> None:
        assert kind is Kind.COPIES
        for other in self.others:
            obey(other, payload)

    def let(self, rank: int) -> None:
        self.movers[rank].turns.release()

    def ended(self, count: int) -> list[Ended]:
        found: list[Ended] = []
        while len(found) < count:
            assert select.select([self.copies.fileno()], [], [], 10)[0]
            found += self.copies.ended()
        return found

    def close(self) -> None:
        for mover in self.movers:
            mover.turns.release(100)
        self.copies.close()
        for other in self.others:
            other.close()


@pytest.fixture
def three() -> Iterator[Three]:
    made = Three()
    yield made
    made.close()


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2)])
def test_a_copy_has_ended_when_it_has_at_all_ranks(three: Three, order: tuple[int, ...]) -> None:
    three.copies.load(1, [Copy(0, 4, 2), Copy(0, 5, 3)])
    for rank in order[:-1]:
        three.let(rank)
        assert select.select([three.copies.fileno()], [], [], 10)[0]  # it has been said, and that is all
        assert three.copies.ended() == []
        assert not select.select([three.copies.fileno()], [], [], 0)[0]
    three.let(order[-1])
    assert [(e.ticket, e.whole) for e in three.ended(1)] == [(1, True)]
    assert [mover.moved for mover in three.movers] == [[("load", Copy(0, 4, 2)), ("load", Copy(0, 5, 3))]] * 3


def test_one_that_fails_somewhere_is_not_whole(three: Three) -> None:
    three.copies.store(1, [Copy(0, 13, 1)])
    three.copies.store(2, [Copy(0, 6, 2)])
    for mover in three.movers:
        mover.turns.release(2)
    assert [(e.ticket, e.whole) for e in three.ended(2)] == [(1, False), (2, True)]


def test_what_is_discarded_is_so_when_nothing_is_on_its_way_anywhere(three: Three) -> None:
    three.copies.store(1, [Copy(0, 6, 2)])
    waiting = threading.Thread(target=three.copies.discard)
    waiting.start()
    three.let(0)
    three.let(2)
    waiting.join(0.2)
    assert waiting.is_alive() and not any(mover.discarded for mover in three.movers)
    three.let(1)
    waiting.join(10)
    assert [mover.discarded for mover in three.movers] == [1, 1, 1]
    assert [(e.ticket, e.whole) for e in three.copies.ended()] == [(1, True)]


@pytest.mark.parametrize("hanging", [0, 1])
def test_a_copy_that_hangs_is_not_waited_for_for_ever(
    three: Three, hanging: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(copies, "DRAIN_S", 0.2)
    three.copies.store(1, [Copy(0, 6, 2)])
    for rank in {0, 1, 2} - {hanging}:
        three.let(rank)
    with pytest.raises(PDServeError, match="has not ended within"):
        three.copies.drain()
    three.let(hanging)
    three.copies.drain()
    assert [(e.ticket, e.whole) for e in three.copies.ended()] == [(1, True)]
