"""Which pieces travel as one message. Pure arithmetic on piece numbers; it never touches memory.

A message costs each end some 20 µs, however long it is, and a copy into or out of staging costs time by the byte. So
pieces that follow each other on both sides travel as they lie, from pool to pool; short ones are packed together.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pd_serve.memory.region import Region
from pd_serve.transfer.merge import neighbours_together
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.slices import Side, Slicing


@dataclass(frozen=True)
class Message:
    """Pieces of one group in the order in which their bytes follow each other."""

    group: int
    remote: I64
    local: I64
    size_bytes: int


def messages(
    group: int, slicing: Slicing, remote: I64, local: I64, message_bytes: int, direct_bytes: int
) -> list[Message]:
    """Runs of ``direct_bytes`` or more by themselves, the rest together; each up to ``message_bytes``, or one piece."""
    if len(remote) == 0:
        return []
    remote, local = neighbours_together(remote, local)
    piece_bytes = slicing.piece_bytes
    ends = [
        side.starts(pieces)
        for side, pieces in ((slicing.source, remote), (slicing.reader, local))
        if _is_one_run(side, slicing.row_bytes)
    ]
    per_message = max(1, message_bytes // piece_bytes)
    if not ends:
        return _split(group, remote, local, piece_bytes, per_message)
    broken = np.zeros(len(remote) - 1, dtype=bool)
    for starts in ends:
        broken |= np.diff(starts) != piece_bytes
    first = np.concatenate(([0], np.flatnonzero(broken) + 1))
    length = np.diff(np.append(first, len(remote)))
    long = length * piece_bytes >= direct_bytes
    found = []
    for start, count in zip(first[long].tolist(), length[long].tolist(), strict=True):
        run = slice(start, start + count)
        found += _split(group, remote[run], local[run], piece_bytes, per_message)
    short = ~np.repeat(long, length)
    return found + _split(group, remote[short], local[short], piece_bytes, per_message)


def _split(group: int, remote: I64, local: I64, piece_bytes: int, per_message: int) -> list[Message]:
    found = []
    for start in range(0, len(remote), per_message):
        part = remote[start : start + per_message]
        found.append(Message(group, part, local[start : start + per_message], len(part) * piece_bytes))
    return found


def span(side: Side, slicing: Slicing, region: Region, pieces: I64) -> int | None:
    """The address where these pieces lie one behind the other in this pool, if they do."""
    if not _is_one_run(side, slicing.row_bytes):
        return None
    starts = side.starts(pieces)
    if len(starts) > 1 and not bool((np.diff(starts) == slicing.piece_bytes).all()):
        return None
    return region.address + int(starts[0]) + int(side.rows[0])


def _is_one_run(side: Side, row_bytes: int) -> bool:
    return len(side.rows) == 1 or bool((np.diff(side.rows) == row_bytes).all())
