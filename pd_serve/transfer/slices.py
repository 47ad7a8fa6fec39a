"""Which bytes of two pools are the same part of the KV, when block sizes or tensor parallelism differ. Pure arithmetic.

A *piece* is what both sides can name: ``min`` of the two block sizes in tokens (one must divide the other). Of a piece,
the heads that both ranks hold are exchanged. Inside a block a piece is a fixed pattern of *rows*, contiguous runs of
``row_bytes`` at the offsets ``rows``, in the same order on both sides. Where layouts agree, a piece is a block and has
one row. What lies where in a block, kv/layout.py says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pd_serve.errors import FailureKind, HandshakeError, TransferError
from pd_serve.kv.layout import DTYPE_BYTES, KVLayout, Plane
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
    if source.foreign or reader.foreign:
        found = _whole_blocks(source, reader)
    else:
        _check(source, reader)
        found = [_slicing(source, reader, group) for group in range(len(source.groups))]
    return (*found, _whole_block(PROBE_BLOCK_BYTES))


def placed(slicing: Slicing, source: Region, reader: Region) -> Slicing:
    """Of whole blocks whose parts lie in several places: a row for each. Raises HandshakeError."""
    if len(source.places) == len(reader.places) == 1:
        return slicing
    sizes, places = (source.block_bytes, reader.block_bytes), (len(source.places), len(reader.places))
    if not slicing.whole or sizes[0] != sizes[1] or places[0] != places[1]:
        raise HandshakeError(
            f"blocks lie in {places[0]} places of {sizes[0]} bytes at the prefill node, in {places[1]} of {sizes[1]} "
            "at the decode node; start both with the same engine and the same settings"
        )
    sides = (
        Side(region.block_bytes, 1, region.block_bytes, np.array(region.places, dtype=np.int64))
        for region in (source, reader)
    )
    return Slicing(source.block_bytes, *sides)


def counterparts(rank: int, ranks: int, others: int) -> range:
    """The ranks, of a node with ``others``, that hold heads of ``rank`` of another with ``ranks``.

    Each node's ranks hold equal parts of the heads, in order; where there are fewer heads than ranks, or nothing that
    can be split, ranks next to each other hold the same.
    """
    return range(rank * others // ranks, -(-(rank + 1) * others // ranks))


def needed(sources: Sequence[KVLayout], reader: KVLayout) -> list[tuple[bool, ...]]:
    """For each of a prompt's source ranks, which layer groups are read from it: those with heads that none before has.

    All have been found to fit the reader (:func:`slicings`). Raises HandshakeError where heads are on none of them.
    """
    if len(sources) == 1 or reader.foreign:  # the first has all, as the handshake saw
        return [(number == 0,) * len(reader.groups) for number in range(len(sources))]
    found = [[False] * len(reader.groups) for _ in sources]
    for number, group in enumerate(reader.groups):
        missing = {(i, head) for i, p in enumerate(group.planes) for head in range(p.first_head, p.end_head)}
        for source, reads in zip(sources, found, strict=True):
            held = source.groups[number].planes
            new = {(i, head) for i, head in missing if held[i].first_head <= head < held[i].end_head}
            missing -= new
            reads[number] = bool(new)
        if missing:
            heads = ", ".join(sorted({str(head) for _, head in missing}))
            raise HandshakeError(
                f"KV heads {heads} of layer group {number} are on none of the prefill node's ranks that this rank "
                "reads from; a node's ranks must hold equal parts of the heads, in order"
            )
    return [tuple(reads) for reads in found]


def _whole_blocks(source: KVLayout, reader: KVLayout) -> list[Slicing]:
    """Of layouts of which at least one is not ours: nobody here can take its blocks apart."""
    if source != reader:
        raise HandshakeError(
            f"KV layouts differ, and one is not pd-serve's own: {source.describe()} at the prefill node, "
            f"{reader.describe()} at the decode node; start both with the same engine and the same settings"
        )
    return [_whole_block(source.block_bytes(group)) for group in range(len(source.groups))]


def _whole_block(size_bytes: int) -> Slicing:
    side = Side(size_bytes, 1, size_bytes, np.zeros(1, dtype=np.int64))
    return Slicing(size_bytes, side, side)


_SAME_MODEL = "serve the same model on both nodes"


def _same(what: str, source: object, reader: object, advice: str) -> None:
    if source != reader:
        raise HandshakeError(f"{what} differ: {source} at the prefill node, {reader} at the decode node; {advice}")


def _check(source: KVLayout, reader: KVLayout) -> None:
    """Raises HandshakeError for layouts of different models, and for what no rank can have."""
    _same("KV data types", source.dtype, reader.dtype, "start both with the same --dtype and --kv-cache-dtype")
    if source.dtype not in DTYPE_BYTES:
        raise HandshakeError(f"KV data type {source.dtype} is unknown here; run the same version on both nodes")
    sizes = sorted((source.block_size, reader.block_size))
    if not 0 < sizes[0] <= sizes[1] <= MAX_BLOCK_SIZE or sizes[1] % sizes[0]:
        raise HandshakeError(
            f"block sizes do not fit: {source.block_size} tokens at the prefill node, {reader.block_size} at the "
            "decode node; start both with the same --block-size, or with sizes of which one divides the other"
        )
    _same("numbers of layer groups", len(source.groups), len(reader.groups), _SAME_MODEL)
    for a, b in zip(source.groups, reader.groups, strict=True):
        _same("layers", a.layers, b.layers, _SAME_MODEL)
        _same("attention windows", a.window, b.window, _SAME_MODEL)
        _same("numbers of planes", len(a.planes), len(b.planes), _SAME_MODEL)
        for p, q in zip(a.planes, b.planes, strict=True):
            _same("head sizes", p.dim, q.dim, _SAME_MODEL)
            _same("data types of a plane", p.dtype, q.dtype, _SAME_MODEL)
            _same("numbers of KV heads of the model", p.heads_of_model, q.heads_of_model, _SAME_MODEL)
            _check_plane(p, "prefill")
            _check_plane(q, "decode")
        if not a.planes or not a.layers:
            raise HandshakeError("a layer group has no layers or nothing in its blocks; run the same version on both")


def _check_plane(plane: Plane, role: str) -> None:
    if (
        plane.first_head < 0
        or plane.heads < 1
        or plane.dim < 1
        or plane.end_head > plane.heads_of_model
        or plane.heads_of_model > MAX_HEADS
        or (plane.dtype and plane.dtype not in DTYPE_BYTES)
    ):
        raise HandshakeError(
            f"the {role} node's layout makes no sense: heads {_range(plane)} of {plane.heads_of_model}, head size "
            f"{plane.dim} {plane.dtype}; run the same version on both nodes"
        )


def _range(plane: Plane) -> str:
    return f"{plane.first_head}..{plane.end_head - 1}"


def _slicing(source: KVLayout, reader: KVLayout, group: int) -> Slicing:
    tokens = min(source.block_size, reader.block_size)
    token_bytes = source.token_bytes(group)
    if source.block_size != reader.block_size and len(set(token_bytes)) > 1:
        raise HandshakeError(
            f"block sizes differ: {source.block_size} tokens at the prefill node, {reader.block_size} at the decode "
            f"node, and a token takes {' and '.join(map(str, token_bytes))} bytes in the planes of a block, which then "
            "cannot be taken apart; start both with the same --block-size"
        )
    runs_at_source, runs_at_reader, sizes = [], [], []
    for plane, (a, b) in enumerate(zip(source.groups[group].planes, reader.groups[group].planes, strict=True)):
        shared = max(a.first_head, b.first_head), min(a.end_head, b.end_head)
        if shared[0] >= shared[1]:
            raise HandshakeError(
                f"no KV head is on both ranks: heads {_range(a)} at the prefill node, {_range(b)} at the decode node; "
                "connect ranks whose heads overlap"
            )
        runs_at_source.append(_offsets(source, group, plane, *shared))
        runs_at_reader.append(_offsets(reader, group, plane, *shared))
        sizes.append(np.full_like(runs_at_source[-1], tokens * token_bytes[plane]))
    at_source, at_reader, size = (np.concatenate(of, axis=1).ravel() for of in (runs_at_source, runs_at_reader, sizes))
    # runs that go on alike on both sides are one; where runs differ in length, rows are what divides all of them
    apart = (np.diff(at_source) != size[:-1]) | (np.diff(at_reader) != size[:-1])
    begins = np.concatenate(([0], np.flatnonzero(apart) + 1))
    lengths = np.add.reduceat(size, begins)
    row_bytes = int(np.gcd.reduce(lengths))
    rows_of_run = lengths // row_bytes
    steps = np.arange(rows_of_run.sum()) - np.repeat(np.cumsum(rows_of_run) - rows_of_run, rows_of_run)

    def side(layout: KVLayout, runs: I64) -> Side:
        return Side(
            block_bytes=layout.block_bytes(group),
            pieces_per_block=layout.block_size // tokens,
            step_bytes=tokens * token_bytes[0],
            rows=np.repeat(runs[begins], rows_of_run) + steps * row_bytes,
        )

    return Slicing(row_bytes, side(source, at_source), side(reader, at_reader))


def _offsets(layout: KVLayout, group: int, plane: int, first: int, end: int) -> I64:
    """``[layers, heads]``: where in a block the heads ``first .. end - 1`` of the model begin."""
    at, head_bytes = layout.plane_places(group)[plane]
    layers = np.arange(len(layout.groups[group].layers), dtype=np.int64) * layout.layer_bytes(group)
    heads = np.arange(first, end, dtype=np.int64) - layout.groups[group].planes[plane].first_head
    offsets: I64 = layers[:, None] + at + heads * head_bytes
    return offsets
