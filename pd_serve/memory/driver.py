"""The seam between pd-serve and a driver of virtual memory: a dozen calls, no bookkeeping.

:class:`pd_serve.memory.cuda_driver.CudaDriver` implements it on the CUDA driver (cuMem*). Everything above it
(tags, nesting, frees, sleep, export, mapping a peer's memory) knows only this file, and is tested on a
driver that maps host memory (memfd).

A *handle* is physical memory; a *reservation* is a range of addresses; mapping joins the two. An address keeps its
value while the handle behind it is unmapped, released and replaced: that is what sleep needs.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol

from pd_serve.errors import PDServeError


class HandleType(StrEnum):
    """How physical memory can be handed to another process."""

    FABRIC = "fabric"  # 64 bytes that travel in a message; also across the machines of an MNNVL domain
    POSIX_FD = "posix_fd"  # a file descriptor, over a Unix socket
    NONE = "none"  # not at all


class DriverError(PDServeError):
    """A driver call failed. ``code``: the driver's own name for it, e.g. CUDA_ERROR_OUT_OF_MEMORY."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call}: {code}")
        self.call = call
        self.code = code

    @property
    def out_of_memory(self) -> bool:
        return "OUT_OF_MEMORY" in self.code


@dataclass(frozen=True)
class MemoryKind:
    """What physical memory is asked for: the same for the granularity query and for the allocation."""

    device: int  # ordinal
    handle_type: HandleType
    rdma: bool  # GPUDirect RDMA capable


class VirtualMemoryDriver(Protocol):
    """All sizes in bytes, all addresses absolute. Every method raises DriverError."""

    def granularity(self, kind: MemoryKind) -> int:
        """Sizes and alignments of allocations of this kind are multiples of it."""

    def rdma_supported(self, device: int) -> bool:
        """Whether the device says that cumem memory can be registered with an RDMA NIC."""

    def create(self, size: int, kind: MemoryKind) -> int:
        """Physical memory; ``size`` is a multiple of the granularity. Returns a handle."""

    def release(self, handle: int) -> None: ...

    def reserve(self, size: int, alignment: int) -> int:
        """A range of addresses."""

    def free_address(self, address: int, size: int) -> None: ...

    def map(self, address: int, size: int, handle: int, device: int) -> None:
        """Puts the memory at a reserved address, readable and writable by ``device``."""

    def unmap(self, address: int, size: int) -> None: ...

    def export_fd(self, handle: int) -> int:
        """A new file descriptor, owned by the caller."""

    def import_fd(self, fd: int) -> int:
        """A handle on a peer's memory; ``fd`` stays the caller's."""

    def export_fabric(self, handle: int) -> bytes: ...

    def import_fabric(self, fabric: bytes) -> int: ...

    def synchronize(self, device: int) -> None:
        """Waits for all work of the device: before memory that it may still use is unmapped."""

    def memory_info(self, device: int) -> tuple[int, int]:
        """``(free, total)`` bytes of the device."""

    def copy_to_host(self, target: int, source: int, size: int, device: int) -> None:
        """Memory of ``device`` into host memory (pinned where the caller made it so); returns when done."""

    def copy_to_device(self, target: int, source: int, size: int, device: int) -> None: ...
