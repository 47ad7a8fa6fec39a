"""Kernels over one layer of the paged pool: store K and V, decode attention, gather for prefill, softmax.

Called by :class:`pd_serve.engine.attention.paged.PagedAttention` alone, which also checks what it passes. Strides and
offsets count elements. ``pool`` is the address of block 0 of the layer: keys ``[kv head][token][dim]`` there, values
the same ``value_offset`` further on; block b is ``b * block_stride`` further on (see :mod:`pd_serve.kv.layout`).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numba import prange

from pd_serve.models.jit import exp, kernel, larger, load, load_int, prefetch, store

LOWEST = np.finfo(np.float32).min


@kernel
def store_kv(
    element: Any, int64: Any, pool: int, block_stride: int, value_offset: int, block_size: int, k: int, k_stride: int,
    v: int, v_stride: int, slots: int, rows: int, kv_heads: int, dim: int,
) -> None:  # fmt: skip
    """Row i of ``k`` and ``v [rows, kv_heads, dim]`` goes to ``slots[i]``."""
    for row in range(rows):
        slot = load_int(int64, slots, row)
        token = slot // block_size * block_stride + slot % block_size * dim
        for head in range(kv_heads):
            to = token + head * block_size * dim
            for i in range(dim):
                store(element, pool, to + i, load(element, k, row * k_stride + head * dim + i))
            for i in range(dim):
                store(element, pool, to + value_offset + i, load(element, v, row * v_stride + head * dim + i))


@kernel
def gather_kv(
    element: Any, int32: Any, pool: int, block_stride: int, value_offset: int, block_size: int, table: int,
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
                store(element, keys, to + i, load(element, pool, at + i))
            for i in range(count):
                store(element, values, to + i, load(element, pool, at + value_offset + i))


@kernel
def causal_softmax(
    element: Any, scores: int, scratch: int, rows: int, queries: int, columns: int, first: int, window: int,
    scale: float,
) -> None:  # fmt: skip
    """Softmax of ``scale * scores [rows, columns]`` in place. ``scratch`` holds ``columns`` float32.

    Row r belongs to query ``r % queries``, which sees the columns up to ``first + r % queries``, of which the last
    ``window`` (0 = all); the others become 0.
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
            p = exp((load(element, scores, at + i) - highest) * factor)
            store(f32, scratch, i, p)
            total += p
        share = np.float32(1) / total
        for i in range(start):
            store(element, scores, at + i, np.float32(0))
        for i in range(start, stop):
            store(element, scores, at + i, load(f32, scratch, i) * share)
        for i in range(stop, columns):
            store(element, scores, at + i, np.float32(0))


@cache
def decode_kernel(dim: int, group: int, block_size: int, line: int, *, parallel: bool) -> Callable[..., None]:
    """Attention of one query token a sequence, for ``group`` query heads a KV head.

    The sizes are constants of the kernel: with them LLVM unrolls its loops over vectors, which makes it several times
    faster. Each K and V is read once for all query heads that share it.
    """

    @kernel(parallel=parallel)
    def decode(
        element: Any, int32: Any, pool: int, block_stride: int, value_offset: int, q: int, q_stride: int, tables: int,
        table_stride: int, seq_lens: int, num_seqs: int, kv_heads: int, window: int, scale: float, out: int,
    ) -> None:  # fmt: skip
        """``q [num_seqs, kv_heads * group, dim]``; ``out`` the same, contiguous. ``window`` 0: all is seen."""
        f32 = np.float32(0)
        f32 = np.float32(0)
        for work in prange(num_seqs * kv_heads):
            seq, head = work // kv_heads, work % kv_heads
            length = load_int(int32, seq_lens, seq)
            start = max(0, length - window) if window > 0 else 0
            first = start // block_size
            width = length - first * block_size  # tokens in the blocks that are read
            low = start - first * block_size  # of which the first so many are outside of the window
            table = tables + 4 * (seq * table_stride + first)
            scratch = np.empty(group * (2 * dim + width), np.float32)
            query = scratch.ctypes.data
            result = query + 4 * group * dim
            scores = result + 4 * group * dim
            for i in range(group * dim):
                value = load(element, q, seq * q_stride + head * group * dim + i)
                store(f32, query, i, value * np.float32(scale))
                store(f32, result, i, np.float32(0))

            for token in range(low, width):
                block = load_int(int32, table, token // block_size)
                at = block * block_stride + (head * block_size + token % block_size) * dim
                ahead = (load_int(int32, table, min(token + block_size, width - 1) // block_size) - block) * block_stride
                for i in range(0, dim, line):
                    prefetch(element, pool, at + ahead + i)
                for g in range(group):
                    score = np.float32(0)
                    for i in range(dim):
                        score += load(f32, query, g * dim + i) * load(element, pool, at + i)
                    store(f32, scores, g * width + token, score)

            for g in range(group):
                highest = LOWEST
                for i in range(g * width + low, g * width + width):
                    highest = larger(highest, load(f32, scores, i))
                total = np.float32(0)
                for i in range(g * width + low, g * width + width):
                    p = exp(load(f32, scores, i) - highest)
                    store(f32, scores, i, p)
                    total += p
                share = np.float32(1) / total
                for i in range(g * width + low, g * width + width):
                    store(f32, scores, i, load(f32, scores, i) * share)

            token = low
            while token < width:
                block = load_int(int32, table, token // block_size)
                at = block * block_stride + (head * block_size + token % block_size) * dim + value_offset
                ahead = (load_int(int32, table, min(token + block_size, width - 1) // block_size) - block) * block_stride
                if token % block_size + 4 <= block_size and token + 4 <= width:
                    for i in range(0, 4 * dim, line):
                        prefetch(element, pool, at + ahead + i)
                    for g in range(group):
                        p0 = load(f32, scores, g * width + token)
                        p1 = load(f32, scores, g * width + token + 1)
                        p2 = load(f32, scores, g * width + token + 2)
                        p3 = load(f32, scores, g * width + token + 3)
                        for i in range(dim):
                            value = p0 * load(element, pool, at + i) + p1 * load(element, pool, at + dim + i)
                            value += p2 * load(element, pool, at + 2 * dim + i)
                            value += p3 * load(element, pool, at + 3 * dim + i)
                            store(f32, result, g * dim + i, load(f32, result, g * dim + i) + value)
                    token += 4
                else:
                    for g in range(group):
                        p = load(f32, scores, g * width + token)
                        for i in range(dim):
                            value = load(f32, result, g * dim + i) + p * load(element, pool, at + i)
                            store(f32, result, g * dim + i, value)
                    token += 1
            for i in range(group * dim):
                store(element, out, (seq * kv_heads + head) * group * dim + i, load(f32, result, i))

    return decode  # type: ignore[no-any-return]
