"""Attention over the block-major pool by one plain kernel, for what FlashInfer has not: float32.

So that texts can be compared with other engines' and the CPU's, token for token. Nothing here is fast: each program
computes a head of a row, key by key.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

if TYPE_CHECKING:
    from pd_serve.compute.cuda.attention import AttentionShape, Scales

_KEYS = 32  # at a time


@dataclass
class PlainRows:
    """Which sequence each row belongs to, and what it sees."""

    tables: Tensor  # [B, blocks] int32
    sequences: Tensor  # [T] int32: rows of ``tables``
    lens: Tensor  # [T] int32: tokens up to the row's own

    @classmethod
    def of_chunks(cls, query_start: Tensor, lens: Tensor, tables: Tensor, device: torch.device) -> PlainRows:
        """As :meth:`pd_serve.compute.cuda.attention.Prefill.prepare` has them, on the host."""
        counts = query_start.diff()
        sequences = torch.repeat_interleave(torch.arange(len(lens), dtype=torch.int32), counts)
        first = lens - counts - query_start[:-1]
        seen = torch.arange(1, len(sequences) + 1, dtype=torch.int32) + torch.repeat_interleave(first, counts)
        return cls(tables.to(device), sequences.to(device), seen.to(torch.int32).to(device))


def attend(
    shape: AttentionShape, q: Tensor, k_cache: Tensor, v_cache: Tensor, out: Tensor, rows: PlainRows, scales: Scales
) -> None:
    """``q``, ``out [T, Hq, D]``, heads contiguous; the caches as in :class:`pd_serve.compute.cuda.attention.Decode`."""
    tokens, heads, dim = q.shape
    _attend[(tokens, heads)](
        q, k_cache, v_cache, out, rows.tables, rows.sequences, rows.lens, shape.scale * scales.k, scales.v,
        shape.soft_cap or 0.0,
        shape.window or 0, rows.tables.stride(0), q.stride(0), out.stride(0), *k_cache.stride()[:3],
        GROUP=shape.num_heads // shape.num_kv_heads, PAGE=shape.block_size, DIM=dim, CAP=shape.soft_cap is not None,
        ACROSS=triton.next_power_of_2(dim), KEYS=_KEYS, num_warps=4,
    )  # fmt: skip


@triton.jit
def _attend(
    q: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, out: tl.tensor, tables: tl.tensor, sequences: tl.tensor,
    lens: tl.tensor, scale: tl.tensor, v_scale: tl.tensor, cap: tl.tensor, window: tl.tensor, table_row: tl.tensor,
    q_row: tl.tensor, out_row: tl.tensor, block_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor,
    GROUP: tl.constexpr, PAGE: tl.constexpr, DIM: tl.constexpr, CAP: tl.constexpr, ACROSS: tl.constexpr,
    KEYS: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, ACROSS)
    query = tl.load(q + row * q_row + head * DIM + i, i < DIM, other=0.0).to(tl.float32) * scale
    table = tables + tl.load(sequences + row).to(tl.int64) * table_row
    end = tl.load(lens + row)
    start = end * 0
    if window > 0:
        start = tl.maximum(end - window, 0)
    highest = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    mixed = tl.zeros([ACROSS], tl.float32)
    for first in range(start, end, KEYS):
        key = first + tl.arange(0, KEYS)
        block = tl.load(table + key // PAGE, key < end, other=0).to(tl.int64)
        at = block * block_stride + (head // GROUP) * head_stride + (key % PAGE) * token_stride
        mask = (key < end)[:, None] & (i < DIM)[None, :]
        keys = tl.load(k_cache + at[:, None] + i[None, :], mask, other=0.0).to(tl.float32)
        scores = tl.sum(keys * query[None, :], 1)
        if CAP:
            scores = cap * (2 / (1 + tl.exp(-2 * scores / cap)) - 1)
        scores = tl.where(key < end, scores, -float("inf"))
        most = tl.maximum(highest, tl.max(scores))
        weights = tl.exp(scores - most)
        kept = tl.exp(highest - most)
        values = tl.load(v_cache + at[:, None] + i[None, :], mask, other=0.0).to(tl.float32)
        mixed = mixed * kept + tl.sum(values * weights[:, None], 0)
        total = total * kept + tl.sum(weights)
        highest = most
    tl.store(out + row * out_row + head * DIM + i, (mixed / total * v_scale).to(out.dtype.element_ty), i < DIM)
