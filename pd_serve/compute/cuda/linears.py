"""Linear layers that use, for each shape and number of rows, what was fastest on this very GPU.

Called by the engine at start (:func:`choose`) and by decoders (:class:`Linear`). Owns which kernel multiplies: torch's
(cuBLAS), the GEMV or the split-K kernel beside it. What it measured lies in ``linears/`` of the cache, a file for each
shape, by GPU, driver, versions and kernel sources: a start with warm caches times nothing.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from pd_serve.compute.cuda import gemv, splitk
from pd_serve.compute.cuda.timing import graph_us
from pd_serve.paths import cache_directory

log = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 32, 64)  # rows that are timed; others use what the next larger one uses
_MOST_ROWS = splitk.MAX_ROWS  # cuBLAS above: there it is arithmetic that limits
_LAUNCHES = 8  # at least, in a graph that is timed: its own launch shall not count
_WORTH = 0.98  # an own kernel has to need less than this share of cuBLAS' time
_TOLERANCE = 2e-2  # relative error against torch's result from which on a kernel counts as broken
_FORMAT = 1


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


@dataclass(frozen=True)
class Timed:
    """What was measured for one number of rows: microseconds of a multiplication, weights not in the L2 cache."""

    rows: int
    way: Way
    us: float
    torch_us: float


class Linear:
    """``x @ weight.T + bias`` by the ways that were chosen for the weight's shape."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None = None,
        timed: Sequence[Timed] = (),
        workspace: splitk.Workspace | None = None,
    ) -> None:
        """``weight [out, in]`` contiguous, ``bias [out]``. ``timed``: of its shape, by :func:`choose`; none: torch.

        Raises ValueError where a way needs a workspace and none, or too small a one, is given.
        """
        if not weight.is_contiguous():
            raise ValueError("a linear's weight must be contiguous")
        needs = any(isinstance(t.way.tile, splitk.SplitTile) for t in timed)
        if needs and (workspace is None or workspace.max_outputs < weight.shape[0]):
            raise ValueError(f"split-K needs a workspace for {weight.shape[0]} outputs")
        self._weight = weight
        self._transposed = weight.t()
        self._bias = bias
        self._workspace = workspace
        self._ways = _by_rows(timed)

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


def _by_rows(timed: Sequence[Timed]) -> list[Way]:
    """The way for each number of rows from 0 on, as long as one was timed."""
    ways: list[Way] = []
    for entry in sorted(timed, key=lambda t: t.rows):
        ways += [entry.way] * (entry.rows + 1 - len(ways))
    return ways


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
) -> dict[Shape, tuple[Timed, ...]]:
    """The fastest way for each shape and number of rows: from ``cache``, else timed now and kept there.

    ``cache``: the folder, by default :func:`cache_folder`. ``progress`` is called before each shape that is timed.
    Takes a second or two for a shape, and memory for one weight or four times the L2 cache, which is given back.
    """
    if dtype not in (torch.bfloat16, torch.float16):
        return dict.fromkeys(shapes, ())
    ladder = [rows for rows in sorted(ladder) if rows <= _MOST_ROWS]
    folder = cache or cache_folder(device)
    chosen: dict[Shape, tuple[Timed, ...]] = {}
    missing: list[Shape] = []
    for shape in dict.fromkeys(shapes):
        found = _read(_file(folder, shape, dtype), ladder)
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
            _write(_file(folder, shape, dtype), chosen[shape])
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
) -> tuple[Timed, ...]:
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


def cache_folder(device: torch.device) -> Path:
    """For what was timed on GPUs like ``device`` with these versions."""
    sources = b"".join(inspect.getsource(module).encode() for module in (gemv, splitk))
    parts = (
        torch.cuda.get_device_name(device),
        str(torch.cuda.get_device_properties(device).multi_processor_count),
        _driver(),
        torch.__version__,
        triton.__version__,
        hashlib.sha256(sources).hexdigest(),
    )
    return cache_directory() / "linears" / hashlib.sha256("|".join(parts).encode()).hexdigest()[:16]


def _driver() -> str:
    """The driver's version, 580.159.04 for instance."""
    version = Path("/proc/driver/nvidia/version")
    try:
        return version.read_text().partition("\n")[0]
    except OSError:
        return "unknown"


def _file(folder: Path, shape: Shape, dtype: torch.dtype) -> Path:
    return folder / f"{shape[0]}x{shape[1]}-{str(dtype).removeprefix('torch.')}.json"


def _read(file: Path, ladder: Sequence[int]) -> tuple[Timed, ...] | None:
    """What ``file`` has, if that is for all of ``ladder``. A file that makes no sense is ignored with a warning."""
    try:
        text = file.read_text()
    except OSError:
        return None
    try:
        data = json.loads(text)
        if data["format"] != _FORMAT:
            return None
        timed = {row["rows"]: _decode(row) for row in data["timed"]}
    except (ValueError, KeyError, TypeError) as error:
        log.warning("%s is damaged (%s): timing these linears again", file, error)
        return None
    return tuple(timed[rows] for rows in ladder) if all(rows in timed for rows in ladder) else None


_TILES: dict[str, type[gemv.GemvTile] | type[splitk.SplitTile]] = {"gemv": gemv.GemvTile, "split_k": splitk.SplitTile}


def _decode(row: dict[str, object]) -> Timed:
    kind, tile = row["way"], row["tile"]
    rows, us, torch_us = row["rows"], row["us"], row["torch_us"]
    if not (isinstance(rows, int) and isinstance(us, float) and isinstance(torch_us, float)):
        raise ValueError("numbers are missing")
    way = TORCH
    if kind != "torch":
        if not (isinstance(kind, str) and isinstance(tile, list) and all(isinstance(v, int) for v in tile)):
            raise ValueError("a tile is missing")
        way = Way(_TILES[kind](*tile))
        if way not in candidates(rows):
            raise ValueError(f"no such way: {way}")
    return Timed(rows, way, us, torch_us)


def _write(file: Path, timed: Sequence[Timed]) -> None:
    """Whole or not at all: another process may read, or write the same, meanwhile."""
    kinds = {cls: kind for kind, cls in _TILES.items()}
    rows = []
    for t in timed:
        tile = t.way.tile
        rows.append({
            "rows": t.rows, "way": "torch" if tile is None else kinds[type(tile)],
            "tile": None if tile is None else list(dataclasses.astuple(tile)), "us": t.us, "torch_us": t.torch_us,
        })  # fmt: skip
    part = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"format": _FORMAT, "timed": rows}))
        part.replace(file)
    except OSError as error:
        log.warning("cannot keep %s (%s): linears will be timed at every start", file, error)
