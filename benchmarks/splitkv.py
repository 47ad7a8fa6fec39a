"""Attention of one new token a sequence over the block-major pool: all keys of a step, dealt evenly among programs.

Measured by ``gpu_decode_attention.py`` beside this; nothing of the package calls it yet. Lengths and tables are read on
the device, so that a CUDA graph serves any. A step is planned once for all layers: its tiles of keys, row by row and
head by head, are cut into as many equal shares as there are programs, which all run at once; what several of them have
of one head the last to end merges, in a fixed order. So how a row's keys are summed depends on the lengths of all rows
of the step and on nothing else: rows without a token, as those that fill up a graph, have no tiles, and a step has the
same bits in a graph and without one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda.attention import AttentionShape, Scales

_LOG2E = 1.4426950408889634
_PLANNED = 32  # shares that a program of the plan finds
_MERGED = 8192  # numbers that are merged at once


@dataclass(frozen=True)
class KvTile:
    """``keys`` at a time in ``stages`` of a pipeline; so many ``programs`` for each multiprocessor."""

    keys: int
    stages: int
    warps: int
    programs: int
    least: int = 1  # tiles of a share


def tile_for(shape: AttentionShape) -> KvTile:
    """What is thought to be fast for ``shape``."""
    if shape.head_dim > 128:
        return KvTile(32, 3, 4, 2)
    return KvTile(64, 4, 4, 2) if shape.fp8_kv else KvTile(64, 3, 4, 2)


class SplitKv:
    """Attention of layers of one shape. One stream at a time may use it."""

    def __init__(
        self,
        shape: AttentionShape,
        max_rows: int,
        device: torch.device,
        *,
        tile: KvTile | None = None,
        programs: int | None = None,
    ) -> None:
        """For up to ``max_rows`` sequences. ``programs``: by default what ``tile`` says; any number is right.
        Blocks are of a power of two of tokens.
        """
        self._shape, self._tile = shape, tile or tile_for(shape)
        self._programs = programs or self._tile.programs * _processors(device)
        group, across = shape.num_heads // shape.num_kv_heads, triton.next_power_of_2(shape.head_dim)
        lines = triton.next_power_of_2(group)
        self._rows = triton.next_power_of_2(max_rows)
        # of heads that programs share, two a program at most: sums, and the highest scores and totals of weights
        self._sums = torch.empty((2 * self._programs, lines, across), dtype=torch.float32, device=device)
        self._tops = torch.empty((2 * self._programs, 2, lines), dtype=torch.float32, device=device)
        # how many programs have their part of a row's head ready: the last one leaves 0 behind
        self.arrived = torch.zeros(max_rows * shape.num_kv_heads, dtype=torch.int32, device=device)
        self._first = torch.zeros((2, self._programs), dtype=torch.int32, device=device)
        self._starts = torch.zeros(1 + max_rows, dtype=torch.int32, device=device)
        self._constants = {
            "GROUP": group, "LINES": lines, "M": max(16, lines), "KV_HEADS": shape.num_kv_heads,
            "PAGE": shape.block_size, "DIM": shape.head_dim, "ACROSS": across, "CAP": shape.soft_cap is not None,
            "WINDOW": shape.window is not None, "KEYS": self._tile.keys, "FP8": shape.fp8_kv,
            "PARTS": max(1, min(8, _MERGED // (lines * across))),
            "num_stages": self._tile.stages, "num_warps": self._tile.warps,
        }  # fmt: skip

    def plan(self, lens: Tensor) -> None:
        """Before :meth:`attend` of each layer of a step: ``lens [B]`` int32, 0 where a row is nobody's."""
        s, tile = self._shape, self._tile
        _plan[(triton.cdiv(self._programs, _PLANNED),)](
            lens, self._first, self._starts, len(lens), self._programs, s.window or 0,
            KV_HEADS=s.num_kv_heads, WINDOW=s.window is not None, KEYS=tile.keys, LEAST=tile.least, ROWS=self._rows,
            BLOCK=_PLANNED, num_warps=4,
        )  # fmt: skip

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
        """Of the ``lens`` that were planned. ``q``, ``out [B, Hq, D]`` contiguous; ``k_cache``, ``v_cache [blocks, Hkv,
        block_size, D]`` of one layer, of the same strides; ``tables [B, blocks]`` int32. Rows of nobody become 0.
        """
        s = self._shape
        scale, cap = s.scale * scales.k, s.soft_cap or 0.0
        if s.fp8_kv:
            k_cache, v_cache = k_cache.view(torch.int16), v_cache.view(torch.int16)
        _attend.run(
            q, k_cache, v_cache, out, tables, lens, self._sums, self._tops, self.arrived, self._first, self._starts,
            scale if cap else scale * _LOG2E, scales.v, cap, s.window or 0, len(q), self._programs, tables.stride(0),
            *k_cache.stride()[:3], **self._constants, grid=(max(self._programs, len(q)),), warmup=compile_only,
        )  # fmt: skip


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@triton.jit(do_not_specialize=["rows", "programs", "window"])
def _plan(
    lens: tl.tensor, first: tl.tensor, starts: tl.tensor, rows: tl.tensor, programs: tl.tensor, window: tl.tensor,
    KV_HEADS: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, LEAST: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    """``starts``: the size of a share, then where each row's tiles begin among all; ``first``: of each program the row
    that it begins in, and the tile there, counted over the row's heads.
    """
    row = tl.arange(0, ROWS)
    length = tl.load(lens + row, row < rows, other=0)
    tiles = tl.cdiv(length, KEYS)
    if WINDOW:
        tiles -= tl.maximum(length - window, 0) // KEYS
    tiles *= KV_HEADS
    ends = tl.cumsum(tiles)
    share = tl.maximum(tl.cdiv(tl.sum(tiles), programs), LEAST)
    program = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = program * share
    own = tl.sum((ends[None, :] <= begin[:, None]).to(tl.int32), 1)
    before = tl.sum(tl.where(row[None, :] < own[:, None], tiles[None, :], 0), 1)
    tl.store(first + program, own, program < programs)  # ROWS, where nothing is left
    tl.store(first + programs + program, begin - before, program < programs)
    if tl.program_id(0) == 0:
        tl.store(starts, share)
        tl.store(starts + 1 + row, ends - tiles, row < rows)


@triton.jit(do_not_specialize=["rows", "programs", "window"])
def _attend(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, tables: tl.tensor, lens: tl.tensor,
    sums: tl.tensor, tops: tl.tensor, arrived: tl.tensor, first: tl.tensor, starts: tl.tensor, scale: tl.tensor,
    v_scale: tl.tensor, cap: tl.tensor, window: tl.tensor, rows: tl.tensor, programs: tl.tensor, table_row: tl.tensor,
    block_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor,
    GROUP: tl.constexpr, LINES: tl.constexpr, M: tl.constexpr, KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    DIM: tl.constexpr, ACROSS: tl.constexpr, CAP: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr,
    FP8: tl.constexpr, PARTS: tl.constexpr,
) -> None:  # fmt: skip
    program = tl.program_id(0)
    planned = program < programs
    row, at = tl.load(first + program, planned, other=rows), tl.load(first + programs + program, planned, other=0)
    share = tl.load(starts)
    if tl.load(lens + program, program < rows, other=1) == 0:
        for head in range(KV_HEADS):
            zero = tl.zeros([M, ACROSS], tl.float32)
            _store(out, program * KV_HEADS + head, zero, GROUP, M, DIM, ACROSS)
    left = share
    while (left > 0) & (row < rows):
        length = tl.load(lens + row)
        start = length * 0
        if WINDOW:
            start = tl.maximum(length - window, 0) // KEYS
        tiles = tl.cdiv(length, KEYS) - start
        if tiles > 0:
            head, tile = at // tiles, at % tiles
            number = tl.minimum(tiles - tile, left)
            top, total, mixed = _tiles(
                q, k_cache, v_cache, tables + row.to(tl.int64) * table_row, row * KV_HEADS + head, head, length,
                start + tile, number, scale, cap, window, block_stride, head_stride, token_stride,
                GROUP, M, PAGE, DIM, ACROSS, CAP, WINDOW, KEYS, FP8,
            )  # fmt: skip
            item = row * KV_HEADS + head
            if number == tiles:
                _store(out, item, mixed / total[:, None] * v_scale, GROUP, M, DIM, ACROSS)
            else:
                # two parts a program at most: of a head that it did not begin, and of one that it does not end
                part = 2 * program + (tile == 0).to(tl.int32)
                _store_part(sums, tops, part, top, total, mixed, LINES, M, ACROSS)
                begin = tl.load(starts + 1 + row) + head * tiles
                others = (begin + tiles - 1) // share - begin // share
                tl.debug_barrier()  # all of the part is written before one of the threads says so
                if tl.atomic_add(arrived + item, 1, sem="acq_rel") == others:
                    merged = _merged(sums, tops, begin // share, others + 1, LINES, ACROSS, PARTS)
                    _store(out, item, merged * v_scale, GROUP, LINES, DIM, ACROSS)
                    tl.store(arrived + item, 0)
            left -= number
            at += number
        if at >= tiles * KV_HEADS:
            row += 1
            at = 0


@triton.jit
def _tiles(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, table: tl.tensor, item: tl.tensor, head: tl.tensor,
    length: tl.tensor, start: tl.tensor, number: tl.tensor, scale: tl.tensor, cap: tl.tensor, window: tl.tensor,
    block_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor,
    GROUP: tl.constexpr, M: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, ACROSS: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, KEYS: tl.constexpr, FP8: tl.constexpr,
) -> tuple[tl.tensor, tl.tensor, tl.tensor]:  # fmt: skip
    """Of ``number`` tiles of a row's head: the highest scores, the sums of weights, those of weighted values."""
    # long: what is loaded, multiplied and weighted in one pipelined loop
    # FP8 fits into float16. It comes as words of two numbers, those at even and at odd places to be tensors of their
    # own: no instruction brings single bytes of V from shared memory to where tensor cores want them
    COMPUTE: tl.constexpr = tl.float16 if FP8 else q.dtype.element_ty
    EACH: tl.constexpr = 2 if FP8 else 1
    WORDS: tl.constexpr = ACROSS // EACH
    some, i, j = tl.arange(0, KEYS), tl.arange(0, WORDS), tl.arange(0, M)
    place = q + (item * GROUP + j).to(tl.int64)[:, None] * DIM + EACH * i[None, :]
    exists = (j < GROUP)[:, None] & (EACH * i < DIM)[None, :]
    query = tl.load(place, exists, other=0.0).to(COMPUTE)
    top, total = tl.full([M], -float("inf"), tl.float32), tl.zeros([M], tl.float32)
    mixed = tl.zeros([M, WORDS], tl.float32)
    if FP8:
        odd_query, odd_mixed = tl.load(place + 1, exists, other=0.0).to(COMPUTE), tl.zeros([M, WORDS], tl.float32)
    end = start + number
    block = _blocks(table, start, end - 1, length, KEYS, PAGE)
    for tile in range(start, end):
        key = tile * KEYS + some
        seen = key < length
        if WINDOW:
            seen = seen & (key >= length - window)
        at = block.to(tl.int64) * block_stride + head * head_stride
        if KEYS <= PAGE:
            offsets = at + ((tile % (PAGE // KEYS)) * KEYS + some)[:, None] * token_stride + i[None, :]
        else:
            offsets = (at + (some % PAGE) * token_stride)[:, None] + i[None, :]
        block = _blocks(table, tile + 1, end - 1, length, KEYS, PAGE)  # a tile ahead, so that no load waits for it
        # what is not seen counts as 0: it may be NaN, which a weight of 0 would not cancel
        mask = seen[:, None]
        if ACROSS != DIM:
            mask = mask & (EACH * i < DIM)[None, :]
        k, v = tl.load(k_cache + offsets, mask, other=0), tl.load(v_cache + offsets, mask, other=0)
        if FP8:
            even, odd = _pair(tl.trans(k))
            scores = tl.dot(odd_query, odd, tl.dot(query, even)) * scale
        else:
            scores = tl.dot(query, tl.trans(k)) * scale
        if CAP:
            scores = cap * 1.4426950408889634 * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        weights, kept = tl.exp2(scores - higher[:, None]), tl.exp2(top - higher)
        total = total * kept + tl.sum(weights, 1)
        if FP8:
            even, odd = _pair(v)
            mixed = tl.dot(weights.to(COMPUTE), even, mixed * kept[:, None])
            odd_mixed = tl.dot(weights.to(COMPUTE), odd, odd_mixed * kept[:, None])
        else:
            mixed = tl.dot(weights.to(COMPUTE), v, mixed * kept[:, None])
        top = higher
    if FP8:
        mixed = tl.join(mixed, odd_mixed).reshape(M, ACROSS)
    return top, total, mixed


@triton.jit
def _blocks(
    table: tl.tensor, tile: tl.tensor, last: tl.tensor, length: tl.tensor, KEYS: tl.constexpr, PAGE: tl.constexpr
) -> tl.tensor:
    """That the keys of ``tile``, or of ``last`` if that is before it, are in: one, or one for each."""
    tile = tl.minimum(tile, last)
    if KEYS <= PAGE:
        return tl.load(table + tile // (PAGE // KEYS))
    else:
        key = tile * KEYS + tl.arange(0, KEYS)
        return tl.load(table + key // PAGE, key < length, other=0)


@triton.jit
def _pair(words: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """The two numbers in FP8 of each word, in float16."""
    low = (words & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    high = ((words >> 8) & 0xFF).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return low.to(tl.float16), high.to(tl.float16)


@triton.jit
def _store(
    out: tl.tensor, item: tl.tensor, result: tl.tensor,
    GROUP: tl.constexpr, LINES: tl.constexpr, DIM: tl.constexpr, ACROSS: tl.constexpr,
) -> None:  # fmt: skip
    line, i = tl.arange(0, LINES), tl.arange(0, ACROSS)
    place = out + (item * GROUP + line).to(tl.int64)[:, None] * DIM + i[None, :]
    tl.store(place, result.to(out.dtype.element_ty), (line < GROUP)[:, None] & (i < DIM)[None, :])


@triton.jit
def _store_part(
    sums: tl.tensor, tops: tl.tensor, part: tl.tensor, top: tl.tensor, total: tl.tensor, mixed: tl.tensor,
    LINES: tl.constexpr, M: tl.constexpr, ACROSS: tl.constexpr,
) -> None:  # fmt: skip
    line, i = tl.arange(0, M), tl.arange(0, ACROSS)
    tl.store(sums + (part * LINES + line)[:, None] * ACROSS + i[None, :], mixed, (line < LINES)[:, None])
    tl.store(tops + 2 * part * LINES + line, top, line < LINES)
    tl.store(tops + (2 * part + 1) * LINES + line, total, line < LINES)


@triton.jit
def _merged(
    sums: tl.tensor, tops: tl.tensor, first: tl.tensor, sharing: tl.tensor,
    LINES: tl.constexpr, ACROSS: tl.constexpr, PARTS: tl.constexpr,
) -> tl.tensor:  # fmt: skip
    """What ``sharing`` programs from ``first`` on have of a head."""
    line, i, some = tl.arange(0, LINES), tl.arange(0, ACROSS), tl.arange(0, PARTS)
    top, total = tl.full([LINES], -float("inf"), tl.float32), tl.zeros([LINES], tl.float32)
    mixed = tl.zeros([LINES, ACROSS], tl.float32)
    for begin in range(0, sharing, PARTS):
        number = begin + some
        there = number < sharing
        part = 2 * (first + number) + (number == 0).to(tl.int32)  # the first of them began the head
        # .cg: not from this multiprocessor's L1, which does not see what others write
        at = tops + 2 * part[:, None] * LINES + line[None, :]
        their_top = tl.load(at, there[:, None], other=-float("inf"), cache_modifier=".cg")
        their_total = tl.load(at + LINES, there[:, None], other=0.0, cache_modifier=".cg")
        place = (part[:, None, None] * LINES + line[None, :, None]) * ACROSS + i[None, None, :]
        their_mixed = tl.load(sums + place, there[:, None, None], other=0.0, cache_modifier=".cg")
        higher = tl.maximum(top, tl.max(their_top, 0))
        weight, kept = tl.exp2(their_top - higher[None, :]), tl.exp2(top - higher)
        total = total * kept + tl.sum(their_total * weight, 0)
        mixed = mixed * kept[:, None] + tl.sum(their_mixed * weight[:, :, None], 0)
        top = higher
    return mixed / total[:, None]
