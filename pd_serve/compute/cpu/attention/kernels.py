"""Kernels over one layer of the paged pool: store K and V, decode attention, gather for prefill, softmax.

Called by :class:`~pd_serve.compute.cpu.attention.paged.PagedAttention` alone, which checks what it passes. Strides and
offsets count elements. ``pool`` is the address of block 0 of the layer: keys ``[kv head][token][dim]`` there, values
the same ``value_offset`` further on; block b is ``b * block_stride`` further on (see :mod:`pd_serve.kv.layout`). Its
elements are of type ``kept``: ``element``, or FP8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange

from pd_serve.compute.cpu.attention import tiles
from pd_serve.compute.cpu.attention.tiles import TOKENS, is_tileable, score_tile, value_tile, write_tile
from pd_serve.jit import exp, kernel, larger, load, load_int, prefetch, store

CACHE_LINE_BYTES = 64
PREFETCH_TOKENS = 48  # about the time a line takes to arrive
LOWEST = np.finfo(np.float32).min


@kernel
def store_kv(
    element: Any, kept: Any, int64: Any, pool: int, block_stride: int, value_offset: int, block_size: int, k: int,
    k_stride: int, v: int, v_stride: int, slots: int, rows: int, kv_heads: int, dim: int, k_factor: float,
    v_factor: float,
) -> None:  # fmt: skip
    """Row i of ``k * k_factor`` and ``v * v_factor [rows, kv_heads, dim]`` goes to ``slots[i]``."""
    k_times, v_times = np.float32(k_factor), np.float32(v_factor)
    for row in range(rows):
        slot = load_int(int64, slots, row)
        token = slot // block_size * block_stride + slot % block_size * dim
        for head in range(kv_heads):
            to = token + head * block_size * dim
            for i in range(dim):
                store(kept, pool, to + i, load(element, k, row * k_stride + head * dim + i) * k_times)
            for i in range(dim):
                store(kept, pool, to + value_offset + i, load(element, v, row * v_stride + head * dim + i) * v_times)


@kernel
def gather_kv(
    element: Any, kept: Any, int32: Any, pool: int, block_stride: int, value_offset: int, block_size: int, table: int,
    tokens: int, keys: int, values: int, kv_heads: int, dim: int,
) -> None:  # fmt: skip
    """The first ``tokens`` positions of the blocks in ``table`` to ``keys`` and ``values [kv_heads, tokens, dim]``."""
    for block in range((tokens + block_size - 1) // block_size):
        first = block * block_size
        count = min(block_size, tokens - first) * dim
        for head in range(kv_heads):
            at = load_int(int32, table, block) * block_stride + head * block_size * dim
            to = (head * tokens + first) * dim
            for i in range(count):
                store(element, keys, to + i, load(kept, pool, at + i))
            for i in range(count):
                store(element, values, to + i, load(kept, pool, at + value_offset + i))


@kernel
def causal_weights(
    element: Any, scores: int, shares: int, rows: int, queries: int, columns: int, first: int, window: int, scale: float
) -> None:
    """``exp(scale * (scores - their maximum))`` of each row of ``scores [rows, columns]``, in place.

    Row r belongs to query ``r % queries``, which sees the columns up to ``first + r % queries``, of which the last
    ``window`` (0 = all); the others become 0. ``shares[r]``, float32, is what makes the row a softmax.
    """
    f32 = np.float32(0)
    factor = np.float32(scale)
    for row in range(rows):
        at = row * columns
        stop = first + row % queries + 1
        start = max(0, stop - window) if window > 0 else 0
        highest = LOWEST
        for i in range(start, stop):
            highest = larger(highest, load(element, scores, at + i))
        total = np.float32(0)
        for i in range(start, stop):
            weight = exp((load(element, scores, at + i) - highest) * factor)
            store(element, scores, at + i, weight)
            total += weight
        store(f32, shares, row, np.float32(1) / total)
        for i in range(start):
            store(element, scores, at + i, np.float32(0))
        for i in range(stop, columns):
            store(element, scores, at + i, np.float32(0))


@kernel
def write_heads(element: Any, mixed: int, shares: int, out: int, heads: int, queries: int, dim: int) -> None:
    """``out[q, h] = mixed[h, q] * shares[h, q]``: ``mixed [heads, queries, dim]``, ``out [queries, heads, dim]``."""
    f32 = np.float32(0)
    for head in range(heads):
        for query in range(queries):
            share = load(f32, shares, head * queries + query)
            at, to = (head * queries + query) * dim, (query * heads + head) * dim
            for i in range(dim):
                store(element, out, to + i, load(element, mixed, at + i) * share)


@njit
def _element_index(int32: Any, table: int, block_stride: int, block_size: int, dim: int, head: int, token: int) -> Any:
    """Where the key of a token lies, in elements from the pool's address."""
    block = load_int(int32, table, token // block_size)
    return block * block_stride + (head * block_size + token % block_size) * dim


@cache
def decode_kernel(
    dim: int, group: int, block_size: int, itemsize: int, kept_size: int, *, parallel: bool
) -> Callable[..., None]:
    """Attention of one query token a sequence, for ``group`` query heads a KV head.

    The sizes are constants of the kernel, as its vectors need them. K and V are read once for all query heads that
    share them, and asked for ahead of time: their blocks are scattered, which the processor cannot foresee.
    """
    # long: one loop over K, one over V; what they share would be copied for every call of a part
    if not is_tileable(dim, kept_size):
        return _plain_decode_kernel(dim, group, block_size, itemsize, parallel=parallel)
    line = CACHE_LINE_BYTES // kept_size

    @kernel(parallel=parallel, inlines=(tiles,))
    def decode(
        element: Any, kept: Any, int32: Any, pool: int, block_stride: int, value_offset: int, q: int, q_stride: int,
        tables: int, table_stride: int, seq_lens: int, num_seqs: int, kv_heads: int, window: int, scale: float,
        out: int,
    ) -> None:  # fmt: skip
        """``q [num_seqs, kv_heads * group, dim]``; ``out`` the same, contiguous. ``window`` 0: all is seen."""
        f32 = np.float32(0)
        factor = np.float32(scale)
        for work in prange(num_seqs * kv_heads):
            seq, head = work // kv_heads, work % kv_heads
            length = load_int(int32, seq_lens, seq)
            start = max(0, length - window) if window > 0 else 0
            table = tables + 4 * seq * table_stride
            stride = length - start + TOKENS  # of a query head's scores; the last tile may write behind them
            scratch = np.empty(group * (dim + stride), np.float32)
            result = scratch.ctypes.data
            scores = result + 4 * group * dim
            query = q + itemsize * (seq * q_stride + head * group * dim)

            token = start
            while token < length:
                soon = min(token + PREFETCH_TOKENS, length - 1)
                ahead = _element_index(int32, table, block_stride, block_size, dim, head, soon)
                for i in range(0, TOKENS * dim, line):
                    prefetch(kept, pool, ahead + i)
                at = _element_index(int32, table, block_stride, block_size, dim, head, token)
                count = min(TOKENS, block_size - token % block_size, length - token)
                score_tile(element, kept, query, pool, at, count, scores + 4 * (token - start), stride, group, dim)
                token += count

            for g in range(group):
                first, last = g * stride, g * stride + length - start
                highest = LOWEST
                for i in range(first, last):
                    highest = larger(highest, load(f32, scores, i))
                total = np.float32(0)
                for i in range(first, last):
                    p = exp((load(f32, scores, i) - highest) * factor)
                    store(f32, scores, i, p)
                    total += p
                share = np.float32(1) / total
                for i in range(first, last):
                    store(f32, scores, i, load(f32, scores, i) * share)

            for i in range(group * dim):
                store(f32, result, i, np.float32(0))
            token = start
            while token < length:
                soon = min(token + PREFETCH_TOKENS, length - 1)
                ahead = _element_index(int32, table, block_stride, block_size, dim, head, soon) + value_offset
                for i in range(0, TOKENS * dim, line):
                    prefetch(kept, pool, ahead + i)
                at = _element_index(int32, table, block_stride, block_size, dim, head, token) + value_offset
                count = min(TOKENS, block_size - token % block_size, length - token)
                value_tile(kept, scores + 4 * (token - start), stride, pool, at, count, result, group, dim)
                token += count
            write_tile(element, result, out + itemsize * work * group * dim, group, dim)

    return decode  # type: ignore[no-any-return]


def _plain_decode_kernel(
    dim: int, group: int, block_size: int, itemsize: int, *, parallel: bool
) -> Callable[..., None]:
    """The same for head sizes that no vector divides, those of tiny test models: one element at a time."""

    @kernel(parallel=parallel)
    def decode(
        element: Any, kept: Any, int32: Any, pool: int, block_stride: int, value_offset: int, q: int, q_stride: int,
        tables: int, table_stride: int, seq_lens: int, num_seqs: int, kv_heads: int, window: int, scale: float,
        out: int,
    ) -> None:  # fmt: skip
        factor = np.float32(scale)
        for work in prange(num_seqs * kv_heads):
            seq, head = work // kv_heads, work % kv_heads
            length = load_int(int32, seq_lens, seq)
            start = max(0, length - window) if window > 0 else 0
            table = tables + 4 * seq * table_stride
            query = q + itemsize * (seq * q_stride + head * group * dim)
            weights = np.empty(length - start, np.float32)
            result = np.empty(dim, np.float32)
            for g in range(group):
                highest = LOWEST
                for token in range(start, length):
                    at = _element_index(int32, table, block_stride, block_size, dim, head, token)
                    score = np.float32(0)
                    for i in range(dim):
                        score += load(element, query, g * dim + i) * load(kept, pool, at + i)
                    weights[token - start] = score
                    highest = larger(highest, score)
                total = np.float32(0)
                result[:] = np.float32(0)
                for token in range(start, length):
                    at = _element_index(int32, table, block_stride, block_size, dim, head, token) + value_offset
                    weight = exp((weights[token - start] - highest) * factor)
                    total += weight
                    for i in range(dim):
                        result[i] += weight * load(kept, pool, at + i)
                for i in range(dim):
                    store(element, out, (work * group + g) * dim + i, result[i] / total)

    return decode  # type: ignore[no-any-return]
