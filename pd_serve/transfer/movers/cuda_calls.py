"""The CUDA driver calls of the mover: thin wrappers that raise TransferError, and the two hot calls through ctypes.

cuda-bindings converts every element of a list argument; a batch of a thousand copies would cost a millisecond of
Python, and the parameters of a launch tens of microseconds. :func:`memcpy_batch_call` hands the driver numpy arrays
instead, :func:`launch_call` packed bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.errors import FailureKind, TransferError

try:
    from cuda.bindings import driver, nvrtc
except ImportError as error:  # the extra is not installed
    raise TransferError(
        FailureKind.TRANSFER, f"cuda-bindings cannot be imported ({error}); install pd-serve[cuda]"
    ) from error

I64 = npt.NDArray[np.int64]

__all__ = ["check", "compile_kernels", "driver", "launch_call", "memcpy_batch_call"]

SRC_ACCESS_ORDER_STREAM = 1
FLAG_PREFER_OVERLAP_WITH_COMPUTE = 1


def check(answer: tuple[Any, ...], call: str) -> Any:
    """The result of a cuda-bindings call: nothing, one value, or a tuple. Raises TransferError."""
    status, *values = answer
    if int(status) != 0:
        raise TransferError(FailureKind.TRANSFER, f"{call}: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)


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
    """``copy(targets, sources, sizes, stream)``: cuMemcpyBatchAsync (CUDA 12.8 and later). Raises TransferError."""
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
            raise TransferError(FailureKind.TRANSFER, f"cuMemcpyBatchAsync of {len(sizes)} ranges: error {status}")

    return copy


def _memcpy_batch_entry() -> tuple[int, bool]:
    """The driver's function and whether it has a failIdx argument: the entry that came with CUDA 13.0 has not."""
    for version, has_fail_index in ((13000, False), (12080, True)):
        status, pointer, _ = driver.cuGetProcAddress(b"cuMemcpyBatchAsync", version, 0)
        if int(status) == 0 and int(pointer):
            return int(pointer), has_fail_index
    raise TransferError(FailureKind.TRANSFER, "the driver has no cuMemcpyBatchAsync; it needs CUDA 12.8 or later")


PARAMETERS_BYTES = 256  # more than any of our kernels has
_PARAM_BUFFER_POINTER, _PARAM_BUFFER_SIZE, _PARAM_END = 1, 2, 0


def launch_call() -> Callable[[int, int, int, int, int, bytes], None]:
    """``launch(function, grid, block, shared_bytes, stream, parameters)``, one-dimensional. Raises TransferError.

    ``parameters``: as the kernel has them, each aligned to its size.
    """
    pointer = int(check(driver.cuGetProcAddress(b"cuLaunchKernel", 12000, 0), "cuGetProcAddress")[0])
    call = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *([ctypes.c_uint] * 7), *([ctypes.c_void_p] * 3))(pointer)
    buffer = ctypes.create_string_buffer(PARAMETERS_BYTES)
    size = ctypes.c_size_t(0)
    extra = (ctypes.c_void_p * 5)(
        _PARAM_BUFFER_POINTER, ctypes.addressof(buffer), _PARAM_BUFFER_SIZE, ctypes.addressof(size), _PARAM_END
    )

    def launch(function: int, grid: int, block: int, shared_bytes: int, stream: int, parameters: bytes) -> None:
        size.value = len(parameters)
        ctypes.memmove(buffer, parameters, len(parameters))
        status = call(function, grid, 1, 1, block, 1, 1, shared_bytes, stream, None, extra)
        if status != 0:
            raise TransferError(FailureKind.TRANSFER, f"cuLaunchKernel of {grid} x {block} threads: error {status}")

    return launch


def compile_kernels(source: str, device: int) -> bytes:
    """A cubin for the device. Raises TransferError with the compiler's log."""
    major = check(
        driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device),
        "cuDeviceGetAttribute",
    )
    minor = check(
        driver.cuDeviceGetAttribute(driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR, device),
        "cuDeviceGetAttribute",
    )
    program = check(nvrtc.nvrtcCreateProgram(source.encode(), b"cuda_kernels.cu", 0, [], []), "nvrtcCreateProgram")
    options = [f"--gpu-architecture=sm_{major}{minor}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
    if int(status) != 0:
        text = b" " * check(nvrtc.nvrtcGetProgramLogSize(program), "nvrtcGetProgramLogSize")
        nvrtc.nvrtcGetProgramLog(program, text)
        raise TransferError(FailureKind.TRANSFER, f"the CUDA kernels do not compile: {text.decode(errors='replace')}")
    cubin: bytes = b" " * check(nvrtc.nvrtcGetCUBINSize(program), "nvrtcGetCUBINSize")
    check(nvrtc.nvrtcGetCUBIN(program, cubin), "nvrtcGetCUBIN")
    nvrtc.nvrtcDestroyProgram(program)
    return cubin
