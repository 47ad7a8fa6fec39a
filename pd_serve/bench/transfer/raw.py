"""The raw limit of a link: one contiguous NIXL READ with nothing of pd-serve between, and a plain memory copy."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import numpy as np

from pd_serve.errors import TransferError
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState, Send
from pd_serve.wire.peer import FailureKind

_PROGRESS_DELAY_US = 100_000  # NIXL's thread is woken by events


class _Description(msgspec.Struct):
    agent: str
    metadata: bytes


class RawPull:
    def __init__(self, raw: RawNixl, handle: Any, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.num_descriptors = 1
        self._raw = raw
        self._handle = handle
        self._status = raw.agent.postXferReq(handle)

    def poll(self) -> PullState:
        nixl = self._raw.nixl
        if self._status == nixl.NIXL_IN_PROG:
            self._status = self._raw.agent.getXferStatus(self._handle)
        if self._status == nixl.NIXL_IN_PROG:
            return PullState.RUNNING
        return PullState.DONE if self._status == nixl.NIXL_SUCCESS else PullState.FAILED

    def error(self) -> TransferError:
        return TransferError(FailureKind.TRANSFER, f"NIXL: status {self._status}")

    def close(self) -> bool:
        self._raw.agent.releaseXferReq(self._handle)
        return True


class RawPeer:
    def __init__(self, agent: str, region: Region) -> None:
        self.agent = agent
        self.region = region

    def receive(self, message: bytes) -> None: ...

    def close(self) -> None: ...


class RawNixl:
    """A :class:`pd_serve.transfer.base.Transport` that can only read the whole first region, as one descriptor."""

    name = "raw"

    def __init__(self, device: int | None) -> None:
        from pd_serve.transfer.nixl import load_bindings

        self.nixl = load_bindings()
        self._device = device or 0
        self._kind = self.nixl.DRAM_SEG if device is None else self.nixl.VRAM_SEG
        self._name = f"raw-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        config = self.nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_DELAY_US
        self.agent = self.nixl.nixlAgent(self._name, config)
        self._backend = self.agent.createBackend("UCX", {})

    def register(self, memory: PoolMemory) -> None:
        self._region = memory.regions[0]
        self.agent.registerMem(self.nixl.nixlRegDList(self._kind, self._rows(self._region)), [self._backend])

    def _rows(self, region: Region) -> Any:
        return np.array([(region.address, region.size_bytes, self._device)], dtype=np.uint64)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Description(self._name, bytes(self.agent.getLocalMD())))

    def connect(self, source: bytes, pair: Pair, send: Send) -> RawPeer:
        description = msgspec.msgpack.decode(source, type=_Description)
        self.agent.loadRemoteMD(description.metadata)
        return RawPeer(description.agent, pair.source[0])

    def serve(self, reader: bytes, pair: Pair, send: Send) -> RawPeer:
        return RawPeer("", pair.reader[0])

    def pull(self, peer: Any, blocks: Sequence[BlockMap]) -> RawPull:
        ours = self.nixl.nixlXferDList(self._kind, self._rows(self._region))
        rows = self._rows(peer.region)
        theirs = self.nixl.nixlXferDList(self._kind, rows)
        handle = self.agent.createXferReq(self.nixl.NIXL_READ, ours, theirs, peer.agent, "", [self._backend])
        return RawPull(self, handle, self._region.size_bytes)

    def progress(self) -> float:
        return float("inf")

    def close(self) -> None:
        del self.agent


def memcpy_gb_per_s(size_bytes: int, devices: tuple[int, int] | None, repeats: int) -> float:
    """Median rate of a plain copy: memory to memory by one core, or from one GPU's memory to another's."""
    if devices is None:
        target, source = (np.full(size_bytes, value, dtype=np.uint8) for value in (0, 1))
        return _median_gb_per_s(lambda: np.copyto(target, source), size_bytes, repeats)
    import torch

    theirs = torch.ones(size_bytes, dtype=torch.uint8, device=f"cuda:{devices[0]}")
    ours = torch.zeros(size_bytes, dtype=torch.uint8, device=f"cuda:{devices[1]}")
    torch.cuda.synchronize(devices[0])

    def copy() -> None:
        ours.copy_(theirs, non_blocking=True)
        for device in set(devices):
            torch.cuda.synchronize(device)

    return _median_gb_per_s(copy, size_bytes, repeats)


def _median_gb_per_s(copy: Callable[[], None], size_bytes: int, repeats: int) -> float:
    copy()
    copy()
    seconds = []
    for _ in range(repeats):
        start_s = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - start_s)
    return size_bytes / statistics.median(seconds) / 1e9
