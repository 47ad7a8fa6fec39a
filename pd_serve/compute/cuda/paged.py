"""A step's attention over the paged KV, as decoders call it: heads are transformed, stored and attended to.

Owned by the runner, which prepares each step. Decodes come first, then chunks of prompts: each with kernels of its own
(:mod:`pd_serve.compute.cuda.attention`), for each group of layers with a window and tables of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pd_serve.compute.cuda import kernels
from pd_serve.compute.cuda.attention import AttentionShape, Decode, Prefill, Workspaces, make_decode, make_prefill
from pd_serve.compute.cuda.inputs import Staging
from pd_serve.compute.step import Step
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.interface import HeadTransform


@dataclass(frozen=True)
class _Group:
    decode: Decode
    prefill: Prefill
    slots: Tensor  # [max tokens] int64, on the device


def shapes(config: ModelConfig, layout: KVLayout, dtype: torch.dtype) -> list[AttentionShape]:
    """What each group of layers computes."""
    found = []
    for number, group in enumerate(layout.groups):
        _, _, kv_heads, block_size, dim = layout.block_shape(number)
        found.append(
            AttentionShape(
                config.num_heads, kv_heads, dim, block_size, config.attention_scale, group.window, dtype=dtype
            )
        )
    return found


class PagedAttention:
    """:class:`pd_serve.models.interface.Attention` over the pool's regions, a uint8 tensor a group."""

    def __init__(
        self,
        layout: KVLayout,
        regions: Sequence[Tensor],
        group_shapes: Sequence[AttentionShape],
        slots: Sequence[Tensor],
        max_seqs: int,
        max_blocks: int,
    ) -> None:
        """``slots``: a group: where each row of a step is stored, on the device."""
        device = regions[0].device
        workspaces = Workspaces(device)
        self._groups = [
            _Group(make_decode(s, max_seqs, max_blocks, device, workspaces), make_prefill(s, device, workspaces), at)
            for s, at in zip(group_shapes, slots, strict=True)
        ]
        self._places: dict[int, tuple[_Group, Tensor, Tensor]] = {}
        for number, group in enumerate(layout.groups):
            pool = regions[number].view(group_shapes[number].dtype).view(-1, *layout.block_shape(number))
            for i, layer in enumerate(group.layers):
                self._places[layer] = self._groups[number], pool[:, i, 0], pool[:, i, 1]
        self._num_decode = 0

    def prepare(self, step: Step, staged: Staging) -> None:
        """For a step without a graph."""
        decodes, seqs = step.num_decode, step.num_seqs
        self._num_decode = decodes
        starts = torch.from_numpy(step.query_start[decodes:] - step.query_start[decodes])
        for group, tables in zip(self._groups, staged.tables, strict=True):
            if decodes:
                group.decode.prepare(tables[:decodes], staged.lens[:decodes])
            if decodes < seqs:
                group.prefill.prepare(starts, staged.lens[decodes:seqs], tables[decodes:seqs])

    def begin_capture(self, sizes: Sequence[int]) -> None:
        """Before graphs of these numbers of decodes are captured."""
        for group in self._groups:
            group.decode.begin_capture(sizes)

    def capture(self, size: int) -> None:
        """Before the graph of ``size`` decodes is warmed up and captured."""
        self._num_decode = size
        for group in self._groups:
            group.decode.capture(size)

    def replay(self, size: int, staged: Staging) -> None:
        """Before the graph of ``size`` rows is replayed: all of them are staged."""
        for group, tables in zip(self._groups, staged.tables, strict=True):
            group.decode.replay(size, tables[:size], staged.lens[:size])

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform
    ) -> Tensor:
        """See :class:`pd_serve.models.interface.Attention`."""
        group, k_cache, v_cache = self._places[layer]
        rows, decodes = len(q), self._num_decode
        turned, out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
        kernels.rotate_and_store(
            q, k, v, positions, transform.cos_sin, group.slots[:rows], k_cache, v_cache,
            q_norm=transform.q_norm, k_norm=transform.k_norm, eps=transform.eps, q_out=turned,
        )  # fmt: skip
        if decodes:
            group.decode.run(turned[:decodes], k_cache, v_cache, out[:decodes])
        if decodes < rows:
            group.prefill.run(turned[decodes:], k[decodes:], v[decodes:], k_cache, v_cache, out[decodes:])
        return out.view(rows, -1)
