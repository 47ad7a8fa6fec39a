"""Pulls over NIXL, directly and packed, beside one contiguous read of the same memory in the same run.

    python -m benchmarks.nixl_pack --device host
    python -m benchmarks.nixl_pack --device cuda --devices 0,1 --size 268435456

Two processes with a pool of bytes each; control messages go as between nodes, and threads sleep in between.
Every pull is checked by checksums on both sides. ``ratio`` is to the faster of the two contiguous rates.
"""

from __future__ import annotations

import argparse
import dataclasses
import multiprocessing
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pd_serve.bench.transfer.link import Link
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.nixl import Limits, NixlTransport
from pd_serve.transfer.nixl.limits import limits_of
from pd_serve.transfer.session.connection import Listener
from pd_serve.transfer.slices import slicings

WARMUP, REPEATS = 2, 5


def mover_for(device: int | None) -> Mover:
    if device is None:
        from pd_serve.transfer.movers.host import HostMover

        return HostMover()
    from pd_serve.transfer.movers.cuda import CudaMover

    return CudaMover(device)


class End:
    """A pool and a transport, one at a time, over memory that is allocated once."""

    def __init__(self, device: int | None, size: int, seed: int, reads_only: bool) -> None:
        self.reads_only = reads_only
        self.mover = mover_for(device)
        self.device = device
        self.size = size
        self.address = self.mover.allocate(size + PROBE_BLOCKS * PROBE_BLOCK_BYTES)
        rng = np.random.default_rng(seed)
        step = 32 << 20
        for at in range(0, size, step):
            self.mover.write(self.address + at, rng.bytes(min(step, size - at)))
        self._names = 0

    def open(self, layout: KVLayout, limits: Limits) -> None:
        self._names += 1
        block = layout.block_bytes(0)
        regions = (
            Region(self.address, block, self.size // block),
            Region(self.address + self.size, PROBE_BLOCK_BYTES, PROBE_BLOCKS),
        )
        self.memory = PoolMemory(self.device, regions)
        name = f"bench-{id(self)}-{time.time_ns()}-{self._names}"
        self.transport = NixlTransport(name, self.mover, reads_only=self.reads_only, limits=limits)
        self.transport.register(self.memory)

    def sums(self, rows: Any) -> np.ndarray:
        work = self.mover.checksums(rows)
        while not work.done():
            pass
        return work.result()


def wait(link: Link, delay_s: float) -> Iterator[bytes]:
    """Messages, after ``delay_s`` or as soon as there is one."""
    message = link.take(min(delay_s, 0.1))
    while message is not None:
        yield message
        message = link.take()


def source(pipe: Connection, url: str, device: int | None, size: int) -> None:
    end = End(device, size, 1, reads_only=False)
    link = Link.dial(url)
    link.poller.spin = device is not None
    served: Any = None
    pair: Any = None
    pipe.send(None)
    while True:
        delay_s = end.transport.progress() if served is not None else 0.01
        for message in wait(link, delay_s):
            if message == b"quit":
                return
            if message == b"command":
                match pipe.recv():
                    case ("open", layout, limits):
                        end.open(layout, limits)
                        pipe.send((end.transport.describe(), end.memory.regions))
                    case ("serve", description, pair):
                        served = end.transport.serve(description, pair, link.send)
                        pipe.send(None)
                    case ("sums", pieces):
                        pipe.send(end.sums(pair.slicings[0].source_rows(pair.source[0], pieces)))
                    case "close":
                        served.close()
                        served = None
                        end.transport.close()
                        pipe.send(None)
            else:
                served.receive(message)


class Bench:
    def __init__(self, devices: tuple[int | None, int | None], size: int) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.pipe, child = spawn.Pipe()
        listener = Listener("127.0.0.1")
        self.process = spawn.Process(target=source, args=(child, listener.address, devices[0], size), daemon=True)
        self.process.start()
        while not (came := listener.accept()):
            time.sleep(0.01)
        self.link = Link(came[0])
        self.link.poller.spin = devices[1] is not None
        self.end = End(devices[1], size, 2, reads_only=True)
        self.pipe.recv()

    def ask(self, *what: Any) -> Any:
        self.link.send(b"command")
        self.pipe.send(what if len(what) > 1 else what[0])
        return self.pipe.recv()

    def open(self, theirs: KVLayout, ours: KVLayout, limits: Limits) -> None:
        self.end.open(ours, limits)
        description, regions = self.ask("open", theirs, limits)
        self.pair = Pair(slicings(theirs, ours), regions, self.end.memory.regions)
        self.ask("serve", self.end.transport.describe(), self.pair)
        self.peer = self.end.transport.connect(description, self.pair, self.link.send)

    def close(self) -> None:
        self.peer.close()
        self.end.transport.close()
        self.ask("close")

    def pull(self, maps: list[list[BlockMap]]) -> tuple[float, float, int]:
        """Seconds of all pulls together, of starting them, and descriptors. The best of some."""
        best, start = float("inf"), float("inf")
        for attempt in range(WARMUP + REPEATS):
            # a direct read tells nobody when it ends; on a packed pull's way messages do
            look_s = 50e-6
            began = time.perf_counter()
            pulls = [self.end.transport.pull(self.peer, item) for item in maps]
            started = time.perf_counter() - began
            while not all(pull.poll() is not PullState.RUNNING for pull in pulls):
                for message in wait(self.link, min(self.end.transport.progress(), look_s)):
                    self.peer.receive(message)
            seconds = time.perf_counter() - began
            for pull in pulls:
                if pull.poll() is not PullState.DONE:
                    raise pull.error()
                pull.close()
            if attempt >= WARMUP:
                best, start = min(best, seconds), min(start, started)
        return best, start, sum(pull.num_descriptors for pull in pulls)

    def check(self, maps: list[list[BlockMap]]) -> None:
        for item in (one for group in maps for one in group):
            ours = self.end.sums(self.pair.slicings[0].reader_rows(self.pair.reader[0], item.local))
            if not np.array_equal(ours, self.ask("sums", item.remote)):
                sys.exit("what arrived is not what was there")


def layout_of(block_bytes: int, block_size: int = 16, tp: int = 1) -> KVLayout:
    """8 heads of 128 bfloat16 on one rank of ``tp``; ``block_bytes``: of all ranks together, at 16 tokens."""
    heads, dim = (8, 128) if block_bytes >= 64 << 10 else (1, max(1, block_bytes // 64 // 2))
    layers = block_bytes // (2 * heads * 16 * dim * 2)
    group = kv_group(tuple(range(max(1, layers))), heads // tp, dim, None, 0, heads)
    return KVLayout(block_size, "bfloat16", (group,))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("host", "cuda"), default="host")
    parser.add_argument("--devices", default="0,1", help="with cuda: of the source, and of the reader")
    parser.add_argument("--size", type=int, default=0, help="bytes of a pull")
    parser.add_argument("--slot", type=int, default=0, help="bytes of a staging slot, other than the default")
    parser.add_argument("--slots", type=int, default=0, help="staging slots, other than the default")
    parser.add_argument("--chunk", type=int, default=0, help="first chunk in bytes, other than the default")
    parser.add_argument("--blocks", default="8192,32768,131072,524288,2097152", help="block sizes in bytes")
    options = parser.parse_args()
    cuda = options.device == "cuda"
    devices = tuple(int(n) for n in options.devices.split(",")) if cuda else (None, None)
    size = options.size or ((256 << 20) if cuda else (64 << 20))
    limits = limits_of(devices[0])
    if options.slots:
        limits = dataclasses.replace(limits, slots=options.slots, slots_per_peer=options.slots)
    limits = dataclasses.replace(
        limits,
        slot_bytes=options.slot or limits.slot_bytes,
        first_chunk_bytes=options.chunk or limits.first_chunk_bytes,
    )
    packed = dataclasses.replace(limits, direct_bytes=1 << 40, direct_descriptors=0)
    direct = dataclasses.replace(limits, direct_bytes=1)
    bench = Bench((devices[0], devices[1]), 2 * size)
    rng = np.random.default_rng(0)
    print(f"{options.device}, {size >> 20} MiB a pull, {limits}")

    def measure(what: str, theirs: KVLayout, ours: KVLayout, how: Limits, spread: str, limit: float) -> float:
        bench.open(theirs, ours, how)
        slicing, (at_source, *_), (here, *_) = bench.pair.slicings[0], bench.pair.source, bench.pair.reader
        count = size // slicing.piece_bytes
        remote = np.arange(at_source.num_blocks * slicing.source.pieces_per_block, dtype=np.int64)
        local = np.arange(here.num_blocks * slicing.reader.pieces_per_block, dtype=np.int64)
        count = min(count, len(remote), len(local))
        if spread == "random":
            remote, local = rng.permutation(remote), rng.permutation(local)
        parts = 4 if spread == "four" else 1
        maps = [
            [BlockMap(0, r, o)]
            for r, o in zip(np.array_split(remote[:count], parts), np.array_split(local[:count], parts), strict=True)
        ]
        seconds, start, descriptors = bench.pull(maps)
        bench.check(maps)
        bench.close()
        rate = count * slicing.piece_bytes / seconds / 1e9
        ratio = f"{rate / limit:5.2f}" if limit else "     "
        print(
            f"{what:44} {slicing.row_bytes:>8} B rows {descriptors:>6} descriptors {rate:8.2f} GB/s {ratio} "
            f"{seconds * 1e6:9.0f} us, starting it {start * 1e6:6.0f} us",
            flush=True,
        )
        return rate

    whole = layout_of(2 << 20)
    limit = measure("contiguous, one read", whole, whole, direct, "one", 0.0)
    limit = max(limit, measure("contiguous, four reads at once", whole, whole, direct, "four", 0.0))
    for block in (int(b) for b in options.blocks.split(",")):
        same = layout_of(block)
        for name, how in (("direct", direct), ("packed", packed)):
            measure(f"blocks of {block >> 10} KiB, {name}", same, same, how, "random", limit)
    for block in (512 << 10, 2 << 20):
        a = layout_of(block)
        for what, theirs, ours in (
            ("16 to 64 tokens", a, layout_of(block, 64)),
            ("64 to 16 tokens", layout_of(block, 64), a),
            ("TP 2 to 1", layout_of(block, 16, 2), a),
            ("TP 1 to 2", a, layout_of(block, 16, 2)),
        ):
            measure(f"{block >> 10} KiB, {what}, as configured", theirs, ours, limits, "random", limit)
    bench.link.send(b"quit")
    bench.process.join(10)


if __name__ == "__main__":
    main()
