"""The ends of all ranks as one: rank 0's main thread asks and hears as if there were a single outbox, a single inbox.

Rank 0's ends are beside those of the other ranks here, which are reached as from another process: by bytes.
"""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Drained, Event, Failed, Offered
from pd_serve.decode.ranks import RankedInbox, RemoteInbox
from pd_serve.errors import FailureKind, TransferError
from pd_serve.prefill.outbox import LeaseEnded
from pd_serve.prefill.ranks import RankedOutbox, RemoteOutbox
from pd_serve.transfer.relay import End, RankedThread, Relays, RelayServer
from pd_serve.transfer.worker import TransferWorker
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks
from tests.decode.test_ranks import BLOCK, OURS, THEIRS, TOKENS, Nodes, kv
from tests.transfer.harness import until

T = TypeVar("T")


@dataclass
class RankEnds:
    worker: TransferWorker
    remote: dict[str, End]


class Side:
    """Rank 0 of a node and the relays of the others."""

    def __init__(self, ends: list[RankEnds]) -> None:
        pairs = [socket.socketpair() for _ in ends[1:]]
        self.servers = [RelayServer(there, self._opened(end)) for (_, there), end in zip(pairs, ends[1:], strict=True)]
        self._sockets = [sock for pair in pairs for sock in pair]
        relays = [(server.told, here) for (here, _), server in zip(pairs, self.servers, strict=True)]
        self.relays = Relays(relays)
        self.thread = RankedThread(ends[0].worker, self.relays)
        self.relays.open("e", 10.0)
        for _ in range(2):  # as an engine does
            self.thread.wait_ready(10.0)

    @staticmethod
    def _opened(end: RankEnds) -> Callable[[str], RankEnds]:
        return lambda epoch: end

    def gone(self) -> None:
        """The last rank's process ends."""
        self._sockets[-1].shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        for server in self.servers:
            server.close()
        for sock in self._sockets:
            sock.close()


class Ranked:
    """A prefill node and a decode node of some ranks each."""

    def __init__(self, sources: int, readers: int, **more: Any) -> None:
        self.nodes = nodes = Nodes(sources, readers, **more)
        self.source = Side([RankEnds(end.worker, {"outbox": RemoteOutbox(end.outbox)}) for end in nodes.p])
        self.reader = Side([RankEnds(end.worker, {"inbox": RemoteInbox(end.inbox)}) for end in nodes.d])
        self.outbox = RankedOutbox(nodes.p[0].outbox, self.source.relays)
        self.inbox = RankedInbox(nodes.d[0].inbox, self.reader.relays)
        self.addresses = self.outbox.listen(10.0)
        self.events: list[Event] = []
        self.ended: list[LeaseEnded] = []

    def expect(self, key: str = "k") -> None:
        self.inbox.expect(key, Source("P", "p", self.addresses))

    def publish(self, key: str = "k") -> None:
        self.outbox.open(key)
        half = [Blocks(0, 0, np.array(THEIRS[:2], "<i4").tobytes())]
        rest = [Blocks(0, 2, np.array(THEIRS[2:], "<i4").tobytes())]
        self.outbox.publish(key, 2 * BLOCK, half, None)
        self.outbox.publish(key, TOKENS, rest, 7)

    def accept(self, key: str = "k") -> None:
        self.heard(key, Offered)
        self.inbox.accept(key, [np.array(OURS, np.int32)], [0])

    def start(self, key: str = "k") -> None:
        self.expect(key)
        self.publish(key)
        self.accept(key)

    def look(self) -> None:
        self.nodes.look()
        self.events += self.inbox.events()
        self.ended += self.outbox.events()

    def heard(self, key: str, kind: type[T]) -> T:
        def find() -> T | None:
            self.look()
            return next((e for e in self.events if e.key == key and isinstance(e, kind)), None)

        return until(find)

    def why(self, key: str) -> str:
        def find() -> str | None:
            self.look()
            return next((ended.why for ended in self.ended if ended.key == key), None)

        return until(find)

    def ends(self, key: str) -> list[type]:
        return [type(e) for e in self.events if e.key == key and not isinstance(e, Offered)]

    def nothing_is_left(self) -> None:
        self.look()
        assert self.outbox.num_leases == 0
        assert until(lambda: [end.outbox.num_leases for end in self.nodes.p] == [0] * len(self.nodes.p))
        assert len({ended.key for ended in self.ended}) == len(self.ended)

    def close(self) -> None:
        for side in (self.reader, self.source):
            side.close()
        self.nodes.close()


@pytest.fixture
def make() -> Iterator[Callable[..., Ranked]]:
    made: list[Ranked] = []

    def ranked(*args: Any, **more: Any) -> Ranked:
        made.append(Ranked(*args, **more))
        return made[-1]

    yield ranked
    for each in made:
        each.close()


Make = Callable[..., Ranked]


@pytest.mark.parametrize(("sources", "readers"), [(2, 2), (2, 1), (1, 2), (4, 2)])
def test_all_heads_arrive_and_one_lease_ends(make: Make, sources: int, readers: int) -> None:
    ranked = make(sources, readers)
    ranked.start()
    arrived = ranked.heard("k", Arrived)
    nodes = ranked.nodes
    assert arrived.first_token == 7
    assert arrived.size_bytes == kv(nodes.p, THEIRS).nbytes
    assert np.array_equal(kv(nodes.d, OURS), kv(nodes.p, THEIRS))
    assert ranked.why("k") == "released"
    assert ranked.ends("k") == [Arrived]
    ranked.nothing_is_left()


def test_counters_of_all_ranks(make: Make) -> None:
    ranked = make(2, 2)
    ranked.start()
    size = ranked.heard("k", Arrived).size_bytes
    assert ranked.why("k") == "released"

    def counted() -> bool:
        ranked.look()
        return ranked.inbox.counters()["pull_bytes"] == size and ranked.outbox.counters()["leases_released"] == 2

    assert until(counted)
    assert ranked.inbox.counters()["slow_pulls"] == 0.0
    assert ranked.reader.thread.internal_errors == 0
    assert ranked.reader.thread.transport


def test_a_failure_at_one_rank_fails_all_of_it(make: Make) -> None:
    ranked = make(2, 2)
    ranked.start("warm")
    ranked.heard("warm", Arrived)
    script = ranked.nodes.scripts[0]
    script.hangs, before = True, script.pulls
    ranked.start()
    until(lambda: ranked.look() or ranked.nodes.d[1].inbox.counters()["pulls"] >= 2)  # rank 1 has its part
    until(lambda: ranked.look() or script.pulls > before)  # rank 0 has begun
    ranked.nodes.p[0].worker.close()  # of rank 0 the source is lost
    assert ranked.heard("k", Failed).kind is FailureKind.PEER_LOST
    ranked.look()
    assert ranked.ends("k") == [Failed]  # a transfer may still write
    ranked.nodes.scripts[0].hangs = False
    ranked.heard("k", Drained)
    assert ranked.ends("k") == [Failed, Drained]


def test_a_prompt_that_ends_at_its_source(make: Make) -> None:
    ranked = make(2, 2)
    ranked.expect()
    ranked.outbox.open("k")
    ranked.outbox.publish("k", 2 * BLOCK, [Blocks(0, 0, np.array(THEIRS[:2], "<i4").tobytes())], None)
    ranked.accept()
    ranked.outbox.cancel("k", "aborted")
    assert ranked.heard("k", Failed).kind is FailureKind.CANCELLED
    ranked.heard("k", Drained)
    assert ranked.ends("k") == [Failed, Drained]
    ranked.nothing_is_left()
    assert not ranked.ended  # it was ours to end


def test_a_prompt_that_is_not_wanted_any_more(make: Make) -> None:
    ranked = make(2, 2)
    ranked.expect()
    ranked.publish()
    ranked.heard("k", Offered)
    ranked.inbox.cancel("k")
    ranked.heard("k", Drained)
    assert ranked.ends("k") == [Drained]
    assert ranked.why("k") == "declined"
    ranked.nothing_is_left()


def test_not_wanted_when_one_rank_has_all_and_the_other_has_not(make: Make) -> None:
    ranked = make(2, 2)
    ranked.start("warm")
    ranked.heard("warm", Arrived)
    ranked.nodes.scripts[1].hangs = True
    ranked.start()
    until(lambda: ranked.look() or ranked.nodes.p[0].outbox.counters()["leases_released"] == 2)
    ranked.inbox.cancel("k")
    until(lambda: "k" not in ranked.nodes.d[1].inbox._keys)  # the other one has heard of it
    ranked.look()
    assert ranked.ends("k") == []
    ranked.nodes.scripts[1].hangs = False
    ranked.heard("k", Drained)
    assert ranked.ends("k") == [Drained]
    assert ranked.why("k") == "declined"
    ranked.nothing_is_left()


def test_a_lease_that_ends_at_one_rank_ends_at_all(make: Make) -> None:
    ranked = make(2, 1, lease_s=30.0)
    ranked.outbox.open("k")
    assert until(lambda: [end.outbox.num_leases for end in ranked.nodes.p] == [1, 1])
    ranked.nodes.p_clock.now_s += 31
    ranked.nodes.p[1].outbox.cancel("nobody's", "")  # looks at its clock
    assert ranked.why("k") == "expired"
    ranked.nothing_is_left()


def test_a_rank_that_is_gone(make: Make) -> None:
    ranked = make(1, 2)
    ranked.start()
    ranked.heard("k", Arrived)
    ranked.reader.gone()
    with pytest.raises(TransferError, match="rank 1 has ended"):
        until(ranked.inbox.events)
    assert not ranked.reader.thread.close()


def test_a_rank_that_cannot_be_asked_any_more() -> None:
    def send(payload: bytes) -> None:
        raise ConnectionResetError

    here, there = socket.socketpair()
    with there:
        relays = Relays([(send, here)])
        with pytest.raises(TransferError, match="rank 1 has ended"):
            relays.ask("outbox", None)
        assert not relays.close()
    here.close()


def test_a_rank_whose_transfers_have_given_up(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ranked = make(2, 1)
    monkeypatch.setattr(ranked.nodes.p[1].worker, "_failure", "every turn fails")
    ranked.nodes.p[1].outbox.gave_up()
    with pytest.raises(TransferError, match="rank 1: every turn fails"):
        until(ranked.outbox.events)


def test_threads_end_together_and_say_whether_the_pool_is_free(make: Make) -> None:
    ranked = make(2, 2)
    ranked.start()
    ranked.heard("k", Arrived)
    assert ranked.reader.thread.close()
    assert ranked.source.thread.close()
