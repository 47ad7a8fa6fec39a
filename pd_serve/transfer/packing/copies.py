"""The copies that bring pieces into a staging slot and out again, for a mover. Arithmetic only.

In a slot the pieces of a group lie side by side, a piece's rows in order, so that both ends pack and unpack alike.
"""

from __future__ import annotations

from pd_serve.transfer.base import Pair
from pd_serve.transfer.movers.base import I64, Rows


def pack(pair: Pair, group: int, pieces: I64, address: int) -> tuple[Rows, Rows]:
    """From the source's pool to staging memory of its own, at ``address``."""
    slicing = pair.slicings[group]
    return slicing.source_rows(pair.source[group], pieces), slicing.staged_rows(address, len(pieces))


def unpack(pair: Pair, group: int, pieces: I64, address: int) -> tuple[Rows, Rows]:
    """From staging memory of the reader's own, at ``address``, into its pool."""
    slicing = pair.slicings[group]
    return slicing.staged_rows(address, len(pieces)), slicing.reader_rows(pair.reader[group], pieces)
