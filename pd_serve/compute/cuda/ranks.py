"""Sums over the ranks of an engine on GPUs, inside CUDA graphs. See :class:`pd_serve.models.interface.Ranks`.

One buffer for all sums: each is read before the next is written.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from pd_serve.compute.cuda import experts, linears
from pd_serve.compute.cuda.activations import Activation
from pd_serve.distributed import all_reduce
from pd_serve.distributed.all_reduce import AllReduce
from pd_serve.distributed.group import Group
from pd_serve.models.interface import Experts, Linear


class CudaRanks:
    """``max_rows``, ``width``, ``dtype``: of what is summed."""

    def __init__(self, group: Group, max_rows: int, width: int, dtype: torch.dtype) -> None:
        self.group = group
        timed = all_reduce.choose(group, max_rows, width, dtype)
        self._sum = AllReduce(group, max_rows, width, dtype, timed)

    def summed(self, linear: Linear) -> Linear:
        assert isinstance(linear, linears.Linear)  # of CudaOps
        return Summed(linear, self._sum)

    def summed_experts(self, mixture: Experts) -> Experts:
        assert isinstance(mixture, experts.Experts)
        return _SummedExperts(mixture, self._sum)

    def gathered(self, linear: Linear) -> Linear:
        return _Gathered(linear, self.group.size)

    def least(self, number: int) -> int:
        """Of all ranks' numbers the least."""
        return self.group.least(number)

    def first_rank_first(self) -> _Turn:
        """What rank 0 leaves on disk in it the others find there."""
        return _Turn(self.group)


class _Turn:
    def __init__(self, group: Group) -> None:
        self._group = group

    def __enter__(self) -> None:
        if self._group.rank:
            self._group.exchange()

    def __exit__(self, *_: object) -> None:
        if not self._group.rank:
            self._group.exchange()


class Summed:
    """Its part goes straight to where it is summed."""

    def __init__(self, linear: linears.Linear, total: AllReduce) -> None:
        self._linear = linear
        self._sum = total

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        self._linear(x, self._sum.input(len(x)))
        return self._sum(len(x))

    def rounds_inputs(self, rows: int) -> bool:
        """See :meth:`pd_serve.compute.cuda.linears.Linear.rounds_inputs`."""
        return self._linear.rounds_inputs(rows)

    def of_gated(self, gate_up: Tensor, act: Activation) -> Tensor:
        """See :meth:`pd_serve.compute.cuda.linears.Linear.of_gated`."""
        self._linear.of_gated(gate_up, act, self._sum.input(len(gate_up)))
        return self._sum(len(gate_up))


class _SummedExperts:
    def __init__(self, mixture: experts.Experts, total: AllReduce) -> None:
        self._experts = mixture
        self._sum = total

    @property
    def tensors(self) -> list[Tensor]:
        return self._experts.tensors

    def __call__(self, x: Tensor, logits: Tensor) -> Tensor:
        """``x`` may be what was summed last: it is read before it is written over."""
        self._experts(x, logits, self._sum.input(len(x)))
        return self._sum(len(x))


class _Gathered:
    def __init__(self, linear: Linear, ranks: int) -> None:
        self._linear = linear
        self._ranks = ranks

    @property
    def tensors(self) -> list[Tensor]:
        return self._linear.tensors

    def __call__(self, x: Tensor) -> Tensor:
        own = self._linear(x).contiguous()
        parts = own.new_empty(self._ranks, *own.shape)
        dist.all_gather_into_tensor(parts, own)
        return parts.transpose(0, 1).reshape(len(own), -1)
