"""A host tier beside one GPU: how fast KV blocks go there and come back, and what decode steps lose meanwhile.

``python -m benchmarks.gpu_host_kv [--layers 32] [--gib 8] [--batches 1 32] [--context 1024] [--sweep]``: Llama-3.1-8B's
shape with made-up weights. Prints lines that begin with RESULT: decode steps while host memory is registered; whether
blocks come back as they were; GB/s of stores and loads, beside one long copy of registered memory in the same run; what
a decode step loses beside each, of five measurements by turns with steps alone the middle one, the least and the most.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import threading
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from benchmarks.gpu_engine import BLOCK, ROW, decode_ms, make_executor, scattered
from pd_serve.compute.cuda import host_copies
from pd_serve.compute.cuda.executor import CudaExecutor
from pd_serve.compute.cuda.host_copies import CudaHostMover
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory

STORE_BLOCKS = 256  # as many as an engine stores at a time
REPEATS = 5
FEW = 8  # steps
SWEEP = ((24, 2), (24, 1), (16, 2), (16, 1), (8, 2), (8, 1))  # MiB of a part, parts on their way


def bus_rates(size: int = 1 << 30) -> tuple[float, float]:
    """Bytes a second of one copy to the host, and of one to the device."""
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    found = []
    for target, source in ((host, device), (device, host)):
        seconds = []
        for _ in range(5):
            start = time.perf_counter()
            target.copy_(source, non_blocking=True)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        found.append(size / min(seconds))
    return found[0], found[1]


def rate(move: Callable[[list[Copy]], None], copies: list[Copy], at_once: int, block_bytes: int) -> float:
    parts = [copies[at : at + at_once] for at in range(0, len(copies), at_once)]
    best = 0.0
    for _ in range(4):
        start = time.perf_counter()
        for part in parts:
            move(part)
        best = max(best, len(copies) * block_bytes / (time.perf_counter() - start))
    return best


def beside(move: Callable[[list[Copy]], None], copies: list[Copy], decode: Callable[[], float]) -> tuple[float, float]:
    """Milliseconds of a decode step while blocks are moved all the time, and bytes a second of them, in blocks."""
    stop, moved = threading.Event(), [0]

    def run() -> None:
        at = 0
        while not stop.is_set():
            part = copies[at : at + STORE_BLOCKS]
            move(part)
            moved[0] += len(part)
            at = (at + STORE_BLOCKS) % len(copies)

    thread = threading.Thread(target=run)
    thread.start()
    time.sleep(0.05)
    begun, start = moved[0], time.perf_counter()
    ms = decode()
    blocks = (moved[0] - begun) / (time.perf_counter() - start)
    stop.set()
    thread.join()
    return ms, blocks


def registered(executor: CudaExecutor, memory: TierMemory, decode: Callable[..., float]) -> CudaHostMover:
    """A mover whose memory is registered, while steps are computed."""
    alone, start = decode(), time.perf_counter()
    mover = CudaHostMover(executor.memory()[0], memory, pin=True)
    made_ms = (time.perf_counter() - start) * 1e3
    steps = []
    while mover._pinning is not None and mover._pinning.is_alive():
        before = time.perf_counter()
        decode(steps=FEW)
        steps.append((time.perf_counter() - before) / FEW * 1e3)
    print(
        f"RESULT made in {made_ms:.0f} ms; {memory.size_bytes / 2**30:.1f} GiB registered in "
        f"{time.perf_counter() - start:.2f} s, steps meanwhile, means of {FEW}: "
        f"{', '.join(f'{ms:.1f}' for ms in steps)} ms; {alone:.2f} before",
        flush=True,
    )
    return mover


def comes_back(executor: CudaExecutor, mover: CudaHostMover, memory: TierMemory, copies: list[Copy]) -> None:
    each = executor.memory()[0].regions[0].block_bytes
    pool = executor._pool.tensors()[0].view(-1, each)
    some = [copy.block for copy in copies[:64]]
    values = torch.randint(0, 256, (len(some), each), dtype=torch.uint8, device="cuda")
    pool[some] = values
    torch.cuda.synchronize()
    start = time.perf_counter()
    mover.store(copies)
    print(f"RESULT first store of all: {time.perf_counter() - start:.2f} s", flush=True)
    pool[some] = 0
    torch.cuda.synchronize()
    mover.load(copies[:64])
    print(f"RESULT blocks come back as they were: {bool(torch.equal(pool[some], values))}", flush=True)
    first = ctypes.string_at(memory.place(0, copies[0].slot), 16).hex()
    print(f"RESULT the host has them: {first == bytes(values[0][:16].tolist()).hex()}", flush=True)


def rates(mover: CudaHostMover, copies: list[Copy], each: int, limits: tuple[float, float]) -> None:
    for name, move, limit in (("store", mover.store, limits[0]), ("load", mover.load, limits[1])):
        for at_once in (1, 16, STORE_BLOCKS, len(copies)):
            found = rate(move, copies[: max(at_once, 512)], at_once, each)
            print(
                f"RESULT {name} {at_once} blocks at a time: {found / 1e9:.1f} GB/s, {found / limit:.2f} of the bus",
                flush=True,
            )


def slowdown(move: Callable[[list[Copy]], None], copies: list[Copy], decode: Callable[[], float], each: int) -> str:
    """Decode steps alone and beside copies by turns."""
    found = []
    for _ in range(REPEATS):
        alone = decode()
        ms, blocks = beside(move, copies, decode)
        found.append((ms / alone - 1, alone, ms, blocks * each / 1e9))
    lost, alone, ms, gb = sorted(found)[REPEATS // 2]
    low, high = min(found)[0], max(found)[0]
    return f"{lost:+.1%} ({low:+.1%} to {high:+.1%}), {alone:.2f} ms alone, {ms:.2f} beside {gb:.1f} GB/s"


def sweep(mover: CudaHostMover, copies: list[Copy], decode: Callable[[], float], each: int, bus: float) -> None:
    """Loads in parts of several sizes: what a step loses, and what is left of the bus where nothing else runs."""
    kept = host_copies.PART_BYTES, host_copies.IN_FLIGHT
    for mib, in_flight in SWEEP:
        host_copies.PART_BYTES, host_copies.IN_FLIGHT = mib << 20, in_flight
        found = rate(mover.load, copies[:512], STORE_BLOCKS, each)
        print(
            f"RESULT loads of {mib} MiB, {in_flight} on their way: {found / bus:.2f} of the bus; decode "
            f"{slowdown(mover.load, copies, decode, each)}",
            flush=True,
        )
    host_copies.PART_BYTES, host_copies.IN_FLIGHT = kept


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gib", type=float, default=8.0, help="of the host tier")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="rows of a decode step")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--sweep", action="store_true", help="also loads in parts of other sizes")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    executor, layout = make_executor(options.layers)
    each = layout.block_bytes(0)
    per_seq = -(-(options.context + 64) // BLOCK)
    tables = scattered(np.random.default_rng(1), executor.num_blocks, max(options.batches), per_seq)

    def decode(batch: int, steps: int = 40) -> float:
        return decode_ms(executor, batch, options.context, tables[:batch], ROW, steps)

    last = options.batches[-1]
    decode(last)
    memory = TierMemory(layout, int(options.gib * 2**30))
    mover = registered(executor, memory, partial(decode, last))
    used = set(tables.ravel().tolist())
    free = [block for block in range(1, executor.num_blocks) if block not in used][: memory.num_slots[0] - 1]
    order = np.random.default_rng(2).permutation(len(free)) + 1
    copies = [Copy(0, block, int(slot)) for block, slot in zip(free, order, strict=True)]
    print(f"RESULT {len(copies)} blocks of {each >> 20} MiB", flush=True)
    comes_back(executor, mover, memory, copies)
    limits = bus_rates()
    rates(mover, copies, each, limits)
    for batch in options.batches:
        decode(batch)
        for name, move in (("stores", mover.store), ("loads", mover.load)):
            found = slowdown(move, copies, partial(decode, batch), each)
            print(f"RESULT decode of {batch} at {options.context} beside {name}: {found}", flush=True)
    if options.sweep:
        sweep(mover, copies, partial(decode, last), each, limits[1])
    mover.close()
    executor.close()


if __name__ == "__main__":
    main()
