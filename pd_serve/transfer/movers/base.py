"""What a kind of memory can do with strided bytes: copy them, and sum them. The seam between transports and devices.

:class:`pd_serve.transfer.movers.host.HostMover` works on host memory, :class:`pd_serve.transfer.movers.cuda.CudaMover`
on a GPU (copy engines or a gather kernel). Used on the transfer thread alone; nothing here waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Rows:
    """Strided bytes: for each of n starts (slow), each of R rows (fast), ``row_bytes`` at base + start + row."""

    base: int  # address
    starts: I64  # [n] byte offsets from the base
    rows: I64  # [R] byte offsets from a start
    row_bytes: int  # a multiple of 4

    @property
    def size_bytes(self) -> int:
        return len(self.starts) * len(self.rows) * self.row_bytes


class Work(Protocol):
    """Something under way on a device."""

    def done(self) -> bool:
        """Never blocks. Raises TransferError when the device reports an error."""


class Sums(Work, Protocol):
    def result(self) -> U64:
        """Once done: one checksum a start, ``[n]``."""


class Mover(Protocol):
    device: int | None  # CUDA ordinal; None: host memory

    def copy(self, items: list[tuple[Rows, Rows]]) -> Work:
        """Copies each (source, target) pair, of equal n, R and row_bytes; all in as few launches as possible.

        Either side may be a peer's mapped memory. Copies that are not ``done`` may read and write at any time.
        """

    def rouse(self) -> None:
        """A copy will soon be asked for: a device that rests takes 0.1 ms longer to begin one. Never raises."""

    def checksums(self, rows: Rows, after: Work | None = None) -> Sums:
        """For each start, over its R * row_bytes / 4 little-endian 32-bit words x_i in row order, once ``after`` (a
        copy of this mover) has ended:

        ``sum(x_i * w_i) mod 2**64`` with ``w_i = ((i * 0x9E3779B1) mod 2**32) | 1``. Changing any one word changes the
        sum, and so does swapping two words that differ (but for a chance of about 2**-32). It guards against
        memory that was reused or never written, not against an adversary.
        """

    def write(self, address: int, data: bytes) -> None:
        """Copies host bytes to ``address``, and returns when they are there: for the self-test, not for KV."""

    def allocate(self, size_bytes: int) -> int:
        """Memory of this kind for staging, alive until ``close``: its address, 4096-byte aligned."""

    def close(self) -> None: ...
