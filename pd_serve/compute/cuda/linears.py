"""Linear layers that use, for each shape and number of rows, what was fastest on this very GPU.

Called by the engine at start (:func:`choose`) and by decoders (:class:`Linear`). Owns which kernel multiplies: torch's
(cuBLAS), the GEMV or the split-K kernel beside it; with weights in FP8, those, or products in FP8 alone. What it
measured, with weights that are not in the L2 cache, is kept (:mod:`pd_serve.timings`), a file for each shape, by
versions and kernel sources.
"""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pd_serve import timings
from pd_serve.compute.cuda import fp8, gemv, matrix, splitk
from pd_serve.compute.cuda.activations import Activation
from pd_serve.compute.cuda.matrix import Matrix
from pd_serve.compute.cuda.timing import cache_folder, graph_us
from pd_serve.models.fp8 import FP8
from pd_serve.models.interface import Fp8Weight
from pd_serve.models.quantization import BLOCK
from pd_serve.timings import Timed, by_rows

log = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 32, 64)  # rows that are timed; others use what the next larger one uses, more use cuBLAS
_FP8_LADDER = (128, 256, 512, 2048)  # beyond LADDER; more rows use what the last one uses
_LAUNCHES = 8  # at least, in a graph that is timed: its own launch shall not count
_MOST_COPIES = 1024  # of a weight: of a tiny router's 50,000 would be needed, and timing it would take minutes
_WORTH = 0.98  # an own kernel has to need less than this share of cuBLAS' time
_TOLERANCE = 2e-2  # relative error from which on a way counts as broken
_FP8_TOLERANCE = 8e-2  # of those that round inputs to FP8, 4e-2 where they are random


@dataclass(frozen=True)
class Way:
    """One way to multiply. ``tile`` is None for torch's."""

    tile: gemv.GemvTile | splitk.SplitTile | fp8.GemmTile | None = None

    def __str__(self) -> str:
        if self.tile is None:
            return "torch"
        return f"{type(self.tile).__name__}({', '.join(map(str, dataclasses.astuple(self.tile)))})"


TORCH = Way()
_FORMS = {matrix.PLAIN: "", matrix.ROWS: "-rows", matrix.BLOCKS: "-blocks"}


class Shape(NamedTuple):
    """What decides which ways are fastest."""

    outputs: int
    inputs: int
    scales: int = matrix.PLAIN


class Linear:
    """``x @ weight.T + bias`` by the ways that were chosen for the weight's shape."""

    def __init__(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> None:
        """``weight [out, in]`` contiguous, ``bias [out]``. It goes a way that always works until :meth:`use`."""
        self._weight = Matrix.of(weight)
        self._bias = bias
        self._workspace: splitk.Workspace | None = None
        self._ways: list[Way] = []
        self._beyond = TORCH if self._weight.scales == matrix.PLAIN else Way(fp8.TILES[0])  # of more rows

    @property
    def shape(self) -> Shape:
        outputs, inputs = self._weight.values.shape
        return Shape(outputs, inputs, self._weight.scales)

    def use(self, timed: Sequence[Timed[Way]], workspace: splitk.Workspace | None = None) -> None:
        """From now on goes the ways that :func:`choose` found for its shape.

        Raises ValueError where a way needs a workspace and none, or too small a one, is given.
        """
        outputs = self.shape.outputs
        needs = any(isinstance(t.way.tile, splitk.SplitTile) for t in timed)
        if needs and (workspace is None or workspace.max_outputs < outputs):
            raise ValueError(f"split-K needs a workspace for {outputs} outputs")
        self._workspace = workspace
        self._ways = by_rows(timed)
        if self._ways and self._weight.scales != matrix.PLAIN:
            self._beyond = _without_most_rows(self._ways[-1])

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return self._weight.tensors if self._bias is None else [*self._weight.tensors, self._bias]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x [T, in] -> [T, out]``, written to ``out`` if given. Rows of both may be apart, their elements not."""
        rows = x.shape[0]
        way = self._way(rows)
        if out is None:
            out = x.new_empty((rows, self._weight.values.shape[0]))
        if rows == 0:
            return out
        _multiply(way, x, self._weight, self._bias, out, self._workspace)
        return out

    def rounds_inputs(self, rows: int) -> bool:
        """Whether so many rows become FP8 first."""
        return rows > 0 and _rounds_inputs(self._way(rows), self._weight)

    def of_gated(self, gate_up: Tensor, act: Activation, out: Tensor | None = None) -> Tensor:
        """Of ``act(gate) * up``, for numbers of rows that become FP8, which they do when they are computed."""
        rows, weight = len(gate_up), self._weight
        tile = self._way(rows).tile
        if out is None:
            out = gate_up.new_empty((rows, self.shape.outputs))
        if isinstance(tile, fp8.GemmTile):
            fp8.multiply(gate_up, weight, self._bias, out, tile, act)
        else:
            fp8.by_torch(gate_up, weight, self._bias, out, act)
        return out

    def _way(self, rows: int) -> Way:
        return self._ways[rows] if rows < len(self._ways) else self._beyond


def _rounds_inputs(way: Way, weight: Matrix) -> bool:
    return weight.scales != matrix.PLAIN and (way.tile is None or isinstance(way.tile, fp8.GemmTile))


def _without_most_rows(way: Way) -> Way:
    """For more rows than any that was timed."""
    return way if way.tile is None or isinstance(way.tile, fp8.GemmTile) else Way(fp8.TILES[0])


def _multiply(
    way: Way,
    x: Tensor,
    weight: Matrix,
    bias: Tensor | None,
    out: Tensor,
    workspace: splitk.Workspace | None,
    *,
    compile_only: bool = False,
) -> None:
    tile = way.tile
    if isinstance(tile, gemv.GemvTile):
        gemv.gemv(x, weight, bias, out, tile, compile_only=compile_only)
    elif isinstance(tile, splitk.SplitTile):
        assert workspace is not None  # seen to by the constructor
        splitk.split_k(x, weight, bias, out, tile, workspace, compile_only=compile_only)
    elif isinstance(tile, fp8.GemmTile):
        fp8.multiply(x, weight, bias, out, tile, compile_only=compile_only)
    elif compile_only:
        return
    elif weight.scales != matrix.PLAIN:
        fp8.by_torch(x, weight, bias, out)
    elif bias is None:
        torch.mm(x, weight.transposed, out=out)
    else:
        torch.addmm(bias, x, weight.transposed, out=out)


def candidates(rows: int, scales: int = matrix.PLAIN) -> list[Way]:
    """Ways that may be the fastest for ``rows`` rows; torch's is the first."""
    ways = [TORCH]
    if rows <= gemv.MAX_ROWS:
        ways += [Way(tile) for tile in gemv.tiles(scales)]
    if rows <= splitk.MAX_ROWS:
        ways += [Way(tile) for tile in splitk.tiles(scales)]
    if scales != matrix.PLAIN and rows >= splitk.MAX_ROWS:
        ways += [Way(tile) for tile in fp8.TILES]
    return ways


def ladder_of(shape: Shape) -> tuple[int, ...]:
    """Numbers of rows that are timed for ``shape``."""
    return LADDER if shape.scales == matrix.PLAIN else (*LADDER, *_FP8_LADDER)


def choose(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    ladder: Sequence[int] | None = None,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[Shape, tuple[Timed[Way], ...]]:
    """The fastest way for each shape and number of rows: from ``cache``, else timed now and kept there.

    ``ladder``: by default that of :func:`ladder_of`. ``cache``: a folder, by default one for this GPU and these
    versions. ``progress`` is called before each shape that
    is timed. Takes a second or two for a shape, and memory for one weight or four times the L2 cache, which is given
    back.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dict.fromkeys(shapes, ())
    folder = cache or cache_folder("linears", device, gemv, splitk, fp8, matrix)
    chosen: dict[Shape, tuple[Timed[Way], ...]] = {}
    missing: list[Shape] = []
    for shape in dict.fromkeys(shapes):
        named = partial(_named, scales=shape.scales)
        found = timings.read(_file(folder, shape, dtype), ladder or ladder_of(shape), named)
        if found is None:
            missing.append(shape)
        else:
            chosen[shape] = found
    if missing:
        workspace = splitk.Workspace(max(shape.outputs for shape in missing), device)
        _compile(missing, ladder, dtype, device, workspace)
        for shape in missing:
            if progress:
                progress(f"timing linears of {shape.outputs} x {shape.inputs}{_FORMS[shape.scales]}")
            chosen[shape] = _time(shape, ladder or ladder_of(shape), dtype, device, workspace)
            timings.write(_file(folder, shape, dtype), chosen[shape])
    return chosen


def _compile(
    shapes: list[Shape],
    ladder: Sequence[int] | None,
    dtype: torch.dtype,
    device: torch.device,
    workspace: splitk.Workspace,
) -> None:
    """Compiles what will be timed on all cores: one after the other they take a minute."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for shape in shapes:
            weight = _made_up(shape, dtype, device)
            for rows in ladder or ladder_of(shape):
                x = torch.empty((rows, shape.inputs), dtype=dtype, device=device)
                out = x.new_empty((rows, shape.outputs))
                for way in candidates(rows, shape.scales):
                    _multiply(way, x, weight, None, out, workspace, compile_only=True)
            del weight


def _made_up(shape: Shape, dtype: torch.dtype, device: torch.device) -> Matrix:
    """Numbers of about 1 / sqrt(inputs)."""
    n, k = shape[:2]
    values = torch.randn((n, k), dtype=dtype, device=device).mul_(k**-0.5)
    if shape.scales == matrix.PLAIN:
        return Matrix.of(values)
    blocks = shape.scales == matrix.BLOCKS
    size = (-(-n // BLOCK), -(-k // BLOCK)) if blocks else (n,)
    scale = torch.full(size, _scale(shape), device=device)  # all alike: what is expected is a plain product
    return Matrix.of(Fp8Weight(values.mul_(1 / _scale(shape)).to(FP8), scale, blocks))


def _scale(shape: Shape) -> float:
    """Of made-up numbers in FP8: they are about 16."""
    return float(shape.inputs**-0.5) / 16


def _time(
    shape: Shape, ladder: Sequence[int], dtype: torch.dtype, device: torch.device, workspace: splitk.Workspace
) -> tuple[Timed[Way], ...]:
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    weights = [_made_up(shape, dtype, device)]
    copies = min(-(-4 * l2_bytes // weights[0].values.nbytes), _MOST_COPIES)
    weights += [_made_up(shape, dtype, device) for _ in range(1, copies)]
    turns = [weights[i % copies] for i in range(max(copies, _LAUNCHES))]
    first = weights[0].transposed.to(dtype)
    if shape.scales != matrix.PLAIN:
        first.mul_(_scale(shape))
    timed = []
    for rows in ladder:
        x = torch.randn((rows, shape.inputs), dtype=dtype, device=device)
        out = x.new_empty((rows, shape.outputs))
        expected = x @ first
        times = {}
        for way in candidates(rows, shape.scales):
            us = _us(way, x, turns, out, expected, workspace)
            if us is not None:
                times[way] = us
        best = min(times, key=lambda w: times[w])
        library_us = times.get(TORCH, math.inf)
        way = best if times[best] < _WORTH * library_us else TORCH
        timed.append(Timed(rows, way, times[way], library_us if TORCH in times else times[way]))
    return tuple(timed)


def _us(
    way: Way, x: Tensor, weights: list[Matrix], out: Tensor, expected: Tensor, workspace: splitk.Workspace
) -> float | None:
    """Microseconds of a multiplication; None where the way does not work here."""

    def multiply(weights: list[Matrix]) -> None:
        for weight in weights:
            _multiply(way, x, weight, None, out, workspace)

    in_fp8, rounds_inputs = weights[0].scales != matrix.PLAIN, _rounds_inputs(way, weights[0])
    shape = tuple(weights[0].values.shape)
    try:
        out.fill_(torch.nan)
        multiply(weights[:1])
        error = ((out - expected).float().norm() / expected.float().norm()).item()
        if not error < (_FP8_TOLERANCE if rounds_inputs else _TOLERANCE):
            log.warning("%s is wrong by %.2g for %s rows of %s: not used", way, error, len(x), shape)
            return None
        return graph_us(lambda: multiply(weights)) / len(weights)
    except triton.runtime.errors.OutOfResources:  # a tile needs more shared memory than this GPU has
        return None
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:
        if not in_fp8 or way.tile is not None:
            raise
        log.info("%s has no %s in FP8: %s", way, shape, str(error).partition("\n")[0])
        return None


def _file(folder: Path, shape: Shape, dtype: torch.dtype) -> Path:
    return folder / f"{shape.outputs}x{shape.inputs}-{str(dtype).removeprefix('torch.')}{_FORMS[shape.scales]}.json"


def _named(rows: int, name: str, scales: int = matrix.PLAIN) -> Way:
    return {str(way): way for way in candidates(rows, scales)}[name]
