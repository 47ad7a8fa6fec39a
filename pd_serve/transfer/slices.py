"""Which bytes of two pools are the same part of the KV, when block sizes or tensor parallelism differ. Pure arithmetic.

A *piece* is what both sides can name: ``min`` of the two block sizes in tokens (one must divide the other). Of a piece,
the heads that both ranks hold are exchanged. Inside a block (``[layer][K|V][kv head][token][dim]``, see kv/layout.py) a
piece is a fixed pattern of *rows*, contiguous runs of ``row_bytes`` at the offsets ``rows``, in the same order on both
sides.
Where layouts agree, a piece is a block and has one row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.kv.layout import DTYPE_BYTES, KVLayout, LayerGroup
from pd_serve.memory.region import PROBE_BLOCK_BYTES, Region
from pd_serve.transfer.movers.base import I64, Rows

# A layout comes from another node: keeps byte offsets within 64 bits, and lists of rows short.
MAX_BLOCK_SIZE = 1 << 16
MAX_HEADS = 1 << 12


@dataclass(frozen=True)
class Side:
    """Where one end keeps its pieces."""

    block_bytes: int
    pieces_per_block: int
    step_bytes: int  # from one piece of a block to the next
    rows: I64  # [R] byte offsets from the start of a piece

    def starts(self, pieces: I64) -> I64:
        """Byte offsets from the region's address."""
        if self.pieces_per_block == 1:  # divisions are slow, and lists long
            return pieces * self.block_bytes
        block, part = pieces // self.pieces_per_block, pieces % self.pieces_per_block
        return block * self.block_bytes + part * self.step_bytes

    def num_pieces(self, region: Region) -> int:
        return region.num_blocks * self.pieces_per_block

    def check(self, pieces: I64, region: Region, whose: str) -> None:
        """Raises TransferError for pieces that the region does not have."""
        count = self.num_pieces(region)
        if len(pieces) and int(pieces.view(np.uint64).max()) >= count:  # below 0 is far above it
            raise TransferError(
                FailureKind.TRANSFER, f"piece {pieces.min()}..{pieces.max()} is outside of {whose}'s {count}"
            )


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

    def staged_rows(self, address: int, count: int) -> Rows:
        """``count`` pieces side by side in staging memory, their rows in order."""
        starts = np.arange(count, dtype=np.int64) * self.piece_bytes
        return Rows(address, starts, np.arange(len(self.source.rows), dtype=np.int64) * self.row_bytes, self.row_bytes)


def slicings(source: KVLayout, reader: KVLayout) -> tuple[Slicing, ...]:
    """One for each layer group, then the probe region's. Raises HandshakeError with both sides' values."""
    _same("KV data types", source.dtype, reader.dtype, "start both with the same --dtype")
    if source.dtype not in DTYPE_BYTES:
        raise HandshakeError(f"KV data type {source.dtype} is unknown here; run the same version on both nodes")
    sizes = sorted((source.block_size, reader.block_size))
    if not 0 < sizes[0] <= sizes[1] <= MAX_BLOCK_SIZE or sizes[1] % sizes[0]:
        raise HandshakeError(
            f"block sizes do not fit: {source.block_size} tokens at the prefill node, {reader.block_size} at the "
            "decode node; start both with the same --block-size, or with sizes of which one divides the other"
        )
    _same("numbers of layer groups", len(source.groups), len(reader.groups), _SAME_MODEL)
    item = DTYPE_BYTES[source.dtype]
    found = [
        _slicing(a, b, source.block_size, reader.block_size, item)
        for a, b in zip(source.groups, reader.groups, strict=True)
    ]
    probe = Side(PROBE_BLOCK_BYTES, 1, PROBE_BLOCK_BYTES, np.zeros(1, dtype=np.int64))
    return (*found, Slicing(PROBE_BLOCK_BYTES, probe, probe))


_SAME_MODEL = "serve the same model on both nodes"


def _same(what: str, source: object, reader: object, advice: str) -> None:
    if source != reader:
        raise HandshakeError(f"{what} differ: {source} at the prefill node, {reader} at the decode node; {advice}")


def _slicing(source: LayerGroup, reader: LayerGroup, source_block: int, reader_block: int, item: int) -> Slicing:
    _same("layers", source.layers, reader.layers, _SAME_MODEL)
    _same("head sizes", source.head_dim, reader.head_dim, _SAME_MODEL)
    _same("attention windows", source.window, reader.window, _SAME_MODEL)
    _same("numbers of KV heads of the model", source.heads_of_model, reader.heads_of_model, _SAME_MODEL)
    _check_heads(source, "prefill")
    _check_heads(reader, "decode")
    first = max(source.first_head, reader.first_head)
    last = min(source.first_head + source.num_kv_heads, reader.first_head + reader.num_kv_heads)
    if first >= last:
        raise HandshakeError(
            f"no KV head is on both ranks: heads {_range(source)} at the prefill node, {_range(reader)} at the decode "
            "node; connect ranks whose heads overlap"
        )
    tokens = min(source_block, reader_block)
    atom = tokens * source.head_dim * item  # one head's K or V of a piece
    at_source = _atoms(source, first, last, source_block * source.head_dim * item)
    at_reader = _atoms(reader, first, last, reader_block * reader.head_dim * item)
    # the longest runs that advance alike on both sides; the pattern is regular, so they are all equally long
    breaks = np.flatnonzero((np.diff(at_source) != atom) | (np.diff(at_reader) != atom)) + 1
    begins = np.concatenate(([0], breaks))
    return Slicing(
        row_bytes=len(at_source) // len(begins) * atom,
        source=_side(source, source_block, tokens, item, at_source[begins]),
        reader=_side(reader, reader_block, tokens, item, at_reader[begins]),
    )


def _check_heads(group: LayerGroup, role: str) -> None:
    if (
        group.first_head < 0
        or group.num_kv_heads < 1
        or group.head_dim < 1
        or not group.layers
        or group.first_head + group.num_kv_heads > group.heads_of_model
        or group.heads_of_model > MAX_HEADS
    ):
        raise HandshakeError(
            f"the {role} node's layout makes no sense: heads {_range(group)} of {group.heads_of_model}, "
            f"{len(group.layers)} layers, head size {group.head_dim}; run the same version on both nodes"
        )


def _range(group: LayerGroup) -> str:
    return f"{group.first_head}..{group.first_head + group.num_kv_heads - 1}"


def _atoms(group: LayerGroup, first: int, last: int, head_bytes: int) -> I64:
    """Byte offsets in a block of K and V of the heads ``first .. last``, layer by layer."""
    planes = np.arange(2 * len(group.layers), dtype=np.int64) * group.num_kv_heads
    heads = np.arange(first, last, dtype=np.int64) - group.first_head
    return ((planes[:, None] + heads[None, :]) * head_bytes).ravel()


def _side(group: LayerGroup, block_size: int, tokens: int, item: int, rows: I64) -> Side:
    token_bytes = group.head_dim * item
    return Side(
        block_bytes=2 * len(group.layers) * group.num_kv_heads * block_size * token_bytes,
        pieces_per_block=block_size // tokens,
        step_bytes=tokens * token_bytes,
        rows=rows,
    )
