"""Inbox and outbox together, each with its own thread and NIXL agent, in one process."""

from __future__ import annotations

import dataclasses
import select
from collections.abc import Iterator

import numpy as np
import pytest

from pd_serve.decode import inbox
from pd_serve.decode.inbox import Arrived, Drained, Failed, Offered
from pd_serve.decode.incoming import Part
from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer import worker
from pd_serve.wire.link import Source
from pd_serve.wire.peer import Blocks
from tests.transfer.harness import SMALL, Clock, DecodeEnd, PrefillEnd, until
from tests.transfer.scripted import copy_lanes


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def p(clock: Clock) -> Iterator[PrefillEnd]:
    made = PrefillEnd(clock=clock)
    yield made
    made.close()
    assert made.worker.internal_errors == 0


@pytest.fixture
def d_clock() -> Clock:
    return Clock()


@pytest.fixture
def d(d_clock: Clock) -> Iterator[DecodeEnd]:
    made = DecodeEnd(clock=d_clock)
    yield made
    made.close()
    assert made.worker.internal_errors == 0


def check_bytes(p: PrefillEnd, d: DecodeEnd, theirs: list[list[int]], ours: list[list[int]], first: list[int]) -> None:
    """What was wanted is here, and nothing else was written."""
    for group in range(len(theirs)):
        expected = np.full_like(d.pool.groups[group], 7)
        expected[ours[group][first[group] :]] = p.pool.groups[group][theirs[group][first[group] :]]
        assert np.array_equal(d.pool.groups[group], expected)


THEIRS = [[5, 4, 3, 20, 21, 22], [9, 30, 31, 32, 8, 7]]
OURS = [[11, 12, 13, 40, 41, 1], [2, 50, 51, 52, 4, 3]]


def test_a_prompt_in_three_chunks(p: PrefillEnd, d: DecodeEnd) -> None:
    d.inbox.connect(p.source)
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 8, [t[:2] for t in THEIRS])
    assert d.wait("k", Offered).num_tokens == 8
    d.accept("k", OURS)
    until(lambda: d.inbox.counters()["pulls"] == 1)  # while the rest is computed
    p.publish("k", 16, [t[:4] for t in THEIRS], first=2)
    until(lambda: d.inbox.counters()["pulls"] == 2)
    assert d.ends("k") == []
    p.publish("k", 22, THEIRS, first=4, token=77)
    arrived = d.wait("k", Arrived)
    assert arrived.first_token == 77
    assert arrived.size_bytes == 6 * (SMALL.block_bytes(0) + SMALL.block_bytes(1))
    assert arrived.seconds > 0
    assert until(lambda: p.why("k")) == "released"
    check_bytes(p, d, THEIRS, OURS, [0, 0])
    counters = d.inbox.counters()
    assert counters["pull_bytes"] == arrived.size_bytes
    assert counters["pull_descriptors"] < 12  # neighbours were merged
    assert d.ends("k") == [Arrived]


def test_what_is_not_computed_yet_is_announced_when_it_is_and_goes_to_blocks_named_before(
    p: PrefillEnd, d: DecodeEnd
) -> None:
    """As between engines whose steps run ahead of their device, and that set blocks aside before they ask."""
    done: list[bool] = []
    d.inbox.expect("k", p.source, ([np.array(t, dtype=np.int32) for t in OURS], [0, 0]))
    p.outbox.open("k")
    for upto, token in ((3, None), (6, 5)):
        blocks = [Blocks(g, 0, np.array(t[:upto], dtype="<i4").tobytes()) for g, t in enumerate(THEIRS)]
        p.outbox.publish("k", 4 * upto, blocks, token, lambda upto=upto: len(done) >= upto)  # type: ignore[misc]
    until(lambda: p.outbox.counters()["handshakes"] == 1)
    assert d.find("k", Offered) is None
    done += [True] * 3
    assert d.wait("k", Offered).num_tokens == 12
    done += [True] * 3
    assert d.wait("k", Arrived).first_token == 5
    check_bytes(p, d, THEIRS, OURS, [0, 0])


def test_a_slow_lane_is_counted_and_said_once(
    p: PrefillEnd, d: DecodeEnd, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(inbox, "JUDGED_BYTES", 1)
    monkeypatch.setattr(inbox, "SLOW_BYTES_PER_S", 1e15)  # no memory is as fast
    for i in range(inbox.SLOW_PULLS_TOLERATED + 2):
        key = f"k{i}"
        d.inbox.expect(key, p.source)
        p.outbox.open(key)
        p.publish(key, 22, THEIRS, token=1)
        d.wait(key, Offered)
        d.accept(key, OURS)
        d.wait(key, Arrived)
    assert d.inbox.counters()["slow_pulls"] == inbox.SLOW_PULLS_TOLERATED + 2
    assert len([r for r in caplog.records if "GB/s" in r.message]) == 1


def test_chunks_that_wait_become_one_pull(p: PrefillEnd, d: DecodeEnd) -> None:
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    for upto in range(1, 7):
        p.publish("k", upto * 4, [t[:upto] for t in THEIRS], first=upto - 1, token=1 if upto == 6 else None)
    d.wait("k", Offered)
    until(lambda: d.inbox._keys["k"].parts[0].num_tokens == 24)  # all are announced
    d.accept("k", OURS)
    d.wait("k", Arrived)
    assert d.inbox.counters()["pulls"] == 1
    check_bytes(p, d, THEIRS, OURS, [0, 0])


def test_cached_prefix_and_window_are_not_pulled(p: PrefillEnd, d: DecodeEnd) -> None:
    ours = [OURS[0], [0, 0, 0, *OURS[1][3:]]]
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 24, [THEIRS[0], []])
    p.outbox.publish("k", 24, [], None)
    d.wait("k", Offered)
    d.accept("k", ours, [2, 3])
    p.publish("k", 24, [[], THEIRS[1]], first=3, token=1)
    arrived = d.wait("k", Arrived)
    assert arrived.size_bytes == 4 * SMALL.block_bytes(0) + 3 * SMALL.block_bytes(1)
    check_bytes(p, d, THEIRS, ours, [2, 3])


def test_all_cached_still_asks_whether_the_lease_held(p: PrefillEnd, d: DecodeEnd) -> None:
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 24, THEIRS, token=9)
    d.wait("k", Offered)
    d.accept("k", OURS, [6, 6])
    assert d.wait("k", Arrived).size_bytes == 0
    assert until(lambda: p.why("k")) == "released"
    check_bytes(p, d, THEIRS, OURS, [6, 6])


def test_two_hundred_keys_at_once() -> None:
    p, d = PrefillEnd(num_blocks=1300, seed=11), DecodeEnd(num_blocks=1300)
    rng = np.random.default_rng(0)
    theirs = [rng.permutation(np.arange(1, 1201)).reshape(200, 6) for _ in range(2)]
    ours = [rng.permutation(np.arange(1, 1201)).reshape(200, 6) for _ in range(2)]
    for i in range(200):
        d.inbox.expect(f"k{i}", p.source)
        p.outbox.open(f"k{i}")
    for upto in (2, 4, 6):
        for i in range(200):
            tables = [t[i, :upto].tolist() for t in theirs]
            p.publish(f"k{i}", upto * 4, tables, first=upto - 2, token=i if upto == 6 else None)
    accepted: set[str] = set()

    def all_arrived() -> bool:
        for event in d.take():
            if isinstance(event, Offered) and event.key not in accepted:
                accepted.add(event.key)
                d.accept(event.key, [t[int(event.key[1:])].tolist() for t in ours])
        return sum(isinstance(e, Arrived) for e in d.seen) == 200

    until(all_arrived, 20.0)
    assert all(e.first_token == int(e.key[1:]) for e in d.seen if isinstance(e, Arrived))
    for group in range(2):
        assert np.array_equal(d.pool.groups[group][ours[group].ravel()], p.pool.groups[group][theirs[group].ravel()])
    until(lambda: p.outbox.num_leases == 0)
    p.close()
    d.close()


# --- cancel at every stage


def test_cancel_while_connecting(d: DecodeEnd) -> None:
    d.inbox.expect("k", Source("P", "e", ("tcp://127.0.0.1:1",)))
    d.inbox.cancel("k")
    d.wait("k", Drained)
    assert d.ends("k") in ([Drained], [Failed, Drained])  # nobody listens there, which may be noticed first


def test_cancel_after_the_claim(p: PrefillEnd, d: DecodeEnd) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    until(lambda: d.inbox.counters()["handshakes"])
    d.inbox.cancel("k")
    d.wait("k", Drained)
    assert until(lambda: p.why("k")) == "declined"
    assert d.ends("k") == [Drained]


def test_cancel_after_the_offer(p: PrefillEnd, d: DecodeEnd) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 8, [t[:2] for t in THEIRS])
    d.wait("k", Offered)
    d.inbox.cancel("k")
    d.accept("k", OURS)  # crossing: it must not start anything
    d.wait("k", Drained)
    assert until(lambda: p.why("k")) == "declined"
    assert d.inbox.counters()["pulls"] == 0


def test_cancel_in_the_middle(p: PrefillEnd, d: DecodeEnd) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 8, [t[:2] for t in THEIRS])
    d.wait("k", Offered)
    d.accept("k", OURS)
    until(lambda: d.inbox.counters()["pulls"])
    d.inbox.cancel("k")
    d.wait("k", Drained)
    assert until(lambda: p.why("k")) == "declined"
    p.publish("k", 24, THEIRS, first=2, token=1)
    d.inbox.cancel("k")  # once more changes nothing
    d.inbox.expect("other", p.source)
    p.outbox.open("other")
    p.publish("other", 24, THEIRS, token=1)
    d.wait("other", Offered)
    assert d.ends("k") == [Drained]


def test_cancel_after_the_end_changes_nothing(p: PrefillEnd, d: DecodeEnd) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 24, THEIRS, token=1)
    d.wait("k", Offered)
    d.accept("k", OURS)
    until(lambda: p.why("k"))
    d.inbox.cancel("k")
    d.inbox.cancel("unknown")
    until(lambda: d.ends("k"))
    assert d.ends("k") in ([Arrived], [Drained])


def test_the_prefill_node_cancels(p: PrefillEnd, d: DecodeEnd) -> None:
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.outbox.cancel("k", "finished with its first token")
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.CANCELLED
    assert "first token" in failed.message
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


# --- leases


def test_a_lease_that_runs_out_while_pulling(p: PrefillEnd, d: DecodeEnd, clock: Clock, d_clock: Clock) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 8, [t[:2] for t in THEIRS])
    d.wait("k", Offered)
    d.accept("k", OURS)
    until(lambda: d.inbox.counters()["pulls"])
    clock.now_s += 30  # no heartbeat got through for a whole lease
    p.worker.wake()
    assert until(lambda: p.why("k")) == "expired"
    p.publish("k", 24, THEIRS, first=2, token=1)  # the main thread had not heard of it
    d_clock.now_s += 5
    d.worker.wake()
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.EXPIRED
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


def test_a_lease_that_ran_out_before_the_bytes_came(p: PrefillEnd, d: DecodeEnd, clock: Clock) -> None:
    """The blocks were read, but after their lease: they may hold another prompt's KV."""
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 24, THEIRS, token=1)
    d.wait("k", Offered)
    clock.now_s += 30
    p.worker.wake()
    assert until(lambda: p.why("k")) == "expired"
    d.accept("k", OURS)
    assert d.wait("k", Failed).kind is FailureKind.EXPIRED
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


def test_a_lease_that_ran_out_before_it_was_claimed(p: PrefillEnd, d: DecodeEnd, clock: Clock) -> None:
    p.outbox.open("k")
    until(lambda: p.outbox.num_leases)
    clock.now_s += 30
    p.worker.wake()
    assert until(lambda: p.why("k")) == "expired"
    d.inbox.expect("k", p.source)
    assert d.wait("k", Failed).kind is FailureKind.EXPIRED
    d.wait("k", Drained)
    assert d.ends("k") == [Failed, Drained]


def test_heartbeats_keep_a_waiting_request_alive(p: PrefillEnd, d: DecodeEnd, clock: Clock, d_clock: Clock) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 24, THEIRS, token=1)
    d.wait("k", Offered)  # and no memory here for a long time
    for _ in range(20):
        clock.now_s += 6
        d_clock.now_s += 6
        d.worker.wake()
        p.worker.wake()
        until(lambda: p.outbox._book.next_expiry_s() >= clock.now_s + 29)
    d.accept("k", OURS)
    d.wait("k", Arrived)
    assert until(lambda: p.why("k")) == "released"


def test_a_prefill_node_may_compute_for_longer_than_any_timeout(
    p: PrefillEnd, d: DecodeEnd, clock: Clock, d_clock: Clock
) -> None:
    p.outbox.open("k")
    d.inbox.expect("k", p.source)
    p.publish("k", 8, [t[:2] for t in THEIRS])
    d.wait("k", Offered)
    d.accept("k", OURS)
    until(lambda: d.inbox.counters()["pulls"])
    for _ in range(24):  # alive, in one long step
        clock.now_s += 5
        d_clock.now_s += 5
        d.worker.wake()
        until(lambda: p.why("k") or p.outbox._book.next_expiry_s() >= clock.now_s + 29)
    assert d.ends("k") == []
    p.publish("k", 22, THEIRS, first=2, token=1)
    d.wait("k", Arrived)


# --- who is there


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"model": "m1"}, "models differ"),
        ({"layout": dataclasses.replace(SMALL, block_size=6)}, "block sizes do not fit"),
        ({"protocol_min": 5, "protocol_max": 6}, "protocol versions"),
        ({"secret": b"another"}, "--secret-file"),
    ],
)
def test_a_refused_handshake(p: PrefillEnd, other: dict[str, object], word: str) -> None:
    d = DecodeEnd(other.get("layout", SMALL), me=other, lanes=copy_lanes)  # type: ignore[arg-type]
    d.inbox.expect("k", p.source)
    failed = d.wait("k", Failed)
    assert failed.kind is FailureKind.HANDSHAKE
    assert word in failed.message
    d.wait("k", Drained)
    assert d.inbox.counters()["pull_failures_handshake"] == 1
    d.close()


def test_nobody_listens(d: DecodeEnd) -> None:
    d.inbox.expect("k", Source("P", "e", ("tcp://127.0.0.1:1",)))
    assert d.wait("k", Failed, 2.0).kind is FailureKind.CONNECT


def test_an_address_that_cannot_be(d: DecodeEnd) -> None:
    d.inbox.expect("k", Source("P", "e", ("smoke signals",)))
    assert d.wait("k", Failed, 2.0).kind is FailureKind.CONNECT


def test_another_epoch_than_the_router_named(p: PrefillEnd, d: DecodeEnd) -> None:
    stale = Source(p.source.node_id, "an older epoch", p.source.addresses)
    d.inbox.expect("old", stale)
    d.inbox.expect("new", p.source)
    failed = d.wait("old", Failed)
    assert failed.kind is FailureKind.PEER_LOST
    assert "an older epoch" in failed.message
    p.outbox.open("new")
    p.publish("new", 24, THEIRS, token=1)
    d.wait("new", Offered)


def test_a_node_that_leaves(p: PrefillEnd, d: DecodeEnd) -> None:
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 8, [t[:2] for t in THEIRS])
    d.wait("k", Offered)
    d.accept("k", OURS)
    p.close()
    assert d.wait("k", Failed, 2.0).kind is FailureKind.PEER_LOST
    d.wait("k", Drained)


def test_a_decode_node_that_leaves(p: PrefillEnd) -> None:
    d = DecodeEnd()
    d.inbox.expect("k", p.source)
    p.outbox.open("k")
    p.publish("k", 24, THEIRS, token=1)
    d.wait("k", Offered)
    d.close()
    assert until(lambda: p.why("k"), 2.0) == "peer_lost"


@pytest.mark.parametrize("where", ["announce", "accept", "take", "open_checks"])
def test_a_request_that_meets_a_fault_of_ours_ends_alone(
    p: PrefillEnd, d_clock: Clock, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mistake in the code for one request is that request's failure; the thread and the others go on."""
    d = DecodeEnd(clock=d_clock)
    right = getattr(Part, where)

    def mistaken(job: Part, *arguments: object) -> object:
        if job.key == "bad":
            raise IndexError("a mistake of ours")
        return right(job, *arguments)

    monkeypatch.setattr(Part, where, mistaken)
    for key in ("bad", "good"):
        p.outbox.open(key)
        d.inbox.expect(key, p.source)
        p.publish(key, 22, THEIRS, first=0, token=1)
        if key == "good" or where != "announce":
            d.wait(key, Offered)
            d.accept(key, OURS)
    assert "a mistake of ours" in d.wait("bad", Failed).message
    d.wait("bad", Drained)
    d.wait("good", Arrived)
    assert until(lambda: p.why("bad")) == "declined"
    assert d.worker.internal_errors == 1
    d.close()


def test_the_main_thread_learns_that_the_transfer_thread_gave_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "FAULT_PAUSE_S", 0.01)
    monkeypatch.setattr(worker, "GIVE_UP_S", 0.1)
    for end in (DecodeEnd(), PrefillEnd()):
        service = end.inbox if isinstance(end, DecodeEnd) else end.outbox
        assert service.events() == []
        service._worker.call(monkeypatch.setattr, service._lanes, "progress", lambda: 1 // 0)
        assert select.select([service.fileno()], [], [], 10)[0]
        with pytest.raises(TransferError, match="in every turn"):
            service.events()
        assert end.close()
