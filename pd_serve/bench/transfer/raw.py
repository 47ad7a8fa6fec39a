"""The raw limit of a link: one contiguous NIXL READ with nothing of pd-serve between, and a plain memory copy."""

from __future__ import annotations

import os
import statistics
import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory.region import PoolMemory, Region
from pd_serve.transfer.base import BlockMap, Pair, PullState, Send

_PROGRESS_DELAY_US = 100_000  # NIXL's thread is woken by events
_WARMUP = 2


class _Description(msgspec.Struct):
    agent: str
    metadata: bytes
    device: int


class RawPull:
    work = None

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
    def __init__(self, agent: str, device: int, region: Region) -> None:
        self.agent = agent
        self.device = device
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
        self.agent.registerMem(
            self.nixl.nixlRegDList(self._kind, self._rows(self._region, self._device)), [self._backend]
        )

    def _rows(self, region: Region, device: int) -> Any:
        return np.array([(region.address, region.size_bytes, device)], dtype=np.uint64)

    def describe(self) -> bytes:
        return msgspec.msgpack.encode(_Description(self._name, bytes(self.agent.getLocalMD()), self._device))

    def connect(self, source: bytes, pair: Pair, send: Send) -> RawPeer:
        description = msgspec.msgpack.decode(source, type=_Description)
        self.agent.loadRemoteMD(description.metadata)
        return RawPeer(description.agent, description.device, pair.source[0])

    def serve(self, reader: bytes, pair: Pair, send: Send) -> RawPeer:
        return RawPeer("", 0, pair.reader[0])

    def pull(self, peer: Any, blocks: Sequence[BlockMap]) -> RawPull:
        ours = self.nixl.nixlXferDList(self._kind, self._rows(self._region, self._device))
        theirs = self.nixl.nixlXferDList(self._kind, self._rows(peer.region, peer.device))
        handle = self.agent.createXferReq(self.nixl.NIXL_READ, ours, theirs, peer.agent, "", [self._backend])
        return RawPull(self, handle, self._region.size_bytes)

    def progress(self) -> float:
        return float("inf")

    def close(self) -> bool:
        del self.agent
        return True


def memcpy_gb_per_s(size_bytes: int, devices: tuple[int, int] | None, repeats: int) -> float:
    """Median rate of a plain copy: memory to memory by one core, or from one GPU's memory to another's."""
    seconds = _host_copies(size_bytes, repeats) if devices is None else _peer_copies(size_bytes, devices, repeats)
    return size_bytes / statistics.median(seconds[_WARMUP:]) / 1e9


def _host_copies(size_bytes: int, repeats: int) -> list[float]:
    target, source = (np.full(size_bytes, value, dtype=np.uint8) for value in (0, 1))
    seconds = []
    for _ in range(_WARMUP + repeats):
        start_s = time.perf_counter()
        np.copyto(target, source)
        seconds.append(time.perf_counter() - start_s)
    return seconds


def _peer_copies(size_bytes: int, devices: tuple[int, int], repeats: int) -> list[float]:
    """By the GPU's own clock: what a pull costs on the host is not the link's."""
    import torch

    theirs = torch.ones(size_bytes, dtype=torch.uint8, device=f"cuda:{devices[0]}")
    ours = torch.zeros(size_bytes, dtype=torch.uint8, device=f"cuda:{devices[1]}")
    seconds = []
    for device in devices:
        torch.cuda.synchronize(device)
    with torch.cuda.device(devices[0]):  # torch copies on the source's stream
        for _ in range(_WARMUP + repeats):
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]
            events[0].record()
            ours.copy_(theirs, non_blocking=True)
            events[1].record()
            events[1].synchronize()
            seconds.append(events[0].elapsed_time(events[1]) / 1e3)
    return seconds
