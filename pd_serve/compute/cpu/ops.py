"""Compute primitives of the decoders. Plain functions of tensors; no state but packed weights.

What :class:`pd_serve.models.interface.Ops` asks for, and what attention does to heads. Matrices go to oneDNN through
torch; what lies between them are numba kernels: a torch operator costs 2 to 10 us of dispatch, a norm made of six of
them more than its matrix. Inputs are bfloat16 or float32, their elements contiguous in the last dimension; each is
computed in float32.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from pd_serve.compute.cpu.sampling_kernels import near_best
from pd_serve.jit import element_of, exp, kernel, load, load_int, store
from pd_serve.models import interface
from pd_serve.models.interface import Fp8Weight, HeadTransform, Routing

_reorder = torch.ops.mkldnn._reorder_linear_weight
_linear = torch.ops.mkldnn._linear_pointwise
_INT64 = np.int64(0)
_MOST_TIED = 64  # logits of a row: with more of them there is nothing to be settled

offload = None  # weights lie in the host's memory anyway
fp8_weights = False  # no core multiplies them: they are dequantised when they are loaded


class Linear:
    """``x @ weight.T + bias``. The weight is packed once for oneDNN, which doubles the speed of small batches."""

    def __init__(self, weight: Tensor | Fp8Weight, bias: Tensor | None = None) -> None:
        # The packed form is the same whatever number of rows is named here, and serves any number.
        self._weight = _reorder(_plain(weight), 1)
        self._bias = bias

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory; a packed weight has no address that could be asked for."""
        return [self._weight] if self._bias is None else [self._weight, self._bias]

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``."""
        return _linear(x, self._weight, self._bias, "none", [], "")  # type: ignore[no-any-return]


def _plain(weight: Tensor | Fp8Weight) -> Tensor:
    if isinstance(weight, Fp8Weight):
        raise TypeError("matrices come dequantised (fp8_weights)")
    return weight


def settle(logits: Tensor, hidden: Tensor, head: Tensor) -> None:
    """In float32. A product in bfloat16 ends in steps of 0.125 where logits are 16 or more: often the two best are
    equal there, and which of them is taken would be an accident."""
    if hidden.dtype == torch.float32:
        return
    ids, counts = np.empty((len(logits), _MOST_TIED), np.int64), np.empty(len(logits), np.int64)
    near_best(logits.numpy(), torch.finfo(hidden.dtype).eps, ids, counts)
    for row in np.flatnonzero((counts > 1) & (counts <= _MOST_TIED)).tolist():
        tied = torch.from_numpy(ids[row, : counts[row]])
        logits[row, tied] = head[tied].float() @ hidden[row].float()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension. ``weight`` is float32 and as applied (Gemma: 1 + w, added at load).

    ``x [T, D]`` or ``[T, H, D]``, of any row stride. Returns a new, contiguous tensor.
    """
    out = torch.empty(x.shape, dtype=x.dtype)
    heads, head_stride = (x.shape[1], x.stride(1)) if x.dim() == 3 else (1, 0)
    _rms_norm(
        element_of(x.dtype), x.data_ptr(), x.stride(0), heads, head_stride, weight.data_ptr(), out.data_ptr(),
        x.shape[0], x.shape[-1], eps,
    )  # fmt: skip
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x``, and its RMS norm: returns ``(normed, residual)``. Both arguments ``[T, D]`` are overwritten."""
    _add_rms_norm(
        element_of(x.dtype), x.data_ptr(), residual.data_ptr(), weight.data_ptr(), x.shape[0], x.shape[1], eps
    )
    return x, residual


linear = Linear


class Experts:
    """Gated MLPs, one after another, of which each row of a step goes to a few."""

    def __init__(
        self, gate_up: Tensor | Fp8Weight, down: Tensor | Fp8Weight, routing: Routing, activation: str
    ) -> None:
        """See :meth:`pd_serve.models.interface.Ops.experts`."""
        self._gate_up = [Linear(weight) for weight in _plain(gate_up)]
        self._down = [Linear(weight) for weight in _plain(down)]
        self._routing = routing
        self._mul = silu_mul if activation == "silu" else gelu_tanh_mul

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""
        return [tensor for layer in (*self._gate_up, *self._down) for tensor in layer.tensors]

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """``x [T, hidden]``, ``logits [T, experts]``: ``[T, hidden]``. Only experts that have rows are computed."""
        shares, chosen = logits.softmax(-1, dtype=torch.float32).topk(self._routing.per_token)
        if self._routing.normalise:
            shares /= shares.sum(-1, keepdim=True)
        total = torch.zeros(x.shape, dtype=torch.float32)
        for expert in sorted({expert for row in chosen.tolist() for expert in row}):
            rows, nth = torch.where(chosen == expert)
            # filled up with row 0: each number of rows has a kernel of its own in oneDNN, which takes a millisecond
            fed = x[torch.nn.functional.pad(rows, (0, _few_sizes(len(rows)) - len(rows)))]
            made = self._down[expert](self._mul(self._gate_up[expert](fed)))[: len(rows)]
            total.index_add_(0, rows, made.float() * shares[rows, nth, None])
        return total.to(x.dtype)


def _few_sizes(rows: int) -> int:
    """At least ``rows``, and at most an eighth more: one of eight numbers between a power of two and the next."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


experts = Experts


def transform_heads(q: Tensor, k: Tensor, positions: Tensor, transform: HeadTransform) -> tuple[Tensor, Tensor]:
    """Norms each head where there are norms, then rotates: ``(q, k)``, new or overwritten."""
    if transform.q_norm is not None and transform.k_norm is not None:
        q = rms_norm(q, transform.q_norm, transform.eps)
        k = rms_norm(k, transform.k_norm, transform.eps)
    rope_(q, k, positions, transform.cos_sin)
    return q, k


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates ``q [T, Hq, D]`` and ``k [T, Hkv, D]`` in place (halves, as GPT-NeoX). Rows may be apart.

    ``cos_sin [max positions, D]`` float32: cosines in the first half of a row, sines in the second.
    """
    _rope(
        element_of(q.dtype), _INT64, q.data_ptr(), q.stride(0), q.shape[1], k.data_ptr(), k.stride(0), k.shape[1],
        positions.data_ptr(), cos_sin.data_ptr(), q.shape[0], q.shape[2],
    )  # fmt: skip


def gated(gate_up: Tensor, activation: str, down: interface.Linear) -> Tensor:
    """See :meth:`pd_serve.models.interface.Ops.gated`."""
    return down(silu_mul(gate_up) if activation == "silu" else gelu_tanh_mul(gate_up))


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``: returns ``[T, I]``."""
    return _gated(gate_up, 1.0, 0.0)


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up`` of ``[T, 2 I]``: returns ``[T, I]``."""
    # 0.5 (1 + tanh(u)) is sigmoid(2 u), and u = sqrt(2 / pi) (x + 0.044715 x^3)
    return _gated(gate_up, 1.5957691216057308, 1.5957691216057308 * 0.044715)


def _gated(gate_up: Tensor, linear: float, cubic: float) -> Tensor:
    rows, half = gate_up.shape[0], gate_up.shape[1] // 2
    out = torch.empty((rows, half), dtype=gate_up.dtype)
    _gated_mul(element_of(gate_up.dtype), gate_up.data_ptr(), out.data_ptr(), rows, half, linear, cubic)
    return out


@kernel
def _rms_norm(
    element: Any, x: int, stride: int, heads: int, head_stride: int, weight: int, out: int, rows: int, dim: int,
    eps: float,
) -> None:  # fmt: skip
    f32 = np.float32(0)
    for row in range(rows):
        for head in range(heads):
            at, to = row * stride + head * head_stride, (row * heads + head) * dim
            total = np.float32(0)
            for i in range(dim):
                value = load(element, x, at + i)
                total += value * value
            scale = np.float32(1) / np.sqrt(total / np.float32(dim) + np.float32(eps))
            for i in range(dim):
                store(element, out, to + i, load(element, x, at + i) * scale * load(f32, weight, i))


@kernel
def _add_rms_norm(element: Any, x: int, residual: int, weight: int, rows: int, dim: int, eps: float) -> None:
    f32 = np.float32(0)
    for row in range(rows):
        at = row * dim
        for i in range(dim):
            store(element, residual, at + i, load(element, residual, at + i) + load(element, x, at + i))
        total = np.float32(0)
        for i in range(dim):
            value = load(element, residual, at + i)  # as rounded: it is what the next layers see
            total += value * value
        scale = np.float32(1) / np.sqrt(total / np.float32(dim) + np.float32(eps))
        for i in range(dim):
            store(element, x, at + i, load(element, residual, at + i) * scale * load(f32, weight, i))


@kernel
def _rope(
    element: Any, int64: Any, q: int, q_stride: int, q_heads: int, k: int, k_stride: int, k_heads: int,
    positions: int, cos_sin: int, rows: int, dim: int,
) -> None:  # fmt: skip
    f32 = np.float32(0)
    half = dim // 2
    for row in range(rows):
        table = load_int(int64, positions, row) * dim
        for head in range(q_heads + k_heads):
            if head < q_heads:
                x, at = q, row * q_stride + head * dim
            else:
                x, at = k, row * k_stride + (head - q_heads) * dim
            for i in range(half):
                a, b = load(element, x, at + i), load(element, x, at + half + i)
                cos, sin = load(f32, cos_sin, table + i), load(f32, cos_sin, table + half + i)
                store(element, x, at + i, a * cos - b * sin)
                store(element, x, at + half + i, b * cos + a * sin)


@kernel
def _gated_mul(element: Any, gate_up: int, out: int, rows: int, half: int, linear: float, cubic: float) -> None:
    a, b = np.float32(linear), np.float32(cubic)
    for row in range(rows):
        at, to = row * 2 * half, row * half
        for i in range(half):
            gate = load(element, gate_up, at + i)
            sigmoid = np.float32(1) / (np.float32(1) + exp(-gate * (a + b * gate * gate)))
            store(element, out, to + i, gate * sigmoid * load(element, gate_up, at + half + i))
