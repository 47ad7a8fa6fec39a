"""Ground for the CPU kernels: numba's set-up, element access for bfloat16 and float32, and a fast ``exp``.

Used where kernels are: :mod:`pd_serve.compute.cpu.ops`, :mod:`pd_serve.engine` (attention, sampling) and
:mod:`pd_serve.transfer.movers.host_kernels`. Owns where compiled kernels are kept: ``numba/<version>/`` in the cache.
Must never import one of these rooms, nor be imported by processes without torch.

Kernels take raw addresses (``Tensor.data_ptr()``): passing eight of them costs 0.2 us, passing eight tensors as
arrays 5 us, and a decode step makes hundreds of calls. They check nothing: their callers, which hold the tensors, do.

The first argument of each kernel is its element type, :func:`element_of`: one source compiles to a bfloat16 and a
float32 kernel. Values are float32 between a load and a store, whatever the element.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import config, float32, njit, set_num_threads, types
from numba.core import cgutils
from numba.extending import intrinsic

from pd_serve.paths import cache_directory

# A user's folder, from $NUMBA_CACHE_DIR, is the user's.
_OURS = not config.CACHE_DIR

# sums may be reordered, as vectors need it; infinities and NaN keep their meaning
FASTMATH = {"reassoc", "nsz", "contract"}
_BFLOAT16, _FLOAT32 = np.uint16(0), np.float32(0)


def element_of(dtype: torch.dtype) -> np.generic:
    """What to pass as a kernel's ``element``."""
    return _BFLOAT16 if dtype is torch.bfloat16 else _FLOAT32


def set_kernel_threads(threads: int) -> None:
    """For kernels that are ``parallel``; to be called before the first of them, which only one thread may call.

    numba's own threads sleep between kernels. Its OpenMP's would spin, on the cores that torch's threads need (they
    are of two libraries, which know nothing of each other).
    """
    config.THREADING_LAYER = "workqueue"
    set_num_threads(min(threads, config.NUMBA_NUM_THREADS))


def kernel(
    function: Callable[..., None] | None = None, *, parallel: bool = False, inlines: tuple[ModuleType, ...] = ()
) -> Any:
    """Compiled on its first call, or taken from the cache. ``parallel``: ``prange`` uses numba's threads.

    ``inlines``: modules whose code ends up in it. A kernel's own file alone decides whether numba takes it from its
    cache, so there is a folder for each version of these and of this module. It is set for each kernel, and not by
    $NUMBA_CACHE_DIR: numba reads that when the first module imports numba, and without a folder it keeps kernels
    beside their source, where no version tells them apart.
    """
    if _OURS:
        files = [__file__, *(str(module.__file__) for module in inlines)]
        version = hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]
        config.CACHE_DIR = str(cache_directory() / "numba" / version)
    options = njit(cache=True, fastmath=FASTMATH, parallel=parallel, error_model="numpy", nogil=True)
    return options(function) if function is not None else options


def _pointer(builder: Any, element: Any, address: Any, index: Any) -> Any:
    kind = ir.IntType(16) if element == types.uint16 else ir.FloatType()
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def load(typingctx: Any, element: Any, address: Any, index: Any) -> Any:
    """``address[index]`` as float32; ``index`` counts elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.load(_pointer(builder, signature.args[0], arguments[1], arguments[2]))
        if signature.args[0] != types.uint16:
            return bits
        i32 = ir.IntType(32)  # a bfloat16 is the upper half of a float32
        return builder.bitcast(builder.shl(builder.zext(bits, i32), i32(16)), ir.FloatType())

    return float32(element, types.int64, types.int64), generate


@intrinsic
def store(typingctx: Any, element: Any, address: Any, index: Any, value: Any) -> Any:
    """``address[index] = value``, rounded to nearest even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        value = arguments[3]
        if signature.args[0] == types.uint16:
            i32 = ir.IntType(32)
            bits = builder.bitcast(value, i32)
            odd = builder.and_(builder.lshr(bits, i32(16)), i32(1))
            rounded = builder.add(builder.add(bits, i32(0x7FFF)), odd)
            value = builder.trunc(builder.lshr(rounded, i32(16)), ir.IntType(16))
        builder.store(value, _pointer(builder, signature.args[0], arguments[1], arguments[2]))
        return context.get_dummy_value()

    return types.void(element, types.int64, types.int64, float32), generate


@intrinsic
def load_int(typingctx: Any, kind: Any, address: Any, index: Any) -> Any:
    """``address[index]`` of an int32 or int64 array; ``kind`` is a value of that type."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer = builder.inttoptr(arguments[1], ir.IntType(signature.args[0].bitwidth).as_pointer())
        return builder.sext(builder.load(builder.gep(pointer, [arguments[2]])), ir.IntType(64))

    return types.int64(kind, types.int64, types.int64), generate


@intrinsic
def prefetch(typingctx: Any, element: Any, address: Any, index: Any) -> Any:
    """Asks for the cache line of ``address[index]``; never faults."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i32, byte = ir.IntType(32), ir.IntType(8).as_pointer()
        pointer = builder.bitcast(_pointer(builder, signature.args[0], arguments[1], arguments[2]), byte)
        kind = ir.FunctionType(ir.VoidType(), [byte, i32, i32, i32])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [pointer, i32(0), i32(3), i32(1)])  # to read, into all caches, data
        return context.get_dummy_value()

    return types.void(element, types.int64, types.int64), generate


@intrinsic
def larger(typingctx: Any, a: Any, b: Any) -> Any:
    """The larger of two float32 that are not NaN. (Unlike ``max`` it vectorises when a loop reduces with it.)"""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.FloatType(), [ir.FloatType(), ir.FloatType()])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.maxnum.f32")
        return builder.call(function, arguments, fastmath=("nnan", "nsz"))

    return float32(float32, float32), generate


@intrinsic
def bits_of(typingctx: Any, value: Any) -> Any:
    """The 32 bits of a float32, as int32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(float32), generate


@intrinsic
def float_of(typingctx: Any, bits: Any) -> Any:
    """The float32 of 32 bits."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return float32(types.int32), generate


_LOG2_E = np.float32(1.4426950408889634)
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 * 2**23: adding it leaves the nearest integer in the low bits
_LOWEST, _HIGHEST = np.float32(-87.0), np.float32(88.0)
_C2, _C3, _C4 = np.float32(0.5), np.float32(1.6666665459e-1), np.float32(4.1665795894e-2)
_C5, _C6, _C7 = np.float32(8.3334519073e-3), np.float32(1.3981999507e-3), np.float32(1.9875691500e-4)
_ONE = np.float32(1.0)
_SHIFT, _EXPONENT_OF_ONE = np.int32(23), np.int32(0x3F800000)


@njit(fastmath={"contract"})
def exp(x: Any) -> Any:
    """``e**x`` within 2 ulp of float32, made of operations that vectorise; below -87 it stays at e**-87.

    Cephes' scheme: ``2**n * p(r)`` with ``x = n ln 2 + r``. (libm's exp would be called element by element.)
    """
    x = min(max(x, _LOWEST), _HIGHEST)
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = ((((_C7 * r + _C6) * r + _C5) * r + _C4) * r + _C3) * r + _C2
    return (p * (r * r) + r + _ONE) * float_of(np.int32(np.int32(bits_of(shifted) << _SHIFT) + _EXPONENT_OF_ONE))
