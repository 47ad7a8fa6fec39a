"""K and V of sequences out of a pool in FP8, one token behind the other, in the dtype of queries.

Called by :mod:`pd_serve.compute.cuda.attention` for chunks of prompts: attention that converts what it reads takes
three times as long as attention over bfloat16 (docs/benchmarks.md).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def pages_of(lens: Tensor, starts: Tensor, indices: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    """On the host, int32: each sequence's first token, ``[B + 1]``; of each page its block, first token and number of
    tokens, ``[pages, 3]``. ``starts``, ``indices``: first pages of sequences, blocks of pages, as FlashInfer has them.
    """
    first = torch.zeros(len(lens) + 1, dtype=torch.int32)
    torch.cumsum(lens, 0, dtype=torch.int32, out=first[1:])
    sequence = torch.repeat_interleave(torch.arange(len(lens)), starts.diff())
    before = (torch.arange(len(indices), dtype=torch.int32) - starts[sequence]) * block_size
    count = (lens[sequence] - before).clamp_max(block_size)
    return first, torch.stack((indices, first[sequence] + before, count.to(torch.int32)), 1)


def unpack(k_cache: Tensor, v_cache: Tensor, pages: Tensor, k: Tensor, v: Tensor, scales: tuple[float, float]) -> None:
    """``k``, ``v [T, Hkv, D]`` contiguous; ``k_cache``, ``v_cache [blocks, Hkv, block_size, D]``, of any strides but
    the last; ``pages`` of :func:`pages_of`, on the device.
    """
    _, heads, block_size, dim = k_cache.shape
    _unpack[(len(pages), heads)](
        k_cache, v_cache, pages, k, v, *scales, *k_cache.stride()[:3], k.stride(0),
        PAGE=block_size, DIM=dim, ACROSS=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip


@triton.jit
def _unpack(
    k_cache: tl.tensor, v_cache: tl.tensor, pages: tl.tensor, k: tl.tensor, v: tl.tensor, k_scale: tl.tensor,
    v_scale: tl.tensor, block_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor, row: tl.tensor,
    PAGE: tl.constexpr, DIM: tl.constexpr, ACROSS: tl.constexpr,
) -> None:  # fmt: skip
    page, head = tl.program_id(0), tl.program_id(1)
    block = tl.load(pages + 3 * page).to(tl.int64)
    first = tl.load(pages + 3 * page + 1).to(tl.int64)
    count = tl.load(pages + 3 * page + 2)
    token, i = tl.arange(0, PAGE)[:, None], tl.arange(0, ACROSS)[None, :]
    mask = (token < count) & (i < DIM)
    at = block * block_stride + head * head_stride + token * token_stride + i
    to = (first + token) * row + head * DIM + i
    element = k.dtype.element_ty
    tl.store(k + to, (tl.load(k_cache + at, mask, other=0.0).to(tl.float32) * k_scale).to(element), mask)
    tl.store(v + to, (tl.load(v_cache + at, mask, other=0.0).to(tl.float32) * v_scale).to(element), mask)
