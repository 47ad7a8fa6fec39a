"""The mover on a GPU: copies by copy engines or by a kernel on a few SMs, checksums by a kernel.

See :class:`pd_serve.transfer.mover.Mover`. All work goes to streams of its own; the thread that made it must be the one
that uses it (the device's primary context is made current there). Sources may be a peer GPU's mapped memory.

Which way a copy goes was found by measurement (docs/benchmarks.md, `benchmarks/nvlink.py`): copy engines take no SM
from what computes meanwhile, but need long runs; the kernel reads rows of any size.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pd_serve.errors import TransferError
from pd_serve.transfer.cuda_calls import check, compile_kernels, driver, memcpy_batch_call
from pd_serve.transfer.mover import I64, U64, Rows
from pd_serve.wire.peer import FailureKind

ENGINE_MIN_BYTES = 512 << 10  # copy engines from this average run length on
PROGRAMS = 16  # CTAs of the copy kernel: what NVLink needs
LOCAL_PROGRAMS = 66  # the same to and from staging memory, within one GPU: half of an H200, for a tenth of the time
# A pull is submitted in growing parts: the link is busy with one while the next is prepared. (first bytes, growth)
ENGINE_PARTS = (4 << 20, 4)
KERNEL_PARTS = (16 << 20, 16)
UNIT_BYTES = 16 << 10  # of a row, in flight at once in a slot
SLOT_BYTES = 192 << 10  # shared memory for slots of one CTA
MAX_SLOTS = 64  # of one warp; as in the kernel
WARPS = 4  # of a CTA, for small units; as in the kernel
SMALL_UNIT_BYTES = 8 << 10
PLAIN_WARPS = 8
CHECKSUM_UNIT_BYTES = 32 << 10
CHECKSUM_PROGRAMS_PER_SM = 4
ALIGNMENT = 4096
NOT_READY = int(driver.CUresult.CUDA_ERROR_NOT_READY)
ONE_ROW = np.zeros(1, dtype=np.int64)


Scratch = tuple[int, int, int]  # size, host address, device address


class _Buffers:
    """Scratch memory in powers of two, device and pinned host together, reused when the work that used it is done."""

    def __init__(self) -> None:
        self._free: dict[int, list[tuple[int, int]]] = {}
        self._all: list[tuple[int, int]] = []
        # allocating takes milliseconds: what pulls usually need is there before the first one
        for taken in [self.take(1 << bits) for bits in range(12, 21) for _ in range(2)]:
            self.give_back(taken)

    def take(self, size_bytes: int) -> Scratch:
        size = 1 << max(12, (size_bytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        if free:
            return (size, *free.pop())
        host = int(check(driver.cuMemHostAlloc(size, 0), "cuMemHostAlloc"))
        device = int(check(driver.cuMemAlloc(size), "cuMemAlloc"))
        self._all.append((host, device))
        return size, host, device

    def give_back(self, taken: Scratch) -> None:
        self._free[taken[0]].append(taken[1:])

    def close(self) -> None:
        for host, device in self._all:
            driver.cuMemFreeHost(host)
            driver.cuMemFree(device)
        self._all.clear()


class CudaWork:
    """An event behind it on its stream. See :class:`pd_serve.transfer.mover.Work`."""

    def __init__(
        self,
        mover: CudaMover,
        stream: int,
        scratch: list[Scratch],
        failure: TransferError | None = None,
    ) -> None:
        self._mover = mover
        self._scratch = scratch
        self._failure = failure
        self._event: Any = mover.record(stream)

    def done(self) -> bool:
        if self._event is not None:
            status = driver.cuEventQuery(self._event)[0]
            if int(status) == NOT_READY:
                return False
            if int(status) != 0:
                raise TransferError(FailureKind.TRANSFER, f"the GPU reports {status.name} for a copy")
            self._mover.events.append(self._event)
            self._event = None
            self._ended()
        if self._failure is not None:
            raise self._failure
        return True

    def _ended(self) -> None:
        for taken in self._scratch:
            self._mover.buffers.give_back(taken)
        self._scratch = []


class CudaSums(CudaWork):
    """See :class:`pd_serve.transfer.mover.Sums`."""

    def __init__(self, mover: CudaMover, stream: int, scratch: list[Scratch], host: int, count: int) -> None:
        super().__init__(mover, stream, scratch)
        self._host = host
        self._count = count
        self._sums: U64 | None = None

    def _ended(self) -> None:
        if self._sums is None:
            self._sums = _view(self._host, self._count).copy()
        super()._ended()

    def result(self) -> U64:
        if not self.done() or self._sums is None:
            raise TransferError(FailureKind.TRANSFER, "checksums were asked for before they were done")
        return self._sums


class CudaMover:
    """See :class:`pd_serve.transfer.mover.Mover`. ``programs``: CTAs of the copy kernel. Raises TransferError."""

    def __init__(self, device: int, programs: int = PROGRAMS) -> None:
        self.device: int | None = device
        self._programs = programs
        check(driver.cuInit(0), "cuInit")
        handle = check(driver.cuDeviceGet(device), "cuDeviceGet")
        self._context = check(driver.cuDevicePrimaryCtxRetain(handle), "cuDevicePrimaryCtxRetain")
        self.make_current()
        attribute = driver.CUdevice_attribute
        self._sms = int(
            check(driver.cuDeviceGetAttribute(attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, handle), "attribute")
        )
        cubin = compile_kernels(Path(__file__).with_name("cuda_kernels.cu").read_text(encoding="utf-8"), int(handle))
        self._module = check(driver.cuModuleLoadData(cubin), "cuModuleLoadData")
        self._words16 = self._function(b"move_words16")
        self._words4 = self._function(b"move_words4")
        self._checksum = self._function(b"checksum")
        self._bulk = self._function_or_none(b"move_bulk")
        if self._bulk is not None:
            limit = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            check(driver.cuFuncSetAttribute(self._bulk, limit, SLOT_BYTES), "cuFuncSetAttribute")
        # the highest priority: a copy's few CTAs get the next free SM of a device that is busy decoding
        _, highest = check(driver.cuCtxGetStreamPriorityRange(), "cuCtxGetStreamPriorityRange")
        non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._copies, self._sums = (
            int(check(driver.cuStreamCreateWithPriority(non_blocking, highest), "cuStreamCreateWithPriority"))
            for _ in range(2)
        )
        self._memcpy_batch = memcpy_batch_call()
        self.events: list[Any] = []
        self.buffers = _Buffers()
        self._tables: dict[bytes, int] = {}
        self._staging: list[tuple[int, int]] = []  # address, size

    def make_current(self) -> None:
        """Makes the device's primary context current on the calling thread."""
        check(driver.cuCtxSetCurrent(self._context), "cuCtxSetCurrent")

    def record(self, stream: int) -> Any:
        if self.events:
            event = self.events.pop()
        else:
            flags = int(driver.CUevent_flags.CU_EVENT_DISABLE_TIMING)
            event = check(driver.cuEventCreate(flags), "cuEventCreate")
        check(driver.cuEventRecord(event, stream), "cuEventRecord")
        return event

    # --- copies

    def copy(self, items: list[tuple[Rows, Rows]]) -> CudaWork:
        scratch: list[Scratch] = []
        failure: TransferError | None = None
        try:
            for source, target in _merged(items):
                piece_bytes = source.row_bytes * len(source.rows)
                first_bytes, growth = ENGINE_PARTS if source.row_bytes >= ENGINE_MIN_BYTES else KERNEL_PARTS
                at, size = 0, max(1, first_bytes // piece_bytes)
                while at < len(source.starts):
                    part = slice(at, at + size)
                    self._submit(source, target, source.starts[part], target.starts[part], scratch)
                    at, size = at + size, size * growth
        except TransferError as error:
            failure = error  # told when what had been submitted before has ended
        return CudaWork(self, self._copies, scratch, failure)

    def _submit(self, source: Rows, target: Rows, starts: I64, ends: I64, scratch: list[Scratch]) -> None:
        if len(source.rows) == 1:
            sources, targets = starts + (source.base + source.rows[0]), ends + (target.base + target.rows[0])
            runs = joined(sources, targets, source.row_bytes)
            if len(starts) * source.row_bytes >= ENGINE_MIN_BYTES * len(runs[2]):
                sources, targets, sizes = runs
                self._memcpy_batch(targets, sources, sizes, self._copies)
                return
            source, target = replace(source, rows=ONE_ROW), replace(target, rows=ONE_ROW)
        else:
            sources, targets = starts + source.base, ends + target.base
        scratch.append(self._by_kernel(source, target, sources, targets))

    def _by_kernel(self, source: Rows, target: Rows, sources: I64, targets: I64) -> Scratch:
        stream = self._copies
        count = len(sources)
        taken = self._upload((sources, targets), stream)
        width = min(_alignment(source, sources), _alignment(target, targets))
        bulk = self._bulk is not None and width >= 16
        programs = LOCAL_PROGRAMS if self._is_staging(source.base) or self._is_staging(target.base) else self._programs
        unit = min(UNIT_BYTES, source.row_bytes)
        units_per_row = -(-source.row_bytes // unit)
        total = count * len(source.rows) * units_per_row
        shape = struct.pack("5I", count, len(source.rows), source.row_bytes, unit, units_per_row)
        pointers = [taken[2], taken[2] + 8 * count, self._table(source.rows), self._table(target.rows)]
        if bulk:
            warps = WARPS if unit <= SMALL_UNIT_BYTES else 1
            slots = min(MAX_SLOTS, SLOT_BYTES // (unit * warps))
            grid = min(programs, -(-total // warps))
            shared = slots * unit * warps
            numbers = struct.pack("II", total, slots)
            self._launch(self._bulk, grid, 32 * warps, shared, stream, shape, numbers, pointers)
        else:
            kernel = self._words16 if width >= 16 else self._words4
            grid = min(4 * programs, -(-total // PLAIN_WARPS))
            self._launch(kernel, grid, 32 * PLAIN_WARPS, 0, stream, shape, struct.pack("I", total), pointers)
        return taken

    # --- checksums

    def checksums(self, blocks: Rows) -> CudaSums:
        count = len(blocks.starts)
        stream = self._sums
        sources = blocks.starts + blocks.base
        taken = self._upload((sources, np.zeros(count, dtype=np.int64)), stream)
        unit = min(CHECKSUM_UNIT_BYTES, blocks.row_bytes)
        units_per_row = -(-blocks.row_bytes // unit)
        total = count * len(blocks.rows) * units_per_row
        wide = int(_alignment(blocks, sources) >= 16)
        shape = struct.pack("5I", count, len(blocks.rows), blocks.row_bytes, unit, units_per_row)
        pointers = [taken[2], self._table(blocks.rows), taken[2] + 8 * count]
        grid = min(CHECKSUM_PROGRAMS_PER_SM * self._sms, -(-total // PLAIN_WARPS))
        if total:
            numbers = struct.pack("II", total, wide)
            self._launch(self._checksum, grid, 32 * PLAIN_WARPS, 0, stream, shape, numbers, pointers)
            check(driver.cuMemcpyDtoHAsync(taken[1], taken[2] + 8 * count, 8 * count, stream), "cuMemcpyDtoHAsync")
        return CudaSums(self, stream, [taken], taken[1], count)

    # --- pieces of both

    def _upload(self, arrays: Sequence[I64], stream: int) -> Scratch:
        size = sum(array.nbytes for array in arrays)
        taken = self.buffers.take(max(8, size))
        at = taken[1]
        for array in arrays:
            ctypes.memmove(at, np.ascontiguousarray(array).ctypes.data, array.nbytes)
            at += array.nbytes
        check(driver.cuMemcpyHtoDAsync(taken[2], taken[1], size, stream), "cuMemcpyHtoDAsync")
        return taken

    def _table(self, rows: I64) -> int:
        """Row offsets on the device; there are a few different ones in the life of a node."""
        key = rows.tobytes()
        address = self._tables.get(key)
        if address is None:
            address = self._tables[key] = int(check(driver.cuMemAlloc(len(key)), "cuMemAlloc"))
            check(driver.cuMemcpyHtoD(address, np.ascontiguousarray(rows).ctypes.data, len(key)), "cuMemcpyHtoD")
        return address

    def _launch(
        self,
        function: Any,
        grid: int,
        block: int,
        shared_bytes: int,
        stream: int,
        shape: bytes,
        numbers: bytes,
        pointers: list[int],
    ) -> None:
        """Kernel parameters in order: the shape, 32-bit numbers, pointers."""
        values = ctypes.create_string_buffer(shape + numbers + struct.pack(f"{len(pointers)}Q", *pointers))
        start = ctypes.addressof(values)
        offsets = [0]
        offsets += [len(shape) + at for at in range(0, len(numbers), 4)]
        offsets += [len(shape) + len(numbers) + 8 * at for at in range(len(pointers))]
        arguments = (ctypes.c_void_p * len(offsets))(*[start + offset for offset in offsets])
        check(
            driver.cuLaunchKernel(
                function, grid, 1, 1, block, 1, 1, shared_bytes, stream, ctypes.addressof(arguments), 0
            ),
            "cuLaunchKernel",
        )

    def _function(self, name: bytes) -> Any:
        return check(driver.cuModuleGetFunction(self._module, name), f"cuModuleGetFunction {name.decode()}")

    def _function_or_none(self, name: bytes) -> Any:
        status, function = driver.cuModuleGetFunction(self._module, name)
        return function if int(status) == 0 else None

    def write(self, address: int, data: bytes) -> None:
        check(driver.cuMemcpyHtoDAsync(address, data, len(data), self._copies), "cuMemcpyHtoDAsync")
        check(driver.cuStreamSynchronize(self._copies), "cuStreamSynchronize")

    def allocate(self, size_bytes: int) -> int:
        address = int(check(driver.cuMemAlloc(size_bytes + ALIGNMENT), "cuMemAlloc"))
        self._staging.append((address, size_bytes + ALIGNMENT))
        return -(-address // ALIGNMENT) * ALIGNMENT

    def _is_staging(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self._staging)

    def close(self) -> None:
        """Waits for what is under way, and frees everything. The context stays: torch shares it."""
        for stream in (self._copies, self._sums):
            driver.cuStreamSynchronize(stream)
            driver.cuStreamDestroy(stream)
        for event in self.events:
            driver.cuEventDestroy(event)
        for address in (*self._tables.values(), *(address for address, _ in self._staging)):
            driver.cuMemFree(address)
        self.buffers.close()
        driver.cuModuleUnload(self._module)


def _merged(items: list[tuple[Rows, Rows]]) -> list[tuple[Rows, Rows]]:
    """Items of the same pattern as one, so that many requests go out in one launch. Empty ones are dropped."""
    same: dict[tuple[int, int, int, bytes, bytes], list[tuple[Rows, Rows]]] = {}
    for source, target in items:
        if source.size_bytes:
            key = (source.base, target.base, source.row_bytes, source.rows.tobytes(), target.rows.tobytes())
            same.setdefault(key, []).append((source, target))
    return [
        group[0]
        if len(group) == 1
        else (
            replace(group[0][0], starts=np.concatenate([source.starts for source, _ in group])),
            replace(group[0][1], starts=np.concatenate([target.starts for _, target in group])),
        )
        for group in same.values()
    ]


def joined(sources: I64, targets: I64, size_bytes: int) -> tuple[I64, I64, I64]:
    """``(sources, targets, sizes)`` of ranges of ``size_bytes``, neighbours on both sides made one."""
    same = (sources[1:] - sources[:-1] == size_bytes) & (targets[1:] - targets[:-1] == size_bytes)
    if not same.any():
        return sources, targets, np.full(len(sources), size_bytes, dtype=np.int64)
    first = np.concatenate([np.zeros(1, dtype=np.int64), np.flatnonzero(~same) + 1])
    counts = np.diff(first, append=len(sources))
    return sources[first], targets[first], counts * size_bytes


def _alignment(rows: Rows, addresses: I64) -> int:
    """The largest power of two, up to 16, that divides every address and size."""
    bits = int(np.bitwise_or.reduce(addresses)) | int(np.bitwise_or.reduce(rows.rows)) | rows.row_bytes | 16
    return bits & -bits


def _view(address: int, count: int) -> U64:
    """64-bit numbers in host memory."""
    return np.ctypeslib.as_array((ctypes.c_uint64 * count).from_address(address))
