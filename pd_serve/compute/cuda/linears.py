"""Linear layers that use, for each shape and number of rows, what was fastest on this very GPU.

Called by the engine at start (:func:`choose`) and by decoders (:class:`Linear`). Owns which kernel multiplies: torch's
(cuBLAS), the GEMV or the split-K kernel beside it. What it measured, with weights that are not in the L2 cache, is kept
(:mod:`pd_serve.timings`), a file for each shape, by versions and kernel sources.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from pd_serve import timings
from pd_serve.compute.cuda import gemv, splitk
from pd_serve.compute.cuda.timing import cache_folder, graph_us
from pd_serve.timings import Timed, by_rows

log = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 32, 64)  # rows that are timed; others use what the next larger one uses
_MOST_ROWS = splitk.MAX_ROWS  # cuBLAS above: there it is arithmetic that limits
_LAUNCHES = 8  # at least, in a graph that is timed: its own launch shall not count
_WORTH = 0.98  # an own kernel has to need less than this share of cuBLAS' time
_TOLERANCE = 2e-2  # relative error against torch's result from which on a kernel counts as broken


@dataclass(frozen=True)
class Way:
    """One way to multiply. ``tile`` is None for torch's."""

    tile: gemv.GemvTile | splitk.SplitTile | None = None

    def __str__(self) -> str:
        if self.tile is None:
            return "torch"
        return f"{type(self.tile).__name__}({', '.join(map(str, dataclasses.astuple(self.tile)))})"


TORCH = Way()
Shape = tuple[int, int]  # [out, in], as a weight has it


class Linear:
    """``x @ weight.T + bias`` by the ways that were chosen for the weight's shape."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        """``weight [out, in]`` contiguous, ``bias [out]``. It goes torch's way until :meth:`use`."""
        if not weight.is_contiguous():
            raise ValueError("a linear's weight must be contiguous")
        self._weight = weight
        self._transposed = weight.t()
        self._bias = bias
        self._workspace: splitk.Workspace | None = None
        self._ways: list[Way] = []

    @property
    def shape(self) -> Shape:
        return self._weight.shape[0], self._weight.shape[1]

    def use(self, timed: Sequence[Timed[Way]], workspace: splitk.Workspace | None = None) -> None:
        """From now on goes the ways that :func:`choose` found for its shape.

        Raises ValueError where a way needs a workspace and none, or too small a one, is given.
        """
        weight = self._weight
        needs = any(isinstance(t.way.tile, splitk.SplitTile) for t in timed)
        if needs and (workspace is None or workspace.max_outputs < weight.shape[0]):
            raise ValueError(f"split-K needs a workspace for {weight.shape[0]} outputs")
        self._workspace = workspace
        self._ways = by_rows(timed)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [self._weight] if self._bias is None else [self._weight, self._bias]

    def __call__(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        """``x [T, in] -> [T, out]``, written to ``out`` if given. Rows of both may be apart, their elements not."""
        rows = x.shape[0]
        way = self._ways[rows] if rows < len(self._ways) else TORCH
        if out is None:
            out = x.new_empty((rows, self._weight.shape[0]))
        if rows == 0:
            return out
        _multiply(way, x, self._weight, self._transposed, self._bias, out, self._workspace)
        return out


def _multiply(
    way: Way,
    x: Tensor,
    weight: Tensor,
    transposed: Tensor,
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
    elif compile_only:
        return
    elif bias is None:
        torch.mm(x, transposed, out=out)
    else:
        torch.addmm(bias, x, transposed, out=out)


def candidates(rows: int) -> list[Way]:
    """Ways that may be the fastest for ``rows`` rows; torch's is the first."""
    ways = [TORCH]
    if rows <= gemv.MAX_ROWS:
        ways += [Way(tile) for tile in gemv.TILES]
    if rows <= splitk.MAX_ROWS:
        ways += [Way(tile) for tile in splitk.TILES]
    return ways


def choose(
    shapes: Iterable[Shape],
    dtype: torch.dtype,
    device: torch.device,
    *,
    ladder: Sequence[int] = LADDER,
    cache: Path | None = None,
    progress: Callable[[str], None] | None = None,
) -> dict[Shape, tuple[Timed[Way], ...]]:
    """The fastest way for each shape and number of rows: from ``cache``, else timed now and kept there.

    ``cache``: a folder, by default one for this GPU and these versions. ``progress`` is called before each shape that
    is timed. Takes a second or two for a shape, and memory for one weight or four times the L2 cache, which is given
    back.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dict.fromkeys(shapes, ())
    ladder = [rows for rows in sorted(ladder) if rows <= _MOST_ROWS]
    folder = cache or cache_folder("linears", device, gemv, splitk)
    chosen: dict[Shape, tuple[Timed[Way], ...]] = {}
    missing: list[Shape] = []
    for shape in dict.fromkeys(shapes):
        found = timings.read(_file(folder, shape, dtype), ladder, _named)
        if found is None:
            missing.append(shape)
        else:
            chosen[shape] = found
    if missing:
        workspace = splitk.Workspace(max(n for n, _ in missing), device)
        _compile(missing, ladder, dtype, device, workspace)
        for shape in missing:
            if progress:
                progress(f"timing linears of {shape[0]} x {shape[1]}")
            chosen[shape] = _time(shape, ladder, dtype, device, workspace)
            timings.write(_file(folder, shape, dtype), chosen[shape])
    return chosen


def _compile(
    shapes: list[Shape], ladder: Sequence[int], dtype: torch.dtype, device: torch.device, workspace: splitk.Workspace
) -> None:
    """Compiles what will be timed on all cores: one after the other they take a minute."""
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for n, k in shapes:
            weight = torch.empty((n, k), dtype=dtype, device=device)
            for rows in ladder:
                x, out = weight.new_empty((rows, k)), weight.new_empty((rows, n))
                for way in candidates(rows):
                    _multiply(way, x, weight, weight.t(), None, out, workspace, compile_only=True)
            del weight


def _time(
    shape: Shape, ladder: Sequence[int], dtype: torch.dtype, device: torch.device, workspace: splitk.Workspace
) -> tuple[Timed[Way], ...]:
    n, k = shape
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    copies = -(-4 * l2_bytes // (n * k * dtype.itemsize))
    weights = [torch.randn((n, k), dtype=dtype, device=device).mul_(k**-0.5) for _ in range(copies)]
    turns = [weights[i % copies] for i in range(max(copies, _LAUNCHES))]
    timed = []
    for rows in ladder:
        x = torch.randn((rows, k), dtype=dtype, device=device)
        out = x.new_empty((rows, n))
        expected = x @ weights[0].t()
        times = {}
        for way in candidates(rows):
            us = _us(way, x, turns, out, expected, workspace)
            if us is not None:
                times[way] = us
        best = min(times, key=lambda w: times[w])
        way = best if times[best] < _WORTH * times[TORCH] else TORCH
        timed.append(Timed(rows, way, times[way], times[TORCH]))
    return tuple(timed)


def _us(
    way: Way, x: Tensor, weights: list[Tensor], out: Tensor, expected: Tensor, workspace: splitk.Workspace
) -> float | None:
    """Microseconds of a multiplication; None where the way does not work here."""

    def multiply(weights: list[Tensor]) -> None:
        for weight in weights:
            _multiply(way, x, weight, weight.t(), None, out, workspace)

    try:
        out.fill_(torch.nan)
        multiply(weights[:1])
        error = ((out - expected).float().norm() / expected.float().norm()).item()
        if not error < _TOLERANCE:
            log.warning("%s is wrong by %.2g for %s rows of %s: not used", way, error, len(x), tuple(weights[0].shape))
            return None
        return graph_us(lambda: multiply(weights)) / len(weights)
    except triton.runtime.errors.OutOfResources:  # a tile needs more shared memory than this GPU has
        return None


def _file(folder: Path, shape: Shape, dtype: torch.dtype) -> Path:
    return folder / f"{shape[0]}x{shape[1]}-{str(dtype).removeprefix('torch.')}.json"


def _named(rows: int, name: str) -> Way:
    return {str(way): way for way in candidates(rows)}[name]
