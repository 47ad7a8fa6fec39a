"""What is packed into a slot and unpacked from a copy of it is what lay in the pool, byte by byte."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest

from pd_serve.kv.layout import KVLayout, kv_group
from pd_serve.memory.region import Region
from pd_serve.transfer.base import Pair
from pd_serve.transfer.movers.host import HostMover
from pd_serve.transfer.packing.copies import pack, unpack
from pd_serve.transfer.slices import slicings
from tests.transfer.harness import until
from tests.transfer.nixl_ends import check, contents, everything


def layout(block_size: int, tp: int = 1, rank: int = 0) -> KVLayout:
    heads = 4 // tp
    return KVLayout(
        block_size,
        "float16",
        (kv_group((0, 2), heads, 16, None, rank * heads, 4), kv_group((1,), heads, 6, 40, rank * heads, 4)),
    )


class Ends:
    def __init__(self, source: KVLayout, reader: KVLayout) -> None:
        self.source, self.reader = contents(source, 12, 3), contents(reader, 12, None)
        regions = [
            tuple(Region(group.ctypes.data, group.shape[1], len(group)) for group in end)
            for end in (self.source, self.reader)
        ]
        self.pair = Pair(slicings(source, reader), *regions)


@pytest.mark.parametrize(
    ("source", "reader"),
    [
        (layout(16), layout(16)),
        (layout(16), layout(64)),
        (layout(64), layout(16)),
        (layout(16, 2, 1), layout(16)),
        (layout(16, 4, 3), layout(64, 2, 1)),
    ],
    ids=["same", "larger", "smaller", "half the heads", "both"],
)
def test_through_a_slot_at_each_end(source: KVLayout, reader: KVLayout) -> None:
    ends = Ends(source, reader)
    before = [group.copy() for group in ends.reader]
    maps = everything(ends.pair, 1)
    mover = HostMover()
    for item in maps:
        size = ends.pair.slicings[item.group].piece_bytes * len(item.remote)
        slot = mover.allocate(size)
        until(mover.copy([pack(ends.pair, item.group, item.remote, slot)]).done)
        moved = np.frombuffer((ctypes.c_ubyte * size).from_address(slot), dtype=np.uint8).copy()
        until(mover.copy([unpack(ends.pair, item.group, item.local, moved.ctypes.data)]).done)
    check(ends.pair, ends.source, before, ends.reader, maps)
    mover.close()
