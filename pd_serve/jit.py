"""Ground for the CPU kernels: numba's set-up, element access for bfloat16, float32 and FP8, and a fast ``exp``.

Used where kernels are: :mod:`pd_serve.compute.cpu.ops`, :mod:`pd_serve.engine` (attention, sampling) and
:mod:`pd_serve.transfer.movers.host_kernels`. Owns where compiled kernels are kept: ``numba/<version>/`` in the cache.
Must never import one of these rooms, nor be imported by processes without torch.

Kernels take raw addresses (``Tensor.data_ptr()``): passing eight of them costs 0.2 us, passing eight tensors as
arrays 5 us, and a decode step makes hundreds of calls. They check nothing: their callers, which hold the tensors, do.

The first argument of each kernel is its element type, :func:`element_of`: one source compiles to a bfloat16 and a
float32 kernel. Values are float32 between a load and a store, whatever the element. Numbers in FP8 (e4m3) have no
sub-normal float32 on their way: processors take a hundred cycles for each.
"""

from __future__ import annotations

import fcntl
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import __version__ as numba_version
from numba import config, float32, njit, set_num_threads, types
from numba.core import caching, cgutils
from numba.extending import intrinsic

from pd_serve.paths import cache_directory

_TURN_S = 60.0  # a process may have been stopped in the middle of compiling
# A user's folder, from $NUMBA_CACHE_DIR, is the user's.
_OURS = not config.CACHE_DIR

# sums may be reordered, as vectors need it; infinities and NaN keep their meaning
FASTMATH = {"reassoc", "nsz", "contract"}
_FP8, _BFLOAT16, _FLOAT32 = np.uint8(0), np.uint16(0), np.float32(0)


def element_of(dtype: torch.dtype) -> np.generic:
    """What to pass as a kernel's ``element``."""
    if dtype is torch.float8_e4m3fn:
        return _FP8
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
    cache, so there is a folder for each version of it, of these and of this module.
    """
    options = njit(cache=not _OURS, fastmath=FASTMATH, parallel=parallel, error_model="numpy", nogil=True)

    def made(function: Callable[..., None]) -> Any:
        dispatcher = options(function)
        if _OURS:
            others = [__file__, *(str(module.__file__) for module in inlines)]
            dispatcher._cache = _KernelCache(function, others)
        dispatcher.compile = _one_at_a_time(dispatcher)
        return dispatcher

    return made(function) if function is not None else made


class _Place(caching._CacheLocator):  # type: ignore[misc]
    """The folder of a kernel: by numba's version, and what its file and ``others`` say.

    numba's own place has the path of the file in it: a package installed anew elsewhere would compile all again.
    """

    def __init__(self, function: Any, file: str, others: Sequence[str]) -> None:
        self._py_file = file  # for numba's warnings
        self._line = function.__code__.co_firstlineno
        text = b"".join(Path(each).read_bytes() for each in (file, *others))
        self._version = hashlib.sha256(numba_version.encode() + text).hexdigest()[:12]

    def get_cache_path(self) -> str:
        return str(cache_directory() / "numba" / self._version)

    def get_source_stamp(self) -> str:
        return self._version

    def get_disambiguator(self) -> str:
        return str(self._line)


class _Impl(caching.CompileResultCacheImpl):  # type: ignore[misc]
    """Where nothing can be written to a kernel's place, it is numba's."""

    def __init__(self, function: Any, others: Sequence[str]) -> None:
        self._others = others
        self._locator_classes = [self, *caching.CompileResultCacheImpl._locator_classes]
        super().__init__(function)

    def from_function(self, function: Any, file: str) -> _Place | None:
        """What numba asks the classes of locators."""
        place = _Place(function, file, self._others)
        try:
            place.ensure_cache_path()
        except OSError:
            return None
        return place


class _KernelCache(caching.FunctionCache):  # type: ignore[misc]
    def __init__(self, function: Any, others: Sequence[str]) -> None:
        self._impl_class = lambda function: _Impl(function, others)
        super().__init__(function)


def _one_at_a_time(dispatcher: Any) -> Callable[[Any], Any]:
    """Its ``compile``: of processes that need the same kernel, as engines do that start together, one compiles it.

    The others take it from the cache then: with an empty one, two engines on two cores were ready after 12 s, not 14,
    and half of the work was done once.
    """
    compile_now: Callable[[Any], Any] = dispatcher.compile
    function = dispatcher.py_func
    sizes = [cell.cell_contents for cell in function.__closure__ or () if isinstance(cell.cell_contents, int)]

    def compile_in_turn(signature: Any) -> Any:
        name = hashlib.sha256(repr((function.__qualname__, sizes, signature)).encode()).hexdigest()[:16]
        folder = Path(dispatcher.stats.cache_path)
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{name}.lock").open("w") as file:
            deadline_s = time.monotonic() + _TURN_S
            while time.monotonic() < deadline_s:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until the file is closed, or its process ends
                    break
                except BlockingIOError:
                    time.sleep(0.02)
            return compile_now(signature)

    return compile_in_turn


def _pointer(builder: Any, element: Any, address: Any, index: Any) -> Any:
    kind = {types.uint8: ir.IntType(8), types.uint16: ir.IntType(16)}.get(element, ir.FloatType())
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


def float_of_fp8(builder: Any, bits: Any) -> Any:
    """Code for the float32 of e4m3 numbers: ``bits`` 8 bits, or a vector of them."""
    count = getattr(bits.type, "count", None)
    words = ir.IntType(32) if count is None else ir.VectorType(ir.IntType(32), count)
    floats = ir.FloatType() if count is None else ir.VectorType(ir.FloatType(), count)

    def constant(kind: Any, value: Any) -> Any:
        return ir.Constant(kind, value if count is None else [value] * count)

    def word(value: int) -> Any:
        return constant(words, value)

    wide = builder.zext(bits, words)
    magnitude = builder.and_(wide, word(0x7F))
    shifted = builder.shl(magnitude, word(20))
    small = builder.icmp_unsigned("<", magnitude, word(8))
    # 1.mmm of their own exponent; small ones: 1.mmm * 2**-6, less 2**-6
    start = builder.select(small, word(121 << 23), word(120 << 23))
    value = builder.bitcast(builder.add(shifted, start), floats)
    value = builder.select(small, builder.fsub(value, constant(floats, 2.0**-6)), value)
    value = builder.select(builder.icmp_unsigned("==", magnitude, word(0x7F)), constant(floats, float("nan")), value)
    sign = builder.shl(builder.and_(wide, word(0x80)), word(24))
    return builder.bitcast(builder.or_(builder.bitcast(value, words), sign), floats)


def _fp8_of(builder: Any, value: Any) -> Any:
    """Code for the nearest e4m3 number of a float32, the largest for what is beyond it."""
    i32, f32 = ir.IntType(32), ir.FloatType()
    bits = builder.bitcast(value, i32)
    sign = builder.and_(builder.lshr(bits, i32(24)), i32(0x80))
    magnitude = builder.bitcast(builder.and_(bits, i32(0x7FFFFFFF)), f32)
    is_nan = builder.fcmp_unordered("uno", value, value)
    magnitude = builder.select(builder.fcmp_ordered(">", magnitude, f32(448.0)), f32(448.0), magnitude)
    whole = builder.bitcast(magnitude, i32)
    odd = builder.and_(builder.lshr(whole, i32(20)), i32(1))
    rounded = builder.lshr(builder.add(builder.add(whole, i32(0x7FFFF)), odd), i32(20))
    normal = builder.sub(rounded, i32(120 << 3))
    # below 2**-6 they are 2**-9 apart: adding 1.5 * 2**23 leaves the nearest whole number of those in the low bits
    steps = builder.fadd(builder.fmul(magnitude, f32(512.0)), f32(12582912.0))
    tiny = builder.and_(builder.bitcast(steps, i32), i32(0xFF))
    code = builder.select(builder.fcmp_ordered("<", magnitude, f32(2.0**-6)), tiny, normal)
    return builder.trunc(builder.or_(builder.select(is_nan, i32(0x7F), code), sign), ir.IntType(8))


@intrinsic
def load(typingctx: Any, element: Any, address: Any, index: Any) -> Any:
    """``address[index]`` as float32; ``index`` counts elements."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        bits = builder.load(_pointer(builder, signature.args[0], arguments[1], arguments[2]))
        if signature.args[0] == types.uint8:
            return float_of_fp8(builder, bits)
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
        if signature.args[0] == types.uint8:
            value = _fp8_of(builder, value)
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
def move(typingctx: Any, target: Any, source: Any, size: Any) -> Any:
    """``memcpy``."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        i64, byte = ir.IntType(64), ir.IntType(8).as_pointer()
        memcpy = builder.module.declare_intrinsic("llvm.memcpy", [byte, byte, i64])
        target, source = (builder.inttoptr(a, byte) for a in arguments[:2])
        builder.call(memcpy, [target, source, arguments[2], ir.IntType(1)(0)])
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


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
