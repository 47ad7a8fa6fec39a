"""Two ends of nvlink on memfd memory: pools, layouts, a link between two transports, a source in its own process."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from pd_serve.errors import PDServeError
from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.driver import HandleType, MemoryKind
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region, Segment
from pd_serve.transfer.base import BlockMap, Pair, Peer, PullState, Reader
from pd_serve.transfer.movers.base import U64, Rows
from pd_serve.transfer.nvlink import NvlinkTransport, fd_server
from pd_serve.transfer.slices import slicings
from tests.memory.memfd import MemfdDriver
from tests.transfer.namespaces import outer_pid, spawned_under

U8 = np.ndarray[Any, np.dtype[np.uint8]]

HEADS = 4


def layout(block_size: int = 4, first_head: int = 0, heads: int = HEADS, layers: int = 2) -> KVLayout:
    """Two groups, of ``layers`` layers and of three with a window; heads of 16 numbers."""
    return KVLayout(
        block_size,
        "float32",
        (
            kv_group(tuple(range(layers)), heads, 16, first_head=first_head, total_kv_heads=HEADS),
            kv_group((90, 91, 92), heads, 16, window=16, first_head=first_head, total_kv_heads=HEADS),
        ),
    )


class Pool:
    """Regions of both groups and the probe region, in ``cuts`` + 1 segments of exportable memory side by side."""

    def __init__(
        self,
        driver: MemfdDriver,
        kv: KVLayout,
        num_blocks: int,
        seed: int | None = None,
        *,
        cuts: int = 0,
        handle_type: HandleType = HandleType.POSIX_FD,
    ) -> None:
        self.driver = driver
        self.layout = kv
        kind = MemoryKind(0, handle_type, rdma=False)
        unit = driver.granularity(kind)
        shapes = [(num_blocks, kv.block_bytes(group)) for group in range(len(kv.groups))]
        shapes.append((PROBE_BLOCKS, PROBE_BLOCK_BYTES))
        size = sum(-(-n * b // 4096) * 4096 for n, b in shapes)
        size = max(-(-size // unit), cuts + 1) * unit
        self.base, self.size = driver.reserve(size, unit), size
        each = size // (cuts + 1) // unit * unit
        self.segments = []
        for index in range(cuts + 1):
            at = index * each
            part = each if index < cuts else size - at
            handle = driver.create(part, kind)
            driver.map(self.base + at, part, handle, 0)
            self.segments.append(Segment(self.base + at, part, handle, handle_type))
        self.bytes: U8 = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.base))
        self.regions, at = [], 0
        for n, b in shapes:
            self.regions.append(Region(self.base + at, b, n))
            at += -(-n * b // 4096) * 4096
        if seed is not None:
            self.bytes[:] = content(seed, size)

    def group(self, group: int) -> U8:
        """``[block, byte]``"""
        region = self.regions[group]
        at = region.address - self.base
        return self.bytes[at : at + region.size_bytes].reshape(region.num_blocks, region.block_bytes)

    def memory(self) -> PoolMemory:
        return PoolMemory(0, tuple(self.regions), tuple(self.segments))

    def free(self) -> None:
        for segment in self.segments:
            self.driver.unmap(segment.address, segment.size_bytes)
            self.driver.release(segment.handle)
        self.driver.free_address(self.base, self.size)


def content(seed: int, size: int) -> U8:
    return np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)


def pair_of(source: KVLayout, source_regions: list[Region], reader: KVLayout, reader_regions: list[Region]) -> Pair:
    return Pair(slicings(source, reader), tuple(source_regions), tuple(reader_regions))


def blocks(group: int, remote: Any, local: Any) -> BlockMap:
    return BlockMap(group, np.asarray(remote, dtype=np.int64), np.asarray(local, dtype=np.int64))


def as_kv(pool: U8, kv: KVLayout, group: int) -> U8:
    """``[block, layer, K|V, head, token, byte]``"""
    shape = kv.block_shape(group)
    return pool.reshape(-1, *shape[:4], shape[4] * 4)


class NumpyMover:
    """Copies when told to: at ``copy``, or with ``hold`` when :meth:`let_go` is called."""

    device: int | None = None

    def __init__(self, hold: bool = False) -> None:
        self.hold = hold
        self.calls: list[int] = []  # items of each
        self.held: list[tuple[HeldWork, list[tuple[Rows, Rows]]]] = []

    def rouse(self) -> None:
        pass

    def copy(self, items: list[tuple[Rows, Rows]]) -> HeldWork:
        self.calls.append(len(items))
        work = HeldWork()
        self.held.append((work, items))
        if not self.hold:
            self.let_go()
        return work

    def let_go(self) -> None:
        for work, items in self.held:
            for source, target in items:
                _copy(source, target)
            work.ended = True
        self.held = []

    def checksums(self, rows: Rows, after: Any = None) -> Any:
        raise NotImplementedError

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def allocate(self, size_bytes: int) -> int:
        raise NotImplementedError

    def close(self) -> None: ...


class HeldWork:
    def __init__(self) -> None:
        self.ended = False
        self.error: Exception | None = None

    def done(self) -> bool:
        if self.error is not None:
            raise self.error
        return self.ended

    def result(self) -> U64:
        raise NotImplementedError


def _copy(source: Rows, target: Rows) -> None:
    for a, b in zip(source.starts, target.starts, strict=True):
        for c, d in zip(source.rows, target.rows, strict=True):
            ctypes.memmove(int(target.base + b + d), int(source.base + a + c), source.row_bytes)


class End:
    """A transport and its pool."""

    def __init__(self, socket_dir: Path, kv: KVLayout, num_blocks: int, mover: Any = None, **pool: Any) -> None:
        self.driver = MemfdDriver()
        self.pool = Pool(self.driver, kv, num_blocks, **pool)
        self.mover = mover or NumpyMover()
        self.transport = NvlinkTransport(self.driver, self.mover, socket_dir)
        self.transport.register(self.pool.memory())

    @property
    def mapped(self) -> int:
        return self.driver.live_mappings - len(self.pool.segments)

    def close(self) -> None:
        self.transport.close()
        self.pool.free()
        self.driver.check_clean()


class Link:
    """A session between two transports of this process. ``pump`` carries their messages."""

    def __init__(self, reader: NvlinkTransport, source: NvlinkTransport, pair: Pair) -> None:
        self.to_source: list[bytes] = []
        self.to_reader: list[bytes] = []
        self.reader_end: Reader = source.serve(reader.describe(), pair, self.to_reader.append)
        self.peer: Peer = reader.connect(source.describe(), pair, self.to_source.append)

    def pump(self) -> Link:
        while self.to_source or self.to_reader:
            while self.to_source:
                self.reader_end.receive(self.to_source.pop(0))
            while self.to_reader:
                self.peer.receive(self.to_reader.pop(0))
        return self

    def close(self) -> None:
        self.peer.close()
        self.reader_end.close()


def until(ask: Callable[[], Any], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not ask():
        assert time.monotonic() < deadline, f"nothing within {timeout_s} s"
        time.sleep(0.001)


def finished(pull: Any) -> PullState:
    until(lambda: pull.poll() is not PullState.RUNNING)
    state: PullState = pull.poll()
    return state


def settled(transport: NvlinkTransport) -> None:
    """Runs the transport until nothing is due."""
    until(lambda: transport.progress() == float("inf"))


def open_fds() -> int:
    resource_tracker.ensure_running()  # spawning a process starts it, and it stays
    gc.collect()  # what earlier tests left behind must not be closed between two counts
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def pull_random_blocks(end: End, source: SourceProcess, peer: Peer, seed: int) -> None:
    """Of all groups; the source's pool has 40 blocks and the reader's 30."""
    rng = np.random.default_rng(seed)
    expected, maps = end.pool.bytes.copy(), []
    for group, count in ((0, 25), (1, 12), (2, 64)):
        high = (len(source.group(group)), len(end.pool.group(group)))
        remote, local = rng.permutation(high[0])[:count], rng.permutation(high[1])[:count]
        maps.append(blocks(group, remote, local))
    pull = end.transport.pull(peer, maps)
    assert finished(pull) is PullState.DONE
    assert pull.close()
    for item in maps:
        assert np.array_equal(end.pool.group(item.group)[item.local], source.group(item.group)[item.remote])
    size = sum(len(m.local) * end.pool.regions[m.group].block_bytes for m in maps)
    assert pull.size_bytes == size
    assert 3 <= pull.num_descriptors <= 101
    assert int(np.count_nonzero(end.pool.bytes != expected)) <= size, "bytes beside the blocks were written"


def refused_as_somebody_else(path: Path) -> None:
    """A process of another user gets nothing at this socket. For root only, in a directory that everybody may enter."""
    path.chmod(0o777)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setresuid(65533, 65533, 65533)
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
                connection.settimeout(5)
                connection.connect(os.fspath(path))
                data, got, _, _ = socket.recv_fds(connection, 4096, 8)
                status = 0 if data.startswith(fd_server.REFUSE) and not got else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# --- a source in its own process


class SourceProcess:
    """Serves one pool. Its content is ``content(seed, size)``. ``under``: a command that runs it, as ``unshare`` does.

    ``pid`` is the source's own, ``process`` the command's, which ends with it.
    """

    def __init__(
        self,
        kv: KVLayout,
        num_blocks: int,
        socket_dir: Path,
        *,
        seed: int = 1,
        cuts: int = 0,
        under: Sequence[str] = (),
    ) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.layout = kv
        self.pipe, child = spawn.Pipe()
        self.process = spawn.Process(target=_source, args=(child, kv, num_blocks, socket_dir, seed, cuts), daemon=True)
        with spawned_under(under):
            self.process.start()
        child.close()
        self.pid, self.description, self.regions, self.base, size = self._answer()
        self.bytes = content(seed, size)

    def group(self, group: int) -> U8:
        region = self.regions[group]
        at = region.address - self.base
        return self.bytes[at : at + region.size_bytes].reshape(region.num_blocks, region.block_bytes)

    def connect(self, reader: NvlinkTransport, kv: KVLayout, regions: list[Region]) -> Peer:
        """The offer may still be on its way: it is waited for with ``offer``."""
        pair = pair_of(self.layout, self.regions, kv, regions)
        self.pipe.send(("serve", reader.describe(), pair))
        return reader.connect(self.description, pair, lambda message: self.pipe.send(("message", message)))

    def offer(self, peer: Peer) -> bytes:
        answer: bytes = self._answer()
        peer.receive(answer)
        return answer

    def close_transport(self) -> None:
        self.pipe.send(("close",))
        assert self._answer() == "closed"

    def call(self, function: Callable[[], Any]) -> Any:
        """In the source's process."""
        self.pipe.send(("call", function))
        return self._answer()

    def _answer(self) -> Any:
        assert self.pipe.poll(30), "the source does not answer"
        return self.pipe.recv()

    def kill(self) -> None:
        if self.process.is_alive():
            os.kill(self.pid, signal.SIGKILL)
            self.process.join(5)

    def close(self) -> None:
        self.kill()
        self.process.close()
        self.pipe.close()


def _source(pipe: Connection, kv: KVLayout, num_blocks: int, socket_dir: Path, seed: int, cuts: int) -> None:
    driver = MemfdDriver()
    pool = Pool(driver, kv, num_blocks, seed, cuts=cuts)
    transport = NvlinkTransport(driver, NumpyMover(), socket_dir)
    transport.register(pool.memory())
    pipe.send((outer_pid(), transport.describe(), pool.regions, pool.base, pool.size))
    reader: Reader | None = None
    while True:
        try:
            what, *args = pipe.recv()
        except EOFError:
            os._exit(0)
        try:
            if what == "serve":
                reader = transport.serve(args[0], args[1], pipe.send)
            elif what == "message" and reader is not None:
                reader.receive(args[0])
            elif what == "close":
                transport.close()
                pipe.send("closed")
            elif what == "call":
                pipe.send(args[0]())
        except PDServeError as error:
            pipe.send(error)
