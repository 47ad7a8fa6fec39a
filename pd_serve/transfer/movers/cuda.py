"""The mover on a GPU: copies by copy engines or by a kernel on a few SMs, checksums by a kernel.

See :class:`pd_serve.transfer.movers.base.Mover`. All work goes to streams of its own; the thread that made it must be
the one that uses it (the device's primary context is made current there). Sources may be a peer GPU's mapped memory.

Which way a copy goes was found by measurement (docs/benchmarks.md, `benchmarks/nvlink.py`): copy engines take no SM
from what computes meanwhile, but need long runs; the kernel reads rows of any size.
"""

from __future__ import annotations

import contextlib
import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pd_serve.errors import FailureKind, TransferError
from pd_serve.transfer.movers.base import I64, U64, Rows, Work
from pd_serve.transfer.movers.cuda_buffers import Buffer, Buffers
from pd_serve.transfer.movers.cuda_calls import check, compile_kernels, driver, launch_call, memcpy_batch_call

ENGINE_MIN_BYTES = 512 << 10  # copy engines from this average run length on
PROGRAMS = 16  # CTAs of the copy kernel: what NVLink needs
LOCAL_PROGRAMS = 66  # the same to and from staging memory, within one GPU: half of an H200, for a tenth of the time
# A pull is submitted in growing parts: the link is busy with one while the next is prepared. (first bytes, growth)
ENGINE_PARTS = (16 << 20, 4)
KERNEL_PARTS = (16 << 20, 16)
UNIT_BYTES = 16 << 10  # of a row, in flight at once in a slot
SLOT_BYTES = 192 << 10  # shared memory for slots of one CTA
MAX_SLOTS = 64  # of one warp; as in the kernel
WARPS = 4  # of a CTA, for small units; as in the kernel
SMALL_UNIT_BYTES = 8 << 10
PLAIN_WARPS = 8
RESTED_S = 1e-3  # without a copy
CHECKSUM_UNIT_BYTES = 32 << 10
CHECKSUM_PROGRAMS_PER_SM = 4
# Staging memory comes in whole pages of the device. Of an allocation that ends within one the driver makes smaller
# pages, it seems: a peer read it at 290 instead of 375 GB/s while a kernel worked on its GPU (docs/benchmarks.md).
PAGE_BYTES = 2 << 20
NOT_READY = int(driver.CUresult.CUDA_ERROR_NOT_READY)


# kernel parameters, in the kernels' order: the shape (5 numbers), numbers, pointers
MOVE_BULK = struct.Struct("7I4x4Q")
MOVE_WORDS = struct.Struct("6I4Q")
CHECKSUM = struct.Struct("7I4x3Q")


class CudaWork:
    """An event behind it on its stream. See :class:`pd_serve.transfer.movers.base.Work`. ``buffers``: what it reads."""

    def __init__(
        self, mover: CudaMover, stream: int, buffers: list[Buffer], failure: TransferError | None = None
    ) -> None:
        self._mover = mover
        self._buffers = buffers
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

    def precede(self, stream: int) -> None:
        """What goes to the stream from now on begins when this has ended."""
        if self._event is not None:
            check(driver.cuStreamWaitEvent(stream, self._event, 0), "cuStreamWaitEvent")

    def _ended(self) -> None:
        for buffer in self._buffers:
            self._mover.buffers.give_back(buffer)
        self._buffers = []


class CudaSums(CudaWork):
    """See :class:`pd_serve.transfer.movers.base.Sums`. ``parts`` of the buffer: the sums of each piece's units."""

    def __init__(self, mover: CudaMover, stream: int, buffer: Buffer, parts: I64) -> None:
        super().__init__(mover, stream, [buffer])
        self._parts = parts
        self._sums: U64 | None = None

    def _ended(self) -> None:
        self._sums = self._parts.view(np.uint64).sum(axis=1, dtype=np.uint64)
        super()._ended()

    def result(self) -> U64:
        if not self.done() or self._sums is None:
            raise TransferError(FailureKind.TRANSFER, "checksums were asked for before they were done")
        return self._sums


class CudaMover:
    """See :class:`pd_serve.transfer.movers.base.Mover`. ``programs``: CTAs of the copy kernel. Raises TransferError."""

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
            check(driver.cuFuncSetAttribute(driver.CUfunction(self._bulk), limit, SLOT_BYTES), "cuFuncSetAttribute")
        # the highest priority: a copy's few CTAs get the next free SM of a device that is busy decoding
        _, highest = check(driver.cuCtxGetStreamPriorityRange(), "cuCtxGetStreamPriorityRange")
        non_blocking = int(driver.CUstream_flags.CU_STREAM_NON_BLOCKING)
        self._copies, self._sums = (
            int(check(driver.cuStreamCreateWithPriority(non_blocking, highest), "cuStreamCreateWithPriority"))
            for _ in range(2)
        )
        self._memcpy_batch = memcpy_batch_call()
        self._launch = launch_call()
        self.events: list[Any] = []
        self.buffers = Buffers()
        self._tables: dict[bytes, tuple[int, int]] = {}
        self._staging: list[tuple[int, int]] = []  # address, size
        self._scratch = int(check(driver.cuMemAlloc(2 * ENGINE_MIN_BYTES), "cuMemAlloc"))
        self._rousing: CudaWork | None = None
        self._used_s = 0.0

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
        buffers: list[Buffer] = []
        failure: TransferError | None = None
        self._used_s = time.monotonic()
        try:
            for source, target in _merged(items):
                if self._is_staging(source.base) or self._is_staging(target.base):
                    self._by_kernel(source, target, source.starts, target.starts, LOCAL_PROGRAMS, buffers)
                else:
                    self._from_afar(source, target, buffers)
        except TransferError as error:
            failure = error  # told when what had been submitted before has ended
        return CudaWork(self, self._copies, buffers, failure)

    def rouse(self) -> None:
        if time.monotonic() < self._used_s + RESTED_S:
            return
        start = np.zeros(1, dtype=np.int64)
        source = Rows(self._scratch, start, start, ENGINE_MIN_BYTES)
        with contextlib.suppress(TransferError):  # of a device that has failed: the copy to come will tell
            if self._rousing is None or self._rousing.done():
                self._rousing = self.copy([(source, replace(source, base=self._scratch + ENGINE_MIN_BYTES))])

    def _from_afar(self, source: Rows, target: Rows, buffers: list[Buffer]) -> None:
        piece_bytes = source.row_bytes * len(source.rows)
        first_bytes, growth = ENGINE_PARTS if source.row_bytes >= ENGINE_MIN_BYTES else KERNEL_PARTS
        at, size = 0, max(1, first_bytes // piece_bytes)
        while at < len(source.starts):
            starts, ends = source.starts[at : at + size], target.starts[at : at + size]
            if len(source.rows) > 1 or not self._by_engines(source, target, starts, ends):
                self._by_kernel(source, target, starts, ends, self._programs, buffers)
            at, size = at + size, size * growth

    def _by_engines(self, source: Rows, target: Rows, starts: I64, ends: I64) -> bool:
        """Of one row a piece; False where runs are too short for that."""
        sources, targets, sizes = joined(
            starts + (source.base + source.rows[0]), ends + (target.base + target.rows[0]), source.row_bytes
        )
        if len(starts) * source.row_bytes < ENGINE_MIN_BYTES * len(sizes):
            return False
        self._memcpy_batch(targets, sources, sizes, self._copies)
        return True

    def _by_kernel(
        self, source: Rows, target: Rows, starts: I64, ends: I64, programs: int, buffers: list[Buffer]
    ) -> None:
        """Adds to ``buffers`` what the kernel reads addresses from."""
        count = len(starts)
        buffer = self.buffers.take(2 * count)
        buffers.append(buffer)
        np.add(starts, source.base, out=buffer.words[:count])
        np.add(ends, target.base, out=buffer.words[count : 2 * count])
        source_rows, source_bits = self._table(source.rows)
        target_rows, target_bits = self._table(target.rows)
        bits = int(np.bitwise_or.reduce(buffer.words[: 2 * count])) | source_bits | target_bits
        unit, units_per_row = _units(source.row_bytes, UNIT_BYTES)
        total = count * len(source.rows) * units_per_row
        shape = (count, len(source.rows), source.row_bytes, unit, units_per_row, total)
        pointers = (buffer.address, buffer.address + 8 * count, source_rows, target_rows)
        wide = (bits | source.row_bytes) % 16 == 0
        if wide and self._bulk is not None:
            warps = WARPS if unit <= SMALL_UNIT_BYTES else 1
            slots = min(MAX_SLOTS, SLOT_BYTES // (unit * warps))
            grid = min(programs, -(-total // warps))
            shared_bytes = slots * unit * warps
            parameters = MOVE_BULK.pack(*shape, slots, *pointers)
            self._launch(self._bulk, grid, 32 * warps, shared_bytes, self._copies, parameters)
        else:
            kernel = self._words16 if wide else self._words4
            grid = min(4 * programs, -(-total // PLAIN_WARPS))
            self._launch(kernel, grid, 32 * PLAIN_WARPS, 0, self._copies, MOVE_WORDS.pack(*shape, *pointers))

    # --- checksums

    def checksums(self, blocks: Rows, after: Work | None = None) -> CudaSums:
        count = len(blocks.starts)
        unit, units_per_row = _units(blocks.row_bytes, CHECKSUM_UNIT_BYTES)
        units = len(blocks.rows) * units_per_row
        total = count * units
        buffer = self.buffers.take(count + total)
        sources, parts = buffer.words[:count], buffer.words[count : count + total]
        np.add(blocks.starts, blocks.base, out=sources)
        if isinstance(after, CudaWork):
            after.precede(self._sums)
        if total:
            rows, bits = self._table(blocks.rows)
            wide = (int(np.bitwise_or.reduce(sources)) | bits | blocks.row_bytes) % 16 == 0
            shape = (count, len(blocks.rows), blocks.row_bytes, unit, units_per_row, total)
            parameters = CHECKSUM.pack(*shape, wide, buffer.address, rows, buffer.address + 8 * count)
            grid = min(CHECKSUM_PROGRAMS_PER_SM * self._sms, -(-total // PLAIN_WARPS))
            self._launch(self._checksum, grid, 32 * PLAIN_WARPS, 0, self._sums, parameters)
        return CudaSums(self, self._sums, buffer, parts.reshape(count, units))

    # --- pieces of both

    def _table(self, rows: I64) -> tuple[int, int]:
        """Row offsets on the device, and all their bits together; there are a few different ones in a node's life."""
        key = rows.tobytes()
        known = self._tables.get(key)
        if known is None:
            address = int(check(driver.cuMemAlloc(len(key)), "cuMemAlloc"))
            check(driver.cuMemcpyHtoD(address, key, len(key)), "cuMemcpyHtoD")
            known = self._tables[key] = (address, int(np.bitwise_or.reduce(rows)))
        return known

    def _function(self, name: bytes) -> int:
        return int(check(driver.cuModuleGetFunction(self._module, name), f"cuModuleGetFunction {name.decode()}"))

    def _function_or_none(self, name: bytes) -> int | None:
        status, function = driver.cuModuleGetFunction(self._module, name)
        return int(function) if int(status) == 0 else None

    def write(self, address: int, data: bytes) -> None:
        check(driver.cuMemcpyHtoDAsync(address, data, len(data), self._copies), "cuMemcpyHtoDAsync")
        check(driver.cuStreamSynchronize(self._copies), "cuStreamSynchronize")

    def allocate(self, size_bytes: int) -> int:
        size_bytes = -(-size_bytes // PAGE_BYTES) * PAGE_BYTES
        address = int(check(driver.cuMemAlloc(size_bytes), "cuMemAlloc"))
        self._staging.append((address, size_bytes))
        return address

    def _is_staging(self, address: int) -> bool:
        return any(start <= address < start + size for start, size in self._staging)

    def close(self) -> None:
        """Waits for what is under way, and frees everything. The context stays: torch shares it."""
        for stream in (self._copies, self._sums):
            driver.cuStreamSynchronize(stream)
            driver.cuStreamDestroy(stream)
        for event in self.events:
            driver.cuEventDestroy(event)
        for address, _ in (*self._tables.values(), *self._staging, (self._scratch, 0)):
            driver.cuMemFree(address)
        self.buffers.close()
        driver.cuModuleUnload(self._module)


def _merged(items: list[tuple[Rows, Rows]]) -> list[tuple[Rows, Rows]]:
    """Items of the same pattern as one, so that many requests go out in one launch. Empty ones are dropped."""
    items = [item for item in items if item[0].size_bytes]
    if len(items) < 2:
        return items
    same: dict[tuple[int, int, int, bytes, bytes], list[tuple[Rows, Rows]]] = {}
    for source, target in items:
        key = (source.base, target.base, source.row_bytes, source.rows.tobytes(), target.rows.tobytes())
        same.setdefault(key, []).append((source, target))
    return [
        (
            replace(group[0][0], starts=np.concatenate([source.starts for source, _ in group])),
            replace(group[0][1], starts=np.concatenate([target.starts for _, target in group])),
        )
        for group in same.values()
    ]


def _units(row_bytes: int, unit_bytes: int) -> tuple[int, int]:
    """Bytes of a unit, and units in a row."""
    unit = min(unit_bytes, row_bytes)
    return unit, -(-row_bytes // unit)


def joined(sources: I64, targets: I64, size_bytes: int) -> tuple[I64, I64, I64]:
    """``(sources, targets, sizes)`` of ranges of ``size_bytes``, neighbours on both sides made one."""
    same = (sources[1:] - sources[:-1] == size_bytes) & (targets[1:] - targets[:-1] == size_bytes)
    if not same.any():
        return sources, targets, np.full(len(sources), size_bytes, dtype=np.int64)
    first = np.concatenate([np.zeros(1, dtype=np.int64), np.flatnonzero(~same) + 1])
    counts = np.diff(first, append=len(sources))
    return sources[first], targets[first], counts * size_bytes
