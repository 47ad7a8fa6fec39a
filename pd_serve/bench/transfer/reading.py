"""The reader's end: its pool and its transport, connected to all sources; pulls, measured and verified.

Used by the reader process on its main thread alone.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from pd_serve.bench.transfer import content
from pd_serve.bench.transfer.ends import End, as_tensor, synchronize
from pd_serve.bench.transfer.job import Case, Job, num_blocks
from pd_serve.bench.transfer.messages import SEED, Open, Opened, Payload, Serve, Serving
from pd_serve.bench.transfer.sources import SourceProcess
from pd_serve.errors import FailureKind, TransferError
from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region
from pd_serve.transfer.base import BlockMap, Pair, Pull, PullState
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.slices import slicings

START_TIMEOUT_S = 60.0
PULL_TIMEOUT_S = 60.0
_SCATTER_SEED = 7

T = TypeVar("T")


class ReaderEnd:
    """The reader's pool and transport, connected to all sources."""

    def __init__(self, job: Job, layout: KVLayout, sources: Sequence[SourceProcess]) -> None:
        self.job = job
        self.device = job.devices[1] if job.cuda else None
        self.sources = sources
        self._layout = layout
        for source in sources:
            counts = num_blocks(job, source.layout)
            source_device = job.devices[0] if job.cuda else None
            source.send(Open(job.lane, source_device, job.cumem, source.layout, counts, SEED + source.rank))
        self._end = End(job.lane, self.device, job.cumem, layout, num_blocks(job, layout), "reader")
        self.transport = self._end.transport
        self._expected: dict[tuple[int, int], Any] = {}
        self._turns = 0
        try:
            self._connect()
        except BaseException:
            self.close()
            raise

    def _connect(self) -> None:
        for source in self.sources:
            opened = self._answer(source, Opened)
            source.regions = opened.regions
            source.pair = Pair(slicings(source.layout, self._layout), opened.regions, self._end.memory.regions)
            source.send(Serve(self.transport.describe(), self._layout, self._end.memory.regions))
            self._answer(source, Serving)

            def send(data: bytes, to: SourceProcess = source) -> None:
                to.send(Payload(data))

            source.peer = self.transport.connect(opened.describe, source.pair, send)

    def _answer(self, source: SourceProcess, kind: type[T]) -> T:
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline_s:
            message = source.take()
            if isinstance(message, kind):
                return message
            source.check_alive()
            self.transport.progress()
            time.sleep(0.001)
        raise TransferError(FailureKind.TIMEOUT, f"the source process was not ready within {START_TIMEOUT_S:g} s")

    def turn(self) -> None:
        """One turn of what a transfer thread does."""
        for source in self.sources:
            while (message := source.take()) is not None:
                if isinstance(message, Payload) and source.peer is not None:
                    source.peer.receive(message.data)
        self.transport.progress()
        self._turns += 1
        if self._turns % 256 == 0:
            for source in self.sources:
                source.check_alive()
        if self.device is None:
            os.sched_yield()  # the source may need this core

    def start(self, case: Case, maps: list[tuple[I64, I64]]) -> list[Pull]:
        """Starts a pull for each map (remote, local) from every source."""
        pulls = []
        for source in self.sources:
            assert source.peer is not None
            for remote, local in maps:
                pulls.append(self.transport.pull(source.peer, [BlockMap(case.group, remote, local)]))
        return pulls

    def wait(self, pulls: Sequence[Pull]) -> None:
        """Until all are done. Raises the error of one that failed."""
        deadline_s = time.monotonic() + PULL_TIMEOUT_S
        running = list(pulls)
        while running:
            self.turn()
            running = [pull for pull in running if pull.poll() is PullState.RUNNING]
            if running and time.monotonic() > deadline_s:
                raise TransferError(FailureKind.TIMEOUT, f"a pull did not end within {PULL_TIMEOUT_S:g} s")
        for pull in pulls:
            if pull.poll() is PullState.FAILED:
                raise pull.error()

    def finish(self, pulls: Sequence[Pull]) -> None:
        deadline_s = time.monotonic() + PULL_TIMEOUT_S
        open_pulls = list(pulls)
        while open_pulls := [pull for pull in open_pulls if not pull.close()]:
            self.turn()
            if time.monotonic() > deadline_s:
                raise TransferError(FailureKind.TIMEOUT, f"a pull was not given back within {PULL_TIMEOUT_S:g} s")

    def maps(self, case: Case) -> list[tuple[I64, I64]]:
        """``in_flight`` requests that move all pieces of a group together: ``(remote, local)`` of each."""
        pair = self.sources[0].pair
        assert pair is not None
        slicing = pair.slicings[case.group]
        order = np.random.default_rng(_SCATTER_SEED)
        remote = _table(pair.source[case.group].num_blocks, slicing.source.pieces_per_block, case.scattered, order)
        local = _table(pair.reader[case.group].num_blocks, slicing.reader.pieces_per_block, case.scattered, order)
        return list(zip(np.array_split(remote, case.in_flight), np.array_split(local, case.in_flight), strict=True))

    def measure(self, case: Case) -> dict[str, Any]:
        """Pulls as often as the job says, checks every byte, and returns the record."""
        maps = self.maps(case)
        self._end.tensor(case.group).zero_()
        synchronize(self.device)
        seconds, posting = [], []
        size_bytes = descriptors = 0
        for number in range(self.job.warmup + self.job.repeats):
            start_s = time.perf_counter()
            pulls = self.start(case, maps)
            posted_s = time.perf_counter()
            self.wait(pulls)
            end_s = time.perf_counter()
            size_bytes = sum(pull.size_bytes for pull in pulls)
            descriptors = sum(pull.num_descriptors for pull in pulls)
            self.finish(pulls)
            if number >= self.job.warmup:
                seconds.append(end_s - start_s)
                posting.append(posted_s - start_s)
        self._verify(case, maps)
        median_s = statistics.median(seconds)
        return {
            "kind": "case",
            "lane": self.job.lane,
            "block_bytes": case.block_bytes or self._end.memory.regions[-1].block_bytes,
            "scattered": case.scattered,
            "in_flight": case.in_flight,
            "size_bytes": size_bytes,
            "descriptors": descriptors,
            "seconds": seconds,
            "median_s": median_s,
            "host_s": statistics.median(posting),
            "gb_per_s": size_bytes / median_s / 1e9,
        }

    def _verify(self, case: Case, maps: list[tuple[I64, I64]]) -> None:
        remote, local = (np.concatenate([pair[side] for pair in maps]) for side in (0, 1))
        for source in self.sources:
            assert source.pair is not None
            region = source.pair.source[case.group]
            theirs = self._bytes_of(source, case.group, region)
            ours = self._end.tensor(case.group)
            if case.group == len(self._layout.groups):
                right = content.equal_blocks(ours, local, theirs, remote, region.block_bytes)
            else:
                tokens = min(self.job.tokens)
                right = content.equal(
                    content.pieces(ours, self._layout, case.group, tokens),
                    local,
                    content.pieces(theirs, source.layout, case.group, tokens),
                    remote,
                    content.shared_heads(source.layout, self._layout, case.group),
                )
            if not right:
                how = "scattered" if case.scattered else "contiguous"
                raise TransferError(
                    FailureKind.TRANSFER,
                    f"wrong bytes in {how} blocks of {case.block_bytes} bytes, {case.in_flight} requests; a mistake of "
                    "pd-serve or of a library: please report it",
                )

    def _bytes_of(self, source: SourceProcess, group: int, region: Region) -> Any:
        """What the source's group holds, made here; of one group at a time."""
        key = (source.rank, group)
        if key not in self._expected:
            self._expected = {known: value for known, value in self._expected.items() if known[1] == group}
            like = as_tensor(self._end.memory.regions[group], self.device)
            made = like.new_empty(region.size_bytes)
            content.fill(made, SEED + source.rank)
            self._expected[key] = made
        return self._expected[key]

    def close(self) -> None:
        for source in self.sources:
            if source.peer is not None:
                source.peer.close()
                source.peer = None
        self._end.close()


def _table(num_blocks: int, parts: int, scattered: bool, order: np.random.Generator) -> I64:
    """The pieces of a prompt whose blocks lie side by side, or anywhere in the pool."""
    blocks = order.permutation(num_blocks) if scattered else np.arange(num_blocks)
    return (blocks.astype(np.int64)[:, None] * parts + np.arange(parts, dtype=np.int64)).ravel()
