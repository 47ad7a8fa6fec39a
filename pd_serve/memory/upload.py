"""Copies weights to a GPU at the rate of the bus or the disk: out of mapped files, on several threads.

Used while weights are loaded. torch copies memory that is not pinned on one thread, and waits for a mapped file page by
page. Here each thread reads a piece ahead into pinned memory, and the device fetches it while the next one is read.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from pd_serve.memory.cuda_driver import CudaDriver
from pd_serve.memory.host_buffers import HostBuffer

THREADS = 8  # one copies 5 to 10 GB/s, a PCIe 5 link carries 55
PIECE_BYTES = 4 << 20
_MADV_POPULATE_READ = 22  # Linux 5.14
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # numpy knows no bfloat16


class Upload:
    """To one GPU, from when it is made until :meth:`close`. Its memory is given back then, in full.

    ``pin``: see :func:`pd_serve.memory.pinned.should_pin_memory`.
    """

    def __init__(self, device: torch.device, *, pin: bool) -> None:
        self._device = device
        self._staging = HostBuffer(2 * THREADS * PIECE_BYTES, CudaDriver() if pin else None)
        self._free = [_Lane(self._staging.address + 2 * i * PIECE_BYTES, device) for i in range(THREADS)]
        self._lanes = threading.local()
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="pd-upload", initializer=self._take_lane)
        self._pieces: list[tuple[int, Future[None]]] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Begins to copy ``source``, on the host, to the contiguous ``target``, in its dtype.

        ``target``: on the device, or where a weight stays on the host; it holds ``source`` after :meth:`finish`.
        ``source`` may have any strides, and must stay as it is.
        """
        if not target.numel():
            return
        row_bytes = target[0].numel() * target.element_size()
        if row_bytes > PIECE_BYTES:
            for row, its in zip(target, source, strict=True):
                self.copy(row, its)
            return
        before = torch.cuda.Event()  # type: ignore[no-untyped-call]
        before.record(torch.cuda.current_stream(self._device))  # of what had its memory
        rows = PIECE_BYTES // row_bytes
        for at in range(0, len(target), rows):
            piece = target[at : at + rows]
            future = self._threads.submit(self._copy, piece, source[at : at + rows], before)
            self._pieces.append((piece.numel() * piece.element_size(), future))

    def finish(self, progress: Callable[[int, int], None] | None = None) -> None:
        """Waits for all copies; ``progress`` is told bytes, done and in all. What a copy has raised is raised here."""
        pieces, self._pieces = self._pieces, []
        total, done = sum(size for size, _ in pieces), 0
        for size, future in pieces:
            future.result()
            done += size
            if progress is not None:
                progress(done, total)
        torch.cuda.synchronize(self._device)

    def __enter__(self) -> Upload:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._threads.shutdown(cancel_futures=True)
        torch.cuda.synchronize(self._device)
        self._staging.close()

    def _take_lane(self) -> None:
        torch.cuda.set_device(self._device)  # else what ends a stream's turn makes a context on the first GPU
        self._lanes.own = self._free.pop()

    @torch.inference_mode()  # of a thread, as the targets are
    def _copy(self, target: Tensor, source: Tensor, before: torch.cuda.Event) -> None:
        if target.is_cuda:
            lane: _Lane = self._lanes.own
            lane.copy(target, source, before)
        else:
            fill(target, source)


class _Lane:
    """A thread's own: two pinned pieces, by turns, and a stream."""

    def __init__(self, address: int, device: torch.device) -> None:
        memory = (ctypes.c_uint8 * (2 * PIECE_BYTES)).from_address(address)
        self._staging = torch.frombuffer(memory, dtype=torch.uint8).view(2, PIECE_BYTES)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._left = [torch.cuda.Event() for _ in range(2)]  # type: ignore[no-untyped-call]
        self._turn = 0

    def copy(self, target: Tensor, source: Tensor, before: torch.cuda.Event) -> None:
        self._turn = 1 - self._turn
        left = self._left[self._turn]
        left.synchronize()
        size = target.numel() * target.element_size()
        staged = self._staging[self._turn, :size].view(target.dtype).view(target.shape)
        fill(staged, source)
        self._stream.wait_event(before)
        with torch.cuda.stream(self._stream):
            target.copy_(staged, non_blocking=True)
            left.record()


def fill(target: Tensor, source: Tensor) -> None:
    """Copies between host tensors on this thread alone, without Python's lock."""
    if source.is_contiguous():
        _read_ahead(source.data_ptr(), source.numel() * source.element_size())
    if source.dtype is target.dtype:
        integers = _INTEGERS[target.element_size()]
        np.copyto(target.view(integers).numpy(), source.view(integers).numpy())
    else:
        target.copy_(source)


def _read_ahead(address: int, size: int) -> None:
    """Of a mapped file: all of its pages at once, instead of each when it is touched. Elsewhere it does nothing."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    for advice in (mmap.MADV_WILLNEED, _MADV_POPULATE_READ):
        _madvise(start, address + size - start, advice)


_madvise = ctypes.CDLL(None).madvise
_madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
