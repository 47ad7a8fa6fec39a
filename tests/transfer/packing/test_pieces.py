"""Pieces in a message: what comes back is what was asked for, and nothing else gets through."""

from __future__ import annotations

import numpy as np
import pytest

from pd_serve.errors import TransferError
from pd_serve.memory.region import Region
from pd_serve.transfer.base import BlockMap, Pair
from pd_serve.transfer.packing.pieces import decode, encode
from pd_serve.transfer.slices import slicings
from tests.transfer.harness import SMALL

COUNT = 40  # blocks at the source; half as many at the reader


def pair() -> Pair:
    found = slicings(SMALL, SMALL)
    source = tuple(Region(4096, slicing.source.block_bytes, COUNT) for slicing in found)
    return Pair(found, source, tuple(Region(4096, region.block_bytes, COUNT // 2) for region in source))


def test_pieces_travel_as_int32_little_endian() -> None:
    pieces = np.array([39, 0, 0, 17], dtype=np.int64)
    data = encode(pieces)
    assert data == bytes([39, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 17, 0, 0, 0])
    found = decode(data, 0, pair())
    assert found.dtype == np.int64
    assert found.tolist() == pieces.tolist()


@pytest.mark.parametrize(
    ("data", "group"),
    [
        (b"", 0),
        (b"abc", 0),
        (b"\0" * 5, 0),
        (b"\0" * 4, len(pair().slicings)),
        (b"\0" * 4, -1),
        (encode(np.array([COUNT])), 0),
        (encode(np.array([0, -1])), 0),
        (encode(np.array([2**31 - 1])), 0),
    ],
)
def test_what_a_source_does_not_have_is_refused(data: bytes, group: int) -> None:
    with pytest.raises(TransferError):
        decode(data, group, pair())


def blocks(group: int, remote: list[int], local: list[int]) -> BlockMap:
    return BlockMap(group, np.array(remote, dtype=np.int64), np.array(local, dtype=np.int64))


def test_a_pull_names_pieces_of_both_pools() -> None:
    known = pair()
    last = len(known.slicings) - 1
    for group in range(last + 1):
        assert known.check(blocks(group, [COUNT - 1, 0], [0, COUNT // 2 - 1])) is known.slicings[group]
    for wrong, why in (
        (blocks(0, [COUNT], [0]), "the prefill node"),
        (blocks(0, [0], [COUNT // 2]), "this node"),
        (blocks(0, [0], [-1]), "this node"),
        (blocks(0, [0, 1], [0]), "no sense"),
        (blocks(last + 1, [0], [0]), "no sense"),
        (blocks(-1, [0], [0]), "no sense"),
    ):
        with pytest.raises(TransferError, match=why):
            known.check(wrong)
