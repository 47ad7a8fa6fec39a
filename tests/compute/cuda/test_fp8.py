"""Inputs in FP8, and products of two matrices in FP8, against float32: odd sizes, all scales, strange rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compute.cuda.device import DEVICE, INTERPRETED, error, skip_without_gpu

skip_without_gpu()

from pd_serve.compute.cuda import fp8  # noqa: E402
from pd_serve.compute.cuda.activations import GELU_TANH, SILU, Activation  # noqa: E402
from pd_serve.compute.cuda.matrix import Matrix  # noqa: E402
from pd_serve.models.fp8 import FP8, MAX  # noqa: E402
from pd_serve.models.quantization import BLOCK  # noqa: E402
from tests.compute.cuda.fp8_weights import meant, random_fp8  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPE = torch.float16 if INTERPRETED else torch.bfloat16
SHAPES = [(48, 256), (200, 328)] if INTERPRETED else [(64, 128), (1000, 4104), (4096, 4096)]
ROWS = (1, 70) if INTERPRETED else (1, 5, 64, 129, 700)


def inputs(rows: int, k: int) -> Tensor:
    """Rows apart, of very different sizes; one of zeros, if there are several."""
    x = torch.randn(rows, k + 16, device=DEVICE) * torch.logspace(-2, 2, rows, device=DEVICE)[:, None]
    if rows > 2:
        x[1] = 0.0
    return x.to(DTYPE)[:, :k]


def dequantised(values: Tensor, scales: Tensor) -> Tensor:
    if scales.shape[1] == 1:
        return values.float() * scales
    return values.float() * scales.repeat_interleave(BLOCK, 1)[:, : values.shape[1]]


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("k", [128, 328, 4104])
def test_inputs(k: int, blocks: bool) -> None:
    weight = Matrix.of(random_fp8(16, k, blocks=blocks))
    for rows in ROWS:
        x = inputs(rows, k)
        values, scales = fp8.quantise(x, weight)
        assert values.dtype is FP8 and scales.shape == (rows, -(-k // BLOCK) if blocks else 1)
        assert not blocks or scales.stride(0) == 1
        if blocks:
            padded, its = fp8.quantise(x, weight, pad=4)
            assert len(padded) == len(its) == -(-rows // 4) * 4
            assert torch.equal(padded[:rows].view(torch.uint8), values.view(torch.uint8))
            assert torch.equal(its[:rows], scales)
        wanted = x.float()
        found = dequantised(values, scales)
        assert error(found, wanted) < (0.2 if INTERPRETED else 0.04)  # the interpreter makes 1 of 1.945
        if not INTERPRETED:
            # half of the step between neighbours, which near 0 are 2**-9 apart
            step = torch.maximum(wanted.abs() / 15.5, dequantised(torch.full_like(values, 2.0**-9), scales))
            assert ((found - wanted).abs() <= step).all()
        if rows > 2:
            assert not values[1].float().any()


def test_a_scale_of_the_checkpoints_and_what_is_beyond_it() -> None:
    x = torch.tensor([[1.0, -3.0, 500.0, -1e4, 0.0, 0.5, 2.0, 4.0]], device=DEVICE).to(DTYPE)
    values, scales = fp8.quantise(x, Matrix.of(random_fp8(16, 8, blocks=False, input_scale=0.5)))
    assert scales.tolist() == [[0.5]]
    assert values.float().tolist() == [[2.0, -6.0, MAX, -MAX, 0.0, 1.0, 4.0, 8.0]]


@pytest.mark.parametrize("act", [SILU, GELU_TANH])
@pytest.mark.parametrize("blocks", [False, True])
def test_inputs_that_are_computed_on_the_way(blocks: bool, act: Activation) -> None:
    k = 328
    weight = Matrix.of(random_fp8(16, k, blocks=blocks))
    gate_up = torch.randn(9, 2 * k + 8, device=DEVICE).mul_(3).to(DTYPE)[:, : 2 * k]
    gate, up = gate_up.float().chunk(2, -1)
    gelu = torch.nn.functional.gelu(gate, approximate="tanh")
    wanted = (torch.nn.functional.silu(gate) if act == SILU else gelu) * up
    found = dequantised(*fp8.quantise(gate_up, weight, act))
    assert error(found, wanted) < (0.2 if INTERPRETED else 0.04)


@pytest.mark.parametrize("input_scale", [None, 0.25])
@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("tile", fp8.TILES[:1] if INTERPRETED else fp8.TILES, ids=str)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products(n: int, k: int, tile: fp8.GemmTile, blocks: bool, input_scale: float | None) -> None:
    if blocks and input_scale is not None:
        pytest.skip("no checkpoint has that")
    kept = random_fp8(n, k, blocks=blocks, input_scale=input_scale)
    weight, its = Matrix.of(kept), meant(kept)
    for rows in ROWS:
        x = inputs(rows, k)
        added = torch.randn(n, device=DEVICE).to(DTYPE) if rows % 2 else None
        out = torch.full((rows, n + 8), torch.nan, device=DEVICE, dtype=DTYPE)[:, :n]
        fp8.multiply(x, weight, added, out, tile)
        wanted = dequantised(*fp8.quantise(x, weight)) @ its.t()
        wanted = wanted if added is None else wanted + added.float()
        assert error(out, wanted) < 5e-3  # tensor cores sum products of FP8 with fewer bits than float32 has


@pytest.mark.skipif(INTERPRETED, reason="needs a GPU")
@pytest.mark.parametrize("blocks", [False, True])
def test_torchs_product(blocks: bool) -> None:
    kept = random_fp8(1024, 2048, blocks=blocks)
    weight, its = Matrix.of(kept), meant(kept)
    for rows in (1, 3, 33, 500):
        x = inputs(rows, 2048)
        out = torch.full((rows, 1024), torch.nan, device=DEVICE, dtype=DTYPE)
        fp8.by_torch(x, weight, None, out)
        assert error(out, dequantised(*fp8.quantise(x, weight)) @ its.t()) < 5e-3
