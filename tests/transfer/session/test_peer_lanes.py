"""Inbox and outbox over lanes that do what a test says: which one is chosen, what is checked, what fits."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pd_serve.decode.inbox import Arrived, Drained, Failed, Offered
from pd_serve.errors import FailureKind
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.lanes import Lanes
from pd_serve.transfer.movers.base import Rows, Work
from pd_serve.transfer.movers.host import HostMover, HostWork
from pd_serve.transfer.session import probe
from tests.transfer.harness import SMALL, DecodeEnd, PrefillEnd, until
from tests.transfer.scripted import Script, copy_lanes

SLOW = 500e6  # bytes a second
THEIRS = [[5, 4, 3, 20, 21, 22], [9, 30, 31, 32, 8, 7]]
OURS = [[11, 12, 13, 40, 41, 1], [2, 50, 51, 52, 4, 3]]


def using(**scripts: Script) -> Callable[[PoolMemory], Lanes]:
    return lambda memory: copy_lanes(memory, **scripts)


class Ends:
    """Two ends that share the scripts of their lanes; whatever happens, nothing of a lane stays open."""

    def __init__(self, p: KVLayout = SMALL, d: KVLayout = SMALL, **scripts: Script) -> None:
        self.scripts = scripts or {"copy": Script()}
        self.p = PrefillEnd(p, lanes=using(**self.scripts))
        self.d = DecodeEnd(d, lanes=using(**self.scripts))

    def publish(self, key: str = "k", num_tokens: int = 22, theirs: list[list[int]] | None = None) -> None:
        self.d.inbox.expect(key, self.p.source)
        self.p.outbox.open(key)
        self.p.publish(key, num_tokens, theirs or THEIRS, token=5)

    def offered(self, key: str = "k") -> None:
        self.publish(key)
        self.d.wait(key, Offered)

    def arrive(self, key: str = "k") -> Arrived:
        self.offered(key)
        self.d.accept(key, OURS)
        return self.d.wait(key, Arrived)

    def counter(self, name: str) -> float:
        return self.d.inbox.counters()[name]

    def close(self) -> None:
        self.d.close()
        until(lambda: not any(s.open_readers for s in self.scripts.values()))
        self.p.close()
        assert not any(s.open_peers for s in self.scripts.values())
        assert self.p.worker.internal_errors == self.d.worker.internal_errors == 0


@pytest.fixture
def make() -> Iterator[Callable[..., Ends]]:
    made: list[Ends] = []

    def make(*layouts: KVLayout, **scripts: Script) -> Ends:
        made.append(Ends(*layouts, **scripts))
        return made[-1]

    yield make
    for ends in made:
        ends.close()


Make = Callable[..., Ends]


# --- the choice


def test_the_fastest_lane_is_used_and_both_ends_say_so(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    slow, fast, broken = Script(bytes_per_s=SLOW), Script(), Script(corrupts=True)
    ends = make(slow=slow, broken=broken, fast=fast)

    def pulls() -> tuple[int, int]:
        return slow.pulls, broken.pulls

    arrived = ends.arrive()
    assert ends.counter("pull_bytes_fast") == arrived.size_bytes
    assert ends.counter("pull_bytes_slow") == ends.counter("pull_bytes_broken") == 0
    assert ends.counter("lane_chosen_fast") == 1
    assert ends.counter("self_test_bytes_fast") > 0 and ends.counter("self_test_seconds_fast") > 0
    assert ends.counter("self_test_failures") == 1
    before = pulls()
    ends.arrive("again")
    assert pulls() == before
    until(lambda: (slow.open_readers, broken.open_readers, fast.open_readers) == (0, 0, 1))
    assert (slow.open_peers, broken.open_peers, fast.open_peers) == (0, 0, 1)
    for start in ("reads from prefill node P", "decode node D (epoch"):
        [line] = [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]
        assert "over fast (" in line and "GB/s)" in line
        assert "not slow: it is slower (0." in line  # of the 0.5 GB/s that it could
        assert "not broken: what it delivered is not what was there" in line


def test_lanes_of_only_one_end_are_named(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    p = PrefillEnd(lanes=using(a=Script(), b=Script(), x=Script(cannot_start="no card")))
    d = DecodeEnd(lanes=using(b=Script(), c=Script(), x=Script(), y=Script(cannot_start="no driver")))
    d.inbox.connect(p.source)
    [line] = until(lambda: [r.getMessage() for r in caplog.records if r.getMessage().startswith("reads from")])
    assert "over b (" in line
    assert "not c: the prefill node does not use it" in line
    assert "not x: no card" in line
    assert "not y: the decode node cannot use it: no driver" in line
    d.close()
    p.close()


def test_a_lane_that_does_not_connect_is_passed_over(make: Make) -> None:
    ends = make(a=Script(cannot_connect="another machine"), b=Script())
    ends.arrive()
    assert ends.counter("lane_chosen_b") == 1


def test_a_lane_that_hangs_is_passed_over(make: Make) -> None:
    hanging = Script(hangs=True)
    ends = make(a=hanging, b=Script())
    ends.arrive()
    assert ends.counter("lane_chosen_b") == 1
    hanging.hangs = False


def test_when_no_lane_passes_the_pair_does_not_work(make: Make) -> None:
    ends = make(a=Script(forgets=True), b=Script(fails="cable cut"))
    ends.publish()
    failed = ends.d.wait("k", Failed)
    assert failed.kind is FailureKind.CONNECT
    assert "a: what it delivered is not what was there" in failed.message and "b: cable cut" in failed.message
    ends.d.wait("k", Drained)
    assert ends.counter("handshakes") == 0


def test_when_no_lane_connects(make: Make) -> None:
    ends = make(a=Script(cannot_connect="another machine"))
    ends.publish()
    failed = ends.d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE and "another machine" in failed.message


def test_a_slow_lane_is_used_counted_and_complained_about(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    ends = make(a=Script(bytes_per_s=SLOW))
    ends.arrive()
    assert ends.counter("slow_lanes") == 1
    [line] = [r.getMessage() for r in caplog.records if "GB/s, less than 1" in r.getMessage()]
    assert "prefill node P" in line and "pd-serve doctor" in line


def test_without_room_for_a_test_a_lane_is_used_untested(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "SLOTS", 0)  # as if all were taken by pairs whose tests hang
    ends = make(a=Script())
    monkeypatch.undo()
    ends.arrive()
    assert ends.counter("slow_lanes") == 1


def test_lanes_talk_to_each_other(make: Make) -> None:
    script = Script()
    make(a=script).arrive()
    until(lambda: len(script.heard) == 2)
    assert script.heard == [b"served", b"you said hello"]


def test_a_lane_in_use_that_makes_no_sense_ends_the_session(make: Make) -> None:
    script = Script()
    ends = make(a=script)
    ends.arrive()
    ends.offered("k2")
    script.rejects_messages = True
    [session] = ends.p.outbox._door.sessions.values()
    ends.p.worker.call(session._readers["a"].send, b"nonsense")  # type: ignore[attr-defined]
    failed = ends.d.wait("k2", Failed)
    assert failed.kind is FailureKind.TRANSFER and "it makes no sense" in failed.message
    assert until(lambda: ends.p.why("k2")) == "peer_lost"
    script.rejects_messages = False
    ends.arrive("k3")  # over a new session


def test_a_lane_under_test_that_makes_no_sense_fails_its_test_only(make: Make) -> None:
    ends = make(a=Script(rejects_messages=True, cannot_pull="broken"), b=Script())
    ends.arrive()
    assert ends.counter("lane_chosen_b") == 1


# --- secrets


def test_the_same_secret() -> None:
    p = PrefillEnd(me={"secret": b"s3cret"}, lanes=copy_lanes)
    d = DecodeEnd(me={"secret": b"s3cret"}, lanes=copy_lanes)
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 22, THEIRS, token=5)
    d.wait("k", Offered)
    d.accept("k", OURS)
    assert d.wait("k", Arrived).first_token == 5
    assert until(lambda: p.why("k")) == "released"
    for counters in (p.outbox.counters(), d.inbox.counters()):
        assert counters["forged_frames"] == counters["garbage_frames"] == 0
    d.close()
    p.close()


@pytest.mark.parametrize(("theirs", "ours"), [(b"a", b"b"), (b"a", b""), (b"", b"b")])
def test_different_secrets_are_said_on_both_ends(theirs: bytes, ours: bytes, caplog: pytest.LogCaptureFixture) -> None:
    p = PrefillEnd(me={"secret": theirs}, lanes=copy_lanes)
    d = DecodeEnd(me={"secret": ours}, lanes=copy_lanes)
    for key in ("k", "k2"):
        d.inbox.expect(key, p.source)
        failed = d.wait(key, Failed)
        assert failed.kind is FailureKind.HANDSHAKE and "--secret-file" in failed.message
    until(lambda: p.outbox.counters()["handshakes_unproved"])
    assert p.outbox.counters()["handshakes"] == 0
    assert "--secret-file" in d.inbox.misfits()["P"]
    assert len([r for r in caplog.records if "a decode node left" in r.getMessage()]) == 1
    assert len([r for r in caplog.records if "--secret-file" in r.getMessage()]) >= 1
    d.close()
    p.close()


# --- checksums


def test_memory_that_was_reused_is_never_taken_for_good(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """The prefill node's bug or a stale mapping: a block changes between its announcement and the read."""
    ends = make()
    ends.offered()
    ends.p.pool.groups[1][THEIRS[1][3], 17] ^= 1
    ends.d.accept("k", OURS)
    failed = ends.d.wait("k", Failed)
    assert failed.kind is FailureKind.CHECKSUM and "1 of 6 pieces" in failed.message
    ends.d.wait("k", Drained)
    assert ends.d.ends("k") == [Failed, Drained]
    assert ends.counter("pull_failures_checksum") == 1
    assert any("not what the prefill node announced" in r.getMessage() for r in caplog.records)
    ends.arrive("k2")  # the pair still works


def test_a_lane_that_goes_bad_is_found_out(make: Make) -> None:
    script = Script()
    ends = make(a=script)
    ends.offered()
    script.corrupts = True
    ends.d.accept("k", OURS)
    assert ends.d.wait("k", Failed).kind is FailureKind.CHECKSUM


def test_bytes_that_never_came_are_found_out(make: Make) -> None:
    script = Script()
    ends = make(a=script)
    ends.offered()
    script.forgets = True
    ends.d.accept("k", OURS)
    assert ends.d.wait("k", Failed).kind is FailureKind.CHECKSUM


def test_what_the_mover_brings_is_summed_behind_it(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sums are under way before the bytes are here."""
    behind: list[bool] = []
    checksums = HostMover.checksums

    def watched(mover: HostMover, rows: Rows, after: Work | None = None) -> HostWork:
        behind.append(after is not None)
        return checksums(mover, rows, after)

    monkeypatch.setattr(HostMover, "checksums", watched)
    script = Script()
    ends = make(a=script)
    script.by_mover = True
    arrived = ends.arrive()
    assert any(behind)
    assert ends.counter("checksum_bytes") == arrived.size_bytes, "each byte is summed once"
    for group in ends.d.pool.groups:
        group[:] = 0
    ends.offered("k2")
    script.forgets = True
    ends.d.accept("k2", OURS)
    assert ends.d.wait("k2", Failed).kind is FailureKind.CHECKSUM
    ends.d.wait("k2", Drained)


@pytest.mark.parametrize(("theirs", "ours"), [(False, True), (True, False), (False, False)])
def test_checksums_can_be_switched_off(theirs: bool, ours: bool) -> None:
    script = Script()
    p = PrefillEnd(me={"checksums": theirs}, lanes=using(a=script))
    d = DecodeEnd(me={"checksums": ours}, lanes=using(a=script))
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 22, THEIRS, token=5)
    d.wait("k", Offered)
    script.corrupts = True
    d.accept("k", OURS)
    d.wait("k", Arrived)
    assert d.inbox.counters()["checksum_bytes"] == p.outbox.counters()["checksum_bytes"] == 0
    d.close()
    p.close()


def test_what_was_summed_is_counted_on_both_ends(make: Make) -> None:
    ends = make()
    arrived = ends.arrive()
    assert ends.counter("checksum_bytes") == ends.p.outbox.counters()["checksum_bytes"] == arrived.size_bytes


# --- pools that differ


def tokens_of(layout: KVLayout, blocks: np.ndarray, group: int, table: list[int], num_tokens: int) -> np.ndarray:
    """``[token][layer, K|V, head][dim]`` of a prompt."""
    layers, _, heads, size, dim = layout.block_shape(group)
    kv = blocks[table].view("<u4").reshape(len(table), layers * 2 * heads, size, dim)
    return kv.transpose(0, 2, 1, 3).reshape(len(table) * size, layers * 2 * heads, dim)[:num_tokens].copy()


@pytest.mark.parametrize(("theirs", "ours"), [(4, 16), (16, 4), (2, 8), (8, 4)])
@pytest.mark.parametrize("cached", [0, 1])
def test_blocks_of_different_sizes(make: Make, theirs: int, ours: int, cached: int) -> None:
    num_tokens = 43
    p_layout, d_layout = (dataclasses.replace(SMALL, block_size=n) for n in (theirs, ours))
    ends = make(p_layout, d_layout)
    rng = np.random.default_rng(theirs)
    p_tables = [rng.permutation(np.arange(1, 64))[: p_layout.blocks_for(num_tokens)].tolist() for _ in range(2)]
    d_tables = [rng.permutation(np.arange(1, 64))[: d_layout.blocks_for(num_tokens)].tolist() for _ in range(2)]
    first = [cached, max(cached, d_layout.first_live_block(1, num_tokens))]
    d_tables[1][: first[1]] = [0] * first[1]
    ends.d.inbox.expect("k", ends.p.source)
    ends.p.outbox.open("k")
    whole = 21 // theirs
    live = p_layout.first_live_block(1, num_tokens)
    ends.p.publish("k", 21, [p_tables[0][:whole], []])
    ends.d.wait("k", Offered)
    ends.d.accept("k", d_tables, first)
    blocks = [(0, whole, p_tables[0][whole:]), (1, live, p_tables[1][live:])]
    ends.p.publish_blocks("k", num_tokens, blocks, token=5)
    arrived = ends.d.wait("k", Arrived)
    for group in range(2):
        window = SMALL.groups[group].window
        begin = max(first[group] * ours, 0 if window is None else num_tokens - window + 1)
        if arrived.whole_from[group] <= first[group]:
            begin = first[group] * ours
        there = tokens_of(p_layout, ends.p.pool.groups[group], group, p_tables[group], num_tokens)
        here = tokens_of(d_layout, ends.d.pool.groups[group], group, d_tables[group], num_tokens)
        assert np.array_equal(here[begin:], there[begin:])
        assert np.all(here.view(np.uint8)[: first[group] * ours] == 7)  # what is cached here is not touched
    assert arrived.whole_from[0] == 0


def heads(first: int, count: int, total: int = 4) -> KVLayout:
    return KVLayout(4, "float32", (kv_group((0, 1, 2), count, 8, None, first, total),))


def test_a_rank_with_a_share_of_the_heads_reads_its_share(make: Make) -> None:
    p_layout, d_layout = heads(0, 4), heads(2, 2)
    ends = make(p_layout, d_layout)
    ends.publish(theirs=[THEIRS[0]])
    ends.d.wait("k", Offered)
    ends.d.accept("k", [OURS[0]])
    ends.d.wait("k", Arrived)
    there = ends.p.pool.groups[0][THEIRS[0]].reshape(6, 3, 2, 4, -1)[:, :, :, 2:]
    here = ends.d.pool.groups[0][OURS[0]].reshape(6, 3, 2, 2, -1)
    assert np.array_equal(here, there)


def test_a_rank_that_needs_more_heads_than_the_source_has_is_refused(make: Make) -> None:
    ends = make(heads(0, 2), heads(0, 4))
    ends.publish(theirs=[THEIRS[0]])
    failed = ends.d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE
    assert "0..1 of 0..3" in failed.message and "reads from 1 of its node's ranks" in failed.message
