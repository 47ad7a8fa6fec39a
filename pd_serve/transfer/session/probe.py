"""The self-test of a new pair: every lane that both ends have reads the source's probe region; the fastest is used.

Run by the reader's end on the transfer thread, in turns that never wait. A lane passes when exactly the bytes
came that the source wrote: a pattern made of its epoch, at every position another word. What a lane delivers is then
known, what it costs is measured, and a slow one is said to be slow before the first request finds out.

One pair is tested at a time, so that pairs do not slow each other down. A node may be source and reader: the pattern
lies in the first part of its probe region, the rest is divided into *slots* that its own tests read into. A lane that
hangs keeps its slot for as long as it may still write there, and others are tested in the rest.
"""

from __future__ import annotations

import hashlib
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from pd_serve.errors import TransferError
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory
from pd_serve.transfer.base import BlockMap, Pair, Peer, Pull, PullState, Transport
from pd_serve.transfer.movers.base import U64, Mover, Sums

SELF_TEST_S = 0.1  # for a pair, once a lane has passed; until then it may take as long as a handshake may
SLOTS = 3
SLOT_BLOCKS = PROBE_BLOCKS // (1 + SLOTS)  # as many as the pattern has
WORDS = PROBE_BLOCK_BYTES // 4

# A timed pull reads its slot so often: 4 MiB; where that took no time to speak of, 32 MiB; and then 256 MiB.
FEWEST_REPEATS, MORE, MOST_REPEATS = 4, 8, 256
# In a busy process a lane that asks and is answered takes 2 ms before the first byte: that is no rate.
TOO_SHORT_S = 3e-3
# It is looked after without a pause for so long: a turn of the thread costs as much as an NVLink needs for 10 MiB.
SPIN_S = 1e-3
LOOK_S = 100e-6

# What a lane should give at the very least; below it something is wrong with the machine, or its configuration.
FLOOR_BYTES_PER_S = 1e9
FLOORS_BYTES_PER_S = {"nvlink": 100e9}

U32 = npt.NDArray[np.uint32]


def floor_bytes_per_s(lane: str) -> float:
    """A rate at which a lane has probably fallen back to something else."""
    return FLOORS_BYTES_PER_S.get(lane, FLOOR_BYTES_PER_S)


def pattern(epoch: str) -> U32:
    """What a source of this epoch has in the first blocks of its probe region: ``[SLOT_BLOCKS, WORDS]``."""
    key = hashlib.sha256(epoch.encode()).digest()
    start, step = np.frombuffer(key[:8], dtype=np.uint32)
    position = np.arange(SLOT_BLOCKS * WORDS, dtype=np.uint32)
    # an odd factor: no two positions hold the same word
    words: U32 = (position * np.uint32(step | 1) + start).reshape(SLOT_BLOCKS, WORDS)
    return words


def fill(memory: PoolMemory, mover: Mover, epoch: str) -> None:
    """Source, at the start: writes the pattern into the probe region."""
    mover.write(memory.regions[-1].address, pattern(epoch).tobytes())


def expected_sums(epoch: str) -> U64:
    """What :meth:`Mover.checksums` must answer for its blocks."""
    index = np.arange(WORDS, dtype=np.uint64)
    weights = ((index * np.uint64(0x9E3779B1)) & np.uint64(0xFFFFFFFF)) | np.uint64(1)
    sums: U64 = (pattern(epoch).astype(np.uint64) * weights).sum(axis=1, dtype=np.uint64)
    return sums


@dataclass(frozen=True)
class Lane:
    """A transport and the source behind it."""

    name: str
    transport: Transport
    peer: Peer


@dataclass
class Verdict:
    """``rates``: bytes a second of the lanes that passed. ``why_not``: the others, but for ``untested``, which hang on
    other pairs' tests.
    """

    rates: dict[str, float] = field(default_factory=dict)
    why_not: dict[str, str] = field(default_factory=dict)
    untested: list[str] = field(default_factory=list)  # preferred first
    timed: dict[str, tuple[int, float]] = field(default_factory=dict)  # bytes and seconds of the timed pulls

    def fastest(self) -> str | None:
        return max(self.rates, key=lambda name: self.rates[name], default=None)


class _LaneTest:
    """One lane's way: a pull to warm up, a timed one (or more), and a look at what has arrived.

    The first is as long as the first timed one: what a lane sets up for such pulls (a staging ring) is not its rate.
    """

    def __init__(self, lane: Lane, pair: Pair, memory: PoolMemory, mover: Mover, epoch: str, slot: int) -> None:
        self.lane = lane
        self.slot = slot
        self.began_s = 0.0
        self.pull: Pull | None = None
        self.rate = 0.0
        self.size_bytes = 0
        self.seconds = 0.0
        self.why_not = ""
        self._ended = False
        self._pair = pair
        self._region = memory.regions[-1]
        self._mover = mover
        # other blocks than there, so that a lane that mixes the two ends up does not pass
        self._remote = np.arange(SLOT_BLOCKS, dtype=np.int64)
        self._local = (slot + 1) * SLOT_BLOCKS + self._remote
        self._expected = expected_sums(epoch)
        self._repeats = 0  # of the pull under way; 0: the first one, which is not timed
        self._pulled_s = 0.0
        self._sums: Sums | None = None

    def start(self, now_s: float) -> None:
        self.began_s = now_s
        address = self._region.address + (self.slot + 1) * SLOT_BLOCKS * PROBE_BLOCK_BYTES
        self._mover.write(address, bytes(SLOT_BLOCKS * PROBE_BLOCK_BYTES))
        self._guarded(self._pull)

    def look(self) -> bool:
        """Moves on; True when it has ended (``why_not`` is then empty if the lane passed)."""
        if not self._ended:
            self._guarded(self._look)
        return self._ended

    def _guarded(self, step: Callable[[], None]) -> None:
        try:
            step()
        except TransferError as error:
            self.why_not = str(error)
            self._ended = True

    def _pull(self) -> None:
        group = len(self._pair.slicings) - 1
        self._pulled_s = time.perf_counter()
        remote, local = (np.tile(pieces, max(FEWEST_REPEATS, self._repeats)) for pieces in (self._remote, self._local))
        self.pull = self.lane.transport.pull(self.lane.peer, [BlockMap(group, remote, local)])

    def _look(self) -> None:
        while self.pull is not None:
            state = self.pull.poll()
            elapsed_s = time.perf_counter() - self._pulled_s
            if state is PullState.FAILED:
                raise self.pull.error()
            if state is PullState.RUNNING:
                if self._repeats and elapsed_s < SPIN_S:
                    continue
                return
            self._arrived(elapsed_s)
        if self._sums is not None and self._sums.done():
            self._ended = True
            if not np.array_equal(self._sums.result(), self._expected):
                self.why_not = "what it delivered is not what was there"

    def _arrived(self, seconds: float) -> None:
        pull = self.pull
        assert pull is not None
        pull.close()
        self.pull = None
        if self._repeats:
            size = SLOT_BLOCKS * PROBE_BLOCK_BYTES * self._repeats
            self.rate = max(self.rate, size / seconds)
            self.size_bytes += size
            self.seconds += seconds
        if not self._repeats or (self._repeats < MOST_REPEATS and seconds < TOO_SHORT_S):
            self._repeats = self._repeats * MORE or FEWEST_REPEATS
            self._pull()
        else:
            self._sums = self._mover.checksums(self._pair.slicings[-1].reader_rows(self._region, self._local))


class Probe:
    """The test of one pair. ``finished(verdict)`` is called once, on the transfer thread, unless it is cancelled."""

    def __init__(self, lanes: list[Lane], pair: Pair, epoch: str, finished: Callable[[Verdict], None]) -> None:
        self.waiting = deque(lanes)
        self.pair = pair
        self.epoch = epoch
        self.finished = finished
        self.running: list[_LaneTest] = []
        self.began_s: float | None = None
        self.share_s = SELF_TEST_S / len(lanes) if lanes else 0.0
        self.verdict = Verdict()


class Prober:
    """Tests pairs, one after the other. ``clock``: monotonic seconds, never a test's."""

    def __init__(self, memory: PoolMemory, mover: Mover, clock: Callable[[], float] = time.perf_counter) -> None:
        self._memory = memory
        self._mover = mover
        self._clock = clock
        self._free_slots = list(range(SLOTS))
        self._left: list[_LaneTest] = []  # given up, and may still write into their slots
        self._probes: deque[Probe] = deque()

    def start(
        self,
        lanes: Mapping[str, tuple[Transport, Peer]],
        pair: Pair,
        epoch: str,
        finished: Callable[[Verdict], None],
    ) -> Probe:
        """``lanes``, preferred first. ``epoch``: the source's."""
        probe = Probe([Lane(name, *both) for name, both in lanes.items()], pair, epoch, finished)
        self._probes.append(probe)
        return probe

    def cancel(self, probe: Probe) -> None:
        """The peer is gone: ``finished`` is not called."""
        if probe in self._probes:
            self._probes.remove(probe)
            self._leave(probe.running)

    @property
    def idle(self) -> bool:
        """Nothing can write into the probe region."""
        self._tidy()
        return not self._left and not any(probe.running for probe in self._probes)

    def run(self) -> float:
        """Does what is due; returns in how many seconds it wants to be called again."""
        self._tidy()
        while self._probes:
            probe = self._probes[0]
            if not self._advance(probe):
                return LOOK_S
            self._probes.popleft()
            self._leave(probe.running)
            probe.finished(probe.verdict)
        return 0.02 if self._left else float("inf")

    def _advance(self, probe: Probe) -> bool:
        """True: this pair's test is over."""
        now_s = self._clock()
        if probe.began_s is None:
            probe.began_s = now_s
        for test in list(probe.running):
            if test.look():
                probe.running.remove(test)
                self._book(probe, test)
        verdict = probe.verdict
        if now_s >= probe.began_s + SELF_TEST_S and verdict.rates:
            for name in [test.lane.name for test in probe.running] + [lane.name for lane in probe.waiting]:
                verdict.why_not[name] = f"it was not measured within {SELF_TEST_S * 1e3:g} ms"
            return True
        if probe.waiting and all(now_s >= test.began_s + probe.share_s for test in probe.running):
            self._next(probe, now_s)
        return not probe.waiting and not probe.running

    def _next(self, probe: Probe, now_s: float) -> None:
        if not self._free_slots:
            if not probe.running:  # other pairs' reads hang, maybe for long: nothing can be measured here
                probe.verdict.untested += [lane.name for lane in probe.waiting]
                probe.waiting.clear()
            return
        lane = probe.waiting.popleft()
        slot = self._free_slots.pop()
        test = _LaneTest(lane, probe.pair, self._memory, self._mover, probe.epoch, slot)
        probe.running.append(test)
        test.start(now_s)

    def _book(self, probe: Probe, test: _LaneTest) -> None:
        verdict = probe.verdict
        verdict.timed[test.lane.name] = (test.size_bytes, test.seconds)
        if test.why_not:
            verdict.why_not[test.lane.name] = test.why_not
        else:
            verdict.rates[test.lane.name] = test.rate
        self._leave([test])

    def _leave(self, tests: list[_LaneTest]) -> None:
        self._left += tests
        self._tidy()

    def _tidy(self) -> None:
        """Takes back the slots that nothing writes into any more."""
        for test in list(self._left):
            if test.pull is None or test.pull.close():
                self._left.remove(test)
                self._free_slots.append(test.slot)
