"""Small arrays between host and device in one launch of a kernel that reads and writes pinned memory itself.

A step's tables and parameters, and what it sampled, are some kilobytes. As copies they would wait in the queue of a
copy engine, behind whatever else crosses the bus: with a host tier at work a decode step took five times as long
(docs/benchmarks.md, "KV blocks between host and GPU"). A kernel's loads and stores share the bus with the engines.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

Send = Callable[[Tensor, Tensor], None]  # target, source

_WORD = 4  # bytes
_BLOCK = 1024  # words of a program
_FIELDS = 6  # of a range: target, source, rows, words of a row, and from one row to the next in each


def copy_now(target: Tensor, source: Tensor) -> None:
    """By a copy engine, queued on the current stream."""
    target.copy_(source, non_blocking=True)


class Delivery:
    """Owned by whoever fills what is delivered. One is on its way at a time."""

    def __init__(self, device: torch.device, most: int = 64) -> None:
        """``most``: arrays at once; others are copied."""
        self._pinned = device.type == "cuda"
        self._ranges = torch.zeros((most, _FIELDS), dtype=torch.int64, pin_memory=self._pinned)
        self._rows = self._ranges.numpy()
        self._used = self._words = 0
        self._held: list[Tensor] = []  # until it has arrived
        self._left = torch.cuda.Event() if self._pinned else None  # type: ignore[no-untyped-call]

    def begin(self) -> None:
        """Waits until what was delivered before has arrived."""
        if self._left is not None:
            self._left.synchronize()
        self._used = self._words = 0
        self._held.clear()

    def add(self, target: Tensor, source: Tensor) -> None:
        """Of one shape, of one or two dimensions, rows of whole words of four bytes; one of both is pinned."""
        if self._used == len(self._rows):
            copy_now(target, source)
            return
        size = source.element_size()
        rows, width = source.shape if source.dim() == 2 else (1, source.numel())
        words = width * size // _WORD
        there, here = (t.stride(0) * size // _WORD if t.dim() == 2 else 0 for t in (target, source))
        self._rows[self._used] = target.data_ptr(), source.data_ptr(), rows, words, there, here
        self._held += (target, source)
        self._used += 1
        self._words = max(self._words, rows * words)

    def bring(self, source: Tensor) -> Tensor:
        """A tensor on the host that will have the values of ``source``, which is contiguous, on the device."""
        target = torch.empty(source.shape, dtype=source.dtype, pin_memory=self._pinned)
        self.add(target, source)
        return target

    def go(self) -> None:
        """Queued on the current stream."""
        if self._words:
            _deliver[(triton.cdiv(self._words, _BLOCK), self._used)](
                self._ranges.data_ptr(), FIELDS=_FIELDS, BLOCK=_BLOCK, num_warps=4
            )
        if self._left is not None:
            self._left.record()


@triton.jit
def _deliver(ranges: tl.tensor, FIELDS: tl.constexpr, BLOCK: tl.constexpr) -> None:
    entry = ranges.to(tl.pointer_type(tl.int64)) + tl.program_id(1) * FIELDS
    rows, words = tl.load(entry + 2, volatile=True).to(tl.int32), tl.load(entry + 3, volatile=True).to(tl.int32)
    first = tl.program_id(0) * BLOCK
    if first < rows * words:
        target = tl.load(entry, volatile=True).to(tl.pointer_type(tl.int32))
        source = tl.load(entry + 1, volatile=True).to(tl.pointer_type(tl.int32))
        there, here = tl.load(entry + 4, volatile=True), tl.load(entry + 5, volatile=True)
        i = first + tl.arange(0, BLOCK)
        row, word = i // words, i % words
        inside = i < rows * words
        tl.store(target + row * there + word, tl.load(source + row * here + word, inside, volatile=True), inside)
