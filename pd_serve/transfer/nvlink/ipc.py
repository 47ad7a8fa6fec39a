"""The seam between nvlink and cudaIpc: three calls. For pools of plain cudaMalloc memory, on one machine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class IpcAllocation:
    """A handle names a whole allocation, so that an address inside of it needs the base as well."""

    address: int
    size_bytes: int
    handle: bytes


class IpcDriver(Protocol):
    """Called from any thread. Every method raises DriverError."""

    def export(self, device: int, address: int) -> IpcAllocation:
        """The allocation that ``address`` lies in."""

    def open(self, device: int, handle: bytes) -> int:
        """Where ``device`` sees the allocation; another call with the same handle may answer the same address."""

    def close(self, device: int, address: int) -> None:
        """Once for each ``open``."""
