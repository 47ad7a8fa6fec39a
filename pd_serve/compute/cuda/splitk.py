"""``y = x @ weight.T`` for up to 64 rows by tensor cores, the inputs of a tile shared among several programs.

Called by :mod:`pd_serve.compute.cuda.linears`, which decides by timing where it is used. The weight is read once; with
few rows a tile of outputs alone would not occupy all of the GPU. Weights in FP8 become what the inputs are on their way
to the tensor cores.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda import matrix
from pd_serve.compute.cuda.matrix import Matrix, block_scale

MAX_ROWS = 64


@dataclass(frozen=True)
class SplitTile:
    """A tile of ``outputs``, ``inputs`` at a time in ``stages`` of a pipeline; ``splits`` programs share the inputs.

    ``swapped``: the product is computed transposed, so that what becomes the tensor cores' first operand, which may
    lie in registers, is the weight: in FP8 it is converted there, and not written to shared memory again.
    """

    outputs: int
    inputs: int
    splits: int
    stages: int
    warps: int
    swapped: bool = False


TILES = (  # each is the fastest for some shape; without more of them nothing measured loses 1%
    SplitTile(16, 256, 1, 4, 2),
    SplitTile(32, 128, 1, 4, 4),
    SplitTile(64, 128, 1, 4, 4),
    SplitTile(64, 128, 2, 4, 4),
    SplitTile(64, 256, 2, 3, 4),
    SplitTile(128, 64, 1, 5, 4),
)
FP8_TILES = (  # of at most 128 inputs, which have one scale where blocks have theirs
    SplitTile(16, 128, 1, 6, 2),
    SplitTile(32, 128, 1, 6, 4),
    SplitTile(32, 128, 2, 5, 4),
    SplitTile(64, 128, 2, 5, 4),
    SplitTile(128, 128, 1, 4, 4),
    SplitTile(64, 128, 4, 5, 4, True),
)
MAX_SPLITS = max(tile.splits for tile in TILES + FP8_TILES)
MIN_OUTPUTS = min(tile.outputs for tile in TILES + FP8_TILES)


def tiles(scales: int) -> tuple[SplitTile, ...]:
    """For weights with such scales."""
    return TILES if scales == matrix.PLAIN else FP8_TILES


class Workspace:
    """Partial sums of a device's split tiles. One stream at a time may use it."""

    def __init__(self, max_outputs: int, device: torch.device) -> None:
        """For weights of up to ``max_outputs`` rows."""
        self.max_outputs = max_outputs
        self.sums = torch.empty(MAX_SPLITS * MAX_ROWS * max_outputs, dtype=torch.float32, device=device)
        # how many programs of a tile have their sum ready: the last one leaves 0 behind
        self.arrived = torch.zeros(triton.cdiv(max_outputs, MIN_OUTPUTS), dtype=torch.int32, device=device)


def split_k(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    out: Tensor,
    tile: SplitTile,
    workspace: Workspace,
    *,
    compile_only: bool = False,
) -> None:
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias [N]``, M <= 64, summed in float32 in a fixed order.

    ``x`` bfloat16 or float16; rows of ``x`` and ``out`` may be apart.
    """
    (rows, k), n, values = x.shape, weight.values.shape[0], weight.values
    share = triton.cdiv(k, tile.inputs * tile.splits) * tile.inputs
    _split_k.run(
        x, values, values if weight.scale is None else weight.scale, values if bias is None else bias, out,
        workspace.sums, workspace.arrived, rows, n, k, share, x.stride(0), out.stride(0), weight.scale_row,
        SCALES=weight.scales, SWAPPED=tile.swapped, BIAS=bias is not None, EVEN=k == share * tile.splits,
        ROWS=max(16, triton.next_power_of_2(rows)), OUTPUTS=tile.outputs, INPUTS=tile.inputs, SPLITS=tile.splits,
        num_stages=tile.stages, num_warps=tile.warps,
        grid=(triton.cdiv(n, tile.outputs), tile.splits), warmup=compile_only,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])  # one kernel for all numbers of rows, so that no step waits for a compiler
def _split_k(
    x: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, out: tl.tensor, sums: tl.tensor,
    arrived: tl.tensor, rows: tl.tensor, n: tl.tensor, k: tl.tensor, share: tl.tensor, x_stride: tl.tensor,
    out_stride: tl.tensor, scale_row: tl.tensor,
    SCALES: tl.constexpr, SWAPPED: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    # tensors below are [ROWS, OUTPUTS], or swapped [OUTPUTS, ROWS]
    across: tl.constexpr = 0 if SWAPPED else 1
    tile, split = tl.program_id(0), tl.program_id(1)
    columns, some_rows, some_inputs = tl.arange(0, OUTPUTS), tl.arange(0, ROWS), tl.arange(0, INPUTS)
    column = tl.expand_dims(tile * OUTPUTS + columns, 1 - across)
    row = tl.expand_dims(some_rows, across)
    inputs = split * share + some_inputs
    if SWAPPED:
        inputs_of_x, inputs_of_w = inputs[:, None], inputs[None, :]
    else:
        inputs_of_x, inputs_of_w = inputs[None, :], inputs[:, None]
    # past the last row the last one is read again: no mask in the loop
    w = weight + tl.minimum(column, n - 1).to(tl.int64) * k + inputs_of_w
    a = x + tl.minimum(row, rows - 1) * x_stride + inputs_of_x
    total = tl.zeros([OUTPUTS, ROWS] if SWAPPED else [ROWS, OUTPUTS], tl.float32)
    for at in range(0, share, INPUTS):
        if EVEN:
            values = tl.load(w + at, eviction_policy="evict_first")
            its = tl.load(a + at)
        else:
            values = tl.load(w + at, inputs_of_w < k - at, other=0.0, eviction_policy="evict_first")
            its = tl.load(a + at, inputs_of_x < k - at, other=0.0)
        values = values.to(its.dtype)
        if SCALES == 2:
            first = tl.minimum(split * share + at, k - 1)
            total += _product(values, its, None, SWAPPED) * block_scale(scale, scale_row, tile * OUTPUTS, first)
        else:
            total = _product(values, its, total, SWAPPED)
    mask = (row < rows) & (column < n)
    if SPLITS > 1:
        place = row * n + column
        tl.store(sums + split * rows * n + place, total, mask)
        tl.debug_barrier()  # all of this program's sums are written before one of its threads says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros_like(total)
            for other in tl.static_range(SPLITS):
                # .cg: not from this multiprocessor's L1, which does not see what others write
                total += tl.load(sums + other * rows * n + place, mask, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(total, scale, bias, out, row, column, n, out_stride, mask, SCALES, BIAS)
    else:
        _finish(total, scale, bias, out, row, column, n, out_stride, mask, SCALES, BIAS)


@triton.jit
def _product(values: tl.tensor, its: tl.tensor, total: tl.tensor, SWAPPED: tl.constexpr) -> tl.tensor:
    if SWAPPED:
        return tl.dot(values, its, total)
    else:
        return tl.dot(its, values, total)


@triton.jit
def _finish(
    total: tl.tensor, scale: tl.tensor, bias: tl.tensor, out: tl.tensor, row: tl.tensor, column: tl.tensor,
    n: tl.tensor, out_stride: tl.tensor, mask: tl.tensor,
    SCALES: tl.constexpr, BIAS: tl.constexpr,
) -> None:  # fmt: skip
    if SCALES == 1:
        total *= tl.load(scale + column, column < n, other=0.0)
    if BIAS:
        total += tl.load(bias + column, column < n, other=0.0).to(tl.float32)
    tl.store(out + row * out_stride + column, total.to(out.dtype.element_ty), mask)
