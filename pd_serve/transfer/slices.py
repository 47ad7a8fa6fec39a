"""Which bytes of two pools are the same part of the KV, when block sizes or tensor parallelism differ. Pure arithmetic.

A *piece* is what both sides can name: ``min`` of the two block sizes in tokens (one must divide the other). Of a piece, the
heads that both ranks hold are exchanged. Inside a block (``[layer][K|V][kv head][token][dim]``, see kv/layout.py) a piece is
a fixed pattern of *rows*, contiguous runs of ``row_bytes`` at the offsets ``rows``, in the same order on both sides.
Where layouts agree, a piece is a block and has one row.
"""

from __future__ import annotations

from dataclasses import dataclass

from pd_serve.kv.layout import KVLayout
from pd_serve.memory.region import Region
from pd_serve.transfer.mover import I64, Rows


@dataclass(frozen=True)
class Side:
    """Where one end keeps its pieces."""

    block_bytes: int
    pieces_per_block: int
    step_bytes: int  # from one piece of a block to the next
    rows: I64  # [R] byte offsets from the start of a piece

    def starts(self, pieces: I64) -> I64:
        """Byte offsets from the region's address."""
        block, part = pieces // self.pieces_per_block, pieces % self.pieces_per_block
        return block * self.block_bytes + part * self.step_bytes


@dataclass(frozen=True)
class Slicing:
    """One group's pieces at both ends of a pair."""

    row_bytes: int
    source: Side
    reader: Side

    @property
    def whole(self) -> bool:
        """Pieces are whole blocks on both sides: one row each."""
        return (
            len(self.source.rows) == 1
            and self.source.pieces_per_block == self.reader.pieces_per_block == 1
            and self.row_bytes == self.source.block_bytes == self.reader.block_bytes
        )

    @property
    def piece_bytes(self) -> int:
        return self.row_bytes * len(self.source.rows)

    def source_rows(self, region: Region, pieces: I64) -> Rows:
        return Rows(region.address, self.source.starts(pieces), self.source.rows, self.row_bytes)

    def reader_rows(self, region: Region, pieces: I64) -> Rows:
        return Rows(region.address, self.reader.starts(pieces), self.reader.rows, self.row_bytes)


def slicings(source: KVLayout, reader: KVLayout) -> tuple[Slicing, ...]:
    """One for each layer group, then the probe region's. Raises HandshakeError with both sides' values where they differ."""
    raise NotImplementedError
