"""Compute primitives of the decoders. Plain functions of tensors; no state but packed weights."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class Linear:
    """``x @ weight.T + bias``. Packs the weight once for the device where that makes it faster."""

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.weight = weight  # [out, in]
        self.bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """``[T, in] -> [T, out]``."""
        return F.linear(x, self.weight, self.bias)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, computed in float32. Weight as applied (Gemma: 1 + w, added at load)."""
    h = x.float()
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return (h * weight.float()).to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``residual + x``, and its RMS norm: returns ``(normed, residual)``."""
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def rope_(q: Tensor, k: Tensor, positions: Tensor, cos_sin: Tensor) -> None:
    """Rotates ``q [T, Hq, D]`` and ``k [T, Hkv, D]`` in place (halves, as GPT-NeoX).

    ``cos_sin [max positions, D]`` float32: cosines in the first half of a row, sines in the second.
    """
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    for x in (q, k):
        a, b = x.float().chunk(2, dim=-1)
        x.copy_(torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1))


def silu_mul(gate_up: Tensor) -> Tensor:
    """``silu(gate) * up`` of ``[T, 2 I]``: returns ``[T, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def gelu_tanh_mul(gate_up: Tensor) -> Tensor:
    """``gelu_tanh(gate) * up`` of ``[T, 2 I]``: returns ``[T, I]``."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh") * up
