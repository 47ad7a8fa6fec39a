"""Mixtures of experts on a GPU: routing, two grouped multiplications, and the sum, by the tiles that were fastest here.

Called by decoders (:class:`Experts`) and at the start (:func:`choose`). Tiles are timed with the model's own weights,
which no cache holds, and kept as those of linears are.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from pd_serve import timings
from pd_serve.compute.cuda import activations, grouped, routing
from pd_serve.compute.cuda.grouped import GroupTile
from pd_serve.compute.cuda.timing import cache_folder, graph_us
from pd_serve.models.interface import Fp8Weight, Routing
from pd_serve.timings import Timed, by_rows

log = logging.getLogger(__name__)

LADDER = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)  # rows that are timed; more use what the last one uses
_LAUNCHES = 4  # in a graph that is timed, each with other experts
_TOLERANCE = 2e-2  # relative error against the first tile's result from which on a tile counts as broken
_NAMES = {str(tile): tile for tile in grouped.TILES}


class Shape(NamedTuple):
    """What decides which tiles are fastest."""

    experts: int
    per_token: int
    hidden: int
    intermediate: int
    dtypes: str  # of both matrices, as far as files are named


def _dtype(weight: Tensor | Fp8Weight) -> str:
    if isinstance(weight, Fp8Weight):
        return "fp8-blocks" if weight.blocks else "fp8-rows"
    return str(weight.dtype).removeprefix("torch.")


class Experts:
    """See :class:`pd_serve.models.interface.Experts`."""

    def __init__(
        self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str
    ) -> None:
        """``gate_up [experts, 2 I, hidden]``, ``down [experts, hidden, I]``, contiguous. See :meth:`use`."""
        self.gate_up = gate_up
        self.down = down
        if not all(tensor.is_contiguous() for tensor in self.tensors):
            raise ValueError("weights of experts must be contiguous")
        self._hidden, self._intermediate = _values(down).shape[1:]
        self._routing = routing
        self._activation_name = activation
        self._activation = activations.named(activation)
        exact = torch.float32 in (_values(gate_up).dtype, _values(down).dtype)
        first = grouped.EXACT if exact else grouped.candidates(1, gate_up, down)[0]
        self._gate_up_tiles = self._down_tiles = [first]

    @property
    def shape(self) -> Shape:
        dtypes = "-".join(dict.fromkeys((_dtype(self.gate_up), _dtype(self.down))))
        experts = len(_values(self.down))
        return Shape(experts, self._routing.per_token, self._hidden, self._intermediate, dtypes)

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [
            tensor
            for weight in (self.gate_up, self.down)
            for tensor in ([weight] if isinstance(weight, Tensor) else [weight.values, weight.scale])
        ]

    def copied(self) -> Experts:
        """The same with weights of its own."""
        gate_up, down = (
            _clone(weight) if isinstance(weight, Tensor) else weight._replace(values=_clone(weight.values))
            for weight in (self.gate_up, self.down)
        )
        return Experts(gate_up, down, self._routing, self._activation_name)

    def use(self, gate_up: Sequence[Timed[GroupTile]], down: Sequence[Timed[GroupTile]]) -> None:
        """From now on goes the ways that :func:`choose` found for its shape."""
        self._gate_up_tiles, self._down_tiles = by_rows(gate_up), by_rows(down)

    def __call__(self, x: Tensor, logits: Tensor, out: Tensor | None = None) -> Tensor:
        """``x [T, hidden]``, ``logits [T, experts]``: ``[T, hidden]``, in ``out`` if given, which may be ``x``."""
        rows = len(x)
        if out is None:
            out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        if not rows:
            return out
        routed, per_token = self.route(logits), self._routing.per_token
        act = x.new_empty((rows * per_token, self._intermediate))
        self.compute_gate_up(x, routed, act, self._gate_up_tiles[min(rows, len(self._gate_up_tiles) - 1)])
        made = x.new_empty((rows * per_token, self._hidden))
        self.compute_down(act, routed, made, self._down_tiles[min(rows, len(self._down_tiles) - 1)])
        routing.combine(made, per_token, out)
        return out

    def route(self, logits: Tensor) -> routing.Routed:
        return routing.route(logits, self._routing)

    def compute_gate_up(
        self, x: Tensor, routed: routing.Routed, out: Tensor, tile: GroupTile, *, compile_only: bool = False
    ) -> None:
        """``x [T, hidden]`` -> ``out [slots, I]``."""
        grouped.gate_up(
            x, self.gate_up, routed, self._routing.per_token, self._activation, out, tile, compile_only=compile_only
        )

    def compute_down(
        self, x: Tensor, routed: routing.Routed, out: Tensor, tile: GroupTile, *, compile_only: bool = False
    ) -> None:
        """``x [slots, I]`` -> ``out [slots, hidden]``."""
        grouped.down(x, self.down, routed, self._routing.per_token, out, tile, compile_only=compile_only)


def _clone(weight: Tensor) -> Tensor:
    """By a kernel: what copies within the device need not take addresses of the host's memory."""
    return (weight.view(torch.uint8) | 0).view(weight.dtype)


def _values(weight: Tensor | Fp8Weight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.values


def choose(
    layers: Sequence[Experts],
    dtype: torch.dtype,
    *,
    ladder: Sequence[int] = LADDER,
    cache: Path | None = None,
    far: Callable[[Tensor], bool] | None = None,
    progress: Callable[[str], None] | None = None,
) -> None:
    """Each goes the fastest ways for its shape from now on: from ``cache``, else timed now and kept there.

    ``dtype``: of activations. ``far``: whether weights are not on the device: such are not timed, if need be a copy is.

    ``cache``: a folder, by default one for this GPU and these versions. Takes some seconds for a shape.
    """
    for shape in dict.fromkeys(layer.shape for layer in layers):
        alike = [layer for layer in layers if layer.shape == shape]
        if dtype not in (torch.bfloat16, torch.float16):
            continue
        folder = cache or cache_folder("experts", _values(alike[0].down).device, grouped, routing)
        name = f"{'x'.join(map(str, shape))}-{str(dtype).removeprefix('torch.')}"
        files = [folder / f"{name}-{part}.json" for part in ("gate-up", "down")]
        found = [timings.read(file, ladder, lambda _, text: _NAMES[text]) for file in files]
        if found[0] is None or found[1] is None:
            if progress:
                progress(f"timing {shape.experts} experts of {shape.intermediate} x {shape.hidden}")
            near = [layer for layer in alike if far is None or not far(_values(layer.down))]
            found = list(_time(near or [alike[0].copied()], ladder, dtype))
            for file, timed in zip(files, found, strict=True):
                timings.write(file, timed or ())
        for layer in alike:
            layer.use(found[0] or (), found[1] or ())


Tried = Callable[[int, GroupTile], None]  # launches the nth of some multiplications that are alike


def _time(
    layers: Sequence[Experts], ladder: Sequence[int], dtype: torch.dtype
) -> tuple[tuple[Timed[GroupTile], ...], tuple[Timed[GroupTile], ...]]:
    """Of the multiplications with gate and up, and of those with down."""
    shape = layers[0].shape
    gate_ups: list[Timed[GroupTile]] = []
    downs: list[Timed[GroupTile]] = []
    _compile(layers[0], ladder, dtype)
    for rows in ladder:
        x = torch.randn((rows, shape.hidden), dtype=dtype, device=_values(layers[0].down).device)
        turns = [layers[i % len(layers)] for i in range(_LAUNCHES)]
        routed = [layer.route(x.new_empty((rows, shape.experts)).normal_()) for layer in turns]
        act = x.new_empty((rows * shape.per_token, shape.intermediate)).normal_()
        made = x.new_empty((rows * shape.per_token, shape.hidden))
        tiles = grouped.candidates(rows * shape.per_token / shape.experts, layers[0].gate_up, layers[0].down)

        def gate_up(nth: int, tile: GroupTile) -> None:
            turns[nth].compute_gate_up(x, routed[nth], act, tile)  # noqa: B023

        def down(nth: int, tile: GroupTile) -> None:
            turns[nth].compute_down(act, routed[nth], made, tile)  # noqa: B023

        gate_ups.append(_fastest(rows, tiles, gate_up, act))
        downs.append(_fastest(rows, tiles, down, made))
    return tuple(gate_ups), tuple(downs)


def _fastest(rows: int, tiles: Sequence[GroupTile], launch: Tried, out: Tensor) -> Timed[GroupTile]:
    times: dict[GroupTile, float] = {}
    expected = None
    for tile in tiles:
        try:
            launch(0, tile)
            expected = out.clone() if expected is None else expected
            error = ((out - expected).float().norm() / expected.float().norm()).item()
            if not error < _TOLERANCE:
                log.warning("%s is wrong by %.2g for %d rows: not used", tile, error, rows)
                continue
            times[tile] = graph_us(partial(_all, launch, tile)) / _LAUNCHES
        except triton.runtime.errors.OutOfResources:  # a tile needs more shared memory than this GPU has
            continue
    best = min(times, key=lambda tile: times[tile])
    return Timed(rows, best, times[best], times[tiles[0]])


def _all(launch: Tried, tile: GroupTile) -> None:
    for nth in range(_LAUNCHES):
        launch(nth, tile)


def _compile(layer: Experts, ladder: Sequence[int], dtype: torch.dtype) -> None:
    """Compiles what will be timed on all cores."""
    shape, weights = layer.shape, (layer.gate_up, layer.down)
    tiles = {t for rows in ladder for t in grouped.candidates(rows * shape.per_token / shape.experts, *weights)}
    x = torch.empty((1, shape.hidden), dtype=dtype, device=_values(layer.down).device)
    routed = layer.route(x.new_zeros((1, shape.experts)))
    act, made = x.new_empty((shape.per_token, shape.intermediate)), x.new_empty((shape.per_token, shape.hidden))
    with ThreadPoolExecutor(os.cpu_count()) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
        for tile in tiles:
            layer.compute_gate_up(x, routed, act, tile, compile_only=True)
            layer.compute_down(act, routed, made, tile, compile_only=True)
