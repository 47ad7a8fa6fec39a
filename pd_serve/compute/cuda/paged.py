"""A step's attention over the paged KV, as decoders call it: heads are transformed, stored and attended to.

Owned by the runner, which prepares each step. Decodes come first, then chunks of prompts: each with kernels of its own
(:mod:`pd_serve.compute.cuda.attention`), for each group of layers with a window and tables of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from pd_serve.compute.cuda import kernels
from pd_serve.compute.cuda.attention import (
    UNSCALED,
    AttentionShape,
    Decode,
    KeysValues,
    Prefill,
    Scales,
    Workspaces,
    make_decode,
    make_prefill,
)
from pd_serve.compute.cuda.inputs import Staging
from pd_serve.compute.cuda.pieces import Pieces
from pd_serve.compute.step import Step
from pd_serve.kv.layout import KVLayout
from pd_serve.models.config import ModelConfig
from pd_serve.models.fp8 import FP8
from pd_serve.models.interface import HeadTransform
from pd_serve.models.weights import KV_DTYPES


@dataclass(frozen=True)
class _Group:
    shape: AttentionShape
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
                config.num_heads,
                kv_heads,
                dim,
                block_size,
                config.attention_scale,
                group.window,
                dtype=dtype,
                fp8_kv=KV_DTYPES[layout.dtype] is FP8,
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
            _Group(s, make_decode(s, max_seqs, max_blocks, device, workspaces), make_prefill(s, device, workspaces), at)
            for s, at in zip(group_shapes, slots, strict=True)
        ]
        self._places: dict[int, tuple[_Group, Tensor, Tensor]] = {}  # of a layer: its group, K and V in the pool
        for number, group in enumerate(layout.groups):
            pool = regions[number].view(group_shapes[number].kv_dtype).view(-1, *layout.block_shape(number))
            for i, layer in enumerate(group.layers):
                self._places[layer] = self._groups[number], pool[:, i, 0], pool[:, i, 1]
        self._scales: dict[int, Scales] = {}  # of layers that were called, in FP8
        self._num_decode = 0
        self._pieces: Pieces | None = None  # that are being recorded
        # between pieces: q, and the result, [rows, Hq, D] of as many rows as any has
        self._q = self._out = torch.empty(0, dtype=group_shapes[0].dtype, device=device)

    def prepare(self, step: Step, staged: Staging, *, pieces: bool = False) -> None:
        """For a step without a graph; ``pieces``: with graphs between its attention, which :meth:`attend` computes."""
        decodes, seqs = step.num_decode, step.num_seqs
        self._num_decode = decodes
        starts = torch.from_numpy(step.query_start[decodes:] - step.query_start[decodes])
        for group, tables in zip(self._groups, staged.tables, strict=True):
            if decodes:
                own = tables[:decodes, : staged.num_blocks]
                group.decode.prepare(own, staged.lens[:decodes], staged.delivery.add)
            if decodes < seqs:
                lens = staged.lens[decodes:seqs]
                group.prefill.prepare(starts, lens, tables[decodes:seqs], pool_only=pieces)

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
            group.decode.replay(size, tables[:size, : staged.num_blocks], staged.lens[:size], staged.delivery.add)

    @contextmanager
    def recording(self, pieces: Pieces, tokens: int) -> Iterator[None]:
        """Calls within store K and V and cut ``pieces``, of so many tokens. Larger ones must come first."""
        width = max(group.shape.num_heads * group.shape.head_dim for group in self._groups)
        if len(self._q) < tokens:
            self._q, self._out = (self._q.new_zeros((tokens, width)) for _ in range(2))
        self._pieces = pieces
        try:
            yield
        finally:
            self._pieces = None

    def attend(self, layer: int, rows: int) -> None:
        """Between pieces, of a step that was prepared for it: of its first ``rows`` rows; others belong to nobody."""
        shape = self._places[layer][0].shape
        q, out = (self._between(buffer, rows, shape) for buffer in (self._q, self._out))
        self._attend(layer, q, None, out)

    def _between(self, buffer: Tensor, rows: int, shape: AttentionShape) -> Tensor:
        return buffer.view(-1)[: rows * shape.num_heads * shape.head_dim].view(rows, shape.num_heads, shape.head_dim)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform
    ) -> Tensor:
        """See :class:`pd_serve.models.interface.Attention`."""
        group, k_cache, v_cache = self._places[layer]
        rows = len(q)
        scales = self._scales[layer] = Scales(transform.k_scale, transform.v_scale) if group.shape.fp8_kv else UNSCALED
        if self._pieces is None:
            turned, out = (torch.empty(q.shape, dtype=q.dtype, device=q.device) for _ in range(2))
        else:
            turned, out = (self._between(buffer, rows, group.shape) for buffer in (self._q, self._out))
        kernels.rotate_and_store(
            q, k, v, positions, transform.cos_sin, group.slots[:rows], k_cache, v_cache,
            q_norm=transform.q_norm, k_norm=transform.k_norm, eps=transform.eps, q_out=turned,
            k_scale=scales.k, v_scale=scales.v,
        )  # fmt: skip
        if self._pieces is None:
            self._attend(layer, turned, (k, v), out)
        else:
            self._pieces.cut(partial(self.attend, layer))
        return out.view(rows, -1)

    def _attend(self, layer: int, q: Tensor, own: KeysValues | None, out: Tensor) -> None:
        group, k_cache, v_cache = self._places[layer]
        decodes, scales = self._num_decode, self._scales[layer]
        if decodes:
            group.decode.run(q[:decodes], k_cache, v_cache, out[:decodes], scales)
        if decodes < len(q):
            own = own and (own[0][decodes:], own[1][decodes:])
            group.prefill.run(q[decodes:], own, k_cache, v_cache, out[decodes:], scales)
