"""Which of a checkpoint's matrices lie in which of a layer's, one after another. No torch here.

Used by :mod:`pd_serve.models.weights`, which owns all other names.
"""

from __future__ import annotations

from typing import NamedTuple

from pd_serve.models.config import ModelConfig


class Stack(NamedTuple):
    """Rows of all ``parts``, one after another."""

    parts: list[tuple[str, int]]  # a module of the checkpoint and its rows
    columns: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows in self.parts)


def stacks(config: ModelConfig, layer: int, at: str) -> dict[str, list[Stack]]:
    """A layer's, by names of :data:`pd_serve.config.LAYER_MATRICES`; ``at``: what its modules' names begin with.

    Experts have two: gate and up of each, and down of each.
    """
    c, hidden = config, config.hidden_size
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    found = {
        "qkv": [Stack([(f"{at}self_attn.{x}_proj", rows) for x, rows in (("q", q), ("k", kv), ("v", kv))], hidden)],
        "o": [Stack([(f"{at}self_attn.o_proj", hidden)], q)],
    }
    if c.experts is None or layer not in c.experts.layers:
        found["gate_up"] = [Stack([(f"{at}mlp.{x}_proj", c.intermediate_size) for x in ("gate", "up")], hidden)]
        found["down"] = [Stack([(f"{at}mlp.down_proj", hidden)], c.intermediate_size)]
        return found
    size, each = c.experts.intermediate_size, [f"{at}mlp.experts.{i}." for i in range(c.experts.count)]
    found["experts"] = [
        Stack([(f"{name}{x}_proj", size) for name in each for x in ("gate", "up")], hidden),
        Stack([(f"{name}down_proj", hidden) for name in each], size),
    ]
    return found
