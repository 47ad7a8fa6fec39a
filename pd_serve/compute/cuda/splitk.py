"""``y = x @ weight.T`` for up to 64 rows by tensor cores, the inputs of a tile shared among several programs.

Called by :mod:`pd_serve.compute.cuda.linears`, which decides by timing where it is used. The weight is read once; with
few rows a tile of outputs alone would not occupy all of the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_ROWS = 64


@dataclass(frozen=True)
class SplitTile:
    """A tile of ``outputs``, ``inputs`` at a time in ``stages`` of a pipeline; ``splits`` programs share the inputs."""

    outputs: int
    inputs: int
    splits: int
    stages: int
    warps: int


TILES = (  # each is the fastest for some shape; without more of them nothing measured loses 1%
    SplitTile(16, 256, 1, 4, 2),
    SplitTile(32, 128, 1, 4, 4),
    SplitTile(64, 128, 1, 4, 4),
    SplitTile(64, 128, 2, 4, 4),
    SplitTile(64, 256, 2, 3, 4),
    SplitTile(128, 64, 1, 5, 4),
)
MAX_SPLITS = max(tile.splits for tile in TILES)
MIN_OUTPUTS = min(tile.outputs for tile in TILES)


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
    weight: Tensor,
    bias: Tensor | None,
    out: Tensor,
    tile: SplitTile,
    workspace: Workspace,
    *,
    compile_only: bool = False,
) -> None:
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias [N]``, M <= 64, summed in float32 in a fixed order.

    bfloat16 or float16. ``weight`` is contiguous; rows of ``x`` and ``out`` may be apart.
    """
    (rows, k), n = x.shape, weight.shape[0]
    share = triton.cdiv(k, tile.inputs * tile.splits) * tile.inputs
    _split_k.run(
        x, weight, weight if bias is None else bias, out, workspace.sums, workspace.arrived,
        rows, n, k, share, x.stride(0), out.stride(0),
        BIAS=bias is not None, EVEN=k == share * tile.splits, ROWS=max(16, triton.next_power_of_2(rows)),
        OUTPUTS=tile.outputs, INPUTS=tile.inputs, SPLITS=tile.splits, num_stages=tile.stages, num_warps=tile.warps,
        grid=(triton.cdiv(n, tile.outputs), tile.splits), warmup=compile_only,
    )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])  # one kernel for all numbers of rows, so that no step waits for a compiler
def _split_k(
    x: tl.tensor, weight: tl.tensor, bias: tl.tensor, out: tl.tensor, sums: tl.tensor, arrived: tl.tensor,
    rows: tl.tensor, n: tl.tensor, k: tl.tensor, share: tl.tensor, x_stride: tl.tensor, out_stride: tl.tensor,
    BIAS: tl.constexpr, EVEN: tl.constexpr, ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:  # fmt: skip
    tile, split = tl.program_id(0), tl.program_id(1)
    column = tile * OUTPUTS + tl.arange(0, OUTPUTS)
    row = tl.arange(0, ROWS)
    inputs = split * share + tl.arange(0, INPUTS)
    # past the last row the last one is read again: no mask in the loop
    w = weight + tl.minimum(column, n - 1)[None, :].to(tl.int64) * k + inputs[:, None]
    a = x + tl.minimum(row, rows - 1)[:, None] * x_stride + inputs[None, :]
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, share, INPUTS):
        if EVEN:
            total = tl.dot(tl.load(a + at), tl.load(w + at, eviction_policy="evict_first"), total)
        else:
            left = k - at
            total = tl.dot(
                tl.load(a + at, (inputs < left)[None, :], other=0.0),
                tl.load(w + at, (inputs < left)[:, None], other=0.0, eviction_policy="evict_first"),
                total,
            )
    mask = (row < rows)[:, None] & (column < n)[None, :]
    if SPLITS > 1:
        place = row[:, None] * n + column[None, :]
        tl.store(sums + split * rows * n + place, total, mask)
        tl.debug_barrier()  # all of this program's sums are written before one of its threads says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == SPLITS - 1
        if last:
            total = tl.zeros([ROWS, OUTPUTS], tl.float32)
            for other in tl.static_range(SPLITS):
                # .cg: not from this multiprocessor's L1, which does not see what others write
                total += tl.load(sums + other * rows * n + place, mask, other=0.0, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
            _finish(total, bias, out, row, column, n, out_stride, mask, BIAS)
    else:
        _finish(total, bias, out, row, column, n, out_stride, mask, BIAS)


@triton.jit
def _finish(
    total: tl.tensor, bias: tl.tensor, out: tl.tensor, row: tl.tensor, column: tl.tensor, n: tl.tensor,
    out_stride: tl.tensor, mask: tl.tensor,
    BIAS: tl.constexpr,
) -> None:  # fmt: skip
    if BIAS:
        total += tl.load(bias + column, column < n, other=0.0).to(tl.float32)[None, :]
    tl.store(out + row[:, None] * out_stride + column[None, :], total.to(out.dtype.element_ty), mask)
