"""The bytes of a source, and whether a reader holds the right ones.

What ought to be where is worked out from the *shape* of a block (``KVLayout.block_shape``) by torch, not by the
arithmetic that the transports use: a mistake in that arithmetic must not hide itself.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.kv.layout import DTYPE_BYTES, KVLayout
from pd_serve.transfer.movers.base import I64

_CHUNK_WORDS = 1 << 22


def fill(memory: Tensor, seed: int) -> None:
    """Writes words that look random, the same for the same seed (uint8, a multiple of 4 bytes)."""
    words = memory.view(torch.int32)
    for begin in range(0, len(words), _CHUNK_WORDS):
        chunk = words[begin : begin + _CHUNK_WORDS]
        x = torch.arange(begin + 1, begin + 1 + len(chunk), dtype=torch.int64, device=memory.device)
        x = (x * 0x9E3779B1 + seed * 0x85EBCA6B) & 0xFFFFFFFF
        x ^= x >> 15
        x = (x * 0x2C1B3C6D) & 0xFFFFFFFF
        x ^= x >> 13
        chunk.copy_(x)


def pieces(memory: Tensor, layout: KVLayout, group: int, tokens: int) -> Tensor:
    """A group's memory as ``[block, part, layer, K|V, head, token, word]``: its pieces of ``tokens`` tokens."""
    layers, planes, heads, block_tokens, dim = layout.block_shape(group)
    words = dim * DTYPE_BYTES[layout.dtype] // 4
    shape = (-1, layers, planes, heads, block_tokens // tokens, tokens, words)
    return memory.view(torch.int32).view(shape).permute(0, 4, 1, 2, 3, 5, 6)


def equal(reader: Tensor, local: I64, source: Tensor, remote: I64, heads: tuple[slice, slice]) -> bool:
    """Whether pieces ``local`` of the reader are pieces ``remote`` of the source, in the heads that both have.

    Both as :func:`pieces` gives them; ``heads``: of the reader, and of the source.
    """
    theirs, ours = (torch.from_numpy(numbers).to(reader.device) for numbers in (remote, local))
    step = max(1, (_CHUNK_WORDS * 8) // max(1, reader[0, 0].numel()))
    for begin in range(0, len(ours), step):
        got = _pick(reader, ours[begin : begin + step])[:, :, :, heads[0]]
        want = _pick(source, theirs[begin : begin + step])[:, :, :, heads[1]]
        if not torch.equal(got, want):
            return False
    return True


def _pick(of: Tensor, numbers: Tensor) -> Tensor:
    parts = of.shape[1]
    return of[torch.div(numbers, parts, rounding_mode="floor"), numbers % parts]


def shared_heads(source: KVLayout, reader: KVLayout, group: int) -> tuple[slice, slice]:
    """The heads that both ranks hold: where they are at the reader, and at the source."""
    s, r = source.groups[group].planes[0], reader.groups[group].planes[0]
    first, end = max(s.first_head, r.first_head), min(s.end_head, r.end_head)
    return slice(first - r.first_head, end - r.first_head), slice(first - s.first_head, end - s.first_head)


def equal_blocks(reader: Tensor, local: I64, source: Tensor, remote: I64, block_bytes: int) -> bool:
    """The same for whole blocks, as in the probe region."""
    theirs, ours = (torch.from_numpy(numbers).to(reader.device) for numbers in (remote, local))
    return torch.equal(reader.view(-1, block_bytes)[ours], source.view(-1, block_bytes)[theirs])
