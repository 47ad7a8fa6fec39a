"""Sums over the ranks of an engine on this machine's cores, by torch's gloo.

See :class:`pd_serve.models.interface.Ranks`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pd_serve.distributed.group import Group
from pd_serve.models.interface import Experts, Linear


class CpuRanks:
    def __init__(self, group: Group) -> None:
        self.group = group

    def summed(self, linear: Linear) -> Linear:
        return _Summed(linear)

    def summed_experts(self, experts: Experts) -> Experts:
        return _SummedExperts(experts)

    def gathered(self, linear: Linear) -> Linear:
        return _Gathered(linear, self.group.size)


class _Summed:
    def __init__(self, linear: Linear) -> None:
        self._linear = linear

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        return _sum(self._linear(x))


class _SummedExperts:
    def __init__(self, experts: Experts) -> None:
        self._experts = experts

    @property
    def tensors(self) -> list[Tensor]:
        return self._experts.tensors

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        return _sum(self._experts(x, logits))


class _Gathered:
    def __init__(self, linear: Linear, ranks: int) -> None:
        self._linear = linear
        self._ranks = ranks

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        own = self._linear(x).contiguous()
        parts = [torch.empty_like(own) for _ in range(self._ranks)]
        dist.all_gather(parts, own)
        return torch.cat(parts, dim=-1)


def _sum(part: Tensor) -> Tensor:
    """In float32, rounded once."""
    total = part.float()
    dist.all_reduce(total)
    return total.to(part.dtype)
