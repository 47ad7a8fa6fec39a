"""A block-major pool with random K and V of a few sequences, and their attention by torch in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from pd_serve.compute.cuda.attention import UNSCALED, AttentionShape, Scales
from tests.compute.cuda.device import DEVICE

LAYERS, LAYER = 3, 1


def shape(
    heads: int,
    kv_heads: int,
    dim: int,
    block: int,
    window: int | None = None,
    cap: float | None = None,
    *,
    fp8: bool = False,
) -> AttentionShape:
    """``fp8``: K and V."""
    return AttentionShape(heads, kv_heads, dim, block, dim**-0.5, window, cap, fp8_kv=fp8)


class Pool:
    """Random K and V for sequences of these lengths, in scattered blocks; block 0 is nobody's."""

    def __init__(self, s: AttentionShape, lens: list[int]) -> None:
        self.shape, self.lens = s, lens
        most = max(-(-n // s.block_size) for n in lens)
        blocks = len(lens) * most + 1
        self.scales = Scales(0.25, 0.5) if s.fp8_kv else UNSCALED
        data = torch.randn(blocks, LAYERS, 2, s.num_kv_heads, s.block_size, s.head_dim, device=DEVICE)
        self.data = (data / torch.tensor(self.scales, device=DEVICE)[:, None, None, None]).to(s.kv_dtype)
        self.tables = (torch.randperm(blocks - 1)[: len(lens) * most] + 1).int().view(len(lens), most)
        self.k, self.v = self.data[:, LAYER, 0], self.data[:, LAYER, 1]
        self.seen = self.tables.clone()  # as an engine has them: no block where nothing is seen any more
        for row, n in enumerate(lens):
            self.seen[row, -(-n // s.block_size) :] = 0
            if s.window is not None:
                self.seen[row, : max(0, n - s.window) // s.block_size] = 0

    def of(self, row: int) -> tuple[Tensor, Tensor]:
        """K and V of a sequence, ``[tokens, Hkv, D]`` float32."""
        table = self.tables[row].long().to(DEVICE)
        k, v = (
            (pool[table].float() * scale).transpose(1, 2).flatten(0, 1)[: self.lens[row]]
            for pool, scale in zip((self.k, self.v), self.scales, strict=True)
        )
        return k, v

    def expected(self, row: int, q: Tensor) -> Tensor:
        """Of the last tokens of a sequence: ``q [n, Hq, D]``."""
        s, (k, v) = self.shape, self.of(row)
        group = s.num_heads // s.num_kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q.float(), k) * s.scale
        if s.soft_cap is not None:
            scores = s.soft_cap * torch.tanh(scores / s.soft_cap)
        at = torch.arange(self.lens[row] - len(q), self.lens[row], device=DEVICE)[:, None]
        key = torch.arange(self.lens[row], device=DEVICE)[None, :]
        hidden = key > at
        if s.window is not None:
            hidden |= key <= at - s.window
        return torch.einsum("hqk,khd->qhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v)


def queries(s: AttentionShape, rows: int) -> Tensor:
    return (torch.randn(rows, s.num_heads, s.head_dim, device=DEVICE) * 2).to(s.dtype)
