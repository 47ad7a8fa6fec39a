"""Routing, the grouped multiplications in all their tiles, and their sum, against float32 torch expert by expert."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pd_serve.models.interface import Fp8Weight, Routing
from tests.compute.cuda.device import DEVICE, INTERPRETED, error, skip_without_gpu, tolerance

skip_without_gpu()

from pd_serve.compute.cuda import experts, grouped, routing  # noqa: E402
from pd_serve.compute.cuda.experts import Experts  # noqa: E402
from pd_serve.timings import Timed  # noqa: E402
from tests.compute.cuda.fp8_weights import meant, random_fp8  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16  # the interpreter has no dot of bfloat16
on_gpu = pytest.mark.skipif(INTERPRETED, reason="needs a GPU's time")
# experts, of a token, hidden, intermediate
SHAPES = (
    [(6, 2, 72, 40), (16, 3, 256, 128)] if INTERPRETED else [(6, 2, 72, 40), (20, 3, 520, 200), (128, 8, 2048, 768)]
)
TILES = [grouped.TILES[0], grouped.TILES[7], grouped.TILES[10]] if INTERPRETED else grouped.TILES
ROWS = (1, 5, 40) if INTERPRETED else (1, 2, 7, 33, 150, 700)


def weights(count: int, hidden: int, intermediate: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    gate_up = torch.randn(count, 2 * intermediate, hidden, device=DEVICE).mul_(hidden**-0.5).to(dtype)
    return gate_up, torch.randn(count, hidden, intermediate, device=DEVICE).mul_(intermediate**-0.5).to(dtype)


def operands(rows: int, count: int, hidden: int, dtype: torch.dtype = DTYPE) -> tuple[Tensor, Tensor]:
    x = torch.randn(rows, hidden + 16, device=DEVICE).to(dtype)[:, :hidden]  # rows apart
    logits = torch.randn(rows, count + 3, device=DEVICE).mul_(3).to(dtype)[:, :count]
    logits[:, count // 2] = -20.0  # an expert that nobody has
    return x, logits


def shares_of(logits: Tensor, how: Routing) -> Tensor:
    """``[T, experts]`` float32, zero where a row does not go."""
    shares, chosen = logits.float().softmax(-1).topk(how.per_token)
    if how.normalise:
        shares = shares / shares.sum(-1, keepdim=True)
    return torch.zeros(logits.shape, device=logits.device).scatter_(1, chosen, shares)


def expected(x: Tensor, gate_up: Tensor, down: Tensor, shares: Tensor, activation: str = "silu") -> Tensor:
    total = torch.zeros(x.shape, device=x.device)
    for expert in range(len(down)):
        gate, up = (x.float() @ gate_up[expert].float().t()).chunk(2, -1)
        act = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
        total += shares[:, expert, None] * ((act * up) @ down[expert].float().t())
    return total


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize(("count", "per_token"), [(6, 2), (128, 8), (60, 4), (3, 3), (5, 1)])
def test_routes(count: int, per_token: int, normalise: bool) -> None:
    how = Routing(per_token, normalise)
    for rows in (1, 3, 70):
        logits = torch.randn(rows, count + 3, device=DEVICE)[:, :count]
        routed = routing.route(logits, how)
        assert int(routed.counts.sum()) == rows * per_token
        found = torch.zeros(rows, count, device=DEVICE)
        seen: list[int] = []
        for expert, number in enumerate(routed.counts.tolist()):
            slots = routed.slots[expert, :number].long()
            found[slots // per_token, expert] = routed.shares[slots]
            seen += slots.tolist()
        assert sorted(seen) == list(range(rows * per_token))
        torch.testing.assert_close(found, shares_of(logits, how), atol=1e-6, rtol=1e-5)


def test_the_first_of_equals_and_nothing_beyond_where_a_row_is_not_finite() -> None:
    logits = torch.zeros(4, 6, device=DEVICE)
    logits[1, 3] = torch.nan
    logits[2] = torch.nan
    logits[3] = -torch.inf
    routed = routing.route(logits, Routing(2, True))
    assert routed.counts.tolist() == [4, 4, 0, 0, 0, 0]
    assert sorted(routed.slots[0].tolist()) == [0, 2, 4, 6]
    assert sorted(routed.slots[1].tolist()) == [1, 3, 5, 7]


def fits(tile: grouped.GroupTile) -> bool:
    """Whether a block has the shared memory for a pipeline of two matrices; :func:`experts.choose` skips it if not."""
    if INTERPRETED:
        return True
    staged_bytes = 2 * tile.stages * tile.inputs * (tile.rows + 2 * tile.outputs)
    return staged_bytes <= int(torch.cuda.get_device_properties(DEVICE).shared_memory_per_block_optin)


@pytest.mark.parametrize("tile", TILES, ids=str)
@pytest.mark.parametrize(("count", "per_token", "hidden", "intermediate"), SHAPES)
def test_tiles(count: int, per_token: int, hidden: int, intermediate: int, tile: grouped.GroupTile) -> None:
    gate_up, down = weights(count, hidden, intermediate)
    how = Routing(per_token, True)
    layer = Experts(gate_up, down, how, "silu")
    layer.use([Timed(1, tile if fits(tile) else TILES[0], 1.0, 1.0)], [Timed(1, tile, 1.0, 1.0)])
    for rows in ROWS:
        x, logits = operands(rows, count, hidden)
        assert error(layer(x, logits), expected(x, gate_up, down, shares_of(logits, how))) < 2 * tolerance(DTYPE)


def of_each(count: int, outputs: int, inputs: int, blocks: bool) -> tuple[Fp8Weight, Tensor]:
    """And the float32 matrices that it stands for."""
    each = [random_fp8(outputs, inputs, blocks=blocks) for _ in range(count)]
    values, scale = (torch.stack(parts) for parts in zip(*((w.values, w.scale) for w in each), strict=True))
    return each[0]._replace(values=values, scale=scale), torch.stack([meant(weight) for weight in each])


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", [TILES[1]] if INTERPRETED else grouped.TILES, ids=str)
@pytest.mark.parametrize(
    ("count", "per_token", "hidden", "intermediate"),
    [(6, 2, 200, 128)] if INTERPRETED else [(6, 2, 200, 128), (64, 8, 2048, 768)],
)
def test_matrices_in_fp8(
    count: int, per_token: int, hidden: int, intermediate: int, tile: grouped.GroupTile, blocks: bool
) -> None:
    gate_up, its_gate_up = of_each(count, 2 * intermediate, hidden, blocks)
    down, its_down = of_each(count, hidden, intermediate, blocks)
    how = Routing(per_token, True)
    layer = Experts(gate_up, down, how, "silu")
    assert len(layer.tensors) == 4
    if tile not in grouped.candidates(tile.rows, gate_up, down):
        assert blocks and tile.inputs > 128
        tile = layer._down_tiles[0]
    layer.use([Timed(1, tile, 1.0, 1.0)], [Timed(1, tile, 1.0, 1.0)])
    for rows in ROWS:
        x, logits = operands(rows, count, hidden)
        wanted = expected(x, its_gate_up, its_down, shares_of(logits, how))
        assert error(layer(x, logits), wanted) < 2 * tolerance(DTYPE)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("dtype", [torch.float32, DTYPE])
def test_as_it_is_made(dtype: torch.dtype, activation: str) -> None:
    gate_up, down = weights(12, 96, 56, dtype)
    how = Routing(3, False)
    layer = Experts(gate_up, down, how, activation)
    assert [tensor is mine for tensor, mine in zip(layer.tensors, (gate_up, down), strict=True)] == [True, True]
    for rows in (0, 1, 19):
        x, logits = operands(rows, 12, 96, dtype)
        found = layer(x, logits)
        assert found.shape == x.shape and found.dtype is dtype
        if rows:
            wanted = expected(x, gate_up, down, shares_of(logits, how), activation)
            assert error(found, wanted) < 2 * tolerance(dtype)


def test_all_rows_to_one_expert_are_several_blocks() -> None:
    gate_up, down = weights(4, 64, 32)
    x, logits = operands(100, 4, 64)
    logits[:] = torch.tensor([0.0, 9.0, -9.0, 5.0], device=DEVICE)
    how = Routing(2, True)
    found = Experts(gate_up, down, how, "silu")(x, logits)
    assert error(found, expected(x, gate_up, down, shares_of(logits, how))) < 2 * tolerance(DTYPE)


@on_gpu
def test_in_a_graph_other_rows_go_to_other_experts() -> None:
    count, per_token, hidden, intermediate = SHAPES[-1]
    gate_up, down = weights(count, hidden, intermediate)
    how = Routing(per_token, True)
    layer = Experts(gate_up, down, how, "silu")
    for rows in (1, 24, 256):
        x, logits = (t.contiguous() for t in operands(rows, count, hidden))
        layer(x, logits)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = layer(x, logits)
        for _ in range(3):
            x.normal_()
            logits.normal_()
            graph.replay()
            assert error(out, expected(x, gate_up, down, shares_of(logits, how))) < 2 * tolerance(DTYPE)


@on_gpu
def test_choosing_and_choosing_again(tmp_path: Path) -> None:
    said: list[str] = []
    how = Routing(4, True)
    layers = [Experts(*weights(16, 512, 256), how, "silu") for _ in range(2)]
    experts.choose(layers, DTYPE, ladder=(1, 64), cache=tmp_path, progress=said.append)
    assert len(said) == 1
    for layer in layers:
        x, logits = operands(100, 16, 512)
        assert error(layer(x, logits), expected(x, *layer.tensors, shares_of(logits, how))) < 2 * tolerance(DTYPE)
    tiles = [layer._gate_up_tiles for layer in layers]
    again = [Experts(*layer.tensors, how, "silu") for layer in layers]
    experts.choose(again, DTYPE, ladder=(1, 64), cache=tmp_path, progress=said.append)
    assert len(said) == 1
    assert [layer._gate_up_tiles for layer in again] == tiles
