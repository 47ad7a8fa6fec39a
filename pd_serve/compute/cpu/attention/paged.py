"""Attention over the paged KV pool on CPU: what a decoder calls as ``attention``.

Owned by the model runner, which calls :meth:`PagedAttention.start` before each step. Writes the new tokens' K and V
to their slots, then attends: decodes in one kernel that reads blocks where they lie, prefill chunks by matrix
products over a contiguous copy of what they see (scores are rounded to the model's dtype on the way, as in
transformers' eager attention). The pool may be in FP8: queries of decodes are float32 then. Must never read a block
that is 0 in a table.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from pd_serve.compute.cpu.attention.kernels import causal_weights, decode_kernel, gather_kv, store_kv, write_heads
from pd_serve.compute.cpu.attention.tiles import TOKENS
from pd_serve.compute.cpu.ops import transform_heads
from pd_serve.compute.step import Step
from pd_serve.errors import ModelError
from pd_serve.jit import element_of
from pd_serve.kv.layout import KVLayout
from pd_serve.models.fp8 import FP8
from pd_serve.models.interface import HeadTransform
from pd_serve.models.weights import KV_DTYPES

_INT32, _INT64 = np.int32(0), np.int64(0)
QUERY_TILE = 128  # queries whose scores are held at once: small enough to skip most of what is masked


class PagedAttention:
    """``regions``: the pool's bytes, one uint8 tensor a layer group. ``scale`` multiplies the scores."""

    def __init__(
        self,
        layout: KVLayout,
        regions: list[Tensor],
        num_heads: int,
        scale: float,
        dtype: torch.dtype,
        *,
        parallel: bool = False,
    ) -> None:
        """``dtype``: of activations, and of the pool unless that is in FP8."""
        kept = KV_DTYPES[layout.dtype]
        self._layout = layout
        self._scale = scale
        self._dtype = dtype
        self._element, self._kept = element_of(dtype), element_of(kept)
        self._decode_dtype = torch.float32 if kept is FP8 else dtype
        self._decode_element = element_of(self._decode_dtype)
        self._place: dict[int, tuple[int, Tensor]] = {}  # layer: its group, its part of the pool
        self._decodes = []
        for number, (group, region) in enumerate(zip(layout.groups, regions, strict=True)):
            if layout.block_size % TOKENS:
                raise ModelError(
                    f"Attention on CPU needs a block size that is a multiple of {TOKENS}, not {layout.block_size}."
                )
            shape = layout.block_shape(number)
            kv_heads, dim = shape[2], shape[4]
            pool = region.view(kept).view(-1, *shape)
            for i, layer in enumerate(group.layers):
                self._place[layer] = number, pool[:, i]
            self._decodes.append(
                decode_kernel(
                    dim,
                    num_heads // kv_heads,
                    layout.block_size,
                    self._decode_dtype.itemsize,
                    kept.itemsize,
                    parallel=parallel,
                )
            )

    def start(self, step: Step) -> None:
        """Holds the step whose layers follow."""
        self._step = step
        self._spans = [
            (int(begin), int(end), int(length))
            for begin, end, length in zip(
                step.query_start[step.num_decode : -1],
                step.query_start[step.num_decode + 1 :],
                step.seq_lens[step.num_decode :],
                strict=True,
            )
        ]
        self._seq_lens = step.seq_lens.ctypes.data
        self._slots = [slots.ctypes.data for slots in step.slots]
        self._tables = [(table.ctypes.data, table.shape[1]) for table in step.block_tables]

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, transform: HeadTransform
    ) -> Tensor:
        """See :class:`pd_serve.models.interface.Attention`."""
        q, k = transform_heads(q, k, positions, transform)
        number, pool = self._place[layer]
        k_scale, v_scale = (transform.k_scale, transform.v_scale) if pool.dtype is FP8 else (1.0, 1.0)
        window, kv_heads = self._layout.groups[number].window, pool.shape[2]
        rows, heads, dim = q.shape
        block_stride, value_offset = pool.stride(0), pool.stride(1)
        store_kv(
            self._element, self._kept, _INT64, pool.data_ptr(), block_stride, value_offset, self._layout.block_size,
            k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), self._slots[number], rows, kv_heads, dim,
            1.0 / k_scale, 1.0 / v_scale,
        )  # fmt: skip
        out = torch.empty((rows, heads * dim), dtype=self._dtype)
        scale, decodes = self._scale * k_scale, self._step.num_decode
        if decodes:
            table, table_stride = self._tables[number]
            queries = q[:decodes].to(self._decode_dtype)
            mixed = out if self._decode_dtype is self._dtype else torch.empty((decodes, heads * dim))
            self._decodes[number](
                self._decode_element, self._kept, _INT32, pool.data_ptr(), block_stride, value_offset,
                queries.data_ptr(), queries.stride(0), table, table_stride, self._seq_lens, decodes, kv_heads,
                window or 0, scale, mixed.data_ptr(),
            )  # fmt: skip
            if mixed is not out:
                out[:decodes] = mixed
        for i, (begin, end, length) in enumerate(self._spans, start=decodes):
            self._prefill(number, pool, i, q[begin:end], length, scale, out[begin:end])
        if v_scale != 1.0:
            out *= v_scale
        return out

    def _prefill(self, number: int, pool: Tensor, seq: int, q: Tensor, length: int, scale: float, out: Tensor) -> None:
        """A chunk's queries, the last of ``length`` tokens, over all that they see."""
        group, block_size = self._layout.groups[number], self._layout.block_size
        rows, heads, dim = q.shape
        kv_heads, window = pool.shape[2], group.window or length
        share = heads // kv_heads
        start = length - rows  # position of the first query
        first_block = max(0, start - window + 1) // block_size
        first = first_block * block_size
        table, table_stride = self._tables[number]
        keys, values = torch.empty((2, kv_heads, length - first, dim), dtype=self._dtype)
        gather_kv(
            self._element, self._kept, _INT32, pool.data_ptr(), pool.stride(0), pool.stride(1), block_size,
            table + 4 * (seq * table_stride + first_block), length - first, keys.data_ptr(), values.data_ptr(),
            kv_heads, dim,
        )  # fmt: skip
        for begin in range(0, rows, QUERY_TILE):
            count = min(QUERY_TILE, rows - begin)
            # what these queries see lies between; of it, the kernel masks what a single one does not
            low = max(0, start + begin - window + 1 - first)
            high = start + begin + count - first
            tile = q[begin : begin + count].view(count, kv_heads, share, dim).permute(1, 2, 0, 3)
            tile = tile.reshape(kv_heads, share * count, dim)
            scores = torch.bmm(tile, keys[:, low:high].transpose(1, 2))
            shares = torch.empty(heads * count)
            causal_weights(
                self._element, scores.data_ptr(), shares.data_ptr(), heads * count, count, high - low,
                start + begin - first - low, group.window or 0, scale,
            )  # fmt: skip
            mixed = torch.bmm(scores, values[:, low:high])
            write_heads(self._element, mixed.data_ptr(), shares.data_ptr(), out[begin].data_ptr(), heads, count, dim)
