"""Prompts that come from several source ranks, and sources that several decode ranks read: whole, or not at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Drained, Failed, Offered
from pd_serve.errors import FailureKind
from pd_serve.kv.layout import KVLayout, LayerGroup, Plane, kv_group
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.lanes import Lanes
from pd_serve.wire.link import Source
from tests.transfer.harness import Clock, DecodeEnd, PrefillEnd, until
from tests.transfer.scripted import Script, copy_lanes

HEADS, LAYERS, BLOCK, DIM = 4, 3, 4, 8
THEIRS, OURS = [5, 2, 9, 4], [1, 2, 3, 4]
TOKENS = 14
LEASE_S = 30.0


def share(rank: int, ranks: int) -> KVLayout:
    count = HEADS // ranks
    return KVLayout(BLOCK, "float32", (kv_group(tuple(range(LAYERS)), count, DIM, None, rank * count, HEADS),))


def latent(rank: int, ranks: int) -> KVLayout:
    return KVLayout(BLOCK, "float32", (LayerGroup((0, 1, 2), (Plane(1, DIM),)),))


Shape = Callable[[int, int], KVLayout]


class Nodes:
    """A prefill node and a decode node, each of some ranks in this process. Every rank has its script."""

    def __init__(
        self,
        sources: int,
        readers: int,
        shape: Shape = share,
        reader_shape: Shape | None = None,
        lease_s: float = LEASE_S,
    ) -> None:
        self.p_clock, self.d_clock = Clock(), Clock()
        self.scripts = [Script() for _ in range(readers)]
        self.p = [
            PrefillEnd(
                shape(rank, sources), 16, seed=rank + 1, lease_s=lease_s, clock=self.p_clock, lanes=copy_lanes,
                me={"epoch": "p", "rank": rank, "ranks": sources, "secret": b"s"},
            )
            for rank in range(sources)
        ]  # fmt: skip
        self.d = [
            DecodeEnd(
                (reader_shape or shape)(rank, readers), 16, clock=self.d_clock, lanes=self.lanes(rank),
                me={"epoch": "d", "rank": rank, "ranks": readers, "secret": b"s"},
            )
            for rank in range(readers)
        ]  # fmt: skip

    def lanes(self, rank: int) -> Callable[[PoolMemory], Lanes]:
        return lambda memory: copy_lanes(memory, copy=self.scripts[rank])

    @property
    def source(self) -> Source:
        return Source("P", "p", tuple(end.source.addresses[0] for end in self.p))

    def expect(self, key: str = "k") -> None:
        for end in self.d:
            end.inbox.expect(key, self.source)

    def publish(self, rank: int, key: str = "k", token: int = 7, blocks: int = len(THEIRS)) -> None:
        done = blocks == len(THEIRS)
        self.p[rank].publish(key, TOKENS if done else blocks * BLOCK, [THEIRS[:blocks]], token=token if done else None)

    def open(self, key: str = "k") -> None:
        for end in self.p:
            end.outbox.open(key)

    def start(self, key: str = "k") -> None:
        """All is announced, and blocks are set aside."""
        self.expect(key)
        self.open(key)
        for rank in range(len(self.p)):
            self.publish(rank, key)
        for end in self.d:
            end.wait(key, Offered)
            end.accept(key, [OURS])

    def arrive(self, key: str = "k") -> list[Arrived]:
        self.start(key)
        return [end.wait(key, Arrived) for end in self.d]

    def fails(self, key: str = "k") -> Failed:
        """The one decode rank's failure; nothing can write its blocks any more."""
        failed = self.d[0].wait(key, Failed)
        self.d[0].wait(key, Drained)
        assert self.d[0].ends(key) == [Failed, Drained]
        return failed

    def look(self) -> None:
        """Both sides look at their clocks."""
        for reader in self.d:
            reader.inbox.cancel("nobody's")
        for source in self.p:
            source.outbox.cancel("nobody's", "")

    def settle(self) -> None:
        """All have done what they were told: else they would still do it when the clock has moved on."""
        for end in (*self.d, *self.p):
            end.worker.ask(lambda: None).result(10)

    def close(self) -> None:
        for end in (*self.d, *self.p):
            end.close()
        for reader in self.d:
            assert reader.worker.internal_errors == 0


@pytest.fixture
def make() -> Iterator[Callable[..., Nodes]]:
    made: list[Nodes] = []

    def nodes(*args: Any, **more: Any) -> Nodes:
        made.append(Nodes(*args, **more))
        return made[-1]

    yield nodes
    for each in made:
        each.close()


Make = Callable[..., Nodes]


def kv(ends: list[Any], table: list[int]) -> np.ndarray:
    """``[block, layer, K|V, head of the model, token, byte]``: what all ranks hold together."""
    parts = []
    for end in ends:
        layers, planes, heads, tokens, _ = end.pool.layout.block_shape(0)
        parts.append(end.pool.groups[0][table].reshape(len(table), layers, planes, heads, tokens, -1))
    return np.concatenate(parts, axis=3)


@pytest.mark.parametrize(("sources", "readers"), [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4), (4, 2), (2, 4)])
def test_every_rank_gets_its_heads_and_every_lease_ends(make: Make, sources: int, readers: int) -> None:
    nodes = make(sources, readers)
    for arrived in nodes.arrive():
        assert arrived.first_token == 7
    assert np.array_equal(kv(nodes.d, OURS), kv(nodes.p, THEIRS))
    for end in nodes.p:
        assert until(lambda end=end: end.why("k")) == "released"  # type: ignore[misc]
        assert end.outbox.counters()["leases_released"] == 1
    sizes = sum(end.inbox.counters()["pull_bytes"] for end in nodes.d)
    assert sizes == kv(nodes.p, THEIRS).nbytes  # each head once


def test_what_all_ranks_hold_is_read_once(make: Make) -> None:
    """MLA: a latent that no rank splits. The other rank's lease is kept and released all the same."""
    nodes = make(2, 1, latent)
    [arrived] = nodes.arrive()
    assert arrived.size_bytes == nodes.p[0].pool.groups[0][THEIRS].nbytes
    assert np.array_equal(nodes.d[0].pool.groups[0][OURS], nodes.p[0].pool.groups[0][THEIRS])
    assert all(until(lambda end=end: end.why("k")) == "released" for end in nodes.p)  # type: ignore[misc]


def test_a_lease_is_kept_until_the_last_reader_has_all(make: Make) -> None:
    nodes = make(1, 2)
    nodes.scripts[1].bytes_per_s = 1e9
    assert nodes.arrive("warm")
    nodes.scripts[1].hangs = True
    nodes.start()
    nodes.d[0].wait("k", Arrived)
    assert nodes.p[0].why("k") is None and nodes.p[0].outbox.num_leases == 1
    nodes.scripts[1].hangs = False
    nodes.look()
    nodes.d[1].wait("k", Arrived)
    assert until(lambda: nodes.p[0].why("k")) == "released"


def test_one_readers_failure_ends_the_lease_and_is_told_to_the_other(make: Make) -> None:
    nodes = make(1, 2)
    assert nodes.arrive("warm")
    nodes.scripts[1].hangs = True
    nodes.scripts[0].hangs = True
    nodes.start()
    nodes.d[1].inbox.cancel("k")
    failed = nodes.d[0].wait("k", Failed)
    assert failed.kind is FailureKind.CANCELLED and "declined" in failed.message
    assert nodes.p[0].why("k") == "declined"
    for script in nodes.scripts:
        script.hangs = False
    nodes.look()
    for end in nodes.d:
        end.wait("k", Drained)


def test_a_rank_that_is_lost_fails_the_prompt_which_drains_whole(make: Make) -> None:
    nodes = make(2, 1)
    assert nodes.arrive("warm")
    nodes.scripts[0].hangs, before = True, nodes.scripts[0].pulls
    nodes.start()
    until(lambda: nodes.scripts[0].pulls == before + 2)
    nodes.p[1].close()
    assert nodes.d[0].wait("k", Failed).kind is FailureKind.PEER_LOST
    nodes.look()
    assert nodes.d[0].find("k", Drained) is None  # pulls may still write
    nodes.scripts[0].hangs = False
    nodes.look()
    nodes.d[0].wait("k", Drained)
    assert nodes.d[0].ends("k") == [Failed, Drained]
    assert until(lambda: nodes.p[0].why("k")) == "declined"  # the rank that lives frees its blocks at once


def test_a_lease_that_has_expired_at_one_rank_is_enough(make: Make) -> None:
    nodes = make(2, 1)
    assert nodes.arrive("warm")
    nodes.scripts[0].hangs = True
    nodes.start()
    nodes.settle()
    nodes.p_clock.now_s += LEASE_S
    nodes.p[1].outbox.cancel("nobody's", "")  # looks at its clock, which the other does not
    assert until(lambda: nodes.p[1].why("k")) == "expired"
    nodes.p_clock.now_s -= LEASE_S
    nodes.d_clock.now_s += LEASE_S / 6
    nodes.d[0].inbox.cancel("nobody's")  # a heartbeat is due
    assert nodes.d[0].wait("k", Failed).kind is FailureKind.EXPIRED
    nodes.scripts[0].hangs = False
    nodes.look()
    nodes.d[0].wait("k", Drained)
    assert nodes.d[0].ends("k") == [Failed, Drained]


def test_a_rank_that_never_announces(make: Make) -> None:
    nodes = make(2, 1, lease_s=3600.0)
    nodes.expect()
    nodes.open()
    nodes.publish(0)
    nodes.d[0].wait("k", Offered)
    nodes.d[0].accept("k", [OURS])
    until(lambda: nodes.p[0].why("k"))  # its part is here and released
    nodes.settle()
    nodes.look()
    assert nodes.d[0].ends("k") == []
    nodes.d_clock.now_s += 31  # its lease is alive at the other rank, which would compute for ever
    nodes.look()
    assert nodes.fails().kind is FailureKind.TIMEOUT


def test_a_rank_that_computes_longer_is_waited_for_before_any_is_done(make: Make) -> None:
    nodes = make(2, 1, lease_s=36_000.0)
    nodes.expect()
    nodes.open()
    nodes.publish(0, blocks=2)
    nodes.d[0].wait("k", Offered)
    nodes.d[0].accept("k", [OURS])
    nodes.settle()
    nodes.d_clock.now_s += 600
    nodes.look()
    for rank in range(2):
        nodes.publish(rank)
    nodes.d[0].wait("k", Arrived)
    assert np.array_equal(kv(nodes.d, OURS), kv(nodes.p, THEIRS))


def test_ranks_that_disagree(make: Make) -> None:
    nodes = make(2, 1)
    nodes.expect()
    nodes.open()
    nodes.publish(0, token=7)
    nodes.publish(1, token=8)
    nodes.d[0].wait("k", Offered)
    nodes.d[0].accept("k", [OURS])
    failed = nodes.fails()
    assert failed.kind is FailureKind.TRANSFER and "different ends" in failed.message


def test_ranks_that_hold_the_same_half(make: Make) -> None:
    nodes = make(2, 1, lambda rank, ranks: share(0, ranks), share)
    nodes.expect()
    failed = nodes.fails()
    assert failed.kind is FailureKind.HANDSHAKE and "KV heads 2, 3 of layer group 0 are on none" in failed.message


def test_ranks_in_another_order(make: Make) -> None:
    nodes = make(2, 1)
    first, second = nodes.source.addresses
    nodes.d[0].inbox.expect("k", Source("P", "p", (second, first)))
    failed = nodes.fails()
    assert failed.kind is FailureKind.PEER_LOST and "rank 0 of 2" in failed.message and "rank 1 of 2" in failed.message


def test_a_rank_connects_anew_and_the_other_stays(make: Make) -> None:
    """Ranks of a node have sessions side by side; a new one ends only the rank's own, or those of an earlier start."""
    nodes = make(1, 2)
    assert nodes.arrive("warm")
    again = DecodeEnd(share(1, 2), 16, lanes=copy_lanes, me={"epoch": "d", "rank": 1, "ranks": 2, "secret": b"s"})
    again.inbox.connect(nodes.source)
    until(lambda: again.inbox.counters()["handshakes"])
    handshakes = nodes.d[0].inbox.counters()["handshakes"]
    nodes.look()
    nodes.d[0].inbox.expect("k", nodes.source)
    again.inbox.expect("k", nodes.source)
    nodes.open()
    nodes.publish(0)
    for end in (nodes.d[0], again):
        end.wait("k", Offered)
        end.accept("k", [OURS])
        end.wait("k", Arrived)
    assert nodes.d[0].inbox.counters()["handshakes"] == handshakes == 1
    again.close()
