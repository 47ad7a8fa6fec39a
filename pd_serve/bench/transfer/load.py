"""How much slower a GPU decodes while it pulls: linears of decode shape, as a CUDA graph, alone and during pulls.

Called by the reader process, on its thread alone: work is only given to the GPU here, so pulls and linears overlap.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from pd_serve.bench.transfer.job import Case, cases
from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.base import Pull, PullState

if TYPE_CHECKING:
    from pd_serve.bench.transfer.reading import ReaderEnd

BATCHES = (1, 32, 256)  # sequences that decode
# The linears of one decoder layer of an 8B model, (in, out): together 436 MB, far more than any cache holds.
SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))
LAYERS = 4
SECONDS = 0.5  # of each measurement
_WARMUP_STEPS = 10
_QUEUED = 2  # steps given to the GPU ahead, so that it never waits for Python
_PULLS = 2  # at once, so that the link never waits for Python


class Linears:
    """One step of them as a graph."""

    def __init__(self, device: int, batch: int) -> None:
        options: dict[str, Any] = {"device": f"cuda:{device}", "dtype": torch.bfloat16}
        inputs = {width: torch.randn(batch, width, **options) for width, _ in SHAPES}
        weights = [torch.randn(out, width, **options) for _ in range(LAYERS) for width, out in SHAPES]
        self._stream: torch.cuda.Stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._keep: object = (inputs, weights)

        def step() -> None:
            for weight in weights:
                torch.nn.functional.linear(inputs[weight.shape[1]], weight)

        self._stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(self._stream):
            for _ in range(3):
                step()
        self._stream.synchronize()
        self._graph = torch.cuda.CUDAGraph()
        # relaxed: threads of NIXL may call the driver meanwhile
        with torch.cuda.graph(self._graph, stream=self._stream, capture_error_mode="relaxed"):
            step()

    def submit(self) -> tuple[torch.cuda.Event, torch.cuda.Event]:
        """One step; the events before and after it."""
        before, after = (_event() for _ in range(2))
        with torch.cuda.stream(self._stream):
            before.record(self._stream)
            self._graph.replay()
            after.record(self._stream)
        return before, after

    def synchronize(self) -> None:
        self._stream.synchronize()


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]


def measure_under_load(end: ReaderEnd) -> Iterator[dict[str, Any]]:
    """A record for each batch and block size."""
    assert end.device is not None
    for batch in BATCHES:
        linears = Linears(end.device, batch)
        alone_ms = _run(linears, None)[0]
        for case in _cases(end):
            pulls = _Pulls(end, case)
            try:
                loaded_ms, seconds = _run(linears, pulls)
                gb_per_s = pulls.bytes / seconds / 1e9
            finally:
                pulls.close()
            yield {
                "kind": "load",
                "lane": end.job.lane,
                "batch": batch,
                "block_bytes": case.block_bytes,
                "alone_ms": alone_ms,
                "loaded_ms": loaded_ms,
                "slowdown": loaded_ms / alone_ms,
                "gb_per_s": gb_per_s,
            }
        # once more alone: a GPU that got slower meanwhile would be taken for the pulls' doing
        again_ms = _run(linears, None)[0]
        yield {"kind": "load_check", "lane": end.job.lane, "batch": batch, "alone_ms": alone_ms, "again_ms": again_ms}
        del linears


def _cases(end: ReaderEnd) -> list[Case]:
    return [case for case in cases(end.job) if case.scattered and case.in_flight == min(end.job.in_flight)]


class _Pulls:
    """Pulls of all blocks of a case, over and over; half of the blocks a pull, so that one follows on the other."""

    def __init__(self, end: ReaderEnd, case: Case) -> None:
        self._end = end
        self._case = case
        self._maps = [m for m in end.maps(Case(case.group, case.block_bytes, True, _PULLS)) if len(m[0])]
        self._running: deque[tuple[int, list[Pull]]] = deque()
        for number in range(len(self._maps)):
            self._start(number)
        self.bytes = 0  # of pulls that ended

    def _start(self, number: int) -> None:
        self._running.append((number, self._end.start(self._case, [self._maps[number]])))

    def turn(self) -> None:
        self._end.turn()
        number, pulls = self._running[0]
        states = [pull.poll() for pull in pulls]
        if PullState.FAILED in states:
            raise next(pull.error() for pull in pulls if pull.poll() is PullState.FAILED)
        if PullState.RUNNING in states:
            return
        self._running.popleft()
        self.bytes += sum(pull.size_bytes for pull in pulls)
        self._end.finish(pulls)
        self._start(number)

    def close(self) -> None:
        while self._running:
            pulls = self._running.popleft()[1]
            try:
                self._end.wait(pulls)
            except TransferError:
                pass  # its end is all that matters here
            self._end.finish(pulls)


def _run(linears: Linears, pulls: _Pulls | None) -> tuple[float, float]:
    """Median milliseconds of a step, and the seconds that all of it took."""
    milliseconds: list[float] = []
    queued: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
    start_s = time.perf_counter()
    if pulls is not None:
        pulls.bytes = 0
    while True:
        now_s = time.perf_counter() - start_s
        if now_s < SECONDS:
            while len(queued) < _QUEUED:
                queued.append(linears.submit())
        elif not queued:
            break
        elif now_s > SECONDS + 10:
            raise TransferError(FailureKind.TIMEOUT, "linears did not end while blocks were pulled")
        if pulls is not None:
            pulls.turn()
        while queued and queued[0][1].query():  # type: ignore[no-untyped-call]
            before, after = queued.popleft()
            milliseconds.append(before.elapsed_time(after))
    linears.synchronize()
    return statistics.median(milliseconds[min(_WARMUP_STEPS, len(milliseconds) // 2) :]), time.perf_counter() - start_s
