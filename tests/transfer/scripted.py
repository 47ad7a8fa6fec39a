"""A transport that copies within this process, and does whatever a test wants to go wrong. No library behind it."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.memory.region import PoolMemory
from pd_serve.transfer.base import BlockMap, Pair, PullState, Send
from pd_serve.transfer.lanes import LaneFactory, Lanes
from pd_serve.transfer.movers.base import Mover, Rows, Work
from pd_serve.transfer.movers.host import HostMover


@dataclass
class Script:
    """What a lane does. May be changed while it runs."""

    cannot_start: str = ""
    cannot_register: str = ""
    cannot_serve: str = ""
    cannot_connect: str = ""
    cannot_pull: str = ""
    fails: str = ""  # pulls that were started
    hangs: bool = False  # pulls never end while it does
    corrupts: bool = False  # one bit of what is read is wrong
    forgets: bool = False  # nothing is written
    by_mover: bool = False  # the mover's own work brings the bytes, as in lanes between GPUs
    bytes_per_s: float = float("inf")
    first_long_s: float = 0.0  # the first pull of more than a MiB takes so much longer: something is set up for it
    heard: list[bytes] = field(default_factory=list)
    rejects_messages: bool = False
    never_lets_go: bool = False  # of the memory, when it is closed
    open_peers: int = 0
    open_readers: int = 0
    pulls: int = 0


class CopyPull:
    def __init__(self, script: Script, peer: CopyPeer, blocks: Sequence[BlockMap]) -> None:
        self._script = script
        self._peer = peer
        self._blocks = list(blocks)
        self._state = PullState.RUNNING
        pair = peer.pair
        self.size_bytes = sum(len(b.local) * pair.slicings[b.group].piece_bytes for b in blocks)
        self.num_descriptors = sum(len(b.local) for b in blocks)
        self._due_s = time.perf_counter() + self.size_bytes / script.bytes_per_s
        if self.size_bytes > 1 << 20:
            self._due_s += script.first_long_s
            script.first_long_s = 0.0
        self.work: Work | None = None
        self._polls = 0
        if script.by_mover:
            self.work = peer.mover.copy([] if script.forgets else [self._rows(item) for item in self._blocks])

    def poll(self) -> PullState:
        if self.work is not None:
            self._polls += 1
            if self._polls > 2 and self.work.done():  # a device takes its time
                self.work = None
                self._state = PullState.DONE
            return self._state
        if self._state is PullState.RUNNING and not self._script.hangs and time.perf_counter() >= self._due_s:
            self._state = PullState.FAILED if self._script.fails else PullState.DONE
            if self._state is PullState.DONE and not self._script.forgets:
                self._copy()
        return self._state

    def _rows(self, item: BlockMap) -> tuple[Rows, Rows]:
        pair = self._peer.pair
        slicing = pair.slicings[item.group]
        source = slicing.source_rows(pair.source[item.group], item.remote)
        return source, slicing.reader_rows(pair.reader[item.group], item.local)

    def _copy(self) -> None:
        for item in self._blocks:
            source, target = self._rows(item)
            work = self._peer.mover.copy([(source, target)])
            while not work.done():
                pass
        if self._script.corrupts:
            victim = target.base + int(target.starts[-1]) + int(target.rows[-1])
            byte = ctypes.c_uint8.from_address(victim)
            byte.value ^= 1

    def error(self) -> TransferError:
        return TransferError(FailureKind.TRANSFER, self._script.fails)

    def close(self) -> bool:
        return self.poll() is not PullState.RUNNING


class CopyPeer:
    def __init__(self, script: Script, mover: Mover, pair: Pair, send: Send) -> None:
        self.script = script
        self.mover = mover
        self.pair = pair
        self.send = send
        script.open_peers += 1

    def receive(self, message: bytes) -> None:
        self.script.heard.append(message)
        if self.script.rejects_messages:
            raise TransferError(FailureKind.TRANSFER, "it makes no sense")

    def close(self) -> None:
        self.script.open_peers -= 1


class CopyReader:
    """Greets its peer, and answers what it says."""

    def __init__(self, script: Script, send: Send) -> None:
        self.script = script
        self.send = send
        script.open_readers += 1
        send(b"served")

    def receive(self, message: bytes) -> None:
        if self.script.rejects_messages:
            raise TransferError(FailureKind.TRANSFER, "it makes no sense")
        self.send(b"you said " + message)

    def close(self) -> None:
        self.script.open_readers -= 1


class CopyTransport:
    def __init__(self, name: str, mover: Mover, script: Script) -> None:
        if script.cannot_start:
            raise TransferError(FailureKind.TRANSFER, script.cannot_start)
        self.name = name
        self.closed = False
        self._mover = mover
        self._script = script

    def register(self, memory: PoolMemory) -> None:
        if self._script.cannot_register:
            raise TransferError(FailureKind.TRANSFER, self._script.cannot_register)

    def describe(self) -> bytes:
        return self.name.encode()

    def connect(self, source: bytes, pair: Pair, send: Send) -> CopyPeer:
        assert source == self.describe()
        if self._script.cannot_connect:
            raise HandshakeError(self._script.cannot_connect)
        peer = CopyPeer(self._script, self._mover, pair, send)
        send(b"hello")
        return peer

    def pull(self, peer: object, blocks: Sequence[BlockMap]) -> CopyPull:
        assert isinstance(peer, CopyPeer)
        if self._script.cannot_pull:
            raise TransferError(FailureKind.TRANSFER, self._script.cannot_pull)
        self._script.pulls += 1
        return CopyPull(self._script, peer, blocks)

    def serve(self, reader: bytes, pair: Pair, send: Send) -> CopyReader:
        if self._script.cannot_serve:
            raise TransferError(FailureKind.TRANSFER, self._script.cannot_serve)
        return CopyReader(self._script, send)

    def progress(self) -> float:
        return float("inf")

    def close(self) -> bool:
        self.closed = True
        return not self._script.never_lets_go


def copy_lanes(memory: PoolMemory, *, required: bool = False, **scripts: Script) -> Lanes:
    """Lanes that copy, by name; one called ``copy`` where none is given."""
    scripts = scripts or {"copy": Script()}

    def factory(name: str, script: Script) -> LaneFactory:
        return LaneFactory(lambda mover: CopyTransport(name, mover, script))

    return Lanes(memory, {n: factory(n, s) for n, s in scripts.items()}, HostMover, required=required)


def aligned(size_bytes: int) -> np.ndarray:
    """Page-aligned host memory."""
    raw = np.zeros(size_bytes + 4096, dtype=np.uint8)
    start = -raw.ctypes.data % 4096
    return raw[start : start + size_bytes]
