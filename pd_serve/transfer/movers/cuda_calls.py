"""The CUDA driver calls of the mover: thin wrappers that raise TransferError, and the two hot calls through ctypes.

cuda-bindings converts every element of a list argument; the parameters of a launch would cost tens of microseconds of
Python, and a batch of copies more. :func:`launch_call` hands the driver packed bytes instead, :func:`memcpy_batch_call`
numpy arrays.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from pd_serve.errors import FailureKind, TransferError
from pd_serve.memory import memcpy_batch
from pd_serve.memory.driver import DriverError

try:
    from cuda.bindings import driver, nvrtc
except ImportError as error:  # the extra is not installed
    raise TransferError(
        FailureKind.TRANSFER, f"cuda-bindings cannot be imported ({error}); install pd-serve[cuda]"
    ) from error

I64 = npt.NDArray[np.int64]

__all__ = ["check", "compile_kernels", "driver", "launch_call", "memcpy_batch_call"]


def check(answer: tuple[Any, ...], call: str) -> Any:
    """The result of a cuda-bindings call: nothing, one value, or a tuple. Raises TransferError."""
    status, *values = answer
    if int(status) != 0:
        raise TransferError(FailureKind.TRANSFER, f"{call}: {getattr(status, 'name', status)}")
    return values[0] if len(values) == 1 else tuple(values)


def memcpy_batch_call() -> Callable[[I64, I64, I64, int], None]:
    """:func:`pd_serve.memory.memcpy_batch.memcpy_batch_call`. It raises TransferError, and so does what it returns."""
    try:
        call = memcpy_batch.memcpy_batch_call()
    except DriverError as error:
        raise TransferError(FailureKind.TRANSFER, str(error)) from error

    def copy(targets: I64, sources: I64, sizes: I64, stream: int) -> None:
        try:
            call(targets, sources, sizes, stream)
        except DriverError as error:
            raise TransferError(FailureKind.TRANSFER, str(error)) from error

    return copy


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
