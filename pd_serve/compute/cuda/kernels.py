"""What lies between a decoder's matrices and its attention, one kernel each: norms, rotation and KV write, activations.

Called by decoders on a GPU; the counterpart of :mod:`pd_serve.compute.cpu.ops`, with the same meaning of each function.
Inputs are bfloat16, float16 or float32, their elements contiguous in the last dimension; each is computed in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pd_serve.compute.cuda.activations import GELU_TANH, SILU, gated
from pd_serve.compute.cuda.fp8 import to_fp8

_TILE = 1024  # elements of a program where the shape leaves a choice


def rms_norm(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> Tensor:
    """RMS norm over the last dimension. ``weight`` is float32 and as applied (Gemma: 1 + w, added at load).

    ``x [T, D]`` or ``[T, H, D]``, of any strides but the last. Returns ``out``, by default a new, contiguous tensor.
    """
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows, heads, dim = (x.shape[0], 1, x.shape[1]) if x.dim() == 2 else x.shape
    if rows:
        block = triton.next_power_of_2(dim)
        _rms_norm[(rows, heads)](
            x, weight, out, dim, eps, x.stride(0), x.stride(-2), out.stride(0), out.stride(-2),
            BLOCK=block, num_warps=_warps(block),
        )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x``, and its RMS norm: returns ``(normed, residual)``. Both arguments ``[T, D]`` are overwritten."""
    rows, dim = x.shape
    if rows:
        block = triton.next_power_of_2(dim)
        _add_rms_norm[(rows,)](
            x, residual, weight, dim, eps, x.stride(0), residual.stride(0), BLOCK=block, num_warps=_warps(block)
        )
    return x, residual


def rotate_and_store(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    positions: Tensor,
    cos_sin: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    q_norm: Tensor | None = None,
    k_norm: Tensor | None = None,
    eps: float = 0.0,
    q_out: Tensor | None = None,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> None:
    """Norms the heads of ``q`` and ``k``, rotates them (halves, as GPT-NeoX), and writes K and V to the pool.

    ``q [T, Hq, D]`` and ``k [T, Hkv, D]`` are overwritten, or the new ``q`` goes to ``q_out`` (XQA wants its rows one
    behind the other); rows of all of them and of ``v [T, Hkv, D]`` may be apart.
    ``positions [T]``. ``cos_sin [max positions, R]`` float32: cosines in the first half of a row, sines in the second;
    elements from R on are not rotated. ``slots [T]``: block * block_size + offset of each token; below 0 nothing is
    written to the pool (rows that fill up a graph). ``k_cache``, ``v_cache [blocks, Hkv, block_size, D]``: one layer of
    the pool, of any strides but the last. ``q_norm``, ``k_norm [D]`` float32, both or none. ``k_scale``, ``v_scale``:
    where the pool is in FP8, what its numbers will be multiplied with.
    """
    tokens, q_heads, dim = q.shape
    if not tokens:
        return
    kv_heads, rotary = k.shape[1], cos_sin.shape[1]
    if k_cache.stride() != v_cache.stride():
        raise ValueError("K and V of a layer must have the same strides in the pool")
    if q_out is None:
        q_out = q
    heads = max(1, _TILE // triton.next_power_of_2(dim))
    normed = q_norm is not None and k_norm is not None
    _rotate_and_store[(tokens, triton.cdiv(q_heads, heads) + triton.cdiv(kv_heads, heads))](
        q, q_out, k, v, positions, cos_sin, slots, k_cache, v_cache,
        q_norm if normed else cos_sin, k_norm if normed else cos_sin, eps, 1.0 / k_scale, 1.0 / v_scale,
        q_heads, kv_heads, *q.stride()[:2], *q_out.stride()[:2], *k.stride()[:2], *v.stride()[:2],
        *k_cache.stride()[:3],
        FP8=k_cache.dtype is torch.float8_e4m3fn,
        DIM=dim, ROTARY=rotary, PAGE=k_cache.shape[2], NORM=normed, HEADS=heads,
        HALF=triton.next_power_of_2(rotary // 2), REST=triton.next_power_of_2(max(1, dim - rotary)),
        ALL=triton.next_power_of_2(dim), num_warps=4,
    )  # fmt: skip


def take_samples(tokens: Tensor, picks: Tensor, samples: Tensor) -> None:
    """``tokens[i] = samples[picks[i]]`` where ``picks[i]`` is not below 0. All int64, ``tokens`` and ``picks [N]``."""
    if len(tokens):
        _take_samples[(triton.cdiv(len(tokens), _TILE),)](tokens, picks, samples, len(tokens), BLOCK=_TILE)


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``: returns ``out [T, I]``, by default a new tensor."""
    return _gated(gate_up, out, *SILU)


def gelu_tanh_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """``gelu_tanh(gate) * up`` of ``[T, 2 I]``: returns ``out [T, I]``, by default a new tensor."""
    return _gated(gate_up, out, *GELU_TANH)


def _gated(gate_up: Tensor, out: Tensor | None, linear: float, cubic: float) -> Tensor:
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    if out is None:
        out = gate_up.new_empty((rows, half))
    if rows:
        _gated_mul[(rows, triton.cdiv(half, _TILE))](
            gate_up, out, half, gate_up.stride(0), out.stride(0), linear, cubic, BLOCK=_TILE, num_warps=4
        )
    return out


def _warps(block: int) -> int:
    return min(16, max(1, block // 512))


@triton.jit
def _rms_norm(
    x: tl.tensor, weight: tl.tensor, out: tl.tensor, dim: tl.tensor, eps: tl.tensor, x_row: tl.tensor,
    x_head: tl.tensor, out_row: tl.tensor, out_head: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    i = tl.arange(0, BLOCK)
    value = tl.load(x + row * x_row + head * x_head + i, i < dim, other=0.0).to(tl.float32)
    value *= tl.rsqrt(tl.sum(value * value) / dim + eps)
    value *= tl.load(weight + i, i < dim, other=0.0)
    tl.store(out + row * out_row + head * out_head + i, value.to(out.dtype.element_ty), i < dim)


@triton.jit
def _add_rms_norm(
    x: tl.tensor, residual: tl.tensor, weight: tl.tensor, dim: tl.tensor, eps: tl.tensor, x_row: tl.tensor,
    residual_row: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    x += row * x_row + i
    residual += row * residual_row + i
    total = tl.load(x, i < dim, other=0.0).to(tl.float32) + tl.load(residual, i < dim, other=0.0).to(tl.float32)
    rounded = total.to(residual.dtype.element_ty)
    tl.store(residual, rounded, i < dim)
    value = rounded.to(tl.float32)  # as rounded: it is what the next layers see
    value *= tl.rsqrt(tl.sum(value * value) / dim + eps)
    value *= tl.load(weight + i, i < dim, other=0.0)
    tl.store(x, value.to(x.dtype.element_ty), i < dim)


@triton.jit
def _rotate_and_store(
    q: tl.tensor, q_out: tl.tensor, k: tl.tensor, v: tl.tensor, positions: tl.tensor, cos_sin: tl.tensor,
    slots: tl.tensor, k_cache: tl.tensor, v_cache: tl.tensor, q_norm: tl.tensor, k_norm: tl.tensor, eps: tl.tensor,
    k_factor: tl.tensor, v_factor: tl.tensor,
    q_heads: tl.tensor, kv_heads: tl.tensor, q_row: tl.tensor, q_head: tl.tensor, out_row: tl.tensor,
    out_head: tl.tensor, k_row: tl.tensor, k_head: tl.tensor, v_row: tl.tensor, v_head: tl.tensor,
    block_stride: tl.tensor, head_stride: tl.tensor, token_stride: tl.tensor,
    FP8: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, PAGE: tl.constexpr, NORM: tl.constexpr,
    HEADS: tl.constexpr, HALF: tl.constexpr, REST: tl.constexpr, ALL: tl.constexpr,
) -> None:  # fmt: skip
    token, group = tl.program_id(0).to(tl.int64), tl.program_id(1)
    q_groups = tl.cdiv(q_heads, HEADS)
    table = cos_sin + tl.load(positions + token).to(tl.int64) * ROTARY
    head = tl.arange(0, HEADS)
    if group < q_groups:
        head += group * HEADS
        at = q + token * q_row + (head * q_head)[:, None]
        turned = q_out + token * out_row + (head * out_head)[:, None]
        exists = (head < q_heads)[:, None]
        _rotate(
            at, turned, turned, exists, exists, table, q_norm, eps, 1.0, False, False, DIM, ROTARY, NORM, HALF, REST
        )
    else:
        head += (group - q_groups) * HEADS
        exists = (head < kv_heads)[:, None]
        slot = tl.load(slots + token).to(tl.int64)
        place = (slot // PAGE) * block_stride + (slot % PAGE) * token_stride + (head * head_stride)[:, None]
        stored = exists & (slot >= 0)
        at = k + token * k_row + (head * k_head)[:, None]
        to = k_cache + place  # of another type than what is rotated: a name of its own
        _rotate(at, at, to, exists, stored, table, k_norm, eps, k_factor, True, FP8, DIM, ROTARY, NORM, HALF, REST)
        i = tl.arange(0, ALL)[None, :]
        value = tl.load(v + token * v_row + (head * v_head)[:, None] + i, exists & (i < DIM), other=0.0)
        tl.store(v_cache + place + i, _kept(value, v_factor, v_cache.dtype.element_ty, FP8), stored & (i < DIM))


@triton.jit
def _rotate(
    x: tl.tensor, out: tl.tensor, cache: tl.tensor, exists: tl.tensor, stored: tl.tensor, table: tl.tensor,
    norm: tl.tensor, eps: tl.tensor, factor: tl.tensor,
    CACHE: tl.constexpr, FP8: tl.constexpr, DIM: tl.constexpr, ROTARY: tl.constexpr, NORM: tl.constexpr,
    HALF: tl.constexpr, REST: tl.constexpr,
) -> None:  # fmt: skip
    """Heads at ``x [HEADS, 1]``, to ``out`` and, where ``stored``, to ``cache`` (addresses all of them)."""
    half: tl.constexpr = ROTARY // 2
    i = tl.arange(0, HALF)[None, :]
    inside = exists & (i < half)
    a = tl.load(x + i, inside, other=0.0).to(tl.float32)
    b = tl.load(x + half + i, inside, other=0.0).to(tl.float32)
    j = ROTARY + tl.arange(0, REST)[None, :]  # what is not rotated
    beyond = exists & (j < DIM)
    if DIM > ROTARY:
        c = tl.load(x + j, beyond, other=0.0).to(tl.float32)
    if NORM:
        squares = tl.sum(a * a, 1) + tl.sum(b * b, 1)
        if DIM > ROTARY:
            squares += tl.sum(c * c, 1)
        scale = tl.rsqrt(squares / DIM + eps)[:, None]
        a *= scale * tl.load(norm + i, i < half, other=0.0)
        b *= scale * tl.load(norm + half + i, i < half, other=0.0)
        if DIM > ROTARY:
            c *= scale * tl.load(norm + j, j < DIM, other=0.0)
    cos = tl.load(table + i, i < half, other=0.0)
    sin = tl.load(table + half + i, i < half, other=0.0)
    element = out.dtype.element_ty
    cached = cache.dtype.element_ty
    first, second = (a * cos - b * sin).to(element), (b * cos + a * sin).to(element)
    tl.store(out + i, first, inside)
    tl.store(out + half + i, second, inside)
    if CACHE:
        tl.store(cache + i, _kept(first, factor, cached, FP8), stored & (i < half))
        tl.store(cache + half + i, _kept(second, factor, cached, FP8), stored & (i < half))
    if DIM > ROTARY:
        tl.store(out + j, c.to(element), beyond)
        if CACHE:
            tl.store(cache + j, _kept(c.to(element), factor, cached, FP8), stored & (j < DIM))


@triton.jit
def _kept(value: tl.tensor, factor: tl.tensor, dtype: tl.constexpr, FP8: tl.constexpr) -> tl.tensor:
    """As the pool has it."""
    if FP8:
        return to_fp8(value.to(tl.float32), factor)
    else:
        return value.to(dtype)


@triton.jit
def _gated_mul(
    gate_up: tl.tensor, out: tl.tensor, half: tl.tensor, row_stride: tl.tensor, out_stride: tl.tensor,
    linear: tl.tensor, cubic: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate_up += row * row_stride + i
    gate = tl.load(gate_up, i < half, other=0.0).to(tl.float32)
    up = tl.load(gate_up + half, i < half, other=0.0).to(tl.float32)
    value = gated(gate, up, linear, cubic)
    tl.store(out + row * out_stride + i, value.to(out.dtype.element_ty), i < half)


@triton.jit
def _take_samples(
    tokens: tl.tensor, picks: tl.tensor, samples: tl.tensor, number: tl.tensor,
    BLOCK: tl.constexpr,
) -> None:  # fmt: skip
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pick = tl.load(picks + i, i < number, other=-1)
    tl.store(tokens + i, tl.load(samples + pick, pick >= 0, other=0), pick >= 0)
