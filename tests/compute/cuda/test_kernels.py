"""Kernels against torch in float32, on sizes that fill no tile."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.compute.cuda.device import DEVICE, INTERPRETED, error, same, skip_without_gpu, tolerance

skip_without_gpu()

from pd_serve.compute.cuda import kernels  # noqa: E402

pytestmark = pytest.mark.gpu

DTYPES = (torch.bfloat16, torch.float32)
EPS = 1e-6


def normed(x: Tensor, weight: Tensor) -> Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 576), (7, 4096), (133, 640), (3, 5000)])
def test_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    x = torch.randn(rows, dim + 24, device=DEVICE).to(dtype)[:, :dim]  # rows apart
    weight = torch.randn(dim, device=DEVICE)
    assert error(kernels.rms_norm(x, weight, EPS), normed(x, weight)) < tolerance(dtype)


def test_rms_norm_of_heads() -> None:
    heads = torch.randn(5, 12, 64, device=DEVICE)[:, 3:10]
    weight = torch.randn(64, device=DEVICE)
    assert error(kernels.rms_norm(heads, weight, EPS), normed(heads, weight)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 4096), (33, 576), (5, 2304)])
def test_add_rms_norm(rows: int, dim: int, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(rows, dim, device=DEVICE).to(dtype) for _ in range(2))
    weight = torch.randn(dim, device=DEVICE)
    total = (x.float() + residual.float()).to(dtype)
    y, after = kernels.add_rms_norm(x, residual, weight, EPS)
    assert y is x
    assert after is residual
    assert same(after, total)
    assert error(y, normed(total, weight)) < tolerance(dtype)


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    half = cos_sin.shape[1] // 2
    cos, sin = cos_sin[:, None, :half], cos_sin[:, None, half:]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "q_heads", "kv_heads", "dim", "rotary", "page", "norm"),
    [
        (1, 32, 8, 128, 128, 16, False),
        (37, 9, 3, 64, 64, 16, False),
        (5, 4, 1, 256, 256, 64, True),
        (3, 14, 2, 128, 128, 64, True),
        (2, 5, 5, 96, 32, 16, True),
        (2, 5, 5, 96, 32, 16, False),
    ],
)
def test_rotate_and_store(
    tokens: int, q_heads: int, kv_heads: int, dim: int, rotary: int, page: int, norm: bool,
    slot_dtype: torch.dtype, dtype: torch.dtype,
) -> None:  # fmt: skip
    blocks, layers, layer = tokens + 2, 3, 1
    heads = torch.randn(tokens, q_heads + 2 * kv_heads, dim, device=DEVICE).to(dtype)
    before = heads.float().clone()
    q, k, v = heads.split((q_heads, kv_heads, kv_heads), 1)
    cos_sin = torch.randn(50, rotary, device=DEVICE)
    positions = torch.randint(50, (tokens,), device=DEVICE)
    pool = torch.full((blocks, layers, 2, kv_heads, page, dim), 7.0, device=DEVICE, dtype=dtype)
    slots = torch.randperm(blocks * page, device=DEVICE)[:tokens].to(slot_dtype)
    slots[tokens // 2] = -1 if tokens > 1 else slots[0]
    weights = [torch.randn(dim, device=DEVICE) for _ in range(2)] if norm else [None, None]
    q_out = torch.full_like(q, torch.nan) if tokens % 2 else None  # of its own, or in place
    kernels.rotate_and_store(
        q, k, v, positions, cos_sin, slots, pool[:, layer, 0], pool[:, layer, 1],
        q_norm=weights[0], k_norm=weights[1], eps=EPS, q_out=q_out,
    )  # fmt: skip

    expected_q, expected_k, expected_v = before.split((q_heads, kv_heads, kv_heads), 1)
    if weights[0] is not None and weights[1] is not None:
        expected_q, expected_k = normed(expected_q, weights[0]), normed(expected_k, weights[1])
    expected_q, expected_k = (rotated(x, cos_sin[positions]) for x in (expected_q, expected_k))
    if q_out is not None:
        assert torch.equal(q, before.to(dtype)[:, :q_heads])
        q = q_out
    assert error(q, expected_q) < tolerance(dtype)
    assert error(k, expected_k) < tolerance(dtype)
    assert torch.equal(v.float(), expected_v)
    expected = torch.full_like(pool, 7.0)
    for token, slot in enumerate(slots.tolist()):
        if slot >= 0:
            expected[slot // page, layer, 0, :, slot % page] = k[token]
            expected[slot // page, layer, 1, :, slot % page] = v[token]
    assert torch.equal(pool, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_storing_in_fp8(dtype: torch.dtype) -> None:
    tokens, heads, dim, rotary, page, scales = 9, 3, 96, 32, 16, (0.25, 2.0)
    q, k, v = (torch.randn(tokens, heads, dim, device=DEVICE).to(dtype) for _ in range(3))
    v[0, 0, :2] = torch.tensor([1e4, -1e4])  # beyond what there is
    cos_sin = torch.randn(50, rotary, device=DEVICE)
    pool = torch.zeros((2, 2, heads, page, dim), device=DEVICE, dtype=torch.float8_e4m3fn)
    slots = torch.randperm(2 * page, device=DEVICE)[:tokens]
    kernels.rotate_and_store(
        q, k, v, torch.arange(tokens, device=DEVICE), cos_sin, slots, pool[:, 0], pool[:, 1],
        k_scale=scales[0], v_scale=scales[1],
    )  # fmt: skip
    for token, slot in enumerate(slots.tolist()):
        for part, x, scale in zip((0, 1), (k, v), scales, strict=True):
            found = pool[slot // page, part, :, slot % page].float()
            wanted = (x[token].float() / scale).clamp(-448, 448)
            assert error(found, wanted) < (0.2 if INTERPRETED else 0.04)  # the interpreter makes 1 of 1.945
            if not INTERPRETED:
                assert torch.equal(found, wanted.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "half"), [(1, 14336), (17, 1536), (3, 1100)])
def test_gated(rows: int, half: int, dtype: torch.dtype) -> None:
    gate_up = torch.randn(rows, 2 * half, device=DEVICE).mul_(3).to(dtype)
    gate, up = gate_up.float().chunk(2, -1)
    silu = torch.nn.functional.silu(gate) * up
    gelu = torch.nn.functional.gelu(gate, approximate="tanh") * up
    assert error(kernels.silu_mul(gate_up), silu) < tolerance(dtype)
    assert error(kernels.gelu_tanh_mul(gate_up), gelu) < tolerance(dtype)


def test_samples_of_the_step_before_are_tokens_of_this_one() -> None:
    tokens = torch.arange(100, 2100, device=DEVICE)
    samples = torch.arange(5000, 5300, device=DEVICE)
    picks = torch.where(torch.arange(2000) % 3 == 0, -1, torch.arange(2000) % 300).to(DEVICE)
    expected = torch.where(picks < 0, tokens, samples[picks.clamp_min(0)])
    kernels.take_samples(tokens, picks, samples)
    assert torch.equal(tokens, expected)
