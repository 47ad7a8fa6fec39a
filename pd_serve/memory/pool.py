"""The KV pool of a rank on a host: one anonymous mapping, page-aligned, zeroed by the kernel.

Allocated once at engine start; its addresses never change. Registered with the transport for as long as it is awake.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
from dataclasses import dataclass

import torch
from torch import Tensor

from pd_serve.kv.layout import REGION_ALIGNMENT, KVLayout
from pd_serve.memory.region import PROBE_BLOCK_BYTES, PROBE_BLOCKS, PoolMemory, Region
from pd_serve.memory.usage import KV_CACHE
from pd_serve.wire.memory import MemoryReport, TagUsage

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not know it yet
POPULATE_STEP_BYTES = 8 << 20
POPULATE_PAUSE_S = 0.02  # between steps of about 15 ms: requests come first


@dataclass(frozen=True)
class Extent:
    """Where a region lies in its pool's one allocation."""

    offset: int
    block_bytes: int
    num_blocks: int

    @property
    def size_bytes(self) -> int:
        return self.block_bytes * self.num_blocks


def extents(layout: KVLayout, num_blocks: tuple[int, ...]) -> tuple[tuple[Extent, ...], int]:
    """Where each group's blocks lie (:meth:`KVLayout.region_offsets`), then the probe region; and the size of all."""
    offsets, end = layout.region_offsets(num_blocks)
    found = [
        Extent(offset, layout.block_bytes(group), count)
        for group, (offset, count) in enumerate(zip(offsets, num_blocks, strict=True))
    ]
    found.append(Extent(end, PROBE_BLOCK_BYTES, PROBE_BLOCKS))
    return tuple(found), -(-(end + found[-1].size_bytes) // REGION_ALIGNMENT) * REGION_ALIGNMENT


class HostPool:
    """One allocation, divided by :func:`extents`."""

    def __init__(self, layout: KVLayout, num_blocks: tuple[int, ...]) -> None:
        self._extents, self.size_bytes = extents(layout, num_blocks)
        self._mapping = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # kernels without transparent huge pages
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        # the tensor keeps the mapping alive; it is unmapped with the last view
        self._bytes = torch.frombuffer(self._mapping, dtype=torch.uint8)
        self._populating: threading.Thread | None = None
        self._stop = threading.Event()
        self.asleep = False

    def populate(self) -> None:
        """Makes the kernel back all pages, in the background, lowest blocks first.

        A first write to a page costs as much as several writes to a present one: pulls into a new pool took
        100 ms instead of 2. Contents stay as they are, so that requests can be served meanwhile.
        """
        self._stop.clear()
        self._populating = threading.Thread(target=self._populate, name="pd-populate", daemon=True)
        self._populating.start()

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        start = self._bytes.data_ptr()
        for offset in range(0, self.size_bytes, POPULATE_STEP_BYTES):
            size = min(POPULATE_STEP_BYTES, self.size_bytes - offset)
            if madvise(start + offset, size, MADV_POPULATE_WRITE):
                log.debug("the kernel does not populate memory ahead (errno %d)", ctypes.get_errno())
                return
            if self._stop.wait(POPULATE_PAUSE_S):
                return

    def release(self) -> None:
        """Gives all pages back to the kernel; addresses stay. Nobody may hold the pool registered by now.

        What is read before :meth:`restore` is zero, and what is written takes pages again.
        """
        if self._populating is not None:
            self._stop.set()
            self._populating.join()
            self._populating = None
        self._mapping.madvise(mmap.MADV_DONTNEED)
        self.asleep = True

    def restore(self) -> None:
        """Undoes :meth:`release`, but for the contents: they are zero."""
        self.asleep = False
        self.populate()

    def tensors(self) -> list[Tensor]:
        """A uint8 tensor a group, ``[num_blocks * block_bytes]``."""
        return [self._bytes[e.offset : e.offset + e.size_bytes] for e in self._extents[:-1]]

    def memory(self) -> PoolMemory:
        """What the transport registers."""
        start = self._bytes.data_ptr()
        regions = tuple(Region(start + e.offset, e.block_bytes, e.num_blocks) for e in self._extents)
        return PoolMemory(device=None, regions=regions)

    def report(self) -> MemoryReport:
        usage = TagUsage(self.size_bytes, self.size_bytes, 0 if self.asleep else self.size_bytes)
        return MemoryReport("cpu", {KV_CACHE: usage}, asleep=[KV_CACHE] if self.asleep else [])
