"""cudaIpc, for pools of plain cudaMalloc memory on one machine: the seam, three calls, and cuda-bindings behind it.

A handle opens in another process only (a process cannot open its own), and only where both processes are in one PID
namespace; memory of PyTorch's expandable segments has none.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Protocol

from pd_serve.memory.driver import DriverError

HANDLE_BYTES = 64  # cudaIpcMemHandle_t


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


class CudaIpc:
    """Raises DriverError at construction where cuda-bindings are missing."""

    def __init__(self) -> None:
        try:
            from cuda.bindings import driver, runtime
        except ImportError as error:
            raise DriverError("import cuda.bindings", str(error)) from error
        self._cu: Any = driver
        self._rt: Any = runtime

    def export(self, device: int, address: int) -> IpcAllocation:
        self._use(device)
        # any address of an allocation gives its handle, but the reader has to know where in it the address is
        base, size = self._call("cuMemGetAddressRange", self._cu, address)
        handle = self._call("cudaIpcGetMemHandle", self._rt, int(base))
        return IpcAllocation(int(base), int(size), ctypes.string_at(handle.getPtr(), HANDLE_BYTES))

    def open(self, device: int, handle: bytes) -> int:
        if len(handle) != HANDLE_BYTES:
            raise DriverError("cudaIpcOpenMemHandle", f"a handle of {len(handle)} bytes")
        self._use(device)
        opened = self._rt.cudaIpcMemHandle_t()
        ctypes.memmove(opened.getPtr(), handle, HANDLE_BYTES)
        return int(self._call("cudaIpcOpenMemHandle", self._rt, opened, self._rt.cudaIpcMemLazyEnablePeerAccess))

    def close(self, device: int, address: int) -> None:
        self._use(device)
        self._call("cudaIpcCloseMemHandle", self._rt, address)

    def _use(self, device: int) -> None:
        """The calling thread's context; a thread begins on device 0."""
        self._call("cudaSetDevice", self._rt, device)

    def _call(self, name: str, module: Any, *args: Any) -> Any:
        code, *values = getattr(module, name)(*args)
        if int(code) != 0:
            raise DriverError(name, code.name)
        return values[0] if len(values) == 1 else tuple(values)
