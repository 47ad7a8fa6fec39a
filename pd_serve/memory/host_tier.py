"""The memory of a host tier: exactly as large as was asked for, of this machine's memory or of a file.

Owned by what copies (:mod:`pd_serve.compute.copies`). Knows no block's content. Pages are taken when they are first
written, so that a start waits for nothing.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from pd_serve.errors import ConfigError
from pd_serve.kv.layout import REGION_ALIGNMENT, KVLayout
from pd_serve.kv.tiers import Copy
from pd_serve.memory.region import Region
from pd_serve.values import readable_size

I64 = npt.NDArray[np.int64]


class TierMemory:
    """``size_bytes``: the most that it takes. ``directory``: of a file that is mapped; empty: no file.

    Raises ConfigError where there is no room, for a single block or on the disk.
    """

    def __init__(self, layout: KVLayout, size_bytes: int, directory: str = "") -> None:
        groups = range(len(layout.groups))
        self._block_bytes = [layout.block_bytes(group) for group in groups]
        count = (size_bytes - len(groups) * REGION_ALIGNMENT) // sum(self._block_bytes)
        if count < 1:
            raise ConfigError(
                f"--host-kv-memory {readable_size(size_bytes)} has no room for a KV block of "
                f"{readable_size(sum(self._block_bytes))}: raise it, or 0 for no host tier"
            )
        self.num_slots = (count + 1,) * len(groups)  # slot 0 has no memory
        offsets, self.size_bytes = layout.region_offsets((count,) * len(groups))
        fd = _file(directory, self.size_bytes) if directory else -1
        try:
            flags = mmap.MAP_SHARED if directory else mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
            self._mapping = mmap.mmap(fd, self.size_bytes, flags=flags)
        finally:
            if fd >= 0:
                os.close(fd)
        if not directory:
            with contextlib.suppress(OSError, AttributeError):  # kernels without transparent huge pages
                self._mapping.madvise(mmap.MADV_HUGEPAGE)
        self._view = ctypes.c_char.from_buffer(self._mapping)
        self.address = ctypes.addressof(self._view)
        self._starts = [self.address + offset for offset in offsets]

    def place(self, group: int, slot: int) -> int:
        """Address of a slot, from 1 on."""
        return self._starts[group] + (slot - 1) * self._block_bytes[group]

    def places(self, copies: Sequence[Copy], regions: Sequence[Region]) -> tuple[I64, I64, I64]:
        """Addresses in the pool, which has these regions, and here, and bytes."""
        pool = [regions[group].address + block * regions[group].block_bytes for group, block, _ in copies]
        here = [self.place(group, slot) for group, _, slot in copies]
        sizes = [self._block_bytes[group] for group, _, _ in copies]
        return np.array(pool, np.int64), np.array(here, np.int64), np.array(sizes, np.int64)

    def discard(self) -> None:
        """Gives pages back to the kernel where they are memory; contents are lost. A file keeps its size."""
        self._mapping.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Nobody may copy any more."""
        del self._view
        self._mapping.close()


def _file(directory: str, size_bytes: int) -> int:
    """One without a name: it goes with the process, however that ends."""
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(prefix="pd-serve-kv-", dir=directory) as file:
            os.posix_fallocate(file.fileno(), 0, size_bytes)  # a disk that fills up later would kill the process
            return os.dup(file.fileno())
    except OSError as error:
        raise ConfigError(
            f"--host-kv-path {directory} cannot hold {readable_size(size_bytes)}: {error.strerror}; name a directory "
            "with room, or lower --host-kv-memory"
        ) from error
