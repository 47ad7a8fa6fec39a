"""How pieces lie in a staging slot, and the copies that bring them there and out again, for a mover. Arithmetic only.

*Parts* are the pieces of a slot in order: ``(group, pieces)``, of the source's pool or, as many, of the reader's.
"""

from __future__ import annotations

from collections.abc import Sequence

from pd_serve.transfer.base import Pair
from pd_serve.transfer.movers.base import I64, Rows
from pd_serve.transfer.slices import Slicing

PART_ALIGNMENT = 256  # bytes: copies on a GPU use wide words

Part = tuple[int, I64]
Copy = tuple[Rows, Rows]


def lay_out(slicings: Sequence[Slicing], parts: Sequence[Part]) -> tuple[list[int], int]:
    """Where each part begins in a slot, and where the last one ends. The same on both ends."""
    offsets, at = [], 0
    for group, pieces in parts:
        offsets.append(at)
        at = round_up(at + slicings[group].piece_bytes * len(pieces), PART_ALIGNMENT)
    return offsets, at


def pack(pair: Pair, parts: Sequence[Part], slot: int) -> list[Copy]:
    """From the source's pool into its slot at the address ``slot``; one a part."""
    return [
        (pair.slicings[group].source_rows(pair.source[group], pieces), staged)
        for (group, pieces), staged in zip(parts, _staged(pair, parts, slot), strict=True)
    ]


def unpack(pair: Pair, parts: Sequence[Part], slot: int) -> list[Copy]:
    """From the reader's slot at the address ``slot`` into its pool; one a part."""
    return [
        (staged, pair.slicings[group].reader_rows(pair.reader[group], pieces))
        for (group, pieces), staged in zip(parts, _staged(pair, parts, slot), strict=True)
    ]


def _staged(pair: Pair, parts: Sequence[Part], slot: int) -> list[Rows]:
    offsets, _ = lay_out(pair.slicings, parts)
    return [
        pair.slicings[group].staged_rows(slot + at, len(pieces))
        for (group, pieces), at in zip(parts, offsets, strict=True)
    ]


def round_up(size: int, step: int) -> int:
    return -(-size // step) * step
