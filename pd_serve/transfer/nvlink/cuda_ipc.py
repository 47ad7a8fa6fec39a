"""cudaIpc through cuda-bindings: :class:`pd_serve.transfer.nvlink.ipc.IpcDriver` on a GPU.

A handle opens in another process only (a process cannot open its own), and only where both processes are in one PID
namespace; memory of PyTorch's expandable segments has none.
"""

from __future__ import annotations

import ctypes
from typing import Any

from pd_serve.memory.driver import DriverError
from pd_serve.transfer.nvlink.ipc import IpcAllocation

HANDLE_BYTES = 64  # cudaIpcMemHandle_t


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
