"""Sums over the ranks of an engine on this machine's cores, through memory that they share.

See :class:`pd_serve.models.interface.Ranks`.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from pd_serve.distributed.group import Group
from pd_serve.distributed.host_sum import HostSum
from pd_serve.models.interface import Experts, Linear


class CpuRanks:
    def __init__(self, group: Group) -> None:
        self._sums = HostSum(group)

    def summed(self, linear: Linear) -> Linear:
        return _Then(linear, linear.tensors, self._sums.sum_)

    def summed_experts(self, experts: Experts) -> Experts:
        return _Then(experts, experts.tensors, self._sums.sum_)

    def gathered(self, linear: Linear) -> Linear:
        return _Then(linear, linear.tensors, self._sums.gather)


class _Then:
    """A layer that holds ``tensors``, and what happens to its output."""

    def __init__(self, layer: Callable[..., Tensor], tensors: list[Tensor], then: Callable[[Tensor], Tensor]) -> None:
        self._layer = layer
        self.tensors = tensors
        self._then = then

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._then(self._layer(*inputs))
