"""Pinned host memory that kernels read addresses from and write sums to, reused when the work that used it is done.

Owned by the CUDA mover; a few MiB, and pinned whatever ``should_pin_memory`` says of host copies: kernels could not
read it otherwise. A kernel reads it over the bus, some words at a time and ahead of need; a copy to the device
first would cost every launch another call and some microseconds.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import numpy as np

from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.movers.cuda_calls import check, driver

SMALLEST_WORDS = 512


@dataclass(frozen=True, eq=False)
class Buffer:
    address: int  # the same here and on the device
    words: I64


class Buffers:
    """In powers of two."""

    def __init__(self) -> None:
        self._free: dict[int, list[Buffer]] = {}
        self._all: list[Buffer] = []
        # allocating takes milliseconds: what pulls usually need is there before the first one
        for taken in [self.take(SMALLEST_WORDS << bits) for bits in range(9) for _ in range(2)]:
            self.give_back(taken)

    def __len__(self) -> int:
        return len(self._all)

    def take(self, num_words: int) -> Buffer:
        """At least so many. Raises TransferError."""
        size = max(SMALLEST_WORDS, 1 << (num_words - 1).bit_length())
        free = self._free.setdefault(size, [])
        if free:
            return free.pop()
        address = int(check(driver.cuMemHostAlloc(8 * size, 0), "cuMemHostAlloc"))
        words = np.ctypeslib.as_array((ctypes.c_int64 * size).from_address(address))
        buffer = Buffer(address, words)
        self._all.append(buffer)
        return buffer

    def give_back(self, buffer: Buffer) -> None:
        self._free[len(buffer.words)].append(buffer)

    def close(self) -> None:
        """Nothing uses them any more."""
        for buffer in self._all:
            driver.cuMemFreeHost(buffer.address)
        self._all.clear()
        self._free.clear()
