"""``y = x @ weight.T`` for one to four rows: each program reads some rows of the weight, as fast as it can.

Called by :mod:`pd_serve.compute.cuda.linears`, which decides by timing where it is used. On an H100 it reads weights at
0.83 to 0.97 of the rate of a plain read where cuBLAS reaches 0.66 to 0.89 (docs/benchmarks.md). Weights may be in FP8,
half the bytes; inputs stay what they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda import matrix
from pd_serve.compute.cuda.matrix import Matrix, block_scale

MAX_ROWS = 4


@dataclass(frozen=True)
class GemvTile:
    """``outputs x inputs`` of the weight are one load; ``loads`` of them are in flight at once in each program."""

    outputs: int
    inputs: int
    loads: int
    warps: int


TILES = (  # each is the fastest for some shape; without more of them nothing measured loses 1%
    GemvTile(1, 1024, 4, 4),
    GemvTile(2, 1024, 2, 4),
    GemvTile(4, 512, 2, 4),
    GemvTile(8, 256, 4, 4),
    GemvTile(8, 512, 2, 8),
)
FP8_TILES = (  # of outputs that have one row of scales where blocks have theirs
    GemvTile(1, 2048, 2, 4),
    GemvTile(2, 1024, 2, 4),
    GemvTile(4, 512, 4, 4),
    GemvTile(8, 512, 2, 4),
)


def tiles(scales: int) -> tuple[GemvTile, ...]:
    """For weights with such scales."""
    return TILES if scales == matrix.PLAIN else FP8_TILES


def gemv(
    x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor, tile: GemvTile, *, compile_only: bool = False
) -> None:
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias [N]``, 1 <= M <= 4, summed in float32.

    Rows of ``x`` and ``out`` may be apart.
    """
    (rows, k), n, values = x.shape, weight.values.shape[0], weight.values
    _gemv.run(
        x, values, values if weight.scale is None else weight.scale, values if bias is None else bias, out, n, k,
        x.stride(0), out.stride(0), weight.scale_row,
        ROWS=rows, SCALES=weight.scales, BIAS=bias is not None, EVEN=k % (tile.inputs * tile.loads) == 0,
        OUTPUTS=tile.outputs, INPUTS=tile.inputs, LOADS=tile.loads, num_warps=tile.warps,
        grid=(triton.cdiv(n, tile.outputs),), warmup=compile_only,
    )  # fmt: skip


@triton.jit
def _gemv(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, out: tl.tensor, n: tl.tensor, k: tl.tensor,
    x_stride: tl.tensor, out_stride: tl.tensor, scale_row: tl.tensor,
    ROWS: tl.constexpr, SCALES: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, OUTPUTS: tl.constexpr,
    INPUTS: tl.constexpr, LOADS: tl.constexpr,
) -> None:  # fmt: skip
    rows = tl.program_id(0) * OUTPUTS + tl.arange(0, OUTPUTS)
    columns = tl.arange(0, INPUTS)
    # past the last row the last one is read again: no mask in the loop
    w = weight + tl.minimum(rows, n - 1)[:, None].to(tl.int64) * k + columns[None, :]
    sum0 = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    sum1 = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    sum2 = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    sum3 = tl.zeros([OUTPUTS, INPUTS], tl.float32)
    for first in range(0, k, INPUTS * LOADS):
        for load in tl.static_range(LOADS):
            at = first + load * INPUTS
            if EVEN:
                values = tl.load(w + at, eviction_policy="evict_first").to(tl.float32)
            else:
                values = tl.load(w + at, (at + columns < k)[None, :], other=0.0, eviction_policy="evict_first").to(
                    tl.float32
                )
            if SCALES == 2:  # of a column for all outputs here: it goes to the inputs, which are fewer
                each = block_scale(scale, scale_row, tl.program_id(0) * OUTPUTS, tl.minimum(at + columns, k - 1))
            else:
                each = 1.0
            sum0 += values * (_part(x + at, columns, k - at, EVEN) * each)[None, :]
            if ROWS > 1:
                sum1 += values * (_part(x + x_stride + at, columns, k - at, EVEN) * each)[None, :]
            if ROWS > 2:
                sum2 += values * (_part(x + 2 * x_stride + at, columns, k - at, EVEN) * each)[None, :]
            if ROWS > 3:
                sum3 += values * (_part(x + 3 * x_stride + at, columns, k - at, EVEN) * each)[None, :]
    if SCALES == 1:
        factor = tl.load(scale + rows, rows < n, other=0.0)
    else:
        factor = tl.full([OUTPUTS], 1.0, tl.float32)
    if BIAS:
        added = tl.load(bias + rows, rows < n, other=0.0).to(tl.float32)
    else:
        added = tl.zeros([OUTPUTS], tl.float32)
    element = out.dtype.element_ty
    tl.store(out + rows, (tl.sum(sum0, 1) * factor + added).to(element), rows < n)
    if ROWS > 1:
        tl.store(out + out_stride + rows, (tl.sum(sum1, 1) * factor + added).to(element), rows < n)
    if ROWS > 2:
        tl.store(out + 2 * out_stride + rows, (tl.sum(sum2, 1) * factor + added).to(element), rows < n)
    if ROWS > 3:
        tl.store(out + 3 * out_stride + rows, (tl.sum(sum3, 1) * factor + added).to(element), rows < n)


@triton.jit
def _part(x: tl.tensor, columns: tl.tensor, left: tl.tensor, EVEN: tl.constexpr) -> tl.tensor:
    if EVEN:
        return tl.load(x + columns).to(tl.float32)
    else:
        return tl.load(x + columns, columns < left, other=0.0).to(tl.float32)
