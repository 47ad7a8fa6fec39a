"""Descriptor lists of pools: pieces that can be read one by one, named by index. Arithmetic, and one cache.

A list is prepared once for all pieces of all groups; a pull then costs NIXL 0.02 µs a piece. Pieces of groups whose
rows are too small for that are not in it: they travel packed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

from pd_serve.memory.region import Region
from pd_serve.transfer.merge import SHORT, SORTED_FROM_BYTES, count_runs, neighbours_together
from pd_serve.transfer.movers.base import I64
from pd_serve.transfer.nixl.bindings import U64, Agent
from pd_serve.transfer.nixl.limits import Limits
from pd_serve.transfer.slices import Side, Slicing


def listed(slicing: Slicing, limits: Limits) -> bool:
    """Whether a group's pieces are in the lists: small blocks may have neighbours, small rows have none."""
    return slicing.whole or slicing.row_bytes >= limits.direct_bytes


class Index:
    """Where one end's groups begin in its list: entry ``begin[group] + piece * rows + row``."""

    def __init__(self, slicings: Sequence[Slicing], sides: Sequence[Side], regions: Sequence[Region], limits: Limits):
        counts = [
            side.num_pieces(region) * len(side.rows) if listed(slicing, limits) else 0
            for slicing, side, region in zip(slicings, sides, regions, strict=True)
        ]
        ends = np.cumsum([0, *counts])
        self._sizes = [slicing.row_bytes for slicing in slicings]
        self._sides = sides
        self._regions = regions
        self._begin = [int(end) for end in ends[:-1]]
        self._counts = counts

    def entries(self, group: int, pieces: I64) -> I64:
        """The rows of these pieces, in order."""
        rows = len(self._sides[group].rows)
        if rows == 1:
            return pieces + self._begin[group]
        first = pieces * rows + self._begin[group]
        return (first[:, None] + np.arange(rows, dtype=np.int64)).ravel()

    def descriptors(self) -> U64:
        """``[n, 3]``: address, size, 0."""
        rows = np.zeros((sum(self._counts), 3), dtype=np.uint64)
        for side, region, size, begin, count in zip(
            self._sides, self._regions, self._sizes, self._begin, self._counts, strict=True
        ):
            if count:
                starts = side.starts(np.arange(side.num_pieces(region), dtype=np.int64)) + region.address
                span = rows[begin : begin + count]
                span[:, 0] = (starts[:, None] + side.rows[None, :]).ravel()
                span[:, 1] = size
        return rows


def in_order(slicing: Slicing, remote: I64, local: I64) -> tuple[I64, I64, int]:
    """The pieces so that neighbours stand side by side, and how many descriptors they make.

    Long lists of small pieces stay as they are: sorting takes as long as moving them.
    """
    short = len(remote) <= SHORT or slicing.row_bytes >= SORTED_FROM_BYTES
    theirs, ours = neighbours_together(remote, local) if short else (remote, local)
    if slicing.whole:
        return theirs, ours, count_runs(theirs, ours)
    return theirs, ours, len(theirs) * len(slicing.source.rows)


class LocalLists:
    """This node's lists: one for each shape of source there is, shared by its peers."""

    def __init__(self, agent: Agent, device: int | None) -> None:
        self._agent = agent
        self._device = device
        self._lists: dict[bytes, tuple[int, int]] = {}  # handle, users

    def take(self, index: Index) -> tuple[bytes, int]:
        """A key to give it back with, and the handle. Raises TransferError."""
        rows = index.descriptors()
        key = hashlib.sha256(rows.tobytes()).digest()
        handle, users = self._lists.get(key, (None, 0))
        if handle is None:
            handle = self._agent.prepare(rows, self._device)
        self._lists[key] = (handle, users + 1)
        return key, handle

    def give_back(self, key: bytes) -> None:
        handle, users = self._lists[key]
        if users > 1:
            self._lists[key] = (handle, users - 1)
        else:
            del self._lists[key]
            self._agent.release_list(handle)
