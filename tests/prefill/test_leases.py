from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from pd_serve.prefill.leases import Claimed, Ended, LeaseBook, Party, Release
from pd_serve.wire.peer import First, Ready

A, B = b"a", b"b"


def chunk(key: str, *, last: bool = False) -> Ready:
    return Ready(key, 16, [], First(1) if last else None)


def book(**limits: int) -> LeaseBook:
    return LeaseBook(10.0, **limits)


def keys(ended: list[Ended]) -> list[str]:
    assert all(e.leased and not e.others for e in ended)
    return [e.key for e in ended]


def test_the_usual_way() -> None:
    leases = book()
    assert leases.claim("k", A, 0.0) is Claimed.WAITING  # the claim may be first
    assert leases.open("k", 1.0)
    lease = leases.publish("k", chunk("k"), 2.0)
    assert lease is not None and lease.holders == (A,)
    leases.publish("k", chunk("k", last=True), 3.0)
    assert leases.heartbeat(["k"], A, 9.0) == []
    assert leases.expire(18.0) == []
    assert leases.release("k", A, done=True) == Release(valid=True, ended=Ended("k", "released"))
    assert len(leases) == 0


def test_a_late_claim_finds_all_that_was_published() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.publish("k", chunk("k"), 0.0)
    leases.publish("k", chunk("k", last=True), 0.0)
    assert leases.claim("k", A, 5.0) is Claimed.OPEN
    assert len(leases.published("k")) == 2
    assert leases.expire(14.9) == []
    assert keys(leases.expire(15.0)) == ["k"]


def test_nobody_claims() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.publish("k", chunk("k"), 8.0)  # still computing: starts the time anew
    assert leases.expire(17.9) == []
    leases.publish("k", chunk("k", last=True), 17.9)
    assert leases.next_expiry_s() == 27.9
    assert keys(leases.expire(27.9)) == ["k"]
    assert leases.claim("k", A, 28.0) is Claimed.GONE
    assert leases.why_ended("k") == "expired"


def test_publishing_does_not_keep_a_silent_claimant_alive() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.claim("k", A, 0.0)
    leases.publish("k", chunk("k"), 9.0)
    assert keys(leases.expire(10.0)) == ["k"]
    assert leases.publish("k", chunk("k"), 11.0) is None


def test_a_release_after_the_end_is_not_valid() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.claim("k", A, 0.0)
    leases.publish("k", chunk("k", last=True), 0.0)
    leases.expire(10.0)
    assert leases.release("k", A, done=True) == Release(valid=False)
    assert leases.heartbeat(["k"], A, 11.0) == ["k"]


def test_a_release_before_the_last_chunk_is_not_valid() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.claim("k", A, 0.0)
    leases.publish("k", chunk("k"), 0.0)
    assert leases.release("k", A, done=True) == Release(valid=False, ended=Ended("k", "released"))


def test_only_the_holder_has_a_say() -> None:
    leases = book()
    leases.open("k", 0.0)
    leases.claim("k", A, 0.0)
    assert leases.claim("k", B, 1.0) is Claimed.GONE
    assert leases.release("k", B, done=False) == Release(valid=False)
    assert leases.heartbeat(["k"], B, 9.0) == ["k"]
    assert leases.drop(B) == []
    assert keys(leases.drop(A)) == ["k"]


def test_declined_before_it_was_admitted() -> None:
    leases = book()
    leases.claim("k", A, 0.0)
    assert leases.release("k", A, done=False).ended == Ended("k", "declined", leased=False)
    assert not leases.open("k", 1.0)


def test_a_claim_of_a_request_that_comes_late_lives_by_heartbeats() -> None:
    leases = book()
    leases.claim("k", A, 0.0)
    for now_s in (5.0, 12.0, 20.0):  # the prefill node's engine is in a long step
        assert leases.heartbeat(["k"], A, now_s) == []
        leases.expire(now_s + 5.0)
    leases.expire(40.0)
    assert leases.heartbeat(["k"], A, 40.0) == ["k"]


def test_blocks_that_nobody_has_claimed_outlast_a_long_step_of_the_decode_node() -> None:
    leases = book(unclaimed_s=70.0)
    leases.open("k", 0.0)
    assert leases.expire(69.0) == []
    assert leases.claim("k", A, 69.0) is Claimed.OPEN
    assert keys(leases.expire(79.0)) == ["k"]  # from the claim on it must be heard of
    leases.open("other", 0.0)
    assert keys(leases.expire(70.0)) == ["other"]


def test_cancel_tells_whoever_asked_or_will_ask() -> None:
    leases = book()
    leases.claim("waiting", A, 0.0)
    assert leases.cancel("waiting", "aborted") == (A,)
    leases.open("open", 0.0)
    assert leases.cancel("open", "finished") == ()
    assert leases.claim("open", A, 1.0) is Claimed.GONE
    assert leases.why_ended("open") == "finished"


def test_bounds() -> None:
    leases = book(max_waiting=3, max_ended=3)
    for i in range(10):
        leases.claim(f"w{i}", A, 0.0)
        leases.open(f"o{i}", 0.0)
        leases.cancel(f"o{i}", "x")
    assert leases.heartbeat([f"w{i}" for i in range(10)], A, 1.0) == [f"w{i}" for i in range(7)]
    assert leases.claim("o9", A, 1.0) is Claimed.GONE
    assert leases.claim("o0", A, 1.0) is Claimed.WAITING  # forgotten


# --- a decode node with several ranks

PAIR = Party(("D", "e"), 2)


def of_two() -> LeaseBook:
    leases = book()
    leases.open("k", 0.0)
    assert leases.claim("k", A, 0.0, PAIR) is Claimed.OPEN
    assert leases.claim("k", B, 1.0, PAIR) is Claimed.OPEN
    lease = leases.publish("k", chunk("k", last=True), 2.0)
    assert lease is not None and lease.holders == (A, B)
    return leases


def test_a_lease_ends_when_each_rank_has_released() -> None:
    leases = of_two()
    assert leases.release("k", A, done=True) == Release(valid=True)
    assert leases.holds("k", B) and not leases.holds("k", A)
    assert leases.release("k", A, done=True) == Release(valid=False)  # once is enough
    assert leases.claim("k", A, 3.0, PAIR) is Claimed.GONE
    assert leases.drop(A) == []  # nor does it matter any more whether its rank lives
    assert leases.release("k", B, done=True) == Release(valid=True, ended=Ended("k", "released"))


@pytest.mark.parametrize("released", [False, True])
def test_a_rank_that_is_silent_ends_the_lease_for_all(released: bool) -> None:
    leases = of_two()
    if released:
        leases.release("k", A, done=True)
    else:
        assert leases.heartbeat(["k"], A, 9.0) == []
    assert leases.next_expiry_s() == 11.0
    assert leases.expire(11.0) == [Ended("k", "expired", () if released else (A,))]
    assert leases.release("k", A, done=True) == Release(valid=False)


def test_a_rank_that_never_claims_ends_the_lease_for_all() -> None:
    leases = book(unclaimed_s=20.0)
    leases.claim("k", A, 0.0, PAIR)
    leases.open("k", 0.0)
    leases.publish("k", chunk("k", last=True), 5.0)
    for now_s in (8.0, 16.0, 24.0):
        assert leases.heartbeat(["k"], A, now_s) == []
        assert leases.expire(now_s) == []
    assert leases.release("k", A, done=True) == Release(valid=True)
    assert leases.expire(25.0) == [Ended("k", "expired")]


def test_a_rank_that_declines_or_is_lost_ends_the_lease_for_all() -> None:
    assert of_two().release("k", A, done=False) == Release(valid=False, ended=Ended("k", "declined", (B,)))
    assert of_two().drop(B) == [Ended("k", "peer_lost", (A,))]
    assert of_two().cancel("k", "aborted") == (A, B)
    waiting = book()
    waiting.claim("k", A, 0.0, PAIR)
    waiting.claim("k", B, 0.0, PAIR)
    assert waiting.release("k", B, done=False).ended == Ended("k", "declined", (A,), leased=False)
    assert not waiting.open("k", 1.0)


def test_ranks_of_two_nodes_do_not_share_a_lease() -> None:
    for other in (Party(("E", "e"), 2), Party(("D", "after a restart"), 2), Party(("D", "e"), 3)):
        leases = book()
        leases.open("k", 0.0)
        leases.claim("k", A, 0.0, PAIR)
        assert leases.claim("k", B, 0.0, other) is Claimed.GONE
        assert leases.claim("k", B, 0.0, PAIR) is Claimed.OPEN
        assert leases.claim("k", b"c", 0.0, PAIR) is Claimed.GONE  # a third rank of two


class Leases(RuleBasedStateMachine):
    """Against what a reader may rely on: a release is valid only if the lease has been alive all the time.

    ``kept``: who holds a key, by what was said here, and until when at least.
    """

    keys = st.sampled_from(["x", "y", "z"])
    holders = st.sampled_from([A, B, b"c"])

    @initialize(size=st.integers(1, 3))
    def begin(self, size: int) -> None:
        self.party = Party(("D", "e"), size)
        self.leases = book()
        self.now_s = 0.0
        self.opened: set[str] = set()
        self.complete: set[str] = set()
        self.ended: list[str] = []
        self.kept: dict[str, dict[bytes, float]] = {}
        self.released: dict[str, set[bytes]] = {}

    def end(self, ended: list[Ended], knows: bytes = b"") -> None:
        self.ended += [e.key for e in ended if e.leased]
        for e in ended:
            kept = self.kept.pop(e.key, {})
            alive = {holder for holder, until_s in kept.items() if until_s > self.now_s and holder != knows}
            assert alive <= set(e.others) and knows not in e.others  # whoever may still rely on it is told

    @rule(seconds=st.floats(0.0, 12.0))
    def wait(self, seconds: float) -> None:
        self.now_s += seconds
        self.end(self.leases.expire(self.now_s))

    @rule(key=keys)
    def open(self, key: str) -> None:
        if key not in self.opened:
            self.opened.add(key)
            if not self.leases.open(key, self.now_s):
                self.ended.append(key)

    @rule(key=keys, last=st.booleans())
    def publish(self, key: str, last: bool) -> None:
        if self.leases.publish(key, chunk(key, last=last), self.now_s) is not None and last:
            self.complete.add(key)

    @rule(key=keys, holder=holders)
    def claim(self, key: str, holder: bytes) -> None:
        if self.leases.claim(key, holder, self.now_s, self.party) is Claimed.OPEN:
            assert holder not in self.released.get(key, ())
            self.kept.setdefault(key, {})[holder] = self.now_s + 10.0
            assert len(self.kept[key]) + len(self.released.get(key, ())) <= self.party.size

    @rule(key=keys, holder=holders)
    def heartbeat(self, key: str, holder: bytes) -> None:
        if not self.leases.heartbeat([key], holder, self.now_s) and key in self.opened:
            self.kept.setdefault(key, {})[holder] = self.now_s + 10.0

    @rule(key=keys, holder=holders, done=st.booleans())
    def release(self, key: str, holder: bytes, done: bool) -> None:
        release = self.leases.release(key, holder, done=done)
        if release.valid:
            assert done and key in self.complete and key not in self.ended
            self.released.setdefault(key, set()).add(holder)
            self.kept.get(key, {}).pop(holder, None)
            assert (release.ended is not None) is (len(self.released[key]) == self.party.size)
        if release.ended is not None:
            self.end([release.ended], holder)

    @rule(key=keys)
    def cancel(self, key: str) -> None:
        if key in self.opened and key not in self.ended:
            self.ended.append(key)
        assert set(self.kept.pop(key, {})) <= set(self.leases.cancel(key, "aborted"))

    @rule(holder=holders)
    def drop(self, holder: bytes) -> None:
        self.end(self.leases.drop(holder), holder)

    @invariant()
    def each_key_ends_at_most_once(self) -> None:
        assert len(self.ended) == len(set(self.ended))
        assert len(self.leases) == len(self.opened - set(self.ended))


TestLeases = Leases.TestCase
TestLeases.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
