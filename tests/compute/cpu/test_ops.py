"""The kernels between the matrices compute what plain torch computes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pd_serve.compute.cpu import ops
from pd_serve.models.interface import Routing

DTYPES = [torch.float32, torch.bfloat16]
ROWS = [1, 3, 70]


def close(found: torch.Tensor, expected: torch.Tensor) -> None:
    """``expected`` in float64: off by rounding to the dtype of ``found`` at most."""
    tolerance = {torch.float32: 4e-6, torch.bfloat16: 2.0**-8}[found.dtype]
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=tolerance)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: torch.dtype, rows: int, bias: bool) -> None:
    weight, added = random(48, 72, dtype=dtype), random(48, dtype=dtype, seed=1) if bias else None
    x = random(rows, 72, dtype=dtype, seed=2)
    found = ops.Linear(weight, added)(x)
    assert found.dtype == dtype and found.shape == (rows, 48)
    expected = F.linear(x.double(), weight.double(), None if added is None else added.double())
    torch.testing.assert_close(found.double(), expected, atol=1e-5 if dtype == torch.float32 else 0.05, rtol=0.01)


def test_of_logits_that_rounding_makes_equal_the_best_is_found() -> None:
    head, hidden = random(4096, 64, dtype=torch.bfloat16) * 0.5, random(1000, 64, dtype=torch.bfloat16, seed=1) * 2
    exact = hidden.double() @ head.double().T
    rounded = (hidden @ head.T).float()
    logits = rounded.clone()
    ops.settle(logits, hidden, head)
    best = exact.argmax(1)
    assert (rounded.argmax(1) != best).sum() > 5
    assert torch.equal(logits.argmax(1), best)
    far = rounded < rounded.amax(1, keepdim=True) * (1 - 2.0**-6)
    assert torch.equal(logits[far], rounded[far])
    torch.testing.assert_close(logits.double(), exact, atol=0.2, rtol=2.0**-7)


def test_where_all_logits_are_equal_there_is_nothing_to_settle() -> None:
    logits = torch.zeros(3, 100_000)
    ops.settle(logits, torch.ones(3, 8, dtype=torch.bfloat16), torch.ones(100_000, 8, dtype=torch.bfloat16))
    assert not logits.any()
    ops.settle(logits[:0], torch.ones(0, 8, dtype=torch.bfloat16), torch.ones(100_000, 8, dtype=torch.bfloat16))


@pytest.mark.parametrize("normalise", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
@pytest.mark.parametrize("rows", [0, *ROWS])
def test_experts(rows: int, activation: str, normalise: bool) -> None:
    gate_up, down = random(6, 2 * 40, 72) * 0.2, random(6, 72, 40, seed=1) * 0.2
    x, logits = random(rows, 72, seed=2), random(rows, 6, seed=3)
    logits[:, 4] = -9.0  # an expert that nobody has
    found = ops.experts(gate_up, down, Routing(2, normalise), activation)(x, logits)
    expected = torch.zeros(rows, 72, dtype=torch.float64)
    for row in range(rows):
        share, chosen = logits[row].double().softmax(0).topk(2)
        for part, expert in zip(share / share.sum() if normalise else share, chosen.tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[row].double()).chunk(2)
            gate = F.silu(gate) if activation == "silu" else F.gelu(gate, approximate="tanh")
            expected[row] += part * (down[expert].double() @ (gate * up))
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)


def test_numbers_of_rows_of_experts_are_few() -> None:
    sizes = [ops._few_sizes(rows) for rows in range(1, 4097)]
    assert all(rows <= size <= rows * 1.125 for rows, size in enumerate(sizes, 1))
    assert len(set(sizes)) < 90


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_rms_norm(dtype: torch.dtype, rows: int) -> None:
    x, weight = random(rows, 72, dtype=dtype), random(72, seed=1)
    close(ops.rms_norm(x, weight, 1e-3), F.rms_norm(x.double(), (72,), weight.double(), 1e-3))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rms_norm_of_heads_that_are_views(dtype: torch.dtype) -> None:
    x, weight = random(5, 6, 40, dtype=dtype), random(40, seed=1)
    heads = x[:, 2:5]
    found = ops.rms_norm(heads, weight, 1e-6)
    assert found.is_contiguous()
    close(found, F.rms_norm(heads.double(), (40,), weight.double(), 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_add_rms_norm(dtype: torch.dtype, rows: int) -> None:
    x, residual, weight = random(rows, 72, dtype=dtype), random(rows, 72, dtype=dtype, seed=1), random(72, seed=2)
    total = (x.float() + residual.float()).to(dtype)
    normed, kept = ops.add_rms_norm(x, residual, weight, 1e-5)
    assert torch.equal(kept, total)
    close(normed, F.rms_norm(total.double(), (72,), weight.double(), 1e-5))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [24, 64])
def test_rope_rotates_queries_and_keys_in_place(dtype: torch.dtype, head_dim: int) -> None:
    heads = random(7, 9, head_dim, dtype=dtype)
    before = heads.clone().double()
    angles = random(50, head_dim // 2, seed=1) * 3
    positions = torch.tensor([4, 0, 49, 7, 7, 12, 3])
    ops.rope_(heads[:, :5], heads[:, 5:7], positions, torch.cat((angles.cos(), angles.sin()), dim=1))
    cos, sin = angles[positions].double().cos()[:, None], angles[positions].double().sin()[:, None]
    a, b = before.chunk(2, dim=-1)
    close(heads[:, :7], torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)[:, :7])
    assert torch.equal(heads[:, 7:].double(), before[:, 7:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", ROWS)
def test_gates(dtype: torch.dtype, rows: int) -> None:
    x = random(rows, 96, dtype=dtype) * 6
    x[0, :4] = torch.tensor([-200.0, 200.0, 0.0, -30.0], dtype=dtype)  # exp must not overflow
    gate, up = x.double().chunk(2, dim=1)
    close(ops.silu_mul(x), F.silu(gate) * up)
    close(ops.gelu_tanh_mul(x), F.gelu(gate, approximate="tanh") * up)


def test_bfloat16_is_rounded_to_nearest_even() -> None:
    ones = torch.ones(1, 8, dtype=torch.bfloat16)
    # 1 + 2^-8 lies halfway between 1 and 1 + 2^-7, 1 + 3 * 2^-8 halfway above that
    residual = torch.zeros(1, 8, dtype=torch.bfloat16)
    weight = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-16, 1.0, -1 - 2**-8, 2.0, 3.0, 4.0])
    normed, _ = ops.add_rms_norm(ones, residual, weight, 0.0)
    expected = torch.tensor([[1.0, 1 + 2**-6, 1 + 2**-7, 1.0, -1.0, 2.0, 3.0, 4.0]])
    assert torch.equal(normed.float(), expected)
