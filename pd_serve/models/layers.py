"""Layers of decoders: what attends, and what computes between. Weights and order; how is the device's.

A decoder layer is a norm, something that attends, a norm, and something that does not: other kinds (latent attention)
are further classes here with the same calls.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pd_serve.models.interface import Attention, Experts, HeadTransform, Linear, Ops


class Attends(Protocol):
    """The attending part of a layer."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""

    def __call__(self, x: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        """Normed ``x [T, hidden]`` -> ``[T, hidden]``, or only ``rows`` of it."""


class Mlp(Protocol):
    """The other part: each row for itself."""

    @property
    def tensors(self) -> list[Tensor]:
        """What it holds in memory."""

    def __call__(self, x: Tensor) -> Tensor:
        """Normed ``x [T, hidden]`` -> ``[T, hidden]``."""


class GroupedQueryAttention:
    """Heads of q share those of k and v (Ainslie et al., 2023; with as many of both it is multi-head attention)."""

    def __init__(
        self, layer: int, qkv: Linear, output: Linear, transform: HeadTransform, num_heads: int, head_dim: int
    ) -> None:
        """``qkv``: rows of all of q, all of k, all of v."""
        self._layer = layer
        self.qkv = qkv
        self.output = output
        self.transform = transform
        self._num_heads = num_heads
        self._head_dim = head_dim

    @property
    def tensors(self) -> list[Tensor]:
        transform = [part for part in self.transform if isinstance(part, Tensor)]
        return [*self.qkv.tensors, *self.output.tensors, *transform]

    def __call__(self, x: Tensor, positions: Tensor, attention: Attention, rows: Tensor | None) -> Tensor:
        heads = self.qkv(x).view(len(x), -1, self._head_dim)
        first_k = self._num_heads
        first_v = (first_k + heads.shape[1]) // 2
        mixed = attention(
            self._layer, heads[:, :first_k], heads[:, first_k:first_v], heads[:, first_v:], positions, self.transform
        )
        return self.output(mixed if rows is None else mixed[rows])


class GatedMlp:
    """``down(act(gate(x)) * up(x))`` (Shazeer, 2020)."""

    def __init__(self, ops: Ops, gate_up: Linear, down: Linear, activation: str) -> None:
        """``gate_up``: rows of all of gate, all of up. ``activation``: "silu" or "gelu_tanh"."""
        self.gate_up = gate_up
        self.down = down
        self._ops = ops
        self._activation = activation

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.gate_up.tensors, *self.down.tensors]

    def __call__(self, x: Tensor) -> Tensor:
        return self._ops.gated(self.gate_up(x), self._activation, self.down)


class SparseMoe:
    """Gated MLPs of which each row goes to a few, as a linear layer, the router, says."""

    def __init__(self, router: Linear, experts: Experts) -> None:
        """``router``: an output for each expert."""
        self.router = router
        self.experts = experts

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.router.tensors, *self.experts.tensors]

    def __call__(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x))


@dataclass
class DecoderLayer:
    """Norm weights are float32 and as applied; those after a part are Gemma's."""

    input_norm: Tensor
    attention: Attends
    post_attention_norm: Tensor | None
    mlp_norm: Tensor
    mlp: Mlp
    post_mlp_norm: Tensor | None

    @property
    def tensors(self) -> list[Tensor]:
        norms = (self.input_norm, self.post_attention_norm, self.mlp_norm, self.post_mlp_norm)
        return [*(norm for norm in norms if norm is not None), *self.attention.tensors, *self.mlp.tensors]
