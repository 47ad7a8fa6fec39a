"""Products of two matrices in FP8 for many rows, where arithmetic limits: inputs become FP8 first, by a kernel here.

Called by :mod:`pd_serve.compute.cuda.linears`, which decides by timing where it is used. The product is cuBLAS',
through torch, or a kernel's that takes what cuBLAS has not. A row of inputs has a scale of its own, or one for each 128
of it where the weight's blocks have theirs (DeepSeek-V3, arXiv:2412.19437), or the checkpoint's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda.activations import SILU, Activation, gated
from pd_serve.compute.cuda.matrix import BLOCKS, Matrix, block_scale
from pd_serve.models.quantization import BLOCK

_GROUPS = 8  # of 128 inputs, of a program
_CUBLAS_ROWS = 4  # with blocks it wants a multiple of these: columns of scales begin at a multiple of 16 bytes
_TOGETHER = 8  # tiles of rows that read the same tile of the weight


@dataclass(frozen=True)
class GemmTile:
    """``rows`` by ``outputs``, ``inputs`` at a time in ``stages`` of a pipeline."""

    rows: int
    outputs: int
    inputs: int
    stages: int
    warps: int


TILES = (  # the first works everywhere
    GemmTile(64, 64, 128, 3, 4),
    GemmTile(64, 128, 128, 4, 4),
    GemmTile(128, 128, 128, 3, 4),
)


def quantise(
    x: Tensor, weight: Matrix, act: Activation | None = None, *, pad: int = 1, compile_only: bool = False
) -> tuple[Tensor, Tensor]:
    """``x [M, K]`` in FP8 and its scales: float32 ``[M, 1]``, or ``[M, K / 128]``, column by column.

    Rows of ``x`` may be apart. ``act``: of ``act(gate) * up`` instead, where ``x [M, 2 K]`` holds both. With groups of
    128, rows of anything are added until they are a multiple of ``pad``.
    """
    rows, k = len(x), weight.values.shape[1]
    options = {"GATED": act is not None, "warmup": compile_only}
    if weight.scales == BLOCKS:
        groups, padded = triton.cdiv(k, BLOCK), triton.cdiv(rows, pad) * pad
        values = torch.empty((padded, k), dtype=torch.float8_e4m3fn, device=x.device)
        scales = torch.empty((groups, padded), dtype=torch.float32, device=x.device).t()
        _quantise_groups.run(
            x, values, scales, padded, k, x.stride(0), *(act or SILU), GROUPS=_GROUPS, num_warps=4,
            grid=(rows, triton.cdiv(groups, _GROUPS)), **options,
        )  # fmt: skip
        return values, scales
    values = torch.empty((rows, k), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    across = triton.next_power_of_2(k)
    _quantise_rows.run(
        x, values, scales, k, x.stride(0), weight.input_scale or 1.0, *(act or SILU),
        STATIC=weight.input_scale is not None, ACROSS=across, num_warps=min(16, max(1, across // 1024)), grid=(rows,),
        **options,
    )  # fmt: skip
    return values, scales


def by_torch(x: Tensor, weight: Matrix, bias: Tensor | None, out: Tensor, act: Activation | None = None) -> None:
    """``out [M, N] = x [M, K] @ weight [N, K].T + bias [N]``. Raises RuntimeError or ValueError for what it has not.

    ``x`` and ``out`` bfloat16 or float16; rows of ``x`` may be apart. ``act``: see :func:`quantise`.
    """
    assert weight.scale is not None
    blocks = weight.scales == BLOCKS
    values, scales = quantise(x, weight, act, pad=_CUBLAS_ROWS)
    whole = out if len(values) == len(out) else out.new_empty((len(values), out.shape[1]))
    torch._scaled_mm(
        values,
        weight.transposed,
        scale_a=scales,
        scale_b=weight.scale.t() if blocks else weight.scale[None, :],
        bias=bias,
        out_dtype=out.dtype,
        use_fast_accum=not blocks,
        out=whole,
    )
    if whole is not out:
        out.copy_(whole[: len(out)])


def multiply(
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    out: Tensor,
    tile: GemmTile,
    act: Activation | None = None,
    *,
    compile_only: bool = False,
) -> None:
    """The same by the kernel here, for any sizes; rows of ``out`` may be apart, too."""
    rows, (n, k) = len(x), weight.values.shape
    values, scales = quantise(x, weight, act, compile_only=compile_only)
    _multiply.run(
        values, scales, weight.values, weight.scale, weight.values if bias is None else bias, out, rows, n, k,
        scales.stride(0), scales.stride(1), weight.scale_row, out.stride(0),
        BLOCKS=weight.scales == BLOCKS, BIAS=bias is not None, EVEN=k % tile.inputs == 0, TOGETHER=_TOGETHER,
        ROWS=tile.rows, OUTPUTS=tile.outputs, INPUTS=tile.inputs, num_stages=tile.stages, num_warps=tile.warps,
        grid=(triton.cdiv(rows, tile.rows) * triton.cdiv(n, tile.outputs),), warmup=compile_only,
    )  # fmt: skip


@triton.jit
def to_fp8(value: tl.tensor, factor: tl.tensor) -> tl.tensor:
    """``value * factor``, at most the largest there is."""
    return tl.minimum(tl.maximum(value * factor, -448.0), 448.0).to(tl.float8e4nv)


@triton.jit
def _inputs(
    x: tl.tensor, i: tl.tensor, k: tl.tensor, linear: tl.tensor, cubic: tl.tensor, GATED: tl.constexpr
) -> tl.tensor:
    value = tl.load(x + i, i < k, other=0.0).to(tl.float32)
    if GATED:
        value = gated(value, tl.load(x + k + i, i < k, other=0.0).to(tl.float32), linear, cubic)
    return value


@triton.jit
def _quantise_rows(
    x: tl.tensor, values: tl.tensor, scales: tl.tensor, k: tl.tensor, x_row: tl.tensor, scale: tl.tensor,
    linear: tl.tensor, cubic: tl.tensor,
    GATED: tl.constexpr, STATIC: tl.constexpr, ACROSS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, ACROSS)
    value = _inputs(x + row * x_row, i, k, linear, cubic, GATED)
    if not STATIC:
        scale = tl.maximum(tl.max(tl.abs(value)), 1e-10) / 448.0
    tl.store(values + row * k + i, to_fp8(value, 1.0 / scale), i < k)
    tl.store(scales + row, scale)


@triton.jit(do_not_specialize=["pitch"])
def _quantise_groups(
    x: tl.tensor, values: tl.tensor, scales: tl.tensor, pitch: tl.tensor, k: tl.tensor, x_row: tl.tensor,
    linear: tl.tensor, cubic: tl.tensor,
    GATED: tl.constexpr, GROUPS: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    group = tl.program_id(1) * GROUPS + tl.arange(0, GROUPS)
    i = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    value = _inputs(x + row * x_row, i, k, linear, cubic, GATED)
    scale = tl.maximum(tl.max(tl.abs(value), 1), 1e-10) / 448.0
    tl.store(values + row * k + i, to_fp8(value, (1.0 / scale)[:, None]), i < k)
    tl.store(scales + group.to(tl.int64) * pitch + row, scale, group * 128 < k)


@triton.jit(do_not_specialize=["rows"])  # one kernel for all numbers of rows, so that no step waits for a compiler
def _multiply(
    x: tl.tensor, x_scale: tl.tensor, weight: tl.tensor, scale: tl.tensor, bias: tl.tensor, out: tl.tensor,
    rows: tl.tensor, n: tl.tensor, k: tl.tensor, x_scale_row: tl.tensor, x_scale_group: tl.tensor,
    scale_row: tl.tensor, out_row: tl.tensor,
    BLOCKS: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, TOGETHER: tl.constexpr, ROWS: tl.constexpr,
    OUTPUTS: tl.constexpr, INPUTS: tl.constexpr,
) -> None:  # fmt: skip
    # tiles of some rows that need the same of the weight come one after another, and find it in the L2 cache
    program, high = tl.program_id(0), tl.cdiv(rows, ROWS)
    together = TOGETHER * tl.cdiv(n, OUTPUTS)
    first = program // together * TOGETHER
    height = tl.minimum(high - first, TOGETHER)
    tile = first + program % together % height
    column_tile = program % together // height
    row = tile * ROWS + tl.arange(0, ROWS)
    column = column_tile * OUTPUTS + tl.arange(0, OUTPUTS)
    inputs = tl.arange(0, INPUTS)
    # past the last row the last one is read again: no mask in the loop
    some_row = tl.minimum(row, rows - 1).to(tl.int64)
    a = x + some_row[:, None] * k + inputs[None, :]
    w = weight + tl.minimum(column, n - 1)[None, :].to(tl.int64) * k + inputs[:, None]
    its_scale = x_scale + some_row * x_scale_row
    total = tl.zeros([ROWS, OUTPUTS], tl.float32)
    for at in range(0, k, INPUTS):
        if EVEN:
            values, matrix = tl.load(a + at), tl.load(w + at)
        else:
            values = tl.load(a + at, (inputs < k - at)[None, :], other=0.0)
            matrix = tl.load(w + at, (inputs < k - at)[:, None], other=0.0)
        if BLOCKS:
            factor = tl.load(its_scale + at // 128 * x_scale_group)
            factor *= block_scale(scale, scale_row, column_tile * OUTPUTS, at)
            total += tl.dot(values, matrix) * factor[:, None]
        else:
            total = tl.dot(values, matrix, total)
    if not BLOCKS:
        total *= tl.load(its_scale)[:, None] * tl.load(scale + column, column < n, other=0.0)[None, :]
    if BIAS:
        total += tl.load(bias + column, column < n, other=0.0).to(tl.float32)[None, :]
    mask = (row < rows)[:, None] & (column < n)[None, :]
    tl.store(out + row[:, None].to(tl.int64) * out_row + column[None, :], total.to(out.dtype.element_ty), mask)
