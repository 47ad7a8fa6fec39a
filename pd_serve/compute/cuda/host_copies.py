"""Copies between a GPU's pool and a host tier: a :class:`pd_serve.compute.copies.Mover` on two streams.

The copy engines do it, in batches: no SM is taken from what the device computes. Host memory is registered in the
background, a chunk at a time from its beginning, where the first slots are; a store waits for the chunk of its slots,
so that an engine starts without waiting. Each direction has its own thread, whose calls these are.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from pd_serve.kv.tiers import Copy
from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.driver import DriverError
from pd_serve.memory.host_buffers import populate
from pd_serve.memory.host_tier import TierMemory
from pd_serve.memory.memcpy_batch import memcpy_batch_call
from pd_serve.memory.region import PoolMemory

log = logging.getLogger(__name__)

I64 = npt.NDArray[np.int64]

MAX_COPIES = 8192  # of one call: drivers have been seen to crash with tens of thousands
# Of one call; so many are on their way at a time. What else crosses the bus by a copy engine, such as the plan of a
# prompt's attention, waits behind them: half a millisecond each.
PART_BYTES = 24 << 20
IN_FLIGHT = 2
CHUNK_BYTES = 1 << 30  # of host memory that is registered at a time


class CudaHostMover:
    """``pin``: register host memory. Without it, or batches of the driver, blocks are copied one by one."""

    def __init__(self, pool: PoolMemory, memory: TierMemory, *, pin: bool) -> None:
        assert pool.device is not None
        self.num_slots = memory.num_slots
        self._device = pool.device
        self._regions = pool.regions
        self._memory = memory
        self._driver = CudaDriver()
        self._driver.synchronize(self._device)  # opens its context, for what follows
        # 0 is the lowest priority there is
        self._load, self._store = (torch.cuda.Stream(self._device, priority=0) for _ in range(2))  # type: ignore[no-untyped-call]
        self._batch = _batches() if pin else None
        self._registered = threading.Condition()
        self._registered_bytes = 0 if pin else memory.size_bytes
        self._chunks: list[int] = []  # addresses of those that are
        self._closing = False
        self._pinning = threading.Thread(target=self._register, name="pd-kv-pin", daemon=True) if pin else None
        if self._pinning is not None:
            self._pinning.start()

    def load(self, copies: list[Copy]) -> None:
        device, host, sizes = self._memory.places(copies, self._regions)
        self._copy(device, host, sizes, self._load, to_host=False)

    def store(self, copies: list[Copy]) -> None:
        device, host, sizes = self._memory.places(copies, self._regions)
        end = int((host + sizes).max()) - self._memory.address
        with self._registered:
            self._registered.wait_for(lambda: self._registered_bytes >= end or self._closing)
        if self._closing:
            raise RuntimeError("the engine ends")
        self._copy(device, host, sizes, self._store, to_host=True)

    def _copy(self, device: I64, host: I64, sizes: I64, stream: torch.cuda.Stream, *, to_host: bool) -> None:
        torch.cuda.set_device(self._device)
        batch = self._batch
        if batch is None:
            self._one_by_one(device, host, sizes, to_host=to_host)
            return
        device, host, sizes = pieces(device, host, sizes, self._memory.address, CHUNK_BYTES)
        queued: deque[torch.cuda.Event] = deque()
        for part in parts(sizes):
            targets, sources = (host[part], device[part]) if to_host else (device[part], host[part])
            if len(queued) == IN_FLIGHT:
                queued.popleft().synchronize()
            batch(targets, sources, sizes[part], stream.cuda_stream)
            queued.append(torch.cuda.Event(blocking=True))  # type: ignore[no-untyped-call]
            queued[-1].record(stream)
        for ended in queued:
            ended.synchronize()

    def _one_by_one(self, device: I64, host: I64, sizes: I64, *, to_host: bool) -> None:
        for there, here, size in zip(device.tolist(), host.tolist(), sizes.tolist(), strict=True):
            if to_host:
                self._driver.copy_to_host(here, there, size, self._device)
            else:
                self._driver.copy_to_device(there, here, size, self._device)

    def _register(self) -> None:
        start, end = self._memory.address, self._memory.size_bytes
        while self._registered_bytes < end and not self._closing:
            at = start + self._registered_bytes
            size = min(CHUNK_BYTES, end - self._registered_bytes)
            try:
                populate(at, size)
                self._driver.pin(at, size)
                self._chunks.append(at)
            except DriverError as error:
                log.warning("host memory for KV cannot be registered (%s): blocks are copied one by one", error)
                self._batch = None
                size = end - self._registered_bytes
            with self._registered:
                self._registered_bytes += size
                self._registered.notify_all()

    def discard(self) -> None:
        """Registered memory stays where it is."""

    def close(self) -> None:
        self._closing = True
        with self._registered:
            self._registered.notify_all()
        if self._pinning is not None:
            self._pinning.join()
        for address in self._chunks:
            self._driver.unpin(address)
        self._driver.close()
        self._memory.close()


def _batches() -> Callable[[I64, I64, I64, int], None] | None:
    try:
        return memcpy_batch_call()
    except DriverError as error:
        log.warning("KV blocks are copied to and from the host one by one: %s", error)
        return None


def parts(sizes: I64) -> Iterator[slice]:
    """Of copies, in order: those of one call."""
    first = size = 0
    for at, each in enumerate(sizes.tolist()):
        if at > first and (size + each > PART_BYTES or at - first == MAX_COPIES):
            yield slice(first, at)
            first, size = at, 0
        size += each
    if first < len(sizes):
        yield slice(first, len(sizes))


def pieces(device: I64, host: I64, sizes: I64, base: int, chunk_bytes: int) -> tuple[I64, I64, I64]:
    """The same copies, those in two that cross from a registered chunk to the next: one copy must lie within one.

    Chunks begin at ``base``, and are larger than any copy.
    """
    border = base + (host + sizes - 1 - base) // chunk_bytes * chunk_bytes  # where the last byte's chunk begins
    head = np.where(host < border, border - host, 0)
    crosses = head > 0
    return (
        np.concatenate([device[crosses], device + head]),
        np.concatenate([host[crosses], host + head]),
        np.concatenate([head[crosses], sizes - head]),
    )
