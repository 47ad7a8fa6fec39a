"""Host memory beside a device's: mapped in whole pages, pinned where asked for, returned in full.

For what sleeps (:class:`pd_serve.memory.cumem.CumemAllocator`), staging, and weights that stay there. Not torch's
pinned allocator: that rounds up to powers of two and keeps what it has, which has been seen to grow host memory with
every sleep.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Protocol

from pd_serve.memory.driver import DriverError

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14
POPULATE_THREADS = 8  # one fills about 10 GB/s with zeros, a PCIe 5 link carries 55
POPULATE_STEP_BYTES = 8 << 20


class Pinner(Protocol):
    """What :class:`pd_serve.memory.cuda_driver.CudaDriver` offers."""

    def pin(self, address: int, size: int) -> None: ...

    def unpin(self, address: int) -> None: ...


class HostBuffer:
    """One mapping of its own."""

    def __init__(self, size: int, pinner: Pinner | None) -> None:
        self.size = size
        self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # pinning 2 MiB pages is many times as fast as 4 KiB pages
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._view = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        self._pinner: Pinner | None = None
        if pinner is not None:
            try:
                populate(self.address, size)
                pinner.pin(self.address, size)
                self._pinner = pinner
            except DriverError as error:
                log.warning("%d bytes of host memory cannot be pinned (%s): copies of it are slower", size, error)

    @property
    def pinned(self) -> bool:
        return self._pinner is not None

    def tensor(self) -> Tensor:
        """Its bytes, of which nobody may use a view after :meth:`close`."""
        import torch

        return torch.frombuffer((ctypes.c_uint8 * self.size).from_address(self.address), dtype=torch.uint8)

    def close(self) -> None:
        if self._pinner is not None:
            self._pinner.unpin(self.address)
            self._pinner = None
        del self._view
        self._mapping.close()


class HostBuffers:
    """``keep``: buffers that come back are kept for the next sleep, because pinning them takes longer than the copy."""

    def __init__(self, pinner: Pinner | None = None, *, keep: bool = False) -> None:
        self._pinner = pinner
        self._keep = keep
        self._idle: dict[int, list[HostBuffer]] = defaultdict(list)
        self._lock = threading.Lock()
        self._closed = False
        self.size_bytes = 0  # of all buffers that exist

    def take(self, size: int) -> HostBuffer:
        """Raises MemoryError or OSError where the host has no more."""
        size = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
        with self._lock:
            if self._idle[size]:
                return self._idle[size].pop()
        buffer = HostBuffer(size, self._pinner)
        with self._lock:
            self.size_bytes += size
        return buffer

    def give(self, buffer: HostBuffer) -> None:
        with self._lock:
            if self._keep and not self._closed:
                self._idle[buffer.size].append(buffer)
                return
            self.size_bytes -= buffer.size
        buffer.close()

    def close(self) -> None:
        """Frees what is idle, and from now on what comes back."""
        with self._lock:
            self._closed = True
            idle = [buffer for buffers in self._idle.values() for buffer in buffers]
            self._idle.clear()
            self.size_bytes -= sum(buffer.size for buffer in idle)
        for buffer in idle:
            buffer.close()


def populate(address: int, size: int) -> None:
    """Makes the kernel back all pages, on several cores at once: pinning alone would do it on one."""
    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    steps = [(address + at, min(POPULATE_STEP_BYTES, size - at)) for at in range(0, size, POPULATE_STEP_BYTES)]
    with ThreadPoolExecutor(min(POPULATE_THREADS, len(steps)), thread_name_prefix="pd-populate") as threads:
        for start, length in steps:
            threads.submit(madvise, start, length, MADV_POPULATE_WRITE)
