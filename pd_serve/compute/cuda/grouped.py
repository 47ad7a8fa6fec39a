"""Matrices of several experts times those rows that each of them has: a grouped GEMM, its rows gathered as it goes.

Called by :mod:`pd_serve.compute.cuda.experts`, which decides by timing which tile is used. The grid is as large as the
number of rows could make it; programs find their expert by the counts on the device, and those beyond end at once. So
sorted rows are never copied or padded, each of the two multiplications may have tiles of its own, and graphs can hold
them. Matrices in FP8, half the bytes to read, become what the rows are on their way to the tensor cores. With few rows
it is the reading of weights that takes time: blocks of one expert that read the same lie side by side in the grid, so
that the second finds it in the L2 cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda.activations import SILU, Activation, gated
from pd_serve.compute.cuda.routing import Routed
from pd_serve.models.interface import Fp8Weight
from pd_serve.models.quantization import BLOCK


@dataclass(frozen=True)
class GroupTile:
    """``rows`` of one expert by ``outputs``, ``inputs`` at a time in ``stages`` of a pipeline."""

    rows: int
    outputs: int
    inputs: int
    stages: int
    warps: int


TILES = (
    GroupTile(16, 16, 256, 4, 4),
    GroupTile(16, 32, 128, 4, 4),
    GroupTile(16, 32, 256, 3, 4),
    GroupTile(16, 64, 64, 5, 4),
    GroupTile(16, 64, 128, 3, 4),
    GroupTile(16, 128, 64, 4, 4),
    GroupTile(16, 128, 128, 2, 4),
    GroupTile(32, 64, 128, 3, 4),
    GroupTile(32, 128, 64, 4, 4),
    GroupTile(32, 128, 128, 2, 4),
    GroupTile(64, 64, 64, 4, 4),
    GroupTile(64, 128, 64, 3, 4),
    GroupTile(128, 64, 64, 4, 4),
    GroupTile(128, 128, 64, 4, 8),
    GroupTile(128, 256, 64, 4, 8),
)
EXACT = GroupTile(16, 32, 32, 2, 4)  # for float32, where nothing is fast


def candidates(rows_each: float, *weights: Tensor | Fp8Weight) -> list[GroupTile]:
    """Tiles that may be the fastest where an expert has so many rows on average; the first always works."""
    wanted = 1 << max(4, min(7, round(rows_each).bit_length()))  # with room for those above the average
    most = max(tile.inputs for tile in TILES)
    if any(not isinstance(weight, Tensor) and weight.blocks for weight in weights):
        most = BLOCK  # inputs of a step have one scale
    return [tile for tile in TILES if wanted // 2 <= tile.rows <= wanted * 2 and tile.inputs <= most]


def gate_up(
    x: Tensor,
    weight: Tensor | Fp8Weight,
    routed: Routed,
    per_token: int,
    activation: Activation,
    out: Tensor,
    tile: GroupTile,
    *,
    compile_only: bool = False,
) -> None:
    """``out [slots, I] = act(gate) * up`` of each slot's row of ``x [T, hidden]``; ``weight [experts, 2 I, hidden]``.

    ``weight`` and ``out`` contiguous, rows of ``x`` may be apart. Sums in float32.
    """
    _launch(x, weight, routed, per_token, activation, out, tile, True, compile_only)


def down(
    x: Tensor, weight: Tensor | Fp8Weight, routed: Routed, per_token: int, out: Tensor, tile: GroupTile, *,
    compile_only: bool = False,
) -> None:  # fmt: skip
    """``out [slots, hidden] = share * (x @ weight.T)`` of ``x [slots, I]``, ``weight [experts, hidden, I]``."""
    _launch(x, weight, routed, per_token, SILU, out, tile, False, compile_only)


def _launch(
    x: Tensor,
    weight: Tensor | Fp8Weight,
    routed: Routed,
    per_token: int,
    activation: Activation,
    out: Tensor,
    tile: GroupTile,
    gated: bool,
    compile_only: bool,
) -> None:
    values, scale, scales = weight, weight, 0
    if isinstance(weight, Fp8Weight):
        values, scale, scales = weight.values, weight.scale, 2 if weight.blocks else 1
    assert isinstance(values, Tensor)
    (slots, n), (experts, outputs, k) = out.shape, values.shape
    blocks = min(slots, experts) + slots // tile.rows
    _grouped.run(
        x, values, scale, routed.counts, routed.slots, routed.shares, out, n, k, routed.slots.shape[1], x.stride(0),
        triton.cdiv(k, BLOCK), triton.cdiv(outputs, BLOCK), *activation,
        SCALES=scales, EXPERTS=experts, ALL=triton.next_power_of_2(experts), PER_TOKEN=per_token, GATED=gated,
        EVEN=k % tile.inputs == 0, EXACT=x.dtype is torch.float32, ROWS=tile.rows, OUTPUTS=tile.outputs,
        INPUTS=tile.inputs, num_stages=tile.stages, num_warps=tile.warps,
        grid=(blocks, triton.cdiv(n, tile.outputs)), warmup=compile_only,
    )  # fmt: skip


@triton.jit(do_not_specialize=["pitch"])  # one kernel for all numbers of rows, so that no step waits for a compiler
def _grouped(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, counts: tl.tensor, slots: tl.tensor, shares: tl.tensor,
    out: tl.tensor, n: tl.tensor, k: tl.tensor, pitch: tl.tensor, x_row: tl.tensor, scale_row: tl.tensor,
    scale_rows: tl.tensor, linear: tl.tensor, cubic: tl.tensor,
    SCALES: tl.constexpr, EXPERTS: tl.constexpr, ALL: tl.constexpr, PER_TOKEN: tl.constexpr, GATED: tl.constexpr,
    EVEN: tl.constexpr, EXACT: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
) -> None:  # fmt: skip
    block, tile = tl.program_id(0), tl.program_id(1)
    i = tl.arange(0, ALL)
    number = tl.load(counts + i, i < EXPERTS, other=0)
    blocks = (number + (ROWS - 1)) // ROWS
    ends = tl.cumsum(blocks, 0)
    expert = tl.sum((ends <= block).to(tl.int32))
    if expert < EXPERTS:
        own = i == expert
        count = tl.sum(tl.where(own, number, 0))
        rank = (block - tl.sum(tl.where(own, ends - blocks, 0))) * ROWS + tl.arange(0, ROWS)
        # past the last row the last one is read again: no mask in the loop
        slot = tl.load(slots + expert * pitch + tl.minimum(rank, count - 1)).to(tl.int64)
        column = tile * OUTPUTS + tl.arange(0, OUTPUTS)
        inputs = tl.arange(0, INPUTS)
        a = x + (slot // PER_TOKEN if GATED else slot)[:, None] * x_row + inputs[None, :]
        matrix = expert.to(tl.int64) * n * k
        w = weight + tl.minimum(column, n - 1)[None, :].to(tl.int64) * k + inputs[:, None]
        w += 2 * matrix if GATED else matrix
        # of each column: of its row of the matrix, or of its row of blocks
        some = tl.minimum(column, n - 1)
        if SCALES == 2:
            s = scale + (expert * scale_rows + some // 128) * scale_row
        else:
            s = scale + expert * (2 * n if GATED else n) + some
        total = tl.zeros([ROWS, OUTPUTS], tl.float32)
        up = tl.zeros([ROWS, OUTPUTS], tl.float32)
        for at in range(0, k, INPUTS):
            rows = _part(a + at, (inputs < k - at)[None, :], EVEN)
            ours = _part(w + at, (inputs < k - at)[:, None], EVEN)
            total = _product(rows, ours, total, s + at // 128, SCALES, EXACT)
            if GATED:
                ours = _part(w + n.to(tl.int64) * k + at, (inputs < k - at)[:, None], EVEN)
                up = _product(rows, ours, up, s + n // 128 * scale_row + at // 128, SCALES, EXACT)
        if SCALES == 1:
            total *= tl.load(s)[None, :]
            if GATED:
                up *= tl.load(s + n)[None, :]
        if GATED:
            total = gated(total, up, linear, cubic)
        else:
            total *= tl.load(shares + slot)[:, None]
        mask = (rank < count)[:, None] & (column < n)[None, :]
        tl.store(out + slot[:, None] * n + column[None, :], total.to(out.dtype.element_ty), mask)


@triton.jit
def _part(at: tl.tensor, mask: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    if EVEN:
        return tl.load(at)
    else:
        return tl.load(at, mask, other=0.0)


@triton.jit
def _product(
    a: tl.tensor, b: tl.tensor, total: tl.tensor, scale: tl.tensor, SCALES: tl.constexpr, EXACT: tl.constexpr
) -> tl.tensor:
    if SCALES == 2:
        return total + tl.dot(a, b.to(a.dtype)) * tl.load(scale)[None, :]
    elif EXACT:
        return tl.dot(a, b, total, input_precision="ieee")
    else:
        return tl.dot(a, b.to(a.dtype), total)
