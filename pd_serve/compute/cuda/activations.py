"""Activations of gated MLPs, for kernels that compute them on the way: ``act(gate) * up``."""

from __future__ import annotations

import triton
import triton.language as tl

Activation = tuple[float, float]  # gate * sigmoid(gate * (first + second * gate^2))
SILU: Activation = (1.0, 0.0)
# 0.5 (1 + tanh(u)) is sigmoid(2 u), and u = sqrt(2 / pi) (x + 0.044715 x^3)
GELU_TANH: Activation = (1.5957691216057308, 1.5957691216057308 * 0.044715)


def named(name: str) -> Activation:
    """ "silu" or "gelu_tanh"."""
    return {"silu": SILU, "gelu_tanh": GELU_TANH}[name]


@triton.jit
def gated(gate: tl.tensor, up: tl.tensor, linear: tl.tensor, cubic: tl.tensor) -> tl.tensor:
    """``act(gate) * up`` in float32."""
    return gate / (1 + tl.exp(-gate * (linear + cubic * gate * gate))) * up
