"""cuMemcpyBatchAsync, called with numpy arrays: many copies in one call of the driver.

cuda-bindings converts every element of a list argument, so that a batch of a thousand copies would cost a millisecond
of Python. Used by the mover of transfers and by that of the host tier.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pd_serve.memory.driver import DriverError

I64 = npt.NDArray[np.int64]

SRC_ACCESS_ORDER_STREAM = 1
FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1


class _Location(ctypes.Structure):
    _fields_ = [("type", ctypes.c_uint), ("id", ctypes.c_int)]


class _Attributes(ctypes.Structure):
    """CUmemcpyAttributes."""

    _fields_ = [
        ("order", ctypes.c_uint),
        ("source_hint", _Location),
        ("target_hint", _Location),
        ("flags", ctypes.c_uint),
    ]


def memcpy_batch_call() -> Callable[[I64, I64, I64, int], None]:
    """``copy(targets, sources, sizes, stream)``: cuMemcpyBatchAsync (CUDA 12.8 and later).

    Raises DriverError, as does what it returns, which the calling thread's context is used for. Sizes are in bytes.
    """
    pointer, has_fail_index = _memcpy_batch_entry()
    failed = (ctypes.byref(ctypes.c_size_t(0)),) if has_fail_index else ()
    call = ctypes.CFUNCTYPE(
        ctypes.c_int,
        *([ctypes.c_void_p] * 3),
        ctypes.c_size_t,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        *([ctypes.c_void_p] * len(failed)),
        ctypes.c_void_p,
    )(pointer)
    attributes = _Attributes(order=SRC_ACCESS_ORDER_STREAM, flags=FLAG_PREFER_OVERLAP_WITH_COMPUTE)
    first = ctypes.c_size_t(0)

    def copy(targets: I64, sources: I64, sizes: I64, stream: int) -> None:
        status = call(
            targets.ctypes.data,
            sources.ctypes.data,
            sizes.ctypes.data,
            len(sizes),
            ctypes.byref(attributes),
            ctypes.byref(first),
            1,
            *failed,
            stream,
        )
        if status != 0:
            raise DriverError(f"cuMemcpyBatchAsync of {len(sizes)} ranges", str(status))

    return copy


def _memcpy_batch_entry() -> tuple[int, bool]:
    """The driver's function and whether it has a failIdx argument: the entry that came with CUDA 13.0 has not."""
    driver = importlib.import_module("cuda.bindings.driver")
    for version, has_fail_index in ((13000, False), (12080, True)):
        status, pointer, _ = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", version, 0)
        if int(status) == 0 and int(pointer):
            return int(pointer), has_fail_index
    raise DriverError("cuMemcpyBatchAsync, which came with CUDA 12.8", "CUDA_ERROR_NOT_FOUND")
