"""What host memory can do with strided bytes. See :class:`pd_serve.transfer.movers.base.Mover`.

A core copies; there is no device that works by itself. So that a large piece of work does not keep the transfer thread
from its sockets, each call of ``done`` does a part of it and returns: work goes on only while somebody asks for it.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Iterator

import numpy as np

from pd_serve.transfer.movers.base import I64, U64, Rows, Work
from pd_serve.transfer.movers.host_kernels import copy_rows, sum_rows

STEP_BYTES = 8 << 20  # in one turn: about a millisecond

# Never unmapped: a read that outlives its transport (its peer is stopped) must find pages here, not a hole.
_mappings: list[mmap.mmap] = []


class HostWork:
    """A copy or a sum of which every ``done`` does a part."""

    def __init__(self, steps: Iterator[None], sums: U64 | None = None) -> None:
        self._steps: Iterator[None] | None = steps
        self._sums = sums
        self.done()

    def done(self) -> bool:
        if self._steps is not None and next(self._steps, True):
            self._steps = None
        return self._steps is None

    def result(self) -> U64:
        assert self._steps is None, "only once done"
        assert self._sums is not None, "copies have no result"
        return self._sums


class HostMover:
    """Stateless but for the memory it gave out."""

    device: int | None = None

    def __init__(self) -> None:
        self._mine: list[mmap.mmap] = []
        nothing = Rows(0, np.empty(0, np.int64), np.empty(0, np.int64), 4)
        _now(_copies([(nothing, nothing)]))  # compiles, or loads what was compiled, before anybody waits
        _now(_sums(nothing, np.empty(0, np.uint64)))

    def rouse(self) -> None:
        pass

    def copy(self, items: list[tuple[Rows, Rows]]) -> HostWork:
        for source, target in items:
            alike = (len(source.starts), len(source.rows), source.row_bytes)
            if alike != (len(target.starts), len(target.rows), target.row_bytes):
                raise ValueError(f"source and target of a copy differ in shape: {source} and {target}")
        return HostWork(_copies(items))

    def checksums(self, rows: Rows, after: Work | None = None) -> HostWork:
        if rows.row_bytes % 4:
            raise ValueError(f"rows of {rows.row_bytes} bytes are not made of 32-bit words")
        out = np.empty(len(rows.starts), dtype=np.uint64)
        return HostWork(itertools.chain(_end_of(after), _sums(rows, out)), out)

    def write(self, address: int, data: bytes) -> None:
        ctypes.memmove(address, data, len(data))

    def allocate(self, size_bytes: int) -> int:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        try:
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass  # a kernel without transparent huge pages
        self._mine.append(mapping)
        _mappings.append(mapping)
        return np.frombuffer(mapping, dtype=np.uint8).ctypes.data

    def close(self) -> None:
        """Gives the pages back; the addresses stay valid (see ``_mappings``)."""
        for mapping in self._mine:
            mapping.madvise(mmap.MADV_DONTNEED)
        self._mine.clear()


def _now(steps: Iterator[None]) -> None:
    for _ in steps:
        pass


def _address(numbers: I64) -> tuple[int, I64]:
    """Of the array's first element, and the array, which must be kept until it was used."""
    kept = np.ascontiguousarray(numbers, dtype=np.int64)
    return kept.ctypes.data, kept


def _parts(rows: Rows) -> Iterator[tuple[int, int]]:
    """Starts to do in one turn: begin and end."""
    each = max(1, STEP_BYTES // max(1, rows.row_bytes * len(rows.rows)))
    for begin in range(0, max(1, len(rows.starts)), each):
        yield begin, min(begin + each, len(rows.starts))


def _copies(items: list[tuple[Rows, Rows]]) -> Iterator[None]:
    """Yields (None) whenever a turn's worth of bytes has been copied and there is more to do."""
    copied = 0
    for s, t in items:
        (ss, a), (sr, b), (ts, c), (tr, d) = map(_address, (s.starts, s.rows, t.starts, t.rows))
        for begin, end in _parts(s):
            if copied >= STEP_BYTES:
                yield
                copied = 0
            copy_rows(s.base, ss, sr, t.base, ts, tr, len(b), s.row_bytes, begin, end)
            copied += (end - begin) * len(b) * s.row_bytes
        del a, b, c, d


def _end_of(work: Work | None) -> Iterator[None]:
    while work is not None and not work.done():
        yield


def _sums(rows: Rows, out: U64) -> Iterator[None]:
    (starts, a), (row_starts, b) = map(_address, (rows.starts, rows.rows))
    for begin, end in _parts(rows):
        if begin:
            yield
        sum_rows(rows.base, starts, row_starts, len(b), rows.row_bytes, begin, end, out)
    del a
