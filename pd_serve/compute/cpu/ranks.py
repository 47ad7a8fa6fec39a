"""Sums over the ranks of an engine on this machine's cores, through memory that they share.

See :class:`pd_serve.models.interface.Ranks`.
"""

from __future__ import annotations

from torch import Tensor

from pd_serve.distributed.group import Group
from pd_serve.distributed.host_sum import HostSum
from pd_serve.models.interface import Experts, Linear


class CpuRanks:
    def __init__(self, group: Group) -> None:
        self._sums = HostSum(group)

    def summed(self, linear: Linear) -> Linear:
        return _Summed(linear, self._sums)

    def summed_experts(self, experts: Experts) -> Experts:
        return _SummedExperts(experts, self._sums)

    def gathered(self, linear: Linear) -> Linear:
        return _Gathered(linear, self._sums)


class _Summed:
    def __init__(self, linear: Linear, sums: HostSum) -> None:
        self._linear = linear
        self._sums = sums

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        return self._sums.sum_(self._linear(x))


class _SummedExperts:
    def __init__(self, experts: Experts, sums: HostSum) -> None:
        self._experts = experts
        self._sums = sums

    @property
    def tensors(self) -> list[Tensor]:
        return self._experts.tensors

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        return self._sums.sum_(self._experts(x, logits))


class _Gathered:
    def __init__(self, linear: Linear, sums: HostSum) -> None:
        self._linear = linear
        self._sums = sums

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        return self._sums.gather(self._linear(x))
