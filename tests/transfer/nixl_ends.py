"""Two NIXL transports with a pair between them: in one process with messages in queues, or the source in its own."""

from __future__ import annotations

import dataclasses
import os
import time
from collections import deque
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState
from pd_serve.transfer.movers.base import Mover
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.nixl import Limits, NixlTransport
from pd_serve.transfer.nixl.limits import HOST
from pd_serve.transfer.nixl.peer import NixlPull
from pd_serve.transfer.slices import Slicing, slicings
from tests.transfer.harness import agent_name, until
from tests.transfer.processes import Killable, start

# everything travels packed, in small chunks; little of it fits into the rings
PACKED = dataclasses.replace(
    HOST,
    direct_bytes=1 << 40,
    direct_descriptors=0,
    slot_bytes=1,
    slots=4,
    slots_per_peer=3,
    first_chunk_bytes=3 << 10,
)
# nothing does
DIRECT = dataclasses.replace(HOST, direct_bytes=1)

_alive: list[Any] = []  # memory must outlive its registration


class Node:
    """A pool of random bytes (``seed``) or of sevens, and a transport on it."""

    def __init__(
        self,
        layout: KVLayout,
        num_blocks: int,
        seed: int | None = None,
        limits: Limits | None = None,
        mover: Mover | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.layout = layout
        self.groups = contents(layout, num_blocks, seed)
        _alive.append(self.groups)
        regions = tuple(Region(a.ctypes.data, a.shape[1], a.shape[0]) for a in self.groups)
        self.memory = PoolMemory(None, regions)
        self.mover = mover or HostMover()
        self.transport = NixlTransport(agent_name("n"), self.mover, limits=limits, clock=clock)
        self.transport.register(self.memory)

    def close(self) -> None:
        self.transport.close()
        self.mover.close()


def contents(layout: KVLayout, num_blocks: int, seed: int | None) -> list[np.ndarray]:
    """One array a group, and the probe region's."""
    rng = np.random.default_rng(seed)
    shapes = [(num_blocks, layout.block_bytes(group)) for group in range(len(layout.groups))]
    shapes.append((PROBE_BLOCKS, PROBE_BLOCK_BYTES))
    if seed is None:
        return [np.full(shape, 7, dtype=np.uint8) for shape in shapes]
    return [rng.integers(0, 256, shape, dtype=np.uint8) for shape in shapes]


def pair_of(source_layout: KVLayout, source: PoolMemory, reader: Node) -> Pair:
    return Pair(slicings(source_layout, reader.layout), source.regions, reader.memory.regions)


class Session:
    """A reader and a source in one process. Messages wait in queues until ``turn``, and can be looked at there."""

    def __init__(self, source: Node, reader: Node) -> None:
        self.source, self.reader = source, reader
        self.pair = pair_of(source.layout, source.memory, reader)
        self.to_source: deque[bytes] = deque()
        self.to_reader: deque[bytes] = deque()
        self.served = source.transport.serve(reader.transport.describe(), self.pair, self.to_reader.append)
        self.peer = reader.transport.connect(source.transport.describe(), self.pair, self.to_source.append)

    def turn(self) -> None:
        while self.to_source:
            self.served.receive(self.to_source.popleft())
        while self.to_reader:
            self.peer.receive(self.to_reader.popleft())
        self.source.transport.progress()
        self.reader.transport.progress()

    def pull(self, *maps: BlockMap) -> NixlPull:
        return self.reader.transport.pull(self.peer, maps)

    def finish(self, *pulls: NixlPull, timeout_s: float = 10.0) -> list[PullState]:
        def ended() -> bool:
            self.turn()
            return all(pull.poll() is not PullState.RUNNING for pull in pulls)

        until(ended, timeout_s)
        return [pull.poll() for pull in pulls]

    def close(self) -> None:
        self.peer.close()
        self.served.close()


def blocks(group: int, remote: Any, local: Any) -> BlockMap:
    return BlockMap(group, np.asarray(remote, dtype=np.int64), np.asarray(local, dtype=np.int64))


def everything(pair: Pair, seed: int, share: float = 0.7) -> list[BlockMap]:
    """Random pieces of every group, to random places."""
    rng = np.random.default_rng(seed)
    maps = []
    for group, slicing in enumerate(pair.slicings[:-1]):
        theirs = pair.source[group].num_blocks * slicing.source.pieces_per_block
        ours = pair.reader[group].num_blocks * slicing.reader.pieces_per_block
        count = max(1, int(min(theirs, ours) * share))
        maps.append(blocks(group, rng.permutation(theirs)[:count], rng.permutation(ours)[:count]))
    return maps


def expected(slicing: Slicing, source: np.ndarray, reader: np.ndarray, blockmap: BlockMap) -> np.ndarray:
    """The reader's group after the pull."""
    region, run = Region(0, 1, 1), np.arange(slicing.row_bytes)
    take, put = slicing.source_rows(region, blockmap.remote), slicing.reader_rows(region, blockmap.local)
    after = reader.reshape(-1).copy()
    index = [rows.starts[:, None, None] + rows.rows[None, :, None] + run for rows in (put, take)]
    after[index[0]] = source.reshape(-1)[index[1]]
    return after.reshape(reader.shape)


def check(pair: Pair, source: list[np.ndarray], before: list[np.ndarray], after: list[np.ndarray], maps: Any) -> None:
    want = [group.copy() for group in before]
    for item in maps:
        want[item.group] = expected(pair.slicings[item.group], source[item.group], want[item.group], item)
    for group, (a, b) in enumerate(zip(want, after, strict=True)):
        assert np.array_equal(a, b), f"group {group}"


# --- a source in its own process, to be killed and stopped


class Target(Killable):
    """``serve``: answers control messages, in turns of a Python thread; otherwise it computes with the GIL held."""

    def __init__(self, layout: KVLayout, num_blocks: int, limits: Limits | None = None) -> None:
        self.process, self.pipe = start(_target, layout, num_blocks, limits)
        assert self.pipe.poll(30)
        self.layout = layout
        self.description, regions = self.pipe.recv()
        self.memory = PoolMemory(None, tuple(Region(*region) for region in regions))
        self.groups = contents(layout, num_blocks, 5)

    def connect(self, reader: Node) -> Any:
        regions = [(r.address, r.block_bytes, r.num_blocks) for r in reader.memory.regions]
        self.pipe.send(("serve", reader.transport.describe(), reader.layout, regions))
        assert self.pipe.poll(10)
        assert self.pipe.recv() == "served"
        return self.connect_silently(reader)

    def connect_silently(self, reader: Node) -> Any:
        """The source hears nothing of it."""
        self.reader = reader
        self.pair = pair_of(self.layout, self.memory, reader)
        self.peer = reader.transport.connect(self.description, self.pair, self._send)
        return self.peer

    def _send(self, message: bytes) -> None:
        try:
            self.pipe.send(("message", message))
        except OSError:
            pass  # it is dead

    def turn(self) -> None:
        try:
            while self.pipe.poll(0):
                self.peer.receive(self.pipe.recv())
        except (EOFError, OSError):
            pass
        self.reader.transport.progress()

    def finish(self, pull: NixlPull, timeout_s: float = 10.0) -> PullState:
        def ended() -> bool:
            self.turn()
            return pull.poll() is not PullState.RUNNING

        until(ended, timeout_s)
        return pull.poll()


def _target(pipe: Connection, layout: KVLayout, num_blocks: int, limits: Limits | None) -> None:
    node = Node(layout, num_blocks, 5, limits)
    regions = [(r.address, r.block_bytes, r.num_blocks) for r in node.memory.regions]
    pipe.send((node.transport.describe(), regions))
    served = None
    while True:
        for _ in range(2_000):  # holds the GIL: serving reads must not need it
            pass
        try:
            while pipe.poll(0):
                what, *rest = pipe.recv()
                if what == "message":
                    assert served is not None
                    served.receive(rest[0])
                else:
                    description, reader, theirs = rest
                    pair = Pair(slicings(layout, reader), node.memory.regions, tuple(Region(*r) for r in theirs))
                    served = node.transport.serve(description, pair, pipe.send)
                    pipe.send("served")
        except EOFError:
            os._exit(0)
        node.transport.progress()
