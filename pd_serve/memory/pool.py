"""The KV pool of a rank on a host: one anonymous mapping, page-aligned, zeroed by the kernel.

Allocated once at engine start and registered with the transport for the life of the process.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import mmap
import threading
import time

import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region

log = logging.getLogger(__name__)

MADV_POPULATE_WRITE = 23  # Linux 5.14; the mmap module does not know it yet
POPULATE_STEP_BYTES = 8 << 20
POPULATE_PAUSE_S = 0.02  # between steps of about 15 ms: requests come first


class HostPool:
    """One allocation, divided into a region a layer group (:meth:`KVLayout.region_offsets`)."""

    def __init__(self, layout: KVLayout, num_blocks: tuple[int, ...]) -> None:
        self._layout = layout
        self._num_blocks = num_blocks
        self._offsets, self.size_bytes = layout.region_offsets(num_blocks)
        mapping = mmap.mmap(-1, self.size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError, AttributeError):  # kernels without transparent huge pages
            mapping.madvise(mmap.MADV_HUGEPAGE)
        # the tensor keeps the mapping alive; it is unmapped with the last view
        self._bytes = torch.frombuffer(mapping, dtype=torch.uint8)

    def populate(self) -> None:
        """Makes the kernel back all pages, in the background, lowest blocks first.

        A first write to a page costs as much as several writes to a present one: pulls into a new pool took
        100 ms instead of 2. Contents stay as they are, so that requests can be served meanwhile.
        """
        threading.Thread(target=self._populate, name="pd-populate", daemon=True).start()

    def _populate(self) -> None:
        madvise = ctypes.CDLL(None, use_errno=True).madvise
        madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
        start = self._bytes.data_ptr()
        for offset in range(0, self.size_bytes, POPULATE_STEP_BYTES):
            size = min(POPULATE_STEP_BYTES, self.size_bytes - offset)
            if madvise(start + offset, size, MADV_POPULATE_WRITE):
                log.debug("the kernel does not populate memory ahead (errno %d)", ctypes.get_errno())
                return
            time.sleep(POPULATE_PAUSE_S)

    def tensors(self) -> list[Tensor]:
        """A uint8 tensor a group, ``[num_blocks * block_bytes]``."""
        return [
            self._bytes[offset : offset + self._layout.block_bytes(group) * count]
            for group, (offset, count) in enumerate(zip(self._offsets, self._num_blocks, strict=True))
        ]

    def regions(self) -> list[Region]:
        """What the transport registers."""
        return [
            Region(address=t.data_ptr(), block_bytes=self._layout.block_bytes(group), num_blocks=count)
            for group, (t, count) in enumerate(zip(self.tensors(), self._num_blocks, strict=True))
        ]
