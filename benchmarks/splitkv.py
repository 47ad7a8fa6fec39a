"""Attention of one new token a sequence over the block-major pool, each row's K and V shared among several programs.

Measured by ``gpu_decode_attention.py`` beside this; nothing of the package calls it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda.attention import AttentionShape, Scales

_LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class KvTile:
    """``keys`` at a time in ``stages`` of a pipeline. ``splits``: programs of each row's head; ``flat``: of a head for
    each of all rows, dealt by the lengths."""

    keys: int
    stages: int
    warps: int
    splits: int
    flat: bool = False


class SplitKv:
    """Attention of layers of one shape. One stream at a time may use it."""

    def __init__(self, shape: AttentionShape, max_rows: int, device: torch.device, *, tile: KvTile) -> None:
        """For up to ``max_rows`` sequences."""
        self._shape, self._tile, self._max_rows = shape, tile, max_rows
        self._lines = triton.next_power_of_2(shape.num_heads // shape.num_kv_heads)
        across, items = triton.next_power_of_2(shape.head_dim), max_rows * shape.num_kv_heads
        parts = (tile.splits + max_rows) * shape.num_kv_heads if tile.flat else items * tile.splits
        self._sums = torch.empty(parts * self._lines * across, dtype=torch.float32, device=device)
        self._tops = torch.empty(parts * 2 * self._lines, dtype=torch.float32, device=device)
        self.arrived = torch.zeros(items, dtype=torch.int32, device=device)

    def plan(self, lens: Tensor) -> None:
        """Nothing is."""

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        out: Tensor,
        tables: Tensor,
        lens: Tensor,
        scales: Scales,
        *,
        compile_only: bool = False,
    ) -> None:
        """``q``, ``out [B, Hq, D]`` contiguous; ``k_cache``, ``v_cache [blocks, Hkv, block_size, D]`` of one layer;
        ``tables [B, blocks]``, ``lens [B]`` int32.
        """
        s, tile, rows = self._shape, self._tile, len(q)
        across = triton.next_power_of_2(s.head_dim)
        scale, cap = s.scale * scales.k, s.soft_cap or 0.0
        grid = (s.num_kv_heads, tile.splits + rows) if tile.flat else (s.num_kv_heads, tile.splits, rows)
        _attend.run(
            q, k_cache, v_cache, out, tables, lens, self._sums, self._tops, self.arrived,
            scale if cap else scale * _LOG2E, scales.v, cap, s.window or 0, tile.splits, rows, tables.stride(0),
            *k_cache.stride()[:3], GROUP=s.num_heads // s.num_kv_heads, GP=self._lines, M=max(16, self._lines),
            KV_HEADS=s.num_kv_heads, PAGE=s.block_size, DIM=s.head_dim, ACROSS=across, CAP=s.soft_cap is not None,
            WINDOW=s.window is not None, KEYS=tile.keys, SPLIT=tile.flat or tile.splits > 1,
            CHUNK=max(1, min(16, 8192 // (self._lines * across))), FLAT=tile.flat,
            ROWS=triton.next_power_of_2(self._max_rows), num_stages=tile.stages, num_warps=tile.warps, grid=grid,
            warmup=compile_only,
        )  # fmt: skip


@triton.jit
def _places(table: tl.tensor, tile: tl.tensor, last: tl.tensor, KEYS: tl.constexpr, PAGE: tl.constexpr) -> tl.tensor:
    """Blocks that the keys of ``tile`` are in: one, or one for each."""
    if KEYS <= PAGE:
        return tl.load(table + tl.minimum(tile, last) // (PAGE // KEYS))
    else:
        # past the last tile, the last one's: no block beyond a row's is looked up
        page = tl.minimum(tile, last) * (KEYS // PAGE) + tl.arange(0, KEYS) // PAGE
        return tl.load(table + page)


@triton.jit(do_not_specialize=["splits", "rows"])
def _attend(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, tables: tl.tensor, lens: tl.tensor,
    sums: tl.tensor, tops: tl.tensor, arrived: tl.tensor, scale: tl.tensor, v_scale: tl.tensor, cap: tl.tensor,
    window: tl.tensor, splits: tl.tensor, rows: tl.tensor, table_row: tl.tensor, block_stride: tl.tensor,
    head_stride: tl.tensor, token_stride: tl.tensor,
    GROUP: tl.constexpr, GP: tl.constexpr, M: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, ACROSS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr,
    SPLIT: tl.constexpr, CHUNK: tl.constexpr, FLAT: tl.constexpr, ROWS: tl.constexpr,
) -> None:  # fmt: skip
    head = tl.program_id(0)
    if FLAT:
        r = tl.arange(0, ROWS)
        all_lens = tl.load(lens + r, r < rows, other=0)
        all_tiles = tl.cdiv(all_lens, KEYS)
        if WINDOW:
            all_tiles -= tl.maximum(all_lens - window, 0) // KEYS
        share = tl.maximum(tl.cdiv(tl.sum(all_tiles), splits), 1)
        parts = tl.where(r < rows, tl.maximum(tl.cdiv(all_tiles, share), 1), 0)
        row = tl.sum((tl.cumsum(parts) <= tl.program_id(1)).to(tl.int32))
        before = tl.sum(tl.where(r < row, parts, 0))
        split = tl.program_id(1) - before
        length = tl.load(lens + row, row < rows, other=0)
    else:
        split, row = tl.program_id(1), tl.program_id(2)
        length = tl.load(lens + row)
    table = tables + row.to(tl.int64) * table_row
    if not WINDOW and KEYS <= PAGE and not FLAT:
        block = tl.load(table + tl.minimum(split // (PAGE // KEYS), table_row - 1))  # beside the length, not after it
    first = length * 0
    if WINDOW:
        first = tl.maximum(length - window, 0) // KEYS
    end = tl.cdiv(length, KEYS)
    if FLAT:
        splits = tl.maximum(tl.cdiv(end - first, share), 1)
        begin = before * KV_HEADS + head
        each = KV_HEADS
    else:
        begin = (row * KV_HEADS + head) * splits
        each = 1
    if first + split < end:
        some, i, j = tl.arange(0, KEYS), tl.arange(0, ACROSS), tl.arange(0, M)
        dims = i < DIM
        place = (row * KV_HEADS + head) * GROUP
        query = tl.load(
            q + (place + j).to(tl.int64)[:, None] * DIM + i[None, :], (j < GROUP)[:, None] & dims[None, :], other=0.0
        )
        top = tl.full([M], -float("inf"), tl.float32)
        total = tl.zeros([M], tl.float32)
        mixed = tl.zeros([M, ACROSS], tl.float32)
        start = first + split
        if WINDOW or KEYS > PAGE or FLAT:
            block = _places(table, start, end - 1, KEYS, PAGE)
        for tile in range(start, end, splits):
            key = tile * KEYS + some
            inside = key < length
            if WINDOW:
                inside = inside & (key >= length - window)
            if KEYS <= PAGE:
                at = block.to(tl.int64) * block_stride + head * head_stride
                inner = (tile % (PAGE // KEYS)) * KEYS + some
                offsets = inner[:, None] * token_stride + i[None, :]
                k_at, v_at = k_cache + at + offsets, v_cache + at + offsets
            else:
                at = block.to(tl.int64) * block_stride + head * head_stride + (some % PAGE) * token_stride
                k_at, v_at = k_cache + at[:, None] + i[None, :], v_cache + at[:, None] + i[None, :]
            block = _places(table, tile + splits, end - 1, KEYS, PAGE)
            if ACROSS == DIM:
                k = tl.load(k_at, inside[:, None], other=0.0)
                v = tl.load(v_at, inside[:, None], other=0.0)
            else:
                k = tl.load(k_at, inside[:, None] & dims[None, :], other=0.0)
                v = tl.load(v_at, inside[:, None] & dims[None, :], other=0.0)
            scores = tl.dot(query, tl.trans(k).to(query.dtype)) * scale
            if CAP:
                scores = cap * 1.4426950408889634 * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
            scores = tl.where(inside[None, :], scores, -float("inf"))
            higher = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            kept = tl.exp2(top - higher)
            total = total * kept + tl.sum(weights, 1)
            mixed *= kept[:, None]
            mixed = tl.dot(weights.to(query.dtype), v.to(query.dtype), mixed)
            top = higher
        used = tl.minimum(end - first, splits)
        stored = (j < GROUP)[:, None] & dims[None, :]
        if used == 1:
            result = mixed / total[:, None] * v_scale
            tl.store(
                out + (place + j).to(tl.int64)[:, None] * DIM + i[None, :], result.to(out.dtype.element_ty), stored
            )
        elif SPLIT:
            part = begin + split * each
            tl.store(
                sums + (part * GP + j).to(tl.int64)[:, None] * ACROSS + i[None, :],
                mixed,
                (j < GP)[:, None] & dims[None, :],
            )
            tl.store(tops + part * 2 * GP + j, top, j < GP)
            tl.store(tops + part * 2 * GP + GP + j, total, j < GP)
            tl.debug_barrier()
            item = row * KV_HEADS + head
            last = tl.atomic_add(arrived + item, 1, sem="acq_rel") == used - 1
            if last:
                _merged(out, sums, tops, item, begin, each, used, v_scale, GROUP, GP, DIM, ACROSS, CHUNK)
                tl.store(arrived + item, 0)
    elif (split == 0) & (row < rows):
        j, i = tl.arange(0, GP), tl.arange(0, ACROSS)
        place = (row * KV_HEADS + head) * GROUP
        zero = tl.zeros([GP, ACROSS], out.dtype.element_ty)
        tl.store(
            out + (place + j).to(tl.int64)[:, None] * DIM + i[None, :], zero, (j < GROUP)[:, None] & (i < DIM)[None, :]
        )


@triton.jit
def _merged(
    out: tl.tensor, sums: tl.tensor, tops: tl.tensor, item: tl.tensor, first: tl.tensor, each: tl.tensor,
    used: tl.tensor, v_scale: tl.tensor,
    GROUP: tl.constexpr, GP: tl.constexpr, DIM: tl.constexpr, ACROSS: tl.constexpr, CHUNK: tl.constexpr,
) -> None:  # fmt: skip
    g, i, some = tl.arange(0, GP), tl.arange(0, ACROSS), tl.arange(0, CHUNK)
    top = tl.full([GP], -float("inf"), tl.float32)
    total = tl.zeros([GP], tl.float32)
    mixed = tl.zeros([GP, ACROSS], tl.float32)
    for begin in range(0, used, CHUNK):
        part = first + (begin + some) * each
        there = begin + some < used
        # .cg: not from this multiprocessor's L1, which does not see what others write
        at = tops + part[:, None] * 2 * GP + g[None, :]
        tops_of = tl.load(at, there[:, None], other=-float("inf"), cache_modifier=".cg")
        totals = tl.load(at + GP, there[:, None], other=0.0, cache_modifier=".cg")
        place = (part * GP).to(tl.int64)[:, None, None] + g[None, :, None]
        mask = there[:, None, None] & (i < DIM)[None, None, :]
        values = tl.load(sums + place * ACROSS + i[None, None, :], mask, other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(tops_of, 0))
        weight, kept = tl.exp2(tops_of - higher[None, :]), tl.exp2(top - higher)
        total = total * kept + tl.sum(totals * weight, 0)
        mixed = mixed * kept[:, None] + tl.sum(values * weight[:, :, None], 0)
        top = higher
    result = mixed / total[:, None] * v_scale
    place = item * GROUP + g
    tl.store(
        out + place.to(tl.int64)[:, None] * DIM + i[None, :],
        result.to(out.dtype.element_ty),
        (g < GROUP)[:, None] & (i < DIM)[None, :],
    )
