"""Both kernels in all their tiles against torch in float32, weights plain and in FP8, the choice, and its cache."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.compute.cuda.device import DEVICE, INTERPRETED, error, skip_without_gpu, tolerance

skip_without_gpu()

from pd_serve import timings  # noqa: E402
from pd_serve.compute.cuda import fp8, gemv, kernels, linears, matrix, splitk  # noqa: E402
from pd_serve.compute.cuda.activations import SILU  # noqa: E402
from pd_serve.compute.cuda.linears import TORCH, Linear, Shape, Way, _named  # noqa: E402
from pd_serve.compute.cuda.matrix import Matrix  # noqa: E402
from pd_serve.timings import Timed  # noqa: E402
from tests.compute.cuda.fp8_weights import meant, random_fp8  # noqa: E402

pytestmark = pytest.mark.gpu

SHAPES = [(64, 256), (131, 1032), (48, 4096)] if INTERPRETED else [(64, 256), (1000, 4104), (6144, 4096)]
DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter has no dot of bfloat16
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU's time")


def operands(n: int, k: int, rows: int, bias: bool) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    weight = torch.randn(n, k, device=DEVICE).mul_(k**-0.5).to(DTYPE)
    x = torch.randn(rows, k + 16, device=DEVICE).to(DTYPE)[:, :k]  # rows apart
    added = torch.randn(n, device=DEVICE).to(DTYPE) if bias else None
    out = torch.full((rows, n + 8), torch.nan, device=DEVICE, dtype=DTYPE)[:, :n]
    return weight, x, added, out


def in_fp8(n: int, k: int, scales: int) -> tuple[Matrix, Tensor]:
    """And the float32 matrix that it stands for."""
    weight = random_fp8(n, k, blocks=scales == matrix.BLOCKS)
    return Matrix.of(weight), meant(weight)


def expected(weight: Tensor, x: Tensor, bias: Tensor | None) -> Tensor:
    y = x.float() @ weight.float().t()
    return y if bias is None else y + bias.float()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tile", gemv.TILES if not INTERPRETED else gemv.TILES[2:3], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_gemv(n: int, k: int, tile: gemv.GemvTile, bias: bool) -> None:
    for rows in range(1, gemv.MAX_ROWS + 1):
        weight, x, added, out = operands(n, k, rows, bias)
        gemv.gemv(x, Matrix.of(weight), added, out, tile)
        assert error(out, expected(weight, x, added)) < tolerance(DTYPE)


@pytest.mark.parametrize("scales", [matrix.ROWS, matrix.BLOCKS])
@pytest.mark.parametrize("tile", gemv.FP8_TILES if not INTERPRETED else gemv.FP8_TILES[2:3], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_gemv_of_fp8(n: int, k: int, scales: int, tile: gemv.GemvTile) -> None:
    weight, its = in_fp8(n, k, scales)
    for rows in range(1, gemv.MAX_ROWS + 1):
        _, x, added, out = operands(n, k, rows, bias=rows % 2 == 1)
        gemv.gemv(x, weight, added, out, tile)
        assert error(out, expected(its, x, added)) < tolerance(DTYPE)


@pytest.mark.parametrize("scales", [matrix.ROWS, matrix.BLOCKS])
@pytest.mark.parametrize("tile", splitk.FP8_TILES if not INTERPRETED else splitk.FP8_TILES[-1:], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_split_k_of_fp8(n: int, k: int, tile: splitk.SplitTile, scales: int) -> None:
    workspace = splitk.Workspace(n, DEVICE)
    weight, its = in_fp8(n, k, scales)
    for rows in (1, 7, 16, 33, 64) if not INTERPRETED else (7,):
        _, x, added, out = operands(n, k, rows, bias=rows % 2 == 1)
        for _ in range(2):
            out.fill_(torch.nan)
            splitk.split_k(x, weight, added, out, tile, workspace)
            # the weight's numbers are rounded to what x is, which is exact: they have 4 bits
            assert error(out, expected(its, x, added)) < tolerance(DTYPE)
    assert not workspace.arrived.any()


@pytest.mark.parametrize("tile", splitk.TILES if not INTERPRETED else splitk.TILES[3:5], ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_split_k(n: int, k: int, tile: splitk.SplitTile) -> None:
    workspace = splitk.Workspace(n, DEVICE)
    for rows in (1, 7, 16, 33, 64) if not INTERPRETED else (7,):
        weight, x, added, out = operands(n, k, rows, bias=rows % 2 == 1)
        for _ in range(2):  # the second time on counters that the first left behind
            out.fill_(torch.nan)
            splitk.split_k(x, Matrix.of(weight), added, out, tile, workspace)
            assert error(out, expected(weight, x, added)) < tolerance(DTYPE)
    assert not workspace.arrived.any()


def some_ways() -> list[Timed[Way]]:
    return [
        Timed(2, Way(gemv.TILES[0]), 1.0, 2.0),
        Timed(4, TORCH, 2.0, 2.0),
        Timed(16, Way(splitk.TILES[3]), 1.5, 2.0),
    ]


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_goes_the_way_of_its_rows(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    n, k = 96, 512
    weight, _, added, _ = operands(n, k, 1, bias)
    layer = Linear(weight, added)
    layer.use(some_ways(), splitk.Workspace(n, DEVICE))
    seen: list[Way] = []
    multiply = linears._multiply

    def spy(way: Way, *arguments: object) -> None:
        seen.append(way)
        multiply(way, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(linears, "_multiply", spy)
    for rows in (0, 1, 2, 3, 5, 16, 17, 40):
        x = torch.randn(rows, k, device=DEVICE).to(DTYPE)
        y = layer(x)
        assert y.shape == (rows, n)
        if rows:
            assert error(y, expected(weight, x, added)) < tolerance(DTYPE)
    ways = [w.way for w in some_ways()]
    assert seen == [ways[0], ways[0], ways[1], ways[2], ways[2], TORCH, TORCH]


def test_a_workspace_that_is_too_small_is_refused() -> None:
    weight = torch.zeros(96, 512, device=DEVICE, dtype=DTYPE)
    for workspace in (None, splitk.Workspace(95, DEVICE)):
        with pytest.raises(ValueError, match="workspace"):
            Linear(weight).use(some_ways(), workspace)


def test_a_way_is_kept_by_its_name(tmp_path: Path) -> None:
    file = tmp_path / "96x512-bfloat16.json"
    timed = tuple(some_ways())
    timings.write(file, timed)
    assert timings.read(file, [2, 4, 16], _named) == timed
    file.write_text(file.read_text().replace("GemvTile(1,", "GemvTile(3,"))  # no such tile
    assert timings.read(file, [2], _named) is None


@on_gpu
def test_choosing_and_choosing_again(tmp_path: Path) -> None:
    said: list[str] = []
    shapes = [Shape(4096, 4096), Shape(1000, 520)]
    first = linears.choose(shapes, DTYPE, DEVICE, ladder=(1, 16), cache=tmp_path, progress=said.append)
    assert len(said) == 2
    for shape in shapes:
        assert [t.rows for t in first[shape]] == [1, 16]
        assert all(0 < t.us <= t.library_us for t in first[shape])
    again = linears.choose(shapes, DTYPE, DEVICE, ladder=(1, 16), cache=tmp_path, progress=said.append)
    assert again == first
    assert len(said) == 2
    (tmp_path / "4096x4096-bfloat16.json").write_text(json.dumps({"format": 0}))
    linears.choose(shapes, DTYPE, DEVICE, ladder=(1, 16), cache=tmp_path, progress=said.append)
    assert len(said) == 3


@on_gpu
def test_a_linear_in_a_graph() -> None:
    n, k = 6144, 4096
    weight, _, _, _ = operands(n, k, 1, False)
    layer = Linear(weight)
    layer.use(some_ways(), splitk.Workspace(n, DEVICE))
    for rows in (1, 16):
        x = torch.randn(rows, k, device=DEVICE).to(DTYPE)
        out = torch.empty(rows, n, device=DEVICE, dtype=DTYPE)
        layer(x, out)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            layer(x, out)
        x.normal_()
        for _ in range(3):
            out.fill_(torch.nan)
            graph.replay()
            assert error(out, expected(weight, x, None)) < tolerance(DTYPE)


def test_float32_stays_with_torch() -> None:
    assert linears.choose([Shape(64, 64)], torch.float32, DEVICE) == {Shape(64, 64): ()}


@on_gpu
@pytest.mark.parametrize("blocks", [False, True])
def test_choosing_for_fp8(blocks: bool, tmp_path: Path) -> None:
    scales = matrix.BLOCKS if blocks else matrix.ROWS
    shapes = [Shape(4096, 4096, scales), Shape(1000, 4104, scales)]  # the second is not cuBLAS'
    chosen = linears.choose(shapes, DTYPE, DEVICE, cache=tmp_path)
    assert linears.choose(shapes, DTYPE, DEVICE, cache=tmp_path) == chosen
    workspace = splitk.Workspace(4096, DEVICE)
    for shape in shapes:
        timed = chosen[shape]
        assert [t.rows for t in timed] == [*linears.LADDER, *linears._FP8_LADDER]
        weight = random_fp8(shape.outputs, shape.inputs, blocks=blocks)
        layer, its = Linear(weight), meant(weight)
        assert [tensor is mine for tensor, mine in zip(layer.tensors, weight[:2], strict=True)] == [True, True]
        for use in (False, True):
            if use:
                layer.use(timed, workspace)
            for rows in (1, 3, 40, 130, 3000):
                x = torch.randn(rows, shape.inputs, device=DEVICE).to(DTYPE)
                assert error(layer(x), expected(its, x, None)) < 0.05  # the largest round x to FP8
                gate_up = torch.randn(rows, 2 * shape.inputs, device=DEVICE).to(DTYPE)
                if layer.rounds_inputs(rows):
                    act = kernels.silu_mul(gate_up)
                    assert error(layer.of_gated(gate_up, SILU), expected(its, act, None)) < 0.05
                else:
                    assert rows < 200
    assert isinstance(chosen[shapes[1]][-1].way.tile, fp8.GemmTile)
