"""A rank's share of a model under tensor parallelism (Megatron-LM, Shoeybi et al., 2019, arXiv:1909.08053).

Heads, and the inner rows of MLPs and experts, are dealt evenly; what makes them (q, k, v, gate, up) is cut by rows,
what sums over them (o, down) by columns, and the sum over ranks follows. Logits are cut by vocabulary where that
divides. Norms, embeddings and the routers of experts are whole on every rank, and so is a KV head on each of the ranks
whose heads look at it, where there are fewer of them than ranks.

:class:`Shard` stands between a checkpoint and the loader: it answers with the rank's part of a tensor, a view of the
mapped file, so that a rank reads its own bytes only.
"""

from __future__ import annotations

import re
from typing import Protocol

import torch
from torch import Tensor

from pd_serve.models.config import ModelConfig

_PART = re.compile(r"\.(q|k|v|o|gate|up|down)_proj\.(weight|bias|weight_scale|weight_scale_inv)$")
_KV = re.compile(r"\.[kv]_proj\.")
_BY_ROWS = frozenset(("q", "k", "v", "gate", "up"))
_FUSED_GATE_UP, _FUSED_DOWN = ".experts.gate_up_proj", ".experts.down_proj"


class TensorSource(Protocol):
    """Named tensors of a checkpoint."""

    names: set[str] | None  # None: whatever is asked for exists

    def get(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor:
        """The tensor on the CPU, perhaps mapped from a file; it may have another dtype. Not to be written to.

        ``in_fp8``: so a tensor that has to be made up shall be.
        """


class Shard:
    """A :class:`TensorSource` of a rank's parts of another's tensors. Shapes that are asked for are those of parts."""

    def __init__(self, source: TensorSource, config: ModelConfig) -> None:
        """``config``: the rank's (:meth:`ModelConfig.for_rank`)."""
        self.names = source.names
        self._source = source
        self._rank, self._ranks = config.rank, config.ranks
        self._kv_parts = min(config.ranks, config.total_kv_heads or config.ranks)
        self._head_rows = config.head_rows < config.vocab_size
        self._blocks = config.quantization is not None and config.quantization.blocks

    def get(self, name: str, shape: tuple[int, ...], *, in_fp8: bool = False) -> Tensor:
        dim = self._cut(name)
        parts = self._kv_parts if _KV.search(name) else self._ranks
        whole = tuple(size * (parts if at == dim else 1) for at, size in enumerate(shape))
        tensor = self._source.get(name, whole, in_fp8=in_fp8)
        if dim is None:
            # the bias of a sum over ranks is added once
            once = name.endswith(("o_proj.bias", "down_proj.bias"))
            return torch.zeros_like(tensor) if once and self._rank else tensor
        if tensor.dim() <= dim or tensor.shape[dim] % parts:
            return tensor  # a scale of all rows, or what is refused for its shape
        if name.endswith(_FUSED_GATE_UP):
            halves = tensor.view(len(tensor), 2, -1, tensor.shape[-1])
            return self._part(halves, 2, parts).reshape(len(tensor), -1, tensor.shape[-1])
        return self._part(tensor, dim, parts)

    def _part(self, tensor: Tensor, dim: int, parts: int) -> Tensor:
        size = tensor.shape[dim] // parts
        return tensor.narrow(dim, self._rank * parts // self._ranks * size, size)

    def _cut(self, name: str) -> int | None:
        """Along which dimension; None: not at all."""
        if name.endswith(_FUSED_GATE_UP):
            return 1
        if name.endswith(_FUSED_DOWN):
            return 2
        if name.endswith("lm_head.weight"):
            return 0 if self._head_rows else None
        found = _PART.search(name)
        if found is None:
            return None
        part, kind = found.groups()
        if part in _BY_ROWS:
            return 0
        scales_of_rows = kind != "weight" and not (self._blocks and kind != "bias")
        return None if scales_of_rows else 1
