"""What steps of the executor on one GPU spend their time on, by torch's profiler: the model of ``gpu_engine.py``.

``python -m benchmarks.gpu_profile [--shape qwen3-30b-a3b] [--layers 32] [--eager] [--kernels 12]``. A step lasts from
the end of the one before to its own, as the device sees it; of that, *gaps* is the time in which no kernel and no copy
ran. For each batch size and each prompt a line that begins with RESULT, then the longest kernels and the longest gaps,
with what was around. A profiler makes gaps longer: the time of a step without it stands beside.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np
import torch
from torch.autograd import DeviceType

from benchmarks.gpu_engine import BLOCK, SHAPES, decode_ms, make_executor, scattered, step
from benchmarks.gpu_engine import ROW as GREEDY
from pd_serve.compute.cuda.executor import CudaExecutor

KINDS = {  # by what kernels are called, the first that fits
    "experts": ("_grouped", "_route", "_combine"),
    "attention": (
        "xqa",
        "mha",
        "flash",
        "attend",
        "prefillwith",
        "batchprefill",
        "batchdecode",
        "mergestate",
        "paged",
        "unpack",
    ),
    "linears": (
        *("gemv", "split_k", "_multiply", "_quantise", "gemm", "nvjet", "cutlass", "cublas", "splitk", "dot_kernel"),
        "wgmma",
    ),
    "sampling": ("adjust", "race", "collect", "count", "threshold", "finish", "logprob", "narrow", "take_samples"),
    "copies": ("memcpy", "memset"),
}
REST = "norms, rotation, activation"
STEPS = 12
WARM = 4
CONTEXT = 1024


class Work(NamedTuple):
    """A kernel or a copy, in microseconds of the device's clock."""

    name: str
    start: float
    end: float


def kind_of(name: str) -> str:
    lower = name.lower()
    return next((kind for kind, words in KINDS.items() if any(word in lower for word in words)), REST)


def traced(run: Callable[[], None]) -> list[Work]:
    """All that the device did in ``run``, in order."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as trace:
        run()
        torch.cuda.synchronize()
    work = [
        Work(event.name, event.time_range.start, event.time_range.end)
        for event in trace.events() or ()
        if event.device_type == DeviceType.CUDA
    ]
    return sorted(work, key=lambda each: each.start)


def steps_of(work: list[Work], count: int) -> list[list[Work]]:
    """By step: each ends with a kernel that runs once in a step, the last of those."""
    number = Counter(each.name for each in work)
    once = [name for name, times in number.items() if times == count]
    if not once:
        raise SystemExit(f"no kernel ran {count} times: {number.most_common(5)}")
    mark = max(once, key=lambda name: max(each.start for each in work if each.name == name))
    steps: list[list[Work]] = [[]]
    for each in work:
        steps[-1].append(each)
        if each.name == mark:
            steps.append([])
    return steps[:count]


class Shares:
    """Of some steps: microseconds a step by kind of work, by kernel, and idle ones by what was before and after."""

    def __init__(self, steps: list[list[Work]], *, queued_ahead: bool) -> None:
        """``queued_ahead``: the time between two steps is the device's, too, not the host's that waits for it."""
        self.count = len(steps) - 1
        self.kinds: defaultdict[str, float] = defaultdict(float)
        self.kernels: defaultdict[str, list[float]] = defaultdict(list)
        self.gaps: defaultdict[tuple[str, str], float] = defaultdict(float)
        self.span = 0.0
        for before, one in itertools.pairwise(steps):
            last = before[-1] if queued_ahead else one[0]
            at = last.end if queued_ahead else one[0].start
            self.span += max(each.end for each in one) - at
            for each in one:
                if each.start > at:
                    self.gaps[last.name, each.name] += each.start - at
                self.kinds[kind_of(each.name)] += max(0.0, each.end - max(at, each.start))
                self.kernels[each.name].append(each.end - each.start)
                if each.end > at:
                    at, last = each.end, each

    def line(self) -> str:
        parts = [*KINDS, REST]
        named = {kind: self.kinds[kind] / self.count / 1e3 for kind in parts}
        idle = sum(self.gaps.values()) / self.count / 1e3
        shown = "  ".join(f"{kind} {ms:.2f}" for kind, ms in named.items())
        total = self.span / self.count / 1e3
        return f"{total:.2f} ms on the device: {shown}  gaps {idle:.2f} ({idle / total:.1%})"

    def details(self, most: int) -> Iterable[str]:
        for name, times in sorted(self.kernels.items(), key=lambda item: -sum(item[1]))[:most]:
            each, number = statistics.median(times), len(times) / self.count
            yield f"{sum(times) / self.count / 1e3:8.3f} ms {number:5.0f} x {each:7.1f} us  {name[:100]}"
        for (before, after), us in sorted(self.gaps.items(), key=lambda item: -item[1])[:5]:
            yield f"{us / self.count / 1e3:8.3f} ms idle after {before[:50]} before {after[:50]}"


def decode(executor: CudaExecutor, batch: int, rng: np.random.Generator) -> tuple[str, Shares]:
    tables = scattered(rng, executor.num_blocks, batch, -(-(CONTEXT + 64) // BLOCK))
    plain_ms = decode_ms(executor, batch, CONTEXT, tables, GREEDY)
    queueing: list[float] = []

    def run() -> None:
        before = None
        for i in range(STEPS):
            data = step([1] * batch, CONTEXT + i, tables, i > 0)
            start = time.perf_counter()
            launched = executor.launch(data)
            queueing.append((time.perf_counter() - start) * 1e3)
            if before is not None:
                executor.collect(before)
            before = launched
        assert before is not None
        executor.collect(before)

    steps = steps_of(traced(run), STEPS)[WARM:]
    host = f"{plain_ms:.2f} ms without a profiler, queued in {statistics.median(queueing):.2f}"
    return f"decode batch {batch}: {host}", Shares(steps, queued_ahead=True)


def prefill(executor: CudaExecutor, tokens: int) -> tuple[str, Shares]:
    tables = (np.arange(-(-tokens // BLOCK)) + 1).astype(np.int32)[None]
    data = step([tokens], 0, tables, False)
    whole: list[float] = []
    queueing: list[float] = []

    def run() -> None:
        for _ in range(STEPS):
            start = time.perf_counter()
            launched = executor.launch(data)
            queueing.append((time.perf_counter() - start) * 1e3)
            executor.collect(launched)
            whole.append((time.perf_counter() - start) * 1e3)

    run()
    host = f"{statistics.median(whole):.2f} ms without a profiler, queued in {statistics.median(queueing):.2f}"
    return f"prefill {tokens}: {host}", Shares(steps_of(traced(run), STEPS)[WARM:], queued_ahead=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="llama-3.1-8b")
    parser.add_argument("--layers", type=int, help="fewer than the model has")
    parser.add_argument("--eager", action="store_true")
    parser.add_argument("--kernels", type=int, default=12, help="how many of the longest kernels are shown")
    options = parser.parse_args()
    executor, _ = make_executor(options.layers, eager=options.eager, shape=options.shape)
    rng = np.random.default_rng(1)
    found = [decode(executor, batch, rng) for batch in (1, 32, 256)]
    found += [prefill(executor, tokens) for tokens in (512, 2048, 8192)]
    for title, shares in found:
        print(f"RESULT {title}; {shares.line()}", flush=True)
        for line in shares.details(options.kernels):
            print(f"PROFILE {line}", flush=True)


if __name__ == "__main__":
    main()
