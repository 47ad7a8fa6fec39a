"""Which pieces travel as one message. Pure arithmetic on piece numbers; it never touches memory.

A message costs each end some 20 µs, however long it is, and a copy into or out of staging costs time by the byte. So
pieces that follow each other on both sides travel as they lie, from pool to pool; short ones are packed together.
"""

from __future__ import annotations

import numpy as np

from pd_serve.memory.region import Region
from pd_serve.transfer.base import BlockMap
from pd_serve.transfer.merge import neighbours_together
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.slices import Side, Slicing


def messages(blocks: BlockMap, slicing: Slicing, message_bytes: int, direct_bytes: int) -> list[BlockMap]:
    """Runs of ``direct_bytes`` or more by themselves, the rest together; each up to ``message_bytes``, or one piece.

    Pieces of a message are in the order in which their bytes follow each other.
    """
    if len(blocks.remote) == 0:
        return []
    group = blocks.group
    remote, local = neighbours_together(blocks.remote, blocks.local)
    piece_bytes = slicing.piece_bytes
    ends = [
        side.starts(pieces)
        for side, pieces in ((slicing.source, remote), (slicing.reader, local))
        if _is_one_run(side, slicing.row_bytes)
    ]
    per_message = max(1, message_bytes // piece_bytes)
    if not ends:
        return _split(group, remote, local, per_message)
    broken = np.zeros(len(remote) - 1, dtype=bool)
    for starts in ends:
        broken |= np.diff(starts) != piece_bytes
    first = np.concatenate(([0], np.flatnonzero(broken) + 1))
    length = np.diff(np.append(first, len(remote)))
    long = length * piece_bytes >= direct_bytes
    found = []
    for start, count in zip(first[long].tolist(), length[long].tolist(), strict=True):
        run = slice(start, start + count)
        found += _split(group, remote[run], local[run], per_message)
    short = ~np.repeat(long, length)
    return found + _split(group, remote[short], local[short], per_message)


def _split(group: int, remote: I64, local: I64, count: int) -> list[BlockMap]:
    return [BlockMap(group, remote[at : at + count], local[at : at + count]) for at in range(0, len(remote), count)]


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
