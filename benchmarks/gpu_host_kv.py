"""A host tier beside one GPU: how fast KV blocks go there and come back, and what decode steps lose meanwhile.

``python -m benchmarks.gpu_host_kv [--layers 32] [--gib 8] [--batch 32] [--context 1024]``: Llama-3.1-8B's shape with
made-up weights. Prints lines that begin with RESULT: whether blocks come back as they were; GB/s of stores and loads,
beside one long copy of registered memory in the same run; milliseconds of a decode step alone and beside each.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import threading
import time
from collections.abc import Callable

import numpy as np
import torch

from benchmarks.gpu_engine import BLOCK, ROW, decode_ms, make_executor, scattered
from pd_serve.compute.cuda.host_copies import CHUNK_BYTES, CudaHostMover
from pd_serve.kv.tiers import Copy
from pd_serve.memory.host_tier import TierMemory

STORE_BLOCKS = 256  # as many as an engine stores at a time


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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--gib", type=float, default=8.0, help="of the host tier")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    executor, layout = make_executor(options.layers)
    each = layout.block_bytes(0)
    start = time.perf_counter()
    memory = TierMemory(layout, int(options.gib * 2**30))
    mover = CudaHostMover(executor.memory()[0], memory, pin=True)
    made_ms = (time.perf_counter() - start) * 1e3
    slots = memory.num_slots[0] - 1
    per_seq = -(-(options.context + 64) // BLOCK)
    tables = scattered(np.random.default_rng(1), executor.num_blocks, options.batch, per_seq)
    used = set(tables.ravel().tolist())
    free = [block for block in range(1, executor.num_blocks) if block not in used][:slots]
    order = np.random.default_rng(2).permutation(len(free)) + 1
    copies = [Copy(0, block, int(slot)) for block, slot in zip(free, order, strict=True)]
    print(f"RESULT {len(copies)} blocks of {each >> 20} MiB, made in {made_ms:.0f} ms", flush=True)

    pool = executor._pool.tensors()[0].view(-1, each)
    some = [copy.block for copy in copies[:64]]
    values = torch.randint(0, 256, (len(some), each), dtype=torch.uint8, device="cuda")
    pool[some] = values
    torch.cuda.synchronize()
    start = time.perf_counter()
    mover.store(copies)  # waits for what is still to be registered
    chunks = -(-memory.size_bytes // CHUNK_BYTES)
    print(f"RESULT first store of all, {chunks} chunks registered: {time.perf_counter() - start:.2f} s", flush=True)
    pool[some] = 0
    torch.cuda.synchronize()
    mover.load(copies[:64])
    print(f"RESULT blocks come back as they were: {bool(torch.equal(pool[some], values))}", flush=True)
    first = ctypes.string_at(memory.place(0, copies[0].slot), 16).hex()
    print(f"RESULT the host has them: {first == bytes(values[0][:16].tolist()).hex()}", flush=True)

    limits = bus_rates()
    for name, move, limit in (("store", mover.store, limits[0]), ("load", mover.load, limits[1])):
        for at_once in (1, 16, STORE_BLOCKS, len(copies)):
            found = rate(move, copies[: max(at_once, 512)], at_once, each)
            print(
                f"RESULT {name} {at_once} blocks at a time: {found / 1e9:.1f} GB/s, {found / limit:.2f} of the bus",
                flush=True,
            )

    def decode() -> float:
        return decode_ms(executor, options.batch, options.context, tables, ROW)

    decode()
    alone = decode()
    print(f"RESULT decode batch={options.batch} context={options.context}: {alone:.2f} ms alone", flush=True)
    for name, move in (("stores", mover.store), ("loads", mover.load)):
        ms, blocks = beside(move, copies, decode)
        print(
            f"RESULT decode beside {name} at {blocks * each / 1e9:.1f} GB/s: {ms:.2f} ms, {ms / alone - 1:+.1%}",
            flush=True,
        )
    mover.close()
    executor.close()


if __name__ == "__main__":
    main()
