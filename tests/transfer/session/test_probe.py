"""The self-test, with lanes that do what the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from pd_serve.transfer.base import Pair, Peer, Transport
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.session import probe
from pd_serve.transfer.session.probe import SLOTS, Prober, Verdict
from pd_serve.transfer.slices import slicings
from tests.transfer.harness import SMALL, Pool, until
from tests.transfer.scripted import CopyTransport, Script

EPOCH = "e1"
SLOW = 500e6  # bytes a second; the self-test takes 17 ms of it


class Ends:
    """A source and a reader in one process, and a prober on the reader's side."""

    def __init__(self) -> None:
        self.mover = HostMover()
        self.source, self.reader = Pool(SMALL, 2), Pool(SMALL, 2)
        probe.fill(self.source.memory(), self.mover, EPOCH)
        self.pair = Pair(slicings(SMALL, SMALL), self.source.memory().regions, self.reader.memory().regions)
        self.prober = Prober(self.reader.memory(), self.mover)
        self.verdicts: list[Verdict] = []

    def lanes(self, **scripts: Script) -> dict[str, tuple[Transport, Peer]]:
        found: dict[str, tuple[Transport, Peer]] = {}
        for name, script in scripts.items():
            transport = CopyTransport(name, self.mover, script)
            found[name] = (transport, transport.connect(name.encode(), self.pair, lambda message: None))
        return found

    def start(self, epoch: str = EPOCH, **scripts: Script) -> probe.Probe:
        return self.prober.start(self.lanes(**scripts), self.pair, epoch, self.verdicts.append)

    def run(self, condition: Callable[[], object]) -> None:
        def step() -> object:
            self.prober.run()
            return condition()

        until(step)

    def test(self, epoch: str = EPOCH, **scripts: Script) -> Verdict:
        self.start(epoch, **scripts)
        self.run(lambda: self.verdicts)
        return self.verdicts.pop()


@pytest.fixture
def ends() -> Iterator[Ends]:
    yield Ends()


def test_patterns_have_no_word_twice_and_differ_by_epoch() -> None:
    whole = probe.pattern("a")
    assert len(np.unique(whole)) == whole.size
    assert not np.any(whole == probe.pattern("b"))


def test_a_reader_that_is_a_source_too_keeps_its_own_pattern(ends: Ends) -> None:
    probe.fill(ends.reader.memory(), ends.mover, "its own")
    for _ in range(SLOTS):
        assert ends.test(a=Script(), b=Script()).why_not == {}
    assert np.array_equal(ends.reader.probe.view("<u4")[: probe.SLOT_BLOCKS], probe.pattern("its own"))


def test_expected_sums_are_the_movers(ends: Ends) -> None:
    region = ends.source.memory().regions[-1]
    rows = Rows(
        region.address, np.arange(probe.SLOT_BLOCKS) * region.block_bytes, np.zeros(1, np.int64), region.block_bytes
    )
    sums = ends.mover.checksums(rows)
    while not sums.done():
        pass
    assert np.array_equal(sums.result(), probe.expected_sums(EPOCH))


def test_one_lane_is_measured_too(ends: Ends) -> None:
    verdict = ends.test(a=Script())
    assert list(verdict.rates) == ["a"] and verdict.rates["a"] > 0
    assert verdict.why_not == {} and verdict.fastest() == "a"
    size_bytes, seconds = verdict.timed["a"]
    assert size_bytes >= 4 << 20 and seconds > 0
    assert ends.prober.idle and ends.prober.run() == float("inf")


def test_the_faster_lane_wins_whatever_the_order(ends: Ends) -> None:
    assert ends.test(slow=Script(bytes_per_s=SLOW), fast=Script()).fastest() == "fast"
    assert ends.test(fast=Script(), slow=Script(bytes_per_s=SLOW)).fastest() == "fast"


def test_what_a_lane_sets_up_for_long_pulls_is_not_its_rate(ends: Ends) -> None:
    """A staging ring, such as NIXL's for small pieces of memory that it could read directly."""
    assert ends.test(staged=Script(first_long_s=0.02), slow=Script(bytes_per_s=SLOW)).fastest() == "staged"


@pytest.mark.parametrize(
    ("script", "why"),
    [
        (Script(corrupts=True), "not what was there"),
        (Script(forgets=True), "not what was there"),
        (Script(fails="cable cut"), "cable cut"),
        (Script(cannot_pull="not mapped"), "not mapped"),
    ],
)
def test_a_lane_that_does_not_deliver_is_out(ends: Ends, script: Script, why: str) -> None:
    for scripts in ({"bad": script, "good": Script()}, {"good": Script(), "bad": script}):
        verdict = ends.test(**scripts)
        assert list(verdict.rates) == ["good"]
        assert why in verdict.why_not["bad"]
    assert ends.test(bad=script).fastest() is None


def test_another_epochs_pattern_does_not_pass(ends: Ends) -> None:
    """Somebody else's memory, or a source of the past."""
    assert "not what was there" in ends.test("e2", a=Script()).why_not["a"]


def test_a_lane_that_hangs_costs_its_share_of_the_time(ends: Ends) -> None:
    hanging = Script(hangs=True)
    verdict = ends.test(hanging=hanging, good=Script())
    assert verdict.fastest() == "good"
    assert "within 100 ms" in verdict.why_not["hanging"]
    assert not ends.prober.idle  # it may still write into its slot
    assert ends.test(good=Script()).fastest() == "good"  # others go on
    hanging.hangs = False
    ends.run(lambda: ends.prober.idle)


def test_without_another_lane_a_slow_start_is_waited_for(ends: Ends) -> None:
    slow = Script(hangs=True)
    ends.start(a=slow)
    ends.run(lambda: slow.pulls)
    for _ in range(20):
        ends.prober.run()
    assert not ends.verdicts
    slow.hangs = False
    ends.run(lambda: ends.verdicts)
    assert ends.verdicts[0].fastest() == "a"


def test_one_pair_at_a_time_and_in_order(ends: Ends) -> None:
    first, second = Script(hangs=True), Script()
    ends.start(a=first)
    ends.start(b=second)
    ends.run(lambda: first.pulls)
    assert second.pulls == 0
    first.hangs = False
    ends.run(lambda: len(ends.verdicts) == 2)
    assert [list(v.rates) for v in ends.verdicts] == [["a"], ["b"]]


def test_a_cancelled_test_says_nothing_and_makes_room(ends: Ends) -> None:
    hanging = Script(hangs=True)
    cancelled = ends.start(a=hanging)
    waiting = ends.start(b=Script())
    ends.run(lambda: hanging.pulls)
    ends.prober.cancel(cancelled)
    ends.prober.cancel(waiting)
    ends.prober.cancel(waiting)
    assert ends.test(c=Script()).fastest() == "c"
    assert not ends.prober.idle
    hanging.hangs = False
    ends.run(lambda: ends.prober.idle)
    assert not ends.verdicts


def test_when_every_slot_hangs_lanes_go_untested(ends: Ends) -> None:
    hanging = Script(hangs=True)
    for count in range(1, SLOTS + 1):
        cancelled = ends.start(a=hanging)
        ends.run(lambda count=count: hanging.pulls == count)
        ends.prober.cancel(cancelled)
    verdict = ends.test(b=Script(), c=Script())
    assert verdict.untested == ["b", "c"] and not verdict.rates and not verdict.why_not
    hanging.hangs = False
    assert ends.test(b=Script()).fastest() == "b"


def test_floors() -> None:
    assert probe.floor_bytes_per_s("nvlink") == 100e9
    assert probe.floor_bytes_per_s("nixl") == probe.floor_bytes_per_s("ucx") == 1e9
