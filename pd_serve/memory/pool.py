"""The KV pool of a rank on a host: one anonymous mapping, page-aligned, zeroed by the kernel.

Allocated once at engine start and registered with the transport for the life of the process.
"""

from __future__ import annotations

import contextlib
import mmap

import torch
from torch import Tensor

from pd_serve.kv.layout import KVLayout
from pd_serve.transfer.base import Region


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
