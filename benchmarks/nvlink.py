"""What moves blocks between two GPUs fastest, and what it costs what computes meanwhile: the figures of cuda_mover.py.

    python benchmarks/nvlink.py [--part copy,load,checksum]

One process, source on cuda:0, reader on cuda:1. Prints RESULT lines; rates stand beside a contiguous copy's of the same
run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from pd_serve.transfer.movers import cuda as cuda_mover
from pd_serve.transfer.movers.base import Rows
from pd_serve.transfer.movers.cuda import CudaMover
from pd_serve.transfer.movers.cuda_calls import check, driver

MIB = 1 << 20
POOL_BYTES = 4096 * MIB
ONE_ROW = np.zeros(1, dtype=np.int64)


def wait(work: cuda_mover.CudaWork) -> None:
    while not work.done():
        pass


def rate(run: Callable[[], object], size_bytes: int, repeats: int = 7) -> float:
    """Median GB/s of a whole pull, from the call to its end seen by the host."""
    seconds = []
    run()
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    return size_bytes / statistics.median(seconds) / 1e9


def blocks(base: int, size: int, count: int, seed: int) -> Rows:
    """``count`` random different blocks of the pool."""
    chosen = np.random.default_rng(seed).permutation(POOL_BYTES // size)[:count]
    return Rows(base, chosen.astype(np.int64) * size, ONE_ROW, size)


class Linears:
    """The linears of decoder layers of an 8B model in bf16, replayed as a CUDA graph."""

    SHAPES = ((4096, 6144), (4096, 4096), (4096, 28672), (14336, 4096))

    def __init__(self, batch: int, layers: int = 8) -> None:
        with torch.cuda.device(1):
            weights = [
                [torch.randn(o, i, device=1, dtype=torch.bfloat16) for i, o in self.SHAPES] for _ in range(layers)
            ]
            inputs = {i: torch.randn(batch, i, device=1, dtype=torch.bfloat16) for i, _ in self.SHAPES}
            self.stream = torch.cuda.Stream(device=1)
            with torch.cuda.stream(self.stream):
                for w in weights[0]:
                    inputs[w.shape[1]] @ w.T
            torch.cuda.synchronize(1)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.stream):
                for layer in weights:
                    for w in layer:
                        torch.mm(inputs[w.shape[1]], w.T)
            self.keep = (weights, inputs)

    def milliseconds(self, steps: int, meanwhile: Callable[[], object]) -> float:
        with torch.cuda.device(1), torch.cuda.stream(self.stream):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            for _ in range(steps):
                self.graph.replay()
            last.record()
        while not last.query():
            meanwhile()
        return first.elapsed_time(last) / steps


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", default="copy,load,checksum")
    options = parser.parse_args()
    source = torch.empty(POOL_BYTES, dtype=torch.uint8, device="cuda:0")
    source.view(torch.int64).random_()
    target = torch.zeros(POOL_BYTES, dtype=torch.uint8, device="cuda:1")
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    mover = CudaMover(1)
    there = check(
        driver.cuDevicePrimaryCtxRetain(check(driver.cuDeviceGet(0), "cuDeviceGet")), "cuDevicePrimaryCtxRetain"
    )
    check(driver.cuCtxEnablePeerAccess(there, 0), "cuCtxEnablePeerAccess")
    stream = mover._copies

    def contiguous(size: int) -> float:
        def run() -> None:
            check(driver.cuMemcpyAsync(target.data_ptr(), source.data_ptr(), size, stream), "cuMemcpyAsync")
            wait(cuda_mover.CudaWork(mover, stream, []))

        return rate(run, size)

    def pull(size: int, total: int, mode: str) -> tuple[float, float]:
        cuda_mover.ENGINE_MIN_BYTES = 0 if mode == "engine" else 1 << 60
        a = blocks(source.data_ptr(), size, total // size, 1)
        b = blocks(target.data_ptr(), size, total // size, 2)
        cost = []

        def run() -> None:
            start = time.perf_counter()
            work = mover.copy([(a, b)])
            cost.append(time.perf_counter() - start)
            wait(work)

        gbs = rate(run, total)
        for i in (0, len(a.starts) // 2, len(a.starts) - 1):
            left, right = int(a.starts[i]), int(b.starts[i])
            assert torch.equal(source[left : left + size].cpu(), target[right : right + size].cpu()), "wrong bytes"
        return gbs, statistics.median(cost) * 1e6

    if "copy" in options.part:
        for size in (64, 256, 1024, 3072):
            limit = contiguous(size * MIB)
            gbs, us = pull(2 * MIB, size * MIB, "engine")
            print(f"RESULT {size}MiB limit {limit:.1f}; engines 2MiB {gbs / limit:.3f} ({us:.0f}us)", flush=True)
            line = []
            for programs in (12, 16, 20, 24, 32):
                mover._programs = programs
                gbs, us = pull(32 << 10, size * MIB, "kernel")
                line.append(f"{programs} {gbs / limit:.3f} ({us:.0f}us)")
            mover._programs = 16
            print(f"RESULT {size}MiB limit {limit:.1f}; bulk 32KiB, programs:", ", ".join(line), flush=True)
        limit = contiguous(1024 * MIB)
        for size in (4 << 10, 8 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, MIB):
            kernel, engine = pull(size, 1024 * MIB, "kernel"), pull(size, 1024 * MIB, "engine")
            print(
                f"RESULT 1GiB of {size >> 10}K limit {limit:.1f}: kernel {kernel[0]:.0f} ({kernel[1]:.0f}us), "
                f"engines {engine[0]:.0f} ({engine[1]:.0f}us)",
                flush=True,
            )
        bulk, mover._bulk = mover._bulk, None
        for programs in (8, 16, 33):
            mover._programs = programs
            line = [f"{size >> 10}K {pull(size, 1024 * MIB, 'kernel')[0]:.0f}" for size in (4 << 10, 32 << 10)]
            print(f"RESULT words16 ctas={4 * programs}:", ", ".join(line), flush=True)
        mover._bulk = bulk
        mover._programs = 16

    if "checksum" in options.part:
        rows = blocks(target.data_ptr(), 2 * MIB, 128, 3)
        for programs in (1, 2, 4, 8):
            cuda_mover.CHECKSUM_PROGRAMS_PER_SM = programs
            gbs = rate(lambda: wait(mover.checksums(rows)), 256 * MIB)
            print(f"RESULT checksum per_sm={programs} {gbs:.0f} GB/s", flush=True)
        cuda_mover.CHECKSUM_PROGRAMS_PER_SM = 4

    if "load" in options.part:
        for batch in (1, 32, 256):
            linears = Linears(batch)
            linears.milliseconds(20, lambda: time.sleep(0.001))
            alone = linears.milliseconds(200, lambda: time.sleep(0.001))
            line = [f"alone {alone:.3f} ms"]
            cases = [("memcpy", 0), ("engine", 0)]
            cases += [("kernel", n) for n in (4, 6, 8, 12, 16)]
            for mode, number in cases:
                cuda_mover.ENGINE_MIN_BYTES = 0 if mode == "engine" else 1 << 60
                mover._programs = number
                a = blocks(source.data_ptr(), 2 * MIB, 512, 1)
                b = blocks(target.data_ptr(), 2 * MIB, 512, 2)
                moved = [0]

                def meanwhile(mode: str = mode, a: Rows = a, b: Rows = b, moved: list[int] = moved) -> None:
                    if mode == "memcpy":
                        check(driver.cuMemcpyAsync(target.data_ptr(), source.data_ptr(), 1024 * MIB, stream), "copy")
                        wait(cuda_mover.CudaWork(mover, stream, []))
                    else:
                        wait(mover.copy([(a, b)]))
                    moved[0] += 1024 * MIB

                start = time.perf_counter()
                taken = linears.milliseconds(300, meanwhile)
                gbs = moved[0] / (time.perf_counter() - start) / 1e9
                line.append(f"{mode}{number or ''} x{taken / alone:.3f} at {gbs:.0f} GB/s")
            again = linears.milliseconds(200, lambda: time.sleep(0.001))
            print(f"RESULT load batch={batch}:", ", ".join(line), f"(alone again {again:.3f})", flush=True)
            del linears


if __name__ == "__main__":
    main()
